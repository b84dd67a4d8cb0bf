"""Networks of timm, torchvision and other packages: exact maps, weights, and every verb on a run of one."""

import functools
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from starlette.testclient import TestClient
from torch import nn

import nin
from nin import checkpoint, data, exporters, models, training
from nin.cli import app
from nin.errors import UserError
from nin.inference.grad_cam import last_feature_layer
from nin.models.external_classifier import ExternalClassifier
from nin.models.head_surgery import cut_head
from nin.models.initial_weights import InitialWeights
from nin.models.input_config import InputConfig
from nin.models.package_networks import create_network
from nin.narrowing import NarrowOptions, latency
from nin.report import build_report, render_report
from nin.runtime.weight_files import read_weights
from nin.server import create_app
from support.serving import numbers, post

pytest.importorskip("timm")

THREE = ("timm:tf_efficientnet_lite0", "timm:mobilenetv3_small_050", "torchvision:resnet18")
CLASSES = ("blue", "green", "red")

# Where the maps are not exact, what stands in the way.
NETWORKS = {
    "timm:tf_efficientnet_lite0": "",
    "timm:mobilenetv3_small_050": "Hardswish",
    "timm:convnext_atto": "LayerNorm2d",
    "timm:densenet121": "",
    "timm:regnety_002": "",
    "torchvision:resnet18": "",
    "torchvision:squeezenet1_1": "",
    "torchvision:mobilenet_v3_small": "Hardswish",
}
EXACT = (
    "timm:cspresnet50 timm:dla34 timm:dpn68 timm:eca_nfnet_l0 timm:ecaresnet26t timm:efficientnet_b0 "
    "timm:ese_vovnet19b_dw timm:fastvit_t8 timm:gernet_s timm:hrnet_w18_small timm:mixnet_s timm:mnasnet_small "
    "timm:mobilenetv2_050 timm:mobileone_s0 timm:mobilevit_xxs timm:nf_regnet_b0 timm:repvgg_a0 timm:res2net50_26w_4s "
    "timm:resnest14d timm:resnet18 timm:resnetv2_50 timm:rexnet_100 timm:seresnet18 timm:skresnet18 "
    "timm:swin_tiny_patch4_window7_224 timm:tinynet_e timm:tresnet_m timm:vgg11 timm:xception41 "
    "torchvision:densenet121 torchvision:efficientnet_b0 torchvision:googlenet torchvision:mnasnet0_5 "
    "torchvision:mobilenet_v2 torchvision:regnet_y_400mf torchvision:resnext50_32x4d torchvision:shufflenet_v2_x0_5 "
    "torchvision:swin_t torchvision:wide_resnet50_2"
)
MORE_NETWORKS = {
    **dict.fromkeys(EXACT.split(), ""),
    "timm:ghostnet_050": "ReLU",
    "timm:poolformer_s12": "LayerNorm2d",
    "timm:vit_tiny_patch16_224": "LayerNorm",
    "torchvision:vgg11": "ReLU",
    "torchvision:convnext_tiny": "LayerNorm2d",
}


