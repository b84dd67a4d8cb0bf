"""Every path of the package that computes on a GPU: on the machine's own, else on a pretended one.

The pretended GPU refuses what a real one does, see `support.fake_gpu`; the values are compared with the CPU's.
"""

import dataclasses
import importlib
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from starlette.testclient import TestClient
from torch import nn

import nin
from nin import data, exporters, server
from nin.cli import app
from nin.errors import UserError
from nin.fusion import chain as fusion_chain
from nin.fusion.link import Norm
from nin.fusion.pending import conv_link
from nin.inference.evaluation import evaluate
from nin.models.input_config import InputConfig
from nin.narrowing import FinetuneConfig, finetune
from nin.narrowing.latency import LatencyTable
from nin.narrowing.narrow_to_folder import choose_preprocessing, narrow_model, narrow_run
from nin.narrowing.workflow_config import WorkflowConfig
from nin.optim import OptimizerWithEMA, adamw, sgd
from nin.profiling.bench import runner
from nin.profiling.bench.cases import CASES
from nin.runtime import distributed
from nin.training import CheckpointOptions, batches
from support.fake_gpu import CaptureError, DeviceMismatchError, GPUTensor, pretended_gpu
from support.serving import pictures

HAS_GPU = torch.cuda.is_available()
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    if HAS_GPU:
        yield
        return
    with pretended_gpu(monkeypatch):
        yield


