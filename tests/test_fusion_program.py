"""The program of a fused network: the results of its modules, whatever is done to the network and whoever looks."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import nin
from nin.fusion.chain import Chain
from nin.fusion.program import Program
from nin.fusion.program_kernels import find_step
from nin.fusion.program_plan import TorchAction
from nin.fusion.program_record import Recorder
from nin.ops.cpu import dispatch
from nin.ops.cpu.steps import run_step
from nin.runtime import fx_trace

pytestmark = pytest.mark.skipif(dispatch.KERNELS is None, reason="programs need the compiled library")

FLAG = False


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

    scale = 1.0

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6()
        self.blocks = nn.Sequential(Residual(), Residual())
        self.pool, self.average = nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2)
        self.first, self.second, self.relu = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1), nn.ReLU(inplace=True)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 5)
        self.options, self.twice = {"doubles": False}, False

    def forward(self, x):
        x = self.pool(self.blocks(self.act(self.norm(self.stem(x)))))
        y = self.second(F.relu(self.first(x)))
        y += torch.sigmoid(y)
        y = self.relu(y)
        y = F.relu(y + y.flip(3))
        y = self.average(y)
        if self.options["doubles"] or self.twice or FLAG:
            y = y * 2
        return self.head(self.drop(F.adaptive_avg_pool2d(y, 1).flatten(1))) * self.scale


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


def program_of(model):
    return vars(model)["_nin_program"]


@torch.no_grad()
def fused_and_called(model=None, x=None):
    """Return a fused network that has a plan for an input, which runs without the chains' Python."""
    fused = nin.fuse(network() if model is None else model).model
    fused(images() if x is None else x)
    assert len(program_of(fused)._plans) == 1
    return fused


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_program_runs_the_recorded_steps_to_the_same_bits(layout, batch, monkeypatch):
    model, x = network(), images(batch, 67, layout)
    fused = fused_and_called(model, x)
    program = program_of(fused)
    with torch.no_grad():
        step_by_step, plan = Recorder(fused, program._network, dispatch.KERNELS).record([x])
        monkeypatch.setattr(Chain, "run", None)  # not called any more
        threads = torch.get_num_threads()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = fused(x)
            assert torch.equal(y, step_by_step)
            assert torch.equal(plan.run([x]), step_by_step)
        torch.set_num_threads(threads)
    wanted = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    # PyTorch's own: flip in the middle, in NCHW the poolings too
    stretches = sum(not isinstance(part, TorchAction) for part in plan.parts)
    assert stretches == (2 if layout == torch.channels_last else 4)


def test_a_program_keeps_neither_inputs_nor_results():
    fused = fused_and_called()
    with torch.no_grad():
        first, second = images(seed=2), images(seed=3)
        y = fused(first)
        kept = y.clone()
        fused(second)
        assert torch.equal(y, kept)
        assert not torch.equal(fused(second), y)


def test_each_shape_layout_and_size_of_batch_has_its_plan():
    model = network()
    fused = fused_and_called(model)
    with torch.no_grad():
        for batch, size in [(1, 19), (2, 24), (5, 33), (2, 19)]:
            for layout in (torch.channels_last, torch.contiguous_format):
                x = images(batch, size, layout)
                torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(fused(x[::2]), model(x[::2]), rtol=1e-4, atol=1e-5)
                x = x.transpose(2, 3)
                torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
        assert fused(images(0, 19)).shape == (0, 5)
        with pytest.raises(RuntimeError, match="expected input"):
            fused(torch.randn(2, 4, 19, 19))
        assert len(program_of(fused)._plans) <= nin.fusion.program.MAX_PLANS


def _replace(model):
    model.first = nn.Conv2d(8, 16, 1)
    nn.init.constant_(model.first.weight, 0.1)
    nn.init.constant_(model.first.bias, 0.2)


def _swap_memory(model):
    model.second.weight.data = model.second.weight.data.clone().mul_(2)


def _transpose(model):
    model.second.weight.data = model.second.weight.data.transpose(0, 1)


def _write_past_the_counter(model):
    model.blocks[0].up.weight.data[0] += 1


def _load(model):
    model.load_state_dict(network(7).state_dict())


def _assign(model):
    model.load_state_dict(copy.deepcopy(network(8).state_dict()), assign=True)


def _new_parameter(model):
    model.blocks[1].down.weight = nn.Parameter(torch.ones_like(model.blocks[1].down.weight))


def _in_place(model):
    with torch.no_grad():
        model.stem.weight.mul_(1.5)
        model.head.bias.add_(1)


def _statistics(model):
    model.blocks[0].norm2.running_mean.add_(0.5)


def _epsilon(model):
    model.norm.eps = 0.5


def _stride(model):
    model.stem.stride = 1, 1


def _attribute(model):
    model.twice = True


def _container(model):
    model.options["doubles"] = True


def _activation(model):
    model.act = nn.Identity()


