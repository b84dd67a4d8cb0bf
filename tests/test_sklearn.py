"""NiNClassifier: scikit-learn's own checks, the perceptron that it is on tables, images, and pickles without code."""

import pickle
import pickletools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from nin import NiNClassifier, data
from nin.data import image_augmentation, resizing
from nin.errors import UserError

SMALL = {"hidden_channels": (16,), "epochs": 25, "batch_size": 16, "random_state": 0}


@parametrize_with_checks([NiNClassifier(**SMALL)])
def test_scikit_learn_checks(estimator, check):
    # None is excepted. Two skip themselves: without pandas, and the one for other array libraries (SCIPY_ARRAY_API).
    check(estimator)


@pytest.fixture(scope="module")
def table():
    return load_iris(return_X_y=True)


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    some = np.random.default_rng(0).permutation(len(labels))[:600]  # they lie in the order of those who wrote them
    return pixels.reshape(-1, 8, 8)[some] / 16, labels[some]


def perceptron_of(estimator):
    """Return PyTorch's own multilayer perceptron with the estimator's weights, in float64."""
    convs = estimator.train_step_.ema_model.blocks[0][0].convs
    layers = []
    for conv in convs:
        linear = nn.Linear(conv.in_channels, conv.out_channels)
        with torch.no_grad():
            linear.weight.copy_(conv.weight[:, :, 0, 0])
            linear.bias.copy_(conv.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def test_on_a_table_it_is_a_multilayer_perceptron(table):
    X, y = table
    estimator = NiNClassifier(hidden_channels=(16, 8), epochs=3, random_state=0).fit(X, y)
    for widths in (8, np.int64(8), [8], np.array([8])):
        one = NiNClassifier(hidden_channels=widths, epochs=np.int64(1), random_state=0).fit(X, y)
        assert one.train_step_.model.config.blocks[0].channels[0] == 8
    perceptron = perceptron_of(estimator)
    z = torch.from_numpy((X - X.mean(0)) / X.std(0))
    labels = torch.from_numpy(y)
    network = estimator.train_step_.ema_model.double().requires_grad_()
    scores, expected = network(z[:, :, None, None]), perceptron(z)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    # and it learns as one: the gradients are the same
    nn.functional.cross_entropy(scores, labels).backward()
    nn.functional.cross_entropy(expected, labels).backward()
    for conv, linear in zip(network.blocks[0][0].convs, perceptron[::2], strict=True):
        torch.testing.assert_close(conv.weight.grad[:, :, 0, 0], linear.weight.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(conv.bias.grad, linear.bias.grad, rtol=1e-10, atol=1e-12)


def test_probabilities_are_those_of_the_perceptron(table):
    X, y = table
    estimator = NiNClassifier(**SMALL).fit(X, y)
    z = torch.from_numpy((X - X.mean(0)) / X.std(0))
    expected = perceptron_of(estimator)(z).softmax(1).detach().numpy()
    np.testing.assert_allclose(estimator.predict_proba(X), expected, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [lambda x: x, lambda x: x[:, None], lambda x: x[..., None], lambda x: (x * 255).astype(np.uint8), lambda x: 40 * x],
    ids=["NHW", "NCHW", "NHWC", "uint8", "other units"],
)
def test_images_in_every_form(form, digits):
    images, labels = digits
    estimator = NiNClassifier(epochs=12, random_state=0).fit(form(images[:400]), labels[:400])
    assert estimator.sample_shape_ == (1, 8, 8)
    assert estimator.score(form(images[400:]), labels[400:]) > 0.9


def test_colour_images_channels_first_and_last_are_the_same(digits):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8), np.arange(40) % 2
    settings = {"model": "nin_digits", "epochs": 1, "random_state": 0}
    first = NiNClassifier(**settings).fit(images, labels)
    last = NiNClassifier(**settings).fit(images.transpose(0, 2, 3, 1), labels)
    np.testing.assert_array_equal(first.predict_proba(images), last.predict_proba(images.transpose(0, 2, 3, 1)))


def test_pipeline_and_grid_search(table):
    X, y = table
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    pipeline = make_pipeline(StandardScaler(), NiNClassifier(**SMALL))
    assert cross_val_score(pipeline, X, names, cv=3).mean() > 0.85
    search = GridSearchCV(NiNClassifier(**SMALL), {"hidden_channels": [(4,), (16,)], "epochs": [2, 25]}, cv=2)
    search.fit(X, names)
    assert search.best_params_["epochs"] == 25
    assert set(search.predict(X)) <= set(names)


def test_a_pickle_holds_plain_data_and_goes_on_learning(table):
    X, y = table
    estimator = NiNClassifier(**SMALL).partial_fit(X, y, classes=[0, 1, 2])
    text = pickle.dumps(estimator)
    loaded = {argument for opcode, argument, _ in pickletools.genops(text) if isinstance(argument, str)}
    assert not any(name.startswith("torch") for name in loaded), sorted(n for n in loaded if "torch" in n)
    again = pickle.loads(text)
    np.testing.assert_array_equal(again.predict_proba(X), estimator.predict_proba(X))
    # momentum, averages and the number of steps came along: the next steps are the same, bit for bit
    for _ in range(2):
        np.testing.assert_array_equal(
            again.partial_fit(X, y).predict_proba(X), estimator.partial_fit(X, y).predict_proba(X)
        )


def test_a_pickle_of_what_is_not_fitted():
    assert pickle.loads(pickle.dumps(NiNClassifier(epochs=7))).epochs == 7


def test_a_pickle_does_not_follow_set_params(table):
    X, y = table
    estimator = NiNClassifier(**SMALL).fit(X, y).set_params(hidden_channels=(3, 3))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(estimator)).predict(X), estimator.predict(X))


