"""The GPU's benchmark scripts: a dry run on the CPU, so that they are whole when there is a GPU."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "benchmarks/gpu"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(SCRIPTS))


def script(name):
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def lines(path):
    """Return the machine, the rows, and what was left out."""
    header, *every = map(json.loads, path.read_text().splitlines())
    return header, [row for row in every if "left_out" not in row], [r["left_out"] for r in every if "left_out" in r]


def test_kernels(tmp_path):
    script("kernels").main(["--dry-run", "--case", "chain 192→160", "--case", "step", "--out", str(tmp_path)])
    header, rows, left_out = lines(tmp_path / "kernels.jsonl")
    assert "dry run" in header["device"]
    assert not left_out
    assert [row["case"] for row in rows] == [
        "chain 192→160→96, forward",
        "chain 192→160→96, forward + backward",
        "NiN-CIFAR training step, batch 4",
    ]
    assert all(t["median_ms"] > 0 for row in rows for t in row["milliseconds"].values())
    assert all(error < 0.1 for error in rows[0]["relative_error"].values())
    assert rows[0]["milliseconds"].keys() == {"nin", "eager channels_last", "cuBLASLt"}
    kept = rows[1]["kept_bytes"]
    assert kept["nin"] == 0
    assert kept["eager channels_last"] >= 2 * 6 * 5 * 160 * 2  # the hidden layer in bf16
    assert "| nin |" in (tmp_path / "kernels.md").read_text()


def test_a_piece_stops_in_time_and_says_what_it_left_out(tmp_path):
    cases = ("--case", "chain 192→192→10", "--case", "1×1 192→32")
    script("kernels").main(["--dry-run", "--seconds", "0", *cases, "--out", str(tmp_path)])
    _, rows, left_out = lines(tmp_path / "kernels.jsonl")
    assert [row["case"] for row in rows] == ["chain 192→192→10, forward"]  # the first is always measured
    assert left_out == [
        "chain 192→192→10, bf16, forward + backward",
        *(f"1×1 192→32, bf16, {direction}" for direction in ("forward", "forward + backward")),
    ]
    assert "Left out, the time was over: chain 192→192→10" in (tmp_path / "kernels.md").read_text()


def test_a_killed_run_keeps_its_rows(tmp_path):
    measuring = script("measuring")
    header = measuring.machine(torch.device("cpu"))
    results = measuring.Results(tmp_path, "some", header, lambda rows: "".join(f"- {row['a']}\n" for row in rows))
    for a in (1, 2):
        results.add({"a": a})
        assert [row["a"] for row in lines(tmp_path / "some.jsonl")[1]] == list(range(1, a + 1))
        assert f"- {a}\n" in (tmp_path / "some.md").read_text()


def test_training(tmp_path, capsys):
    options = ("--dry-run", "--runs", "2", "--epochs", "2", "--seconds", "300", "--out", str(tmp_path))
    script("train").main(["digits", *options])
    _, rows, left_out = lines(tmp_path / "train-digits.jsonl")
    assert not left_out
    assert [row["epoch"] for row in rows if "epoch" in row] == [1, 2, 1, 2]
    assert sum("seconds_to" in row for row in rows) == 2
    assert "| digits | 2 |" in (tmp_path / "train-digits.md").read_text()
    assert "seed 1" in capsys.readouterr().out


def test_a_training_that_takes_too_long_keeps_its_epochs(tmp_path, monkeypatch):
    train = script("train")
    left = iter([9.0] * 6)
    monkeypatch.setattr(train.measuring.Budget, "left", lambda self: next(left, 0.0))
    train.main(["digits", "--dry-run", "--epochs", "9", "--out", str(tmp_path)])
    _, rows, left_out = lines(tmp_path / "train-digits.jsonl")
    assert rows
    assert all("seconds_to" not in row for row in rows)
    assert left_out == ["the rest of the training with seed 0"]
    assert "so far" in (tmp_path / "train-digits.md").read_text()


def test_a_folder_becomes_one_file(tmp_path):
    for part, count in (("train", 6), ("test", 2)):
        for label in ("a", "b"):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (20 * i, 0, 200 if label == "a" else 0)).save(folder / f"{i}.png")
    script("prepare").main([str(tmp_path / "images"), str(tmp_path / "cifar10.npz")])
    images = script("train").load_images(str(tmp_path / "cifar10.npz"), None)
    assert (len(images.train), len(images.test), images.channels, images.size) == (12, 4, 3, 8)
    assert images.train.labels.bincount().tolist() == [6, 6]
    blue = images.train.images[:, 2].flatten(1).float().mean(1)
    np.testing.assert_array_equal(blue == 200, images.train.labels == 0)


def test_amx_says_what_served(tmp_path, capsys):
    script("amx").main(["--dry-run", "--threads", "1", "--out", str(tmp_path)])
    header, rows, _ = lines(tmp_path / "amx.jsonl")
    assert [row["engine"] for row in rows] == ["nin", "eager"]
    assert all(row["timing"]["median_ms"] > 0 for row in rows)
    assert header["nin_takes"] in header["backend"]
    said = "has AMX" if header["processor_has_amx"] else "has no AMX"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "amx.md").read_text()


def test_a_threshold_counts_where_every_run_reached_it():
    train = script("train")
    run = {"accuracy": 0.93, "seconds": 2.0}
    summary = train.summary_of_runs(
        [{**run, "seconds_to": {"90%": 1.0, "92%": 1.5}}, {**run, "seconds_to": {"90%": 3.0}}]
    )
    assert summary["seconds_to"].keys() == {"90%"}
    assert summary["seconds_to"]["90%"]["mean"] == 2.0


def test_pieces_are_listed_and_checked(tmp_path, capsys):
    run_all = script("run_all")
    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "cifar10.npz").touch()
    assert run_all.main(["--list", "--out", str(tmp_path), "--data", str(tmp_path)]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines() if " s " in line]
    names = {"tests", "kernels", "steps", "fashion-mnist", "cifar10"}
    assert names <= {line[0] for line in listed} <= names | {"host"}
    assert sum(float(line[1]) for line in listed) <= 320
    with pytest.raises(SystemExit):
        run_all.main(["--piece", "nothing", "--out", str(tmp_path)])
    assert "--piece must be among tests" in capsys.readouterr().err


def test_without_data_it_says_what_is_left_out(tmp_path, capsys):
    assert script("run_all").main(["--list", "--out", str(tmp_path)]) == 0
    assert "left out, their data are not in --data: fashion-mnist, cifar10" in capsys.readouterr().out


def test_a_piece_that_hangs_is_ended_and_the_others_run(tmp_path, capsys, monkeypatch):
    run_all = script("run_all")
    monkeypatch.setattr(run_all, "GRACE_S", 0)
    code = "print('a row', flush=True); import time; time.sleep(60)"
    made = {"hangs": run_all.Piece(["-c", code], 3, limited=False), "ends": run_all.Piece(["-c", ""], 9, limited=False)}
    monkeypatch.setattr(run_all, "pieces", lambda *args, **options: made)
    assert run_all.main(["--dry-run", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "hangs: FAILED" in printed
    assert "ends: ended" in printed
    assert (tmp_path / "hangs.log").read_text() == "a row\n"


def test_without_a_gpu_and_without_dry_run_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here"):
        script("kernels").main(["--out", str(tmp_path)])
