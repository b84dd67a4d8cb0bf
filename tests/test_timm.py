"""The networks in timm: created by name, the same scores, classifiers that change, features of every stage."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.data import resolve_data_config

import nin
import nin.timm
from nin import models
from nin.models.surgery import to_plain_layers
from nin.narrowing import dependency_graph

NAMES = {"nin_digits": 2, "nin_cifar": 3, "nin_imagenet": 4, "nin_googlenet": 5}
SIZES = {"nin_digits": 8, "nin_cifar": 32, "nin_imagenet": 96, "nin_googlenet": 64}


def images(name, count=2):
    return torch.randn(count, 1 if name == "nin_digits" else 3, SIZES[name], SIZES[name])


def test_they_are_registered():
    assert timm.list_models("nin_*") == sorted(NAMES)
    assert all(timm.is_model(name) for name in NAMES)


def test_importing_nin_does_not_import_timm():
    code = "import sys, nin; nin.models; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_network_of_nin(name):
    ours = models.create(name.replace("nin_googlenet", "googlenet"), 7).eval()
    theirs = timm.create_model(name, num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict())
    x = images(name)
    torch.testing.assert_close(theirs(x), ours(x))
    torch.testing.assert_close(theirs.forward_head(theirs.forward_features(x)), ours(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_timm_knows_of_it(name):
    model = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert model.num_classes == cfg["num_classes"]
    assert resolve_data_config(model=model)["input_size"] == cfg["input_size"]
    modules = dict(model.named_modules())
    assert modules[cfg["first_conv"]].in_channels == cfg["input_size"][0]
    assert modules[cfg["classifier"]] is model.get_classifier()
    assert timm.create_model(name, in_chans=2)(torch.randn(1, 2, SIZES[name], SIZES[name])).shape[0] == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_changes(name):
    model, x = timm.create_model(name, num_classes=7).eval(), images(name)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.get_classifier().weight.shape[0] == model.num_classes == 5
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled, rtol=1e-4, atol=1e-5)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    model.reset_classifier(0, "")
    assert model(x).shape[:2] == (2, model.num_features)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    assert timm.create_model(name, num_classes=0)(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_features_of_every_stage(name):
    model, x = timm.create_model(name, features_only=True).eval(), images(name)
    maps = model(x)
    assert len(maps) == NAMES[name]
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    for m, reduction in zip(maps, model.feature_info.reduction(), strict=True):
        assert abs(m.shape[2] - SIZES[name] / reduction) <= 1
    (last,) = timm.create_model(name, features_only=True, out_indices=(-1,)).eval()(x)
    assert last.shape[1:] == maps[-1].shape[1:]


@pytest.mark.parametrize("name", NAMES)
def test_narrowing_traces_it(name):
    assert (
        dependency_graph.build_dependency_graph(to_plain_layers(timm.create_model(name).eval()), set()).problem is None
    )


def test_features_are_those_of_the_network():
    x = images("nin_cifar")
    whole = timm.create_model("nin_cifar").eval()
    features = timm.create_model("nin_cifar", features_only=True).eval()
    features.load_state_dict({f"body.{k}": v for k, v in whole.state_dict().items() if "2.0.convs.2" not in k})
    maps = features(x)
    torch.testing.assert_close(maps[0], whole.blocks[0](x))
    torch.testing.assert_close(maps[-1], whole.forward_features(x))


def test_the_last_relu_comes_before_the_pooling():
    model, x = timm.create_model("nin_cifar", last_activation="relu").eval(), images("nin_cifar")
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x), rtol=1e-4, atol=1e-5)
    model.reset_classifier(4)
    assert (model(x) >= 0).all()


def test_drop_rate_and_options():
    model = timm.create_model("nin_cifar", drop_rate=0.1, activation="silu")
    assert [b.dropout for b in model.config.blocks] == [0.1, 0.1, 0.0]
    assert model.config.activation == "silu"
    with pytest.raises(ValueError, match=r"global_pool must be one of \('avg', ''\), got 'max'"):
        timm.create_model("nin_cifar", global_pool="max")
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("nin_cifar", pretrained=True)


def test_a_run_folder_is_a_checkpoint(tmp_path):
    nin.train("digits", nin.TrainConfig(epochs=1), out=tmp_path / "run")
    model = timm.create_model(
        "nin_digits",
        normalisation="weight_standardisation",
        checkpoint_path=tmp_path / "run" / "model.safetensors",
    ).eval()
    x = images("nin_digits")
    torch.testing.assert_close(model(x), nin.load(tmp_path / "run").model(x), rtol=1e-4, atol=1e-5)


def test_it_trains_and_costs_and_exports(tmp_path):
    model, x = timm.create_model("nin_digits", num_classes=3), images("nin_digits")
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert nin.cost(model, (1, 1, 8, 8)).macs > 0
    assert nin.export(model.eval(), tmp_path / "model.pt2").path.exists()
