"""Fine-tuning: the fitted class layer, frozen statistics, soft targets, resuming; what "auto" finds."""

import dataclasses
import math
import types

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from nin import checkpoint, data, epoch_metrics, models, optim, report, training
from nin.config import TrainConfig
from nin.errors import UserError
from nin.models.input_config import InputConfig
from nin.training import batch_size_test, head_fit
from nin.training.learning_rate_test import LearningRateTest, find_learning_rate
from nin.training.starting_point import StartingPoint
from nin.training.step import TrainStep, make_model
from support.stopping import stop_after

MOBILENET = "timm:mobilenetv3_small_050"
TUNE = TrainConfig(model=MOBILENET, recipe="finetune", epochs=2, batch_size=16, threads=1, precision="fp32", flip=True)
CPU = torch.device("cpu")


def few_digits(count, *, channels=3, scale=4):
    """Digits as larger images, every class among them."""
    digits = data.load("digits")

    def part(images):
        rows = torch.arange(count) * (len(images) // count)
        pixels = images.fetch(rows).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        return data.ImageSet(pixels.repeat(1, channels, 1, 1), images.labels[rows])

    shape = {"channels": channels, "size": 8 * scale, "mean": digits.mean * channels, "std": digits.std * channels}
    return dataclasses.replace(digits, train=part(digits.train), test=part(digits.test), **shape)


@pytest.fixture(scope="module")
def images():
    return few_digits(64)


def resolve(config, images):
    return config.resolve(images=len(images.train), image_size=images.size, flip=True, shift=0)


def start(config, images):
    """Return a training step as `nin.train` makes it."""
    resolved = resolve(config, images)
    sizes = {"channels": images.channels, "classes": len(images.classes), "size": images.size}
    return TrainStep(lambda: make_model(resolved, **sizes), resolved)


def fit(step, images, **options):
    return head_fit.fit_class_layer(step.model, images, step.config, device=CPU, dtype=torch.float32, **options)


def scores_of(model, images, rows=slice(None)):
    x = data.to_float(images.train.fetch(torch.arange(len(images.train))[rows]), images.mean, images.std)
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("flip", [False, True])
def test_the_class_layer_is_that_of_scikit_learns_logistic_regression(images, flip):
    step = start(dataclasses.replace(TUNE, flip=flip, label_smoothing=1e-9), images)
    x = data.to_float(images.train.fetch(torch.arange(64)), images.mean, images.std)
    views = [head_fit.class_layer_input(step.model.eval(), v) for v in ([x, x.flip(3)] if flip else [x])]
    features = torch.stack(views, 1).flatten(0, 1).double()
    labels = images.train.labels.repeat_interleave(len(views))
    standardised = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-6)
    strength = head_fit.PRIOR_DEVIATION**2 / features.shape[1]
    oracle = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(standardised.numpy(), labels.numpy())
    result = fit(step, images)
    expected = torch.from_numpy(oracle.predict_log_proba(standardised.numpy()))
    got = scores_of(step.model, images).log_softmax(1).double()
    assert torch.allclose(got, expected[:: len(views)], atol=0.02)
    assert result.images == len(labels)
    assert result.loss == pytest.approx(F.nll_loss(expected, labels).item(), abs=2e-3)


@pytest.mark.parametrize(
    ("name", "channels", "scale"),
    [
        ("nin_digits", 1, 1),
        ("googlenet", 3, 8),
        ("torchvision:squeezenet1_1", 3, 4),  # its class layer has a ReLU before the pooling
        ("torchvision:resnet18", 3, 4),
        ("torchvision:mobilenet_v2", 3, 4),
    ],
)
def test_a_class_layer_is_fitted_wherever_it_stands_and_nothing_else_changes(name, channels, scale):
    images = few_digits(40, channels=channels, scale=scale)
    step = start(TrainConfig(model=name, recipe="finetune", flip=False, threads=1), images)
    before = {key: value.clone() for key, value in step.model.state_dict().items()}
    untrained = F.cross_entropy(scores_of(step.model, images), images.train.labels).item()
    result = fit(step, images)
    scores = scores_of(step.model, images)
    assert result.loss == pytest.approx(F.cross_entropy(scores, images.train.labels).item(), rel=1e-3)
    assert result.hits == (scores.argmax(1) == images.train.labels).sum()
    assert result.loss < 0.95 * untrained
    changed = {key for key, value in step.model.state_dict().items() if not torch.equal(value, before[key])}
    layer = models.class_layer_name(step.model)
    assert changed == {key for key in before if key.startswith(f"{layer}.")}


