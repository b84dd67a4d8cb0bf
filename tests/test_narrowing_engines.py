"""Latencies of layers in the engine that will run the network: each engine, the estimates, and what is refused."""

import dataclasses
import itertools
import json

import pytest
import torch
from torch import nn

import nin
from nin.cli import app
from nin.engines.catalog import NARROWING_ENGINES
from nin.errors import UserError
from nin.models.layer_spec import LayerSpec, factorised_layers
from nin.narrowing import NarrowOptions, knapsack, latency, pipeline, timed_engines
from nin.narrowing.calibration import measure_layer_specs
from nin.narrowing.latency import LatencyTable, ModelTimer
from nin.narrowing.latency_estimate import LatencyEstimates
from nin.narrowing.planner import Planner
from nin.narrowing.timed_engines import PyTorchEngine, make_engine
from nin.runtime import timer

LIKE = torch.zeros(1)


def engines():
    """Return a parameter for each engine; those that are not installed are skipped."""
    return pytest.mark.parametrize("name", NARROWING_ENGINES)


def installed(name):
    if name in ("onnxruntime", "openvino"):
        pytest.importorskip("onnxscript")
        pytest.importorskip(name)
    return name


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(24, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


class SamePadded(nn.Conv2d):
    """Pads by the size of its input, as TensorFlow does, where its ``padding`` is 0."""

    def forward(self, x):
        amounts = []
        for size, stride, kernel, dilation in zip(
            reversed(x.shape[2:]),
            reversed(self.stride),
            reversed(self.kernel_size),
            reversed(self.dilation),
            strict=True,
        ):
            total = max(0, (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size)
            amounts += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(x, amounts))


LAYERS = {
    "stride": nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "same": nn.Conv2d(6, 7, (3, 5), padding="same", dilation=(1, 2)),
    "reflected": nn.Conv2d(6, 8, 3, padding=(2, 1), padding_mode="reflect"),
    "circular": nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
    "depthwise": nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6, bias=False),
    "grouped": nn.Conv2d(6, 9, 5, padding=2, groups=3),
    "valid": nn.Conv2d(6, 5, 3, stride=(2, 1), padding="valid"),
    "1×1": nn.Conv2d(6, 10, 1),
    "pads itself": SamePadded(6, 8, (3, 4), stride=(2, 3), dilation=(1, 2)),
    "pads itself, larger than the image": SamePadded(6, 6, (13, 5), stride=2, groups=6),
    "pads itself, 1×1": SamePadded(6, 6, 1, stride=2),
    "dense": nn.Linear(6, 4),
    "on every pixel": nn.Linear(5, 4),
}


@engines()
def test_layers_of_every_geometry_run_in_every_engine(name):
    engine = make_engine(installed(name), LIKE, "contiguous")
    for what, layer in LAYERS.items():
        channels = layer.weight.shape[1] * getattr(layer, "groups", 1)
        x = torch.randn(2, channels, 9, 11) if isinstance(layer, nn.Conv2d) else torch.randn(2, channels)
        x = torch.randn(2, 9, channels) if what == "on every pixel" else x
        (spec,) = measure_layer_specs(layer, {"": layer}, [x]).values()
        got = engine.chain((spec,), 2)()
        # a layer without positions is timed with one
        assert tuple(got.shape) == tuple((layer(x).unsqueeze(1) if what == "dense" else layer(x)).shape), what
    conv = LayerSpec("", "conv", 6, 8, (3, 3), padding=(1, 1), input_size=(9, 9), output_size=(9, 9))
    for form, ranks in (("output", (None, 4)), ("input", (3, None)), ("tucker", (3, 4))):
        chain = factorised_layers(conv, form, *ranks, inputs=5, outputs=7)
        assert tuple(engine.chain(chain, 3)().shape) == (3, 7, 9, 9), form


@engines()
def test_a_whole_network_gives_its_answers_in_every_engine(name):
    model, x = network(), torch.randn(3, 3, 10, 10)
    bind = make_engine(installed(name), LIKE, "contiguous").network(model)
    for count in (3, 1):  # exported once, for any number of images
        with torch.inference_mode():
            got = torch.as_tensor(bind((x[:count],), {})())
        torch.testing.assert_close(got, model(x[:count]).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["pytorch", "onnxruntime"])
