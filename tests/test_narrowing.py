"""Narrowing whole networks: full rank changes nothing, budgets are kept, and every mistake is one line."""

import copy
import dataclasses
import errno
import itertools
import json
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import nin
from nin.errors import UserError
from nin.models.layer_spec import LayerSpec
from nin.models.surgery import to_plain_layers
from nin.narrowing import (
    ChannelPruning,
    FinetuneConfig,
    LayerPlan,
    NarrowOptions,
    Plan,
    analysis,
    dependency_graph,
    finetune,
    knapsack,
    latency,
    pipeline,
    recalibration,
)
from nin.narrowing.analysis import analyse
from nin.narrowing.reconstruction import reconstruct
from nin.narrowing.report import NarrowReport
from nin.narrowing.search_space import SearchSpace
from nin.runtime import timer

QUIET = NarrowOptions(measure_latency=False, revert_slower=False)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def chain():
    """Return a small network of all that thinning goes through."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(24),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.ReLU(),
        nn.Conv2d(24, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


class Residual(nn.Module):
    """A block with a shortcut, run as Python code."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.head(F.relu(y).mean((2, 3)))


def images(*shape, count=4):
    """Return batches of smooth images, whose neighbouring pixels resemble each other."""
    return [F.avg_pool2d(torch.randn(*shape[:2], *(n + 2 for n in shape[2:])), 3, 1) * 2 for _ in range(count)]


def outputs(model, batches):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return torch.cat([model(x) for x in batches])


def relative(a, b):
    return float((a - b).norm() / b.norm())


def realise(model, batches, forms=None, pruned=()):
    """Fit a plan made by hand."""
    original = to_plain_layers(model).eval()
    known = analyse(original, batches, skip=(), cache=None)
    layers = []
    for name, spec in known.specs.items():
        form = (forms or {}).get(name, ("keep", None, None))
        inputs, outs = spec.in_channels, spec.out_channels
        for t in pruned:
            inputs = t.channels if name in (t.consumer, *t.between) else inputs
            outs = t.channels if name in (t.producer, *t.between) else outs
        layers.append(LayerPlan(name, *form, inputs, outs))
    plan = Plan(tuple(layers), tuple(pruned), "macs", 0.5)
    new, errors = reconstruct(original, plan, known, batches, passes=8)
    rebuilt = nin.apply_plan(model, Plan.from_json(plan.to_json()))
    rebuilt.load_state_dict(new.state_dict())
    torch.testing.assert_close(outputs(rebuilt, batches), outputs(new, batches))
    return new, errors


CONVOLUTIONS = {
    "plain": {"padding": 1},
    "no bias": {"padding": 1, "bias": False},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("form", ["output", "input", "tucker"])
def test_full_rank_changes_nothing(options, form):
    conv = nn.Conv2d(6, 8, 3, **options)
    ranks = {"output": (None, 8), "input": (6, None), "tucker": (6, 8)}[form]
    model, batches = nn.Sequential(conv, nn.Flatten()), images(8, 6, 9, 10)
    new, errors = realise(model, batches, {"0": (form, *ranks)})
    assert relative(outputs(new, batches), outputs(model, batches)) < 1e-4
    assert errors["0"] < 1e-8
    made = new[0]
    assert [type(part) for part in made] == [nn.Conv2d] * len(made)
    wide = made[0] if form == "output" else made[1]
    for name in ("kernel_size", "stride", "dilation", "padding", "padding_mode"):
        assert getattr(wide, name) == getattr(conv, name)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_narrowed_one_by_one(groups):
    model, batches = nn.Sequential(nn.Conv2d(8, 16, 3, groups=groups), nn.Flatten()), images(16, 8, 8, 8)
    new, _ = realise(model, batches, {"0": ("output", None, 16 // groups)})
    assert relative(outputs(new, batches), outputs(model, batches)) < 1e-4
    assert [part.groups for part in new[0]] == [groups, groups]


def test_linear_layers_on_any_number_of_dimensions():
    model, batches = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)), [torch.randn(32, 7, 12)]
    new, _ = realise(model, batches, {"0": ("output", None, 12), "2": ("output", None, 12)})
    assert relative(outputs(new, batches), outputs(model, batches)) < 1e-4


def test_shared_modules_are_narrowed_once_and_everywhere():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model, batches = nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten()), images(16, 8, 6, 6)
    new, _ = realise(model, batches, {"0": ("tucker", 8, 8)})
    assert new[0] is new[2]
    assert relative(outputs(new, batches), outputs(model, batches)) < 1e-3


def test_thinning_refits_and_is_better_than_dropping():
    model, batches = chain(), images(16, 3, 16, 16)
    new, errors = realise(model, batches, pruned=[ChannelPruning("0", "3", ("1",), 10, 16)])
    assert (new[0].out_channels, new[1].num_features, new[3].in_channels) == (10, 10, 10)
    reference = outputs(model, batches)
    weights = model[3].weight.abs().sum((0, 2, 3))
    dropped = copy.deepcopy(model)
    with torch.no_grad():
        dropped[3].weight[:, weights.topk(6, largest=False).indices] = 0
    assert relative(outputs(new, batches), reference) < 0.7 * relative(outputs(dropped, batches), reference)
    assert 0 < errors["3"] < 0.5


def test_thinning_goes_through_depthwise_layers_and_flattening():
    model, batches = chain(), images(16, 3, 16, 16)
    pruned = [ChannelPruning("3", "9", ("4", "7"), 20, 24), ChannelPruning("9", "13", (), 12, 16)]
    new, _ = realise(model, batches, pruned=pruned)
    assert (new[7].groups, new[9].in_channels, new[13].in_features) == (20, 20, 12)
    assert outputs(new, batches).shape == (64, 10)
    assert relative(outputs(new, batches), outputs(model, batches)) < 0.2


def test_the_bias_is_exact():
    model, batches = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten()), [x + 3 for x in images(8, 6, 8, 8)]
    new, _ = realise(model, batches, {"0": ("output", None, 2)})
    gap = (outputs(new, batches) - outputs(model, batches)).view(-1, 8, 6, 6)
    assert gap.mean((0, 2, 3)).abs().max() < 1e-5
    assert gap.abs().max() > 1e-3


def test_a_shortcut_mends_what_came_before():
    model, batches = Residual().eval(), images(32, 3, 10, 10)
    plain, _ = realise(model, batches, {"stem": ("output", None, 6)})
    mended, _ = realise(model, batches, {"stem": ("output", None, 6), "conv2": ("output", None, 16)})
    reference = outputs(model, batches)
    assert relative(outputs(mended, batches), reference) < relative(outputs(plain, batches), reference)


