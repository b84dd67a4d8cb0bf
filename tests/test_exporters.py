"""Files for other programs: the same scores for any number of images, and no nin needed to run them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import nin
from nin import exporters, models
from nin.cli import app
from nin.engines.sessions import explain_refusal
from nin.errors import UserError
from nin.layers import StandardisedConv2d
from nin.names import EXPORT_SUFFIXES

DIGITS_SIZE = (1, 8, 8)
FORMATS = sorted(EXPORT_SUFFIXES)


@pytest.fixture(scope="module", autouse=True)
def _odd_class(run):
    """Give a class a name that needs care in XML and JSON."""
    config = json.loads((run / "config.json").read_text())
    config["classes"][0] = 'zéro <0> & "null"'
    (run / "config.json").write_text(json.dumps(config))


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_agrees(path, model, shape, batches=(1, 7, 64)):
    """Compare an ONNX file with the network in eager mode, within 1e-4 of the largest score."""
    session = session_of(path)
    for count in batches:
        x = torch.randn(count, *shape)
        with torch.no_grad():
            expected = model(x)
        (scores,) = session.run(["scores"], {"images": x.numpy()})
        assert scores.shape == expected.shape
        assert np.abs(scores - expected.numpy()).max() <= 1e-4 * expected.abs().max()


MODELS = {
    "nin_digits": lambda: models.nin_digits(),
    "standardised, GELU": lambda: models.nin_digits(normalisation="weight_standardisation", activation="gelu"),
    "nin_cifar": lambda: models.nin_cifar(last_activation="relu"),
    "nin_imagenet": lambda: models.nin_imagenet(12),
    "googlenet": lambda: models.googlenet(12),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_goes_to_onnx_and_agrees(name, tmp_path):
    model = MODELS[name]().eval()
    # smaller images than 224×224, so that 64 of them take a moment; the slow test has them whole
    size = min(80, models.IMAGE_SIZES[name.partition(",")[0]] if name in models.MODELS else 8)
    shape = (1 if size == 8 else 3, size, size)
    path = tmp_path / "model.onnx"
    exported = nin.export(model, path, input_shape=shape)
    onnx.checker.check_model(path, full_check=True)
    assert_agrees(path, model, shape)
    assert exported.file_bytes == path.stat().st_size
    assert set(exported.differences) == {1, 2, 7}
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nin_imagenet", "googlenet"])
def test_the_large_models_agree_at_their_own_size(name, tmp_path):
    model = models.create(name, 1000).eval()
    nin.export(model, tmp_path / "model.onnx")
    assert_agrees(tmp_path / "model.onnx", model, (3, 224, 224))


def test_a_narrowed_network_goes_to_onnx(tmp_path):
    images = [torch.randn(32, *DIGITS_SIZE) for _ in range(2)]
    narrowed = nin.narrow(models.nin_digits().eval(), images, macs=0.6).model
    nin.export(narrowed, tmp_path / "model.onnx", input_shape=DIGITS_SIZE)
    assert_agrees(tmp_path / "model.onnx", narrowed, DIGITS_SIZE)


def test_the_model_given_stays_as_it_is(tmp_path):
    model = models.nin_digits(normalisation="weight_standardisation").train()
    nin.export(model, tmp_path / "model.pt2")
    assert model.training
    assert any(isinstance(m, StandardisedConv2d) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


RUN_WITHOUT_NIN = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nin":
            raise ImportError("nin is blocked here")

sys.meta_path.insert(0, Blocked())
import json
import numpy as np
path, inputs, outputs = sys.argv[1:]
x = np.load(inputs)
if path.endswith(".onnx"):
    import onnxruntime
    scores = onnxruntime.InferenceSession(path).run(None, {"images": x})[0]
elif path.endswith(".xml"):
    import openvino
    scores = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
else:
    import torch
    about = {"nin.json": ""}
    scores = torch.export.load(path, extra_files=about).module()(torch.from_numpy(x)).detach().numpy()
    assert len(json.loads(about["nin.json"])["classes"]) == 10
assert not any(name.partition(".")[0] == "nin" for name in sys.modules)
np.save(outputs, scores)
"""


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_runs_where_nin_is_not(format, run, tmp_path):
    path = tmp_path / f"model{EXPORT_SUFFIXES[format]}"
    nin.export(run, path)
    images = torch.randn(9, *DIGITS_SIZE)
    np.save(tmp_path / "x.npy", images.numpy())
    command = [sys.executable, "-W", "ignore", "-c", RUN_WITHOUT_NIN, path, tmp_path / "x.npy", tmp_path / "y.npy"]
    subprocess.run(command, check=True)
    expected = nin.load(run).model(images).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_tells_nothing_of_this_machine(format, run, tmp_path):
    path = tmp_path / f"model{EXPORT_SUFFIXES[format]}"
    nin.export(run, path)
    for file in tmp_path.iterdir():
        for folder in (Path(nin.__file__).parent, Path(torch.__file__).parent, tmp_path):
            assert str(folder).encode() not in file.read_bytes()


def test_what_a_training_returns(tmp_path):
    result = nin.train("digits", nin.TrainConfig(epochs=1))
    exported = nin.export(result, tmp_path / "model.pt2")
    assert exported.metadata["classes"] == list(result.info.classes)
    assert exported.metadata["input"]["shape"] == ["batch", 1, 8, 8]


def test_onnx_carries_classes_and_preprocessing(run, tmp_path):
    nin.export(run, tmp_path / "model.onnx")
    session, info = session_of(tmp_path / "model.onnx"), nin.load(run).info
    about = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(about["classes"])) == info.classes
    preprocessing = json.loads(about["preprocessing"])
    assert preprocessing == {"size": 8, "channels": 1, "inside": False, **preprocessing}
    assert tuple(preprocessing["mean"]) == info.preprocessing.mean
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    assert session.get_outputs()[0].shape == ["batch", 10]


