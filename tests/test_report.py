"""The page about a run: its numbers against another count, its pictures, and what hostile names can do to it."""

from __future__ import annotations

import ast
import dataclasses
import html.parser
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import torch
from sklearn import metrics

import nin
from nin import checkpoint, data, models, report
from nin.config import TrainConfig
from nin.errors import UserError
from nin.report import heatmaps, html_page, image_grid, settings

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }} ' & \x1b[31m\u202e",
    "https://example.org/a.png",
)


def some_images(classes, *, channels=1, size=8, test=40, names=None, seed=0):
    """Random images, the labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (test, channels, size, size), generator=generator, dtype=torch.uint8)
    images = data.ImageSet(pixels, torch.arange(test) % len(classes), names)
    half = (0.5,) * channels
    return data.Data("images", images, images, tuple(classes), channels, size, half, half, flip=False, shift=1)


def make_run(folder, images, model=None, *, result=None, rows=2, **info):
    """Write a run folder as an interrupted training leaves it, of an untrained network."""
    folder.mkdir()
    torch.manual_seed(0)
    model = model or models.nin_digits(len(images.classes), in_channels=images.channels)
    preprocessing = checkpoint.Preprocessing(images.size, images.channels, images.mean, images.std)
    values = {"name": images.name, "train_images": 5, "test_images": len(images.test), "skipped": [], **info}
    run = checkpoint.RunInfo(
        model=checkpoint.model_description(model),
        classes=images.classes,
        preprocessing=preprocessing,
        recipe={"epochs": 9, "flip": False, "threads": None, "precision": "fp32"},
        data=values,
        result=result or {},
        environment={"torch": "2", "backends": {"cpu": "reference"}},
    )
    checkpoint.save_model(folder, model, run)
    if rows:
        lines = [f"{i + 1},{2.0 - i / 9},{i / 9},1.5,{i / 10},{30.0 * (i + 1)}" for i in range(rows)]
        head = "epoch,train_loss,train_accuracy,test_loss,test_accuracy,seconds"
        (folder / "metrics.csv").write_text("\n".join([head, *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def digits():
    images = data.load("digits")
    train = data.ImageSet(images.train.images[:480], images.train.labels[:480])
    test = data.ImageSet(images.test.images[:200], images.test.labels[:200])
    return dataclasses.replace(images, train=train, test=test)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    nin.train(digits, nin.TrainConfig(epochs=6, device="cpu", precision="fp32"), out=folder)
    return folder


@pytest.fixture(scope="module")
def collected(trained, digits):
    return report.build_report(trained, digits)


def answers_of(run, images):
    return torch.cat([nin.load(run).scores(list(images.test.images))]).argmax(1)


def test_the_counts_are_those_of_scikit_learn(collected, trained, digits):
    labels, answers = digits.test.labels.numpy(), answers_of(trained, digits).numpy()
    assert 0.3 < (labels == answers).mean() < 1  # else the comparison says little
    np.testing.assert_array_equal(collected.confusion, metrics.confusion_matrix(labels, answers, labels=range(10)))
    recall = metrics.recall_score(labels, answers, average=None, labels=range(10), zero_division=np.nan)
    precision = metrics.precision_score(labels, answers, average=None, labels=range(10), zero_division=np.nan)
    np.testing.assert_allclose([math.nan if c.recall is None else c.recall for c in collected.per_class], recall)
    np.testing.assert_allclose(
        [math.nan if c.precision is None else c.precision for c in collected.per_class], precision
    )
    assert [sum(row) for row in collected.confusion] == np.bincount(labels, minlength=10).tolist()


def test_the_headline_is_what_the_training_recorded(collected, trained):
    result = checkpoint.load_info(trained).result
    headline = collected.headline
    assert headline.accuracy == result["test_accuracy"] == headline.counted_accuracy
    assert headline.accuracy_interval == tuple(result["test_accuracy_interval"])
    assert headline.minutes == pytest.approx(result["seconds"] / 60)
    assert (headline.epochs, headline.test_images, headline.train_images) == (6, 200, 480)
    assert headline.parameters == sum(p.numel() for p in nin.load(trained).model.parameters())
    assert headline.macs == collected.cost.macs
    assert [row["epoch"] for row in collected.curves] == [1, 2, 3, 4, 5, 6]
    assert collected.finished
    assert not collected.notes


def test_a_recorded_accuracy_that_differs_is_kept_and_noted(tmp_path):
    images = some_images("ab")
    result = {"test_accuracy": 0.975, "test_accuracy_interval": [0.87, 0.99], "seconds": 4.0}
    found = report.build_report(make_run(tmp_path / "run", images, result=result), images)
    assert found.headline.accuracy == 0.975
    right = round(40 * found.headline.counted_accuracy)
    assert found.notes == (
        "The accuracy is the one that the training counted; counted again here, as for the tables, the network is "
        f"right on {right} of 40 images ({100 * right / 40:.2f} %).",
    )
    assert "97.5" in report.render_report(found)


def test_the_maps_average_to_the_scores_of_the_classifier(collected, trained, digits):
    predictions = nin.load(trained).predict([digits.test.images[sample.index] for sample in collected.samples])
    for sample, prediction in zip(collected.samples, predictions, strict=True):
        assert collected.classes[sample.predicted] == prediction.label
        assert sample.confidence == pytest.approx(prediction.confidence, abs=1e-5)
        first, second = sample.maps
        assert first.label == sample.predicted
        order = np.argsort(prediction.probabilities)
        assert second.label == (order[-2] if sample.right else sample.true)
        for shown in sample.maps:
            assert shown.values.mean() == pytest.approx(shown.score, abs=1e-5)
            assert shown.probability == pytest.approx(prediction.probabilities[shown.label], abs=1e-5)


def test_samples_show_every_class_and_both_kinds_of_answer(collected):
    assert [sample.true for sample in collected.samples] == list(range(10))
    assert {sample.right for sample in collected.samples} == {True, False}
    assert len({sample.index for sample in collected.samples}) == 10


def test_mistakes_are_wrong_and_the_surest_come_first(collected, trained, digits):
    wrong = int((answers_of(trained, digits) != digits.test.labels).sum())
    assert len(collected.mistakes) == min(wrong, 24)
    assert not any(mistake.right for mistake in collected.mistakes)
    sure = [mistake.confidence for mistake in collected.mistakes]
    assert sure == sorted(sure, reverse=True)
    pixels = digits.test.images[collected.mistakes[0].index]
    np.testing.assert_array_equal(collected.mistakes[0].pixels, pixels)


def test_the_report_is_plain_data(collected):
    values = json.loads(json.dumps(collected.to_dict(), allow_nan=False))
    assert values["headline"]["test_images"] == 200
    assert values["samples"][0]["pixels"]["shape"] == [1, 8, 8]
    assert values["per_class"][3]["recall"] == collected.per_class[3].recall


class Page(html.parser.HTMLParser):
    """Collects the elements of a page and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def assert_harmless(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "a",
        "image",
        "use",
        "foreignobject",
    }
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("href", "srcset", "xlink:href")]
        assert "url(" not in (attrs.get("style") or "")
        if "src" in attrs:
            assert tag == "img"
            assert attrs["src"].startswith("data:image/")
    policies = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0].startswith("default-src 'none'; img-src data:;")