def disturb(network):
    """Give BatchNorm layers statistics, without which they do next to nothing."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)


def check_maps(name, reason, size):
    network, config = create_network(name, 7)
    disturb(network)
    network.eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = network(x)
        model = ExternalClassifier(name, network, 7, config).eval()
        scale = expected.abs().max()
        assert (model(x) - expected).abs().max() <= 1e-5 * scale
        assert (model.classify(model.embed(x)) - expected).abs().max() <= 1e-5 * scale
        if reason:
            assert not model.maps_are_exact
            assert reason in model.no_maps_reason
            with pytest.raises(UserError, match="has no exact class maps"):
                model.maps(x)
        else:
            assert model.no_maps_reason == ""
            maps = model.maps(x)
            assert maps.shape[:2] == (2, 7)
            assert (maps.mean((2, 3)) - expected).abs().max() <= 1e-5 * scale
    every = {id(p) for p in model.parameters()}
    assert {id(p) for p in [*model.head_parameters(), *model.body_parameters()]} == every


@pytest.mark.parametrize(("name", "reason"), NETWORKS.items())
def test_the_mean_of_a_map_is_the_score(name, reason):
    check_maps(name, reason, 64)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reason"), MORE_NETWORKS.items())
def test_the_mean_of_a_map_is_the_score_in_forty_networks(name, reason):
    check_maps(name, reason, 224 if "swin" in name or "vit_" in name else 96)


class Tail(nn.Module):
    """A body of one convolution and a head that a test gives."""

    def __init__(self, head, pool=None):
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 6, 3), pool, head

    def forward(self, x):
        x = self.conv(x).relu()
        return self.head(x if self.pool is None else self.pool(x))


HEADS = {
    "dropout": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 4)), ""),
    "BatchNorm": (nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 4)), ""),
    "BatchNorm before": (
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.Flatten()),
        "",
    ),
    "maps first": (nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), ""),
    "no bias": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=False)), ""),
    "norm": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 4)), "LayerNorm"),
    "activation": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.GELU(), nn.Linear(6, 4)), "GELU"),
    "largest": (nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 4)), "AdaptiveMaxPool2d"),
    "four pixels": (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)), "AdaptiveAvgPool2d"),
    "softmax": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.Softmax(1)), "Softmax"),
}


class Pooled(nn.Module):
    """A head whose pooling is a function of the feature maps."""

    def __init__(self, pool, inputs=6):
        super().__init__()
        self.pool, self.linear = pool, nn.Linear(inputs, 4)

    def forward(self, x):
        return self.linear(self.pool(x).flatten(1))


# the feature maps are 7×5
POOLINGS = {
    "mean of a mean": (lambda x: x.mean(3).mean(2), ""),
    "last axes": (lambda x: x.mean(-1).mean(-1), ""),
    "kept axes": (lambda x: x.mean(2, keepdim=True).mean(3, keepdim=True), ""),
    "rows first": (lambda x: x.mean(2).mean(dim=2), ""),
    "torch.mean": (lambda x: torch.mean(torch.mean(x, -1, True), dim=(2,)), ""),
    "as large as the maps": (lambda x: F.avg_pool2d(x, x.size()[2:]), ""),
    "of their shape": (lambda x: F.avg_pool2d(x, kernel_size=x.shape[-2:]), ""),
    "window": (nn.AvgPool2d((7, 5)), ""),
    "window by a function": (lambda x: F.avg_pool2d(x, (7, 5), stride=1), ""),
    "window of a part": (nn.AvgPool2d(4), ""),
    "one axis": (lambda x: x.mean(3).mean(1).repeat(1, 2)[:, :6], "getitem"),
    "the images": (lambda x: x.mean(3).mean(0).expand(3, 6, 7).mean(2), "mean"),
    "border counted": (nn.AvgPool2d((7, 5), padding=(1, 1), stride=9), "AvgPool2d"),
    "sum": (nn.AvgPool2d((7, 5), divisor_override=1), "AvgPool2d"),
    "of another": (lambda x: F.avg_pool2d(x, x[:, :, :7, :5].shape[2:]), "avg_pool2d"),
}


def wrapped(network):
    """Return a network as nin trains it, in float64, with images and the scores that the network itself gives them."""
    network = network.double()
    disturb(network)
    x = torch.randn(3, 3, 9, 7, dtype=torch.float64)
    expected = network.eval()(x)
    model = ExternalClassifier("a:b", network, 4, InputConfig()).double().eval()
    torch.testing.assert_close(model(x), expected)
    return model, x, expected


@pytest.mark.parametrize("kind", POOLINGS)
def test_poolings_in_other_words(kind):
    pool, reason = POOLINGS[kind]
    model, x, expected = wrapped(Tail(Pooled(pool)))
    assert (reason in model.no_maps_reason) if reason else model.no_maps_reason == ""
    if not reason:
        maps = model.maps(x)
        assert maps.shape == (3, 4, 7, 5)
        torch.testing.assert_close(maps.mean((2, 3)), expected)
        torch.testing.assert_close(model.classify(model.embed(x)), expected)
    if kind == "window of a part":  # what the score does not count is not shown as evidence
        assert not maps[:, :, 4:].any()
        assert not maps[..., 4:].any()


def test_windows_that_give_no_exact_maps():
    several = Tail(Pooled(nn.AvgPool2d(3), inputs=12))  # 2×1 pixels of six maps
    activated = Tail(nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.AvgPool2d((7, 5)), nn.Flatten()))
    plain = Tail(nn.Sequential(nn.Conv2d(6, 4, 1), nn.AvgPool2d((7, 5)), nn.Flatten()))
    x = torch.randn(2, 3, 9, 7)
    for network, reason in (
        (several, "its AvgPool2d leaves more than one pixel of each feature map"),
        (activated, "its ReLU stands before an AvgPool2d"),
        (plain, ""),
    ):
        disturb(network)
        expected = network.eval()(x)
        model = ExternalClassifier("a:b", network, 4, InputConfig()).eval()
        torch.testing.assert_close(model(x), expected)
        assert model.no_maps_reason.startswith(reason)
        assert bool(model.no_maps_reason) == bool(reason)
    torch.testing.assert_close(model.maps(x).mean((2, 3)), expected)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_that_commute_and_those_that_do_not(kind):
    head, reason = HEADS[kind]
    model, x, expected = wrapped(Tail(head))
    assert (reason in model.no_maps_reason) if reason else model.no_maps_reason == ""
    if not reason:
        torch.testing.assert_close(model.maps(x).mean((2, 3)), expected)
        torch.testing.assert_close(model.classify(model.embed(x)), expected)


def test_dropout_and_batch_norm_train_as_in_the_network():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 4))
    network, x = Tail(head), torch.randn(5, 3, 9, 9)
    model = ExternalClassifier("a:b", network, 4, InputConfig(), dropout=0.5).train()
    model.dropout.p = 0.0
    torch.testing.assert_close(model(x), network.train()(x))
    model.dropout.p = 0.5
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    pooled = head[2](model.pool(model.features(x)))
    torch.testing.assert_close(first, F.linear(F.dropout(pooled, 0.5), head[3].weight, head[3].bias))


def test_a_network_that_cannot_be_traced_trains_without_maps():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            pooled = x.mean((2, 3))
            return self.fc(pooled if pooled.sum() > 0 else -pooled)

    model = ExternalClassifier("a:b", Branching(), 4, InputConfig())
    assert "cannot be traced" in model.no_maps_reason
    assert model(torch.randn(2, 3, 5, 5)).shape == (2, 4)


def test_other_classes_get_a_new_class_layer_and_grey_images_a_sum():
    network, _ = create_network("torchvision:resnet18", 7)
    colour = ExternalClassifier("torchvision:resnet18", network, 3, InputConfig())
    assert colour(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    torch.manual_seed(3)
    grey = models.create("torchvision:resnet18", 5, in_channels=1).eval()
    torch.manual_seed(3)
    colour = models.create("torchvision:resnet18", 5).eval()
    x = torch.randn(1, 1, 40, 40)
    torch.testing.assert_close(grey(x), colour(x.expand(1, 3, 40, 40)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nin_cifr", "did you mean nin_cifar"),
        ("resnet18", "did you mean torchvision:resnet18"),
        ("tf_efficientnet_lite0", "did you mean timm:tf_efficientnet_lite0"),
        ("timm:resnet_18", "did you mean timm:resnet18"),
        ("torchvision:resnet17", "did you mean torchvision:resnet1"),
    ],
)
def test_names_that_were_meant(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        models.create(name, 3)
    with pytest.raises(UserError, match=message):  # before the images, which are not there
        nin.train(tmp_path / "none", nin.TrainConfig(model=name))


def test_preprocessing_of_published_weights():
    lite0, resnet = models.input_config("timm:tf_efficientnet_lite0"), models.input_config("torchvision:resnet18")
    assert (lite0.size, lite0.mean, lite0.resize.crop_fraction) == (224, (0.5, 0.5, 0.5), 0.875)
    assert (resnet.size, resnet.resize.interpolation) == (224, "bilinear")
    assert resnet.resize.crop_fraction == pytest.approx(224 / 256)
    assert len(lite0.with_channels(1).mean) == 1


def load(tensors, classes, name="torchvision:resnet18"):
    notes = []
    weights = InitialWeights(tensors, "FILE")
    model = models.create(name, classes, prepare=lambda network, layer: notes.append(weights.load_into(network, layer)))
    return model.eval(), notes[0]


def test_weights_by_name_and_by_order(tmp_path):
    network, _config = create_network("torchvision:resnet18", 5)
    state, x = network.eval().state_dict(), torch.randn(1, 3, 32, 32)
    expected = network(x)
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "w.pth")
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "w.safetensors")
    for file in ("w.pth", "w.safetensors"):
        model, note = load(read_weights(tmp_path / file), 5)
        torch.testing.assert_close(model(x), expected)
        assert note == "Begun with FILE"
    # other names, and no counters, which old files lack
    renamed = {f"layer{i}": t for i, (name, t) in enumerate(state.items()) if "num_batches" not in name}
    torch.testing.assert_close(load(renamed, 5)[0](x), expected)
    assert load(renamed, 3)[1] == "Begun with FILE: the class layer is a new one, for 3 classes"
    without = {name: t for name, t in state.items() if not name.startswith("layer4.1.conv2")}
    assert "1 of 122 tensors keep random weights (layer4.1.conv2.weight)" in load(without, 5)[1]
    with pytest.raises(UserError, match="holds the weights of another network: 0 of 100 tensors fit"):
        load({"a": torch.zeros(3)}, 5)


def test_safetensors_files_are_matched_by_name_and_never_by_their_sorted_order(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))
    state = {name: t for name, t in network.state_dict().items() if "num_batches" not in name}
    prefixed, renamed = tmp_path / "prefixed.safetensors", tmp_path / "renamed.safetensors"
    save_file({f"_orig_mod.module.{name}": torch.full_like(t, 2.0) for name, t in state.items()}, prefixed)
    InitialWeights.of_file(prefixed).load_into(network, "3")
    assert all((t == 2).all() for name, t in network.state_dict().items() if "num_batches" not in name)
    # sorted, bias, mean, variance and weight of a BatchNorm have the shapes of its weight, bias, mean and variance
    names = ("a.weight", "b.weight", "b.bias", "b.mean", "b.variance", "c.weight", "c.bias")
    other = {name: torch.randn_like(t) for name, t in zip(names, state.values(), strict=True)}
    save_file(other, renamed)
    weights = InitialWeights.of_file(renamed)
    for load_weights in (lambda: weights.load_into(network, "3"), lambda: weights.load_all_into(network, "3", "it")):
        with pytest.raises(UserError, match=r"sorted by name, .* cannot be matched by their order: .*\(\.pth\)"):
            load_weights()
    torch.save(other, tmp_path / "renamed.pth")
    assert InitialWeights.of_file(tmp_path / "renamed.pth").load_into(network, "3").endswith("renamed.pth")
    torch.testing.assert_close(network[1].running_var, other["b.variance"])


def test_files_that_are_no_weights_are_said_to_be_what_they_are(tmp_path):
    path, state = tmp_path / "w.pth", {"a.weight": torch.ones(2), "a.bias": torch.zeros(2)}
    whole, one = nn.Linear(2, 2), torch.ones(1)
    for content, message in (
        (whole, "holds more than names and tensors (torch.nn.modules.linear.Linear)"),
        ({"state_dict": state, "hooks": whole}, "save the weights alone, by torch.save(model.state_dict(), FILE)"),
        ({}, "it is empty"),
        (one, "names and tensors, got Tensor"),
        ({"epoch": 3, "args": {}}, "it holds: epoch (int), args (empty dict)"),
        ({"g": state, "d": state}, "2 of its entries are state_dicts: save the one to take: g (dict), d (dict)"),
        ({"best": [state], "epoch": 1}, "it holds: best (list), epoch (int)"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=re.escape(message)):
            read_weights(path)
    torch.save({"net": state, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, path)
    assert read_weights(path).keys() == state.keys()
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"hello world", b"<!DOCTYPE html>", pickle.dumps({"a": 1}, 4)):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            read_weights(path)
        assert str(caught.value) == f"{path} is damaged, or no file of weights that torch.save wrote"


@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_of_the_file_without_a_place_are_named(channels):
    deeper, _config = create_network("torchvision:resnet34", 5)
    tensors = deeper.state_dict()
    network, notes = create_network("torchvision:resnet18", 5, in_channels=channels)[0], []
    notes.append(InitialWeights(tensors, "FILE").load_into(network, "fc"))
    torch.testing.assert_close(network.layer4[1].conv2.weight, deeper.layer4[1].conv2.weight)
    extra = [n for n in tensors.keys() - network.state_dict().keys() if "num_batches" not in n]
    assert f"FILE: {len(extra)} of the file's {len(tensors)} tensors have no place (layer1.2.conv1.weight, " in notes[0]
    assert "probably of another, larger network" in notes[0]
    own = dict(network.state_dict())
    assert InitialWeights(own, "FILE").load_into(network, "fc") == "Begun with FILE"
    head = {"head.weight": torch.zeros(9, 512), "head.bias": torch.zeros(9)}
    without = {name: t for name, t in own.items() if not name.startswith("fc.")}
    assert InitialWeights({**without, **head}, "FILE").load_into(network, "fc") == (
        "Begun with FILE: the class layer is a new one, for 5 classes; 2 of the file's 122 tensors have no place "
        "(head.weight, head.bias)"
    )


@pytest.mark.skipif("NIN_LITE0_WEIGHTS" not in os.environ, reason="NIN_LITE0_WEIGHTS names no file")
def test_real_pretrained_weights_name_a_palace_and_a_daisy():
    from sklearn.datasets import load_sample_image

    model, note = load(read_weights(Path(os.environ["NIN_LITE0_WEIGHTS"])), 1000, "timm:tf_efficientnet_lite0")
    assert note == "Begun with FILE"
    c = model.input_config
    for name, label in (("china.jpg", 698), ("flower.jpg", 985)):
        pixels = data.decode(Image.fromarray(load_sample_image(name)), size=c.size, channels=3, resize=c.resize)
        with torch.no_grad():
            assert int(model(data.to_float(pixels[None], c.mean, c.std)).argmax()) == label


NO_NETWORK = """
import nin
for name in ("timm:tf_efficientnet_lite0", "torchvision:resnet18"):
    try:
        nin.models.create(name, 3, pretrained=True)
    except nin.errors.UserError as error:
        print(error)
