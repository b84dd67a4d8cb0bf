"""The figures of a classifier, against scikit-learn's and against what they are defined as."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

import nin
from nin import checkpoint, data, report, training
from nin.config import TrainConfig
from nin.errors import UserError
from nin.inference import metrics


def answers(classes=7, images=400, seed=0):
    """Scores that are right about half the time, of classes of unequal size; the last one has no images."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([1.0 / (i + 1) for i in range(classes - 1)] + [0.0])
    labels = torch.multinomial(weights, images, replacement=True, generator=generator)
    return torch.randn(images, classes, generator=generator) + 2 * F.one_hot(labels, classes), labels


def test_figures_are_those_of_scikit_learn():
    scores, labels = answers()
    predicted = scores.argmax(1)
    assert (predicted == 6).any(), "a class that has no images is answered"
    figures = metrics.epoch_figures(scores, labels)
    assert figures["accuracy"] == sklearn_metrics.accuracy_score(labels.numpy(), predicted.numpy())
    told = labels.numpy(), predicted.numpy()  # scikit-learn 1.6 takes no tensors
    seen = [i for i in range(7) if (labels == i).any()]
    recalls = sklearn_metrics.recall_score(*told, labels=seen, average=None)
    assert figures["balanced_accuracy"] == pytest.approx(recalls.mean())
    assert figures["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(*told, average="macro"))
    loss = sklearn_metrics.log_loss(told[0], scores.double().softmax(1).numpy(), labels=range(7))
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    tested = metrics.part_figures("test", scores, labels)
    ranks = (scores > scores.gather(1, labels[:, None])).sum(1)
    assert tested["test_top5_accuracy"] == pytest.approx((ranks < 5).double().mean().item())
    assert "test_top5_accuracy" not in metrics.part_figures("test", scores[:, :5], labels.clamp(max=4))


def test_details_of_each_class_and_the_counts_of_confusions():
    scores, labels = answers()
    names = [f"class {i}" for i in range(7)]
    details = metrics.test_details(scores, labels, names)
    expected = sklearn_metrics.confusion_matrix(labels, scores.argmax(1), labels=range(7))
    assert details["test_confusion"] == expected.tolist()
    for i, row in enumerate(details["test_classes"]):
        assert row["class"] == names[i]
        assert row["images"] == expected[i].sum()
        assert row["recall"] == pytest.approx(expected[i, i] / max(1, expected[i].sum()))
        assert row["precision"] == pytest.approx(expected[i, i] / max(1, expected[:, i].sum()))
    assert json.loads(json.dumps(details)) == details
    many = metrics.test_details(torch.randn(20, 101), torch.arange(20), [str(i) for i in range(101)])
    assert "test_confusion" not in many


def test_one_image_and_one_class_of_two_have_figures():
    figures = metrics.part_figures("test", torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    assert figures["test_accuracy"] == figures["test_balanced_accuracy"] == figures["test_macro_f1"] == 1
    assert figures["test_calibration_error"] == pytest.approx(1 - torch.tensor([2.0, 0.0]).softmax(0)[0].item())


def test_reliability_is_the_curve_of_scikit_learn_and_its_error_by_hand():
    scores, labels = answers(images=3000)
    probabilities = scores.softmax(1)
    bins = metrics.reliability(probabilities, labels, bins=10)
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).numpy()
    fraction, mean = calibration_curve(right, confidence.numpy(), n_bins=10)
    assert np.allclose([b.accuracy for b in bins], fraction)
    assert np.allclose([b.confidence for b in bins], mean)
    assert sum(b.images for b in bins) == 3000
    edges = np.linspace(0, 1, 11)
    by_hand = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence.numpy() > low) & (confidence.numpy() <= high)
        if inside.any():
            by_hand += inside.mean() * abs(right[inside].mean() - confidence.numpy()[inside].mean())
    assert metrics.calibration_error(bins) == pytest.approx(by_hand, rel=1e-6)


def test_temperature_is_where_the_loss_is_lowest():
    # labels drawn by the softmax of scores that are then made too sure by a factor of 3
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator).squeeze(1)
    temperature = metrics.fit_temperature(3 * honest, labels)
    assert temperature == pytest.approx(3, rel=0.05)
    losses = [F.cross_entropy(3 * honest.double() / t, labels).item() for t in (0.99, 1.01)]
    assert temperature > 1
    around = [F.cross_entropy(3 * honest.double() / (temperature * t), labels).item() for t in (0.98, 1, 1.02)]
    assert around[1] < min(around[0], around[2]) < min(losses)
    before, after = (
        metrics.part_figures("test", 3 * honest, labels, temperature=temperature)[name]
        for name in ("test_calibration_error", "test_calibrated_calibration_error")
    )
    assert after < 0.02 < 0.1 < before


