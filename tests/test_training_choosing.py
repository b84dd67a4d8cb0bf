"""Choosing: validation, early stopping, balance; that resuming and several processes change nothing."""

import csv
import dataclasses
import json
import re
import statistics

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nin import checkpoint, data, epoch_metrics, report, training
from nin.cli import app
from nin.config import TrainConfig
from nin.errors import UserError
from nin.training import batches, loop, progress_lines
from nin.training.early_stopping import EarlyStopping, best_epoch
from nin.training.step import TrainStep, make_model
from support.stopping import stop_after

QUICK = TrainConfig(epochs=3, batch_size=64, threads=1, precision="fp32")
FILES = ("model.safetensors", "metrics.csv")


@pytest.fixture(scope="module")
def digits():
    """A quarter of the digits, of which the first two classes have most."""
    images = data.load("digits")
    labels = images.train.labels
    keep = torch.cat([(labels < 2).nonzero().flatten(), (labels >= 2).nonzero().flatten()[::7]]).sort().values
    return dataclasses.replace(images, train=images.train.select(keep))


def resumed(digits, config, out, stop_at):
    """Train, stopped after so many steps, and then on to the end."""
    with pytest.raises(KeyboardInterrupt):
        training.train(digits, config, out=out, keeping=training.CheckpointOptions(stop=stop_after(stop_at)))
    return training.train(digits, config, out=out, keeping=training.CheckpointOptions(resume=True))


def test_with_validation_the_test_images_are_looked_at_once(digits, tmp_path, monkeypatch):
    parts, evaluate = [], loop.evaluate
    monkeypatch.setattr(
        loop, "evaluate", lambda *args, **options: (parts.append(options["part"]), evaluate(*args, **options))[1]
    )
    result = training.train(digits, dataclasses.replace(QUICK, validation=0.2), out=tmp_path / "run")
    assert parts == ["validation"] * 4 + ["test"]  # the fourth as the network is used, in float32
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert not [name for name in rows[0] if name.startswith("test")]
    assert {"validation_loss", "validation_accuracy", "validation_macro_f1"} <= rows[0].keys()
    record = result.info.data
    assert record["train_images"] + record["validation_images"] == len(digits.train)
    assert result.info.recipe["validation"] == 0.2
    assert result.info.result["test_images"] == len(digits.test)


def test_a_val_folder_beside_test_is_the_validation_part(digits, tmp_path, capsys):
    folder, out = tmp_path / "set", tmp_path / "run"
    pixels = digits.train.fetch(torch.arange(0, 300, 2))[:, 0].numpy()
    labels = digits.train.labels[0:300:2].tolist()
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = folder / ("train", "train", "val", "test")[number % 4] / str(label % 3) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    options = ["--epochs", "3", "--patience", "2"]
    app.main(["train", str(folder), "--out", str(out), *options])
    printed = capsys.readouterr().err
    assert re.search(r"set: \d+ images to train on, 37 to choose by, 37 to test", printed)
    assert (
        "37 images of the validation part are to choose by; the test images are looked at once, at the end" in printed
    )
    info = checkpoint.load_info(out)
    assert (info.data["validation_images"], info.result["validation_images"]) == (37, 37)
    assert {"best_epoch", "temperature"} <= info.result.keys()
    (row, *_) = epoch_metrics.read_csv(out / "metrics.csv")
    assert "validation_accuracy" in row
    assert "test_accuracy" not in row
    # resumed, reported and cross-validated as any other
    app.main(["train", str(folder), "--out", str(out), "--resume", *options])
    assert "is finished; this is its result" in capsys.readouterr().err
    assert report.build_report(out).headline.test_images == 37
    with pytest.raises(SystemExit):
        app.main(["train", str(folder), "--out", str(tmp_path / "two"), "--validation", "0.2"])
    said = " ".join(capsys.readouterr().err.split())
    assert "set has a validation part already, of 37 images: leave --validation away" in said
    with pytest.raises(UserError, match="leave --validation away"):
        training.train(folder, TrainConfig(validation=0.2))
    folds = training.cross_validate(data.load(folder), QUICK, folds=2, out=tmp_path / "folds")
    assert [fold.info.result["validation_images"] for fold in folds.results] == [37, 37]


