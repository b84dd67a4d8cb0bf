"""Using a run: every form of an image gives the same prediction, and the maps add up to the scores."""

import numpy as np
import pytest
import torch
from PIL import Image

import nin
from nin import checkpoint
from nin.checkpoint import Preprocessing, RunInfo
from nin.errors import UserError


def make_run(folder, channels):
    torch.manual_seed(0)
    model = nin.models.nin_cifar(3, in_channels=channels, normalisation="weight_standardisation")
    p = Preprocessing(16, channels, (0.4,) * channels, (0.3,) * channels)
    info = RunInfo(checkpoint.describe_model(model), ("a", "b", "c"), p, {}, {}, {}, {})
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
        classifier.predict([np.zeros((2, 7, 16, 16), dtype=np.uint8)])


def test_maps_need_a_network_that_makes_them(tmp_path):
    model = nin.models.googlenet(2)
    info = RunInfo(
        checkpoint.describe_model(model), ("a", "b"), Preprocessing(32, 3, (0.5,) * 3, (0.5,) * 3), {}, {}, {}, {}
    )
    with pytest.raises(TypeError, match="confidence maps need a NiN"):
        nin.Classifier(model, info).confidence_maps(np.zeros((32, 32, 3), dtype=np.uint8))
