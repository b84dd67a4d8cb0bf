"""Training: accuracy, reproducibility, resuming, run folders, errors."""

import contextlib
import csv
import dataclasses
import errno
import itertools
import json
import os
import time
import types

import pytest
import torch
from PIL import Image
from torch import nn

import nin
from nin import checkpoint, data, optim, training
from nin import config as recipe
from nin.config import TrainConfig
from nin.data.dataset import PathList
from nin.errors import UserError
from nin.inference import evaluation
from nin.runtime import distributed
from nin.runtime.cuda_graph import CUDAGraphRunner
from nin.runtime.files import write_atomically
from nin.training import batches, loop
from nin.training.step import TrainStep, make_model
from support.stopping import check_resuming

QUICK = TrainConfig(epochs=3, batch_size=64, threads=1, precision="fp32")


@pytest.fixture(scope="module")
def digits():
    """A quarter of the digits: enough to learn something in a second."""
    images = data.load("digits")
    keep = torch.arange(0, len(images.train), 4)
    train = data.ImageSet(images.train.fetch(keep), images.train.labels[keep])
    return dataclasses.replace(images, train=train)


def weights(result):
    return result.model.state_dict()


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_learns_and_writes_a_run(digits, tmp_path):
    rows = []
    result = training.train(
        digits, dataclasses.replace(QUICK, epochs=12), out=tmp_path / "run", on_progress=lambda p: rows.append(p.row)
    )
    outcome = result.info.result
    assert outcome["test_accuracy"] > 0.9
    low, high = outcome["test_accuracy_interval"]
    assert low < outcome["test_accuracy"] < high
    assert result.metrics[-1]["train_loss"] < result.metrics[0]["train_loss"]
    assert len([row for row in rows if row]) == 12
    assert len([row for row in rows if row is None]) == result.metrics[-1]["step"]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "model.safetensors",
        "config.json",
        "metrics.csv",
        "timings.csv",
    }
    with open(tmp_path / "run" / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in table] == list(range(1, 13))
    model, info = checkpoint.load_model(tmp_path / "run")
    assert_equal_weights(model.state_dict(), weights(result))
    assert info.classes == digits.classes
    assert info.result["test_accuracy"] == outcome["test_accuracy"]
    assert info.environment["torch"] == torch.__version__


def test_same_seed_same_weights_and_another_seed_others(digits):
    first, again = training.train(digits, QUICK), training.train(digits, QUICK)
    assert_equal_weights(weights(first), weights(again))
    other = training.train(digits, dataclasses.replace(QUICK, seed=1))
    assert not torch.equal(next(iter(weights(first).values())), next(iter(weights(other).values())))


FILES = ("model.safetensors", "metrics.csv")


@pytest.mark.parametrize("stop_at", [1, 7, 8, 10, 13], ids=lambda step: f"step{step}")
def test_resuming_gives_the_same_bits_as_never_stopping(digits, tmp_path, stop_at):
    # five steps an epoch: stopped in the middle of an epoch, at its end, and twice
    config = dataclasses.replace(QUICK, flip=True, shift=1, dropout=0.1)
    training.train(digits, config, out=tmp_path / "whole")
    steps = []

    def stop():
        steps.append(1)
        return len(steps) == stop_at

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            training.train(
                digits, config, out=tmp_path / "run", keeping=training.CheckpointOptions(resume=resume, stop=stop)
            )
        steps.clear()
        if stop_at > 7:  # the second time there are fewer steps left than that
            break
    assert (tmp_path / "run" / checkpoint.STATE_FILE).exists()
    training.train(digits, config, out=tmp_path / "run", keeping=training.CheckpointOptions(resume=True))
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "run" / checkpoint.STATE_FILE).exists()


def saved_positions(images, out, **options):
    """Train, and return epoch and step of each state that was saved."""
    found = {}

    def look(progress):
        if (out / checkpoint.STATE_FILE).exists():
            position = checkpoint.load_state(out)[1]["position"]
            found[position["epoch"], position["step"]] = True

    training.train(images, QUICK, out=out, keeping=training.CheckpointOptions(**options), on_progress=look)
    return list(found)


def test_state_is_written_by_steps_and_by_time(digits, tmp_path):
    assert saved_positions(digits, tmp_path / "a", steps=2) == [
        *((0, 2), (0, 4), (1, 0)),
        *((1, 1), (1, 3), (2, 0)),
        *((2, 2), (2, 4), (3, 0)),
    ]
    assert len(saved_positions(digits, tmp_path / "b", minutes=1e-9)) == 15