def test_the_report_says_in_which_engine_it_was_timed(name, monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "MODEL_SECONDS", 0.01)
    monkeypatch.setattr(latency, "LAYER_SECONDS", 0.01)
    model, batches = network(), [torch.randn(16, 3, 10, 10)]
    options = NarrowOptions(engine=installed(name), cache=tmp_path / "c.safetensors", dry_run=True, batch=2)
    result = nin.narrow(model, batches, macs=0.6, options=options)
    title = nin.engines.catalog.ENGINES[NARROWING_ENGINES[name]].title
    assert result.report.engine == title
    assert f"ms, batch 2, in {title}" in str(result.report)
    assert all(t.low_ms > 0 for pair in result.report.latency.values() for t in pair)
    (setting,) = json.loads((tmp_path / "c.latency.json").read_text())
    assert (title in setting) == (name != "pytorch")
    assert result.report.environment["measured on"] == setting
    # a budget that is no time has the same plan whatever is timed
    assert nin.narrow(model, batches, macs=0.6, options=NarrowOptions(dry_run=True)).plan == result.plan


def macs_in_layers(model, cost):
    """Return the sum of a cost over the layers of a model, as the whole model's time."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    specs = measure_layer_specs(model, layers, [torch.randn(1, 3, 12, 12)])
    total = sum(cost((spec,)) for spec in specs.values())
    return timer.Timing(total, total, total, 9)


def test_a_plan_for_a_latency_is_one_for_the_times_of_its_engine(monkeypatch):
    """The times that are asked for are the engine's: with others, other layers are cut."""

    def slow_1x1(chain):
        return sum(spec.macs * (3.0 if spec.taps == 1 else 1.0) for spec in chain)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 1)).eval()
    left = []
    for cost in (knapsack.macs, slow_1x1):
        monkeypatch.setattr(LatencyTable, "measure", lambda self, chain, cost=cost: cost(chain))
        compare = lambda self, new, n, cost=cost: (macs_in_layers(self.original, cost), macs_in_layers(new, cost))  # noqa: E731
        monkeypatch.setattr(ModelTimer, "compare", compare)
        options = NarrowOptions(dry_run=True, measure_latency=False)
        report = nin.narrow(model, [torch.randn(32, 3, 12, 12)], latency=0.6, options=options).report
        left.append({layer.name: layer.macs_after / layer.macs_before for layer in report.layers})
    assert left[1]["4"] / left[1]["2"] < 0.9 * left[0]["4"] / left[0]["2"]


def test_estimates_are_exact_where_times_are_linear_and_need_few_timings():
    measured = []

    def measure(chain):
        measured.append(chain)
        overhead = 0.7 if len(chain) > 1 else 1.0  # an engine that computes chains faster than their layers
        return overhead * sum(2.0 + spec.in_channels + 3 * spec.out_channels + 1e-4 * spec.macs for spec in chain)

    conv = LayerSpec("a", "conv", 96, 200, (3, 3), padding=(1, 1), input_size=(8, 8), output_size=(8, 8))
    depthwise = dataclasses.replace(conv, in_channels=96, out_channels=96, groups=96)
    grouped = dataclasses.replace(conv, in_channels=96, out_channels=192, groups=4)
    estimates = LatencyEstimates(measure, (conv, depthwise, grouped))
    for n, m in itertools.product((1, 5, 40, 96), (3, 64, 111, 200)):
        chain = (dataclasses.replace(conv, in_channels=n, out_channels=m),)
        assert estimates(chain) == pytest.approx(measure(chain))
    for n in (2, 30, 96):
        chain = (dataclasses.replace(depthwise, in_channels=n, out_channels=n, groups=n),)
        assert estimates(chain) == pytest.approx(measure(chain))
        chain = (dataclasses.replace(grouped, in_channels=4 * n, out_channels=8 * n),)
        assert estimates(chain) == pytest.approx(measure(chain))
    for ranks in ((20, 30), (50, 70), (17, 90)):
        chain = factorised_layers(conv, "tucker", *ranks, inputs=80, outputs=160)
        assert estimates(chain) == pytest.approx(measure(chain), rel=1e-6)
    # at the network's own numbers nothing lies between
    (own,) = {spec for (spec, *_) in measured if (spec.in_channels, spec.out_channels) == (96, 200)}
    assert own.groups == 1
    measured.clear()
    for n, m in itertools.product(range(1, 97, 5), range(1, 201, 5)):
        estimates((dataclasses.replace(conv, in_channels=n, out_channels=m),))
    assert len({(c[0].in_channels, c[0].out_channels) for c in measured}) <= 24


