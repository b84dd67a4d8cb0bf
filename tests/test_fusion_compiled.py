"""Compiled networks: the results of their modules, by recorded steps where that is right, elsewhere by the modules."""

import collections
import copy
import dataclasses
import io
import itertools
import pickle
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import nin
from nin.errors import UserError
from nin.fusion import compiled
from nin.fusion.chain import Chain
from nin.fusion.compiled_kernels import find_step
from nin.fusion.compiled_plan import TorchAction
from nin.fusion.compiled_recorder import Recorder
from nin.ops.cpu import dispatch
from nin.ops.cpu.steps import run_step
from nin.runtime import fx_trace

pytestmark = pytest.mark.skipif(dispatch.KERNELS is None, reason="steps need the compiled library")


class Residual(nn.Module):
    """An inverted bottleneck with its input added."""

    def __init__(self, channels=8, hidden=24):
        super().__init__()
        self.up, self.norm1 = nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2, self.act = nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)
        self.down, self.norm3 = nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.act(self.norm1(self.up(x)))
        y = self.act(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.down(y))


class Network(nn.Module):
    """Every kind of step: convolutions with and without a block around them, sums, poolings, PyTorch's between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6()
        self.blocks = nn.Sequential(Residual(), Residual())
        self.pool, self.average = nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2)
        self.first, self.second, self.relu = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1), nn.ReLU(inplace=True)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 5)
        self.twice = False

    def forward(self, x):
        x = self.pool(self.blocks(self.act(self.norm(self.stem(x)))))
        y = self.second(F.relu(self.first(x)))
        y += torch.sigmoid(y)
        y = self.relu(y)
        y = F.relu(y + y.flip(3))
        y = self.average(y)
        if self.twice:
            y = y * 2
        return self.head(self.drop(F.adaptive_avg_pool2d(y, 1).flatten(1)))


def network(seed=0):
    torch.manual_seed(seed)
    model = Network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def images(batch=2, size=19, layout=torch.channels_last, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, 3, size, size).contiguous(memory_format=layout)


def compiled_and_called(model=None, x=None):
    """Return a compiled network that has steps for an input."""
    network_ = nin.fuse(network() if model is None else model).compile()
    network_(images() if x is None else x)
    assert network_.reason == ""
    assert len(network_._plans) == 1
    return network_


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_recorded_steps_have_the_same_bits_however_many_threads_run_them(layout, batch, monkeypatch):
    model, x = network(), images(batch, 67, layout)
    net = compiled_and_called(model, x)
    step_by_step, plan = Recorder(net.network, net._graph, dispatch.KERNELS).record([x])
    monkeypatch.setattr(Chain, "run", None)  # not called any more
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = net(x)
        assert torch.equal(y, step_by_step)
        assert torch.equal(plan.run([x]), step_by_step)
    torch.set_num_threads(threads)
    wanted = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    # PyTorch's own: flip in the middle, in NCHW the poolings too
    stretches = sum(not isinstance(part, TorchAction) for part in plan.parts)
    assert stretches == (2 if layout == torch.channels_last else 4)


def test_neither_inputs_nor_results_are_kept():
    net = compiled_and_called()
    first, second = images(seed=2), images(seed=3)
    y = net(first)
    kept = y.clone()
    net(second)
    assert torch.equal(y, kept)
    assert not torch.equal(net(second), y)


def test_each_shape_layout_and_size_of_batch_has_its_steps():
    model = network()
    net = compiled_and_called(model)
    with torch.no_grad():
        for batch, size in [(1, 19), (2, 24), (5, 33), (2, 19)]:
            for layout in (torch.channels_last, torch.contiguous_format):
                x = images(batch, size, layout)
                torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(net(x[::2]), model(x[::2]), rtol=1e-4, atol=1e-5)
                x = x.transpose(2, 3)
                torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)
        assert net(images(0, 19)).shape == (0, 5)
        with pytest.raises(RuntimeError, match="expected input"):
            net(torch.randn(2, 4, 19, 19))
    assert net.reason == ""


def test_more_shapes_than_are_kept_run_the_modules_and_are_not_recorded_again(monkeypatch):
    monkeypatch.setattr(compiled, "MAX_PLANS", 2)
    recorded = []
    record = Recorder.record
    monkeypatch.setattr(Recorder, "record", lambda self, inputs: recorded.append(1) or record(self, inputs))
    model = network()
    net = nin.fuse(model).compile()
    for size in [19, 20, 21, 22] * 3:
        x = images(1, size)
        torch.testing.assert_close(net(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert len(recorded) == 2


def _replace(model):
    model.first = nn.Conv2d(8, 16, 1)


def _load(model):
    model.load_state_dict(network(7).state_dict())


def _write_past_the_counter(model):
    model.blocks[0].up.weight.data[0] += 1


def _statistics(model):
    model.blocks[0].norm2.running_mean.add_(0.5)


def _attribute(model):
    model.twice = True


def _class(model):
    model.pool.__class__ = nn.Identity


def _hook(model):
    model.blocks[0].register_forward_hook(lambda module, args, y: y * 3)


@pytest.mark.parametrize("change", [_replace, _load, _write_past_the_counter, _statistics, _attribute, _class, _hook])
def test_a_snapshot_is_not_reached_by_what_is_done_to_the_model_and_the_model_is(change):
    model, x = network(), images()
    fused = nin.fuse(model)
    net = fused.compile()
    before = net(x)
    change(fused.model)
    with torch.no_grad():
        assert torch.equal(net(x), before)
        assert torch.equal(net(images(3)), nin.fuse(network()).compile()(images(3)))
        assert not torch.allclose(fused.model(x), before)  # as nothing was recorded there


def test_training_and_gradients_are_the_models_own():
    model, x = network(), images()
    fused = nin.fuse(model)
    net = fused.compile()
    for each in (model, fused.model):
        each(x).square().sum().backward()
    for a, b in zip(model.parameters(), fused.model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4)
    assert not net(x.clone().requires_grad_()).requires_grad
    assert all(not p.requires_grad for p in net.network.parameters())
    assert not any(module.training for module in nin.fuse(model.train()).compile().network.modules())
    with pytest.raises(UserError, match="is for inference: fuse the model without training=True"):
        nin.fuse(model, training=True).compile()


def test_who_looks_sees_the_modules():
    model, x = network(), images()
    net = compiled_and_called(model, x)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        wanted = model(x)
        with Watch():
            net(x)
        assert any("max_pool" in name for name in seen)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(net)(x[None])[0], wanted, rtol=1e-4, atol=1e-5)
        in_double = nin.fuse(copy.deepcopy(model).double()).compile()
        torch.testing.assert_close(in_double(x.double()).float(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.jit.trace(lambda x: net(x), x, check_trace=False)(x), wanted, rtol=1e-4, atol=1e-5
        )
    with torch.inference_mode():
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)


def test_compilers_see_the_modules():
    model, x = nn.Sequential(*chain()).eval(), torch.randn(2, 8, 6, 6)
    net = compiled_and_called(model, x)
    torch._dynamo.reset()
    call = torch.compile(lambda x: net(x).relu(), backend="eager")
    torch.testing.assert_close(call(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def _through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, _through_pickle, _through_file, copy.copy], ids=lambda f: f.__name__)
def test_copies_record_for_themselves(make):
    net, x = compiled_and_called(), images()
    new = make(net)
    torch.testing.assert_close(new(x), net(x), rtol=1e-6, atol=1e-6)
    assert new._plans
    assert new.network is not net.network


def test_a_pruned_network_is_compiled_with_the_weights_of_now():
    model, x = network(), images()
    nn.utils.prune.l1_unstructured(model.second, "weight", 0.5)
    nn.utils.parametrizations.weight_norm(model.first)
    net = nin.fuse(model).compile()
    torch.testing.assert_close(net(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_threads_call_at_once():
    net = nin.fuse(network()).compile()
    inputs = [images(batch, seed=batch) for batch in (1, 2, 3, 1)]
    wrong = []
    with torch.no_grad():
        wanted = [net.network(x) for x in inputs]

    def call(i):
        results = [net(inputs[i]) for _ in range(20)]
        wrong.extend(i for y in results if not torch.allclose(y, wanted[i], rtol=1e-5, atol=1e-6))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_other_threads_compute_while_one_traces():
    """fx patches the calls of all modules: another thread's got proxies, or its modules were not of the network."""
    model, other, x = network(), network(), images(1)
    started, ended, wrong = threading.Event(), threading.Event(), []
    fused = nin.fuse(other)
    with torch.no_grad():
        wanted = model(x), other(x)

    class Waits(fx.Tracer):
        def call_module(self, m, forward, args, kwargs):
            started.set()
            ended.wait(30)
            return super().call_module(m, forward, args, kwargs)

    def call():
        started.wait(30)
        try:
            with torch.no_grad():
                torch.testing.assert_close(model(x), wanted[0])  # the very network that is traced
        except BaseException as error:
            wrong.append(error)
            raise
        finally:
            ended.set()
        # traces, after the other has ended
        torch.testing.assert_close(fused.compile()(x), wanted[1], rtol=1e-5, atol=1e-6)
        wrong.append(None)

    thread = threading.Thread(target=call)
    thread.start()
    graph = fx_trace.trace(model, Waits())
    thread.join()
    assert wrong == [None]
    assert [str(n) for n in graph.nodes] == [str(n) for n in fx_trace.trace(model).nodes]
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl"


