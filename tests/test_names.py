"""Names of networks and data sets that are checked without PyTorch: none that there is may be refused."""

import pytest
import torchvision

from nin import models, names
from nin.errors import UserError


def test_the_lists_are_those_of_what_there_is():
    assert tuple(models.MODELS) == names.NETWORKS
    for name in names.NETWORKS:
        names.check_network(name)


def test_every_network_of_a_library_passes():
    for name in torchvision.models.list_models():
        names.check_network(f"torchvision:{name}")
    timm = pytest.importorskip("timm")
    for name in (*timm.list_models(), *timm.list_pretrained()):
        names.check_network(f"timm:{name}")


def test_networks_that_somebody_registers_pass(monkeypatch):
    timm = pytest.importorskip("timm")
    for name, library, registry in (
        ("timm:mine_tiny", timm.models._registry, "_model_entrypoints"),
        ("torchvision:mine_tiny", torchvision.models._api, "BUILTIN_MODELS"),
    ):
        with pytest.raises(UserError, match="has no network 'mine_tiny'"):
            names.check_network(name)
        monkeypatch.setitem(getattr(library, registry), "mine_tiny", lambda: None)
        names.check_network(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nin-cifar", "did you mean nin_cifar?"),
        ("resnet18", "did you mean torchvision:resnet18?"),
        ("tf_efficientnet_lite0", "did you mean timm:tf_efficientnet_lite0?"),
        ("torchvision:resnet999", "torchvision has no network 'resnet999'; did you mean torchvision:resnet"),
        ("timm:resnet18x", "timm has no network 'resnet18x'; did you mean timm:resnet18"),
        ("torchvision:qqqq", "torchvision's list_models()"),
    ],
)
def test_a_wrong_name_is_refused_with_what_was_meant(name, words):
    if "timm" in words:
        pytest.importorskip("timm")
    with pytest.raises(UserError) as error:
        names.check_network(name)
    assert words in str(error.value)


def test_somebodys_own_network_and_patterns_of_shards_are_looked_up_later(tmp_path):
    names.check_network("my.networks:make")
    for source in ("digits", tmp_path, "photos/train-{000..009}.tar", "photos/*.tar", "https://example.org/a.tar"):
        names.check_source(source)
    with pytest.raises(UserError, match="did you mean fashion-mnist"):
        names.check_source("fashion_mnist")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match=r"photo\.jpg: expected a folder, got a file"):
        names.check_source(tmp_path / "photo.jpg")
    (tmp_path / "a.tar").touch()
    names.check_source(tmp_path / "a.tar")