@pytest.fixture(scope="module")
def images():
    """A data set of 8×8 images in memory, small enough for many trainings."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (160, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(160) % 3
    pixels[:, 0, 0] = labels[:, None] * 100  # there is something to learn
    return data.load((pixels.numpy(), labels.numpy()))


def config(**options):
    return nin.TrainConfig(**{"epochs": 2, "batch_size": 32, "device": "cuda", **options})


# -- the pretended GPU itself -----------------------------------------------------------------------------------

pretended = pytest.mark.skipif(HAS_GPU, reason="there is a real GPU")


def linear(device, weight=None):
    layer = nn.Linear(4, 3)
    if weight is not None:
        layer.load_state_dict(weight)
    return layer.to(device)


def test_values_and_gradients_are_those_of_the_cpu():
    layer = linear("cpu")
    on_gpu, x = linear("cuda", layer.state_dict()), torch.randn(5, 4)
    layer(x).square().sum().backward()
    y = on_gpu(x.to("cuda"))
    assert y.is_cuda
    assert y.device == torch.device("cuda:0")
    y.square().sum().backward()
    assert on_gpu.weight.grad.is_cuda
    torch.testing.assert_close(on_gpu.weight.grad.cpu(), layer.weight.grad)


MIXED = {
    "cat": lambda x: torch.cat([torch.zeros(0, 4), x]),
    "product": lambda x: x @ torch.ones(4, 2),
    "sum": lambda x: x + torch.ones(3, 4),
    "sum into a scalar on the CPU": lambda x: torch.zeros(()).add_(x.sum()),
    "layer": lambda x: linear("cpu")(x),
    "stack with a scalar": lambda x: torch.stack([x.sum(), torch.zeros(())]),
    "index_select": lambda x: x.index_select(0, torch.tensor([0])),
    "where": lambda x: torch.where(torch.ones(3, 4) > 0, x, x),
    "cross entropy": lambda x: nn.functional.cross_entropy(x, torch.zeros(3, dtype=torch.int64)),
    "lerp": lambda x: torch.zeros(3, 4).lerp_(x, 0.5),
    "generator": lambda x: torch.multinomial(x.softmax(1), 1, generator=torch.Generator()),
}


@pytest.mark.parametrize("mix", list(MIXED.values()), ids=MIXED)
def test_two_devices_do_not_mix(mix):
    with pytest.raises(RuntimeError):
        mix(torch.randn(3, 4, device="cuda"))


def test_what_does_mix_on_a_gpu():
    x = torch.randn(3, 4, device="cuda")
    assert (x * torch.tensor(2.0)).is_cuda  # a scalar of the CPU
    assert x[torch.tensor([0, 2])].is_cuda  # an index of the CPU
    assert torch.zeros(3, 4).copy_(x).device.type == "cpu"
    assert isinstance(x.sum().item(), float)
    assert x.tolist() == x.cpu().tolist()


def test_a_gpus_tensor_is_no_array():
    x = torch.randn(3, device="cuda")
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(x)


@pretended
def test_gpus_do_not_mix_with_each_other():
    with pytest.raises(DeviceMismatchError, match="cuda:0, cuda:1"):
        torch.ones(2, device="cuda") + torch.ones(2, device="cuda:1")


@pretended
def test_a_capture_forbids_reading():
    x, y = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.add_(x)
        z = y * 2
    x.fill_(3.0)
    graph.replay()  # as the capture itself
    graph.replay()
    assert z.tolist() == [8.0, 8.0]
    for read in (lambda: x.sum().item(), x.cpu, lambda: bool(x[0] > 0), lambda: torch.ones(2).to("cuda")):
        with pytest.raises(CaptureError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            read()


# -- layers and networks ----------------------------------------------------------------------------------------

LAYERS = {
    "Conv1x1": lambda: nin.Conv1x1(6, 4, activation="relu"),
    "MLPConv": lambda: nin.MLPConv(6, (8, 4), kernel_size=3, padding=1),
    "standardised": lambda: nin.MLPConv(6, (8, 4), normalisation="weight_standardisation"),
    "Inception": lambda: nin.Inception(6, 4, 3, 5, 2, 3, 2),
    "Bottleneck": lambda: nin.Bottleneck(6, 2, 4),
    "pooling": lambda: nn.Sequential(nin.Conv1x1(6, 4), nin.GlobalAveragePooling()),
}


@pytest.mark.parametrize("layer", list(LAYERS.values()), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layers(layer, dtype):
    layer = layer().to(GPU, dtype)
    x = torch.randn(2, 6, 8, 8, device=GPU, dtype=dtype, requires_grad=True)
    layer(x).float().square().mean().backward()
    assert x.grad.is_cuda
    assert all(p.grad.is_cuda for p in layer.parameters())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast):
    layer = nin.MLPConv(6, (8, 4)).to(GPU)
    x = torch.randn(2, 6, 8, 8, device=GPU)
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    assert y.dtype == (autocast or torch.float32)
    y.float().sum().backward()


NETWORKS = {"nin_digits": (1, 8), "nin_cifar": (3, 32), "nin_imagenet": (3, 96), "googlenet": (3, 64)}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    channels, size = NETWORKS[name]
    network = nin.models.create(name, 5).to(GPU).train()
    x = torch.randn(2, channels, size, size, device=GPU)
    nn.functional.cross_entropy(network(x), torch.tensor([0, 1], device=GPU)).backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in network.parameters())
    assert network.eval().maps(x).is_cuda
    fused = nin.fuse(network).model
    torch.testing.assert_close(fused(x), network(x), rtol=1e-3, atol=1e-4)


def test_a_block_runs_its_pointwise_layers_as_operators(monkeypatch):
    """`nin.inverted_bottleneck` has no kernel for a GPU, `nin.mlpconv` has."""
    calls = []
    monkeypatch.setattr(fusion_chain, "mlpconv", lambda x, *a, **k: calls.append(x.device) or nin.mlpconv(x, *a, **k))
    monkeypatch.setattr(fusion_chain, "inverted_bottleneck", None)
    monkeypatch.setattr(fusion_chain, "PLAIN_TYPES", (*fusion_chain.PLAIN_TYPES, GPUTensor))
    layers = [nn.Conv2d(6, 9, 1), nn.Conv2d(9, 9, 3, padding=1, groups=9), nn.Conv2d(9, 4, 1)]
    norm = nn.BatchNorm2d(9).eval().to(GPU)
    x = torch.randn(2, 6, 8, 8, device=GPU)
    links = [
        conv_link(c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups) for c in nn.Sequential(*layers).to(GPU)
    ]
    links[1] = links[1]._replace(norm=Norm(norm.running_mean, norm.running_var, norm.weight, None, 1e-5))
    links = [link._replace(activation=name) for link, name in zip(links, ("hardswish", "relu6", "relu"), strict=True)]
    block = fusion_chain.Chain(("layer",) * 3, bottleneck=True)
    assert "operator" not in block.forms_for(x)
    torch.testing.assert_close(block.run(x, links), fusion_chain.run_layers(x, links), rtol=1e-4, atol=1e-5)
    assert calls == [x.device] * 2


# -- training ---------------------------------------------------------------------------------------------------


def test_evaluation(images):
    """The scores of several batches and of none are joined on one device."""
    network = nin.models.nin_digits(3).eval()
    want, _ = evaluate(network, images, device=torch.device("cpu"), dtype=torch.float32)
    scores, labels = evaluate(network.to(GPU), images, device=GPU, dtype=torch.float32)
    assert scores.device.type == labels.device.type == "cpu"
    torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-5)
    none = data.Data(**{**vars(images), "test": data.ImageSet(images.test.images[:0], images.test.labels[:0])})
    assert evaluate(network, none, device=GPU, dtype=torch.float32)[0].shape == (0, 3)


RECIPES = {
    "default": {},
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "speed": {"recipe": "speed", "dropout": 0.0, "epochs": 3},
    "speed with dropout": {"recipe": "speed", "dropout": 0.3},
    "speed in fp32": {"recipe": "speed", "dropout": 0.0, "precision": "fp32"},
    "speed with Muon": {"recipe": "speed", "dropout": 0.0, "optimizer": "muon"},
    "mirrored and shifted": {"flip": True, "shift": 1},
    "plain": {"normalisation": "none", "last_activation": "relu", "ema": 0.0},
    "second GPU": {"device": "cuda:1"},
}


@pytest.mark.parametrize("options", list(RECIPES.values()), ids=RECIPES)
def test_training(images, tmp_path, options):
    if options.get("device") == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    result = nin.train(images, config(**options), out=tmp_path / "run")
    assert next(result.model.parameters()).is_cuda
    assert 0 <= result.info.result["test_accuracy"] <= 1
    assert np.isfinite([row["train_loss"] for row in result.metrics]).all()
    # the run folder is one that every machine reads
    assert all(value.device.type == "cpu" for value in load_file(tmp_path / "run/model.safetensors").values())
    assert not isinstance(next(nin.load(tmp_path / "run").model.parameters()), GPUTensor)


def test_it_learns_as_on_the_cpu(images):
    on_gpu, on_cpu = (nin.train(images, config(device=d, precision="fp32", epochs=1)) for d in ("cuda", "cpu"))
    assert on_gpu.metrics[0]["train_loss"] == pytest.approx(on_cpu.metrics[0]["train_loss"], rel=1e-3)


def test_a_replayed_graph_learns_as_launched_steps(images, monkeypatch):
    replayed = nin.train(images, config(recipe="speed", dropout=0.0, precision="fp32", epochs=3, batch_size=32))
    monkeypatch.setattr("nin.training.step.CUDAGraphRunner", lambda function, device: function)
    launched = nin.train(images, config(recipe="speed", dropout=0.0, precision="fp32", epochs=3, batch_size=32))
    for one, other in zip(replayed.metrics, launched.metrics, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


@pytest.mark.parametrize("recipe", ["default", "speed"])
def test_resuming(images, tmp_path, recipe):
    options = {"recipe": recipe, "dropout": 0.0, "precision": "fp32"}
    whole = nin.train(images, config(**options), out=tmp_path / "whole")
    left = iter([False] * 5)
    stop = CheckpointOptions(stop=lambda: next(left, None) is not False, steps=2)
    with pytest.raises(KeyboardInterrupt):
        nin.train(images, config(**options), out=tmp_path / "run", keeping=stop)
    result = nin.train(images, config(**options), out=tmp_path / "run", keeping=CheckpointOptions(resume=True))
    for one, other in zip(result.metrics, whole.metrics, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


def test_images_that_do_not_fit_the_gpus_memory(images, monkeypatch):
    monkeypatch.setattr(batches, "MAX_HELD_BYTES", 0)
    assert nin.train(images, config(epochs=1)).info.result["test_images"] == len(images.test)


def test_an_image_folder(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20, 24), (10 * i, 90, 200 if label == "a" else 0)).save(
                tmp_path / "images" / label / f"{i}.png"
            )
    result = nin.train(tmp_path / "images", config(epochs=1, batch_size=8))
    assert result.info.classes == ("a", "b")


def test_a_network_of_ones_own_with_batch_normalisation(images):
    def network():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nin.Conv1x1(8, 3), nin.GlobalAveragePooling()
        )

    assert next(nin.train(images, config(), network=network).model.parameters()).is_cuda


def test_arrays_that_lie_on_the_gpu():
    x, y = torch.rand(40, 3, 12, 12, device=GPU), torch.arange(40, device=GPU) % 2
    result = nin.train((x, y), config(epochs=1, batch_size=8))
    assert len(result.info.classes) == 2


def test_googlenet():
    x, y = torch.randint(0, 255, (12, 3, 64, 64), dtype=torch.uint8), torch.arange(12) % 2
    nin.train((x.numpy(), y.numpy()), config(model="googlenet", epochs=1, batch_size=4))


@pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
def test_optimisers_go_on_from_a_state_of_the_cpu(make):
    options = {"momentum": 0.9} if make is sgd else {"betas": (0.9, 0.999)}

    def optimizer():
        torch.manual_seed(0)
        model, average = (
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
        )
        model, average = model.to(GPU), average.to(GPU)
        return OptimizerWithEMA(model, average, make(model, learning_rate=0.1, weight_decay=0.01, **options))

    x = torch.randn(6, 3, device=GPU)
    first, again = optimizer(), optimizer()
    for one in (first, again):
        one.step(one.model(x).square().sum(), learning_rate=0.1, gradient_clip=1.0, ema_decay=0.5)
    state = {name: value.cpu() for name, value in first.state_dict().items()}
    again.load_state_dict(state)
    for one in (first, again):
        one.step(one.model(x).square().sum(), learning_rate=0.1, gradient_clip=1.0, ema_decay=0.5)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name].cpu(), value.cpu())


# -- inference --------------------------------------------------------------------------------------------------


def test_predictions_and_maps(run):
    classifier, on_cpu = nin.load(run, device="cuda"), nin.load(run)
    x = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(classifier.scores(x), on_cpu.scores(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(classifier.score_pixels(x), on_cpu.scores(x), rtol=1e-3, atol=1e-4)
    assert classifier.confidence_maps(x, size=16).shape == (5, 10, 16, 16)
    assert classifier.predict(x.to(GPU))[0].label in classifier.classes
    assert classifier.predict([x[0].to(GPU), x[1]])[1].label in classifier.classes
    assert classifier.scores([]).shape == (0, 10)


def test_the_command_line_predicts(run, tmp_path, capsys):
    for i in range(3):
        Image.new("L", (8, 8), 80 * i).save(tmp_path / f"{i}.png")
    options = ("--device", "cuda", "--json", "--maps", str(tmp_path / "maps"), "--csv", str(tmp_path / "table.csv"))
    app.main(["predict", str(run), str(tmp_path), *options])
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 4
    assert len(list((tmp_path / "maps").iterdir())) == 3


def test_the_command_line_trains_and_reports(tmp_path, capsys):
    out = tmp_path / "run"
    app.main(
        [
            "train",
            "digits",
            "--out",
            str(out),
            "--epochs",
            "1",
            "--recipe",
            "speed",
            "--device",
            "cuda",
            "--dropout",
            "0",
        ]
    )
    assert (out / "report.html").exists()


def test_a_report(run):
    from nin.report import build_report

    report = build_report(run, device="cuda")
    assert sum(map(sum, report.confusion)) == 451


def test_the_server(run):
    with TestClient(server.create_app(run, beside=run, device="cuda"), base_url="http://localhost") as client:
        content, kind = pictures(1)[0], {"content-type": "image/png"}
        answer = client.post("/api/predict?maps=true", content=content, headers=kind).json()
        assert len(answer["predictions"][0]["probabilities"]) == 10
        for _ in range(200):
            if client.get("/api/samples").json()["state"] == "ready":
                break
        layers = client.get("/api/model").json()["layers"]
        index = next(i for i, layer in enumerate(layers) if layer["kind"] == "convolution")
        for path in ("activations", "activations?sums=true"):
            assert client.post(f"/api/layers/{index}/{path}", content=content, headers=kind).status_code == 200
        for path in (f"layers/{index}/weights", f"layers/{index}/spectrum", f"layers/{index}/narrowed?rank=2", "dead"):
            assert client.get(f"/api/{path}").status_code == 200, path


def test_cost_and_export_of_a_network_on_the_gpu(tmp_path):
    network = nin.models.nin_digits(3).to(GPU).eval()
    assert nin.cost(network, (1, 1, 8, 8)).macs == nin.cost(nin.models.nin_digits(3), (1, 1, 8, 8)).macs
    assert nin.cost(network, (1, 1, 8, 8), measured=True).measured.total.median_ms > 0
    if HAS_GPU:  # PyTorch's exporter asks a GPU that is said to be there
        assert nin.export(network, tmp_path / "network.pt2", input_shape=(1, 8, 8)).path.exists()
    assert not next(exporters._copy_network(network)[0].parameters()).is_cuda
    assert next(network.parameters()).is_cuda


def test_an_estimator(tmp_path):
    table, y = np.random.default_rng(0).normal(size=(60, 5)), np.arange(60) % 3
    estimator = nin.NiNClassifier(device="cuda", epochs=2, hidden_channels=(8,), random_state=0, batch_size=16)
    estimator.fit(table, y).partial_fit(table, y)
    assert estimator.predict_proba(table).shape == (60, 3)
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_allclose(again.predict_proba(table), estimator.predict_proba(table), rtol=1e-5)
    pictures_ = np.random.default_rng(0).integers(0, 256, (40, 8, 8)).astype(np.uint8)
    nin.NiNClassifier(device="cuda", epochs=1, flip=True, random_state=0, batch_size=8).fit(
        pictures_, np.arange(40) % 2
    )


def test_the_hub(run, tmp_path):
    from nin.hub import HubClassifier

    HubClassifier.from_run(run, images="digits", device="cuda").save_pretrained(tmp_path / "hub")
    classifier = HubClassifier.from_pretrained(tmp_path / "hub", device="cuda")
    assert classifier.predict(torch.zeros(1, 8, 8, dtype=torch.uint8, device=GPU))


def test_timm():
    timm = pytest.importorskip("timm")
    import nin.timm  # noqa: F401

    model = timm.create_model("nin_digits", num_classes=7).to(GPU).eval()
    x = torch.randn(2, 1, 8, 8, device=GPU)
    assert model(x).is_cuda
    assert model.forward_features(x).is_cuda
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("training", [False, True])
def test_the_benchmark(training, monkeypatch):
    monkeypatch.setattr(runner, "SECONDS_PER_CASE", 0.01)
    monkeypatch.setattr(runner, "SETTLE_MS", 0.0)
    case = next(name for name, c in CASES.items() if c.training == training and "NiN" not in name)
    result = runner.run([case], dtypes=["bfloat16"], engines=["nin", "eager"], device="cuda", progress=print)
    assert all(m.timing is not None for m in result.measurements)


# -- narrowing --------------------------------------------------------------------------------------------------


def residual():
    """Return a network with BatchNorm, a shortcut and a fully connected layer."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
            self.left, self.right = nn.Conv2d(12, 16, 1), nn.Conv2d(16, 12, 3, padding=1)
            self.bn2, self.head = nn.BatchNorm2d(12), nn.Linear(12, 5)

        def forward(self, x):
            x = torch.relu(self.bn(self.first(x)))
            x = torch.relu(x + self.bn2(self.right(torch.relu(self.left(x)))))
            return self.head(x.mean((2, 3)))

    return Residual().eval()