"""


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    with socket.socket() as unused:  # bound and not listening: who connects is refused
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        variables = {n: v for n, v in os.environ.items() if "proxy" not in n.lower() and not n.startswith("HF_")}
        variables |= {"HF_HOME": str(tmp_path / "hub"), "TORCH_HOME": str(tmp_path / "torch")}
        variables |= {"https_proxy": address, "HF_ENDPOINT": address, "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", NO_NETWORK], env=variables, capture_output=True, text=True, check=True
        )
    assert "Retrying" not in done.stderr
    for line, name in zip(
        done.stdout.splitlines(), ("timm:tf_efficientnet_lite0", "torchvision:resnet18"), strict=True
    ):
        assert line.startswith(f"the weights of {name} cannot be had: they are not in the package's cache")
        assert "onnection refused" in line
        assert ") With a network, run it once more; without one, give --weights FILE, a " in line.replace(").", ")")


def test_pretrained_is_for_libraries():
    with pytest.raises(UserError, match="is for timm:NAME and torchvision:NAME"):
        nin.train("digits", nin.TrainConfig(model="torch.nn:Identity", pretrained=True))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of small images whose colours are their classes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 120
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def make_run(photos, tmp_path_factory):
    """Return the function that trains a network of that name, once, and returns its run folder."""

    @functools.cache
    def make(name):
        out = tmp_path_factory.mktemp("run") / "run"
        config = nin.TrainConfig(model=name, epochs=1, batch_size=8, precision="fp32", threads=1)
        nin.train(photos, config, out=out)
        return out

    return make


@pytest.fixture(params=THREE)
def run(request, make_run):
    return make_run(request.param)


def test_a_run_answers_reports_is_counted_and_served(run, photos):
    from nin.report import write_report
    from nin.server.activations import layers
    from nin.server.service import ServedRun

    classifier, image = nin.load(run), photos / "test" / "red" / "0.png"
    name = classifier.info.model["name"]
    assert classifier.info.model["kind"] == "external"
    scores = classifier.scores(image)
    assert scores.shape == (1, 3)
    if classifier.no_maps_reason:
        assert name == "timm:mobilenetv3_small_050"
    else:
        torch.testing.assert_close(classifier.confidence_maps(image).mean((2, 3)), scores, rtol=1e-4, atol=1e-5)
    assert name in write_report(run).read_text()
    assert nin.cost(classifier.model, (1, 3, 32, 32)).macs > 100_000
    served = ServedRun(run, "cpu")
    shown = layers(served.network)
    assert shown[0].kind == "image"
    assert shown[-1].channels == 3
    assert served.metadata.name == name


SMALL_AND_SLOW = ["torchvision:resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in THREE[:2])]


@pytest.mark.parametrize("name", SMALL_AND_SLOW)
def test_a_run_is_fused_and_exported(name, make_run, tmp_path):
    run = make_run(name)
    model, x = nin.load(run).model, torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(nin.fuse(model).model.eval()(x), model(x), rtol=1e-3, atol=1e-4)
    exported = exporters.export(run, tmp_path / "model.pt2")
    assert max(exported.differences.values()) < exporters.TOLERANCE


@pytest.mark.filterwarnings("ignore:fewer samples than values")  # a few images are enough for a test
@pytest.mark.parametrize("name", SMALL_AND_SLOW)
def test_a_run_is_narrowed_and_fine_tuned(name, make_run, photos, tmp_path):
    from nin.narrowing.narrow_to_folder import narrow_run
    from nin.narrowing.workflow_config import WorkflowConfig

    run = make_run(name)
    before = nin.load(run)
    images = data.load_from_record(before.info.data, before.info.preprocessing)
    # the late layers of ResNet-18 have 512 channels, whose spectra take long
    skip, share = (("body.layer[234].*",), 0.95) if name == "torchvision:resnet18" else ((), 0.8)
    narrow_run(run, images, WorkflowConfig({"macs": share}, skip=skip, images=16, finetune=1), out=tmp_path / "narrow")
    narrowed = nin.load(tmp_path / "narrow")
    assert models.model_name(narrowed.info.model) == f"{name}, narrowed"
    assert narrowed.scores(photos / "test" / "red" / "0.png").shape == (1, 3)
    assert narrowed.no_maps_reason == before.no_maps_reason
    shape = (1, 3, 32, 32)
    assert nin.cost(narrowed.model, shape).macs < nin.cost(before.model, shape).macs


@pytest.mark.filterwarnings("ignore:fewer samples than values")
def test_stages_that_pad_themselves_are_narrowed_and_timed_on_fewer_pixels_than_their_kernels(monkeypatch):
    monkeypatch.setattr(latency, "MODEL_SECONDS", 0.01)
    monkeypatch.setattr(latency, "LAYER_SECONDS", 0.01)
    network, _config = create_network("timm:tf_efficientnet_lite0", 3)
    stages = nn.Sequential(network.blocks[2][0], nn.Conv2d(40, 112, 1), network.blocks[5][0]).eval()
    disturb(stages)
    x = torch.randn(32, 24, 4, 4)
    report = nin.narrow(stages, [x], macs=0.5, options=NarrowOptions(batch=2, threads=1)).report
    timed = {layer.name: layer.latency_ms_before for layer in report.layers}
    assert timed["2.conv_dw"] > 0
    assert report.macs[1] < 0.51 * report.macs[0]


def test_the_served_layers_compute_the_scores(run):
    from nin.server.activations import find_layer, layer_activations, layers
    from nin.server.pca import narrowed_scores, principal_components

    model = nin.load(run).model
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    last = len(layers(model)) - 1
    maps = layer_activations(model, x, last)
    torch.testing.assert_close(maps.mean((2, 3)), expected, rtol=1e-4, atol=1e-5)
    pointwise = [i for i, layer in enumerate(layers(model)) if layer.kind == "convolution" and layer.kernel_size == 1]
    index = pointwise[len(pointwise) // 2]
    # what a 1×1 layer takes from each channel at a pixel adds up to what it gives there
    node = find_layer(model, index)
    taken = layer_activations(model, x, node.layer.inputs[0])
    stride = node.layer.stride
    sums = torch.einsum("oi,nihw->nohw", node.weight.detach()[..., 0, 0], taken[:, :, ::stride, ::stride])
    sums = sums if node.bias is None else sums + node.bias.detach().view(1, -1, 1, 1)
    torch.testing.assert_close(sums, layer_activations(model, x, index, sums=True), rtol=1e-3, atol=1e-4)
    components = principal_components(model, x, index)
    whole = narrowed_scores(model, x, index, components, len(components.mean))
    torch.testing.assert_close(whole, expected, rtol=1e-3, atol=1e-3)


def test_weights_of_another_run(run, photos, tmp_path):
    other, notes = tmp_path / "two", []
    (tmp_path / "photos").mkdir()
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir()
        for name in ("red", "blue"):
            os.symlink(photos / split / name, tmp_path / "photos" / split / name)
    config = nin.TrainConfig(weights=str(run), epochs=1, batch_size=8, threads=1)
    result = nin.train(tmp_path / "photos", config, out=other, on_note=notes.append)
    assert notes == [f"Begun with {run}: the class layer is a new one, for 2 classes"]
    before, after = (checkpoint.load_info(folder) for folder in (run, other))
    assert after.preprocessing == before.preprocessing
    assert result.info.recipe["model"] == before.model["name"]


def test_wrong_weights_are_one_line(run, photos, tmp_path):
    for options, message in (
        ({"weights": str(tmp_path / "none.pth")}, "does not exist"),
        ({"weights": str(run / "config.json")}, "give --model"),
        ({"weights": str(run), "model": "nin_cifar"}, "leave --model away"),
        ({"weights": str(run), "model": "timm:resnet18", "pretrained": True}, "not both"),
    ):
        with pytest.raises(UserError, match=message):
            nin.train(photos, nin.TrainConfig(**options))


def test_a_factory_is_imported_only_where_it_is_trusted(photos, tmp_path, monkeypatch):
    (tmp_path / "somebodys.py").write_text(
        "from torch import nn\n"
        "def make(num_classes=9):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    nin.train(photos, nin.TrainConfig(model="somebodys:make", epochs=1, threads=1), out=out)
    with pytest.raises(UserError, match=r"made by somebodys:make, code that is not nin's: .*--trust"):
        nin.load(out)
    assert nin.load(out, trust=True).model.maps_are_exact
    with models.trust("somebodys:make"):
        assert checkpoint.load_model(out)[1].classes == CLASSES
    with pytest.raises(UserError, match="name it with --model somebodys:make"):
        nin.train(photos, nin.TrainConfig(weights=str(out)))
    check_resuming_names_the_factory(photos, out, monkeypatch)
    values = json.loads((out / "config.json").read_text())
    values["model"]["num_classes"] = 10**9
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="does not describe a network"):
        nin.load(out, trust=True)


def check_resuming_names_the_factory(photos, out, monkeypatch):
    """A run folder that is resumed may be another person's, finished or not, of one training or of folds."""
    resume = training.CheckpointOptions(resume=True)
    message = r"begun with somebodys:make, code that is not nin's: .*name it again with --model somebodys:make.*--trust"
    stopped, folds = out.with_name("stopped"), out.with_name("folds")
    config = nin.TrainConfig(model="somebodys:make", epochs=1, batch_size=8, threads=1)
    for options in ({}, {"folds": 2}):
        train = training.cross_validate if options else nin.train
        images = data.load(photos, size=32)
        stop = training.CheckpointOptions(stop=lambda: True)
        with pytest.raises(KeyboardInterrupt):
            train(images, config, out=folds if options else stopped, keeping=stop, **options)
    monkeypatch.delitem(sys.modules, "somebodys")
    for folder, options in ((out, []), (stopped, []), (folds, ["--folds", "2"])):
        command = ["train", str(photos), "--out", str(folder), "--size", "32", "--resume", *options]
        with pytest.raises(SystemExit):
            app.main(command)
        if not options:
            with pytest.raises(UserError, match=message):
                nin.train(photos, out=folder, keeping=resume)
    with pytest.raises(UserError, match=message):
        training.cross_validate(images, nin.TrainConfig(), folds=2, out=folds, keeping=resume)
    assert "somebodys" not in sys.modules
    app.main(["train", str(photos), "--out", str(stopped), "--size", "32", "--resume", "--trust"])
    app.main(["train", str(photos), "--out", str(folds), "--size", "32", "--resume", "--folds", "2", "--trust"])
    assert nin.train(photos, config, out=stopped, keeping=resume).info.result  # named again