def test_temperature_of_few_images_stays_in_reason():
    scores = 5 * F.one_hot(torch.arange(3), 3).float()
    all_right = metrics.fit_temperature(scores, torch.arange(3))
    assert 0.5 < all_right < 20, "without the image that counts as one more it would be 0"
    low, high = metrics.TEMPERATURE_RANGE
    assert metrics.fit_temperature(scores, torch.tensor([1, 2, 0])) == pytest.approx(high)
    assert low < metrics.fit_temperature(100 * scores, torch.arange(3)) <= high
    assert metrics.fit_temperature(torch.zeros(3, 3), torch.arange(3)) > 0


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A run with a validation part."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    images = data.load("digits")
    config = TrainConfig(epochs=2, batch_size=64, threads=1, precision="fp32", validation=0.2, patience=5)
    return training.train(images, config, out=folder), images


def test_a_run_has_its_figures_and_its_temperature(validated):
    result, images = validated
    r = checkpoint.load_info(result.out).result
    assert r["validation_images"] == round(0.2 * len(images.train))
    assert r["test_images"] == sum(row["images"] for row in r["test_classes"]) == len(images.test)
    assert sum(map(sum, r["test_confusion"])) == sum(b["images"] for b in r["test_reliability"]) == len(images.test)
    # label smoothing makes it less sure than it could be
    assert 0 < r["temperature"] < 1
    assert r["test_calibrated_loss"] < r["test_loss"]


def test_calibrated_probabilities_are_asked_for(validated, run):
    result, images = validated
    plain, calibrated = nin.load(result.out), nin.load(result.out, calibrated=True)
    pixels = images.test.images[:50]
    t = result.info.result["temperature"]
    expected = (plain.scores(pixels) / t).softmax(1)
    got = calibrated.predict(pixels)
    assert torch.allclose(torch.tensor([p.probabilities for p in got]), expected, atol=1e-6)
    assert [p.label for p in got] == [p.label for p in plain.predict(pixels)]
    assert torch.equal(plain.scores(pixels), calibrated.scores(pixels)), "scores are those of the network"
    with pytest.raises(UserError, match="need a temperature"):
        nin.load(run, calibrated=True)


def test_predict_calibrated_writes_a_table(validated, tmp_path):
    from PIL import Image

    from nin.cli import app

    result, images = validated
    Image.fromarray(images.test.images[0, 0].numpy()).save(tmp_path / "0.png")
    rows = {}
    for name, options in (("plain", []), ("calibrated", ["--calibrated"])):
        table = tmp_path / f"{name}.csv"
        app.main(["predict", str(result.out), str(tmp_path / "0.png"), "--csv", str(table), *options])
        header, row = (line.split(",") for line in table.read_text().splitlines())
        rows[name] = dict(zip(header, row, strict=True))
    assert rows["plain"]["label"] == rows["calibrated"]["label"]
    (expected,) = nin.load(result.out, calibrated=True).predict(str(tmp_path / "0.png"))
    assert float(rows["calibrated"]["confidence"]) == pytest.approx(expected.confidence, abs=1e-5)
    assert float(rows["plain"]["confidence"]) < float(rows["calibrated"]["confidence"])


def test_the_report_shows_calibration_with_and_without_temperature(validated, run):
    result, _ = validated
    made = report.build_report(result.out)
    r = result.info.result
    assert [c.temperature for c in made.calibration] == [1, r["temperature"]]
    assert made.calibration[0].error == pytest.approx(r["test_calibration_error"], abs=1e-4)
    assert made.calibration[1].error == pytest.approx(r["test_calibrated_calibration_error"], abs=1e-4)
    assert made.headline.macro_f1 == pytest.approx(r["test_macro_f1"])
    assert [c.f1 for c in made.per_class] == pytest.approx([row["f1"] for row in r["test_classes"]])
    page = report.render_report(made)
    assert page.count('class="diagonal"') == 2
    assert "validation" in page
    assert f"those of epoch {r['best_epoch']}, the best" in page
    plain = report.render_report(report.build_report(run))
    assert plain.count('class="diagonal"') == 1
    assert dataclasses.asdict(made.calibration[0])["bins"]