NARROWED = {"nin": lambda: nin.models.nin_digits(5).eval(), "residual": residual}


@pytest.mark.parametrize("make", list(NARROWED.values()), ids=NARROWED)
@pytest.mark.parametrize("budget", ["macs", "latency"])
def test_narrowing(make, budget, tmp_path, monkeypatch):
    measure = LatencyTable.measure
    # so small a network takes no less time when it is narrowed: measure, and go on with its multiply-accumulates
    monkeypatch.setattr(
        LatencyTable, "measure", lambda self, chain: measure(self, chain) and sum(s.macs for s in chain)
    )
    monkeypatch.setattr("nin.narrowing.latency.MODEL_SECONDS", 0.01)
    model = make().to(GPU)
    samples = [torch.randn(16, 1, 8, 8, device=GPU) for _ in range(4)]
    options = nin.NarrowOptions(cache=tmp_path / "cache.safetensors")
    for _ in range(2):  # the second time from the cache
        result = nin.narrow(
            model, samples, **{budget: 0.7}, options=options, evaluate=lambda m: float(m(samples[0]).detach().sum() > 0)
        )
        assert next(result.model.parameters()).is_cuda
        assert result.model(samples[0]).shape == (16, 5)


def test_narrowing_where_a_layer_does_not_matter():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.out = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3), nn.Conv2d(8, 3, 1)

        def forward(self, x):
            self.unused(x)
            return self.out(torch.relu(self.used(x)))  # no table of scores

    samples = [torch.randn(16, 1, 8, 8, device=GPU) for _ in range(2)]
    assert nin.narrow(Unused().eval().to(GPU), samples, macs=0.8).model(samples[0]).is_cuda


