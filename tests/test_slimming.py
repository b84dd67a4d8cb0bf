"""`nin narrow` on run folders: the new folder is one like any other."""

import json

import pytest
import torch
from PIL import Image

import nin
from nin import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("narrow") / "run"
    cli.main(["train", "digits", "--out", str(out), "--epochs", "4", "--batch-size", "128"])
    return out


def narrow(run, *arguments):
    images = [] if "--images" in arguments else ["--images", "128"]
    cli.main(["narrow", str(run), "--data", "digits", *images, *arguments])


def fails(capsys, run, *arguments):
    with pytest.raises(SystemExit) as stop:
        narrow(run, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_narrowed_run_is_a_run(run, tmp_path, capsys):
    out = tmp_path / "half"
    narrow(run, "--macs", "0.5", "--finetune", "1", "--out", str(out), "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["macs"][1] <= 0.5 * figures["macs"][0]
    assert set(figures["accuracy"]) == {"original", "raw", "corrected", "finetuned"}
    names = {"model.safetensors", "config.json", "narrowing.json", "narrowing.html", "report.html"}
    assert names == {path.name for path in out.iterdir()}
    page = (out / "narrowing.html").read_text()
    assert "<svg" in page
    assert "blocks.1.0.0" in page
    assert "http" not in page.replace("http-equiv", "")
    classifier = nin.load(out)
    assert classifier.info.result["test_accuracy"] == pytest.approx(figures["accuracy"]["finetuned"], abs=1e-6)
    image = tmp_path / "grey.png"
    Image.new("L", (8, 8), 90).save(image)
    assert classifier.predict(image)[0].label in classifier.classes
    assert classifier.confidence_maps(image).shape[1] == 10
    # the report's own count of right answers agrees, and a narrowed run can be narrowed again
    cli.main(["report", str(out)])
    cli.main(["cost", str(out), "--json"])
    output = capsys.readouterr().out
    assert json.loads(output[output.index("{") :])["macs"] == figures["macs"][1]
    narrow(out, "--macs", "0.7", "--out", str(tmp_path / "third"), "--json")
    again = json.loads(capsys.readouterr().out)
    assert again["macs"][0] == figures["macs"][1]
    assert nin.load(tmp_path / "third").model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_dry_run_writes_no_run(run, tmp_path, capsys):
    narrow(run, "--macs", "0.6", "--dry-run", "--skip", "blocks.0.*")
    printed = capsys.readouterr().out
    assert "asked for" in printed
    assert (run / "narrowing.safetensors").exists()


def test_mistakes_are_one_line(run, tmp_path, capsys):
    assert "give one of --latency, --macs and --parameters, got none" in fails(capsys, run, "--out", "x")
    assert "got macs, parameters" in fails(capsys, run, "--macs", "0.5", "--parameters", "0.5", "--out", "x")
    assert "macs must be a share of the original's" in fails(capsys, run, "--macs", "2", "--out", "x")
    assert "images must be at least 1" in fails(capsys, run, "--macs", "0.5", "--images", "0", "--out", "x")
    assert "--out must name the run folder to make" in fails(capsys, run, "--macs", "0.5")
    assert "is not empty" in fails(capsys, run, "--macs", "0.5", "--out", str(run))
    out = str(tmp_path / "new")
    assert "skip must match a layer's name" in fails(capsys, run, "--macs", "0.5", "--skip", "stem", "--out", out)
    assert not (tmp_path / "new").exists()


def test_images_of_another_kind_are_refused(run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / name / f"{i}.png")
    with pytest.raises(SystemExit):
        cli.main(["narrow", str(run), "--data", str(folder), "--macs", "0.5", "--out", str(tmp_path / "new")])
    assert "the images do not fit" in capsys.readouterr().err