@pytest.mark.parametrize("by_command", [False, True])
def test_mistakes_are_said_before_the_images_are_read(by_command, photos, tmp_path, monkeypatch, capsys):
    def read(*arguments, **options):
        raise AssertionError("the images were read first")

    monkeypatch.setattr(data, "load", read)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    other, broken = tmp_path / "other.pth", tmp_path / "broken.pth"
    torch.save({"a": torch.zeros(3)}, other)
    broken.write_bytes(b"nothing")
    for source, options, message in (
        (photos, {"model": "torchvision:resnet18", "weights": str(other)}, "holds the weights of another network"),
        (photos, {"model": "torchvision:resnet18", "weights": str(broken)}, "is damaged"),
        (photos, {"model": "nin_nowhere.module:make"}, "was not found"),
        (photos, {"model": "torch.nn:no_such"}, "was not found"),
        (photos, {"patience": 2}, "patience goes by images that are set apart"),
        ("digits", {"patience": 2}, "patience goes by images that are set apart"),
        (photos, {"tensorboard": True}, "TensorBoard's files need: pip install"),
    ):
        if by_command:
            given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
            with pytest.raises(SystemExit):
                app.main(["train", str(source), "--out", str(tmp_path / "run"), *given])
            assert message in " ".join(capsys.readouterr().err.split())
        else:
            keeping = training.CheckpointOptions(tensorboard=options.pop("tensorboard", False))
            with pytest.raises(UserError, match=message):
                nin.train(source, nin.TrainConfig(**options), out=tmp_path / "run", keeping=keeping)
        assert not (tmp_path / "run").exists()


