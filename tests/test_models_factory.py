"""Networks of other packages by name: what is there is made, and what is not gets one line."""

import json

import pytest
from torch import nn

from nin.cli import app
from nin.errors import UserError
from nin.models.factory import create_external_model


def test_networks_of_other_packages():
    external = create_external_model("torchvision:squeezenet1_1", classes=7)
    assert (external.channels, external.height, external.width) == (3, 224, 224)
    assert external.model.classifier[1].out_channels == 7
    pytest.importorskip("timm")
    external = create_external_model("timm:lcnet_035", classes=5, channels=1)
    assert (external.channels, external.height) == (1, 224)
    assert external.model.num_classes == 5
    assert isinstance(create_external_model("torch.nn:Identity").model, nn.Identity)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "is no name of a network; expected timm:NAME"),
        ("torchvision:none", "torchvision has no network 'none'"),
        ("timm:none", "has no network 'none'"),
        ("nowhere:make", "was not found: No module named 'nowhere'"),
        ("torch.nn:Linear", "must be callable without arguments"),
        ("json:loads", "must be callable without arguments"),
        ("torch:float32", "must be a function or class"),
        ("time:time", "must give a torch.nn.Module, got float"),
    ],
)
def test_names_that_name_nothing(name, message):
    with pytest.raises(UserError, match=message):
        create_external_model(name)


def test_the_shell_counts_them(capsys):
    app.app(["cost", "torchvision:squeezenet1_1", "--size", "64", "--json"])
    counted = json.loads(capsys.readouterr().out)
    assert counted["parameters"] == 1_235_496
    with pytest.raises(UserError, match="a run folder, or timm:NAME"):
        app.app(["cost", "resnet18"])
