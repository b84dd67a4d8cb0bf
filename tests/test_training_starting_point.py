"""Where a training begins and goes on: weights that are gone, images that weights know, settings that were given."""

import dataclasses
import shutil

import pytest
import torch

from nin import checkpoint, data, training
from nin.config import TrainConfig
from nin.errors import UserError
from support.stopping import stop_after

QUICK = TrainConfig(epochs=2, batch_size=64, threads=1, precision="fp32", recipe="default")


@pytest.fixture(scope="module")
def few():
    images = data.load("digits")
    return dataclasses.replace(images, train=images.train.select(torch.arange(0, len(images.train), 6)))


def resumed(images, folder, config):
    return training.train(images, config, out=folder, keeping=training.CheckpointOptions(resume=True))


@pytest.mark.parametrize("kind", ["file", "run"])
def test_a_training_goes_on_without_the_weights_that_it_began_with(few, tmp_path, kind):
    training.train(few, dataclasses.replace(QUICK, epochs=1), out=tmp_path / "first")
    weights = tmp_path / "first"
    if kind == "file":
        weights = shutil.copy(weights / "model.safetensors", tmp_path / "weights.safetensors")
    config = dataclasses.replace(QUICK, model="nin_digits", weights=str(weights), seed=4)
    training.train(few, config, out=tmp_path / "whole")
    for folder, step in (("stopped", 5), ("early", 2)):
        with pytest.raises(KeyboardInterrupt):
            training.train(
                few, config, out=tmp_path / folder, keeping=training.CheckpointOptions(stop=stop_after(step))
            )
    shutil.move(weights, tmp_path / "elsewhere")
    resumed(few, tmp_path / "stopped", TrainConfig())
    resumed(few, tmp_path / "stopped", TrainConfig())  # finished: its result
    for name in ("model.safetensors", "metrics.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match=r"does not exist, and .* was stopped before its first epoch ended"):
        resumed(few, tmp_path / "early", TrainConfig())


def test_a_setting_that_is_given_as_its_default_counts_in_python_too(few, tmp_path):
    config = dataclasses.replace(QUICK, seed=3)
    with pytest.raises(KeyboardInterrupt):
        training.train(few, config, out=tmp_path, keeping=training.CheckpointOptions(stop=stop_after(4)))
    with pytest.raises(UserError, match="was begun with --seed 3, now 0"):
        resumed(few, tmp_path, TrainConfig(seed=0))
    with pytest.raises(UserError, match="was begun with --recipe default, now speed"):
        resumed(few, tmp_path, TrainConfig("speed"))
    assert resumed(few, tmp_path, TrainConfig()).info.recipe["seed"] == 3


def test_a_config_knows_what_was_given():
    assert TrainConfig("speed", seed=0).given == {"recipe", "seed"}
    assert TrainConfig().given == frozenset()
    assert dataclasses.replace(TrainConfig(seed=0, epochs=3), model="googlenet").given == {"epochs", "model"}
    assert "given" not in dataclasses.asdict(TrainConfig(seed=0))


def test_weights_of_a_run_keep_its_test_and_validation_images(tmp_path):
    first, notes = tmp_path / "first", []
    images = data.load("digits", seed=5, test_fraction=0.3)
    training.train(images, dataclasses.replace(QUICK, epochs=1, validation=0.2, seed=3), out=first)

    def trained(source, **settings):
        notes.clear()
        config = dataclasses.replace(QUICK, epochs=1, weights=str(first), **settings)
        return training.train(source, config, on_note=notes.append).info.data

    record = checkpoint.load_info(first).data
    own = trained("digits", validation=0.2, seed=9)
    names = ("seed", "test_fraction", "validation_seed", "test_images", "validation_images")
    assert {name: own[name] for name in names} == {name: record[name] for name in names}
    assert not any("trained on" in note for note in notes)
    assert trained("digits", validation=0.1)["validation_seed"] == 3, "a part of those that were set apart"
    assert not any("trained on" in note for note in notes)
    trained("digits", validation=0.4)
    assert "Some of the images to choose by may be among those that the weights were trained on" in " ".join(notes)
    trained(data.load("digits", seed=1), validation=0.2)
    assert "Some of the test images may be among those" in " ".join(notes)
    trained(data.take_fold(images, 1, folds=4, seed=0))
    assert "Some of the images of the fold may be among those" in " ".join(notes)
    other = dataclasses.replace(images, origin={})
    trained(other, validation=0.4)
    assert not any("trained on" in note for note in notes)


def test_a_resumed_run_keeps_the_split_that_its_weights_decided(tmp_path):
    first, out = tmp_path / "first", tmp_path / "run"
    training.train(data.load("digits", seed=5), dataclasses.replace(QUICK, epochs=1, validation=0.2, seed=3), out=first)
    config = dataclasses.replace(QUICK, weights=str(first), validation=0.2)
    with pytest.raises(KeyboardInterrupt):
        training.train("digits", config, out=out, keeping=training.CheckpointOptions(stop=stop_after(20)))
    shutil.rmtree(first)
    result = resumed("digits", out, TrainConfig())
    assert (result.info.data["seed"], result.info.data["validation_seed"], result.info.recipe["seed"]) == (5, 3, 0)