def test_partial_fit_learns(table):
    X, y = table
    order = np.random.default_rng(0).permutation(len(X))
    estimator = NiNClassifier(batch_size=10, learning_rate=0.05, random_state=0)
    for start in range(0, 30 * len(X), 50):
        some = np.take(order, range(start, start + 50), mode="wrap")
        estimator.partial_fit(X[some], y[some], classes=[0, 1, 2])
    assert estimator.n_steps_ == 450
    assert estimator.score(X, y) > 0.9


def test_the_same_seed_gives_the_same_numbers_and_leaves_torch_alone(digits):
    images, labels = digits
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    settings = {"epochs": 1, "flip": True, "random_state": 5}
    a, b = (NiNClassifier(**settings).fit(images[:64], labels[:64]).predict_proba(images[:9]) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    other = clone(NiNClassifier(**settings)).set_params(random_state=6).fit(images[:64], labels[:64])
    assert not np.array_equal(other.predict_proba(images[:9]), a)


def test_mistakes_are_named(table, digits):
    X, y = table
    images, labels = digits
    with pytest.raises(ValueError, match="classes must be given in the first call of partial_fit"):
        NiNClassifier().partial_fit(X, y)
    started = NiNClassifier(epochs=1).fit(X, y)
    with pytest.raises(ValueError, match="y must hold classes of"):
        started.partial_fit(X, y + 1)
    with pytest.raises(ValueError, match="classes must be those of the first call"):
        started.partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match=r"X must hold samples \(C, H, W\) of \(1, 8, 8\), got \(1, 7, 7\)"):
        NiNClassifier(epochs=1).fit(images[:20], labels[:20]).predict(np.zeros((2, 8, 7, 7))[:, :1].repeat(8, 1)[:, 0])
    with pytest.raises(ValueError, match="X must hold square images"):
        NiNClassifier().fit(images[:20, :6], labels[:20])
    for parameters, message in (
        ({"hidden_channels": "64"}, "hidden_channels must be a whole number, got '64'"),
        ({"hidden_channels": (64, 0)}, "hidden_channels must be at least 1, got 0"),
        ({"hidden_channels": 2.5}, "hidden_channels must be a whole number, got 2.5"),
        ({"hidden_channels": None}, "hidden_channels must be a whole number, got None"),
        ({"epochs": "5"}, "epochs must be a whole number, got '5'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": "0.1"}, "learning_rate must be a number, got '0.1'"),
        ({"weight_decay": -1}, "weight_decay must be at least 0 and finite, got -1"),
        ({"label_smoothing": 1}, "label_smoothing must be at least 0 and below 1, got 1"),
        ({"dropout": np.nan}, "dropout must be at least 0 and below 1, got nan"),
        ({"flip": "yes"}, "flip must be True or False, got 'yes'"),
        ({"shift": 0.5}, "shift must be a whole number, got 0.5"),
        ({"device": 0}, "device must be a name, got 0"),
        ({"precision": "half"}, "precision must be one of auto, bf16, fp32, got 'half'"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            NiNClassifier(**parameters).fit([[0.0, 1.0], [1.0, 0.0]], [0, 1])
    with pytest.raises(UserError, match=r"model is for images; a table takes hidden_channels, got model='nin_cifar'"):
        NiNClassifier(model="nin_cifar").fit(X, y)
    with pytest.raises(UserError, match="learning_rate must be above 0"):
        NiNClassifier(learning_rate=0).fit(X, y)
    with pytest.raises(ValueError, match=r"the loss became .*: learning_rate must be lower than 1e\+30"):
        NiNClassifier(learning_rate=1e30, epochs=5).fit(X, y)


def test_its_settings_are_cloned_and_searched():
    settings = {"augment": "strong", "mixup": 0.2, "cutmix": 1.0, "resize": "squash"}
    estimator = clone(NiNClassifier(**settings))
    assert settings.items() <= estimator.get_params().items()
    assert estimator.set_params(augment="none").augment == "none"
    assert clone(NiNClassifier(resize=data.ResizeOptions("letterbox"))).resize.mode == "letterbox"


@pytest.mark.parametrize("settings", [{"augment": "strong"}, {"mixup": 0.4, "flip": True}, {"cutmix": 1.0}])
def test_augmented_and_mixed_samples_are_learned_from(digits, settings):
    images, labels = (digits[0] * 255).astype(np.uint8), digits[1]
    options = {"epochs": 8, "batch_size": 16, "random_state": 0}
    first, plain = (NiNClassifier(**options, **more).fit(images[:160], labels[:160]) for more in (settings, {}))
    assert first.score(images[400:], labels[400:]) > 0.4
    assert not np.array_equal(first.predict_proba(images), plain.predict_proba(images))
    twice = clone(first).set_params(epochs=1)
    once, again = (clone(twice).fit(images[:64], labels[:64]).predict_proba(images[:9]) for _ in range(2))
    np.testing.assert_array_equal(once, again)


def test_photos_are_cropped_at_random_where_they_are_bytes(monkeypatch):
    crops, crop = [], image_augmentation.random_box
    monkeypatch.setattr(image_augmentation, "random_box", lambda *a: crops.append(a[:2]) or crop(*a))
    images = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)
    estimator = NiNClassifier(model="timm:mobilenetv3_small_050", epochs=1, random_state=0)
    estimator.fit(images, np.arange(8) % 2)
    assert crops == [(96, 96)] * 8
    clone(estimator).fit(images / 255, np.arange(8) % 2)
    clone(estimator).set_params(augment="none").fit(images, np.arange(8) % 2)
    assert len(crops) == 8


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "torchvision:squeezenet1_1"])
def test_a_network_of_another_package(name):
    rng = np.random.default_rng(0)
    labels = np.array(["dark", "bright"])[np.arange(24) % 2]
    images = rng.integers(0, 128, (24, 32, 32, 3)) + 127 * (np.arange(24) % 2)[:, None, None, None]
    estimator = NiNClassifier(model=name, epochs=2, batch_size=8, random_state=0).fit(images, labels)
    probabilities = estimator.predict_proba(images)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(again.predict_proba(images), probabilities)
    with pytest.raises(UserError, match="has no network 'nonesuch'"):
        NiNClassifier(model="timm:nonesuch").fit(images, labels)


