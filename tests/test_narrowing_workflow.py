"""`nin narrow` on run folders: the new folder is one like any other."""

import dataclasses
import errno
import functools
import json
import os
import pickle
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from torch import nn

import nin
from nin import checkpoint, data, report, server
from nin.cli import app
from nin.config import TrainConfig
from nin.data.image_augmentation import AugmentedSet
from nin.errors import UserError
from nin.fusion import Chain
from nin.models.factory import create_external_model
from nin.narrowing import DistillationStep, FinetuneConfig, narrow_to_folder, uniform_baseline, workflow
from nin.narrowing.narrow_to_folder import load_finished, narrow_model, narrow_run
from nin.narrowing.workflow_config import WorkflowConfig
from nin.training import CheckpointOptions


def narrow(run, *arguments):
    images = [] if "--images" in arguments else ["--images", "128"]
    app.main(["narrow", str(run), "--data", "digits", *images, *arguments])


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
    # as it was: not in the layout that the fine-tuning takes
    assert all(p.is_contiguous() for p in checkpoint.load_model(out)[0].parameters())
    # the report's own count of right answers agrees, and a narrowed run can be narrowed again
    app.main(["report", str(out)])
    app.main(["cost", str(out), "--json"])
    output = capsys.readouterr().out
    assert json.loads(output[output.index("{") :])["macs"] == figures["macs"][1]
    narrow(out, "--macs", "0.7", "--out", str(tmp_path / "third"), "--json")
    again = json.loads(capsys.readouterr().out)
    assert again["macs"][0] == figures["macs"][1]
    assert nin.load(tmp_path / "third").model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_narrowed_run_is_exported_and_served(run, tmp_path, capsys):
    out = tmp_path / "half"
    narrow(run, "--macs", "0.5", "--out", str(out))
    app.main(["export", str(out), "--out", str(tmp_path / "half.onnx")])
    x = torch.randn(2, 1, 8, 8)
    session = onnxruntime.InferenceSession(tmp_path / "half.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"images": x.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(scores), nin.load(out).model(x), atol=1e-4, rtol=1e-4)
    Image.new("L", (8, 8), 90).save(tmp_path / "grey.png")
    with TestClient(server.create_app(out), base_url="http://127.0.0.1") as client:
        content = (tmp_path / "grey.png").read_bytes()
        answer = client.post("/api/predict", content=content, headers={"content-type": "image/png"})
    assert answer.status_code == 200, answer.text
    assert nin.load(out).predict(tmp_path / "grey.png")[0].label in answer.text


def test_a_narrowed_run_answers_with_the_operator(run, tmp_path):
    out = tmp_path / "half"
    narrow(run, "--macs", "0.5", "--out", str(out))
    classifier = nin.load(out)
    assert classifier.fastest is not classifier.model
    assert any(isinstance(value, Chain) for m in classifier.fastest.modules() for value in vars(m).values())
    both = [dict(network.named_parameters()) for network in (classifier.model, classifier.fastest)]
    assert [p.data_ptr() for p in both[0].values()] == [both[1][name].data_ptr() for name in both[0]]
    pixels = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(classifier.score_pixels(pixels), classifier.model(classifier.inputs(pixels)))
    with torch.no_grad():  # the same tensors
        next(classifier.model.parameters()).mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(classifier.score_pixels(pixels), classifier.model(classifier.inputs(pixels)))
    again = pickle.loads(pickle.dumps(classifier))
    torch.testing.assert_close(again.score_pixels(pixels), classifier.score_pixels(pixels))
    plain = nin.load(run)
    assert plain.fastest is plain.model


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
    assert "--out must name the folder to make" in fails(capsys, run, "--macs", "0.5")
    assert "is not empty" in fails(capsys, run, "--macs", "0.5", "--out", str(run))
    out = str(tmp_path / "new")
    assert "skip must match a layer's name" in fails(capsys, run, "--macs", "0.5", "--skip", "stem", "--out", out)
    assert not (tmp_path / "new").exists()


def test_the_images_are_brought_to_the_runs_size_and_held_out_as_for_its_training(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(
                tmp_path / "pets" / name / f"{i}.png"
            )
    recorded = ["--size", "16", "--test-fraction", "0.4", "--seed", "3"]
    small = ["--model", "nin_digits", "--epochs", "1", "--threads", "1"]
    app.main(["train", str(tmp_path / "pets"), "--out", str(tmp_path / "run"), *recorded, *small])
    before = checkpoint.load_info(tmp_path / "run")
    capsys.readouterr()
    arguments = ["--data", str(tmp_path / "pets"), "--macs", "0.7", "--out", str(tmp_path / "new"), "--json"]
    app.main(["narrow", str(tmp_path / "run"), *arguments])
    after = checkpoint.load_info(tmp_path / "new")
    assert (after.preprocessing, after.data["test_images"]) == (before.preprocessing, 8)
    assert {name: after.data[name] for name in ("seed", "test_fraction", "size")} == {
        "seed": 3,
        "test_fraction": 0.4,
        "size": 16,
    }
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert accuracy["original"] == pytest.approx(before.result["test_accuracy"], abs=1e-6)


def test_images_of_another_kind_are_refused(run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / name / f"{i}.png")
    with pytest.raises(SystemExit):
        app.main(["narrow", str(run), "--data", str(folder), "--macs", "0.5", "--out", str(tmp_path / "new")])
    assert "the images do not fit" in capsys.readouterr().err


class Stopper:
    """Says stop in the middle of something, once."""

    def __init__(self, during):
        self.during, self.seen = during, 0

    def on_progress(self, what, done, total):
        self.seen += what.startswith(self.during)

    def stop(self):
        return self.seen == (1 if self.during == "Fitting" else 2)  # one layer may be all that is fitted

    def arguments(self):
        return {"keeping": CheckpointOptions(stop=self.stop), "on_progress": self.on_progress}


@pytest.fixture(scope="module")
def digits():
    images = data.load("digits")
    few = dataclasses.replace(images.train, images=images.train.images[:256], labels=images.train.labels[:256])
    return dataclasses.replace(images, train=few)


def test_what_is_stopped_goes_on_to_the_same_weights(run, digits, tmp_path):
    config = WorkflowConfig({"macs": 0.5}, images=130, finetune=2)
    through = narrow_run(run, digits, config, out=tmp_path / "through")
    assert not (tmp_path / "through" / "state.safetensors").exists()
    (run / "narrowing.safetensors").unlink()
    out = tmp_path / "stopped"
    for during in ("Looking", "Weighing", "Fitting", "Fine-tuning"):
        with pytest.raises(KeyboardInterrupt):
            narrow_run(run, digits, config, out=out, **Stopper(during).arguments())
        assert (run / "narrowing.safetensors").exists() == (during != "Looking")
        assert out.exists() == (during == "Fine-tuning")
    assert [path.name for path in out.iterdir()] == ["state.safetensors"]
    again = narrow_run(run, digits, config, out=out)
    assert again.plan == through.plan
    assert again.report.accuracy == through.report.accuracy
    one, other = load_file(tmp_path / "through" / "model.safetensors"), load_file(out / "model.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0)


def test_an_unfinished_one_is_not_gone_on_with_under_other_settings(run, digits, tmp_path):
    config = WorkflowConfig({"macs": 0.5}, images=64, finetune=1)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        narrow_run(run, digits, config, out=out, **Stopper("Fine-tuning").arguments())
    with pytest.raises(UserError, match=r"was begun with finetune=1, now 2: give the same, or another --out"):
        narrow_run(run, digits, dataclasses.replace(config, finetune=2), out=out)


def test_a_finished_one_is_the_result_of_its_own_budget_and_engine_only(run, digits, tmp_path):
    out = tmp_path / "out"
    config = WorkflowConfig({"macs": 0.6}, images=64)
    narrow_run(run, digits, config, out=out)
    assert load_finished(out, config).engine == "PyTorch eager"
    assert load_finished(out, dataclasses.replace(config, engine="nin")) is not None  # its plan is of no engine
    with pytest.raises(UserError, match=r"is finished, with macs=0.6, now macs=0.5: give another --out"):
        load_finished(out, dataclasses.replace(config, budget={"macs": 0.5}))
    # as if it had been a budget of latency
    values = json.loads((out / "narrowing.json").read_text())
    values["plan"]["budget"] = "latency"
    (out / "narrowing.json").write_text(json.dumps(values))
    timed = dataclasses.replace(config, budget={"latency": 0.6})
    assert load_finished(out, timed) is not None
    with pytest.raises(UserError, match=r"with the latency in PyTorch eager, now in nin's operator: give another"):
        load_finished(out, dataclasses.replace(timed, engine="nin"))


def test_pages_that_a_full_disk_left_out_are_written_when_it_is_resumed(run, tmp_path, capsys):
    out, begun = tmp_path / "out", ("--macs", "0.6", "--images", "64", "--out")
    narrow(run, *begun, str(out))
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    for missing in (["narrowing.html"], ["narrowing.html", "report.html"]):
        for name in missing:
            (out / name).unlink()
        said = " ".join(fails(capsys, run, *begun, str(out)).split())
        assert f"--resume prints it again, and writes {' and '.join(missing)}, which it lacks" in said
        narrow(run, *begun, str(out), "--resume")
        assert f"{' and '.join(missing)}, which it lacked, is written" in " ".join(capsys.readouterr().err.split())
        assert {path.name for path in out.iterdir()} == set(written)
        assert all((out / name).read_bytes() == written[name] for name in ("narrowing.html", "narrowing.json"))


@pytest.mark.parametrize("of_run", [True, False])
def test_a_full_disk_leaves_nothing_that_stops_the_same_command(of_run, run, digits, tmp_path, monkeypatch):
    out, config = tmp_path / "out", WorkflowConfig({"macs": 0.6}, images=64)
    if of_run:
        begin = functools.partial(narrow_run, run, digits, config, out=out)
    else:
        p = checkpoint.load_info(run).preprocessing
        model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AvgPool2d(4), nn.Flatten())
        cache = tmp_path / "cache.safetensors"
        begin = functools.partial(narrow_model, model, digits, config, preprocessing=p, out=out, cache=cache)
    write = narrow_to_folder.write_atomically

    def full(path, content):
        if path.name in ("narrowing.json", "report.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(narrow_to_folder, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        begin()
    assert not out.exists()
    monkeypatch.setattr(narrow_to_folder, "write_atomically", write)
    begin()
    assert load_finished(out, config) is not None


@pytest.fixture
def other_run(run, tmp_path):
    """A run of the same kind with other weights and another recipe."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    weights = {name: 1.01 * value for name, value in load_file(run / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors")
    values = json.loads((other / "config.json").read_text())
    values["recipe"] |= {"flip": True, "shift": 0}
    (other / "config.json").write_text(json.dumps(values))
    return other


def test_an_unfinished_one_is_not_gone_on_with_for_another_network_or_other_images(run, other_run, digits, tmp_path):
    config = WorkflowConfig({"macs": 0.5}, images=64, finetune=1)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        narrow_run(run, digits, config, out=out, **Stopper("Fine-tuning").arguments())
    shuffled = dataclasses.replace(digits.train, labels=digits.train.labels.flip(0))
    message = r"out was begun with another network or other images: give the same, or another --out"
    for path, images in ((other_run, digits), (run, dataclasses.replace(digits, train=shuffled))):
        with pytest.raises(UserError, match=message):
            narrow_run(path, images, config, out=out)
    narrow_run(run, digits, config, out=out)


def test_an_unfinished_one_is_not_gone_on_with_under_another_recipe(run, digits, tmp_path, monkeypatch):
    config = WorkflowConfig({"macs": 0.5}, images=64, finetune=1)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        narrow_run(run, digits, config, out=out, **Stopper("Fine-tuning").arguments())
    slower = functools.partial(FinetuneConfig, learning_rate=1e-4)
    monkeypatch.setattr(workflow, "FinetuneConfig", slower)
    with pytest.raises(UserError, match=r"out was begun with learning_rate=None, now 0\.0001: give the same"):
        narrow_run(run, digits, config, out=out)


def test_a_plan_for_a_latency_can_be_stopped_and_keeps_what_was_timed(run, digits, tmp_path):
    config = WorkflowConfig({"latency": 0.7}, images=64)
    with pytest.raises(KeyboardInterrupt):
        narrow_run(run, digits, config, out=tmp_path / "out", **Stopper("Timing layers").arguments())
    (timed,) = json.loads((run / "narrowing.latency.json").read_text()).values()
    assert timed


def test_a_control_is_not_that_of_another_call(run, digits, tmp_path):
    config = WorkflowConfig({"macs": 0.5}, images=64, control=True)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        narrow_run(run, digits, config, out=out, **Stopper("Training the control").arguments())
    assert not (out / "state.safetensors").exists()
    chosen = (out / "control.json").read_bytes()
    other = dataclasses.replace(config, budget={"macs": 0.8})
    with pytest.raises(UserError, match=r"was begun with budget=\{'macs': 0.5\}, now \{'macs': 0.8\}"):
        narrow_run(run, digits, other, out=out)
    narrow_run(run, digits, config, out=out)
    assert (out / "control.json").read_bytes() == chosen


def test_a_fine_tuning_that_diverges_is_stopped_and_the_state_before_is_kept(run, digits, tmp_path, monkeypatch):
    diverging = functools.partial(FinetuneConfig, learning_rate=1e30, gradient_clip=1e30)
    monkeypatch.setattr(workflow, "FinetuneConfig", diverging)
    config = WorkflowConfig({"macs": 0.5}, images=64, finetune=2)
    out = tmp_path / "out"
    message = r"the loss of the fine-tuning became \S+ at step \d of 8\. Leave a larger share .* lower "
    with pytest.raises(UserError, match=message):
        narrow_run(run, digits, config, out=out, keeping=CheckpointOptions(minutes=1e9))
    assert [path.name for path in out.iterdir()] == ["state.safetensors"]
    assert all(value.isfinite().all() for value in load_file(out / "state.safetensors").values())


def test_the_fine_tuning_mirrors_and_shifts_as_the_runs_recipe_says(run, other_run, digits, tmp_path, monkeypatch):
    seen, augment_as_said = [], data.augment

    def augment(*arguments, flip, shift, **options):
        seen.append((flip, shift))
        return augment_as_said(*arguments, flip=flip, shift=shift, **options)

    monkeypatch.setattr(data, "augment", augment)
    config = WorkflowConfig({"macs": 0.5}, images=64, finetune=1)
    narrow_run(run, digits, config, out=tmp_path / "one")
    assert set(seen) == {(digits.flip, digits.shift)} == {(False, 1)}
    seen.clear()
    narrow_run(other_run, digits, config, out=tmp_path / "two")
    assert set(seen) == {(True, 0)}


def write_photos(folder, count):
    """Write photos of 128×112 pixels, dark ones and bright ones."""
    generator = np.random.default_rng(0)
    for number in range(count):
        kind = ("dark", "bright")[number % 2]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (112, 128, 3)) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / kind / f"{number:02}.png")


@pytest.mark.filterwarnings("ignore:fewer samples than values")  # a few images are enough for a test
def test_the_fine_tuning_augments_and_mixes_as_the_run_did(tmp_path, monkeypatch, capsys):
    photos, run = tmp_path / "photos", tmp_path / "run"
    write_photos(photos, 20)
    (tmp_path / "narrowings_own.py").write_text(
        "from torch import nn\n"
        "def make(num_classes=2):\n"
        "    layers = [nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU()]\n"
        "    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = ["--augment", "strong", "--mixup", "0.4", "--resize", "squash", "--size", "96", "--no-flip"]
    network = ["--model", "narrowings_own:make", "--epochs", "1", "--batch-size", "8"]
    app.main(["train", str(photos), "--out", str(run), *network, *settings])
    augmentations, boxes, targets = [], [], []
    load, call = AugmentedSet.load, DistillationStep.__call__

    def seen_load(self, number):
        augmentations.append(self.augmentation)
        boxes.append(self.source.photo(number % len(self)).shape)
        return load(self, number)

    def seen_call(self, x, labels):
        targets.append(labels)
        return call(self, x, labels)

    monkeypatch.setattr(AugmentedSet, "load", seen_load)
    monkeypatch.setattr(DistillationStep, "__call__", seen_call)
    out = tmp_path / "narrow"
    budget = ["--macs", "0.8", "--images", "8", "--finetune", "1", "--out", str(out), "--trust"]
    app.main(["narrow", str(run), "--data", str(photos), *budget])
    capsys.readouterr()
    (augmentation,) = set(augmentations)
    assert (augmentation.level, augmentation.crops, augmentation.flip) == ("strong", True, False)
    assert set(boxes) == {(110, 110, 3)}, "whole photos, squashed, not the squares of the test"
    assert all(target.shape == (16, 2) and target.dtype == torch.float32 for target in targets)
    assert any(((target > 0.01) & (target < 0.99)).any() for target in targets)
    assert checkpoint.load_info(out).preprocessing.resize.mode == "squash"


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Two folds of the digits, with a validation part."""
    out = tmp_path_factory.mktemp("folds") / "runs"
    app.main(["train", "digits", "--out", str(out), "--folds", "2", "--validation", "0.2", "--epochs", "1"])
    return out


def fetched(monkeypatch):
    """Record the images that are fetched to narrow with and to test with, as bytes."""
    seen = {"train": set(), "test": set()}
    iterate, evaluate = data.batches, workflow.evaluation.evaluate

    def batches(dataset, order, *arguments, **options):
        seen["train"] |= {image.tobytes() for image in dataset.fetch(order).numpy()}
        yield from iterate(dataset, order, *arguments, **options)

    def tested(model, images, **options):
        before = set(seen["train"])
        result = evaluate(model, images, **options)
        seen["train"] = before
        seen["test"] |= {image.tobytes() for image in images.test.images.numpy()}
        return result

    def held_out(task):
        before = set(seen["train"])
        result = measured(task)
        seen["train"], seen["held out"] = before, seen["train"] - before
        return result

    measured = workflow.NarrowingTask.held_out_batches
    monkeypatch.setattr(data, "batches", batches)
    monkeypatch.setattr(workflow.NarrowingTask, "held_out_batches", held_out)
    monkeypatch.setattr(workflow.evaluation, "evaluate", tested)
    monkeypatch.setattr("nin.cli.narrow.write_report", lambda run, images: None)  # it fetches test images, too
    return seen


def test_a_fold_is_narrowed_with_its_own_images(folds, tmp_path, monkeypatch, capsys):
    run, out = folds / "fold-2", tmp_path / "narrow"
    info = checkpoint.load_info(run)
    expected = data.load_from_record(info.data, info.preprocessing)
    assert (info.data["fold"], info.data["validation"]) == (2, 0.2)
    pixels = {part: {i.tobytes() for i in getattr(expected, part).images.numpy()} for part in ("train", "test")}
    kept_apart = {image.tobytes() for image in expected.validation.images.numpy()}
    assert not pixels["train"] & (pixels["test"] | kept_apart)
    seen = fetched(monkeypatch)
    narrow(run, "--macs", "0.5", "--finetune", "1", "--images", "2000", "--out", str(out), "--json")
    printed = capsys.readouterr()
    assert seen["train"] <= pixels["train"]
    assert len(seen["train"]) > 0.9 * len(pixels["train"])
    assert seen["test"] == pixels["test"]
    assert seen["held out"] <= pixels["test"]
    assert len(seen["held out"]) == workflow.ERROR_IMAGES
    counts = (len(expected.train), len(expected.validation), len(expected.test))
    assert "{:,} images to train on, {:,} to choose by, {:,} to test".format(*counts) in printed.err
    narrowed = checkpoint.load_info(out)
    assert narrowed.result["test_images"] == len(expected.test)
    # it is a fold still: its report and what is narrowed from it have the same parts
    assert report.build_report(out).headline.counted_accuracy == narrowed.result["test_accuracy"]
    seen["train"].clear()  # of those of the report
    narrow(out, "--macs", "0.5", "--finetune", "1", "--images", "2000", "--out", str(tmp_path / "again"))
    assert seen["train"] <= pixels["train"]


def test_a_fold_is_reported_with_its_own_images_whatever_is_given(folds):
    run, digits = folds / "fold-1", data.load("digits")
    own, given = report.build_report(run), report.build_report(run, digits)
    assert given.headline.test_images == own.headline.test_images != len(digits.test)
    assert given.confusion == own.confusion


@pytest.mark.parametrize("settings", [{}, {"weights": "gone", "freeze": True, "pretrained": False}])
def test_the_control_is_trained_as_a_run_of_photos_was(settings):
    recipe = TrainConfig(model="nin_imagenet", augment="light").resolve(images=99, image_size=224, flip=True, shift=14)
    recorded = {**dataclasses.asdict(recipe), **settings}
    info = checkpoint.RunInfo({}, (), None, recorded, {}, {}, {})
    config = uniform_baseline.control_train_config(info, WorkflowConfig({"macs": 0.5}, finetune=2))
    resolved = config.resolve(images=99, image_size=224, flip=True, shift=14)
    assert resolved.epochs == recipe.epochs + 2
    assert (resolved.weights, resolved.freeze, resolved.flip) == (None, False, True)


def test_several_budgets_and_a_control(run, tmp_path, capsys):
    out = tmp_path / "out"
    narrow(run, "--macs", "0.5", "--budgets", "0.8,0.6", "--control", "--finetune", "1", "--out", str(out), "--json")
    report = json.loads(capsys.readouterr().out)
    assert [point["share"] for point in report["curve"]] == [0.8, 0.6, 0.5]
    assert [point["macs"] for point in report["curve"]] == sorted((p["macs"] for p in report["curve"]), reverse=True)
    assert report["curve"][-1]["accuracy"]["corrected"] == report["accuracy"]["corrected"]
    assert set(report["curve"][0]["latency"]) == {"1", "64"}
    control = report["control"]
    assert control["epochs"] == 5
    assert 0.5 * report["macs"][1] < control["macs"] <= report["macs"][1]
    assert nin.load(out / "control").info.result["test_accuracy"] == control["accuracy"]
    page = (out / "narrowing.html").read_text()
    assert page.count("<h3>Accuracy in % at batch") == 2
    assert page.count("<circle") == 2 * (1 + 3 + 1 + 1)
    assert f"{100 * control['accuracy']:.2f}" in page
    written = json.loads((out / "narrowing.json").read_text())["report"]
    kept = nin.narrowing.NarrowReport.from_dict(written)
    assert json.loads(json.dumps(kept.to_dict())) == written
    assert "control: " in str(kept)


FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES),
    )

def demanding(width):
    return nn.Identity()

def text():
    return "no network"
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A network of somebody else's, its weights in two forms, and a folder of images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for classes in (2, 7):
        (tmp_path / f"theirs{classes}.py").write_text(FACTORY.replace("CLASSES", str(classes)))
    monkeypatch.syspath_prepend(str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    for kind in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / kind / name).mkdir(parents=True)
            for i in range(12):
                pixels = torch.randint(0, 256, (12, 12, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / "images" / kind / name / f"{i}.png")
    import theirs2
    import theirs7

    torch.manual_seed(0)
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs2.make().state_dict().items()}}, "two.pt")
    save_file(theirs7.make().state_dict(), "seven.safetensors")
    yield theirs2
    for name in ("theirs2", "theirs7"):
        sys.modules.pop(name)


