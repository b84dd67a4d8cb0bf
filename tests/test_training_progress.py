"""Following a training: the time that is left, plateaus, progress.json, TensorBoard, notebooks, overwriting."""

import dataclasses
import json
import sys
import types

import pytest
import torch

from nin import checkpoint, data, training
from nin.config import TrainConfig
from nin.display.pace import Pace
from nin.errors import UserError
from nin.folders import EVENTS_FOLDER
from nin.training import progress, progress_lines
from nin.training.plateau import plateau_note
from nin.training.progress import ProgressReporter, TrainProgress

QUICK = TrainConfig(epochs=3, batch_size=64, threads=1, precision="fp32")


@pytest.fixture(scope="module")
def digits():
    images = data.load("digits")
    return dataclasses.replace(images, train=images.train.select(torch.arange(0, len(images.train), 6)))


def rows(losses, accuracies=None, part="train"):
    accuracies = accuracies or [0.5] * len(losses)
    train = {"train_loss": 1.0, "train_accuracy": 0.5}
    return [{**train, f"{part}_loss": a, f"{part}_accuracy": b} for a, b in zip(losses, accuracies, strict=True)]


def first_note(metrics, epochs):
    """The epochs after which something is said."""
    return [n for n in range(1, len(metrics) + 1) if plateau_note(metrics[:n], epochs)]


def test_a_plateau_is_named_once_when_the_training_loss_stands_still():
    falling = [2.0 - 0.1 * i for i in range(6)]
    still = falling + [1.5 - 0.0005 * i for i in range(30)]
    assert first_note(rows(still), epochs=40) == [6 + 10]
    assert first_note(rows(still), epochs=100) == [6 + 20], "a fifth of all epochs"
    assert "training loss has fallen by less than 1 %" in plateau_note(rows(still[:16]), 40)
    # a loss that falls slowly, and one that stands while the accuracy still rises, are no plateaus
    assert not first_note(rows([2.0 * 0.995**i for i in range(40)]), epochs=40)
    assert not first_note(rows([1.5] * 40, [0.01 * i for i in range(40)]), epochs=40)
    # one that never began is one
    assert first_note(rows([2.303] * 40), epochs=40) == [11]


def test_a_plateau_by_heart_and_by_validation():
    known = [0.9, 0.97, *[0.999] * 30]
    losses = [1.0 - 0.02 * i for i in range(32)]
    assert first_note(rows(losses, known), epochs=32) == [2 + 10]
    assert "by heart" in plateau_note(rows(losses, known)[:12], 32)
    worse = rows([1, 0.8, *[0.9] * 20], [0.5, 0.6, *[0.55] * 20], part="validation")
    assert first_note(worse, epochs=22) == [12]
    assert "--patience" in plateau_note(worse[:12], 22)
    assert not first_note(rows([1 - 0.01 * i for i in range(20)], part="validation"), epochs=22)


def test_time_left_forgets_slow_first_steps_and_a_slow_first_epoch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    seen = []
    reporter = ProgressReporter(40, 4, None, None, seen.append)
    for step in range(1, 11):
        now[0] += {1: 90, 2: 60, 3: 30}.get(step, 2)  # compiled, and decoded
        reporter.after_step(step, 1, 1.0)
    assert seen[0].seconds_left is None
    assert seen[-1].seconds_left == 60, "30 steps of 2 s; no test is known yet"
    now[0] += 12  # it is tested
    reporter.after_epoch(10, rows([1.0]))
    assert seen[-1].seconds_left == 30 * 2 + 3 * 12
    for step in range(11, 21):  # what was decoded is kept
        now[0] += 1
        reporter.after_step(step, 2, 1.0)
    now[0] += 3
    reporter.after_epoch(20, rows([1.0, 0.9]))
    assert seen[-1].seconds_left == pytest.approx(20 * 1 + 2 * 3, abs=1)
    reporter.after_epoch(20, rows([1.0, 0.9]), "It ends early.")
    assert (seen[-1].seconds_left, seen[-1].steps, seen[-1].note) == (0, 20, "It ends early.")