def test_override_goes_on_and_is_recorded(digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        training.train(digits, QUICK, out=tmp_path / "run", keeping=training.CheckpointOptions(stop=lambda: True))
    other = dataclasses.replace(QUICK, learning_rate=0.05)
    keeping = training.CheckpointOptions(resume=True, override=True)
    result = training.train(digits, other, out=tmp_path / "run", keeping=keeping)
    assert result.info.recipe["overridden"] == ["learning_rate=0.018, now learning_rate=0.05"]


def test_resuming_what_is_finished_gives_its_result(digits, tmp_path):
    out, resume = tmp_path / "run", training.CheckpointOptions(resume=True)
    auto = dataclasses.replace(QUICK, precision="auto")
    before = training.train(digits, auto, out=out)
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / ".report.html.abc").write_bytes(b"half")  # killed while the report was written
    after = training.train(digits, auto, out=out, keeping=resume)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written
    assert after.info.result == json.loads(json.dumps(before.info.result))
    assert [row["epoch"] for row in after.metrics] == [1, 2, 3]
    assert after.metrics[-1]["test_loss"] == pytest.approx(before.metrics[-1]["test_loss"], rel=1e-5)
    assert after.metrics[-1]["seconds"] == pytest.approx(before.metrics[-1]["seconds"], rel=1e-5)
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor)
    with pytest.raises(UserError, match=r"finished, with --epochs 3, now 4: .*give another --out"):
        training.train(digits, dataclasses.replace(auto, epochs=4), out=out, keeping=resume)


@pytest.fixture
def photos(tmp_path):
    """A folder of 64 small images in two classes, read from files."""
    for number in range(64):
        path = tmp_path / "photos" / ("dark", "light")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), (40, 200)[number % 2] + number // 2).save(path)
    return data.load(tmp_path / "photos", memory_limit_bytes=0)


def test_files_that_vanish_are_left_out_and_listed(photos, tmp_path):
    gone = [photos.train.names[3], photos.test.names[0]]

    def remove(progress):
        for name in gone:
            (photos.train.root / name).unlink(missing_ok=True)

    config = dataclasses.replace(QUICK, batch_size=8)
    result = training.train(photos, config, out=tmp_path / "run", on_progress=remove)
    assert result.info.result["test_images"] == len(photos.test) - 1
    assert sorted(result.info.data["lost"]) == sorted((name, "there is no such file") for name in gone)
    written = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["lost"]
    assert sorted(map(tuple, written)) == sorted(result.info.data["lost"])


def test_too_many_vanished_files_stop_the_training_and_it_can_go_on(photos, tmp_path):
    keeping = training.CheckpointOptions(steps=1)
    root, moved = photos.train.root, tmp_path / "moved"

    def remove(progress):
        if progress.row:  # between two epochs, where no image is read ahead; 16 of the next batch are too many at once
            root.rename(moved)

    config = dataclasses.replace(QUICK, batch_size=16)
    with pytest.raises(UserError, match=r"11 images cannot be read any more.*there is no such file.*--resume"):
        training.train(photos, config, out=tmp_path / "run", keeping=keeping, on_progress=remove)
    moved.rename(root)
    resume = dataclasses.replace(keeping, resume=True)
    training.train(photos, config, out=tmp_path / "run", keeping=resume)
    training.train(photos, config, out=tmp_path / "whole")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_findings_are_listed_in_the_run_folder(photos, tmp_path):
    (photos.train.root / "dark" / "broken.png").write_text("no image")
    images = data.load(photos.train.root)
    training.train(images, dataclasses.replace(QUICK, batch_size=8), out=tmp_path / "run")
    lines = (tmp_path / "run" / "findings.csv").read_text().splitlines()
    assert lines == ["path,kind,detail", 'dark/broken.png,unreadable,"empty, not an image, or damaged at its start"']


