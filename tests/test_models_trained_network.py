"""Networks of other packages with all of their trained weights: nothing is left random, and nothing left out."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nin.errors import UserError
from nin.models.factory import create_external_model
from nin.models.trained_network import load_trained

LIBRARY_NETWORKS = ["timm:test_efficientnet", "timm:test_resnet", "torchvision:squeezenet1_1"]


@pytest.fixture
def trained(tmp_path):
    """Return a function that makes a network with weights of its own in a file, under its names or others."""

    def make(name, rename=None, **options):
        if name.startswith("timm"):
            pytest.importorskip("timm")
        torch.manual_seed(5)
        model = create_external_model(name, **options).model.eval()
        state = {key: t.contiguous() for key, t in model.state_dict().items()}
        path = tmp_path / ("weights.pth" if rename else "weights.safetensors")
        if rename:  # in a .safetensors the order is not kept
            torch.save({rename(i, key): t for i, (key, t) in enumerate(state.items())}, path)
        else:
            save_file(state, path)
        return model, path

    return make


def assert_same_scores(model, loaded, channels=3):
    x = torch.randn(2, channels, 64, 64)
    assert not loaded.training
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", LIBRARY_NETWORKS)
@pytest.mark.parametrize("rename", [None, lambda i, key: f"t{i:04}.{key.rpartition('.')[2]}"])
def test_a_network_is_made_for_the_classes_of_its_weights(trained, name, rename):
    model, path = trained(name, rename, classes=6)
    external = load_trained(name, path)
    assert external.made_for == {"classes": 6}
    assert_same_scores(model, external.model)


def test_a_network_is_made_for_the_channels_of_its_weights(trained):
    model, path = trained("timm:test_resnet", classes=4, channels=1)
    external = load_trained("timm:test_resnet", path)
    assert external.made_for == {"classes": 4, "channels": 1}
    assert external.channels == 1
    assert_same_scores(model, external.model, channels=1)


def test_usual_numbers_need_no_options(trained):
    model, path = trained("timm:test_resnet")
    external = load_trained("timm:test_resnet", path)
    assert external.made_for == {}
    assert_same_scores(model, external.model)


def ends_in_five():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_what_does_not_fit_is_one_line(trained, tmp_path):
    model, path = trained("timm:test_resnet", classes=6)
    for change, expected in (
        ({"fc.weight": None}, r"2 of its \d+ tensors are missing there or have another shape \(fc.weight, fc.bias\)"),
        ({"bn1.bias": None}, r"1 of its \d+ tensors are missing there or have another shape \(bn1.bias\)"),
        ({"extra.weight": torch.zeros(3)}, "does not fit timm:test_resnet, which has no extra.weight"),
        ({"conv1.0.weight": torch.zeros(7, 3, 3, 3)}, "are missing there or have another shape"),
    ):
        tensors = {**model.state_dict(), **change}
        assert change.keys() <= {*model.state_dict(), "extra.weight"}
        save_file({key: t.contiguous() for key, t in tensors.items() if t is not None}, path)
        with pytest.raises(UserError, match=expected):
            load_trained("timm:test_resnet", path)
    save_file({key: t.contiguous() for key, t in model.state_dict().items()}, path)
    with pytest.raises(UserError, match="does not fit timm:test_efficientnet"):
        load_trained("timm:test_efficientnet", path)
    # a function of somebody's cannot be asked for other classes
    six = nn.Sequential(*ends_in_five()[:-1], nn.Linear(8, 6))
    save_file(six.state_dict(), path)
    with pytest.raises(UserError, match=r"2 of its 4 tensors .* \(4.weight, 4.bias\)"):
        load_trained(f"{__name__}:ends_in_five", path)
    save_file({f"body.{key}": t for key, t in ends_in_five().state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is of a run of nin: give the run folder"):
        load_trained("timm:test_resnet", tmp_path / "model.safetensors")