class LooksAtValues(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return y[y > 0]  # its shape depends on the values


class Counts(nn.Sequential):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class CountsInABuffer(nn.Sequential):
    def forward(self, x):
        if not hasattr(self, "calls"):
            self.register_buffer("calls", torch.zeros(()))
        self.calls += 1
        return super().forward(x) * self.calls


class WritesIntoAParameter(nn.Sequential):
    def forward(self, x):
        self[0].bias.add_(1)
        return super().forward(x)


class ReadsANumber(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * x.mean((1, 2, 3)).tolist()[0]


class ReadsAnArray(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * float(x.detach().abs().amax().float().numpy())


class Branches(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum().item() > 0 else -y


class AsksForATensor(nn.Sequential):
    def forward(self, x):
        return super().forward(x * 2 if isinstance(x, torch.Tensor) else x)


class AddsInPlace(nn.Sequential):
    def forward(self, x):
        y = skip = super().forward(x)
        y += y.flip(1)
        return skip


class AsksWhatItsInputIs(nn.Sequential):
    def forward(self, x):
        return super().forward(x * 1.06 if type(x) is torch.Tensor else x)


class UsesAutocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Draws(nn.Sequential):
    generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return super().forward(x) + 0 * torch.rand(1, generator=self.generator)


@dataclasses.dataclass
class Output:
    scores: torch.Tensor


class GivesAnObject(nn.Sequential):
    def forward(self, x):
        return Output(super().forward(x))


class GivesAnOrderedDict(nn.Sequential):
    def forward(self, x):
        return collections.OrderedDict(out=super().forward(x))


class Iterates(nn.Sequential):
    numbers = itertools.count(1)

    def forward(self, x):
        return super().forward(x) * (1 + 0 * next(self.numbers))


LEFT = [LooksAtValues, Counts, CountsInABuffer, WritesIntoAParameter, ReadsANumber, ReadsAnArray, Branches]
LEFT += [AsksForATensor, AsksWhatItsInputIs, UsesAutocast, GivesAnObject, GivesAnOrderedDict]


class ChangesItsInput(nn.Sequential):
    def forward(self, x):
        x.mul_(0.5)
        return super().forward(x), x


class Structured(nn.Sequential):
    def forward(self, x, scale=None, *, shift=0.0):
        y = super().forward(x if scale is None else x * scale)
        first, second = y.chunk(2, 1)
        size = x.shape[-1] * 2
        return {"y": y, "parts": [first, (second.relu_(), None)], "up": F.interpolate(y, size=(size, size)) + shift}


class TwoInputs(nn.Sequential):
    def forward(self, x, z):
        return super().forward(x) + z[:, :, :5, :5].sin(), z


class ReadsNumbersOfShapes(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * x.shape[-1].bit_length() / x.size(0)


class ReadsABuffer(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("on", torch.tensor(True))
        self.settings = types.SimpleNamespace(scale=2.0)

    def forward(self, x):
        return super().forward(x * 2 if self.on else x) * self.settings.scale


RECORDED = [AddsInPlace, ChangesItsInput, Structured, TwoInputs, ReadsNumbersOfShapes, ReadsABuffer]


def chain():
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.MaxPool2d(2, 1)


def alike(a, b):
    """Compare two results of any structure, and their types."""
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        a, b = vars(a), vars(b)
    tolerance = {} if torch.bfloat16 in dtypes_of(a) else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(a, b, **tolerance)


def dtypes_of(value):
    """Return the dtypes of the tensors in a result."""
    return {t.dtype for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*LEFT, *RECORDED])
def test_any_forward_gives_what_its_modules_give(kind, dtype):
    model = kind(*chain()).to(dtype).eval()
    net = nin.fuse(model).compile()
    reference = copy.deepcopy(net.network)
    for i in range(4):
        inputs = [torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(i + k)).to(dtype) for k in range(2)]
        first, second = ([x.clone() for x in inputs[: 1 + (kind is TwoInputs)]] for _ in range(2))
        with torch.no_grad():
            alike(net(*first), reference(*second))
        torch.testing.assert_close(first, second)
    assert (net.reason == "") == (kind in RECORDED), net.reason
    assert len(net._plans) == (kind in RECORDED)
    if kind is Structured:
        with torch.no_grad():
            alike(net(*first, 2.0, shift=1.0), model(*second, 2.0, shift=1.0))


def test_a_forward_with_state_of_its_own_runs_once_a_call():
    """Where it cannot be recorded, recording has not run it, either."""
    for kind in (Counts, CountsInABuffer, WritesIntoAParameter):
        net = nin.fuse(kind(*chain()).eval()).compile()
        copied, x = copy.deepcopy(net.network), torch.randn(2, 8, 6, 6)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(net(x), copied(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("seed", "dtype"), [*((seed, torch.float32) for seed in range(8)), *((seed, torch.bfloat16) for seed in range(4))]
)
def test_memory_is_shared_by_what_is_not_needed_at_once(seed, dtype):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in picks)

        def forward(self, x):
            values = [x * 1]
            for i, (kind, a, b) in enumerate(picks):
                a, b = values[a % len(values)], values[b % len(values)]
                values.append(
                    a + b if kind == 0
                    else F.relu(a) if kind == 1
                    else a.add_(b) if kind == 2
                    else torch.relu_(a) if kind == 3
                    else F.max_pool2d(a, 3, 1, 1) if kind == 4
                    else F.avg_pool2d(a, 3, 1, 1) if kind == 5
                    else a.flip(0) if kind == 6
                    else F.relu(self.convs[i](a)) if kind == 7
                    else self.convs[i](a)
                )  # fmt: skip
            return values[-1], values[len(values) // 2], sum(values)

    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, 1000, (30, 3), generator=generator).tolist()
    picks = [(kind % 9, a, b) for kind, a, b in picks]
    model = Random().to(dtype).eval()
    x = torch.randn(2, 4, 5, 5, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    net = nin.fuse(model).compile()
    with torch.no_grad():
        for _ in range(2):
            for got, wanted in zip(net(x.clone()), model(x.clone()), strict=True):
                if dtype == torch.float32:
                    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
                else:
                    assert (got.double() - wanted.double()).norm() <= 0.03 * wanted.double().norm()
    (plan,) = net._plans.values()
    assert plan.memory_bytes > 0


POOLS = [
    *((F.max_pool2d, options) for options in ((2,), (3, 2, 1), (3, 2, 0, 1, True), (2, 1, 1, 2))),
    (F.max_pool2d, ((3, 2), (1, 2), (1, 0))),
    *((F.avg_pool2d, options) for options in ((2,), (3, 2, 1), (3, 2, 1, True), (3, 2, 1, False, False))),
    (F.avg_pool2d, ((3, 2), (2, 1), (1, 0), True, False, 5)),
    (F.avg_pool2d, (3, 2, 1, True, False)),
]  # fmt: skip
OTHERS = [(F.relu, ()), (F.relu6, ()), (torch.add, ())]


@pytest.mark.parametrize(
    ("function", "options"), [*POOLS, *OTHERS], ids=lambda value: getattr(value, "__name__", str(value))
)
@pytest.mark.parametrize("channels", [1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_pytorchs_functions_to_the_bit(function, options, channels, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 11, 9).to(dtype).to(memory_format=torch.channels_last)
    x[0, 0, 3, 3], x[1, 0, 2, 5], x[1, 0, 7, 7] = float("nan"), float("inf"), -float("inf")
    args = (
        (x, *options)
        if function is not torch.add
        else (x, torch.randn(2, channels, 11, 9).to(dtype).contiguous(memory_format=torch.channels_last))
    )
    found = find_step(function, args, {})
    if found is None:
        assert channels == 1
        return
    run_step(dispatch.KERNELS, found.step, x, found.other, found.y.fill_(7))
    torch.testing.assert_close(found.y, function(*args), rtol=0, atol=0, equal_nan=True)


ROUNDED = [(F.hardswish, ()), (F.silu, ()), (F.gelu, ()), (F.hardsigmoid, ()), (torch.sigmoid, ())]
ROUNDED += [(F.adaptive_avg_pool2d, ((1, 1),)), (torch.mean, ((-1, 2),)), (torch.mean, ([2, 3], True))]


@pytest.mark.parametrize(("function", "options"), ROUNDED, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("shape", [(2, 1, 3, 2), (1, 37, 32, 32), (3, 64, 1, 1)])
def test_other_steps_are_pytorchs_functions_to_rounding(function, options, shape):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = float("nan")
    found = find_step(function, (x, *options), {})
    if found is None:
        assert shape[1] == 1  # in PyTorch's order of strides
        return
    run_step(dispatch.KERNELS, found.step, x, found.other, found.y.fill_(7))
    wanted = function(x.double(), *options)
    assert found.y.shape == wanted.shape
    torch.testing.assert_close(found.y.double(), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 130, 7), (3, 17, 6), (9, 33, 40), (70, 8, 3)])
def test_fully_connected_layers_are_steps(sizes, bias):
    torch.manual_seed(0)
    batch, channels, outputs = sizes
    x, layer = torch.randn(batch, channels), nn.Linear(channels, outputs, bias=bias)
    with torch.no_grad():
        found = find_step(layer, (x,), {})
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run_step(dispatch.KERNELS, found.step, x, None, found.y.fill_(7))
            results.append(found.y.clone())
        torch.set_num_threads(1)
        alone = find_step(layer, (x[-1:],), {})
        run_step(dispatch.KERNELS, alone.step, x[-1:], None, alone.y)
        wanted = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(results[0].double(), wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(y, results[0]) for y in results)
    assert torch.equal(alone.y[0], results[0][-1])  # whatever the batch


class Reshaped(nn.Module):
    """Values that are read in two shapes, by the library and by PyTorch, one of them changed in place between."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.flat = nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = F.relu(self.conv(x))
        a = self.pool(x)
        b, c = a.relu_().flatten(1), a.mul(2)  # a is read in both shapes
        d = self.flat(self.pool(x))
        e = torch.squeeze(x.mean((2, 3), keepdim=True), -1).view(-1, 8)
        return self.head(b) + self.head(d), c, d.flip(1), F.hardswish(self.head(e)), self.pool(x).reshape(8, -1)


def test_results_are_read_in_other_shapes():
    torch.manual_seed(0)
    model = Reshaped().eval()
    net = nin.fuse(model).compile()
    with torch.no_grad():
        for batch in (1, 3, 1):
            x = images(batch, 7)
            for _ in range(2):
                for got, wanted in zip(net(x), model(x), strict=True):
                    assert got.shape == wanted.shape
                    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_what_has_no_step_has_none():
    x = torch.randn(2, 4, 6, 6)
    for function, args in [(torch.add, (x, 1.0)), (F.max_pool2d, (x, 2)), (F.relu, (x.double(),)), (F.elu, (x,))]:
        assert find_step(function, args, {}) is None
    last = x.contiguous(memory_format=torch.channels_last)
    for function, args in [(torch.mean, (last,)), (torch.mean, (last, (1, 2))), (F.adaptive_avg_pool2d, (last, 2))]:
        assert find_step(function, args, {}) is None
    assert find_step(F.gelu, (x,), {"approximate": "tanh"}) is None
    assert (
        find_step(F.adaptive_avg_pool2d, (torch.randn(1, 4, 33, 32).to(memory_format=torch.channels_last), 1), {})
        is None
    )
    assert find_step(F.linear, (x[0, 0], torch.randn(6, 5).t()), {}) is None
    assert find_step(F.linear, (x, torch.randn(3, 6)), {}) is None
    assert find_step(torch.add, (x, x), {"alpha": 2}) is None
    assert find_step(torch.add, (x, x[:, :1]), {}) is None
    assert find_step(F.relu, (x[:, :, ::2, ::2],), {}) is None