def _forward(model):
    model.pool.forward = lambda x: F.avg_pool2d(x, 2)


def _deleted(model):
    del model.blocks[1]


class Doubled(nn.MaxPool2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _class(model):
    model.pool.__class__ = Doubled


def _head_transposed(model):
    model.head.weight.data = model.head.weight.data.t().contiguous().t()
    model.head.weight.data[0] = 3


WRITES = [_write_past_the_counter, _statistics]
CHANGES = [_replace, _swap_memory, _transpose, _load, _assign, _new_parameter, _in_place, _epsilon, _stride]
CHANGES += [_attribute, _container, _activation, _forward, _deleted, _class, _head_transposed]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("change", [*CHANGES, *WRITES], ids=lambda change: change.__name__)
def test_what_changes_in_a_network_is_seen(change, frozen):
    if frozen and change is _write_past_the_counter:
        pytest.skip("what nin.freeze promises not to happen")
    model, x = network(), images()
    fused = fused_and_called(model, x)
    if frozen:
        nin.freeze(fused)
    with torch.no_grad():
        before = fused(x)
        change(model), change(fused)
        for _ in range(3):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fused(x), before)
    torch.testing.assert_close(fused.eval()(x), model(x), rtol=1e-4, atol=1e-5)  # where gradients are wanted


@pytest.mark.parametrize("where", ["module", "class", "method"])
def test_what_the_forward_reads_elsewhere_is_seen(where, monkeypatch):
    model, x = network(), images()
    fused = fused_and_called(model, x)
    if where == "module":
        monkeypatch.setitem(globals(), "FLAG", True)
    elif where == "class":
        monkeypatch.setattr(Network, "scale", 3.0)
    else:
        monkeypatch.setattr(Residual, "forward", lambda self, x: x)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_training_between_inferences():
    model, x = network(), images()
    fused = fused_and_called(model, x)
    for _ in range(3):
        for net in (model, fused):
            net.drop.p = 0.0
            optimizer = torch.optim.SGD(net.train().parameters(), 0.1)
            net(x).square().sum().backward()
            optimizer.step()
            net.eval()
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)
    fused.blocks[0].norm1.train()
    model.blocks[0].norm1.train()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)
    assert not torch.equal(fused.blocks[0].norm1.running_mean, network().blocks[0].norm1.running_mean)


def test_gradients_are_the_modules():
    model, x = network(), images()
    fused = fused_and_called(model, x)
    for net in (model, fused):
        net.zero_grad()
        net(x).square().sum().backward()
    for a, b in zip(model.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4)
    nin.freeze(fused)
    fused(x)  # with gradients on, which nobody wants
    images_with_gradients = x.clone().requires_grad_()
    assert fused(images_with_gradients).requires_grad
    assert not fused(x).requires_grad
    fused.requires_grad_(True)
    assert fused(x).requires_grad
    with torch.no_grad():
        fused.stem.weight.data.mul_(2)  # the promise is taken back
        model.stem.weight.data.mul_(2)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("path", ["", "blocks.0", "blocks.0.down", "pool", "act"])
def test_hooks_run(path, register):
    fused, x, seen = fused_and_called(), images(), []
    handle = getattr(fused.get_submodule(path), register)(lambda module, *_: seen.append(module))
    with torch.no_grad():
        fused(x)
        assert seen
        handle.remove()
        count = len(seen)
        fused(x)
    assert len(seen) == count
    assert len(program_of(fused)._plans) == 1


def test_who_looks_sees_the_modules():
    model, x = network(), images()
    fused = fused_and_called(model, x)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        wanted = model(x)
        with Watch():
            fused(x)
        assert any("max_pool" in name for name in seen)
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        fused(x)
        handle.remove()
        assert "MaxPool2d" in seen
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype == torch.bfloat16
        with torch.autograd.profiler.profile() as profile:
            fused(x)
        assert any("max_pool" in event.name for event in profile.function_events)
        torch.testing.assert_close(torch.func.vmap(fused)(x[None])[0], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(fused).double()(x.double()).float(), wanted, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(fused, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.func.jvp(model, (x,), (torch.ones_like(x),))[1], rtol=1e-3, atol=1e-4)
    other = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            y, z = (torch.func.functional_call(net, other, (x,)) for net in (fused, model))
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)