def test_class_weights_count_in_the_fit(images):
    plain, weighted = (start(dataclasses.replace(TUNE, flip=False), images) for _ in range(2))
    fit(plain, images)
    weights = torch.ones(10)
    weights[3] = 30.0
    fit(weighted, images, class_weights=weights)
    threes = images.train.labels == 3
    losses = [
        F.cross_entropy(scores_of(s.model, images)[threes], images.train.labels[threes]) for s in (plain, weighted)
    ]
    assert losses[1] < losses[0] / 2


def test_more_features_than_are_held_are_a_part_and_it_says_so(images, monkeypatch):
    step = start(dataclasses.replace(TUNE, flip=False), images)
    width = head_fit.class_layer_input(step.model, torch.zeros(1, 3, 32, 32)).nbytes
    monkeypatch.setattr(head_fit, "MAX_FEATURE_BYTES", 32 * width)
    with pytest.warns(UserWarning, match="the class layer is fitted to 32 of the 64 training images"):
        result = fit(step, images)
    assert result.images == 32


def test_freeze_trains_the_class_layer_and_is_one_epoch(images, tmp_path):
    result = training.train(images, dataclasses.replace(TUNE, epochs=None, freeze=True), out=tmp_path / "run")
    fresh = start(TUNE, images).model.state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, fresh[name]) != name.startswith("head."), name
    (row,) = epoch_metrics.read_csv(tmp_path / "run" / "metrics.csv")
    assert (row["epoch"], row["learning_rate"]) == (1, 0)
    assert row["train_accuracy"] > 0.8
    loaded, info = checkpoint.load_model(tmp_path / "run")
    assert info.recipe["freeze"]
    assert torch.equal(loaded(torch.ones(1, 3, 32, 32)), result.model(torch.ones(1, 3, 32, 32)))