def test_settings_that_a_frozen_body_does_not_use_are_named(photos):
    unused = {"epochs": 9, "mixup": 0.2, "learning_rate": "auto", "batch_size": 4}
    config, notes = nin.TrainConfig(model="torchvision:resnet18", recipe="finetune", freeze=True, **unused), []
    resolved = config.resolve(images=24, image_size=32, flip=False, shift=0)
    assert resolved.epochs == 1
    assert not resolved.finds("learning_rate")
    assert "--batch-size, --epochs, --learning-rate, --mixup change nothing" in config.unused_note()
    assert nin.TrainConfig(recipe="finetune", freeze=True, label_smoothing=0.2).unused_note() == ""
    assert nin.TrainConfig(epochs=9).unused_note() == ""
    nin.train(data.load(photos, size=32), config, on_note=notes.append)
    assert notes == [config.unused_note()]


def test_grad_cam_is_an_approximation_of_maps(photos):
    model = models.create("timm:mobilenetv3_small_050", 3).eval()
    info = checkpoint.RunInfo(
        checkpoint.model_description(model),
        CLASSES,
        checkpoint.Preprocessing(64, 3, (0.5,) * 3, (0.5,) * 3),
        {},
        {},
        {},
        {},
    )
    classifier, image = nin.Classifier(model, info), photos / "test" / "red" / "0.png"
    try:
        import pytorch_grad_cam  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"network-in-network\[gradcam\]"):
            classifier.approximate_maps(image, ["red"])
        return
    maps = classifier.approximate_maps([image, image], ["red", "blue"])
    assert maps.shape == (2, 64, 64)
    assert 0 <= maps.min() <= maps.max() <= 1
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "timm:ghostnet_050", "torchvision:mobilenet_v3_small"])
def test_grad_cam_looks_at_the_last_maps_and_not_at_pooled_pixels(name):
    model, seen = models.create(name, 3).eval(), []
    x = torch.randn(1, 3, 96, 96)
    layer = last_feature_layer(model, x)
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    handle.remove()
    assert seen[0].shape[2:] == (3, 3)


