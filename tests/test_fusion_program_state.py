"""What a fused network's forward reads besides its weights: a program sees it change, or there is none."""

import dataclasses
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nin
from nin.fusion import program
from nin.ops.cpu import dispatch

pytestmark = pytest.mark.skipif(dispatch.KERNELS is None, reason="programs need the compiled library")

SETTINGS = types.SimpleNamespace(factor=1.0)


@dataclasses.dataclass
class Options:
    factor: float = 1.0

    def doubled(self):
        return 2 * self.factor


class Slotted:
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 1.0


def enclosed():
    factor = 1.0

    def change():
        nonlocal factor
        factor = 3.0

    def scale(y):
        return y * factor

    return scale, change


SCALE, CHANGE = enclosed()
PARTIAL = functools.partial(torch.mul, other=2)


def make(scale, **attributes):
    """Return a network with a chain, whose forward ends with ``scale(self, y)``."""

    class Network(nn.Module):
        shared = {"factor": 1.0}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.chain = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())
            self.register_buffer("on", torch.tensor(True))
            self.register_buffer("factor", torch.tensor(1.0))
            self.weight, self.head = nn.Parameter(torch.eye(5) + 0.1), nn.Linear(4, 5)
            self.count = nn.Parameter(torch.zeros(1), requires_grad=False)
            for name, value in attributes.items():
                setattr(self, name, value() if callable(value) else value)

        def forward(self, x):
            return self.finish(self.chain(x))

        finish = scale

    return Network().eval()


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.chain = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())

    def forward(self, x, a, b):
        y = self.chain(x)
        return y + a, torch.relu(b), y * b


def program_of(model):
    return vars(model)["_nin_program"]


def transposed(m):
    m.weight.data = m.weight.data.t()
    m.weight.data[0, 3] = 7


def fewer(m):
    m.head.weight.data, m.head.bias.data = m.head.weight.data[:3].clone(), m.head.bias.data[:3].clone()


# those of which there is a program; of the others there must be none
RECORDED = {
    "private dict",
    "mixed dict",
    "nested list",
    "object",
    "dataclass",
    "its method",
    "partial",
    "global object",
}
RECORDED |= {"closure", "class's dict", "other strides", "fewer outputs", "numbers of a shape"}

# name: what is done to the chain's result, attributes, a change
CASES = {
    "private dict": (lambda m, y: y * m._d["f"], {"_d": lambda: {"f": 1.0}}, lambda m: m._d.update(f=3.0)),
    "mixed dict": (lambda m, y: y * m.d["f"], {"d": lambda: {"f": 1.0, "g": F.relu}}, lambda m: m.d.update(f=3.0)),
    "nested list": (lambda m, y: y * m.d[0][0], {"d": lambda: [[1.0], F.relu]}, lambda m: m.d[0].insert(0, 3.0)),
    "object": (lambda m, y: y * m.o.factor, {"o": types.SimpleNamespace}, lambda m: setattr(m.o, "factor", 3.0)),
    "dataclass": (lambda m, y: y * m.o.doubled(), {"o": Options}, lambda m: setattr(m.o, "factor", 3.0)),
    "its method": (lambda m, y: y * m.o.doubled(), {"o": Options}, lambda m: setattr(Options, "doubled", lambda s: 9)),
    "slots": (lambda m, y: y * m.o.factor, {"o": Slotted}, lambda m: setattr(m.o, "factor", 3.0)),
    "partial": (lambda m, y: m.p(y), {"p": lambda: PARTIAL}, lambda m: m.p.keywords.update(other=3)),
    "global object": (lambda m, y: y * SETTINGS.factor, {}, lambda m: setattr(SETTINGS, "factor", 3.0)),
    "closure": (lambda m, y: SCALE(y), {}, lambda m: CHANGE()),
    "class's dict": (lambda m, y: y * m.shared["factor"], {}, lambda m: type(m).shared.update(factor=3.0)),
    "buffer in a condition": (lambda m, y: y * 2 if m.on else y, {}, lambda m: m.on.fill_(False)),
    "number of a buffer": (lambda m, y: y * m.factor.item(), {}, lambda m: m.factor.fill_(3)),
    "numbers of a buffer": (lambda m, y: y * m.factor.view(1).tolist()[0], {}, lambda m: m.factor.fill_(3)),
    "number of a tensor": (lambda m, y: y * m.t[0].item(), {"t": lambda: [torch.ones(())]}, lambda m: m.t[0].fill_(3)),
    "number of a value": (lambda m, y: y * y.mean((0, 2, 3)).tolist()[0], {}, lambda m: m.chain[0].weight.mul_(2)),
    "numbers of a shape": (lambda m, y: y * y.shape[-1].bit_length(), {}, lambda m: m.chain[0].weight.mul_(2)),
    "writes a parameter": (lambda m, y: y * m.count.add_(1), {}, lambda m: m.count.fill_(9)),
    "writes past autograd": (lambda m, y: y * m.count.data.add_(1), {}, lambda m: m.count.fill_(9)),
    "other strides": (lambda m, y: y @ m.weight, {}, transposed),
    "fewer outputs": (lambda m, y: m.head(y.mean((2, 3))), {}, fewer),
    "expanded buffer": (
        lambda m, y: F.batch_norm(y, m.one, m.one),
        {"one": lambda: nn.Buffer(torch.ones(1).expand(4))},
        lambda m: m.chain[0].weight.mul_(2),
    ),
}  # fmt: skip


