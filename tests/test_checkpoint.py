"""Run folders: what is written is read back, and what is damaged or foreign gets one clear error."""

import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import nin
from nin import checkpoint
from nin.checkpoint import Preprocessing, RunInfo
from nin.errors import UserError


def info(model):
    shape = getattr(model, "config", model)
    size = getattr(shape, "image_size", 224)
    channels = shape.in_channels
    return RunInfo(
        model=checkpoint.model_description(model),
        classes=("cat", "dög"),
        preprocessing=Preprocessing(size, channels, (0.5,) * channels, (0.25,) * channels),
        recipe={},
        data={"name": "x"},
        result={},
        environment={},
    )


@pytest.fixture
def run(tmp_path):
    model = nin.models.nin_digits(2, normalisation="weight_standardisation")
    checkpoint.save_model(tmp_path, model, info(model))
    return tmp_path


@pytest.mark.parametrize(
    "make",
    [
        lambda: nin.models.nin_digits(2),
        lambda: nin.models.nin_cifar(2, in_channels=1, dropout=0.1, last_activation="relu"),
        lambda: nin.models.nin_imagenet(2, normalisation="weight_standardisation"),
        lambda: nin.models.googlenet(2, in_channels=1),
    ],
)
def test_every_model_comes_back(make, tmp_path):
    model = make()
    checkpoint.save_model(tmp_path, model, info(model))
    again, read = checkpoint.load_model(tmp_path)
    assert read.to_json() == info(model).to_json()
    assert not again.training
    assert type(again) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_loading_initialises_no_weights(run):
    before = torch.get_rng_state()
    model, _ = checkpoint.load_model(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_a_foreign_model_is_refused():
    with pytest.raises(TypeError, match="got Linear"):
        checkpoint.model_description(torch.nn.Linear(1, 1))


def test_state_comes_back(tmp_path):
    tensors = {"a": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "b": torch.arange(3)}
    checkpoint.save_state(tmp_path, tensors, {"epoch": 3, "metrics": [{"x": 0.1}]})
    read, values = checkpoint.load_state(tmp_path)
    assert values == {"epoch": 3, "metrics": [{"x": 0.1}]}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_state_with_a_flipped_bit_is_refused(tmp_path):
    checkpoint.save_state(tmp_path, {"a": torch.zeros(100)}, {"epoch": 3})
    path = tmp_path / checkpoint.STATE_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="its checksum does not fit"):
        checkpoint.load_state(tmp_path)


def test_a_disk_that_gives_back_something_else_keeps_the_old_state(tmp_path, monkeypatch):
    checkpoint.save_state(tmp_path, {}, {"epoch": 3})
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: b"else")
    with pytest.raises(OSError, match="reads back differently"):
        checkpoint.save_state(tmp_path, {}, {"epoch": 4})
    monkeypatch.undo()
    assert checkpoint.load_state(tmp_path)[1] == {"epoch": 3}


def test_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="is not a run folder of nin"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(UserError, match="none does not exist: give a run folder"):
        nin.load(tmp_path / "none")


def test_missing_weights(run):
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        checkpoint.load_model(run)