@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_budgets_are_kept_and_more_of_it_is_better(budget):
    model, batches = chain(), images(16, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    used, errors = [], []
    for share in (0.9, 0.6, 0.4):
        result = nin.narrow(model, batches, **{budget: share}, options=QUIET)
        whole, left = getattr(result.report, budget)
        assert left <= share * whole
        used.append(left)
        errors.append(result.report.calibration_error)
    assert used == sorted(used, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 0.05
    assert result.report.macs[0] == nin.cost(model, (1, 3, 16, 16)).macs
    assert result.report.macs[1] == nin.cost(result.model, (1, 3, 16, 16)).macs
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_the_model_is_plain_and_loads_again(tmp_path):
    model, batches = nn.Sequential(Residual()).train(), images(32, 3, 10, 10)
    result = nin.narrow(model, batches, macs=0.5, options=QUIET)
    assert result.model.training
    assert {type(m).__module__.split(".")[0] for m in result.model.modules()} <= {"torch", __name__.split(".")[0]}
    torch.save(result.model.state_dict(), tmp_path / "weights.pt")
    plan = Plan.from_dict(json.loads(json.dumps(result.plan.to_dict())))
    assert plan == result.plan
    again = nin.apply_plan(nn.Sequential(Residual()), plan)
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    torch.testing.assert_close(outputs(again, batches), outputs(result.model, batches))


def test_torch_export_agrees():
    model, batches = Residual(), images(32, 3, 10, 10)
    new = nin.narrow(model, batches, macs=0.5, options=QUIET).model.eval()
    exported = torch.export.export(new, (batches[0],)).module()
    torch.testing.assert_close(exported(batches[0]), new(batches[0]))


def test_our_own_networks_become_plain():
    model = nin.models.nin_digits(normalisation="weight_standardisation")
    batches = images(32, 1, 8, 8)
    torch.testing.assert_close(outputs(to_plain_layers(model), batches), outputs(model, batches))
    result = nin.narrow(model, batches, macs=0.6, options=QUIET)
    assert result.report.macs[1] <= 0.6 * result.report.macs[0]
    assert not any(isinstance(m, nin.MLPConv) for m in result.model.modules())
    assert result.model.maps(batches[0]).shape == (32, 10, 4, 4)
    again = nin.apply_plan(nin.models.nin_digits(), result.plan)
    again.load_state_dict(result.model.state_dict())
    assert nin.Conv1x1(4, 6, activation="silu", bias=False).to_sequential()(torch.ones(1, 4, 2, 2)).shape == (
        1,
        6,
        2,
        2,
    )


class Branching(nn.Module):
    """Control flow that cannot be traced, a layer that is never called, and layers of other kinds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3)
        self.unused, self.up = nn.Conv2d(12, 12, 3), nn.ConvTranspose2d(12, 3, 2)
        self.line, self.tied, self.twin = nn.Conv1d(3, 3, 1), nn.Linear(12, 12), nn.Linear(12, 12)
        self.twin.weight = self.tied.weight
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)

    def forward(self, image, gain=1.0):
        y = self.b(self.a(image).relu_())
        if y.sum() > -1e9:
            y = self.deep(y)
        y = y + self.twin(self.tied(y.mT.flip(-1)[..., :1].expand(-1, -1, -1, 12)))[..., :1].mT.sum()
        return {"scores": self.line(self.up(y).flatten(2)) * gain}


def test_what_cannot_be_narrowed_is_left_with_a_reason():
    batches = [{"image": x, "gain": 2.0} for x in images(8, 3, 12, 12)]
    result = nin.narrow(Branching(), batches, macs=0.8, options=QUIET)
    reasons = {layer.name: layer.reason for layer in result.report.layers}
    assert reasons["unused"] == "never called"
    assert reasons["up"] == "a transposed convolution"
    assert reasons["line"] == "a convolution in 1 dimensions"
    assert reasons["deep"].startswith("depthwise")
    assert reasons["tied"] == reasons["twin"] == "it shares its weight with another layer"
    assert "cannot be traced" in result.report.notes[0]
    assert result.model(**batches[0])["scores"].shape == (8, 3, 81)
    assert not result.plan.pruned


@pytest.mark.parametrize(
    "pack", [lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: [x], lambda x: {"input": x}]
)
def test_batches_of_any_form(pack):
    model, batches = chain(), images(8, 3, 16, 16, count=2)
    plain = nin.narrow(model, batches, macs=0.7, options=QUIET)
    packed = nin.narrow(model, (pack(x) for x in batches), macs=0.7, options=QUIET)
    assert packed.plan == plain.plan


def test_skipped_layers_stay(tmp_path):
    options = dataclasses.replace(QUIET, cache=tmp_path / "cache.safetensors")
    model, batches = chain(), images(16, 3, 16, 16)
    for _ in range(2):  # the second time from the cache
        result = nin.narrow(model, batches, macs=0.8, skip=["3", "1?"], options=options)
        torch.testing.assert_close(result.model[3].weight, model[3].weight)
        assert result.model[13].weight.shape == (10, 16)
    assert (tmp_path / "cache.safetensors").exists()


def test_the_cache_counts_for_the_same_network_images_and_patterns_only(tmp_path, monkeypatch):
    looks = []
    collect = analysis.collect_moments
    monkeypatch.setattr(analysis, "collect_moments", lambda *args: looks.append(1) or collect(*args))
    options = dataclasses.replace(QUIET, cache=tmp_path / "cache.safetensors", dry_run=True)
    model, batches = chain(), images(16, 3, 16, 16)

    def is_found_again(network, seen, **settings):
        looks.clear()
        nin.narrow(network, seen, macs=0.8, options=options, **settings)
        return bool(looks)

    assert is_found_again(model, batches)
    assert not is_found_again(model, batches)
    assert is_found_again(model, batches, skip=["3"])
    assert is_found_again(chain(), batches, skip=["3"])
    assert is_found_again(model, images(16, 3, 16, 16), skip=["3"])
    assert is_found_again(model, batches)
    monkeypatch.setattr(analysis, "CACHE_FORMAT", analysis.CACHE_FORMAT + 1)
    assert is_found_again(model, batches)
    assert not is_found_again(model, batches)


@pytest.mark.parametrize("name", ["cache.safetensors", "cache.latency.json"])
def test_a_cache_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, name):
    def save():
        if name == "cache.latency.json":
            table = latency.LatencyTable(torch.zeros(1), 1, cache=tmp_path / name)
            table.known = {"a chain": 1.0}
            return table.save()
        return analysis._write_cache(tmp_path / name, "key", SearchSpace({}, {}), {"a": torch.zeros(1)})

    save()
    before = (tmp_path / name).read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device.*{name}"):
        save()
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_cache_gives_the_same_plan(tmp_path):
    options = dataclasses.replace(QUIET, cache=tmp_path / "cache.safetensors")
    model, batches = chain(), images(16, 3, 16, 16)
    first = nin.narrow(model, batches, macs=0.6, options=options)
    second = nin.narrow(model, batches, macs=0.6, options=options)
    assert first.plan == second.plan
    (tmp_path / "cache.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"cache.safetensors is damaged .* remove it"):
        nin.narrow(model, batches, macs=0.6, options=options)


def test_a_dry_run_plans_only():
    seen = []
    options = dataclasses.replace(QUIET, dry_run=True, on_progress=lambda what, done, total: seen.append(what))
    result = nin.narrow(chain(), images(8, 3, 16, 16), macs=0.5, options=options)
    assert result.report.macs[1] <= 0.5 * result.report.macs[0]
    assert result.report.calibration_error is None
    assert "Fitting the layers" not in seen
    assert "MACs" in str(result.report)


def test_latency_is_measured_and_reached(monkeypatch):
    monkeypatch.setattr(latency, "LAYER_SECONDS", 0.05)
    monkeypatch.setattr(latency, "MODEL_SECONDS", 0.1)
    model = nn.Sequential(nn.Conv2d(32, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.Flatten())
    told = []
    options = NarrowOptions(batch=4, on_progress=lambda what, done, total: told.append((what, done, total)))
    result = nin.narrow(model, images(8, 32, 16, 16, count=2), latency=0.6, options=options)
    # of the layers that are timed for a plan, it is known how far the planning is
    begun = "Timing layers, plan 1 of at most 5, "
    steps = [(done, total) for what, done, total in told if what.startswith(begun) and "draft" not in what]
    assert steps
    assert steps == sorted(steps)
    assert all(done < total for done, total in steps)
    before, after = result.report.latency[4]
    # the plan keeps the budget by what was measured for it; beside other programs two timings differ
    assert after.low_ms <= 1.25 * 0.6 * before.low_ms
    assert set(result.report.latency) == {1, 4, 8}
    assert any(layer.latency_ms_after for layer in result.report.layers)


def test_accuracy_is_reported_at_every_stage(monkeypatch):
    model, batches = chain(), images(8, 3, 16, 16)
    wanted = outputs(model, batches)

    def recalibrate(narrowed, original, batches):
        corrected = copy.deepcopy(narrowed)
        with torch.no_grad():
            corrected[13].bias += 1
        return corrected, 0.25, True

    def evaluate(network):
        return relative(outputs(network, batches), wanted)

    monkeypatch.setattr(pipeline, "recalibrate_if_better", recalibrate)
    result = nin.narrow(model, batches, macs=0.6, evaluate=evaluate, skip=["13"], options=QUIET)
    accuracy = result.report.accuracy
    assert list(accuracy) == ["original", "raw", "corrected"]
    assert 0 == accuracy["original"] < accuracy["raw"] < accuracy["corrected"] == evaluate(result.model)
    assert result.report.calibration_error == 0.25
    assert json.loads(json.dumps(result.report.to_dict()))["accuracy"] == accuracy


def test_batchnorm_statistics_are_the_average_over_the_images_and_kept_where_they_help():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    batches = [5 + 3 * torch.randn(8, 3, 6, 6) for _ in range(3)]
    again = recalibration.recalibrate_batchnorm(model, batches)
    given = torch.stack([model[0](x).detach() for x in batches])
    torch.testing.assert_close(again[1].running_mean, given.mean((0, 1, 3, 4)))
    torch.testing.assert_close(again[1].running_var, torch.stack([y.var((0, 2, 3)) for y in given]).mean(0))
    assert (again[1].momentum, again.training, again[1].training) == (0.1, False, False)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    # a network whose convolution was changed comes nearer to the one it was, and one that was not does not
    changed = copy.deepcopy(again)
    with torch.no_grad():
        changed[0].weight *= 2
    mended, error, kept = recalibration.recalibrate_if_better(changed, again, batches)
    assert kept
    assert error < 0.1 * recalibration.calibration_error(changed, again, batches)
    torch.testing.assert_close(mended[1].running_mean, changed[0](torch.cat(batches)).mean((0, 2, 3)).detach())
    same, error, kept = recalibration.recalibrate_if_better(again, again, batches)
    assert (same is again, error, kept) == (True, 0.0, False)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give exactly one of macs, latency and parameters, got none"),
        ({"macs": 0.5, "latency": 0.5}, "give exactly one of macs, latency and parameters, got macs=0.5, latency=0.5"),
        ({"macs": 1.0}, "macs must be a share of the original's, above 0 and below 1, got 1.0"),
        ({"parameters": True}, "parameters must be a share .* got True"),
    ],
)
def test_wrong_budgets_are_one_line(budget, message):
    with pytest.raises(ValueError, match=message):
        nin.narrow(chain(), images(8, 3, 16, 16), **budget)


def test_a_latency_that_is_not_reached_leaves_the_fastest_and_says_so(monkeypatch):
    def nine_tenths(self, narrowed, batch):
        return timer.Timing(10.0, 9.9, 10.1, 9), timer.Timing(9.0, 8.9, 9.1, 9)

    monkeypatch.setattr(latency.ModelTimer, "compare", nine_tenths)
    monkeypatch.setattr(latency.LatencyTable, "measure", lambda self, layers: knapsack.macs(layers))
    result = nin.narrow(chain(), images(8, 3, 16, 16), latency=0.2, options=NarrowOptions(revert_slower=False))
    assert "The latency asked for, 0.20 of the original's, was not reached: 0.90." in result.report.notes


def test_a_latency_that_is_more_than_kept_gives_channels_back(monkeypatch):
    model, batches = chain(), images(8, 3, 16, 16)
    whole, shares = nin.cost(model, (1, 3, 16, 16)).macs, []

    def squared(self, narrowed, batch):  # as where what is left also runs better than the table says
        shares.append((nin.cost(narrowed, (1, 3, 16, 16)).macs / whole) ** 2)
        return timer.Timing(1.0, 1.0, 1.1, 9), timer.Timing(shares[-1], shares[-1], 9.9, 9)

    monkeypatch.setattr(latency.ModelTimer, "compare", squared)
    monkeypatch.setattr(latency.LatencyTable, "measure", lambda self, layers: knapsack.macs(layers))
    report = nin.narrow(model, batches, latency=0.5, options=NarrowOptions(measure_latency=False)).report
    assert shares[0] < 0.26
    assert 0.4 < (report.macs[1] / report.macs[0]) ** 2 <= 0.51
    assert len(shares) <= 5


def test_no_layer_is_left_slower_than_before_where_the_budget_allows_it(monkeypatch):
    def measure(self, layers):  # a second layer costs as much as many products, so large ranks do not pay
        return knapsack.macs(layers) + 60_000 * (len(layers) - 1)

    monkeypatch.setattr(latency.LatencyTable, "measure", measure)
    model, batches = chain(), images(16, 3, 16, 16)
    options = NarrowOptions(thin=False, renormalise=False, revert_slower=True)
    slow = nin.narrow(model, batches, macs=0.55, options=dataclasses.replace(options, revert_slower=False)).report
    mended = nin.narrow(model, batches, macs=0.55, options=options).report
    assert any(layer.latency_ms_after > layer.latency_ms_before for layer in slow.layers if layer.latency_ms_after)
    changed = [layer for layer in mended.layers if layer.latency_ms_after]
    assert changed
    assert all(layer.latency_ms_after <= layer.latency_ms_before for layer in changed)
    assert 0.97 * 0.55 * mended.macs[0] <= mended.macs[1] <= 0.55 * mended.macs[0]
    assert mended.predicted_loss < 1.2 * slow.predicted_loss
    assert any("as they were measured slower: 0." in note for note in mended.notes)


def test_layers_that_the_budget_needs_stay_though_slower_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr(latency.LatencyTable, "measure", lambda self, layers: 1e9 - knapsack.macs(layers))
    options = NarrowOptions(revert_slower=True)
    report = nin.narrow(chain(), images(16, 3, 16, 16), macs=0.6, options=options).report
    assert report.macs[1] <= 0.6 * report.macs[0]
    assert any(note.startswith("Slower than before, but the budget needs them: ") for note in report.notes)


@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_a_budget_that_is_no_time_gives_the_same_plan_whatever_the_clock_says(kind, monkeypatch):
    clock = random.Random(0)
    monkeypatch.setattr(latency.LatencyTable, "measure", lambda self, layers: clock.random())
    model, batches = chain(), images(16, 3, 16, 16)
    results = [nin.narrow(model, batches, **{kind: 0.6}) for _ in range(2)]
    assert results[0].plan == results[1].plan
    for name, values in results[0].model.state_dict().items():
        assert torch.equal(values, results[1].model.state_dict()[name]), name


class Halved(nn.Module):
    """Two convolutions between which nothing can be pruned."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 10, 1)

    def forward(self, image):
        return self.b((self.a(image) * 0.5).relu()).mean((2, 3))


SINGLE = {
    "1×1": (lambda: nn.Sequential(nn.Conv2d(256, 256, 1), nn.Flatten()), (256, 4, 4)),
    "3×3": (lambda: nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Flatten()), (32, 8, 8)),
    "dense": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 300), nn.ReLU(), nn.Linear(300, 10)), (3, 8, 8)),
}
NETWORKS = {
    **SINGLE,
    "halved": (Halved, (3, 12, 12)),
    "chain": (chain, (3, 16, 16)),
    "residual": (Residual, (3, 10, 10)),
    "nin_digits": (nin.models.nin_digits, (1, 8, 8)),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), (3, 32, 32)),
}


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:fewer samples than values")
def test_the_budget_is_spent_or_the_report_says_why_not(name, kind, tmp_path):
    make, shape = NETWORKS[name]
    model, batches = make().eval(), images(16, *shape, count=2)
    options = dataclasses.replace(QUIET, dry_run=True, cache=tmp_path / "cache.safetensors")
    losses = []
    for share in (0.97, 0.9, 0.8, 0.65, 0.5):
        report = nin.narrow(model, batches, **{kind: share}, options=options).report
        before, after = getattr(report, kind)
        assert after <= share * before
        if after < 0.97 * share * before:
            assert any(
                f"{after / before:.3f} of the" in note and f"{share:.3f} was asked" in note for note in report.notes
            )
        assert after >= 0.85 * share * before  # one channel or rank more is a large step in the smallest of them
        losses.append(report.predicted_loss)
    assert losses == sorted(losses)


