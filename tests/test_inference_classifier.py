"""Using a run: every form of an image gives the same prediction, and the maps add up to the scores."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import nin
from nin import checkpoint
from nin.checkpoint import Preprocessing, RunInfo
from nin.errors import UserError
from nin.inference.classifier import INFERENCE_BATCH_SIZE


def make_run(folder, channels):
    torch.manual_seed(0)
    model = nin.models.nin_cifar(3, in_channels=channels, normalisation="weight_standardisation")
    p = Preprocessing(16, channels, (0.4,) * channels, (0.3,) * channels)
    info = RunInfo(checkpoint.model_description(model), ("a", "b", "c"), p, {}, {}, {}, {})
    checkpoint.save_model(folder, model, info)
    return model.eval(), nin.load(folder)


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def run(request, tmp_path):
    return (*make_run(tmp_path, request.param), request.param)


def picture(channels, size=16):
    values = np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)
    return values[:, :, 0] if channels == 1 else values


def test_every_form_of_an_image_gives_the_same(run, tmp_path):
    _, classifier, channels = run
    values = picture(channels)
    image = Image.fromarray(values)
    path = tmp_path / "image.png"
    image.save(path)
    chw = torch.from_numpy(values).reshape(16, 16, channels).permute(2, 0, 1)
    floats = values.astype(np.float32) / 255
    forms = [str(path), path, path.read_bytes(), image, values, chw, floats, chw[None], values[None], [path]]
    expected = classifier.predict(path)[0]
    for form in forms:
        assert classifier.predict(form) == [expected], type(form)
    for p in classifier.predict([path, image, values]):  # a batch sums in another order
        assert p.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_prediction_is_the_networks(run):
    model, classifier, channels = run
    values = picture(channels)
    x = torch.from_numpy(values).reshape(16, 16, channels).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = model((x - 0.4) / 0.3).softmax(1)[0]
    p = classifier.predict(values)[0]
    torch.testing.assert_close(torch.tensor(p.probabilities), expected, rtol=1e-4, atol=1e-5)
    assert p.label == classifier.classes[int(expected.argmax())]
    assert p.confidence == max(p.probabilities)
    assert sum(p.probabilities) == pytest.approx(1, abs=1e-5)


def test_maps_average_to_the_scores(run):
    _, classifier, channels = run
    maps = classifier.confidence_maps([picture(channels)] * 2)
    assert maps.shape == (2, 3, 4, 4)
    torch.testing.assert_close(maps.mean((2, 3)), classifier.scores([picture(channels)] * 2))
    assert classifier.confidence_maps(picture(channels), size=16).shape == (1, 3, 16, 16)


def test_more_images_than_a_batch_keep_their_order(run):
    _, classifier, channels = run
    values = np.random.default_rng(1).integers(0, 256, (70, 16, 16, channels), dtype=np.uint8)
    together = classifier.scores(values)
    for i in (0, 63, 64, 69):
        torch.testing.assert_close(together[i], classifier.scores(values[i])[0], rtol=1e-4, atol=1e-5)


def test_no_image_gives_no_prediction(run):
    _, classifier, _ = run
    assert classifier.predict([]) == []
    assert classifier.confidence_maps([]).shape[0] == 0


def test_what_is_no_image_is_named(run, tmp_path):
    _, classifier, _ = run
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match=r"text\.png"):
        classifier.predict(tmp_path / "text.png")
    with pytest.raises(UserError, match=r"none\.png"):
        classifier.predict(tmp_path / "none.png")
    with pytest.raises(TypeError, match="got int"):
        classifier.predict([3])
    with pytest.raises(ValueError, match="uint8, or of floats"):
        classifier.predict(np.zeros((16, 16), dtype=np.int64))
    with pytest.raises(ValueError, match="must have shape"):
        classifier.predict(np.zeros((0, 16), dtype=np.uint8))
    with pytest.raises(ValueError, match="must have shape"):
        classifier.predict(np.zeros(16, dtype=np.uint8))
    with pytest.raises(ValueError, match="must have shape"):
        classifier.predict([np.zeros((2, 7, 16, 16), dtype=np.uint8)])


def without_maps():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))


def classifier_of(model):
    p = Preprocessing(32, 3, (0.5,) * 3, (0.5,) * 3)
    info = RunInfo(checkpoint.model_description(nin.models.nin_cifar(2)), ("a", "b"), p, {}, {}, {}, {})
    return nin.Classifier(model, info)


def test_maps_need_a_network_that_makes_them():
    with pytest.raises(UserError, match=r"confidence maps need a network of nin\.models, got Sequential"):
        classifier_of(without_maps()).confidence_maps(picture(3, 32))


def test_the_maps_of_a_googlenet_average_to_its_scores():
    classifier = classifier_of(nin.models.googlenet(2))
    maps = classifier.confidence_maps(picture(3, 64))
    assert maps.shape == (1, 2, 1, 1)
    torch.testing.assert_close(maps.mean((2, 3)), classifier.scores(picture(3, 64)), rtol=1e-4, atol=1e-5)


def array(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("channels", "shape", "images"),
    [
        (1, (16, 16), 1),
        (1, (1, 16, 16), 1),
        (1, (16, 16, 1), 1),
        (1, (16, 16, 3), 1),
        (1, (16, 16, 4), 1),
        (1, (5, 16, 16), 5),
        (1, (0, 16, 16), 0),
        (1, (3, 1, 16, 16), 3),
        (1, (2, 3, 16, 16), 2),
        (3, (3, 16, 16), 1),
        (3, (1, 16, 16), 1),
        (3, (16, 16, 4), 1),
        (3, (5, 16, 16), 5),
        (3, (4, 3, 16, 16), 4),
    ],
)
def test_how_many_images_an_array_holds(channels, shape, images, tmp_path):
    _, classifier = make_run(tmp_path, channels)
    assert len(classifier.predict(array(*shape))) == images


@pytest.mark.parametrize(
    ("channels", "shape"), [(1, (2, 16, 16)), (1, (3, 16, 16)), (1, (4, 16, 16)), (3, (2, 16, 16)), (3, (4, 16, 16))]
)
def test_an_array_that_could_be_one_image_or_several_is_refused(channels, shape, tmp_path):
    _, classifier = make_run(tmp_path, channels)
    values, count = array(*shape), shape[0]
    expected = rf"may be one image of {count} channels or {count} grey images.*\(1, {count}, 16, 16\)"
    with pytest.raises(ValueError, match=expected):
        classifier.predict(values)
    assert len(classifier.predict(values[None])) == 1
    assert len(classifier.predict(values[:, None])) == count
    assert len(classifier.predict([values])) == 1  # in a list, each is an image


@pytest.mark.parametrize("value", [-0.5, 1.5, 255.0, float("nan"), float("inf")])
def test_floats_outside_their_range_are_refused(run, value):
    _, classifier, _ = run
    values = np.full((16, 16), 0.5, dtype=np.float32)
    values[3, 4] = value
    with pytest.raises(ValueError, match="values from 0 to 1, got"):
        classifier.predict(values)


def test_the_caller_can_still_train(run):
    _, classifier, channels = run
    for call in (classifier.predict, classifier.scores, classifier.confidence_maps):
        call([picture(channels)] * (INFERENCE_BATCH_SIZE + 1))
        assert not torch.is_inference_mode_enabled()
    broken = nin.Classifier(torch.nn.Linear(1, 1), classifier.info)
    kept = []
    try:
        broken.scores([picture(channels)])
    except RuntimeError as error:
        kept.append(error)  # and with it the frames of the call
    assert kept
    assert not torch.is_inference_mode_enabled()


def mobile():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU6(), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)]
    body = [*layers, torch.nn.ReLU6(), torch.nn.Conv2d(8, 8, 1), torch.nn.AdaptiveAvgPool2d(1)]
    return torch.nn.Sequential(*body, torch.nn.Flatten(), torch.nn.Linear(8, 2))


@pytest.mark.parametrize("make", [mobile, without_maps, lambda: nin.models.googlenet(2)], ids=["mobile", "linear", "g"])
def test_the_fastest_network_answers_as_the_model(make):
    classifier = classifier_of(make())
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    for _ in range(3):
        with torch.inference_mode():
            wanted = classifier.model(classifier.inputs(pixels))
            torch.testing.assert_close(classifier.score_pixels(pixels), wanted, rtol=1e-4, atol=1e-5)
            if isinstance(classifier.model, nin.models.Network):
                maps = classifier.fastest_maps(classifier.inputs(pixels))
                torch.testing.assert_close(maps.mean((2, 3)), wanted, rtol=1e-4, atol=1e-5)
        # a change of the model's weights is one of the fused network's, which shares them
        next(classifier.model.parameters()).data.mul_(1.5)
    fused = dict(classifier.fastest.named_parameters())
    assert all(fused[name] is parameter for name, parameter in classifier.model.named_parameters())


def test_a_compiled_run_of_nin_is_one_call_of_the_library(run):
    _, classifier, channels = run
    classifier, images = copy.deepcopy(classifier), [picture(channels) for _ in range(2)]
    wanted = classifier.scores(images)
    classifier.compile()
    scores = classifier.scores(images)
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5)
    (plan,) = classifier.fastest._plans.values()
    assert len(plan.parts) <= 3  # the conversion of the images' layout, one call of the library, a view of its result
    assert torch.equal(classifier.scores(images), scores)
    torch.testing.assert_close(classifier.confidence_maps(images).mean((2, 3)), scores, rtol=1e-4, atol=1e-5)