def test_leftovers_of_a_killed_write_are_removed(digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        training.train(digits, QUICK, out=tmp_path / "run", keeping=training.CheckpointOptions(stop=lambda: True))
    (tmp_path / "run" / ".state.safetensors.abc").write_bytes(b"half")
    training.train(digits, QUICK, out=tmp_path / "run", keeping=training.CheckpointOptions(resume=True))
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


class StopHereError(Exception):
    pass


def test_resume_refuses_other_settings_and_a_missing_folder(digits, tmp_path):
    def stop(progress):
        if progress.row:
            raise StopHereError

    with pytest.raises(StopHereError):
        training.train(digits, QUICK, out=tmp_path / "run", on_progress=stop)
    with pytest.raises(UserError, match=r"--learning-rate 0\.018, now 0\.05: leave that away"):
        training.train(
            digits,
            dataclasses.replace(QUICK, learning_rate=0.05),
            out=tmp_path / "run",
            keeping=training.CheckpointOptions(resume=True),
        )
    with pytest.raises(UserError, match=r"resume goes on in a run folder: give out="):
        training.train(digits, QUICK, keeping=training.CheckpointOptions(resume=True))
    with pytest.raises(UserError, match="--resume"):
        training.train(digits, QUICK, out=tmp_path / "run")


def test_resume_takes_the_settings_of_the_run_where_none_are_given(digits, tmp_path):
    def stop(progress):
        if progress.row:
            raise StopHereError

    out, resume = tmp_path / "run", training.CheckpointOptions(resume=True)
    config = dataclasses.replace(QUICK, learning_rate=0.05, shift=0, seed=7)
    with pytest.raises(StopHereError):
        training.train(digits, config, out=out, on_progress=stop)
    # a finished one is read in the same way
    for _ in range(2):
        result = training.train(digits, out=out, keeping=resume)
        assert result.info.result
        recipe = result.info.recipe
        assert [recipe[name] for name in ("epochs", "learning_rate", "shift", "seed")] == [QUICK.epochs, 0.05, 0, 7]
        assert "overridden" not in recipe


def test_two_trainings_in_one_folder_are_refused(digits, tmp_path):
    out, messages = tmp_path / "run", []

    def begin_another(progress):
        if not messages:
            for resume in (False, True):
                with pytest.raises(UserError) as refused:
                    training.train(digits, QUICK, out=out, keeping=training.CheckpointOptions(resume=resume))
                messages.append(str(refused.value))

    training.train(digits, QUICK, out=out, on_progress=begin_another)
    assert all("another process writes into" in text for text in messages)
    assert training.train(
        digits, out=out, keeping=training.CheckpointOptions(resume=True)
    ).info.result  # no lock is left


def test_resume_begins_where_nothing_has_begun(digits, tmp_path):
    resume = training.CheckpointOptions(resume=True)
    plain = training.train(digits, QUICK, out=tmp_path / "plain")
    (tmp_path / "run").mkdir()  # killed before the first state
    for _ in range(2):  # and once more when it is finished
        begun = training.train(digits, QUICK, out=tmp_path / "run", keeping=resume)
        assert begun.info.result["test_accuracy"] == plain.info.result["test_accuracy"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        training.train(digits, QUICK, out=tmp_path / "mine", keeping=resume)


def test_interrupted_before_the_first_epoch_leaves_nothing(digits, tmp_path):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(digits, QUICK, out=tmp_path / "run", on_progress=stop)
    assert not (tmp_path / "run").exists()


def test_refuses_a_folder_with_something_in_it(digits, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        training.train(digits, QUICK, out=tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_full_disk_keeps_the_old_file_and_names_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*config\.json"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("hours", [-5000, 5000])
def test_a_clock_that_jumps_changes_nothing(digits, tmp_path, monkeypatch, hours):
    plain = training.train(digits, QUICK, out=tmp_path / "plain")
    clock = itertools.count(time.time(), 3600 * hours)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * next(clock)))

    def stop():
        return next(stops) == 5

    stops = itertools.count()
    with pytest.raises(KeyboardInterrupt):
        training.train(
            digits, QUICK, out=tmp_path / "jumped", keeping=training.CheckpointOptions(minutes=1e-6, stop=stop)
        )
    for path in (tmp_path / "jumped").iterdir():  # written in what is now the past, or the future
        os.utime(path, (next(clock), next(clock)))
    again = training.train(digits, QUICK, out=tmp_path / "jumped", keeping=training.CheckpointOptions(resume=True))
    assert_equal_weights(weights(plain), weights(again))
    metrics = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("plain", "jumped")]
    assert metrics[0] == metrics[1]
    assert all(row["seconds"] >= 0 for row in again.metrics)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_epoch(digits, tmp_path, monkeypatch):
    config = dataclasses.replace(QUICK, normalisation="none")
    plain = training.train(digits, config)
    out, written = tmp_path / "run", {}

    def too_high(step, steps, **schedule):
        return optim.one_cycle_learning_rate(step, steps, **schedule) if 3 * step < 2 * steps else 1e30  # last epoch

    def remember(progress):
        if progress.row:
            written[progress.epoch] = {
                path.name: path.read_bytes() for path in out.iterdir() if path.name != "progress.json"
            }

    with monkeypatch.context() as patch:
        patch.setattr("nin.training.step.one_cycle_learning_rate", too_high)
        with pytest.raises(
            UserError, match=r"the loss became \S+ at step \d+ \(epoch 3\); what was written to .*--learning-rate"
        ):
            training.train(digits, config, out=out, on_progress=remember)
    assert list(written) == [1, 2]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written[2]
    assert checkpoint.load_state(out)[1]["position"]["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in checkpoint.load_model(out)[0].state_dict().values())
    again = training.train(digits, config, out=out, keeping=training.CheckpointOptions(resume=True))
    assert_equal_weights(weights(again), weights(plain))


def test_too_small_images_are_refused_with_the_size(digits):
    with pytest.raises(UserError, match="nin_imagenet needs images of at least 39×39 pixels, got 8×8"):
        training.train(digits, dataclasses.replace(QUICK, model="nin_imagenet"))
    with pytest.raises(UserError, match="model must be one of nin_digits"):
        training.train(digits, dataclasses.replace(QUICK, model="resnet50"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": "many"}, "epochs must be a whole number, got 'many'"),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"threads": 10**6}, "threads must be at least 1 and at most 1024, got 1000000"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"momentum": None}, "momentum must be a number, got None"),
        ({"flip": "no"}, "flip must be True or False, got 'no'"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"model": 5}, "model must be a name, got 5"),
        ({"precision": "fp16"}, "precision must be one of auto, bf16, fp32, got 'fp16'"),
        ({"schedule": "step"}, "schedule must be one of cosine, triangle, got 'step'"),
        ({"recipe": "fast"}, "recipe must be one of default, speed, finetune, got 'fast'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and finite, got inf"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite, got nan"),
        ({"seed": 1_700_000_000_000_000_000}, "seed must be 0 to 4294967295, got 1700000000000000000"),
        ({"seed": -1}, "seed must be 0 to 4294967295, got -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ],
)
def test_recipe_checks_its_ranges(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_recipe_is_chosen_from_the_data_and_never_over_what_was_asked_for():
    chosen = TrainConfig().resolve(images=60_000, image_size=28, flip=True, shift=2)
    assert (chosen.model, chosen.batch_size, chosen.flip, chosen.shift) == ("nin_cifar", 128, True, 2)
    few = TrainConfig().resolve(images=500, image_size=224, flip=True, shift=14)
    assert few.model == "nin_imagenet"
    assert few.epochs > chosen.epochs
    assert few.batch_size < chosen.batch_size
    asked = TrainConfig(epochs=1, flip=False, shift=0).resolve(images=500, image_size=8, flip=True, shift=1)
    assert (asked.epochs, asked.flip, asked.shift) == (1, False, 0)


def test_the_largest_seed_trains(digits):
    training.train(digits, dataclasses.replace(QUICK, epochs=1, seed=recipe.LARGEST_SEED))


def test_what_the_recipe_says_of_the_network_is_what_is_trained(digits):
    sizes = {"images": 100, "image_size": 8, "flip": False, "shift": 0}

    def made(**settings):
        config = TrainConfig(**settings).resolve(**sizes)
        return config, make_model(config, channels=1, classes=10, size=8)

    for settings, dropout in (({}, 0.2), ({"dropout": 0.4}, 0.4), ({"dropout": 0.0}, 0.0)):
        config, model = made(**settings)
        assert config.dropout == model.config.blocks[0].dropout == dropout
        assert config.normalisation == model.config.normalisation == "weight_standardisation"
    assert made(model="nin_cifar")[0].dropout == 0
    config, _ = made(model="googlenet")
    assert (config.normalisation, config.last_activation, config.dropout) == ("none", "none", 0)
    with pytest.raises(UserError, match="normalisation must be none for googlenet, got weight_standardisation: nin_"):
        made(model="googlenet", normalisation="weight_standardisation")
    with pytest.raises(UserError, match="last_activation must be none for googlenet, got relu"):
        made(model="googlenet", last_activation="relu")
    result = training.train(digits, dataclasses.replace(QUICK, epochs=1, dropout=0.4))
    assert result.info.recipe["dropout"] == result.model.config.blocks[0].dropout == 0.4


def test_learning_rate_rises_once_and_falls_to_zero():
    rates = [optim.one_cycle_learning_rate(step, 1000, peak=0.1, warmup=0.2) for step in range(1000)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(0.1, rel=1e-2)
    assert rates[-1] < 1e-5


def test_wilson_interval_is_that_of_the_literature():
    # Agresti, Coull (1998): 10 of 10 gives 0.722 to 1.0
    low, high = evaluation.wilson_interval(10, 10)
    assert low == pytest.approx(0.7225, abs=1e-4)
    assert high == pytest.approx(1.0)


def test_weight_decay_spares_biases_and_gains():
    model = nin.models.nin_digits(normalisation="weight_standardisation")
    decayed, spared = optim.sgd(model, learning_rate=0.1, momentum=0.9, weight_decay=5e-4).param_groups
    assert decayed["weight_decay"] == 5e-4
    assert all(p.dim() == 4 for p in decayed["params"])
    assert all(p.dim() == 1 for p in spared["params"])
    assert spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("make", "older"), [(optim.sgd, False), (optim.sgd, True), (optim.adamw, False), (optim.muon, False)]
)
def test_an_optimizer_with_ema_goes_on_from_its_state_dict(make, older):
    options = {"betas": (0.9, 0.99)} if make is optim.adamw else {"momentum": 0.9}

    def begin():
        torch.manual_seed(0)
        model, ema_model = nn.Linear(3, 2), nn.Linear(3, 2)
        own = {"matrices": [model.weight], "sgd_factor": 2.0} if make is optim.muon else {}
        optimizer = make(model, learning_rate=0.1, weight_decay=0.01, **options, **own)
        return optim.OptimizerWithEMA(model, ema_model, optimizer)

    def step(work):
        work.step(work.model(x).square().sum(), learning_rate=0.1, gradient_clip=1.0, ema_decay=0.9)

    x, one, other = torch.randn(5, 3), begin(), begin()
    for _ in range(3):
        step(one)
    kept = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    if older:  # the names of before there were several optimisers
        kept = {name.replace("optimizer.momentum_buffer.", "momentum."): tensor for name, tensor in kept.items()}
    other.load_state_dict(kept)
    step(one)
    step(other)
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_mirrored_view_is_the_mean_of_both(digits):
    model = nin.models.nin_digits(normalisation="weight_standardisation").eval()
    cpu, fp32 = torch.device("cpu"), torch.float32
    one, labels = evaluation.evaluate(model, digits, device=cpu, dtype=fp32)
    both, _ = evaluation.evaluate(model, digits, device=cpu, dtype=fp32, flip=True)
    mirrored = dataclasses.replace(digits, test=data.ImageSet(digits.test.images.flip(3), digits.test.labels))
    other, _ = evaluation.evaluate(model, mirrored, device=cpu, dtype=fp32)
    torch.testing.assert_close(both, (one + other) / 2)
    assert torch.equal(labels, digits.test.labels)


def test_config_json_is_plain_json(digits, tmp_path):
    training.train(digits, dataclasses.replace(QUICK, epochs=1), out=tmp_path / "run")
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert values["format_version"] == 1  # older versions of nin read it
    assert values["classes"] == [str(i) for i in range(10)]


# -- a device that runs ahead, and the speed recipe -------------------------------------------------------------


@contextlib.contextmanager
def running_ahead():
    """Train on the CPU as on a GPU: many batches augmented together, losses read late."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "loss_read_interval", lambda device: 3)
        yield


SPEED = dataclasses.replace(QUICK, recipe="speed", flip=True, shift=1)


@pytest.mark.parametrize("config", [QUICK, SPEED], ids=["default", "speed"])
def test_running_ahead_gives_the_same_bits_and_figures(digits, tmp_path, config):
    training.train(digits, config, out=tmp_path / "waits")
    with running_ahead():
        training.train(digits, config, out=tmp_path / "ahead")
    for name in FILES:
        assert (tmp_path / "ahead" / name).read_bytes() == (tmp_path / "waits" / name).read_bytes(), name


@pytest.mark.parametrize("stop_at", [2, 5, 9])
@running_ahead()
def test_resuming_the_speed_recipe_gives_the_same_bits(digits, tmp_path, stop_at):
    check_resuming(digits, SPEED, tmp_path, stop_at)


@running_ahead()
def test_a_loss_that_is_read_late_still_stops_the_training(digits):
    config = dataclasses.replace(QUICK, learning_rate=1e30, gradient_clip=1e30, normalisation="none")
    with pytest.raises(
        UserError, match=r"the loss became \S+ at step \d+ \(epoch \d\)\. Try a lower --learning-rate than"
    ):
        training.train(digits, config)


def test_the_speed_recipe_fills_in_what_was_left_alone():
    sizes = {"images": 50_000, "image_size": 32, "flip": True, "shift": 2}
    speed = TrainConfig(recipe="speed").resolve(**sizes)
    assert {name: getattr(speed, name) for name in recipe.RECIPES["speed"]} == recipe.RECIPES["speed"]
    assert (speed.model, speed.flip, speed.shift, speed.learning_rate) == ("nin_cifar", True, 2, 0.2)
    asked = TrainConfig(recipe="speed", batch_size=64, label_smoothing=0.0).resolve(**sizes)
    assert (asked.batch_size, asked.label_smoothing, asked.schedule) == (64, 0.0, "triangle")
    assert TrainConfig().resolve(**sizes).batch_size == 128


@pytest.mark.parametrize(
    ("settings", "images", "rate"),
    [
        ({"optimizer": "sgd"}, 60_000, 0.1),
        ({"optimizer": "sgd"}, 660, 0.05),
        ({"optimizer": "sgd"}, 100, 0.035),
        ({"optimizer": "sgd"}, 4, 0.018),  # a batch of four
        ({"optimizer": "sgd", "batch_size": 32}, 60_000, 0.05),
        ({"optimizer": "sgd", "batch_size": 4096}, 60_000, 0.2),
        ({"optimizer": "sgd", "batch_size": "auto"}, 60_000, 0.1),  # until it is found
        ({"normalisation": "none"}, 60_000, 0.1),
        ({"model": "googlenet"}, 60_000, 0.1),
        ({"learning_rate": 0.3}, 660, 0.3),
        ({"optimizer": "adamw"}, 660, 0.002),
        ({}, 60_000, 0.025),
        ({"batch_size": 32}, 60_000, 0.013),
        ({"batch_size": 4096}, 60_000, 0.05),
        ({"recipe": "finetune"}, 660, 0.002),
    ],
)
def test_the_learning_rate_goes_with_the_root_of_the_batch(settings, images, rate):
    config = TrainConfig(**settings).resolve(images=images, image_size=32, flip=True, shift=2)
    assert config.learning_rate == rate


def test_few_photos_are_learned_small_by_the_smaller_network():
    def resolve(images=660, image_size=96, **settings):
        return TrainConfig(**settings).resolve(images=images, image_size=image_size, flip=True, shift=2)

    few = resolve()
    assert (few.model, few.train_size, few.augment, few.epochs) == ("nin_cifar", 64, "strong", 100)
    for config in (resolve(images=5000), resolve(image_size=224), resolve(model="nin_imagenet")):
        assert (config.model, config.train_size) == ("nin_imagenet", None)
    assert resolve(images=5000).augment == "light"
    assert resolve(augment="none").train_size is None
    assert resolve(augment="light").augment == "light"
    assert resolve(image_size=128).train_size == 80
    assert resolve(train_size=72).train_size == 72
    small = resolve(image_size=64)
    assert (small.model, small.augment, small.train_size) == ("nin_cifar", "light", None)
    assert resolve(weights="x", model="nin_imagenet").recipe == "finetune"
    assert resolve(weights="x", model="nin_cifar").train_size is None
    assert resolve(images=1346, image_size=8).epochs == 75


def test_the_triangle_falls_in_a_straight_line():
    schedule = {"peak": 0.4, "warmup": 0.2, "schedule": "triangle"}
    rates = [optim.one_cycle_learning_rate(step, 1000, **schedule) for step in range(1000)]
    falls = [a - b for a, b in itertools.pairwise(rates[250:])]
    assert max(rates) == pytest.approx(0.4, rel=1e-2)
    assert min(falls) == pytest.approx(max(falls))
    assert rates[-1] < 1e-3


def test_held_files_are_the_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        pixels = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    names = PathList(f"{i}.png" for i in range(6))
    files = data.FileSet(labels=torch.arange(6) % 2, names=names, channels=3, size=9, root=tmp_path)
    images = data.Data("files", files, files, ("a", "b"), 3, 9, (0.5,) * 3, (0.2,) * 3, flip=False, shift=0)
    sizes = {"images": 6, "image_size": 9, "flip": False, "shift": 0}
    held = batches.hold_images(images, SPEED.resolve(**sizes), torch.device("cpu"))
    assert torch.equal(held.train.images, files.fetch(torch.arange(6)))
    assert torch.equal(held.train.labels, files.labels)
    assert list(held.train.names) == list(names)
    assert batches.hold_images(images, QUICK.resolve(**sizes), torch.device("cpu")) is images


def test_images_are_held_where_the_model_is(digits):
    config = SPEED.resolve(images=len(digits.train), image_size=8, flip=False, shift=0)
    train_step = TrainStep(nin.models.nin_digits, config)
    train_step.device = torch.device("meta")  # of several processes each has its own; the recipe says "auto"
    run = loop.Trainer(digits, train_step, None, training.CheckpointOptions(), lambda progress: None)
    assert run.images.train.images.device == run.images.test.labels.device == train_step.device


@running_ahead()
def test_one_process_does_not_all_reduce_whether_to_stop(digits, monkeypatch):
    # on a GPU the answer would be waited for after every step
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda values: pytest.fail("waited for the device"))
    training.train(digits, dataclasses.replace(QUICK, epochs=1))


class PretendedGPUs:
    """What `torch.cuda` has of several GPUs, for tensors of the CPU; `used` is the current GPU of each call."""

    def __init__(self):
        self.current, self.used = "cuda:0", []

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, str(device)
        yield
        self.current = before

    @contextlib.contextmanager
    def on(self, what):
        self.used.append(self.current)
        yield

    def stream(self):
        self.used.append(self.current)
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def graph(self):
        return types.SimpleNamespace(replay=lambda: self.used.append(self.current))


def test_a_step_is_captured_and_replayed_on_its_own_gpu(monkeypatch):
    gpus = PretendedGPUs()
    names = {"device": gpus.device, "stream": gpus.on, "graph": gpus.on, "CUDAGraph": gpus.graph}
    for name, value in {**names, "Stream": gpus.stream, "current_stream": gpus.stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    runner = CUDAGraphRunner(lambda x: (2 * x,), torch.device("cuda:1"), warmup_calls=1)
    for _ in range(3):  # as it is, captured and replayed, replayed
        assert torch.equal(runner(torch.ones(2))[0], torch.full((2,), 2.0))
    assert len(gpus.used) == 4 + 1 + 2
    assert set(gpus.used) == {"cuda:1"}
    assert gpus.current == "cuda:0"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_replayed_step_is_the_plain_one(digits):
    config = dataclasses.replace(SPEED, device="cuda", model="nin_cifar", epochs=2)
    images = dataclasses.replace(digits, size=8)
    replayed = training.train(images, config)
    plain = training.train(images, dataclasses.replace(config, recipe="default", **recipe.RECIPES["speed"]))
    for name, value in weights(replayed).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-2, atol=1e-3)


def test_images_of_five_channels_train_but_make_no_run_folder(tmp_path):
    arrays = (torch.rand(40, 5, 8, 8), torch.arange(40) % 2)
    config = TrainConfig(model="nin_digits", epochs=1, batch_size=8)
    assert training.train(arrays, config).model(torch.rand(1, 5, 8, 8)).shape == (1, 2)
    with pytest.raises(UserError, match="got 5 channels"):
        training.train(arrays, config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_any_network_is_trained_but_only_ours_make_a_run_folder(tmp_path):
    config = TrainConfig(epochs=1, batch_size=16)

    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    result = training.train("digits", config, network=make)
    assert result.info.model == {"kind": "Sequential"}
    assert result.info.result["test_accuracy"] > 0.5
    with pytest.raises(UserError, match="got Sequential"):
        training.train("digits", config, network=make, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