def test_layers_that_lose_nothing_keep_what_the_budget_leaves_them():
    # two images tell little of a layer: most directions of its output are zero in them and matter in others
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 9, 1)).eval()
    with pytest.warns(UserWarning, match="fewer samples than values in 2 layers"):
        report = nin.narrow(model, images(2, 3, 8, 8, count=1), macs=0.9, options=QUIET).report
    assert 0.97 * 0.9 * report.macs[0] <= report.macs[1] <= 0.9 * report.macs[0]


@pytest.mark.parametrize("milliseconds", [lambda chain: 1.0 * len(chain), lambda chain: 1e9 - knapsack.macs(chain)])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_a_slower_layer_does_not_become_a_cheaper_one_that_is_slower_still(share, milliseconds, monkeypatch):
    monkeypatch.setattr(latency.LatencyTable, "measure", lambda self, layers: milliseconds(layers))
    model, batches = Halved().eval(), images(16, 3, 16, 16)
    # pruning adds no layers, so that none would be slower
    quiet = nin.narrow(model, batches, macs=share, options=dataclasses.replace(QUIET, thin=False)).report
    report = nin.narrow(model, batches, macs=share, options=NarrowOptions(thin=False, revert_slower=True)).report
    assert 0.95 * quiet.macs[1] <= report.macs[1] <= share * report.macs[0]
    assert report.calibration_error <= 1.5 * quiet.calibration_error
    slower = [layer.name for layer in report.layers if layer.after and layer.latency_ms_after > layer.latency_ms_before]
    needed = [note for note in report.notes if note.startswith("Slower than before, but the budget needs them: ")]
    assert slower
    assert needed == [f"Slower than before, but the budget needs them: {', '.join(slower)}."]


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.4])  # how the whole network's time goes with that of its layers
def test_latency_budgets_are_spent(share, exponent, monkeypatch):
    model, batches = chain(), images(8, 3, 16, 16)
    whole = nin.cost(model, (1, 3, 16, 16)).macs

    def compare(self, narrowed, batch):
        reached = (nin.cost(narrowed, (1, 3, 16, 16)).macs / whole) ** exponent
        return timer.Timing(1.0, 1.0, 1.1, 9), timer.Timing(reached, reached, reached, 9)

    monkeypatch.setattr(latency.ModelTimer, "compare", compare)
    monkeypatch.setattr(latency.LatencyTable, "measure", lambda self, layers: knapsack.macs(layers))
    report = nin.narrow(model, batches, latency=share, options=NarrowOptions(dry_run=True, batch=1)).report
    reached = report.latency[1][1].low_ms
    assert reached <= 1.02 * share
    assert reached >= 0.95 * share or any(f"{reached:.2f} of the latency is left" in note for note in report.notes)


