"""The network of the page's last lesson: what makes it, and what was made."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import nin

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lesson_network():
    path = ROOT / "docs" / "lesson_network.py"
    spec = importlib.util.spec_from_file_location("lesson_network", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(layers, images):
    """Return the scores of a network that was written down, for images from 0 to 1."""
    y = images
    for i, layer in enumerate(layers):
        weight, bias = torch.tensor(layer["weight"]), torch.tensor(layer["bias"])
        k = 5 if i == 0 else 1
        y = F.conv2d(y, weight.view(len(bias), -1, k, k), bias, padding=k // 2)
        y = y.relu() if i + 1 < len(layers) else y
    return y.mean((2, 3))


def test_it_learns_and_is_written_down_as_it_is(lesson_network, tmp_path, capsys):
    accuracy = lesson_network.main(tmp_path / "digits.json", steps=400)
    assert "598 parameters" in capsys.readouterr().out
    content = json.loads((tmp_path / "digits.json").read_text())
    assert 0.5 < accuracy < 1
    assert content["accuracy"] == pytest.approx(accuracy, abs=1e-4)
    test = nin.data.load("digits").test
    right = answers(content["layers"], test.images / 255).argmax(1) == test.labels
    assert right.float().mean().item() == pytest.approx(accuracy, abs=0.005)  # four decimals of each number are kept
    shown = torch.tensor(content["images"]).view(10, 1, 8, 8) / 255
    assert answers(content["layers"], shown).argmax(1).tolist() == list(range(10))


def test_the_page_shows_one_as_good_as_it_says():
    page = ROOT / "src" / "nin" / "server" / "page"
    content = json.loads((page / "digits.json").read_text())
    test = nin.data.load("digits").test
    right = (answers(content["layers"], test.images / 255).argmax(1) == test.labels).float().mean().item()
    numbers = sum(len(row) for layer in content["layers"] for row in layer["weight"])
    numbers += sum(len(layer["bias"]) for layer in content["layers"])
    words = " ".join((page / "index.html").read_text().split())
    assert f"This one has {numbers} numbers and reads {right:.0%} of the digits".replace("%", " %") in words