def test_fine_tuning(images):
    teacher = nin.models.nin_digits(3).to(GPU).eval()
    samples = [torch.randn(16, 1, 8, 8, device=GPU) for _ in range(4)]
    student = nin.narrow(teacher, samples, macs=0.6).model

    def epoch(number):
        for _ in range(3):
            yield torch.randn(8, 1, 8, 8), torch.arange(8) % 3  # on the CPU, as a loader gives them

    tuned = finetune(student, teacher, epoch, FinetuneConfig(epochs=1), steps_per_epoch=3)
    assert next(tuned.parameters()).is_cuda


def test_a_narrowed_run_and_its_control(run, tmp_path):
    """The control is trained on the GPU, as the run's recipe has it, and timed beside the network on the CPU."""
    digits = data.load("digits")
    few = dataclasses.replace(digits, train=data.ImageSet(digits.train.images[:256], digits.train.labels[:256]))
    config = WorkflowConfig({"macs": 0.6}, images=256, finetune=1, control=True)
    result = narrow_run(run, few, config, out=tmp_path / "narrowed")
    assert next(result.model.parameters()).is_cuda
    assert result.report.accuracy["finetuned"] > 0.5
    assert result.report.control.accuracy > 0
    # the run folder is one that every machine reads
    assert all(value.device.type == "cpu" for value in load_file(tmp_path / "narrowed/model.safetensors").values())