def test_best_epoch_is_of_the_highest_accuracy_then_of_the_lowest_loss_then_the_first():
    def rows(*pairs):
        return [{"validation_accuracy": accuracy, "validation_loss": loss} for accuracy, loss in pairs]

    assert best_epoch(rows((0.5, 1), (0.6, 2), (0.6, 1.5), (0.6, 1.5), (0.55, 0.1))) == 3
    stopping = EarlyStopping(2)
    assert not stopping.is_over([])
    assert not stopping.is_over(rows((0.5, 1), (0.4, 1)))
    assert stopping.is_over(rows((0.5, 1), (0.4, 1), (0.3, 1)))
    assert not EarlyStopping(None).is_over(rows((0.5, 1), *[(0.4, 1)] * 9))


class Scripted:
    """Gives the epochs' validation figures in place of the network's, and keeps what the weights were."""

    def __init__(self, monkeypatch, accuracies):
        self.weights, self.accuracies = [], accuracies
        self.end_epoch = loop.Trainer.end_epoch
        script = self

        def end_epoch(trainer):
            row = script.end_epoch(trainer)
            weights = {name: t.clone() for name, t in trainer.train_step.ema_model.state_dict().items()}
            script.weights.append(weights)
            return row | {"validation_accuracy": script.accuracies[row["epoch"] - 1]}

        monkeypatch.setattr(loop.Trainer, "end_epoch", end_epoch)


def test_patience_ends_the_training_and_keeps_the_best_epoch(digits, tmp_path, monkeypatch):
    script = Scripted(monkeypatch, [0.3, 0.8, 0.7, 0.8, 0.6, 0.9])
    # the loss of epoch 4 is lower than that of epoch 2, so that it is better at the same accuracy
    config = dataclasses.replace(QUICK, epochs=20, validation=0.2, patience=1)
    lines, shown = progress_lines.ProgressLines(), []
    result = training.train(digits, config, out=tmp_path / "run", on_progress=lambda p: shown.extend(lines.after(p)))
    assert len(result.metrics) == 3
    assert result.info.result["best_epoch"] == 2
    assert shown[-1] == (
        "epoch   3/20  The training ends early, after 3 of 20 epochs (patience 1): 1 epoch without a better one by the "
        "validation images. Epoch 2 is the best, and its weights are kept."
    )
    notes = report.build_report(tmp_path / "run", digits).notes
    assert any("ended early, after 3 of 20 epochs: 1 epoch without a better one" in note for note in notes)
    model, _ = checkpoint.load_model(tmp_path / "run")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, script.weights[1][name])
        assert torch.equal(result.model.state_dict()[name], tensor)


@pytest.mark.parametrize("stop_at", [9, 11, 14], ids=lambda step: f"step{step}")
def test_resuming_with_patience_keeps_the_same_best_epoch(digits, tmp_path, monkeypatch, stop_at):
    Scripted(monkeypatch, [0.3, 0.8, 0.7, 0.6, 0.5, 0.9])
    config = dataclasses.replace(QUICK, epochs=6, validation=0.2, patience=3, flip=True, dropout=0.1)
    whole = training.train(digits, config, out=tmp_path / "whole")
    assert whole.info.result["best_epoch"] == 2
    assert len(whole.metrics) == 5
    after = resumed(digits, config, tmp_path / "run", stop_at)
    assert after.info.result["best_epoch"] == 2
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_an_unfinished_run_holds_the_best_weights_so_far(digits, tmp_path, monkeypatch):
    script = Scripted(monkeypatch, [0.3, 0.8, 0.7, 0.6])
    config = dataclasses.replace(QUICK, epochs=4, validation=0.2, patience=9)
    steps = batches.count_steps_per_epoch(len(data.split_validation(digits, 0.2, seed=0).train), 64)
    with pytest.raises(KeyboardInterrupt):
        training.train(digits, config, out=tmp_path, keeping=training.CheckpointOptions(stop=stop_after(3 * steps + 1)))
    model, _ = checkpoint.load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, script.weights[1][name])


def test_patience_needs_validation(digits):
    with pytest.raises(UserError, match="patience goes by images that are set apart"):
        training.train(digits, TrainConfig(patience=3))
    for value in (0, 1, -0.1, "0.2"):
        with pytest.raises(UserError, match="validation must be"):
            TrainConfig(validation=value)


