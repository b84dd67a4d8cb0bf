"""The study of recipes: every variant trains, what has a result is not run again, the page is that of the results."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from support.fake_gpu import pretended_gpu

FOLDER = Path(__file__).parents[1] / "benchmarks/recipes"
MODULES = ("study", "tables", "variants")


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def study(scripts):
    return scripts["study"]


@pytest.fixture(scope="module")
def tiny(study):
    """A few digits, which train the smallest network."""
    budget = study.Budget("digits", 96, 1, {"batch_size": 32, "ema": 0.9, "precision": "fp32"})
    images = study.load(budget, Path())
    few = images.test.select(torch.arange(50))
    return budget, dataclasses.replace(images, test=few, flip=True)


def test_trained_and_held_out_images_are_others(study):
    images = study.load(study.Budget("digits", 200, 1, {}), Path())
    whole = study.data.load("digits")
    rows = {tuple(image.flatten().tolist()) for image in images.train.images}
    assert abs(len(images.train) - 200) <= 10  # as many of each class
    assert abs(len(images.test) - len(whole.train) // 4) <= 10
    assert not rows & {tuple(image.flatten().tolist()) for image in images.test.images}
    assert not rows & {tuple(image.flatten().tolist()) for image in whole.test.images}


def test_every_variant_trains(study, tiny, monkeypatch, tmp_path):
    budget, images = tiny
    monkeypatch.setattr(study, "TEACHERS", tmp_path / "teachers")
    torch.set_num_threads(1)
    for name, variant in study.VARIANTS.items():
        changes = {"cost": False, "length": 1.0}
        if name == "paper":  # of another size of images
            continue
        monkeypatch.setitem(study.VARIANTS, name, dataclasses.replace(variant, **changes))
        monkeypatch.setitem(study.BUDGETS, "tiny", budget)
        line = study.run_one(name, "tiny", 0 if name == "wider" else 1, images)
        assert 0 <= line["accuracy"] <= 1, name
        assert 0 < line["loss"] < 10, name
        assert line["images"] == len(images.train)


@pytest.mark.parametrize("name", ["erasing", "shift-2-reflect", "sam"])
def test_variants_on_a_gpu(study, tiny, monkeypatch, name):
    budget, images = tiny
    budget = dataclasses.replace(budget, settings={**budget.settings, "device": "cuda"})
    monkeypatch.setitem(study.BUDGETS, "tiny", budget)
    monkeypatch.setattr(study, "relative_cost", lambda *_: 1.0)
    with contextlib.nullcontext() if torch.cuda.is_available() else pretended_gpu(monkeypatch):
        line = study.run_one(name, "tiny", 1, images)
    assert line["gpu_seconds"] >= 0
    assert 0 <= line["accuracy_flip"] <= 1


def test_no_network_is_larger_than_the_papers(study):
    config = study.TrainConfig().resolve(images=60_000, image_size=32, flip=True, shift=2)
    for name, variant in study.VARIANTS.items():
        if name == "wider":
            continue
        network = variant.network(config, 3, 10, 32)
        assert sum(p.numel() for p in network.parameters()) <= 1_000_000, name


def test_what_has_a_result_is_not_run_again(study, tiny, tmp_path, monkeypatch):
    budget, images = tiny
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setitem(study.BUDGETS, "tiny", budget)
    monkeypatch.setattr(study, "load", lambda *_: images)
    queue = tmp_path / "queue.txt"
    queue.write_text("default tiny 0\n# a remark\nsmoothing-0 tiny 3  # why\n")
    study.main(["run", str(tmp_path), str(queue)])
    lines = study.read_results()
    assert [(line["variant"], line["seed"]) for line in lines] == [("default", 0), ("smoothing-0", 3)]
    assert {"epochs", "processor_seconds", "accuracy", "accuracy_flip", "accuracy_10_views"} <= lines[0].keys()
    with queue.open("a") as file:
        file.write("default tiny 1\n")
    study.main(["run", str(tmp_path), str(queue)])
    assert study.read_results()[:2] == lines
    assert len(study.read_results()) == 3
    assert study.next_run(queue, study.read_results()) is None


def test_a_dearer_step_leaves_fewer_of_them(study, tiny, monkeypatch):
    budget, images = tiny
    monkeypatch.setitem(study.BUDGETS, "tiny", budget)
    monkeypatch.setattr(study, "relative_cost", lambda *_: 1.5)
    assert study.run_one("sam", "tiny", 0, images)["steps"] == 2  # of 3
    monkeypatch.undo()
    monkeypatch.setitem(study.BUDGETS, "tiny", budget)
    assert study.relative_cost(study.VARIANTS["triangle"], budget, images) == 1
    assert 1.05 < study.relative_cost(study.VARIANTS["sam"], budget, images) < 4


def test_changes_of_a_batch(scripts):
    variants = scripts["variants"]
    x, labels = torch.arange(2 * 6 * 6.0).view(2, 1, 6, 6) + 1, torch.zeros(2)

    def random():
        return variants.generator(0, 0, 1)

    moved, _ = variants.reflect_shift(2)(x, labels, 0.5, random())
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    places = [padded[:, :, r : r + 6, c : c + 6] for r in range(5) for c in range(5)]
    assert all(any(torch.equal(image, place[i]) for place in places) for i, image in enumerate(moved))
    erased, _ = variants.erase((0.25, 0.25), probability=1, aspect=1)(x, labels, 0.5, random())
    assert [(image == 0).sum().item() for image in erased] == [9, 9]
    assert torch.equal(erased[erased != 0], x[erased != 0])
    assert torch.equal(variants.erase((0.25, 0.25), probability=0)(x, labels, 0.5, random())[0], x)
    small = torch.rand(1, 1, 28, 28)
    sides = [variants.progressive(0.667, 0.7)(small, labels, done, random())[0].shape[-1] for done in (0, 0.35, 0.7, 1)]
    assert sides == [18, 24, 28, 28]


def test_average_at_the_end_is_the_mean_of_the_last_weights(study, tiny):
    budget, images = tiny
    run = study.Run(study.VARIANTS["average-end"], budget, images, 0)
    kept, batches = [], [batch for number in range(4) for batch in run.epoch(number)][:10]
    for step, (x, labels) in enumerate(batches):
        run.take_step(x, labels, step, 10)
        kept.append([p.detach().clone() for p in run.train_step.model.parameters()])
    for found, *values in zip(run.train_step.ema_model.parameters(), *kept[8:], strict=True):
        torch.testing.assert_close(found, torch.stack(values).mean(0))


def line(variant, seed, accuracy, loss, **more):
    about = {"set": "tiny", "cost": 1.0, "epochs": 2.0, "processor_seconds": 60.0, "date": "2026-01-01"}
    machine = {"processor": "P", "torch": "T", "precision": "float32"}
    return {"variant": variant, "seed": seed, "accuracy": accuracy, "loss": loss, **about, **machine, **more}


def test_the_table_says_what_is_chance(scripts):
    default = [line("default", seed, 0.9 + 0.001 * seed, 0.3) for seed in range(3)]
    others = [line("cutmix", 0, 0.92, 0.2), line("mixup", 1, 0.902, 0.3), line("triangle", 2, 0.88, 0.4)]
    failed = {"variant": "sam", "set": "tiny", "seed": 0, "failed": "the loss of step 3 is nan"}
    text = scripts["tables"].tables([*default, *others, failed], {"tiny": scripts["study"].Budget("digits", 96, 1, {})})
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    assert list(rows) == ["default", "cutmix", "mixup", "triangle", "sam"]
    assert "90.10, spread 0.10" in rows["default"]
    assert "92.00 (+2.00)" in rows["cutmix"]  # beside the same seed
    assert rows["cutmix"].endswith("| better |")
    assert rows["mixup"].endswith("| within chance |")
    assert rows["triangle"].endswith("| worse |")
    assert "the loss of step 3 is nan" in rows["sam"]


def test_the_page_is_that_of_the_results(study, scripts, tmp_path):
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    again = tmp_path / "README.md"
    again.write_text(page, encoding="utf-8")
    scripts["tables"].write_tables(again, study.read_results(), study.BUDGETS)
    assert again.read_text(encoding="utf-8") == page, "run: python benchmarks/recipes/study.py table"
    queued = [(FOLDER / name).read_text() for name in ("queue.txt", "queue-full.txt")]
    for text in "".join(queued).splitlines():
        name, of_set, seed = text.split("#")[0].split() or ("default", "digits", "0")
        assert name in study.VARIANTS
        assert of_set in study.BUDGETS
        assert int(seed) >= 0


def test_the_curve_is_drawn_from_run_folders(study, tmp_path):
    for name, best in (("old", 0.8), ("new", 0.9)):
        (tmp_path / name).mkdir()
        rows = [(epoch, best - 0.3 / epoch) for epoch in range(1, 5)]
        metrics = "".join(f"{epoch},{accuracy}\n" for epoch, accuracy in rows)
        (tmp_path / name / "metrics.csv").write_text("epoch,validation_accuracy\n" + metrics)
        times = "".join(f"{epoch},{60 * epoch},100\n" for epoch, _ in rows)
        (tmp_path / name / "timings.csv").write_text("epoch,seconds,images_per_second\n" + times)
    out = tmp_path / "curve.svg"
    study.main(["curve", f"old={tmp_path / 'old'}", f"new={tmp_path / 'new'}", "--out", str(out)])
    drawn = out.read_text()
    assert drawn.startswith("<svg xmlns=")
    assert "old: 72.50 %, 4 min" in drawn
    assert "new: 82.50 %, 4 min" in drawn
    (tmp_path / "new" / "timings.csv").unlink()
    with pytest.raises(SystemExit, match=r"expected the metrics\.csv and timings\.csv of a run"):
        study.main(["curve", f"new={tmp_path / 'new'}", "--out", str(out)])
    assert json.loads(json.dumps(study.read_results())) == study.read_results()