def test_the_command_line_narrows_where_it_is_told_to(run, tmp_path, capsys):
    """The report says which device was timed; without an option it is the GPU."""
    for options, device in (((), "cuda:0"), (("--device", "cpu"), "cpu")):
        out = tmp_path / device
        narrow = ("narrow", str(run), "--data", "digits", "--macs", "0.6", "--images", "64", "--out", str(out))
        app.main([*narrow, *options, "--json"])
        report = json.loads(capsys.readouterr().out)
        assert f" · {device} · " in report["environment"]["measured on"]
        assert f" · {device} · " in (out / "narrowing.html").read_text()
        assert report["accuracy"]["corrected"] > 0.5
    assert (
        load_file(tmp_path / "cpu/model.safetensors").keys() == load_file(tmp_path / "cuda:0/model.safetensors").keys()
    )


def test_somebodys_network_is_narrowed_on_the_gpu(images, tmp_path):
    config = WorkflowConfig({"macs": 0.6}, images=64, finetune=1)
    network, cache = nin.models.nin_digits(3).eval(), tmp_path / "cache.safetensors"
    preprocessing = choose_preprocessing(images, InputConfig(), (), ())
    out = tmp_path / "narrowed"
    result = narrow_model(network, images, config, preprocessing=preprocessing, out=out, cache=cache)
    assert next(result.model.parameters()).is_cuda
    assert result.report.accuracy["finetuned"] >= 0