def edit(run, **changes):
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"format_version": "1"}, "format version 1"),
        ({"classes": 3}, "damaged"),
        ({"preprocessing": {}}, "damaged"),
        ({"unknown": 1}, "damaged"),
        ({"model": {"kind": "pickle"}}, "does not describe a network"),
        ({"model": {"kind": "nin", "config": {"blocks": [{"channels": [-1]}]}}}, "does not describe a network"),
        ({"model": None}, "model must be an object"),
        ({"model": {"kind": None}}, "does not describe a network"),
        ({"classes": ["a", "b", "c"]}, r"has \(classes, channels\) \(2, 1\), the rest of the file \(3, 1\)"),
        ({"preprocessing": {"size": 10**12, "channels": 1, "mean": [0.0], "std": [1.0]}}, "size must be 1 to 16384"),
        ({"preprocessing": {"size": 1, "channels": 1, "mean": [0.0], "std": [1.0]}}, "must have 2 pixels a side"),
        ({"preprocessing": {"size": 8, "channels": 1, "mean": [0.0, 0.0], "std": [1.0]}}, "must have 1 numbers"),
        ({"preprocessing": {"size": 8, "channels": 1, "mean": [0.0], "std": [0.0]}}, "std positive"),
    ],
)
def test_damaged_configurations(run, changes, message):
    edit(run, **changes)
    with pytest.raises(UserError, match=message):
        checkpoint.load_model(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\x00\xff"])
def test_config_that_is_no_json_object(run, text):
    (run / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        checkpoint.load_model(run)


def test_a_huge_config_is_not_read(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGEST_CONFIG_BYTES", 10)
    with pytest.raises(UserError, match="larger than 10 bytes"):
        checkpoint.load_model(run)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "lie", "pickle"])
def test_damaged_weights(run, damage):
    path = run / "model.safetensors"
    content = path.read_bytes()
    damaged = {
        "truncate": content[: len(content) // 2],
        "flip": bytes([content[0] ^ 0xFF]) + content[1:],
        "empty": b"",
        "lie": struct.pack("<Q", 2**62) + content[8:],
        "pickle": b"\x80\x04cos\nsystem\n(S'false'\ntR.",
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or no safetensors file"):
        checkpoint.load_model(run)


def test_weights_of_another_network(run, tmp_path_factory):
    other = nin.models.nin_digits(3, normalisation="weight_standardisation")
    folder = tmp_path_factory.mktemp("other")
    checkpoint.save_model(folder, other, info(other))
    (run / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not fit config\.json: .* must have shape \(2,\), got \(3,\)"):
        checkpoint.load_model(run)


def test_a_description_that_asks_for_everything_takes_no_memory(run):
    """10^12 weights would be 4 TB: the sizes are compared with the file's before anything is made."""
    description = nin.models.nin_digits(2).config.to_dict()
    description["blocks"][0]["channels"] = [10**6, 10**6, 64]
    edit(run, model={"kind": "nin", "config": description})
    tracemalloc.start()
    with pytest.raises(UserError, match=r"does not fit config\.json"):
        checkpoint.load_model(run)
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def test_runs_of_yesterday_load():
    """A run folder as version 1 of the format wrote it; it stays as it is when the format changes."""
    classifier = nin.load(Path(__file__).parent / "run-format-1")
    image = (np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)
    (prediction,) = classifier.predict(image)
    assert classifier.classes == ("even", "odd")
    assert prediction.probabilities == pytest.approx((0.4622652530670166, 0.5377347469329834), abs=1e-5)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    """The operating system itself refuses to write on, as it does on a full disk."""
    code = """
import resource, signal, sys
from pathlib import Path
from nin.runtime.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
path = Path(sys.argv[1])
write_atomically(path, b"old")
try:
    write_atomically(path, b"new" * 1000)
except OSError as error:
    print(error.filename, error.strerror)
"""
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path} File too large\n"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"classes": ("cat", "dog")}, "its classes are ['cat', 'dog'], those of digits are ['0', '1', '2'"),
        ({"channels": 3}, "its number of channels is 3, that of digits is 1"),
        ({"size": 9}, "its size is 9, that of digits is 8"),
        ({"tested": 7}, "its number of test images is 7, that of digits is 451"),
        ({"classes": tuple(map(str, range(1000)))}, "…, those of digits are"),
    ],
)
def test_images_that_differ_from_those_of_the_run(change, expected):
    images = nin.data.load("digits")
    values = {"classes": images.classes, "channels": 1, "size": 8, "tested": 451, **change}
    p = Preprocessing(values["size"], values["channels"], (0.5,) * values["channels"], (0.5,) * values["channels"])
    described = RunInfo({}, values["classes"], p, {}, {"test_images": values["tested"]}, {}, {})
    mismatch = described.mismatch(images, test_images=True)
    assert mismatch is None if expected is None else expected in mismatch
    if "tested" in change:
        assert described.mismatch(images) is None