def test_the_page_is_whole_small_and_described(collected):
    text = report.render_report(collected)
    page = Page(text)
    assert_harmless(page)
    assert len(page.all("img")) == 30 + len(collected.mistakes)
    assert all(attrs["alt"].strip() for attrs in page.all("img"))
    assert all(attrs["aria-label"].strip() for attrs in page.all("svg"))
    assert len(page.all("svg")) == 3  # accuracy, loss, reliability
    assert page.all("html")[0]["lang"] == "en"
    assert page.words.count("test accuracy")
    assert text.index("<img") < text.index("In figures")  # pictures first
    assert "url(" not in text
    assert len(text.encode()) < 1_000_000
    assert text == report.render_report(collected)


@pytest.mark.parametrize("channels", [1, 3])
def test_hostile_names_stay_text(tmp_path, channels):
    files = [f"{HOSTILE[i % 4]}/{i}\udcff'\"><svg onload=alert(1)>.png" for i in range(40)]
    images = some_images(HOSTILE, channels=channels, names=files)
    run = make_run(tmp_path / "run", images, skipped=[["<b>x</b>.png", "damaged <i>"]], name="<script>x</script>")
    text = report.write_report(run, images).read_text(encoding="utf-8")
    page = Page(text)
    assert_harmless(page)
    for name in (*HOSTILE[:2], HOSTILE[3], "{{ 7 * 7 }}", "<script>x</script>", "<b>x</b>.png", "damaged <i>"):
        assert name in page.words
    assert "\x1b" not in text
    assert all(attrs["alt"] for attrs in page.all("img"))