def test_openvino_carries_classes(run, tmp_path):
    import openvino

    nin.export(run, tmp_path / "model.xml")
    network = openvino.Core().read_model(tmp_path / "model.xml")
    assert tuple(json.loads(network.get_rt_info(["nin", "classes"]).astype(str))) == nin.load(run).classes


@pytest.mark.parametrize("format", FORMATS)
def test_preprocessing_inside(format, run, tmp_path):
    classifier = nin.load(run)
    exported = nin.export(classifier, tmp_path / f"model{EXPORT_SUFFIXES[format]}", preprocessing=True)
    assert exported.metadata["input"] == {"name": "pixels", "shape": ["batch", 8, 8, 1], "dtype": "uint8"}
    assert exported.metadata["preprocessing"]["inside"]
    if format != "onnx":
        return
    pictures = [Image.new("L", (8, 8), shade) for shade in (0, 60, 255)]
    pixels = np.stack([np.asarray(p) for p in pictures])[..., None]
    (scores,) = session_of(exported.path).run(None, {"pixels": pixels})
    np.testing.assert_allclose(scores, classifier.scores(pictures).numpy(), rtol=1e-4, atol=1e-4)


def test_any_network_of_images(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nin.MLPConv(4, (8, 5)), nin.GlobalAveragePooling())
    nin.export(model, tmp_path / "model.onnx", input_shape=(3, 9, 11))
    assert_agrees(tmp_path / "model.onnx", model.eval(), (3, 9, 11))


def test_a_file_that_computes_something_else_is_not_written(run, tmp_path, monkeypatch):
    convert = exporters._CONVERTERS["pt2"]

    def wrong(program, metadata):
        contents, scores = convert(program, metadata)
        return contents, lambda x: scores(x) * 1.001

    monkeypatch.setitem(exporters._CONVERTERS, "pt2", wrong)
    with pytest.raises(UserError, match=r"model\.pt2 was not written: its scores differ from the network's"):
        nin.export(run, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_survives_a_write_that_fails(run, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        nin.export(run, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_mistakes_get_one_line(run, tmp_path, monkeypatch):
    model = nn.Conv2d(3, 4, 1)
    with pytest.raises(UserError, match=r"format must be one of onnx, pt2, openvino, got None for .*model\.h5"):
        nin.export(run, tmp_path / "model.h5")
    with pytest.raises(UserError, match=r"input_shape must be given as .* it cannot be told from a Conv2d"):
        nin.export(model, tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"input_shape must be \(C, H, W\), each at least 1, got \(3, 8\)"):
        nin.export(model, tmp_path / "model.onnx", input_shape=(3, 8))
    with pytest.raises(UserError, match="preprocessing is known for a run folder"):
        nin.export(models.nin_digits(), tmp_path / "model.onnx", preprocessing=True)
    with pytest.raises(TypeError, match=r"model must be a run folder, a Classifier or a torch.nn.Module, got int"):
        nin.export(3, tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"path must end in .xml for OpenVINO"):
        nin.export(run, tmp_path / "model.bin", format="openvino")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"onnx needs onnx, onnxscript, onnxruntime: pip install 'network-in-network\[onnx\]'"
    ):
        nin.export(run, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class LooksAtValues(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


class Airy(nn.Module):
    def forward(self, x):
        return torch.special.airy_ai(x).mean((2, 3))


class OwnError(Exception):
    pass


class Raises(nn.Module):
    def forward(self, x):
        raise OwnError("not\ntoday")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (LooksAtValues(), r"cannot be traced by torch\.export: GuardOnDataDependentSymNode: "),
        (Raises(), r"cannot be traced by torch\.export: OwnError: not today$"),
        (Airy(), r"model\.onnx was not written, onnx cannot take this network: ConversionError: "),
    ],
)
def test_a_network_that_cannot_be_exported_is_one_line(model, words, tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(UserError, match=words) as error:
        nin.export(model, tmp_path / "model.onnx", input_shape=(3, 8, 8))
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_an_engine_says_of_a_network_is_one_line():
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    refused = onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node("NoSuch", ["x"], ["y"])], "g", [], [])
    )
    with (
        pytest.raises(UserError, match=r"^it cannot take this: (Fail|InvalidGraph|RuntimeException|InvalidArgument): "),
        explain_refusal("it cannot take this"),
    ):
        onnxruntime.InferenceSession(refused.SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(UserError, match=r"^it cannot: ValidationError: "), explain_refusal("it cannot"):
        onnx.checker.check_model(refused)
    with pytest.raises(UserError, match=r"^it cannot: InferenceError: shapes"), explain_refusal("it cannot"):
        raise onnx.shape_inference.InferenceError("shapes do not fit")
    with pytest.raises(UserError, match=r"^it cannot: RuntimeError: no such operator$"), explain_refusal("it cannot"):
        raise RuntimeError("no such\n operator")


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a fault of nin's"),
        OSError(28, "No space left on device"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_everything_else_passes(error):
    with pytest.raises(type(error)) as raised, explain_refusal("it cannot"):
        raise error
    assert raised.value is error


def test_the_shell_exports(run, tmp_path, capsys):
    app.main(["export", str(run), "--format", "pt2", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["path"] == str(run / "model.pt2")
    assert max(printed["differences"].values()) <= exporters.TOLERANCE
    app.main(["export", str(run), "--out", str(tmp_path / "digits.onnx"), "--preprocessing"])
    assert "digits.onnx: " in capsys.readouterr().out
    assert session_of(tmp_path / "digits.onnx").get_inputs()[0].type == "tensor(uint8)"