def theirs_narrow(*arguments):
    app.main(["narrow", "--data", "images", "--size", "12", "--macs", "0.6", *arguments])


@pytest.mark.filterwarnings("ignore:fewer samples than values")
def test_somebodys_network_is_narrowed_and_loads_again(theirs, tmp_path, capsys):
    common = ["theirs2:make", "--weights", "two.pt", "--mean", "0.5,0.5,0.5", "--std", "0.3,0.3,0.3"]
    theirs_narrow(*common, "--finetune", "1", "--out", "out", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["macs"][1] <= 0.6 * report["macs"][0]
    assert set(report["accuracy"]) == {"original", "raw", "corrected", "finetuned"}
    model = nin.apply_plan(theirs.make(), (tmp_path / "out" / "plan.json").read_text())
    model.load_state_dict(load_file("out/model.safetensors"))
    assert model.eval()(torch.zeros(1, 3, 12, 12)).shape == (1, 2)
    assert "Accuracy" not in (tmp_path / "out" / "report.html").read_text()  # one budget, no curve


@pytest.mark.filterwarnings("ignore:fewer samples than values")
def test_without_fitting_labels_there_is_no_accuracy(theirs, capsys):
    theirs_narrow("--model", "theirs7:make", "--weights", "seven.safetensors", "--out", "out")
    printed = capsys.readouterr()
    assert "The network gives 7 scores, the images have 2 classes: no accuracy." in printed.err
    assert "accuracy" not in printed.out
    assert "load_state_dict" in printed.err


@pytest.mark.parametrize(
    ("factory", "options"), [("theirs7:make", {}), ("timm:test_resnet", {"classes": 2, "channels": 3})]
)
@pytest.mark.filterwarnings("ignore:fewer samples than values")
def test_the_code_that_is_printed_runs(theirs, factory, options, capsys):
    weights = create_external_model(factory, **options).model.state_dict()
    save_file(weights, "weights.safetensors")
    size = "32" if factory.startswith("timm") else "12"
    given = ["--model", factory, "--weights", "weights.safetensors", "--data", "images", "--size", size]
    app.main(["narrow", *given, "--macs", "0.6", "--out", "it's out"])
    code = capsys.readouterr().err.partition("without:\n")[2]
    names = {}
    exec(code, names)
    tensors = load_file("it's out/model.safetensors")
    found = names["model"].state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert sum(t.numel() for t in tensors.values()) < sum(t.numel() for t in weights.values())


def test_mistakes_with_somebodys_network_are_one_line(theirs, capsys, tmp_path):
    def said(*arguments):
        with pytest.raises(SystemExit) as stop:
            theirs_narrow(*arguments, "--out", "out")
        assert stop.value.code == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    two, weights = ["--model", "theirs2:make"], ["--weights", "two.pt"]
    assert "give a run folder, or the name of a network" in said()
    assert "give a run folder, or the name of a network" in said(*two)
    assert "give a run folder, or the name of a network" in said("theirs2:make")
    assert "give one network: theirs2:make, or --model theirs7:make" in said(
        "theirs2:make", "--model", "theirs7:make", *weights
    )
    forms = "network must be a run folder, or timm:NAME, torchvision:NAME, package.module:factory; got 'theirs2'"
    assert forms in said("--model", "theirs2", *weights)
    assert "theirs2 does not exist: give a run folder" in said("theirs2", *weights)
    assert "timm has no network 'resnet1'" in said("timm:resnet1", *weights)
    assert "nowhere:make was not found: No module named 'nowhere'" in said("--model", "nowhere:make", *weights)
    assert "was not found" in said("--model", "theirs2:missing", *weights)
    assert "must be callable without arguments" in said("--model", "theirs2:demanding", *weights)
    assert "must give a torch.nn.Module, got str" in said("--model", "theirs2:text", *weights)
    assert "--weights: missing.pt does not exist" in said(*two, "--weights", "missing.pt")
    assert "does not fit theirs2:make" in said(*two, "--weights", "seven.safetensors")
    torch.save(nn.ReLU(), "module.pt")
    assert "module.pt holds more than names and tensors" in said(*two, "--weights", "module.pt")
    (tmp_path / "text.pt").write_text("no weights")
    assert "text.pt is damaged, or no file of weights" in said(*two, "--weights", "text.pt")
    assert "mean must be 3 numbers, one for each channel, got 2" in said(*two, *weights, "--mean", "0.5,0.5")
    assert "mean must be numbers with commas" in said(*two, *weights, "--mean", "a,b")
    assert "std must be above 0" in said(*two, *weights, "--std", "0.5,0,0.5")
    assert "--control must be given a run folder" in said(*two, *weights, "--control")
    assert "budgets must be a share" in said(*two, *weights, "--budgets", "0.5,2")


def test_a_control_needs_one_of_our_networks():
    with pytest.raises(UserError, match="must be given a network of mlpconv layers"):
        uniform_baseline.original_config({"kind": "googlenet", "num_classes": 10, "in_channels": 3})