def test_a_class_that_is_never_the_answer_has_no_precision(tmp_path):
    images = some_images("abc")
    model = models.nin_digits(3)
    with torch.no_grad():
        model.blocks[-1][0].convs[-1].bias[1] = -1000
    found = report.build_report(make_run(tmp_path / "run", images, model), images)
    assert found.per_class[1].precision is None
    assert found.per_class[1].recall == 0
    assert [row[1] for row in found.confusion] == [0, 0, 0]
    assert json.dumps(found.to_dict(), allow_nan=False)
    assert Page(report.render_report(found)).words.count(html_page.NO_VALUE) >= 1


def test_a_class_without_test_images(tmp_path):
    images = some_images("abc")
    test = data.ImageSet(images.test.images, images.test.labels % 2)
    images = dataclasses.replace(images, test=test)
    found = report.build_report(make_run(tmp_path / "run", images), images)
    assert found.per_class[2].recall is None
    assert {sample.true for sample in found.samples} == {0, 1}
    report.render_report(found)


def test_many_classes_show_pairs_in_place_of_a_matrix(tmp_path):
    names = [f"kind {i}" for i in range(35)]
    images = some_images(names, channels=3, test=105)
    found = report.build_report(make_run(tmp_path / "run", images), images, samples=6)
    page = Page(report.render_report(found))
    assert not [t for t in page.all("table") if "matrix" in t.get("class", "")]
    wrong = sum(map(sum, found.confusion)) - sum(found.confusion[i][i] for i in range(35))
    assert wrong > 0
    pair = found.confused[0]
    assert pair.images == max(n for i, row in enumerate(found.confusion) for j, n in enumerate(row) if i != j)
    assert pair.share == pytest.approx(pair.images / 3)
    assert f"kind {pair.true} → kind {pair.predicted}" in page.words
    assert len({sample.true for sample in found.samples}) == 10


def test_no_mistakes_and_one_epoch(tmp_path):
    images = some_images("ab")
    run = make_run(tmp_path / "run", images, rows=1)
    images = dataclasses.replace(images, test=data.ImageSet(images.test.images, answers_of(run, images)))
    found = report.build_report(run, images)
    assert found.mistakes == found.confused == ()
    assert found.headline.counted_accuracy == 1
    words = Page(report.render_report(found)).words
    assert "every test image is answered right" in words
    assert "While it learned" not in words, "a curve of one point is none"