@pytest.mark.filterwarnings("ignore:fewer samples than values")
def test_a_plan_for_a_latency_times_few_layers_and_those_that_it_is_made_of(monkeypatch):
    timed = []

    def measure(self, chain):
        timed.append(chain)
        return knapsack.macs(chain) / 1e5 + 0.01 * len(chain)

    def compare(self, narrowed, batch):
        before, after = (nin.cost(m, (1, 3, 16, 16)).macs / 1e5 for m in (self.original, narrowed))
        return timer.Timing(before, before, before, 9), timer.Timing(after, after, after, 9)

    monkeypatch.setattr(ModelTimer, "compare", compare)
    monkeypatch.setattr(LatencyTable, "measure", measure)
    model = nin.models.nin_cifar(num_classes=10)
    options = NarrowOptions(dry_run=True, batch=1)
    result = nin.narrow(model, [torch.randn(8, 3, 16, 16)], latency=0.5, options=options)
    assert len(timed) < 250  # of some thousand candidates
    for layer in result.report.layers:
        if layer.after:
            assert layer.latency_ms_after is not None
    assert result.report.latency[1][1].low_ms <= 0.51 * result.report.latency[1][0].low_ms


def test_the_time_of_an_empty_call_is_no_layers(monkeypatch):
    class Engine(PyTorchEngine):
        empty = "empty"

        def chain(self, chain, batch):
            return chain[0].in_channels

    # of the reference, whose layer has 64 channels, and of others: as many units as channels, and 16 for each call
    ratios = {"empty": 16 / 80, 32: 48 / 80, 64: 1.0, 1: 0.1}
    monkeypatch.setattr(latency, "_steady_ratio", lambda call, reference, device: ratios[call])
    monkeypatch.setattr(latency, "_time", lambda *_: {"reference": timer.Timing(8.0, 8.0, 8.0, 9)})
    table = LatencyTable(LIKE, 1, engine=Engine(LIKE, "contiguous"))
    spec = LayerSpec("", "conv", 32, 32, (3, 3))
    assert table((spec,)) == pytest.approx(3.2)
    assert table((dataclasses.replace(spec, in_channels=1),)) == pytest.approx(8e-3)  # never nothing


@pytest.mark.parametrize(
    ("after", "spread", "reason"),
    [
        ((0.73, 0.7, 0.75), "0.69 to 0.76", "the plan kept it when it was timed; "),
        ((0.73, 0.4, 0.9), "0.40 to 0.91", "the times spread too far to tell whether it is kept; "),
        ((0.5, 0.48, 0.52), None, None),
    ],
)
def test_a_finished_network_that_misses_the_latency_says_so(after, spread, reason, monkeypatch):
    before, planned = timer.Timing(1.0, 0.99, 1.01, 9), timer.Timing(0.5, 0.5, 0.5, 9)
    monkeypatch.setattr(Planner, "_time_whole", lambda self, *_: (before, planned))
    monkeypatch.setattr(ModelTimer, "compare", lambda self, *_: (before, timer.Timing(*after, 9)))
    monkeypatch.setattr(LatencyTable, "measure", lambda self, chain: knapsack.macs(chain))
    options = NarrowOptions(dry_run=True, batch=1)
    report = nin.narrow(network(), [torch.randn(8, 3, 10, 10)], latency=0.5, options=options).report
    notes = [note for note in report.notes if "of the latency is left" in note]
    assert len(notes) == (spread is not None)
    if spread is not None:
        said = f"0.73 of the latency is left ({spread}) at batch 1, where 0.50 was asked for: {reason}"
        assert notes[0].startswith(said)


def test_while_plans_are_made_a_slow_network_is_timed_with_fewer_images(monkeypatch):
    model_timer = ModelTimer(network(), [torch.randn(8, 3, 10, 10)], "contiguous")
    for seconds, images in ((0.001, 64), (0.05, 3), (2.0, 1)):
        model_timer.__dict__["seconds_per_image"] = seconds
        assert model_timer.images_for_plan(64) == images
    assert timer.Timing(2.0, 1.0, 4.0, 9).times(3) == timer.Timing(6.0, 3.0, 12.0, 9)