@pytest.fixture(scope="module")
def untrained(photos, tmp_path_factory):
    """A run folder of a network without exact maps, with random weights, whose images are here."""
    model, images = models.create("timm:mobilenetv3_small_050", 3).eval(), data.load(photos, size=64)
    record = {"name": "photos", "test_images": len(images.test), **images.origin}
    description, preprocessing = checkpoint.model_description(model), checkpoint.Preprocessing.of(images)
    info = checkpoint.RunInfo(description, CLASSES, preprocessing, {"model": model.name}, record, {"seconds": 1.0}, {})
    out = tmp_path_factory.mktemp("untrained") / "run"
    out.mkdir()
    checkpoint.save_model(out, model, info)
    return out


class GradCAMInPlaceOfThePackages:
    """Has the form of pytorch_grad_cam's, and gives maps that say which class they are of."""

    def __init__(self, model, target_layers):
        assert len(target_layers) == 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self, input_tensor, targets):
        assert input_tensor.requires_grad
        ramp = np.linspace(0, 1, input_tensor.shape[-1], dtype=np.float32)
        return np.stack([np.outer(ramp, ramp) ** (1 + label) for label in targets])


@pytest.fixture
def with_grad_cam(monkeypatch):
    package, targets = types.ModuleType("pytorch_grad_cam"), types.ModuleType("pytorch_grad_cam.utils.model_targets")
    package.GradCAM, targets.ClassifierOutputTarget = GradCAMInPlaceOfThePackages, int
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", package)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam.utils", types.ModuleType("pytorch_grad_cam.utils"))
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam.utils.model_targets", targets)