def test_a_network_that_every_plan_makes_slower_is_left_as_it_was(monkeypatch):
    def compare(self, narrowed, batch):
        return timer.Timing(1.0, 1.0, 1.1, 9), timer.Timing(1.3, 1.3, 1.4, 9)

    monkeypatch.setattr(latency.ModelTimer, "compare", compare)
    monkeypatch.setattr(latency.LatencyTable, "measure", lambda self, layers: knapsack.macs(layers))
    model, batches = chain(), images(8, 3, 16, 16)
    result = nin.narrow(model, batches, latency=0.7)
    torch.testing.assert_close(outputs(result.model, batches), outputs(model, batches), rtol=0, atol=0)
    assert any("no plan is faster than the original, which is left as it is (1.30)" in n for n in result.report.notes)
    # and a budget of products says that the time has grown
    report = nin.narrow(model, batches, macs=0.7, options=NarrowOptions(batch=2)).report
    assert any(n.startswith("Slower than before, 1.000 → 1.300 ms with 1 at a time, ") for n in report.notes)


def test_mistakes_are_one_line():
    model, batches = chain(), images(8, 3, 16, 16)
    with pytest.raises(UserError, match=r"must have a convolution or fully connected layer to narrow, got one without"):
        nin.narrow(nn.ReLU(), batches, macs=0.5)
    with pytest.raises(UserError, match=r"got 1 that cannot be \(0: a convolution in 1 dimensions\)"):
        nin.narrow(nn.Sequential(nn.Conv1d(3, 3, 1)), [torch.randn(2, 3, 4)], macs=0.5)
    with pytest.raises(UserError, match=r"must be at least 0\.\d+ of the original, got 0\.001"):
        nin.narrow(model, batches, macs=0.001, options=QUIET)
    with pytest.raises(UserError, match="batches must hold at least one batch"):
        nin.narrow(model, [], macs=0.5)
    with pytest.raises(UserError, match="a batch must be a tensor"):
        nin.narrow(model, ["image.png"], macs=0.5)
    with pytest.raises(UserError, match=r"skip must match a layer's name, got 'layer9\.\*'; layers are 0, 3, 7, 9, 13"):
        nin.narrow(model, batches, macs=0.5, skip=["layer9.*"])
    with pytest.raises(ValueError, match="layout must be 'contiguous' or 'channels_last', got 'NHWC'"):
        NarrowOptions(layout="NHWC")


