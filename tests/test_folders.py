"""The folders that nin makes: what may be begun, gone on with and removed in them."""

import shutil

import pytest

from nin import folders
from nin.errors import UserError


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return folder


def test_overwriting_a_narrowing_removes_it_whole_and_nothing_else(tmp_path):
    out = fill(tmp_path / "out", *folders.FILES[:2], "narrowing.json", "narrowing.html", "control/config.json")
    folders.check_narrowing(out, None, resume=True, overwrite=False)
    folders.check_narrowing(out, None, resume=False, overwrite=True)
    with pytest.raises(UserError, match="it holds a finished narrowing: --resume prints it again"):
        folders.check_narrowing(out, None, resume=False, overwrite=False)
    with pytest.raises(UserError, match="not both"):
        folders.check_narrowing(out, None, resume=True, overwrite=True)
    with pytest.raises(UserError, match="it is what is to be narrowed"):
        folders.check_narrowing(out, tmp_path / "x" / ".." / "out", resume=False, overwrite=True)
    fill(out, "thesis.tex")
    for act in (folders.remove_narrowing, lambda o: folders.check_narrowing(o, None, resume=False, overwrite=True)):
        with pytest.raises(UserError, match=r"removes what narrowing made only, and .*thesis.tex is none of its files"):
            act(out)
    assert (out / "narrowing.json").exists()
    (out / "thesis.tex").unlink()
    folders.remove_narrowing(out)
    assert list(out.iterdir()) == []


def test_a_trained_run_is_no_narrowing_to_overwrite(tmp_path):
    run = fill(tmp_path / "run", "config.json", "model.safetensors", "metrics.csv")
    with pytest.raises(UserError, match="is not empty"):
        folders.check_narrowing(run, None, resume=False, overwrite=True)
    with pytest.raises(UserError, match="is not empty"):
        folders.check_search(run, overwrite=True)


def test_a_finished_run_without_its_report_says_how_it_is_written(tmp_path):
    run = fill(tmp_path / "run", "config.json", "model.safetensors")
    with pytest.raises(UserError, match=r"--resume writes its report\.html, which is missing; or give another --out"):
        folders.check_run(run, resume=False, overwrite=False)
    fill(run, "report.html")
    with pytest.raises(UserError, match="it holds a finished run: give another --out"):
        folders.check_run(run, resume=False, overwrite=False)


def test_an_unfinished_narrowing_goes_on_without_a_word(tmp_path):
    out = fill(tmp_path / "out", "state.safetensors", "control.json", ".state.safetensors.1234")
    folders.check_narrowing(out, None, resume=False, overwrite=False)


def test_overwriting_a_search_removes_it_whole_and_nothing_else(tmp_path):
    out = fill(tmp_path / "out", "speed.json", "speed.html", "example.py", "int8.xml", "int8.bin", "search/original/x")
    folders.check_search(out, overwrite=False)  # the same call goes on
    folders.check_search(out, overwrite=True)
    fill(out, "mine.txt")
    with pytest.raises(UserError, match=r"removes what nin speed made only, and .*mine.txt"):
        folders.check_search(out, overwrite=True)
    (out / "mine.txt").unlink()
    folders.remove_search(out)
    assert list(out.iterdir()) == []


def test_a_file_is_not_replaced_unasked(tmp_path):
    path = fill(tmp_path, "p.csv") / "p.csv"
    folders.check_new_file(tmp_path / "q.csv", overwrite=False)
    folders.check_new_file(path, overwrite=True)
    for wrong, words in ((path, "exists: give another name, or --overwrite"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=words):
            folders.check_new_file(wrong, overwrite=False)
    with pytest.raises(UserError, match="there is no such folder"):
        folders.check_new_file(tmp_path / "new" / "p.csv", overwrite=True)


def test_who_gives_a_file_of_a_run_or_the_folder_of_all_runs_is_told_which_to_give(tmp_path):
    def refused(path):
        with pytest.raises(UserError, match="is not a run folder of nin: ") as error:
            folders.check_is_run(path)
        return str(error.value).partition("of nin: ")[2]

    run, photo = tmp_path / "runs" / "a", tmp_path / "photo.jpg"
    run.mkdir(parents=True)
    assert refused(run.parent) == "it has no config.json. Make one with: nin train DATA --out RUN"
    for path in (run / folders.CONFIG_FILE, run / folders.MODEL_FILE, photo):
        path.touch()
    assert refused(run / folders.MODEL_FILE) == f"it is a file; give the folder that it lies in, {run}"
    assert refused(photo) == "it is a file"
    assert refused(run.parent) == f"it holds {run}: give the folder of one run"
    folders.check_is_run(run)
    shutil.copytree(run, run.with_name("b"))
    assert refused(run.parent) == f"it holds {run}, …: give the folder of one run"


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    folders.check_can_make(tmp_path / "new" / "maps")
    monkeypatch.setattr(folders.os, "access", lambda path, mode: path.name != "closed")  # root may write anywhere
    folders.check_can_make(tmp_path / "new" / "maps")
    for folder in ("closed", "closed/maps", "closed/new/maps"):
        with pytest.raises(UserError, match="closed: permission denied, nothing can be written there"):
            folders.check_can_make(tmp_path / folder)
