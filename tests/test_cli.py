"""The shell: what a person types, what they get, and one line for each mistake."""

import csv
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import nin
from nin import data, models, training
from nin.cli import app, check, console, demo, predict
from nin.config import TrainConfig
from nin.display import progress_bar
from nin.inference import classifier


@pytest.fixture(scope="module")
def pictures(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, shade in enumerate((0, 128)):
        Image.new("L", (8, 8), shade).save(folder / f"{i}.png")
    return folder


def cli_main(*arguments):
    app.main(list(arguments))


def fails(capsys, *arguments):
    """Return the exit status and the one line of a verb that fails."""
    with pytest.raises(SystemExit) as stop:
        cli_main(*arguments)
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert printed.out == ""
    assert lines[-1].startswith("nin: ")
    return stop.value.code, lines[-1]


def test_train_writes_a_run_and_says_how_good_it_is(run, capsys):
    assert {"model.safetensors", "config.json", "metrics.csv", "timings.csv", "report.html"} == {
        p.name for p in run.iterdir()
    }
    # a run can be reported on again from what it recorded
    (run / "report.html").unlink()
    cli_main("report", str(run))
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").exists()


def test_train_prints_json_on_standard_output_alone(tmp_path, capsys):
    cli_main("train", "digits", "--out", str(tmp_path / "run"), "--epochs", "1", "--json")
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["test_images"] == 451
    assert 0 <= result["test_accuracy"] <= 1
    assert "epoch   1/1" in printed.err


def test_predict_shows_a_table(run, pictures, capsys):
    cli_main("predict", str(run), str(pictures))
    out = capsys.readouterr().out
    assert "0.png" in out
    assert "%" in out


def test_names_are_shown_as_they_are(run, tmp_path, capsys):
    """None of them is markup or the name of a picture."""
    (tmp_path / "odd[").mkdir()
    for name in ("x].png", ":cat:.png", "[red].png"):
        Image.new("L", (8, 8)).save(tmp_path / "odd[" / name)
    (tmp_path / "odd[" / "[bold].png").write_text("no image")
    cli_main("predict", str(run), str(tmp_path / "odd["))
    printed = capsys.readouterr()
    for name in ("odd[/x].png", ":cat:.png", "[red].png"):
        assert name in printed.out
    assert "[bold].png" in printed.err
    cli_main("predict", str(run), str(tmp_path / "odd["), "--csv", str(tmp_path / "odd[" / "p].csv"))
    assert "odd[/p].csv" in capsys.readouterr().err
    classes = ("[red]", "[/x]", ":cat:")
    prediction_of_three = classifier.Prediction("[red]", 0.5, (0.5, 0.3, 0.2), classes)
    predict.show_predictions(["a.png"], [prediction_of_three], 3)
    check.show_findings([data.Finding("[red]/[bold].png", "unreadable", "[/x]")])
    with console.ProgressBar("Reading [/x]") as bar:
        console.messages.print(bar.progress.get_renderable())
        bar.line("[red]")
    printed = capsys.readouterr()
    assert all(name in printed.out for name in classes)
    assert all(name in printed.err for name in ("[red]/[bold].png: [/x]", "Reading [/x]", "\n[red]\n"))


@pytest.mark.parametrize("options", [[], ["--json"], ["--csv", "p.csv"]], ids=["table", "json", "csv"])
def test_a_name_that_is_no_valid_unicode(run, tmp_path, options):
    (tmp_path / "images").mkdir()
    path = os.fsdecode(os.fsencode(tmp_path / "images") + b"/caf\xe9.png")
    Image.new("L", (8, 8)).save(path)
    done = subprocess.run(
        [sys.executable, "-m", "nin", "predict", str(run), "images", *options],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},  # as where the locale is UTF-8
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    if options == ["--json"]:
        assert json.loads(done.stdout)[0]["image"] == os.path.join("images", os.path.basename(path))
    elif options:
        assert b"images/caf\xe9.png" in (tmp_path / "p.csv").read_bytes()
    else:
        assert r"caf\udce9.png" in done.stdout


def test_predict_as_json_csv_and_maps_agree(run, pictures, tmp_path, capsys):
    paths = [str(pictures / "0.png"), str(pictures / "1.png")]
    maps, table = tmp_path / "maps", tmp_path / "predictions.csv"
    cli_main("predict", str(run), *paths, "--json", "--csv", str(table), "--maps", str(maps), "--top", "2")
    answers = json.loads(capsys.readouterr().out)
    expected = classifier.load(run).predict(paths)
    assert [a["label"] for a in answers] == [p.label for p in expected]
    assert [len(a["top"]) for a in answers] == [2, 2]
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [p.label for p in expected]
    assert [row["image"] for row in rows] == paths
    assert sum(float(rows[0][str(digit)]) for digit in range(10)) == pytest.approx(1, abs=1e-4)
    drawn = sorted(maps.iterdir())
    assert len(drawn) == 2
    with Image.open(drawn[0]) as picture:
        assert picture.size[0] > 2 * 256  # the image, and its map with a scale
        colours = np.asarray(picture).reshape(-1, 3).astype(int)
        assert (abs(colours - [27, 27, 27]).sum(1) < 20).any()  # the ink of the titles
        assert (np.ptp(colours, axis=1) > 100).any()  # the colours of the map


def test_drawing_maps_shows_how_far_it_is(run, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "ProgressBar", functools.partial(console.ProgressBar, seconds_between_lines=0))
    cli_main("predict", str(run), str(pictures), "--maps", str(tmp_path / "maps"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Drawing maps: ")]
    assert [line.split(",")[0] for line in lines] == ["Drawing maps: 1 of 2", "Drawing maps: 2 of 2"]


def test_a_reader_that_has_enough_ends_json_without_a_word(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as stop:
            cli_main("cost", "nin_digits", "--count-only", "--json")
    assert (stop.value.code, capfd.readouterr().err) == (1, "")


def test_a_trained_run_has_one_number_of_parameters_and_is_timed_as_it_answers(run, capsys):
    model, info = nin.checkpoint.load_model(run)
    folded = nin.load(run).model
    count = sum(p.numel() for p in folded.parameters())
    assert count < sum(p.numel() for p in model.parameters())  # the gains of its standardised filters
    cli_main("cost", str(run), "--count-only", "--json")
    counted = json.loads(capsys.readouterr().out)
    assert counted["parameters"] == count
    shape = (1, info.preprocessing.channels, info.preprocessing.size, info.preprocessing.size)
    measured = nin.cost(model, shape, measured=True)
    assert measured.parameters == nin.cost(folded, shape).parameters == count
    assert sum(layer.parameters for layer in measured.layers) == count
    assert any(isinstance(m, nin.layers.StandardisedConv2d) for m in model.modules())  # it is left as it is


@pytest.mark.parametrize("name", ["nin_imagenet", "timm:tf_efficientnet_lite0"])
def test_the_table_of_costs_fits_into_80_columns(name, capsys, monkeypatch):
    from nin.cli import cost

    narrow = Console(width=80, **console.PLAIN_TEXT)
    monkeypatch.setattr(console, "results", narrow)
    cli_main("cost", name, "--count-only")
    printed = capsys.readouterr()
    network, size = cost.find_network(name, None, None)
    layers = nin.cost(network, (1, *size)).layers
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    for layer in layers:  # each in one line, whole
        assert any(layer.name in line and f"{layer.macs:,}" in line for line in lines), layer.name
    assert "left out, as the terminal is 80 columns wide: activation" in printed.err


def test_cost_of_a_name_and_of_a_run(run, capsys):
    cli_main("cost", "nin_cifar", "--count-only", "--json")
    counted = json.loads(capsys.readouterr().out)
    assert (counted["macs"], counted["parameters"]) == (222_486_528, 966_986)
    cli_main("cost", str(run))
    assert "blocks.0.0.convs.0" in capsys.readouterr().out
    cli_main("cost", "nin_cifar", "--classes", "100", "--count-only", "--json")
    assert json.loads(capsys.readouterr().out)["parameters"] == 984_356


def test_a_run_folder_knows_its_own_classes_and_channels(run, capsys):
    for option in ("--classes", "--channels"):
        code, line = fails(capsys, "cost", str(run), option, "3")
        assert (code, "--classes and --channels go with the name of a network" in line) == (2, True)


def test_bench_lists_measures_and_draws(tmp_path, capsys):
    cli_main("bench", "list")
    names = capsys.readouterr().out.split("\n")
    assert {"chain-192-160-96", "1x1-192-32", "nin-cifar-64", "train-nin-cifar-64"} <= set(names)
    chart = tmp_path / "chart.html"
    cli_main("bench", names[0], "--dtype", "float32", "--engine", "nin", "--html", str(chart), "--json")
    measured = json.loads(capsys.readouterr().out)
    assert [m["engine"] for m in measured["measurements"]] == ["nin"]
    assert chart.exists()


def test_demo_does_the_main_job(tmp_path, capsys):
    out = tmp_path / "demo"
    demo.demo(out=out, config=TrainConfig(epochs=2), bottleneck_batch_size=1)
    printed = capsys.readouterr().out
    assert "451 images" in printed
    assert printed.count("-is-a-") == demo.SAMPLES
    assert "batch 1, float32" in printed
    assert re.search(r"the bottleneck[ │]+3.8× less[ │]+3.8× less[ │]+[\d.]+× less", printed)
    assert (out / "report.html").exists()
    # a second one replaces the first
    demo.remove_earlier_demo(out)
    assert not out.exists()


@pytest.mark.parametrize("stranger", ["thesis.txt", "samples/mine.doc", "config.json"])
def test_a_demo_removes_no_one_elses_folder(tmp_path, stranger):
    out = tmp_path / "demo"
    (out / "samples").mkdir(parents=True)
    (out / stranger).write_text("{}")
    if stranger == "config.json":
        (out / "samples").rmdir()
    demo.remove_earlier_demo(out)
    assert (out / stranger).exists()


def test_a_demo_that_was_interrupted_goes_on(tmp_path, capsys):
    out, config = tmp_path / "demo", TrainConfig(epochs=2)
    with pytest.raises(KeyboardInterrupt):
        training.train("digits", config, out=out, keeping=training.CheckpointOptions(stop=lambda: True))
    assert (out / "state.safetensors").exists()
    demo.demo(out=out, json=True, config=config, bottleneck_batch_size=1)
    result = json.loads(capsys.readouterr().out)
    assert result["test_images"] == 451
    assert len(result["predictions"]) == demo.SAMPLES
    wide, narrow = result["bottleneck"]
    assert wide["macs"] == 28 * 28 * 256 * 256 * 16
    assert narrow["macs"] == 28 * 28 * (256 * 64 + 64 * 256 * 16)
    assert wide["median_ms"] > 0
    assert narrow["median_ms"] > 0


MISTAKES = [
    (["train"], "nin train needs DATA; nin train --help"),
    (["train", "digits"], "nin train needs --out"),
    (["trian"], 'Did you mean "train"'),
    (["fuse"], "there is no verb fuse: fusing is nin.fuse(model, x) in Python"),
    (["evaluate", "run"], "there is no verb evaluate: nin report RUN says how good a run is"),
    (["cost", "nowhere/run"], "nowhere/run does not exist: give a run folder"),
    (["speed", "nowhere/run", "--data", "digits"], "nowhere/run does not exist: give a run folder"),
    (["train", "digits", "--out", "{tmp}/run", "--epochs", "0"], "epochs must be at least 1, got 0"),
    (["train", "digits", "--out", "{tmp}/run", "--epochs", "many"], "--epochs"),
    (["train", "{tmp}/none", "--out", "{tmp}/run"], "there is no such folder"),
    (["train", "digitz", "--out", "{tmp}/run"], "did you mean digits"),
    (["train", "{tmp}/empty", "--out", "{tmp}/run"], "{tmp}/empty"),
    (["train", "{tmp}/texts", "--out", "{tmp}/run"], "{tmp}/texts"),
    (["train", "{tmp}/one", "--out", "{tmp}/run"], "{tmp}/one"),
    # before any image is read: there is none
    (["train", "{tmp}/none", "--out", "{tmp}/texts"], "{tmp}/texts is not empty"),
    (["train", "{tmp}/none", "--out", "{tmp}/texts", "--resume", "--overwrite"], "give resume or overwrite, not both"),
    (["train", "{tmp}/none", "--out", "{tmp}/texts", "--overwrite"], "overwrite removes runs only"),
    (["train", "{tmp}/none", "--out", "{tmp}/texts", "--folds", "3"], "{tmp}/texts is not empty"),
    (["train", "{tmp}/none", "--out", "{tmp}/file"], "{tmp}/file is a file"),
    (["train", "{tmp}/none", "--out", "{tmp}/file", "--folds", "3"], "{tmp}/file is a file"),
    (["train", "digits", "--out", "{tmp}/run", "--model", "resnet"], "model must be one of"),
    (["train", "digits", "--out", "{tmp}/run", "--model", "nin_imagenet"], "at least 39×39 pixels, got 8×8"),
    (["train", "digits", "--out", "{tmp}/run", "--device", "tpu"], "device must be"),
    (["check", ""], "an argument is empty"),
    (["train", "digits", "--out", ""], "--out is empty"),
    (["predict", "{tmp}/none", "x.png"], "does not exist: give a run folder"),
    (["predict", "{tmp}/none", "x.png", "--csv", "{tmp}/texts"], "{tmp}/texts is a folder"),
    (["predict", "{tmp}/none", "x.png", "--csv", "{tmp}/new/p.csv"], "{tmp}/new: there is no such folder"),
    (["cost", "nothing"], "model must be one of"),
    (["cost", "nin_cifar", "--classes", "-1"], "at least 1"),
    (["cost", "nin_imagenet", "--size", "8"], "nin_imagenet does not take images of 3×8×8: "),
    (["cost", "timm:vit_tiny_patch16_224", "--size", "100"], "does not take images of 3×100×100: "),
    (["cost", "torchvision:alexnet", "--size", "8", "--count-only"], "another --size may help"),
    (["report", "{tmp}"], "is not a run folder"),
    (["bench", "nothing"], "cases must be among"),
    (
        ["train", "digits", "--out", "{tmp}/run", "--learning-rate", "fast"],
        "--learning-rate must be a number or auto, got",
    ),
    (
        ["train", "digits", "--out", "{tmp}/run", "--batch-size", "big"],
        "--batch-size must be a whole number or auto, got",
    ),
    (
        ["train", "digits", "--out", "{tmp}/run", "--recipe", "fine"],
        "default, speed or finetune, got 'fine'; did you mean f",
    ),
    (["train", "digits", "--out", "{tmp}/run", "--test-fraction", "x"], "--test-fraction must be a number, got 'x'"),
    (["train", "digits", "--out", "{tmp}/run", "--freeze=maybe"], "--freeze must be yes or no"),
    (
        ["train", "digits", "--out", "{tmp}/run", "--flip", "maybe"],
        "'maybe' is one argument too many; nin train --help",
    ),
    (["export", "{tmp}", "--format", "onyx"], "--format must be onnx, pt2 or openvino, got 'onyx'; did you mean onnx?"),
    (["serve", "{tmp}", "--no-browser"], "is not a run folder"),
    (["serve", "--no-browser", "--port", "99999"], "port must be 0 to 65535, got 99999"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_each_mistake_gets_one_line_and_leaves_nothing(arguments, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "notes.txt").write_text("words")
    (tmp_path / "file").touch()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / "one" / "cat" / f"{i}.png")
    code, line = fails(capsys, *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert code == 2
    assert message.replace("{tmp}", str(tmp_path)) in line
    assert not (tmp_path / "run").exists()


def test_predict_names_the_file_that_is_missing_or_broken(run, pictures, tmp_path, capsys):
    code, line = fails(capsys, "predict", str(run), str(tmp_path / "none.png"))
    assert (code, line) == (2, f"nin: {tmp_path / 'none.png'} does not exist")
    whole = (pictures / "1.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    code, line = fails(capsys, "predict", str(run), str(tmp_path / "half.png"))
    assert code == 2
    assert "half.png" in line
    code, line = fails(capsys, "predict", str(run), *2 * [str(tmp_path / "half.png")])
    assert (code, line) == (2, "nin: none of 2 images can be read")


@pytest.mark.parametrize(
    "options", [[], ["--json"], ["--maps", "maps"], ["--csv", "p.csv"], ["--csv", "p.csv", "--json"]]
)
def test_a_damaged_file_does_not_take_the_others_answers(options, run, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "folder")
    (tmp_path / "folder" / "half.png").write_bytes(b"\x89PNG and no more")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.png").write_text("a text")
    for paths, left_out in (
        (["folder/0.png", "mine.png", "none.png", "folder/1.png"], ["mine.png: ", "none.png: there is no such file"]),
        (["folder"], ["folder/half.png: "]),
        (["folder/0.png", "folder/1.png", "empty", "none"], ["empty holds no image", "none: there is no such file"]),
    ):
        if paths == ["folder"]:  # it was asked for what is in it
            cli_main("predict", str(run), *paths, *options)
        else:
            with pytest.raises(SystemExit) as stop:
                cli_main("predict", str(run), *paths, *options)
            assert stop.value.code == 1
        printed = capsys.readouterr()
        if "--csv" in options:
            with open("p.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            assert [row["image"] for row in rows if row["label"]] == ["folder/0.png", "folder/1.png"]
            assert all(row["problem"] for row in rows if not row["label"])
            assert "cannot be read: their rows have a problem" in printed.err
            os.remove("p.csv")
        else:
            lines = [line for line in printed.err.splitlines() if "maps in the folder" not in line]
            assert len(lines) == len(left_out)
            assert all(any(line.startswith(f"left out {start}") for line in lines) for start in left_out)
        if "--json" in options:
            assert [answer["image"] for answer in json.loads(printed.out)] == ["folder/0.png", "folder/1.png"]
        elif options != ["--csv", "p.csv"]:
            assert "folder/0.png" in printed.out
            assert "folder/1.png" in printed.out
        if "--maps" in options:
            assert len(list((tmp_path / "maps").iterdir())) == 2
            shutil.rmtree("maps")


NO_NUMBERS = ("-1", "nan", "1.5", "many", "")
OPTIONS = [
    *((("cost", "nin_digits", "--count-only"), name) for name in ("--classes", "--size", "--channels")),
    (("predict", "{run}", "{pictures}"), "--top"),
    *((("narrow", "{run}", "--data", "digits", "--macs", "0.5"), n) for n in ("--finetune", "--images", "--batch")),
    *((("narrow", "{run}", "--data", "digits"), name) for name in ("--macs", "--latency", "--parameters")),
    (("narrow", "{run}", "--data", "digits", "--macs", "0.5"), "--budgets"),
    *(
        (("train", "digits", "--out", "{tmp}/run"), name)
        for name in ("--epochs", "--batch-size", "--threads", "--seed", "--shift", "--checkpoint-steps")
    ),
    *(
        (("train", "digits", "--out", "{tmp}/run"), name)
        for name in ("--learning-rate", "--warmup", "--momentum", "--weight-decay", "--label-smoothing", "--dropout")
    ),
    *(
        (("train", "digits", "--out", "{tmp}/run"), name)
        for name in ("--gradient-clip", "--ema", "--checkpoint-minutes")
    ),
    (("serve", "--no-browser"), "--port"),
]
REAL = ("--learning-rate", "--weight-decay", "--gradient-clip", "--checkpoint-minutes")  # 1.5 is one of these


@pytest.mark.parametrize(("words", "option"), OPTIONS, ids=[f"{words[0]} {option}" for words, option in OPTIONS])
def test_a_number_out_of_range_is_one_line(words, option, run, pictures, tmp_path, capsys):
    places = {"run": run, "pictures": pictures, "tmp": tmp_path}
    for value in NO_NUMBERS:
        if (option in REAL and value == "1.5") or (option == "--budgets" and not value):
            continue
        code, line = fails(capsys, *(word.format(**places) for word in words), option, value)
        assert code == 2, (value, line)
        assert not (tmp_path / "run").exists()


NOT_ONE_IMAGE = {
    "torchvision:raft_small": r"takes 2 inputs \(image1, image2\), not one of images",
    "torchvision:r3d_18": r"takes videos or volumes \(N, C, D, H, W\), not images",
    "othernets:Tokens": "takes numbers of tokens, not images",
    "othernets:Sound": r"takes series or sound \(N, C, L\), not images",
    "othernets:Vectors": "takes vectors of 784 values, by its first layer, not images",
    "othernets:fails": r"failed in .*othernets.py, line \d+: ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("name", NOT_ONE_IMAGE)
def test_a_network_of_other_inputs_says_so(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "othernets.py").write_text(
        "from torch import nn\n"
        "def Tokens(): return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))\n"
        "def Sound(): return nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU())\n"
        "def Vectors(): return nn.Sequential(nn.Linear(784, 10))\n"
        "def fails(): return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "othernets", raising=False)
    code, line = fails(capsys, "cost", name, "--count-only")
    assert code == 2
    assert re.search(NOT_ONE_IMAGE[name], line)
    assert "--size" not in line


def test_a_full_disk_is_one_line_with_the_file(tmp_path, capsys, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, line = fails(capsys, "train", "digits", "--out", str(tmp_path / "run"), "--epochs", "1")
    assert code == 1
    assert "No space left on device" in line
    assert str(tmp_path / "run") in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "digits", "--epochs", "1", "--out", "{}"),
        ("narrow", "{run}", "--data", "digits", "--macs", "0.6", "--out", "{}"),
        ("predict", "{run}", "{pictures}", "--csv", "{}.csv"),
        ("shards", "{classes}", "--out", "{}"),
        ("export", "{run}", "--format", "pt2", "--out", "{}.pt2"),
        ("report", "{run}", "--page", "{}"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="no folder here that nobody may write to")
def test_a_folder_that_cannot_be_written_is_one_line(words, run, pictures, tmp_path, capsys):
    for name in "ab":
        shutil.copytree(pictures, tmp_path / name)
    places = {"run": run, "pictures": pictures, "classes": tmp_path}
    code, line = fails(capsys, *(word.format("/sys/kernel/nin", **places) for word in words))
    assert code in (1, 2)
    assert "/sys/kernel" in line
    assert "ermitted" in line or "denied" in line or "Read-only" in line


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_keep_the_steps_done_and_resume(number, status, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "nin", "train", "digits", "--out", str(out), "--epochs", "6"]
    process = subprocess.Popen([*command, "--checkpoint-steps", "1"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    cli_main("train", "digits", "--out", str(tmp_path / "whole"), "--epochs", "6")
    for name in ("model.safetensors", "metrics.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


VERBS = [name for name in app.app if not name.startswith("-")]

# Runs commands where PyTorch and other slow packages cannot be imported; prints (status, output, errors) of each.
WITHOUT_TORCH = """
import contextlib, io, json, sys

sys.modules.update(dict.fromkeys(("torch", "torchvision", "fastapi", "sklearn", "numpy", "PIL")))
from nin.cli import app

results = []
for arguments in json.loads(sys.argv[1]):
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            app.main(arguments)
        except SystemExit as stop:
            status = stop.code
    results.append((status, output.getvalue(), errors.getvalue()))
print(json.dumps(results))
"""


def run_without_torch(*commands):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_and_wrong_arguments_need_no_torch(run, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    full, made = str(tmp_path), str(run)
    mistakes = {
        ("train", "digits", "--out", "run", "--epochs", "0"): "epochs must be at least 1",
        ("train", "digits", "--out", "run", "--checkpoint-steps", "0"): "checkpoint_steps at least 1",
        ("predict", "run", "a.png", "--resume"): "--resume goes on with a file",
        ("predict", "run", "a.png", "--parquet", "p.csv"): "must end in .parquet",
        ("cost", "nin_cifar", "--size", "0"): "size must be at least 1",
        ("report", "run", "--beside", "other"): "--beside is for the page",
        ("serve", "--beside", "other"): "--beside needs a run",
        # what is there, and what networks there may be, is looked at before PyTorch is imported
        ("train", "digits", "--out", "run", "--model", "nin_cifr"): "did you mean nin_cifar?",
        ("train", "digits", "--out", full): "is not empty",
        ("train", "digits", "--out", full, "--folds", "3"): "is not empty",
        ("train", "digits", "--out", full, "--overwrite"): "overwrite removes runs only",
        ("train", "digitz", "--out", "run"): "did you mean digits?",
        ("check", "nowhere"): "there is no such folder",
        ("check", full, "--csv", f"{full}/note.txt"): "exists: give another name, or --overwrite",
        ("shards", full, "--out", full): "holds something else",
        ("predict", "run", "a.png"): "run does not exist: give a run folder",
        ("predict", full, "a.png"): "is not a run folder of nin",
        ("predict", made, "a.png"): "a.png does not exist",
        ("predict", made, full, "--maps", f"{full}/note.txt"): "is a file: give --maps the folder",
        ("cost", "nin_cifr"): "did you mean nin_cifar?",
        ("bench", "--html", f"{full}/note.txt"): "exists: give another name, or --overwrite",
        ("narrow", "run", "--data", "digits", "--macs", "0.5", "--out", "new"): "run does not exist: give a run folder",
        ("narrow", made, "--data", "digits", "--macs", "0.5", "--out", full): "is not empty",
        (
            "narrow",
            made,
            "--data",
            "digits",
            "--macs",
            "0.5",
            "--out",
            made,
            "--overwrite",
        ): "is what is to be narrowed",
        ("speed", "resnet18", "--data", "digits"): "network must be a run folder",
        ("speed", made, "--data", "digits", "--out", full): "is not empty",
        ("speed", made, "--data", "digits", "--out", full, "--overwrite"): "is not empty",
        ("export", "run"): "run does not exist: give a run folder",
        ("export", made, "--out", f"{full}/note.txt"): "exists: give another name, or --overwrite",
        ("export", made, "--out", f"{full}/net.xml"): "give --format openvino, or another name",
        ("report", "run"): "run does not exist: give a run folder",
        ("report", made, "--page", full): "it holds something else",
        ("serve", full): "is not a run folder of nin",
        ("serve", "--port", "99999999"): "port must be 0 to 65535, got 99999999",
        **{(verb, "--mistake"): "--mistake" for verb in VERBS},
    }
    whole, *results = run_without_torch(["--help"], *([verb, "--help"] for verb in VERBS), *mistakes)
    helps, errors = results[: len(VERBS)], results[len(VERBS) :]
    assert whole[0] == 0
    for verb, (status, output, error) in zip(VERBS, helps, strict=True):
        assert verb in whole[1]
        assert (status, error) == (0, "")
        assert f"nin {verb}" in output
    for message, (status, output, error) in zip(mistakes.values(), errors, strict=True):
        assert (status, output, error.count("\n")) == (2, "", 1)
        assert message in error


@pytest.mark.parametrize("option", ["--no-json", "--no-strict", "--empty-skip", "--config"])
def test_options_have_no_negative_form(option, capsys):
    verb = ("narrow", "r", "--data", "d") if option == "--empty-skip" else ("train", "d", "--out", "o")
    assert "Unknown option" in fails(capsys, *verb, option)[1]


def test_every_model_has_an_image_size():
    assert models.IMAGE_SIZES.keys() == models.MODELS.keys()
    for name, size in models.IMAGE_SIZES.items():
        model = models.create(name, 4).to("meta")
        channels = 1 if name == "nin_digits" else 3
        assert model(torch.empty(1, channels, size, size, device="meta")).shape == (1, 4)


def python_out_of_memory():
    raise MemoryError


def cpu_out_of_memory():
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes")


def gpu_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("factory", [python_out_of_memory, cpu_out_of_memory, gpu_out_of_memory])
def test_out_of_memory_says_what_to_lower(factory, capsys):
    code, line = fails(capsys, "cost", f"{__name__}:{factory.__name__}")
    assert code == 1
    assert "out of memory; lower --batch-size" in line


def test_other_errors_are_not_hidden(monkeypatch):
    def mistaken(*_, **__):
        raise RuntimeError("a mistake")

    monkeypatch.setattr("nin.training.train", mistaken)
    with pytest.raises(RuntimeError, match="a mistake"):
        cli_main("train", "digits", "--out", "run")


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose one number is the time, in seconds, of progress bars."""
    now = [0.0]
    monkeypatch.setattr(progress_bar, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_on_a_terminal_a_bar_says_what_is_done_of_what_and_the_time_left(monkeypatch, clock):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, **console.PLAIN_TEXT)
    monkeypatch.setattr(console, "messages", terminal)

    def shown():
        with terminal.capture() as capture:
            terminal.print(bar.progress.get_renderable())
        line, *_ = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capture.get()).strip().splitlines()
        return line.replace("━", "").replace("╸", "").replace("╺", "").split()

    with console.ProgressBar("Narrowing") as bar:
        assert shown() == ["Narrowing"]
        for done in (1, 2, 4):
            clock[0] += 10 * done
            bar.on_progress("Looking", done, 8)
        assert shown() == ["Looking", "4", "of", "8,", "0:01:20", "left"]
        clock[0] += 30  # a long step: the time goes on
        assert shown() == ["Looking", "4", "of", "8,", "0:00:50", "left"]
        bar.on_progress("Looking", 8, 8)
        assert shown() == ["Looking", "8", "of", "8,", "0:00:00", "left"]
        bar.on_progress("Timing layers", 1234, 0)  # a total that is not known: nothing is complete
        assert shown() == ["Timing", "layers", "1,234"]
        bar.on_progress("Fine-tuning, loss 0.5", 500, 1000)  # goes on where it was stopped
        assert shown() == ["Fine-tuning,", "loss", "0.5", "500", "of", "1,000"]
        clock[0] += 7
        bar.on_progress("Fine-tuning, loss 0.4", 507, 1000)
        assert shown() == ["Fine-tuning,", "loss", "0.4", "507", "of", "1,000,", "0:08:13", "left"]
        bar.on_progress("Timing layers, plan 1 of at most 6, 12,345 timed", 41, 42)
        assert " ".join(shown()) == "Timing layers, plan 1 of at most 6, 12,345 timed 41 of 42"


def test_the_lines_in_a_log_have_the_time_left_too(capsys, clock):
    with console.ProgressBar("Predicting") as bar:
        for done in (100, 200, 300):
            clock[0] += 9
            bar.update(done, 30_000)
    assert capsys.readouterr().err.splitlines() == ["Predicting: 200 of 30,000, 0:44:42 left"]


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys):
    with console.ProgressBar("Reading", seconds_between_lines=0) as bar:
        bar.update(1, 5)
        bar.update(2, 0)
        bar.update(0, 0, "Converting, stage 3 of 4")
        bar.on_progress("Writing", 5, 5)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Reading: 1 of 5", "Reading: 2", "Converting, stage 3 of 4", "Writing: 5 of 5"]
    with console.ProgressBar("Reading", seconds_between_lines=0.5) as bar:
        bar.update(1, 5)  # too early
        time.sleep(0.6)
        bar.update(2, 5)
        bar.update(3, 5)
        bar.line("left out a.png")
        time.sleep(0.3)
        bar.update(4, 5)  # too early after the line
        time.sleep(0.3)
        bar.update(5, 5)
    lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]  # without the time left
    assert lines == ["Reading: 2 of 5", "left out a.png", "Reading: 5 of 5"]


def test_a_table_of_predictions_is_not_overwritten_unasked(run, pictures, tmp_path, capsys):
    table = tmp_path / "p.csv"
    cli_main("predict", str(run), str(pictures / "*.png"), "--csv", str(table))  # in quotes, as no shell expands it
    assert "2 images in" in capsys.readouterr().err
    before = table.read_bytes()
    assert before.count(b"\n") == 3
    code, line = fails(capsys, "predict", str(run), str(pictures / "0.png"), "--csv", str(table))
    assert code == 2
    assert "exists: give another name, or --overwrite" in line
    assert table.read_bytes() == before
    cli_main("predict", str(run), str(pictures / "0.png"), "--csv", str(table), "--overwrite")
    assert "1 image in" in capsys.readouterr().err
    assert table.read_bytes().count(b"\n") == 2


def test_tables_fit_80_columns_and_keep_both_ends_of_a_path(run, monkeypatch):
    terminal = Console(file=io.StringIO(), width=80, **console.PLAIN_TEXT)
    monkeypatch.setattr(console, "results", terminal)
    console.print_table(
        [("image", "class", "then"), ("photos/of/the/summer/of/the/year/2024/IMG_0001.jpg", "cat", "dog 3.0 %, " * 5)],
        middle=1,
    )
    printed = terminal.file.getvalue()
    assert max(map(len, printed.splitlines())) <= 80
    assert all(text in printed for text in ("photos/", "IMG_0001.jpg", "cat"))
    assert printed.count("…") == 1
    counted = nin.cost(models.nin_cifar(), (1, 3, 32, 32))
    console.print_table(counted.rows(), left=4, total=True)
    assert "…" not in terminal.file.getvalue().replace(printed, "")  # folded, not cut


def test_an_unfinished_run_says_so(run, pictures, tmp_path, monkeypatch, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    config = json.loads((unfinished / "config.json").read_text())
    (unfinished / "config.json").write_text(json.dumps({**config, "result": {}}))
    for command in (
        ("predict", str(unfinished), str(pictures / "0.png")),
        ("export", str(unfinished), "--format", "pt2"),
        ("narrow", str(unfinished), "--data", "digits", "--macs", "0.6", "--images", "64", "--dry-run"),
    ):
        cli_main(*command)
        assert "is unfinished, after" in capsys.readouterr().err, command
    monkeypatch.setattr("nin.server.serve", lambda *_, **__: None)
    cli_main("serve", str(run), "--beside", str(unfinished), "--port", "0", "--no-browser")
    assert capsys.readouterr().err.count("is unfinished, after") == 1
    (unfinished / "config.json").unlink()
    (unfinished / "state.safetensors").write_bytes(b"")
    _, line = fails(capsys, "predict", str(unfinished), str(pictures / "0.png"))
    assert "unfinished run, stopped before its first epoch ended" in line
    assert f"--out {unfinished} --resume" in line


def test_a_default_that_is_given_is_a_setting_like_any_other(tmp_path, monkeypatch, capsys):
    """With the resumed run's other value it is a contradiction, and a recipe does not replace it."""
    monkeypatch.chdir(tmp_path)

    def stop(self, p, prefix=""):
        if p.row:
            raise KeyboardInterrupt

    command = ("train", "digits", "--out", "out", "--epochs", "2", "--seed", "3", "--learning-rate", "0.05")
    with monkeypatch.context() as patched:
        patched.setattr("nin.cli.train.TrainingBar.show", stop)
        with pytest.raises(SystemExit):
            cli_main(*command)
    capsys.readouterr()
    for option, value, before in (("learning-rate", "0.1", "0.05"), ("seed", "0", "3")):
        code, line = fails(capsys, "train", "digits", "--out", "out", "--resume", f"--{option}", value)
        assert code == 2
        assert f"--{option} {before}, now {value}" in line
    sizes = {"images": 1000, "image_size": 32, "flip": False, "shift": 0}
    assert nin.TrainConfig(recipe="speed", learning_rate=0.1).resolve(**sizes).learning_rate == 0.1
    assert nin.TrainConfig(recipe="speed").resolve(**sizes).learning_rate == 0.2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "digits", "--out", "x", "--lr", "0.1"], "Unknown option: --lr. Did you mean --learning-rate?"),
        (["train", "digits", "--out", "x", "--shift", "40"], "shift must be below the 8 pixels of the images, got 40"),
        (["train", "digits", "--out", "{file}"], "is a file: give another --out"),
        (["predict", "no-run", "a.png"], "no-run does not exist: give a run folder"),
        (["train", "digits", "--out", "{run}"], "is not empty, it holds a finished run: give another --out, or --ov"),
        (["predict", "{run}", "*.jpeg"], "no file matches *.jpeg"),
        (["cost", "nin_cifr"], "got 'nin_cifr'; did you mean nin_cifar?"),
        (["export", "{run}", "--out", "."], ". is a folder: give the file to write, such as model.onnx"),
        (["check", "x", "--seed", "-1"], "seed must be 0 to"),
        (["shards", "x", "--out", "y", "--seed", "-1"], "seed must be 0 to"),
    ],
)
def test_small_mistakes_get_a_line_of_their_own(arguments, text, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").touch()
    code, line = fails(capsys, *(word.format(file=tmp_path / "afile", run=run) for word in arguments))
    assert code == 2
    assert text in line


def test_a_fault_of_the_counting_is_not_told_as_one_of_the_network(monkeypatch):
    def mistaken(*_):
        raise RuntimeError("a mistake of nin")

    monkeypatch.setattr("nin.profiling.cost.copy_model", mistaken)
    with pytest.raises(RuntimeError, match="a mistake of nin"):
        cli_main("cost", "nin_cifar", "--count-only")


def test_warnings_of_nin_are_lines_and_those_of_others_are_not(monkeypatch, capsys):
    def warn(filename):
        def verb(*args, **kwargs):
            warnings.warn_explicit("few [red] images", UserWarning, filename, 1)

        return verb

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(app, "app", warn(app.__file__))
        cli_main("check")
        assert capsys.readouterr().err == "note: few [red] images\n"
        monkeypatch.setattr(app, "app", warn("/elsewhere/nin.py"))
        shown = []
        monkeypatch.setattr(warnings, "showwarning", lambda *args, **kwargs: shown.append(args[:3]))
        cli_main("check")
    assert [(str(message), filename) for message, _, filename in shown] == [("few [red] images", "/elsewhere/nin.py")]
    assert capsys.readouterr().err == ""


def test_ctrl_c_says_that_it_stopped(monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "check", stop)
    assert fails(capsys, "check", "digits") == (130, "nin: stopped")