def test_values_that_are_not_finite_name_the_layer():
    model = chain()
    with torch.no_grad():
        model[3].weight[0] = float("nan")
    with pytest.raises(UserError, match="the result of 3 must be finite, got NaN or infinity"):
        nin.narrow(model, images(8, 3, 16, 16), macs=0.5)


def test_values_whose_squares_are_not_finite_name_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()).double().eval()
    with torch.no_grad():
        model[0].weight *= 1e160
    with pytest.raises(UserError, match="the covariances of 2 must be finite, got NaN or infinity"):
        nin.narrow(model, [torch.randn(16, 3, 10, 10).double()], macs=0.7)


def test_the_error_is_measured_on_images_that_were_not_fitted():
    # as many images as a layer has inputs: fitted to them it looks exact, and is not
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).eval()
    fitted, other = torch.randn(30, 24), torch.randn(40, 24)
    fit = nin.narrow(model, fitted, macs=0.5, options=QUIET)
    assert fit.report.error_measured_on == "the 30 images of the fit"
    for few in ([], [other[:15]]):
        again = nin.narrow(model, [fitted], macs=0.5, options=dataclasses.replace(QUIET, held_out=few)).report
        assert (again.calibration_error, again.error_measured_on) == (
            fit.report.calibration_error,
            "the 30 images of the fit",
        )
    unseen = nin.narrow(
        model, [fitted], macs=0.5, options=dataclasses.replace(QUIET, held_out=iter([other[:20], other[20:]]))
    )
    assert unseen.plan == fit.plan
    wanted = [outputs(model, [part]) for part in (other[:20], other[20:])]
    distance = (outputs(unseen.model, [other]) - torch.cat(wanted)).square().sum()
    variance = (torch.cat(wanted) - torch.cat(wanted).mean(0)).square().sum()
    assert unseen.report.calibration_error == pytest.approx(float(distance / variance), rel=1e-4)
    assert unseen.report.calibration_error > fit.report.calibration_error
    assert "of its variance, on 40 images that nothing was fitted to" in str(unseen.report)
    assert NarrowReport.from_dict(json.loads(json.dumps(unseen.report.to_dict()))) == unseen.report
    # as an earlier version kept it
    before = {k: v for k, v in unseen.report.to_dict().items() if k != "error_measured_on"}
    assert "of its variance\n" in str(NarrowReport.from_dict(before))
    with pytest.raises(UserError, match="held_out must be a list or loader of batches, got str"):
        nin.narrow(model, fitted, macs=0.5, options=dataclasses.replace(QUIET, held_out="images"))


@pytest.mark.parametrize("sizes", [[40], [2] * 20, [1] * 40, [39, 1]])
def test_the_error_does_not_depend_on_how_images_are_batched(sizes):
    torch.manual_seed(4)
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    x = torch.randn(40, 5) + 3
    wanted, given = (m(x).detach().double() for m in (model, other))
    fraction = (wanted - given).square().sum() / (wanted - wanted.mean(0)).square().sum()
    error = recalibration.calibration_error(other, model, list(x.split(sizes)))
    assert error == pytest.approx(float(fraction), rel=1e-6)


def test_the_error_of_maps_of_several_sizes_is_about_the_mean_of_each_size():
    torch.manual_seed(5)
    model, other = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
    batches = [torch.randn(3, 2, 4, 4), torch.randn(2, 2, 6, 5), torch.randn(4, 2, 4, 4)]
    alike = [torch.cat([batches[0], batches[2]]), batches[1]]
    with torch.no_grad():
        apart = sum((model(x) - other(x)).double().square().sum() for x in alike)
        variance = sum((model(x) - model(x).mean(0)).double().square().sum() for x in alike)
    error = recalibration.calibration_error(other, model, batches)
    assert error == pytest.approx(float(apart / variance), rel=1e-5)


def test_few_images_are_warned_of():
    with pytest.warns(
        UserWarning, match=r"^fewer samples than values in \d layers?: \d+ has \d+ samples of \d+ values"
    ):
        result = nin.narrow(chain(), [torch.randn(4, 3, 16, 16)], macs=0.7, options=QUIET)
    assert torch.isfinite(outputs(result.model, images(4, 3, 16, 16))).all()


def test_plans_that_do_not_fit_are_refused():
    result = nin.narrow(chain(), images(8, 3, 16, 16), macs=0.6, options=QUIET)
    with pytest.raises(ValueError, match="plan does not fit the model: it has no layer 3"):
        nin.apply_plan(chain()[:2], result.plan)
    with pytest.raises(ValueError, match="format_version must be 1, got 9: update nin"):
        nin.apply_plan(chain(), {**result.plan.to_dict(), "format_version": 9})
    with pytest.raises(ValueError, match=r"plan must be what Plan\.to_dict or to_json wrote: it lacks layers"):
        nin.apply_plan(chain(), {"format_version": 1})
    with pytest.raises(ValueError, match=r"plan must be what Plan\.to_dict or to_json wrote: it lacks format_version"):
        nin.apply_plan(chain(), "{}")
    with pytest.raises(ValueError, match=r"plan must be the JSON that Plan\.to_json wrote: Expecting value"):
        nin.apply_plan(chain(), "plan.json")
    with pytest.raises(ValueError, match=r"plan must be a Plan, or what its to_dict or to_json gave, got NoneType"):
        nin.apply_plan(chain(), None)
    values = result.plan.to_dict()
    values["layers"][0]["form"] = "cube"
    with pytest.raises(ValueError, match="the form of 0 must be one of keep, output, input, tucker, got 'cube'"):
        nin.apply_plan(chain(), values)


def test_plans_are_written_as_in_the_first_version():
    text = (
        '{"format_version": 1, "layers": [{"name": "0", "form": "keep", "rank_in": null, "rank_out": null, '
        '"inputs": 3, "outputs": 10, "dtype": "float32", "reason": ""}], "thinned": [{"producer": "0", '
        '"consumer": "3", "between": ["1"], "channels": 10, "before": 16}], "budget": "macs", "share": 0.5, '
        '"layout": "contiguous"}'
    )
    plan = Plan.from_json(text)
    assert plan.pruned == (ChannelPruning("0", "3", ("1",), 10, 16),)
    assert plan.to_json() == text