def _prepare(model):
    if isinstance(vars(model).get("o"), types.SimpleNamespace):
        model.o.factor = 1.0
    return model


@pytest.mark.parametrize("case", CASES)
def test_results_stay_those_of_the_forward(case, monkeypatch):
    scale, attributes, change = CASES[case]
    monkeypatch.setattr(SETTINGS, "factor", 1.0)
    monkeypatch.setattr(Options, "doubled", Options.doubled)
    model, other = _prepare(make(scale, **attributes)), _prepare(make(scale, **attributes))
    fused, x = nin.fuse(other).model, torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for step in range(6):
            if step == 3:
                change(model)
                change(fused)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
            assert bool(program_of(fused)._plans) == (case in RECORDED) or step in (3, 4)


def test_modes_that_a_forward_enters_are_kept():
    def casts(self, y):
        with torch.autocast("cpu", torch.bfloat16):
            return y @ self.weight

    def wants_gradients(self, y):
        with torch.enable_grad():
            return y @ self.weight

    x = torch.randn(2, 4, 5, 5)
    for finish in (casts, wants_gradients):
        model = make(finish)
        fused = nin.fuse(model).model
        with torch.no_grad():
            for _ in range(3):
                got, wanted = fused(x), model(x)
                assert (got.dtype, got.requires_grad) == (wanted.dtype, wanted.requires_grad)


def test_several_inputs():
    model = Several().eval()
    fused = nin.fuse(model).model
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            inputs = [torch.randn(2, 4, 5, 5) for _ in range(3)]
            for got, wanted in zip(fused(*inputs), model(*inputs), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert program_of(fused)._plans


def test_a_network_that_is_frozen_after_its_first_call_is_not_hashed_any_more():
    fused, x = nin.fuse(make(lambda m, y: y)).model, torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        wanted = fused(x)
        sources = next(iter(program_of(fused)._plans.values())).sources
        assert sources._count
        nin.freeze(fused)
        assert torch.equal(fused(x), wanted)
        assert sources._count == 0
        fused.chain[0].weight.mul_(2)
        assert not torch.allclose(fused(x), wanted)


def test_shapes_that_take_turns_are_recorded_a_limited_number_of_times(monkeypatch):
    monkeypatch.setattr(program, "MAX_PLANS", 3)
    monkeypatch.setattr(program, "MAX_EVICTIONS", 4)
    model = make(lambda m, y: y)
    fused, recorded = nin.fuse(model).model, []
    record = program.Recorder.record
    monkeypatch.setattr(program.Recorder, "record", lambda self, x: recorded.append(x) or record(self, x))
    with torch.no_grad():
        for i in range(30):
            x = torch.randn(1, 4, 3 + i % 5, 4)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
        assert len(program_of(fused)._plans) == 3
        assert len(recorded) == 7
        for _ in range(20):  # other weights are not other shapes
            fused.chain[0].weight.mul_(1.1)
            fused(x)