def test_the_settings_of_a_report_are_those_that_had_a_part(tmp_path):
    def listed(size=160, **given):
        recipe = dataclasses.asdict(TrainConfig(**given).resolve(images=660, image_size=size, flip=True, shift=2))
        return settings.used_settings({**recipe, "narrowed_from": "runs/one"}, size)

    frozen = listed(model="timm:resnet18", pretrained=True, freeze=True, device="cpu")
    assert "pretrained" not in listed(model="timm:resnet18", weights="w.pth", freeze=True)
    assert set(frozen) == {
        *("recipe", "model", "pretrained", "freeze", "label_smoothing", "flip", "seed", "device", "precision"),
        "narrowed_from",
    }
    tuned = listed(model="timm:resnet18", pretrained=True)
    assert {"body_rate", "batch_size", "optimizer", "augment"} <= tuned.keys()
    assert not {"momentum", "last_activation", "normalisation", "shift", "patience"} & tuned.keys()
    own = listed(size=32, validation=0.1, patience=3)
    assert {"momentum", "last_activation", "normalisation", "shift", "patience", "flip"} <= own.keys()
    assert not {"flip", "shift"} & listed(size=32, augment="none").keys()
    images = some_images("ab")
    info = {"name": images.name, "train_images": 5, "test_images": len(images.test), "skipped": []}
    run = make_run(tmp_path / "run", images, rows=1, **info)
    config = json.loads((run / "config.json").read_text())
    config["recipe"] = dataclasses.asdict(
        TrainConfig(recipe="finetune", freeze=True).resolve(images=5, image_size=8, flip=False, shift=1)
    )
    (run / "config.json").write_text(json.dumps(config))
    words = Page(report.render_report(report.build_report(run, images))).words
    assert "the class layer alone" in words
    assert "label smoothing" in words
    assert not any(name in words for name in ("learning rate", "momentum", "batch size", "While it learned"))


def test_an_interrupted_training_says_so(tmp_path):
    images = some_images("ab")
    found = report.build_report(make_run(tmp_path / "run", images), images)
    assert not found.finished
    assert found.headline.accuracy == found.headline.counted_accuracy
    assert found.headline.minutes == 1
    assert "after epoch 2 of 9" in Page(report.render_report(found)).words


def test_a_run_without_metrics_has_no_curves(tmp_path):
    images = some_images("ab")
    found = report.build_report(make_run(tmp_path / "run", images, rows=0), images)
    assert found.curves == ()
    page = Page(report.render_report(found))
    assert "While it learned" not in page.words
    assert len(page.all("svg")) == 1  # reliability