class TheirLinear(nn.Linear):
    """A subclass, as timm has one."""


def test_subclasses_stay_and_the_plan_still_fits():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(*chain()[:13], TheirLinear(16, 10))

    result = nin.narrow(make(), images(16, 3, 16, 16), macs=0.7, options=QUIET)
    assert {layer.name: layer.reason for layer in result.report.layers}[
        "13"
    ] == "a TheirLinear, whose forward may differ"
    nin.apply_plan(make(), result.plan).load_state_dict(result.model.state_dict())
    layers = tuple(dataclasses.replace(layer, form="output", rank_out=2) for layer in result.plan.layers)
    with pytest.raises(ValueError, match="13 is a TheirLinear, whose forward may differ"):
        nin.apply_plan(make(), dataclasses.replace(result.plan, layers=layers[-1:], pruned=()))


def test_an_activation_that_serves_two_places_does_not_hide_the_channels():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 16, 3), relu, nn.Conv2d(16, 8, 3), relu, nn.Flatten())
    edges = dependency_graph.build_dependency_graph(model, {"0", "2"}).groups
    assert [group.key for group in edges] == [("0", "2")]


@pytest.mark.parametrize("name", [pytest.param("mobilenet_v2", marks=pytest.mark.slow), "shufflenet_v2_x0_5"])
@pytest.mark.filterwarnings("ignore:fewer samples than values")
def test_networks_of_torchvision(name):
    def make():
        torch.manual_seed(0)
        options = {"width_mult": 0.35} if name == "mobilenet_v2" else {}
        return torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()

    model, batches = make(), images(8, 3, 32, 32, count=2)
    result = nin.narrow(model, batches, macs=0.7, options=dataclasses.replace(QUIET, passes=4))
    assert result.report.macs[1] <= 0.7 * result.report.macs[0]
    assert outputs(result.model, batches).shape == outputs(model, batches).shape
    again = nin.apply_plan(make(), result.plan)
    again.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(outputs(again, batches), outputs(result.model, batches), rtol=0, atol=0)
    new = result.model.eval()
    torch.testing.assert_close(torch.export.export(new, (batches[0],)).module()(batches[0]), new(batches[0]))


def test_the_curve_shares_what_was_measured(tmp_path):
    options = NarrowOptions(budgets=(0.8, 0.5), batch=2, cache=tmp_path / "found.safetensors")
    model, batches = chain(), images(16, 3, 16, 16)
    result = nin.narrow(model, batches, macs=0.6, evaluate=lambda m: 0.5, options=options)
    assert [point.share for point in result.report.curve] == [0.8, 0.6, 0.5]
    assert result.report.macs[1] == result.report.curve[1].macs
    tables = json.loads((tmp_path / "found.latency.json").read_text())
    assert len(tables) == 1
    measured = dict(next(iter(tables.values())))
    nin.narrow(model, batches, macs=0.6, options=dataclasses.replace(options, budgets=()))
    again = json.loads((tmp_path / "found.latency.json").read_text())
    assert measured.items() <= next(iter(again.values())).items()
    (tmp_path / "found.latency.json").write_text("no table")
    nin.narrow(model, batches, macs=0.6, options=dataclasses.replace(options, budgets=()))
    with pytest.raises(ValueError, match="budgets must be a share of the original's"):
        NarrowOptions(budgets=(0.5, 1.0))


def test_few_steps_of_fine_tuning_are_small():
    assert [FinetuneConfig().peak_learning_rate(steps) for steps in (30, 100, 5000)] == pytest.approx(
        [3e-4, 1e-3, 1e-3]
    )
    assert FinetuneConfig(learning_rate=0.002).peak_learning_rate(3) == 0.002


def test_finetuning_brings_a_factorised_network_back():
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), *head
    ).eval()
    batches = images(32, 3, 10, 10)
    new, _ = realise(model, batches, {"2": ("tucker", 3, 3), "4": ("tucker", 3, 3)})
    wanted = outputs(model, batches)
    before = relative(outputs(new, batches), wanted)
    config = FinetuneConfig(epochs=10, precision="fp32")
    told = []
    finetune(
        new,
        model,
        lambda epoch: [(x, None) for x in batches],
        config,
        steps_per_epoch=4,
        on_progress=lambda *a: told.append(a),
    )
    assert told[-1][:2] == (40, 40)
    assert relative(outputs(new, batches), wanted) < before


def test_channels_of_our_own_networks_can_be_left_out():
    for model in (nin.models.nin_digits(), nin.models.nin_cifar()):
        plain = to_plain_layers(model)
        names = [name for name, module in plain.named_modules() if isinstance(module, nn.Conv2d)]
        graph = dependency_graph.build_dependency_graph(plain, set(names))
        assert graph.problem is None
        assert [group.key for group in graph.groups] == list(itertools.pairwise(names))


def test_a_layers_time_is_the_same_on_a_busy_machine(monkeypatch):
    """Other load slows a layer and the reference that is timed in turn with it."""
    source, load = random.Random(0), [1.0]

    def seconds(call, times):
        load[0] = max(1.0, load[0] + source.uniform(-0.2, 0.2))
        return times * load[0] * (0.003 if call() == "layer" else 0.001)

    monkeypatch.setattr(latency, "_synchronised", lambda call, device: call)
    monkeypatch.setattr(latency, "_seconds", seconds)
    ratio = latency._steady_ratio(lambda: "layer", lambda: "reference", torch.device("cpu"))
    assert ratio == pytest.approx(3.0, rel=0.05)


def test_wide_layers_are_timed_with_fewer_images_and_scaled(monkeypatch):
    table, seen = latency.LatencyTable(torch.zeros(1), 64), []

    def ratio(call, reference, device):
        seen.append(call())
        return 2.0

    monkeypatch.setattr(latency, "_steady_ratio", ratio)
    monkeypatch.setattr(latency, "_time", lambda *_: {"reference": timer.Timing(1.0, 0.5, 1.5, 9)})
    spec = LayerSpec("a", "conv", 32, 32, (3, 3), padding=(1, 1), input_size=(64, 64), output_size=(64, 64))
    images_timed = math.ceil(latency.TIMED_MACS / spec.macs)
    assert 1 < images_timed < 64
    assert table((spec,)) == pytest.approx(2.0 * 0.5 * 64 / images_timed)
    assert seen[0].shape == (images_timed, 32, 64, 64)
    small = dataclasses.replace(spec, input_size=(4, 4), output_size=(4, 4))
    assert table((small,)) == 1.0
    assert seen[1].shape[0] == 64
    assert table.forget([(dataclasses.replace(small, name="another"),)]) == {latency._key((small,)): 1.0}