@pytest.mark.parametrize("balance", ["sampling", "weights"])
def test_balance_resumes_to_the_same_bits(digits, tmp_path, balance):
    config = dataclasses.replace(QUICK, balance=balance, flip=True, shift=1)
    training.train(digits, config, out=tmp_path / "whole")
    resumed(digits, config, tmp_path / "run", 7)
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_balance_raises_the_recall_of_small_classes():
    # two overlapping classes, 95 and 5 of a hundred: unbalanced, nearly everything is called the first
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(1200) % 20 == 0).long()
    level = 110 + 30 * labels + 20 * torch.randn(1200, generator=generator)
    pixels = level.clamp(0, 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    source = ((pixels[:900], labels[:900]), (pixels[900:], labels[900:]))
    recall = {}
    for balance in (None, "sampling", "weights"):
        config = dataclasses.replace(QUICK, epochs=12, balance=balance, flip=False, shift=0)
        result = training.train(source, config)
        recall[balance] = result.info.result["test_balanced_accuracy"]
    assert recall[None] < 0.55
    assert min(recall["sampling"], recall["weights"]) > 0.6, recall


def test_class_weights_are_those_of_scikit_learn_and_weigh_the_loss(digits):
    from sklearn.utils.class_weight import compute_class_weight

    labels = digits.train.labels
    weights = batches.class_weights(labels, 11)
    expected = compute_class_weight("balanced", classes=labels.unique().numpy(), y=labels.numpy())
    assert torch.allclose(weights[:10].double(), torch.from_numpy(expected))
    assert weights[10] == 0
    assert weights[labels].mean().item() == pytest.approx(1)
    config = QUICK.resolve(images=len(labels), image_size=8, flip=False, shift=0)
    step = TrainStep(lambda: make_model(config, channels=1, classes=10, size=8), config)
    step.class_weights = weights[:10]
    scores, some = torch.randn(32, 10, dtype=torch.float64), labels[:32]
    step.class_weights = step.class_weights.double()
    smooth = config.label_smoothing
    target = F.one_hot(some, 10).double() * (1 - smooth) + smooth / 10
    by_hand = -(step.class_weights[some, None] * target * scores.log_softmax(1)).sum() / 32
    loss, _ = step._loss(scores, some)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_folds_are_runs_that_are_kept_when_it_is_resumed(digits, tmp_path):
    begun = []

    def fold(number, result):
        begun.append(number)
        if len(begun) == 2:
            raise KeyboardInterrupt

    config, out = dataclasses.replace(QUICK, epochs=2), tmp_path / "folds"
    with pytest.raises(KeyboardInterrupt):
        training.cross_validate(digits, config, folds=3, out=out, on_fold=fold)
    written = (out / "fold-1" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="holds folds already"):
        training.cross_validate(digits, config, folds=3, out=out)
    keeping = training.CheckpointOptions(resume=True)
    steps = []
    result = training.cross_validate(
        digits, config, folds=3, out=out, keeping=keeping, on_progress=lambda number, p: steps.append(number)
    )
    assert set(steps) == {3}
    assert (out / "fold-1" / "model.safetensors").stat().st_mtime_ns == written
    accuracies = [fold.info.result["test_accuracy"] for fold in result.results]
    assert sum(fold.info.result["test_images"] for fold in result.results) == len(digits.train)
    summary = json.loads((out / "folds.json").read_text())["figures"]["test_accuracy"]
    assert summary["values"] == accuracies
    assert summary["mean"] == pytest.approx(statistics.fmean(accuracies))
    assert summary["std"] == pytest.approx(statistics.stdev(accuracies))
    with pytest.raises(UserError, match="folds 3, now 2"):
        training.cross_validate(digits, config, folds=2, out=out, keeping=keeping)


def test_a_fold_has_a_report_of_its_own_images(tmp_path, capsys):
    app.main(["train", "digits", "--out", str(tmp_path / "cv"), "--folds", "2", "--epochs", "1", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["folds"] == 2
    fold = report.build_report(tmp_path / "cv" / "fold-2")
    assert fold.headline.accuracy == printed["figures"]["test_accuracy"]["values"][1]
    assert fold.headline.counted_accuracy == fold.headline.accuracy