def test_compilers_see_the_modules():
    model, x = nn.Sequential(*chain()).eval(), torch.randn(2, 8, 6, 6)
    fused = fused_and_called(model, x)
    with torch.no_grad():
        wanted = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(nn.Sequential(fused, nn.ReLU()), backend="eager", fullgraph=True)
        traced = torch.jit.trace(fused, x, check_trace=False)
        exported = torch.export.export(fused, (x,)).module()
        for call in (compiled, traced, exported):
            torch.testing.assert_close(call(x), wanted, rtol=1e-4, atol=1e-5)
        assert len(torch.fx.symbolic_trace(fused).graph.nodes) > 6
        fused.compile(backend="eager")  # takes the program's place
        torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-5)


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def _through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, _through_pickle, _through_file, copy.copy], ids=lambda f: f.__name__)
def test_copies_have_programs_of_their_own(make):
    model, x = network(), images()
    fused = fused_and_called(model, x)
    new = make(fused)
    assert list(new.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        wanted = fused(x)
        torch.testing.assert_close(new(x), wanted, rtol=1e-6, atol=1e-6)
        if make is not copy.copy:
            assert program_of(new) is not program_of(fused)
            assert program_of(new)._plans
            new.stem.weight.mul_(2)
            assert torch.equal(fused(x), wanted)
            assert not torch.allclose(new(x), wanted)
    assert not any(isinstance(value, Program) for value in vars(nin.fusion.rewrite.copy_model(fused)).values())


def test_threads_call_at_once():
    fused = nin.fuse(network()).model
    inputs = [images(batch, seed=batch) for batch in (1, 2, 3, 1)]
    wrong = []
    with torch.no_grad():
        wanted = [fused._call_impl(x) for x in inputs]

    def call(i):
        with torch.no_grad():
            results = [fused(inputs[i]) for _ in range(20)]
        wrong.extend(i for y in results if not torch.allclose(y, wanted[i], rtol=1e-5, atol=1e-6))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_other_threads_compute_while_one_traces():
    """fx patches the calls of all modules: another thread's got proxies, or its modules were not of the network."""
    model, other, x = network(), network(), images(1)
    started, ended, wrong = threading.Event(), threading.Event(), []
    fused = nin.fuse(other).model
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
        with torch.no_grad():
            torch.testing.assert_close(fused(x), wanted[1], rtol=1e-5, atol=1e-6)  # traces, after the other has ended
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
        return super().forward(x)


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


def chain():
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.MaxPool2d(2, 1)


@pytest.mark.parametrize("kind", [LooksAtValues, Counts, ChangesItsInput, Structured])
def test_any_forward_stays_what_it_is(kind):
    model, x = kind(*chain()).eval(), torch.randn(2, 8, 6, 6)
    fused = nin.fuse(model).model
    for i in range(4):
        with torch.no_grad():
            first, second = (x * (i + 1)).clone(), (x * (i + 1)).clone()
            torch.testing.assert_close(fused(first), model(second), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(first, second)
    if kind is Counts:
        assert fused.calls == model.calls
    if kind is Structured:
        with torch.no_grad():
            torch.testing.assert_close(fused(x, 2.0, shift=1.0), model(x, 2.0, shift=1.0), rtol=1e-5, atol=1e-5)
        assert len(program_of(fused)._plans) == 1


@pytest.mark.parametrize("seed", range(8))
def test_memory_is_shared_by_what_is_not_needed_at_once(seed):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in picks)

        def forward(self, x):
            values = [x * 1]
            for conv, (kind, a, b) in zip(self.convs, picks, strict=True):
                a, b = values[a % len(values)], values[b % len(values)]
                values.append(
                    a + b if kind == 0
                    else F.relu(a) if kind == 1
                    else a.add_(b) if kind == 2
                    else torch.relu_(a) if kind == 3
                    else F.max_pool2d(a, 3, 1, 1) if kind == 4
                    else F.avg_pool2d(a, 3, 1, 1) if kind == 5
                    else a.flip(0) if kind == 6
                    else F.relu(conv(a)) if kind == 7
                    else conv(a)
                )  # fmt: skip
            return values[-1], values[len(values) // 2], sum(values)

    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, 1000, (30, 3), generator=generator).tolist()
    picks = [(kind % 9, a, b) for kind, a, b in picks]
    model, x = Random().eval(), torch.randn(2, 4, 5, 5, generator=generator).to(memory_format=torch.channels_last)
    fused = nin.fuse(model).model
    Program(fused)
    with torch.no_grad():
        for _ in range(2):
            for got, wanted in zip(fused(x.clone()), model(x.clone()), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        (made,) = program_of(fused)._plans.values()
        assert made.plan.memory_bytes > 0


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
def test_steps_are_pytorchs_functions_to_the_bit(function, options, channels):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 11, 9).to(memory_format=torch.channels_last)
    x[0, 0, 3, 3], x[1, 0, 2, 5], x[1, 0, 7, 7] = float("nan"), float("inf"), -float("inf")
    args = (
        (x, *options)
        if function is not torch.add
        else (x, torch.randn(2, channels, 11, 9).contiguous(memory_format=torch.channels_last))
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
    fused = nin.fuse(model).model
    Program(fused)
    with torch.no_grad():
        for batch in (1, 3, 1):
            x = images(batch, 7)
            for _ in range(2):
                for got, wanted in zip(fused(x), model(x), strict=True):
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
    assert find_step(F.relu, (x[:, :, ::2],), {}) is None