def test_a_plan_made_in_a_busy_moment_is_made_again(monkeypatch):
    model, batches, busy, told = chain(), images(8, 3, 16, 16), [True], []

    def measure(self, layers):
        thinner = len(layers) == 1 and layers[0].out_channels < 20
        return knapsack.macs(layers) * (3.0 if busy[0] and thinner else 1.0)

    def compare(self, narrowed, batch):
        busy[0] = False  # the moment is over
        before, after = (float(nin.cost(m, (1, 3, 16, 16)).macs) for m in (model, narrowed))
        return timer.Timing(before, before, before, 9), timer.Timing(after, after, after, 9)

    monkeypatch.setattr(latency.ModelTimer, "compare", compare)
    monkeypatch.setattr(latency.LatencyTable, "measure", measure)
    options = NarrowOptions(dry_run=True, batch=1, on_progress=lambda what, done, total: told.append(what))
    report = nin.narrow(model, batches, latency=0.6, options=options).report
    assert any("of the plan again" in what for what in told)
    before, after = report.latency[1]
    assert 0.9 * 0.6 <= after.low_ms / before.low_ms <= 1.02 * 0.6


class InvertedBottleneck(nn.Module):
    """Expand, depthwise, squeeze-and-excitation, project, and the shortcut; channels from `alive` on do not matter."""

    def __init__(self, alive=32):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.expand, self.norm1 = nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.depthwise, self.norm2 = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.reduce, self.gate = nn.Conv2d(32, 6, 1), nn.Conv2d(6, 32, 1)
        self.project, self.norm3 = nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.reduce.weight[:, alive:] = 0
            self.project.weight[:, alive:] = 0
            for norm in (self.norm1, self.norm2, self.norm3):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)

    def forward(self, image):
        x = self.stem(image)
        y = F.hardswish(self.norm1(self.expand(x)))
        y = self.norm2(self.depthwise(y)).relu()
        factor = F.relu(self.reduce(y.mean((2, 3), keepdim=True)))
        y = y * torch.sigmoid(self.gate(factor))
        return self.head((self.norm3(self.project(y)) + x).mean((2, 3)))


def test_the_hidden_width_of_an_inverted_bottleneck_with_squeeze_and_excitation_is_pruned():
    model, batches = InvertedBottleneck(alive=20).eval(), images(32, 3, 10, 10)
    options = dataclasses.replace(QUIET, factorise=False)
    result = nin.narrow(model, batches, macs=0.66, options=options)
    (pruned,) = result.plan.pruned
    assert (pruned.producer, pruned.consumer) == ("expand", "project")
    assert pruned.between == ("norm1", "depthwise", "norm2")
    assert (pruned.readers, pruned.gates) == (("reduce",), ("gate",))
    assert 20 <= pruned.channels < 26
    narrowed = result.model
    widths = (narrowed.reduce.in_channels, narrowed.gate.out_channels, narrowed.depthwise.groups)
    assert widths == (pruned.channels,) * 3
    # only channels that do not matter are gone, so the answers are the same
    torch.testing.assert_close(outputs(narrowed, batches), outputs(model, batches), atol=1e-3, rtol=1e-3)
    again = nin.apply_plan(InvertedBottleneck(), result.plan.to_json())
    again.load_state_dict(narrowed.state_dict())
    torch.testing.assert_close(outputs(again.eval(), batches), outputs(narrowed, batches))
    # where all matter, the first layer of the gate is fitted to what is left
    model = InvertedBottleneck().eval()
    fitted = nin.narrow(model, batches, macs=0.66, options=options)
    assert fitted.report.calibration_error < 0.2