def test_the_report_approximates_maps_by_grad_cam(untrained, with_grad_cam):
    report = build_report(untrained)
    assert not report.maps_are_exact
    assert len(report.samples) == 8
    ramp = np.linspace(0, 1, 64)
    scores = nin.load(untrained).scores([torch.from_numpy(sample.pixels) for sample in report.samples])
    for sample, row in zip(report.samples, scores, strict=True):
        assert sample.maps[0].label == sample.predicted
        assert (sample.maps[1].label == sample.true) != sample.right
        for shown in sample.maps:
            np.testing.assert_allclose(shown.values, np.outer(ramp, ramp) ** (1 + shown.label), atol=1e-6)
            assert shown.score == pytest.approx(row[shown.label].item(), abs=1e-4)
    assert any("There are no exact class maps" in n and "Grad-CAM approximates them" in n for n in report.notes)
    page = render_report(report)
    assert "An approximation, by Grad-CAM" in page
    assert "by Grad-CAM" in page.split("Test images")[0]
    assert "The score of a class is the mean of its map" not in page
    assert 'class="scale"' not in page


def test_the_server_approximates_maps_by_grad_cam(untrained, with_grad_cam, photos):
    client = TestClient(create_app(untrained), base_url="http://127.0.0.1:8646")
    assert "Hardswish" in client.get("/api/model").json()["no_maps_reason"]
    image = (photos / "test" / "red" / "0.png").read_bytes()
    for label in range(3):
        answer = post(client, image, path=f"/api/approximate-map?label={label}")
        ramp = np.linspace(0, 1, 64)
        np.testing.assert_allclose(numbers(answer.json())[0], np.outer(ramp, ramp) ** (1 + label), atol=1e-6)
    assert post(client, image, path="/api/approximate-map?label=3").status_code == 404
    assert post(client, b"no image", path="/api/approximate-map?label=0").status_code == 415