def test_a_fine_tuning_goes_on_where_it_was_begun(run, images, tmp_path):
    """A plan for a latency is one for the device that it was measured on."""
    digits = data.load("digits")
    few = dataclasses.replace(digits, train=data.ImageSet(digits.train.images[:128], digits.train.labels[:128]))
    config, out = WorkflowConfig({"macs": 0.6}, images=64, finetune=2), tmp_path / "narrowed"
    tuning = []

    def stop():
        return len(tuning) > 1

    def progress(what, done, total):
        tuning.extend([done] * what.startswith("Fine-tuning"))

    keeping = CheckpointOptions(stop=stop)
    with pytest.raises(KeyboardInterrupt):
        narrow_run(run, few, config, out=out, keeping=keeping, on_progress=progress)
    with pytest.raises(UserError, match="was begun with device=cuda, now cpu: give the same, or another --out"):
        narrow_run(run, few, dataclasses.replace(config, device="cpu"), out=out)
    result = narrow_run(run, few, dataclasses.replace(config, device="cuda"), out=out)
    assert next(result.model.parameters()).is_cuda


# -- several processes ------------------------------------------------------------------------------------------


@pytest.fixture
def nccl(monkeypatch):
    """A process group of one that refuses tensors of the CPU, as NCCL does; return the number of its collectives."""
    calls = []

    def collective(*tensors):
        calls.append(len(tensors))
        for t in tensors:
            if not t.is_cuda:
                raise RuntimeError(f"No backend type associated with device type {t.device.type}")

    def all_gather(gathered, t):
        collective(t, *gathered)
        gathered[0].copy_(t)

    replacements = {
        "is_initialized": lambda: True,
        "get_backend": lambda: "nccl",
        "get_rank": lambda: 0,
        "get_world_size": lambda: 1,
        "all_reduce": collective,
        "broadcast": lambda t, source: collective(t),
        "all_gather": all_gather,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.distributed, name, replacement)
    return calls