@pytest.mark.parametrize(("budget", "measured"), [("macs", True), ("latency", False), ("macs", False)])
def test_an_engine_that_cannot_take_the_network_refuses_it_before_the_work(budget, measured, monkeypatch):
    class RefusingEngine(PyTorchEngine):
        def network(self, model):
            raise UserError("it cannot take this network")

    def no_analysis(*arguments, **options):
        raise AssertionError("analysed before the engine was asked")

    monkeypatch.setitem(timed_engines._ENGINES, "pytorch", RefusingEngine)
    if budget == "macs" and not measured:  # no engine is asked
        options = NarrowOptions(measure_latency=False, dry_run=True)
        assert nin.narrow(network(), [torch.randn(8, 3, 10, 10)], macs=0.6, options=options).plan.share == 0.6
        return
    monkeypatch.setattr(pipeline, "analyse", no_analysis)
    with pytest.raises(UserError, match="it cannot take this network"):
        nin.narrow(
            network(), [torch.randn(8, 3, 10, 10)], **{budget: 0.6}, options=NarrowOptions(measure_latency=measured)
        )


def test_layers_are_timed_with_the_threads_that_are_asked_for_and_fitted_with_the_others(monkeypatch):
    seen = {"timed": set(), "fitted": set()}

    def measure(self, chain):
        seen["timed"].add(torch.get_num_threads())
        return knapsack.macs(chain)

    def compare(self, new, batch):
        seen["timed"].add(torch.get_num_threads())
        return timer.Timing(1.0, 1.0, 1.0, 9), timer.Timing(0.6, 0.6, 0.6, 9)

    def fitted(*arguments, **options):
        seen["fitted"].add(torch.get_num_threads())
        return reconstruct(*arguments, **options)

    reconstruct, before = pipeline.reconstruct, torch.get_num_threads()
    monkeypatch.setattr(LatencyTable, "measure", measure)
    monkeypatch.setattr(ModelTimer, "compare", compare)
    monkeypatch.setattr(pipeline, "reconstruct", fitted)
    options = NarrowOptions(threads=before + 1, passes=1)
    report = nin.narrow(network(), [torch.randn(16, 3, 10, 10)], latency=0.6, options=options).report
    assert seen == {"timed": {before + 1}, "fitted": {before}}
    assert torch.get_num_threads() == before
    assert report.environment["threads"] == before + 1


def test_kept_latencies_are_of_one_version_of_the_operator(monkeypatch):
    settings = set()
    for version in ("1.0", "1.1"):
        monkeypatch.setattr(timed_engines, "installed_version", lambda version=version: version)
        settings.add(LatencyTable(LIKE, 2, "channels_last", engine=make_engine("nin", LIKE, "contiguous")).setting)
    assert len(settings) == 2


def test_wrong_engines_are_one_line(monkeypatch, capsys):
    with pytest.raises(UserError, match="engine must be one of pytorch, nin, onnxruntime, openvino, got 'tensorrt'"):
        NarrowOptions(engine="tensorrt")
    with pytest.raises(UserError, match="is timed in float32, got a network in float64"):
        make_engine("onnxruntime", torch.zeros(1, dtype=torch.float64), "contiguous")
    with pytest.raises(UserError, match=r"on the CPU, got a network on meta: give --device cpu"):
        make_engine("openvino", torch.zeros(1, device="meta"), "contiguous")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        app.main(["narrow", "run", "--data", "digits", "--macs", "0.5", "--engine", "openvino", "--out", "x"])
    assert (
        "engine openvino is not installed (onnx, onnxscript, onnxruntime, openvino): "
        "pip install 'network-in-network[speed]'"
    ) in capsys.readouterr().err.replace("\n", " ")


def test_a_network_that_an_engine_cannot_take_is_one_line():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) if float(x.sum()) > 0 else x

    bind = make_engine("onnxruntime", LIKE, "contiguous").network(Refuses())
    with pytest.raises(UserError, match="engine onnxruntime cannot take this network: "):
        bind((torch.randn(1, 3, 4, 4),), {})
    with pytest.raises(UserError, match="of one input, got a batch of keyword arguments"):
        bind((), {"x": torch.randn(1, 3, 4, 4)})