def test_without_the_package_everything_says_what_to_install(untrained, monkeypatch, photos, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    report = build_report(untrained)
    assert not any(sample.maps for sample in report.samples)
    (note,) = (note for note in report.notes if "no exact class maps" in note)
    assert "network-in-network[gradcam]" in note
    assert "Test images" in render_report(report)
    client = TestClient(create_app(untrained), base_url="http://127.0.0.1:8646")
    answer = post(client, (photos / "test" / "red" / "0.png").read_bytes(), path="/api/approximate-map?label=0")
    assert answer.status_code == 422
    assert "network-in-network[gradcam]" in answer.json()["detail"]
    with pytest.raises(SystemExit):  # before the images are classified
        app.main(["predict", str(untrained), str(photos / "test"), "--maps", str(untrained.parent / "maps")])
    said = capsys.readouterr()
    assert said.out == ""
    assert "--maps: there are no exact maps (between its feature maps" in " ".join(said.err.split())
    assert "network-in-network[gradcam]" in " ".join(said.err.split())


def test_the_cut_keeps_the_networks_own_modules():
    network, _ = create_network("timm:tf_efficientnet_lite0", 3)
    cut = cut_head(network.eval())
    assert cut.class_layer == "classifier"
    assert cut.body.get_submodule("blocks") is network.blocks