@pretended
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_collectives_take_tensors_of_any_device(nccl, device):
    values, model = torch.arange(3.0, device=device), nn.Linear(2, 1).to(device)
    before = model.weight.detach().clone()
    total = distributed.all_reduce_sum(values)
    assert total.device == values.device
    assert total.tolist() == [0.0, 1.0, 2.0]
    distributed.broadcast_model(model)
    assert model.weight.device == values.device
    torch.testing.assert_close(model.weight.detach(), before)
    assert distributed.all_gather_text("é") == ["é"]
    assert distributed.broadcast_result(lambda: "text") == "text"
    assert len(nccl) == 1 + 2 + 2 + 2


@pretended
def test_narrowing_in_a_job_whose_backend_takes_no_tensors_of_the_cpu(nccl, run, tmp_path):
    config = WorkflowConfig({"macs": 0.6}, images=64)
    result = narrow_run(run, data.load("digits"), config, out=tmp_path / "narrowed")
    assert result.report.accuracy["corrected"] > 0.5
    assert nccl


@pretended
def test_training_in_a_job_whose_backend_takes_no_tensors_of_the_cpu(nccl, images):
    assert nin.train(images, config(epochs=1)).info.result["test_images"] == len(images.test)
    assert nccl


@pretended
def test_two_processes_on_one_gpu_are_told_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    module = importlib.import_module("torch.distributed.rendezvous")
    monkeypatch.setattr(module, "rendezvous", lambda *args, **options: iter([(None, 0, 2)]))
    monkeypatch.setattr(distributed, "_fresh_prefix_store", lambda *args: None)

    def init(backend, **options):
        assert backend == "nccl"
        assert torch.cuda.current_device() == 1
        raise torch.distributed.DistBackendError(
            "NCCL error\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
        )

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with (
        pytest.raises(UserError, match=r"process 0 of 2 shares its GPU \(cuda:1\) with another one"),
        distributed.process_group(torch.device("cuda:1")),
    ):
        pass