@pytest.mark.parametrize("steps", [3, 100, 20_000])
def test_a_pace_is_that_of_the_later_half(steps):
    pace = Pace()
    for step in range(steps + 1):
        pace.add(step, 50.0 * min(step, steps // 2) + 2.0 * max(0, step - steps // 2))
    assert pace.seconds_per_step == pytest.approx(2.0, rel=0.6 if steps < 10 else 0.4)
    assert len(pace.marks) <= 80


def test_lines_say_epochs_expected_end_and_notes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now[0])
    lines = progress_lines.ProgressLines()
    assert lines.after(TrainProgress(1, 400, 1, 40, 2.0)) == ["40 epochs of 10 steps"]
    assert lines.after(TrainProgress(2, 400, 1, 40, 2.0, seconds_left=800)) == []
    row = {"train_loss": 1.0, "validation_accuracy": 0.5, "seconds": 20.0}
    (end,) = lines.after(TrainProgress(10, 400, 1, 40, 1.0, row, seconds_left=780))
    assert end.startswith("All 40 epochs are expected to end in 13 min, at ")
    (line,) = lines.after(TrainProgress(20, 400, 2, 40, 1.0, row, seconds_left=760))
    assert line == "epoch   2/40  train loss 1.000  validation accuracy 50.00 %  20 s"
    assert lines.after(TrainProgress(30, 400, 3, 40, 1.0, row, 700, note="It stands.")) == ["epoch   3/40  It stands."]
    assert lines.after(TrainProgress(31, 400, 4, 40, 1.0, seconds_left=90)) == [], "said after an epoch only"
    (_, again) = lines.after(TrainProgress(40, 400, 4, 40, 1.0, row, seconds_left=300))
    assert again.startswith("The end is now expected in 5 min, at ")
    assert lines.after(TrainProgress(50, 400, 5, 40, 1.0, row, seconds_left=310)) == []
    # the last epoch is shown, whichever it is
    early = lines.after(TrainProgress(70, 70, 7, 40, 1.0, row, seconds_left=0, note="It ends early."))
    assert early[0].startswith("epoch   7/40  train loss")
    assert early[1] == "epoch   7/40  It ends early."
    assert " on " in progress_lines.end_text(2 * 86400)


def test_a_resumed_training_says_where_it_goes_on(digits, tmp_path):
    def going_on(stop_after):
        steps, lines, shown = [], progress_lines.ProgressLines(), []
        options = training.CheckpointOptions(stop=lambda: bool(steps.append(1)) or len(steps) == stop_after)
        with pytest.raises(KeyboardInterrupt):
            training.train(digits, QUICK, out=tmp_path / str(stop_after), keeping=options)
        training.train(
            digits,
            QUICK,
            out=tmp_path / str(stop_after),
            keeping=training.CheckpointOptions(resume=True),
            on_progress=lambda p: shown.extend(lines.after(p)),
        )
        return shown[0]

    assert going_on(5) == "3 epochs of 3 steps; going on in epoch 2 of 3, after step 2 of it"
    assert going_on(3) == "3 epochs of 3 steps; going on after epoch 1 of 3"
    assert going_on(4) == "3 epochs of 3 steps; going on in epoch 2 of 3, after step 1 of it"


def test_progress_json_is_there_while_it_trains(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_FILES", 0.0)
    path, seen = tmp_path / "run" / "progress.json", []
    training.train(digits, QUICK, out=tmp_path / "run", on_progress=lambda p: seen.append(json.loads(path.read_text())))
    assert [(s["step"], s["epoch"]) for s in seen[:3]] == [(1, 1), (2, 1), (3, 1)]
    assert seen[-1]["step"] == seen[-1]["steps"]
    assert not path.exists()
    # what a kill leaves is no obstacle
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "progress.json").write_text("{}")
    training.train(digits, dataclasses.replace(QUICK, epochs=1), out=tmp_path / "killed")
    assert not (tmp_path / "killed" / "progress.json").exists()


def events(folder):
    """Step and value of each scalar by its tag, as TensorBoard reads the folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_has_the_figures_of_metrics_csv_once(digits, tmp_path):
    pytest.importorskip("tensorboard")
    out, steps = tmp_path / "run", []

    def stop():
        steps.append(1)
        return len(steps) == 7

    def options(**more):
        return training.CheckpointOptions(tensorboard=True, **more)

    with pytest.raises(KeyboardInterrupt):
        training.train(digits, QUICK, out=out, keeping=options(stop=stop))
    # as after a kill between the state and the event file
    for path in (out / EVENTS_FOLDER).iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    result = training.train(digits, QUICK, out=out, keeping=options(resume=True))
    found = events(out / EVENTS_FOLDER)
    for tag, name in (("train/loss", "train_loss"), ("test/macro_f1", "test_macro_f1"), ("learning_rate",) * 2):
        assert found[tag] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in result.metrics], tag
    assert len(list((out / EVENTS_FOLDER).iterdir())) == 1


def test_without_tensorboard_one_line_says_what_to_install(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"TensorBoard's files need: pip install 'network-in-network\[tensorboard\]'"):
        training.train(digits, QUICK, out=tmp_path / "run", keeping=training.CheckpointOptions(tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_overwrite_removes_a_run_and_nothing_else(digits, tmp_path):
    out, config = tmp_path / "run", dataclasses.replace(QUICK, epochs=1)
    training.train(digits, config, out=out)
    first = (out / "model.safetensors").read_bytes()
    (out / "report.html").write_text("old")
    (out / "tensorboard").mkdir()
    with pytest.raises(UserError, match="is not empty"):
        training.train(digits, config, out=out)
    training.train(digits, dataclasses.replace(config, seed=1), out=out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != first
    assert not (out / "report.html").exists()
    assert not (out / "tensorboard").exists()
    second = (out / "model.safetensors").read_bytes()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"overwrite removes runs only, and .*thesis.tex is none"):
        training.train(digits, config, out=out, overwrite=True)
    assert (out / "thesis.tex").exists()
    assert (out / "model.safetensors").read_bytes() == second
    with pytest.raises(UserError, match="resume or overwrite, not both"):
        training.train(digits, config, out=out, overwrite=True, keeping=training.CheckpointOptions(resume=True))
    # an unfinished run is overwritten too
    (out / "thesis.tex").unlink()
    (out / checkpoint.STATE_FILE).write_bytes(b"x")
    training.train(digits, config, out=out, overwrite=True)
    assert not (out / checkpoint.STATE_FILE).exists()


def test_a_mistake_leaves_the_run_that_was_to_be_overwritten(digits, tmp_path, monkeypatch):
    config = dataclasses.replace(QUICK, epochs=1)
    training.train(digits, config, out=tmp_path / "run")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = training.CheckpointOptions(tensorboard=True)
    with pytest.raises(UserError, match="TensorBoard"):
        training.train(digits, config, out=tmp_path / "run", overwrite=True, keeping=options)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_python_shows_progress_where_it_is_asked_for(digits, capsys):
    config = dataclasses.replace(QUICK, epochs=1)
    training.train(digits, config)
    assert capsys.readouterr() == ("", "")
    training.train(digits, config, progress=True)
    printed = capsys.readouterr()
    assert "1 epoch of 3 steps" in printed.err
    assert "epoch   1/1" in printed.err
    assert printed.out == ""
    seen = []
    training.train(digits, config, progress=True, on_progress=seen.append)
    assert seen
    assert "epoch   1/1" in capsys.readouterr().err


def test_a_notebook_gets_one_bar_that_is_updated(digits, monkeypatch):
    shown = []

    class Handle:
        def update(self, html):
            shown.append(html)

    display = types.SimpleNamespace(HTML=str, display=lambda html, display_id: Handle())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(progress_lines, "SECONDS_BETWEEN_UPDATES", 0)
    training.train(digits, dataclasses.replace(QUICK, epochs=2))
    assert '<progress max="6" value="1"' in shown[0]
    assert '<progress max="6" value="6"' in shown[-1]
    assert " left" in shown[-2]
    assert "epoch   2/2" in shown[-1]
