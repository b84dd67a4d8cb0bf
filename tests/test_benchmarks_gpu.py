"""The GPU's benchmark scripts: a dry run on the CPU, so that they are whole when there is a GPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks/gpu"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(SCRIPTS))


def script(name):
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def test_kernels(tmp_path):
    script("kernels").main(["--dry-run", "--case", "chain 192→160", "--case", "step", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [
        "chain 192→160→96, forward",
        "chain 192→160→96, forward + backward",
        "NiN-CIFAR training step, batch 4",
    ]
    assert all(t["median_ms"] > 0 for row in rows for t in row["milliseconds"].values())
    assert all(error < 0.1 for error in rows[0]["relative_error"].values())
    kept = rows[1]["kept_bytes"]
    assert kept["nin"] == 0
    assert kept["eager channels_last"] >= 2 * 6 * 5 * 160 * 2  # the hidden layer in bf16
    assert "| nin |" in (tmp_path / "kernels.md").read_text()


def test_training(tmp_path, capsys):
    script("train").main(["digits", "--dry-run", "--runs", "2", "--epochs", "2", "--out", str(tmp_path)])
    values = json.loads((tmp_path / "train-digits.json").read_text())
    assert values["accuracy"]["runs"] == 2
    assert values["accuracy"]["mean"] == sum(run["accuracy"] for run in values["all"]) / 2
    assert "digits" in (tmp_path / "train-digits.md").read_text()
    assert "seed 1" in capsys.readouterr().out


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
    assert run_all.main(["--list", "--out", str(tmp_path), "--data", str(tmp_path)]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {
        *("tests", "compile", "main", "others", "steps", "cifar10", "fashion-mnist", "mnist")
    }
    with pytest.raises(SystemExit):
        run_all.main(["--piece", "nothing", "--out", str(tmp_path)])
    assert "--piece must be among tests" in capsys.readouterr().err


def test_without_a_gpu_and_without_dry_run_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here"):
        script("kernels").main(["--out", str(tmp_path)])