class Streams(nn.Module):
    """Sums, a concatenation of maps with what a depthwise layer makes of them, and a shortcut padded with zeros.

    Of the stream of 12 channels, of the first halves and of the second stream, those from a multiple of `alive` on do
    not matter.
    """

    def __init__(self, alive=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.primary, self.norm1 = nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.cheap, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.wide, self.norm3 = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.reduce, self.gate = nn.Conv2d(32, 4, 1, bias=False), nn.Conv2d(4, 32, 1)
        self.project, self.norm4 = nn.Conv2d(32, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.down, self.norm5 = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            for layer in (self.primary, self.down):
                layer.weight[:, round(12 * alive) :] = 0
            for layer in (self.reduce, self.project):
                layer.weight[:, round(16 * alive) : 16] = layer.weight[:, 16 + round(16 * alive) :] = 0
            self.head.weight[:, 2 + round(12 * alive) : 14] = 0
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)

    def forward(self, image):
        x = self.norm(self.stem(image)).relu()
        first = F.relu(self.norm1(self.primary(x)))
        y = torch.cat([first, F.relu(self.norm2(self.cheap(first)))], dim=1)[:, :32, :, :]
        y = self.norm3(self.wide(y))
        y = y * torch.sigmoid(self.gate(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        x = x + self.norm4(self.project(y))
        y = self.norm5(self.down(x))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def test_what_is_added_padded_and_concatenated_is_one_group():
    model = Streams().eval()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    stream, halves = dependency_graph.build_dependency_graph(model, names).groups
    assert stream.key == ("stem", "primary")
    assert stream.consumers == ("primary", "down", "head")
    assert stream.writers == ("project", "down")
    assert stream.between == ("norm", "norm4", "norm5")
    assert stream.inputs["head"] == stream.outputs["down"] == tuple((channel + 2,) for channel in range(12))
    assert halves.key == ("primary", "project")
    assert (halves.readers, halves.gates) == (("reduce",), ("gate",))
    assert halves.outputs["primary"] == halves.outputs["cheap"] == tuple((channel,) for channel in range(16))
    both = tuple((channel, 16 + channel) for channel in range(16))
    assert (
        halves.inputs["reduce"] == halves.inputs["project"] == halves.outputs["wide"] == halves.outputs["gate"] == both
    )
    # a layer that may not be changed keeps the channels of all that it is added to, or takes
    for kept in ("stem", "head", "project"):
        groups = dependency_graph.build_dependency_graph(model, names - {kept}).groups
        assert "stem" not in {group.producer for group in groups}
    assert len(dependency_graph.build_dependency_graph(model, names - {"gate"}).groups) == 1


@pytest.mark.parametrize("budget", [{"macs": 0.55}, {"parameters": 0.45}])
def test_channels_that_many_layers_share_are_pruned(budget):
    model, batches = Streams(alive=0.5).eval(), images(32, 3, 10, 10)
    options = dataclasses.replace(QUIET, factorise=False)
    result = nin.narrow(model, batches, **budget, options=options)
    stream, halves = result.plan.pruned
    assert (stream.producer, halves.producer) == ("stem", "primary")
    assert 6 <= stream.channels < 10
    assert 8 <= halves.channels < 13
    narrowed = result.model
    assert narrowed.stem.out_channels == narrowed.project.out_channels == narrowed.norm4.num_features == stream.channels
    assert narrowed.down.out_channels == narrowed.norm5.num_features == narrowed.head.in_features == stream.channels + 4
    assert narrowed.wide.groups == narrowed.norm3.num_features == narrowed.reduce.in_channels == 2 * halves.channels
    assert result.report.parameters[1] == sum(p.numel() for p in narrowed.parameters())
    # only channels that do not matter are gone, so the answers are the same
    torch.testing.assert_close(outputs(narrowed, batches), outputs(model, batches), atol=1e-3, rtol=1e-3)
    again = nin.apply_plan(Streams(), result.plan.to_json())
    again.load_state_dict(narrowed.state_dict())
    torch.testing.assert_close(outputs(again.eval(), batches), outputs(narrowed, batches))
    # it can be narrowed once more, and where all channels matter the layers are fitted to those that are left
    assert nin.narrow(narrowed, batches, macs=0.8, options=QUIET).report.calibration_error < 0.1
    whole = Streams().eval()
    fitted = nin.narrow(whole, batches, macs=0.7, options=dataclasses.replace(options, passes=2))
    assert fitted.report.calibration_error < 0.2


class Branches(nn.Module):
    """Branches that are concatenated for two layers, one of which reads and writes a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fixed = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm, self.both = nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Conv2d(24, 6, 1)

    def forward(self, image):
        part = self.fixed(image)
        x = torch.relu(self.norm(torch.cat((self.a(image), part, self.b(image)), 1)))
        return self.head(x + self.both(x)).mean((2, 3)) + part.mean((1, 2, 3))[:, None]


def test_branches_of_a_concatenation_are_pruned_at_their_places():
    torch.manual_seed(0)
    model, batches = Branches().eval(), images(32, 3, 10, 10)
    names = {"a", "b", "fixed", "both", "head"}
    groups = dependency_graph.build_dependency_graph(model, names).groups
    assert [(group.producer, group.consumers, group.writers) for group in groups] == [
        ("a", ("both", "head"), ("both",)),
        ("b", ("both", "head"), ("both",)),
    ]
    assert groups[1].inputs["head"] == tuple((channel + 12,) for channel in range(12))
    with torch.no_grad():
        for layer in (model.both, model.head):
            layer.weight[:, [*range(5, 8), *range(18, 24)]] = 0
    result = nin.narrow(model, batches, macs=0.5, options=dataclasses.replace(QUIET, factorise=False))
    left = {p.producer: p.channels for p in result.plan.pruned}
    assert 5 <= left["a"] < 8
    assert 6 <= left["b"] < 12
    assert result.model.norm.num_features == result.model.both.in_channels == 4 + left["a"] + left["b"]
    torch.testing.assert_close(outputs(result.model, batches), outputs(model, batches), atol=1e-3, rtol=1e-3)
    again = nin.apply_plan(Branches(), result.plan)
    again.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(outputs(again.eval(), batches), outputs(result.model, batches))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: x - y.flip(1),
        lambda x, y: x + y.sum(1, keepdim=True),
        lambda x, y: torch.cat([x, y], 2),
        lambda x, y: torch.cat([x, y], 1)[:, 1:9],
        lambda x, y: (x * y).softmax(1),
        lambda x, y: torch.add(x, y, alpha=2) @ x,
        lambda x, y: (x + y).roll(1, 1),
        lambda x, y: (x + y)[:, [1, 0, 2, 3, 4, 5, 6, 7]],
        lambda x, y: x + torch.arange(8.0)[:, None, None] * y,
    ],
)
def test_what_mixes_channels_keeps_them(change):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.head(change(self.a(x), self.b(x)))

    assert dependency_graph.build_dependency_graph(Mixed().eval(), {"a", "b", "head"}).groups == ()


def test_the_same_call_gives_the_same_network_bit_for_bit():
    batches = images(16, 3, 10, 10)
    found = []
    for seed in (1, 2):
        model = Streams().eval()
        torch.manual_seed(seed)
        result = nin.narrow(model, batches, macs=0.6, options=QUIET)
        found.append((result.plan.to_json(), result.model.state_dict()))
    (plan, weights), (other_plan, other_weights) = found
    assert plan == other_plan
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_the_layers_of_timm_are_followed():
    layers = pytest.importorskip("timm.layers")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            act = {"act_layer": nn.ReLU6}
            self.expand, self.norm1 = nn.Conv2d(3, 24, 1, bias=False), layers.BatchNormAct2d(24, **act)
            self.depthwise = layers.Conv2dSame(24, 24, 3, stride=2, groups=24, bias=False)
            self.norm2, self.project = layers.BatchNormAct2d(24, **act), nn.Conv2d(24, 3, 1, bias=False)
            self.norm3, self.drop = layers.BatchNormAct2d(3, apply_act=False), nn.Identity()

        def forward(self, image):
            y = self.norm2(self.depthwise(self.norm1(self.expand(image))))
            return (self.drop(self.norm3(self.project(y))) + F.avg_pool2d(image, 2)).mean((2, 3))

    torch.manual_seed(0)
    model, batches = Block().eval(), images(32, 3, 10, 10)
    with torch.no_grad():
        model.project.weight[:, 14:] = 0  # only channels that do not matter go, so the answers stay
    result = nin.narrow(model, batches, macs=0.7, options=dataclasses.replace(QUIET, factorise=False))
    (pruned,) = result.plan.pruned
    assert pruned.between == ("norm1", "depthwise", "norm2")
    torch.testing.assert_close(outputs(result.model, batches), outputs(model, batches), atol=1e-4, rtol=1e-4)
    assert type(result.model.depthwise) is layers.Conv2dSame
    assert result.model.depthwise.groups == result.model.norm1.num_features == pruned.channels
    again = nin.apply_plan(Block(), result.plan)
    again.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(outputs(again.eval(), batches), outputs(result.model, batches))
    skipped = nin.narrow(model, batches, macs=0.9, skip="depthwise", options=QUIET)
    assert skipped.plan.pruned == ()


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (
            [torch.randn(0, 3, 8, 8)],
            r"batches: batch 1 of shape (0, 3, 8, 8) in float32 holds no image: its first layer",
        ),
        (
            [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 0, 8)],
            "batches: batch 2 of shape (2, 3, 0, 8) in float32 holds no",
        ),
        ([torch.randn(2, 4, 8, 8)], "batch 1 of shape (2, 4, 8, 8) in float32 is not taken by the network: its first"),
        (
            [(torch.randn(2, 3, 8, 8), 0), (torch.randn(2, 1, 8, 8), 0)],
            "batch 2 of shape (2, 1, 8, 8) in float32 is not",
        ),
        ([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], "batch 1 of shape (2, 3, 8, 8) in uint8 is not taken"),
        (
            [torch.randn(2, 3, 8, 8).double()],
            "its first layer takes (N, 3, H, W) in float32 on cpu (Input type (double)",
        ),
        ([torch.tensor(1.0)], "batch 1 of shape () in float32 is not taken"),
        ([{"pixels": torch.randn(2, 3, 8, 8)}], "batches: batch 1 is not taken by the network: its first layer takes"),
    ],
)
def test_batches_that_the_network_does_not_take_are_refused_in_one_line(batches, expected):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(nin.errors.UserError, match=re.escape(expected)) as refused:
        nin.narrow(model, batches, macs=0.5)
    assert "\n" not in str(refused.value)
    held_out = NarrowOptions(held_out=batches, measure_latency=False)
    with pytest.raises(nin.errors.UserError, match=r"^held_out: batch "):
        nin.narrow(model, [torch.randn(2, 3, 8, 8)], macs=0.5, options=held_out)
