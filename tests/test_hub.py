"""The Hugging Face Hub, without the network: a saved folder, its model card, and what would be pushed."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin
from PIL import Image

import nin
from nin import checkpoint
from nin.errors import UserError
from nin.hub import PICTURE_FILE, HubClassifier
from nin.narrowing.narrow_to_folder import narrow_run
from nin.narrowing.workflow_config import WorkflowConfig


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Nothing here may reach for the network."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "digits"
    HubClassifier.from_run(run, images="digits").save_pretrained(folder)
    return folder


def test_what_is_saved_is_a_run_folder_with_a_card(run, saved):
    assert {p.name for p in saved.iterdir()} == {"model.safetensors", "config.json", "README.md", PICTURE_FILE}
    x = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    expected = nin.load(run).scores(x)
    for again in (nin.load(saved), HubClassifier.from_pretrained(saved)):
        torch.testing.assert_close(again.scores(x), expected)
        assert again.classes == nin.load(run).classes
        assert again.info.preprocessing == nin.load(run).info.preprocessing
    HubClassifier.from_pretrained(saved).save_pretrained(saved)  # and once more, over itself
    torch.testing.assert_close(nin.load(saved).scores(x), expected)


def test_the_card_has_data_recipe_accuracy_costs_and_picture(run, saved):
    result, card = nin.load(run).info.result, ModelCard.load(saved / "README.md")
    low, high = (100 * v for v in result["test_accuracy_interval"])
    assert f"| 451 | {100 * result['test_accuracy']:.2f} % | {low:.2f} to {high:.2f} % |" in card.text
    cost = nin.cost(nin.load(run).model, (1, 1, 8, 8))
    for expected in (f"{cost.macs:,}", "1,346 images to train on", "learning&#95;rate", f"({PICTURE_FILE})", "torch"):
        assert expected in card.text, expected
    metadata = card.data
    assert metadata.pipeline_tag == "image-classification"
    assert metadata.library_name == "nin"
    assert metadata.eval_results[0].metric_value == result["test_accuracy"]
    with Image.open(saved / PICTURE_FILE) as picture:
        assert picture.width > 400
        assert picture.height > 600  # four classes


def test_names_of_classes_cannot_write_the_card(run, tmp_path):
    model, info = checkpoint.load_model(run)
    name = "<script>alert(1)</script> | **x** [y](https://example.org)\n# title"
    object.__setattr__(info, "classes", (name, *info.classes[1:]))
    card = HubClassifier(model, info).generate_model_card().text
    assert "<script" not in card
    assert "](https" not in card
    assert "\n# title" not in card


def test_without_images_there_is_no_picture(run, tmp_path):
    HubClassifier.from_run(run).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / PICTURE_FILE).exists()
    assert PICTURE_FILE not in (tmp_path / "plain" / "README.md").read_text()


def test_a_narrowed_network(run, tmp_path):
    narrow_run(run, nin.data.load("digits"), WorkflowConfig({"macs": 0.7}, images=64), out=tmp_path / "narrow")
    HubClassifier.from_run(tmp_path / "narrow", images="digits").save_pretrained(tmp_path / "saved")
    x = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    again = HubClassifier.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.scores(x), nin.load(tmp_path / "narrow").scores(x))


def test_what_would_be_pushed(run, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            calls["repo"] = repo_id
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            calls["files"] = sorted(p.name for p in folder_path.iterdir())
            calls["classes"] = json.loads((folder_path / "config.json").read_text())["classes"]
            return "https://example.org"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    HubClassifier.from_run(run).push_to_hub("somebody/digits")
    assert calls["repo"] == "somebody/digits"
    assert calls["files"] == ["README.md", "config.json", "model.safetensors"]
    assert len(calls["classes"]) == 10


def test_loading_from_the_hub_asks_for_two_files(saved, monkeypatch):
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"]))
        return str(saved / filename)

    monkeypatch.setattr("nin.hub.hf_hub_download", download)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", lambda repo_id, filename, **_: str(saved / filename))
    classifier = HubClassifier.from_pretrained("somebody/digits", revision="v1")
    assert classifier.classes == nin.load(saved).classes
    assert asked == [("somebody/digits", "config.json", "v1"), ("somebody/digits", "model.safetensors", "v1")]


def test_a_folder_that_is_damaged(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        HubClassifier.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Write red and blue images of 20 pixels, three of each for testing."""
    root, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(16):
        path = root / ("red", "blue")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = noise.integers(0, 90, (20, 20, 3)).astype(np.uint8)
        pixels[..., 2 * (number % 2)] += 150
        Image.fromarray(pixels).save(path)
    return root


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "torchvision:squeezenet1_1"])
def test_a_run_of_another_packages_network(name, pictures, tmp_path):
    config = nin.TrainConfig(model=name, epochs=1, batch_size=4, threads=1)
    nin.train(nin.data.load(pictures, size=32, resize="squash"), config, out=tmp_path / "run")
    made = HubClassifier.from_run(tmp_path / "run", images=pictures)
    made.save_pretrained(tmp_path / "saved")
    again, run = HubClassifier.from_pretrained(tmp_path / "saved"), nin.load(tmp_path / "run")
    image = next(pictures.rglob("*.png"))
    torch.testing.assert_close(again.scores(image), run.scores(image))
    assert again.info.preprocessing == run.info.preprocessing
    assert again.no_maps_reason == run.no_maps_reason
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"The network {name.replace('_', '&#95;')}, of " in card
    assert ("confidence_maps(" in card) != bool(run.no_maps_reason)
    assert ("approximate_maps(" in card) == bool(run.no_maps_reason)
    assert "trust" not in card


def test_somebodys_factory_is_imported_only_where_it_is_trusted(pictures, tmp_path, monkeypatch):
    (tmp_path / "hubs_own.py").write_text(
        "from torch import nn\n"
        "def make(num_classes=2):\n"
        "    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), head)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = nin.TrainConfig(model="hubs_own:make", epochs=1, threads=1)
    nin.train(nin.data.load(pictures, size=32), config, out=tmp_path / "run")
    with pytest.raises(UserError, match="made by hubs_own:make, code that is not nin's"):
        HubClassifier.from_run(tmp_path / "run")
    HubClassifier.from_run(tmp_path / "run", trust=True).save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="made by hubs_own:make, code that is not nin's"):
        HubClassifier.from_pretrained(tmp_path / "saved")
    image = next(pictures.rglob("*.png"))
    again = HubClassifier.from_pretrained(tmp_path / "saved", trust=True)
    torch.testing.assert_close(again.scores(image), nin.load(tmp_path / "run", trust=True).scores(image))
    assert 'from_pretrained("REPOSITORY OR FOLDER", trust=True)' in (tmp_path / "saved" / "README.md").read_text()