@pytest.mark.parametrize("mode", ["crop", "squash", "letterbox"])
@pytest.mark.parametrize("form", ["NHW", "NHWC", "NCHW"])
def test_images_that_are_no_squares_become_some(mode, form):
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (12, 8, 12, 3), dtype=np.uint8)
    expected = np.stack([resizing.resize_to_square(Image.fromarray(p), 8, data.ResizeOptions(mode)) for p in photos])
    labels, options = np.arange(12) % 2, {"model": "nin_digits", "epochs": 1, "random_state": 0}
    shape = {"NHW": lambda x: x[..., 0], "NHWC": lambda x: x, "NCHW": lambda x: x.transpose(0, 3, 1, 2)}[form]
    estimator = NiNClassifier(resize=mode, **options).fit(shape(photos), labels)
    same = NiNClassifier(**options).fit(shape(expected), labels)
    np.testing.assert_array_equal(estimator.predict_proba(shape(photos)), same.predict_proba(shape(expected)))
    floats = clone(estimator).fit(shape(photos).astype(np.float64) * 2, labels)
    assert floats.sample_shape_ == estimator.sample_shape_
    with pytest.raises(ValueError, match="X must hold square images"):
        NiNClassifier(**options).fit(shape(photos), labels)


def test_mistakes_of_augmentation_are_named(table, digits):
    for settings, samples, message in (
        ({"augment": "heavy"}, digits, "augment must be one of none, light, strong, got 'heavy'"),
        ({"augment": "strong"}, digits, 'augment="strong" is for images of uint8, got torch.float32'),
        ({"augment": "none", "shift": 2}, digits, 'augment "none" changes no image'),
        ({"augment": "none", "flip": True}, digits, 'augment "none" changes no image'),
        ({"augment": "strong"}, table, 'augment="strong" and cutmix are for images'),
        ({"cutmix": 1}, table, "and cutmix are for images"),
        ({"mixup": -1}, table, "mixup must be at least 0 and finite, got -1"),
        ({"resize": "stretch"}, digits, "resize: mode must be one of crop, squash, letterbox, got 'stretch'"),
    ):
        with pytest.raises(UserError, match=message):
            NiNClassifier(epochs=1, **settings).fit(*samples)
    assert NiNClassifier(**SMALL, mixup=0.4).fit(*table).score(*table) > 0.85


@pytest.mark.parametrize("balance", ["sampling", "weights"])
def test_balance_finds_a_class_that_is_rare(balance):
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(0, 1, (570, 2)), rng.normal(1.2, 1, (30, 2))])
    y = np.repeat([0, 1], [570, 30])
    settings = {"hidden_channels": (8,), "epochs": 6, "random_state": 0}
    plain, balanced = (NiNClassifier(**settings, balance=value).fit(X, y) for value in (None, balance))
    assert (plain.predict(X[570:]) == 1).mean() < 0.4
    assert (balanced.predict(X[570:]) == 1).mean() > 0.55
    again = pickle.loads(pickle.dumps(balanced))
    np.testing.assert_array_equal(again.predict_proba(X), balanced.predict_proba(X))
    with pytest.raises(ValueError, match="balance goes by all samples, for fit"):
        balanced.partial_fit(X, y)


def test_balance_is_checked():
    with pytest.raises(UserError, match="balance must be one of sampling, weights, got 'both'"):
        NiNClassifier(balance="both").fit(np.zeros((4, 2)), [0, 0, 1, 1])