@pytest.mark.parametrize("line", ["1,x,0,1,0,1", "1,2", "1,2,3,4,5,6,7"])
def test_damaged_metrics_are_named(tmp_path, line):
    images = some_images("ab")
    run = make_run(tmp_path / "run", images)
    with (run / "metrics.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"metrics\.csv is damaged"):
        report.build_report(run, images)


def test_a_long_table_of_layers_is_folded(tmp_path):
    images = some_images("ab", size=32, channels=3)
    for name, model, is_folded in (("short", None, False), ("long", models.googlenet(2), True)):
        run = make_run(tmp_path / name, some_images("ab") if model is None else images, model)
        found = report.build_report(run, some_images("ab") if model is None else images)
        assert (f"All {len(found.cost.layers)} layers" in Page(report.render_report(found)).words) == is_folded


def test_the_maps_of_a_googlenet_are_shown(tmp_path):
    images = some_images("ab", channels=3, size=32, test=6)
    run = make_run(tmp_path / "run", images, models.googlenet(2))
    found = report.build_report(run, images)
    assert found.samples
    expected = nin.load(run).confidence_maps(torch.from_numpy(found.samples[0].pixels))[0]
    for shown in found.samples[0].maps:
        torch.testing.assert_close(torch.from_numpy(shown.values), expected[shown.label], rtol=1e-4, atol=1e-4)
    page = Page(report.render_report(found))
    assert "makes no class maps" not in page.words
    assert_harmless(page)


def test_a_network_without_maps_shows_its_images(tmp_path):
    images = some_images("ab", test=6)
    found = report.build_report(make_run(tmp_path / "run", images), images)
    bare = tuple(dataclasses.replace(sample, maps=()) for sample in found.samples)
    page = Page(report.render_report(dataclasses.replace(found, samples=bare)))
    assert "makes no class maps" in page.words
    assert_harmless(page)


def test_images_are_loaded_again_by_name(tmp_path):
    images = data.load("digits")
    run = make_run(tmp_path / "run", images)
    assert report.build_report(run).to_dict() == report.build_report(run, images).to_dict()


def test_the_wrong_images_are_refused(tmp_path):
    images = some_images("ab")
    run = make_run(tmp_path / "run", images)
    with pytest.raises(UserError, match=r"its classes are \['a', 'b'\]"):
        report.build_report(run, some_images("ac"))
    with pytest.raises(UserError, match="number of test images is 40"):
        report.build_report(run, some_images("ab", test=30))
    with pytest.raises(UserError, match="does not record where its images"):
        report.build_report(run)


def test_overlay_is_warm_for_cool_against_and_grey_at_zero():
    pixels = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    values = torch.zeros(3, 3)
    values[0, 0], values[2, 2] = 2.0, -2.0
    picture = np.asarray(heatmaps.overlay(pixels, values, limit=2.0, size=96), dtype=int)
    assert picture.shape == (96, 96, 3)
    red, _, blue = picture[2, 2]
    assert red > blue + 100
    red, _, blue = picture[-3, -3]
    assert blue > red + 100
    assert np.ptp(picture[3, -3]) == 0
    half = np.asarray(heatmaps.overlay(pixels, values / 2, limit=2.0, size=96), dtype=int)
    assert np.ptp(half[2, 2]) < np.ptp(picture[2, 2])
    swapped = np.asarray(heatmaps.overlay(pixels, -values, limit=2.0, size=96), dtype=int)
    np.testing.assert_array_equal(swapped, picture[::-1, ::-1])


@pytest.mark.parametrize(
    ("pixels", "values", "limit", "words"),
    [
        ((1, 8, 9), (2, 2), 1.0, "pixels must have shape"),
        ((2, 8, 8), (2, 2), 1.0, "pixels must have shape"),
        ((1, 8, 8), (1, 2, 2), 1.0, "values must have shape"),
        ((1, 8, 8), (2, 2), 0.0, "limit must be above 0, got 0.0"),
        ((1, 8, 8), (2, 2), math.nan, "limit must be above 0, got nan"),
    ],
)
def test_overlay_says_what_it_expected(pixels, values, limit, words):
    with pytest.raises(ValueError, match=words):
        heatmaps.overlay(torch.zeros(pixels, dtype=torch.uint8), torch.zeros(values), limit=limit, size=64)


def test_the_image_grid_has_a_row_for_each_image():
    panel = image_grid.MapPanel("a name that is much too long for its panel\n", torch.randn(4, 4))
    row = image_grid.ImageRow("$x$", torch.zeros(1, 8, 8, dtype=torch.uint8), [panel, panel])
    photo = image_grid.ImageRow("photo", torch.zeros(3, 80, 80, dtype=torch.uint8), [])
    one, two = image_grid.draw_image_grid([row], size=96), image_grid.draw_image_grid([row, photo], size=96)
    assert two.width == one.width
    assert two.height > one.height + 96
    assert one.getpixel((0, 0)) == (255, 255, 255)
    assert image_grid.draw_image_grid([row], title="title", size=96).height > one.height
    with pytest.raises(ValueError, match="at least one image"):
        image_grid.draw_image_grid([])


def test_without_matplotlib_titles_are_in_ascii(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    panel = image_grid.MapPanel("Müll 98 % − a very long name of a class indeed", torch.ones(4, 4))
    row = image_grid.ImageRow("猫.jpg", torch.zeros(3, 80, 80, dtype=torch.uint8), [panel])
    assert (np.asarray(image_grid.draw_image_grid([row])) == 27).any()  # ink
    font = image_grid._font(12)
    assert image_grid._legible("猫 −1 …", font) == "? -1 ..."
    assert font.getlength(image_grid._fitting(panel.title, font, 60)) <= 60


def test_importing_the_report_is_cheap():
    for path in pathlib.Path(report.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {name.name for name in node.names} | {getattr(node, "module", None)}
                assert not imported & {"matplotlib", "jinja2", "sklearn"}, path