def test_freeze_stops_at_once_and_begins_again(images, tmp_path):
    config = dataclasses.replace(TUNE, epochs=None, freeze=True)
    with pytest.raises(KeyboardInterrupt):
        training.train(images, config, out=tmp_path / "run", keeping=training.CheckpointOptions(stop=lambda: True))
    assert not (tmp_path / "run" / checkpoint.MODEL_FILE).exists()
    keeping = training.CheckpointOptions(resume=True)
    whole = training.train(images, config, out=tmp_path / "run", keeping=keeping)
    assert whole.metrics[0]["train_accuracy"] > 0.8
    # asked while the first epoch, the only one, is tested
    out = tmp_path / "later"
    late = training.CheckpointOptions(stop=(out / checkpoint.STATE_FILE).exists)
    with pytest.raises(KeyboardInterrupt):
        training.train(images, config, out=out, keeping=late)
    assert checkpoint.load_info(out).result == {}
    resumed = training.train(images, config, out=out, keeping=keeping)
    assert resumed.info.result["test_loss"] == whole.info.result["test_loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"freeze": True},
            "freeze trains the class layer on what weights have learned: give --pretrained or --weights",
        ),
        ({"freeze": True, "recipe": "speed"}, "give --pretrained or --weights"),
        ({"freeze": True, "recipe": "speed", "weights": "x"}, "freeze goes with the recipe finetune, got speed"),
        ({"freeze": True, "weights": "x", "balance": "sampling"}, 'nothing to sample: give balance="weights"'),
        ({"body_rate": 2.0}, "body_rate must be above 0 and at most 1"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adamw, muon"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_weights_make_the_recipe_that_for_fine_tuning():
    fine = TrainConfig(model="timm:resnet18", pretrained=True).resolve(images=660, image_size=224, flip=True, shift=9)
    assert (fine.recipe, fine.optimizer, fine.augment, fine.batch_size) == ("finetune", "adamw", "strong", 32)
    assert TrainConfig().resolve(images=660, image_size=224, flip=True, shift=9).recipe == "default"
    given = TrainConfig(weights="x", recipe="default").resolve(images=660, image_size=224, flip=True, shift=9)
    assert (given.recipe, given.optimizer, given.augment) == ("default", "muon", "strong")
    light = TrainConfig(weights="x", augment="light").resolve(images=660, image_size=224, flip=True, shift=9)
    assert (light.recipe, light.augment) == ("finetune", "light")


def test_a_few_steps_are_small_and_keep_the_moments_of_the_weights():
    """After four steps at the full rate, a network was at chance where its class layer alone had 71 %."""

    def resolve(images=72, recipe="finetune", **settings):
        return TrainConfig(recipe=recipe, **settings).resolve(images=images, image_size=224, flip=True, shift=9)

    few = resolve(epochs=2)
    assert (few.learning_rate, few.batch_norm) == (pytest.approx(0.002 * 4 / 100), "frozen")
    given = resolve(epochs=2, learning_rate=0.002, batch_norm="train")
    assert (given.learning_rate, given.batch_norm) == (0.002, "train")
    assert resolve(epochs=1, images=9).learning_rate == pytest.approx(0.002 / 100)  # a batch that is not full
    for many in (resolve(epochs=50), resolve(epochs=25, batch_size=16), resolve(images=660)):
        assert (many.learning_rate, many.batch_norm) == (0.002, "train")
    assert resolve(recipe="default", epochs=2).learning_rate == 0.0088
    assert resolve(epochs=2, batch_size="auto").learning_rate == 0.002  # the steps are not known yet


def test_images_are_squashed_where_a_library_crops_and_otherwise_as_the_weights_say(tmp_path):
    resize = data.ResizeOptions("crop", "bilinear", 0.875)
    config = InputConfig(64, 3, (0.5,) * 3, (0.5,) * 3, resize=resize)
    own = StartingPoint(TrainConfig(), config)
    assert own.load_options(tmp_path, size=None)["resize"] == data.ResizeOptions("squash", "bilinear")
    assert own.load_options(tmp_path, size=None, resize="crop")["resize"] == config.resize
    letterbox = dataclasses.replace(config, resize=data.ResizeOptions("letterbox"))
    assert StartingPoint(TrainConfig(), letterbox).load_options(tmp_path, size=None)["resize"].mode == "letterbox"
    run = dataclasses.replace(own, run=types.SimpleNamespace(data={}))
    assert run.load_options(tmp_path, size=None)["resize"] == config.resize


def test_the_class_layer_learns_faster_and_norms_and_biases_do_not_decay(images):
    step = start(TUNE, images)
    names = {id(p): name for name, p in step.model.named_parameters()}
    seen = {}
    step.optimizer.set_hyperparameters(learning_rate=0.5, ema_decay=0.9)
    for group in step.optimizer.optimizer.param_groups:
        for p in group["params"]:
            seen[names[id(p)]] = group["lr"], group["weight_decay"]
            assert (group["weight_decay"] == 0) == (p.dim() == 1)
    assert seen.keys() == set(names.values())
    rates = {name: rate for name, (rate, _) in seen.items()}
    assert rates["head.weight"] == rates["head.bias"] == 0.5
    assert {rate for name, rate in rates.items() if not name.startswith("head.")} == {0.5 * step.config.body_rate}


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("kind", ["frozen", "train"])
def test_batch_norm_keeps_its_statistics_or_the_average_carries_them(images, kind):
    step = start(dataclasses.replace(TUNE, batch_norm=kind), images)
    before = [(m.running_mean.clone(), m.weight.detach().clone()) for m in norms_of(step.model)]
    x = data.to_float(images.train.fetch(torch.arange(16)), images.mean, images.std)
    for number in range(2):
        step(x, images.train.labels[:16], number, 10)
    for (mean, scale), own, average in zip(before, norms_of(step.model), norms_of(step.ema_model), strict=True):
        assert torch.equal(own.running_mean, mean) == (kind == "frozen")
        assert torch.equal(average.running_mean, mean) == (kind == "frozen")
        assert not torch.equal(own.weight, scale)


@pytest.mark.parametrize("weighted", [False, True])
def test_soft_targets_are_the_labels_where_they_are_certain(images, weighted):
    x = data.to_float(images.train.fetch(torch.arange(16)), images.mean, images.std)
    labels = images.train.labels[:16]
    soft = F.one_hot(labels, 10).float()
    losses, states = [], []
    for target in (labels, soft):
        step = start(TUNE, images)
        step.class_weights = torch.linspace(0.5, 1.5, 10) if weighted else None
        losses.append(step(x, target, 0, 10)[0].item())
        states.append(step.model.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, tensor in states[0].items():
        # AdamW's first step is as long whatever the gradient, so its sign counts where it is nearly zero
        assert torch.allclose(tensor, states[1][name], atol=2.1 * resolve(TUNE, images).learning_rate), name
    # half and half is the mean of both
    other = soft.roll(1, 0)
    mixed, first, second = (start(TUNE, images)(x, t, 0, 10)[0].item() for t in ((soft + other) / 2, soft, other))
    assert mixed == pytest.approx((first + second) / 2, rel=1e-5)


def assert_resumes(images, config, tmp_path, stop_at):
    whole = training.train(images, config, out=tmp_path / "whole")
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        training.train(images, config, out=out, keeping=training.CheckpointOptions(stop=stop_after(stop_at)))
    training.train(images, config, out=out, keeping=training.CheckpointOptions(resume=True))
    for name in (checkpoint.MODEL_FILE, epoch_metrics.METRICS_FILE):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    return whole


@pytest.mark.parametrize("stop_at", [1, 2, 5, 7])  # the first is while the class layer is fitted
def test_a_resumed_fine_tuning_gives_the_same_bits(images, tmp_path, stop_at):
    assert_resumes(images, dataclasses.replace(TUNE, label_smoothing=0.2, dropout=0.1), tmp_path, stop_at)


def test_a_killed_range_test_begins_again_and_what_it_found_is_kept(images, tmp_path, monkeypatch):
    found = []

    def find(train_step, *others, **options):
        found.append(find_learning_rate(train_step, *others, **options))
        return found[-1]

    monkeypatch.setattr(training.loop, "find_learning_rate", find)
    config = dataclasses.replace(TUNE, learning_rate="auto")
    out = tmp_path / "run"
    third = stop_after(3)
    for stop, count in ((stop_after(3), 0), (lambda: bool(found) and third(), 1)):  # in the range test, and after it
        with pytest.raises(KeyboardInterrupt):
            training.train(images, config, out=out, keeping=training.CheckpointOptions(resume=True, stop=stop))
        assert len(found) == count
    result = training.train(images, config, out=out, keeping=training.CheckpointOptions(resume=True))
    assert len(found) == 1
    assert result.info.recipe["learning_rate"] == found[0].learning_rate
    rows = epoch_metrics.read_csv(out / epoch_metrics.LEARNING_RATE_FILE)
    assert [row["learning_rate"] for row in rows] == pytest.approx(found[0].rates, rel=1e-5)
    assert [row["loss"] for row in rows] == pytest.approx(found[0].losses, rel=1e-5)
    page = report.write_report(out, images).read_text(encoding="utf-8")
    assert "range test of the learning rate" in page
    # the same bits as with the number that it found
    given = training.train(images, dataclasses.replace(config, learning_rate=found[0].learning_rate))
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, given.model.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_range_test_leaves_no_trace(images, optimizer):
    step = start(dataclasses.replace(TUNE, optimizer=optimizer, batch_norm="train"), images)
    x = data.to_float(images.train.fetch(torch.arange(16)), images.mean, images.std)
    labels = images.train.labels[:16]
    step(x, labels, 0, 10)
    before = {name: tensor.clone() for name, tensor in step.optimizer.state_dict().items()}
    shown = []
    found = find_learning_rate(step, step.config, iter([(x, labels)] * 200), lambda *figures: shown.append(figures))
    after = step.optimizer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(shown) == len(found.rates) == len(found.losses)
    assert 0 < found.learning_rate < found.rates[-1]


def test_the_rate_is_a_tenth_of_the_one_of_the_lowest_smoothed_loss():
    rates = [10 ** (-4 + number / 10) for number in range(50)]
    # falls until 0.1, then rises: the running mean is lowest behind it
    losses = [2.0 - 0.03 * number if rate < 0.1 else 1.1 + 0.5 * (number - 30) for number, rate in enumerate(rates)]
    found = LearningRateTest.of(rates, losses)
    assert 0.01 <= found.learning_rate <= 0.02
    assert found.losses[0] == losses[0]
    assert LearningRateTest.of(rates[:3], [3.0, 2.0, math.nan]).learning_rate == float(f"{rates[1] / 10:.2g}")
    with pytest.raises(UserError, match="no finite number at any rate"):
        LearningRateTest.of(rates[:1], [math.inf])


def test_batch_size_auto_is_for_a_gpu(images):
    with pytest.raises(UserError, match="batch_size auto fills the memory of a GPU, and the device is cpu"):
        training.train(images, TrainConfig(batch_size="auto", device="cpu"))


@pytest.mark.parametrize(("room", "count", "size"), [(40, 2000, 32), (1000, 2000, 64), (8, 60, 8), (7, 2000, None)])
def test_batch_size_auto_is_the_largest_that_fits_and_leaves_enough_steps(monkeypatch, room, count, size):
    digits = data.load("digits")
    train = digits.train.select(torch.arange(count) % len(digits.train))
    digits = dataclasses.replace(digits, train=train)
    tried = []

    def step_at(self, x, labels, **options):
        tried.append(len(x))
        if len(x) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x, labels

    monkeypatch.setattr(TrainStep, "step_at", step_at)
    config = TrainConfig(batch_size="auto", device="cpu").resolve(images=count, image_size=8, flip=False, shift=1)
    build = lambda: make_model(config, channels=1, classes=10, size=8)  # noqa: E731
    if size is None:
        with pytest.raises(UserError, match="does not fit into the memory of cpu with 8 images"):
            batch_size_test.find_batch_size(config, digits, build, CPU)
    else:
        assert batch_size_test.find_batch_size(config, digits, build, CPU) == size


def test_optimizers_have_slower_groups():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    options = {"learning_rate": 0.1, "weight_decay": 0.3, "slower": model[0].parameters(), "slower_rate": 0.25}
    for optimizer in (
        optim.sgd(model, momentum=0.9, **options),
        optim.adamw(model, betas=(0.9, 0.99), **{**options, "slower": model[0].parameters()}),
    ):
        factors = {id(p): (g["lr_factor"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert [factors[id(p)] for p in model.parameters()] == [(0.25, 0.3), (0.25, 0), (1, 0.3), (1, 0)]
