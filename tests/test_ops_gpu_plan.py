"""Which engine and which tiles take a call on a GPU: by a table, by a fake timer, from the file, and what does not fit.

And that a call is planned once and replayed from then on. No GPU is needed: kernels run in Triton's interpreter.
"""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
import threading
import weakref
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nin
from nin.errors import UserError
from nin.ops import reference
from nin.ops.arguments import ChainArguments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

from nin.ops.gpu import (  # noqa: E402
    autotune,
    dispatch,
    engine_choice,
    engine_plan,
    h100_timings,
    replay,
    tile_sizes,
    timing_cache,
)
from nin.ops.gpu.engine_choice import Choice, choose  # noqa: E402
from nin.ops.gpu.problem import ChainProblem  # noqa: E402


@pytest.fixture(autouse=True)
def _forget(monkeypatch, tmp_path):
    """Start without plans, without timings of this machine's user, and without what was said."""
    monkeypatch.setenv("NIN_GPU_CACHE", str(tmp_path / "timings.json"))
    for name in ("NIN_GPU", "NIN_GPU_TUNE"):
        monkeypatch.delenv(name, raising=False)
    kept = [(dispatch, "_calls"), (timing_cache, "_read"), (timing_cache, "_warned"), (engine_choice, "_chosen")]
    for module, name in (*kept, (autotune, "_unavailable"), (engine_choice, "_unavailable")):
        monkeypatch.setattr(module, name, type(getattr(module, name))())


def problem(widths, size, images, taps=1, activation="relu", **others):
    activations = (activation,) * (len(widths) - 1)
    side = round(taps**0.5)
    geometry = ((side, side), (1, 1), (side // 2, side // 2), (1, 1))
    others = {"pointwise": taps == 1, "geometry": geometry, **others}
    return ChainProblem(images * size * size, widths[0], widths[1:], activations, taps, **others)


def engines(groups):
    return [(group.first, group.count, group.choice.engine) for group in groups]


# -- by the table -----------------------------------------------------------------------------------------------

# case, forward and backward: the fastest of what was measured on one H100 (a backward time is that of forward and
# backward less that of forward)
MEASURED = {
    "chain 192→160→96": (problem((192, 160, 96), 32, 512), "triton", "cudnn"),
    "mlpconv 5×5": (problem((3, 192, 160, 96), 32, 512, taps=25), "triton", "cudnn"),
    "chain 192→192→192": (problem((192, 192, 192), 16, 512), "triton", "cudnn"),
    "chain 192→192→10": (problem((192, 192, 10), 8, 512), "triton", "triton"),
    "5×5 96→192": (problem((96, 192), 16, 512, taps=25), "cudnn", "cudnn"),
    "3×3 192→192": (problem((192, 192), 8, 512, taps=9), "cudnn", "cudnn"),
    "1×1 192→32": (problem((192, 32), 28, 512), "triton", "cudnn"),
    "ConvNeXt": (problem((96, 384, 96), 56, 64, activation="gelu"), "triton", "cudnn"),
}
each_measured = pytest.mark.parametrize(("case", "forward", "backward"), list(MEASURED.values()), ids=MEASURED)


@each_measured
def test_the_table_chooses_what_was_fastest(case, forward, backward, monkeypatch):
    monkeypatch.setenv("NIN_GPU_TUNE", "0")
    assert {group.choice.engine for group in engine_plan.plan_forward(case)} == {forward}
    assert {group.choice.engine for group in engine_plan.plan_backward(case)} == {backward}
    for backward_too, wanted in ((False, forward), (True, backward)):
        choice = choose(case, backward=backward_too)
        assert (choice.engine, choice.source) == (wanted, "table (H100)")


def test_the_table_gives_its_own_figures_back():
    for case in h100_timings.CASES:
        estimate = h100_timings.estimate_us(case.problem, backward=case.backward)
        assert estimate == pytest.approx(case.microseconds)
        choice = choose(case.problem, backward=case.backward)
        assert case.microseconds[choice.engine] == min(case.microseconds.values())
    names = [(case.name, case.backward) for case in h100_timings.CASES]
    assert len(set(names)) == len(names) == 16


def test_shapes_between_follow_the_case_that_is_most_like_them():
    # half the images: half the time
    half = h100_timings.estimate_us(problem((192, 160, 96), 32, 256), backward=False)
    assert half == pytest.approx({"triton": 88.5, "cublas": 165, "cudnn": 414})
    assert choose(problem((160, 128, 128), 28, 256), backward=False).engine == "triton"
    assert choose(problem((160, 128, 128), 28, 256), backward=True).engine == "cudnn"
    assert choose(problem((192, 192, 10), 8, 128), backward=True).engine == "triton"


@pytest.mark.parametrize("unlike", [{"itemsize": 4}, {"layout": "NCHW"}, {"layout": "view"}], ids=str)
def test_what_was_not_measured_stays_with_the_library(unlike):
    case = dataclasses.replace(problem((192, 160, 96), 32, 512), **unlike)
    for backward in (False, True):
        assert choose(case, backward=backward) == Choice("cudnn", "table (H100)")


def test_a_spatial_layer_of_the_library_leaves_the_chain_to_a_kernel():
    plan = engine_plan.plan_forward(problem((96, 192, 192, 192), 16, 512, taps=25))
    assert engines(plan) == [(0, 1, "cudnn"), (1, 2, "triton")]
    # 3→192→160→96 in float32, of which nothing was measured
    plan = engine_plan.plan_forward(problem((3, 192, 160, 96), 32, 512, taps=25, itemsize=4))
    assert {engine for _, _, engine in engines(plan)} == {"cudnn"}


# -- what forces an engine --------------------------------------------------------------------------------------


def call(*widths, images=2, size=(5, 7), dtype=torch.float32, layout=torch.channels_last, kernel_size=1):
    x = torch.randn(images, widths[0], *size).to(dtype).contiguous(memory_format=layout)
    sizes = [kernel_size] + [1] * (len(widths) - 2)
    weights = [
        torch.randn(o, i, k, k).to(dtype) * i**-0.5 for (i, o), k in zip(itertools.pairwise(widths), sizes, strict=True)
    ]
    biases = [torch.randn(o).to(dtype) for o in widths[1:]]
    chain = ChainArguments(weights, biases, (1, 1), (0, 0), (1, 1), ["relu"] * len(weights))
    return x, chain


def test_the_environment_decides(monkeypatch):
    x, chain = call(192, 160, 96)
    monkeypatch.setenv("NIN_GPU", "triton")
    assert engines(dispatch.forward_plan(x, chain)) == [(0, 2, "triton")]
    assert dispatch.forward_plan(x, chain)[0].choice.source == "NIN_GPU=triton"
    monkeypatch.setenv("NIN_GPU", "reference")
    assert dispatch.forward_plan(x, chain) == ()
    assert "NIN_GPU=reference" in nin.backends()["cuda"]
    monkeypatch.setenv("NIN_GPU", "cudnn")
    with pytest.raises(UserError, match="NIN_GPU must be auto, triton or reference, got 'cudnn'"):
        dispatch.forward_plan(x, chain)


def test_the_tuning_mode_is_checked(monkeypatch):
    monkeypatch.setenv("NIN_GPU_TUNE", "yes")
    with pytest.raises(UserError, match="NIN_GPU_TUNE must be 0, 1 or full, got 'yes'"):
        nin.backends()


# -- by measurement, with a fake clock --------------------------------------------------------------------------


class FakeClock:
    """A clock that stands still until something takes time."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def takes(self, seconds, result=None):
        def prepare():
            self.now += seconds
            if isinstance(result, Exception):
                raise result
            return result

        return prepare


def tuning(clock, times, budget=1.0):
    """Return a measurement in which an engine or tiles take ``times``."""
    return autotune.Tuning(time_us=times.__getitem__, clock=clock, ends=clock() + budget)


def test_the_fastest_engine_is_chosen_and_kept():
    clock, case = FakeClock(), problem((192, 160, 96), 32, 512)
    times, measured = {"cudnn": 828.0, "cublas": 330.0, "triton": 177.0}, []

    def measure():
        measured.append(1)
        prepared = {name: clock.takes(0.1, name) for name in times}
        return autotune.time_engines(prepared, tuning(clock, times)), {"chain_forward": "tiles"}, []

    for _ in range(3):
        choice = choose(case, backward=False, platform="card A", measure=measure)
        assert choice == Choice("triton", "measured", times, {"chain_forward": "tiles"})
    assert choice.figures() == "triton 177 µs, cublas 330 µs, cudnn 828 µs, measured"
    assert measured == [1]
    assert "triton 177 µs, cublas 330 µs, cudnn 828 µs, measured" in nin.backends()["cuda"]
    times["cudnn"] = 1.0  # gradients are measured apart
    assert choose(case, backward=True, platform="card A", measure=measure).engine == "cudnn"
    # so is another card, or another version
    assert choose(case, backward=False, platform="card B", measure=measure).engine == "cudnn"
    assert len(measured) == 3


def test_close_numbers_of_pixels_share_a_measurement():
    names = {problem((192, 160, 96), size, 64).name() for size in range(28, 57)}
    assert len(names) == 5  # two in each doubling
    alike = problem((192, 160, 96), 32, 64)
    for change in ({"itemsize": 4}, {"layout": "NCHW"}, {"activations": ("relu", "gelu")}, {"widths": (160, 97)},
                   {"geometry": ((1, 1), (2, 2), (0, 0), (1, 1))}):  # fmt: skip
        assert dataclasses.replace(alike, **change).name() != alike.name()


def test_the_budget_holds():
    clock = FakeClock()
    prepared = {"cudnn": clock.takes(0.4, "cudnn"), "cublas": clock.takes(0.7, "cublas"), "triton": clock.takes(9, "")}
    one = tuning(clock, {"cudnn": 2.0, "cublas": 1.0})
    assert autotune.time_engines(prepared, one) == {"cudnn": 2.0, "cublas": 1.0}
    assert one.left_out == ["triton"]  # the second was over
    assert clock() == pytest.approx(101.1)


def test_tiles_are_tried_while_there_is_time():
    clock, launched = FakeClock(), []

    def launch(tiles):
        launched.append(tiles)
        clock.now += 0.3 if launched.count(tiles) == 1 else 0.0  # compiles

    times = iter([3.0, 1.0, 2.0, 0.5])
    one = autotune.Tuning(time_us=lambda run: (run(), next(times))[1], clock=clock, ends=clock() + 1.0)
    with autotune.use(one):
        autotune.launch_tuned("kernel", (1, 2), torch.zeros(1), ["a", "b", "c", "d"], launch)
    # after three, a fourth compilation as long as those would end after the second
    assert launched == ["a", "a", "b", "b", "c", "c", "b"]
    assert one.tiles == {"kernel": "b"}
    assert one.left_out == ["kernel d"]
    # without a measurement: what was chosen, else the first
    launched.clear()
    with autotune.use(autotune.Tuning({"kernel": "c"})):
        autotune.launch_tuned("kernel", (1, 2), torch.zeros(1), ["a", "b", "c"], launch)
    autotune.launch_tuned("kernel", (1, 2), torch.zeros(1), ["a", "b", "c"], launch)
    assert launched == ["c", "a"]


def test_without_a_limit_what_was_left_out_is_measured(monkeypatch):
    case = problem((192, 160, 96), 32, 512)
    choose(case, backward=False, platform="card", measure=lambda: ({"cudnn": 3.0}, {}, ["triton"]))
    assert choose(case, backward=False, platform="card", measure=lambda: 1 / 0).engine == "cudnn"
    monkeypatch.setenv("NIN_GPU_TUNE", "full")
    answer = {"cudnn": 3.0, "triton": 2.0}, {}, []
    assert choose(case, backward=False, platform="card", measure=lambda: answer).engine == "triton"
    assert choose(case, backward=False, platform="card", measure=lambda: 1 / 0).engine == "triton"


def test_the_table_serves_where_it_is_asked_for_and_where_nothing_can_be_measured(monkeypatch):
    case = problem((192, 160, 96), 32, 512)
    assert choose(case, backward=False, platform="card", measure=None).source == "table (H100)"
    monkeypatch.setenv("NIN_GPU_TUNE", "0")
    timing = {"fastest": "cudnn", "us": {"cudnn": 1.0}, "tiles": {}, "left_out": []}
    timing_cache.keep_timing("card", f"forward {case.name()}", timing)
    assert choose(case, backward=False, platform="card").engine == "triton"
    monkeypatch.setenv("NIN_GPU_TUNE", "1")  # while a graph is captured, what was measured before serves
    assert choose(case, backward=False, platform="card", measure=None).engine == "cudnn"


def test_float32_without_matrix_units_stays_with_the_library_unmeasured(monkeypatch):
    case = problem((192, 160, 96), 32, 512, itemsize=4, precision="ieee")
    answer = {"cudnn": 3.0, "triton": 2.0}, {}, []
    for backward in (False, True):
        assert choose(case, backward=backward, platform="card", measure=lambda: 1 / 0).engine == "cudnn"
    tf32 = dataclasses.replace(case, precision="tf32")
    half = dataclasses.replace(case, itemsize=2)
    for other in (tf32, half):
        assert choose(other, backward=False, platform="card", measure=lambda: answer).source == "measured"
    forced = dataclasses.replace(case, engine="triton")
    assert choose(forced, backward=False, platform="card", measure=lambda: 1 / 0).engine == "triton"
    monkeypatch.setenv("NIN_GPU_TUNE", "full")
    assert choose(case, backward=False, platform="card", measure=lambda: answer).engine == "triton"
    monkeypatch.setenv("NIN_GPU_TUNE", "1")  # what was measured so serves
    assert choose(case, backward=False, platform="card", measure=lambda: 1 / 0).source == "measured"


def test_without_an_assembler_the_library_serves_and_it_is_said_once(monkeypatch):
    def missing(arch):
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("NIN_GPU", "triton")
    dispatch.triton_problem.cache_clear()
    try:
        x, chain = call(24, 40, 16)
        with pytest.warns(UserWarning, match="nin: Triton cannot compile: Cannot find ptxas; PyTorch's own") as said:
            results = [dispatch.mlpconv(x, chain), dispatch.mlpconv(x[:1], chain)]
        assert len(said) == 1
        torch.testing.assert_close(results[0], reference.mlpconv(x, chain))
        assert "Cannot find ptxas" in dispatch.backend_summary()
    finally:
        dispatch.triton_problem.cache_clear()


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    x = mock.Mock(is_cuda=True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert dispatch._can_measure(x) is not capturing
    monkeypatch.setenv("NIN_GPU_TUNE", "0")
    assert not dispatch._can_measure(x)
    assert not dispatch._can_measure(torch.zeros(1))


def test_an_engine_that_fails_is_dropped_and_said_once():
    clock = FakeClock()
    failures = {
        "triton": autotune.KernelUnavailableError("kernel: takes 1,050,112 bytes of shared memory, of 232,448"),
        "cublas": torch.OutOfMemoryError("no memory"),
    }
    prepared = {"cudnn": clock.takes(0, "cudnn"), **{name: clock.takes(0, e) for name, e in failures.items()}}
    with pytest.warns(UserWarning, match=r"nin: (triton|cublas) is not among the engines here") as said:
        times = [autotune.time_engines(prepared, tuning(clock, {"cudnn": 1.0})) for _ in range(2)]
    assert times == [{"cudnn": 1.0}] * 2
    assert len(said) == 2


# -- the file ---------------------------------------------------------------------------------------------------

TIMING = {"fastest": "triton", "us": {"triton": 1.5, "cudnn": 2.0}, "tiles": {"k": "t"}, "left_out": []}


def test_a_second_process_reads_what_the_first_measured(tmp_path):
    case = problem((192, 160, 96), 32, 512)
    choose(case, backward=False, platform="card", measure=lambda: ({"cudnn": 2.0, "triton": 3.0}, {}, []))
    code = (
        "from nin.ops.gpu.engine_choice import choose\nfrom nin.ops.gpu.problem import ChainProblem\n"
        f"case = ChainProblem({case.pixels}, 192, (160, 96), ('relu', 'relu'))\n"
        "print(choose(case, backward=False, platform='card', measure=lambda: 1 / 0).figures())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "cudnn 2 µs, triton 3 µs, measured\n", done.stderr


def test_processes_keep_each_others_timings(tmp_path):
    timing_cache.keep_timing("card", "one", TIMING)
    timing_cache._read.clear()  # another process, which has read nothing yet
    timing_cache.keep_timing("card", "two", TIMING)
    timing_cache.keep_timing("other card", "three", TIMING)
    kept = json.loads((tmp_path / "timings.json").read_text())
    assert kept == {"card": {"one": TIMING, "two": TIMING}, "other card": {"three": TIMING}}


def test_threads_may_write_at_once(tmp_path):
    threads = [
        threading.Thread(target=timing_cache.keep_timing, args=("card", f"problem {i}", TIMING)) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads((tmp_path / "timings.json").read_text())["card"]) == 8


@pytest.mark.parametrize("content", ["{half a fi", "[]", '{"card": 3}', "\ud800".encode("utf-8", "surrogatepass")])
def test_a_damaged_file_is_measured_again_and_said_once(tmp_path, content):
    file = tmp_path / "timings.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=r"timings.json is damaged .*; kernels are timed again") as said:
        found = [timing_cache.read_timing(card, "problem") for card in ("card", "other card")]
    assert found == [None, None]
    assert len(said) == 1
    timing_cache.keep_timing("card", "problem", TIMING)
    assert json.loads(file.read_text()) == {"card": {"problem": TIMING}}


@pytest.mark.parametrize(
    "change",
    [{"fastest": "cublas"}, {"us": {"triton": -1.0}}, {"us": {"triton": "1"}}, {"tiles": ["t"]}, {"left_out": 1}],
    ids=str,
)
def test_damaged_entries_are_measured_again(tmp_path, change):
    entries = {"whole": TIMING, "damaged": {**TIMING, **change}}
    (tmp_path / "timings.json").write_text(json.dumps({"card": entries}))
    with pytest.warns(UserWarning, match="has damaged entries"):
        assert timing_cache.read_timing("card", "damaged") is None
    assert timing_cache.read_timing("card", "whole") == TIMING


def test_the_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(timing_cache, "MAX_PROBLEMS", 3)
    monkeypatch.setattr(timing_cache, "MAX_PLATFORMS", 2)
    for card in ("a", "b", "c"):
        for i in range(5):
            timing_cache.keep_timing(card, str(i), TIMING)
    kept = json.loads((tmp_path / "timings.json").read_text())
    assert {card: list(problems) for card, problems in kept.items()} == {"b": ["2", "3", "4"], "c": ["2", "3", "4"]}


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NIN_GPU_CACHE", str(tmp_path / "file/timings.json"))
    with pytest.warns(UserWarning, match="cannot be written, so kernels are timed again next time") as said:
        _ = [timing_cache.keep_timing("card", name, TIMING) for name in "ab"]
    assert len(said) == 1
    assert timing_cache.read_timing("card", "b") == TIMING


def test_the_platform_names_card_and_versions():
    import triton

    name = timing_cache.platform_name(torch.device("cpu"))
    assert all(text in name for text in (f"torch {torch.__version__}", f"triton {triton.__version__}", "nin ", "cuDNN"))


# -- kernels that do not fit ------------------------------------------------------------------------------------


def test_tiles_that_do_not_fit_give_way_to_the_next_and_it_is_said_once():
    launched = []

    def launch(tiles):
        if tiles == "large":
            raise autotune.KernelUnavailableError("kernel: takes 300,000 bytes of shared memory, of 232,448")
        launched.append(tiles)

    with pytest.warns(UserWarning, match="kernel: takes 300,000 bytes of shared memory, of 232,448") as said:
        _ = [autotune.launch_tuned("kernel", (1,), torch.zeros(1), ["large", "small"], launch) for _ in range(2)]
    assert launched == ["small", "small"]
    assert len(said) == 1
    with pytest.raises(autotune.KernelUnavailableError):
        autotune.launch_tuned("kernel", (2,), torch.zeros(1), ["large"], launch)


@pytest.mark.parametrize("engine", ["auto", "triton"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_library_serves_where_no_kernel_fits(engine, backward, monkeypatch):
    from nin.ops.gpu import forward

    def fail(kernel, *arguments, **constants):
        raise autotune.KernelUnavailableError(f"{kernel.__name__}: takes too much")

    monkeypatch.setattr(forward, "launch", fail)
    monkeypatch.setenv("NIN_GPU", engine)
    x, chain = call(17, 33, 9, dtype=torch.bfloat16, images=4)
    y = reference.mlpconv(x, chain)
    grad, needs = torch.randn_like(y), [True] * 5
    want = reference.mlpconv_backward(grad, x, y, chain, needs) if backward else y
    table = {"triton": 1.0, "cudnn": 2.0}
    monkeypatch.setattr(h100_timings, "estimate_us", lambda problem, *, backward: table)
    with pytest.warns(UserWarning, match="takes too much"):
        got = dispatch.mlpconv_backward(grad, x, y, chain, needs) if backward else dispatch.mlpconv(x, chain)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    plan = (dispatch.backward_plan if backward else dispatch.forward_plan)(x, chain)
    assert [(group.choice.engine, group.choice.source) for group in plan] == [("cudnn", "no kernel fits")]


# -- one plan for many calls ------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch):
    """Count the calls of the planner, and how often it lists the candidate tiles of each kernel."""
    monkeypatch.setenv("NIN_GPU", "triton")
    kernels = ("chain", "layer", "pair", "layer_gradient")
    calls = {}
    for module, name in [
        (engine_plan, "plan_forward"),
        (engine_plan, "plan_backward"),
        *((tile_sizes, f"{k}_tiles") for k in kernels),
    ]:
        calls[name] = mock.Mock(wraps=getattr(module, name))
        monkeypatch.setattr(module, name, calls[name])
    return lambda: {name: spy.call_count for name, spy in calls.items() if spy.call_count}


def test_many_calls_make_one_plan(planned):
    x, chain = call(3, 5, 4, 6, 7, kernel_size=3)
    for _ in range(3):
        with dispatch.record_groups() as groups:
            y = dispatch.mlpconv(x, chain)
        assert engines(groups) == [(0, 3, "triton"), (3, 1, "triton")]
    assert planned() == {"plan_forward": 1, "chain_tiles": 1, "layer_tiles": 1}
    for _ in range(3):
        with dispatch.record_groups() as groups:
            dispatch.mlpconv_backward(torch.ones_like(y), x, y, chain, [True] * 9)
        assert [group.count for group in groups] == [1, 1, 2]
    counts = planned()
    assert counts["plan_backward"] == counts["pair_tiles"] == 1


def gradients(x, chain, y, grad):
    grads = dispatch.mlpconv_backward(grad, x, y, chain, [True] * (1 + 2 * len(chain.weights)))
    return [grads[0], *grads[1], *grads[2]]


@pytest.mark.parametrize("engine", ["triton", "auto"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_replayed_call_computes_what_the_first_one_does(layout, engine, monkeypatch):
    monkeypatch.setenv("NIN_GPU", engine)
    for _ in range(3):
        x, chain = call(6, 20, 33, 10, layout=layout)
        y = dispatch.mlpconv(x, chain)
        want = reference.mlpconv(x, chain)
        torch.testing.assert_close(y, want)
        assert y.stride() == want.stride()
        grad = torch.randn_like(y)
        for got, wanted in zip(gradients(x, chain, y, grad), _reference_gradients(x, chain, y, grad), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            assert got.stride() == wanted.stride()
    assert len(dispatch._calls) == 2


def _reference_gradients(x, chain, y, grad):
    grads = reference.mlpconv_backward(grad, x, y, chain, [True] * (1 + 2 * len(chain.weights)))
    return [grads[0], *grads[1], *grads[2]]


def test_tensors_that_were_one_may_be_two_the_next_time(monkeypatch):
    monkeypatch.setenv("NIN_GPU", "triton")
    x, chain = call(8, 8, 8)
    (weight, _), (bias, _) = chain.weights, chain.biases
    tied = chain._replace(weights=[weight, weight], biases=[bias, bias])
    y = dispatch.mlpconv(x, tied)
    torch.testing.assert_close(y, reference.mlpconv(x, tied))
    gradients(x, tied, y, y)  # the gradient is the output itself
    y = dispatch.mlpconv(x, chain)
    torch.testing.assert_close(y, reference.mlpconv(x, chain))
    grad = torch.randn_like(y)
    for got, wanted in zip(gradients(x, chain, y, grad), _reference_gradients(x, chain, y, grad), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(dispatch._calls) == 2


def test_inputs_that_are_parts_of_one_tensor_may_lie_apart_the_next_time(monkeypatch):
    monkeypatch.setenv("NIN_GPU", "triton")
    _, chain = call(8, 8, 8)
    store = torch.randn(3, 2, 8, 5, 7)
    for x, grad in ((store[0], store[1]), (store[2], torch.randn(2, 8, 5, 7)), (store[1], store[0])):
        y = dispatch.mlpconv(x, chain)
        torch.testing.assert_close(y, reference.mlpconv(x, chain))
        for got, wanted in zip(gradients(x, chain, y, grad), _reference_gradients(x, chain, y, grad), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def other_calls(x, chain):
    yield x[:1], chain
    yield x.to(memory_format=torch.contiguous_format), chain
    yield x[:, :, ::2], chain
    shifted = torch.empty(x.numel() + 1).as_strided(x.shape, x.stride(), 1).copy_(x)
    yield shifted, chain
    yield x, chain._replace(biases=[None, chain.biases[1]])
    yield x, chain._replace(activations=["relu", "silu"])
    yield x, chain._replace(stride=(2, 2))
    yield x, chain._replace(weights=[chain.weights[0].to(memory_format=torch.channels_last), chain.weights[1]])
    yield (
        x.double(),
        chain._replace(weights=[w.double() for w in chain.weights], biases=[b.double() for b in chain.biases]),
    )


def test_each_difference_that_matters_has_a_plan_of_its_own(monkeypatch):
    monkeypatch.setenv("NIN_GPU", "triton")
    x, chain = call(8, 12, 4)
    dispatch.mlpconv(x, chain)
    for number, (other, other_chain) in enumerate(other_calls(x, chain), start=2):
        for _ in range(2):
            torch.testing.assert_close(dispatch.mlpconv(other, other_chain), reference.mlpconv(other, other_chain))
        # a 1×1 weight has the same strides in either memory format but for a channel of one
        assert len(dispatch._calls) == number
    monkeypatch.setenv("NIN_GPU", "auto")
    dispatch.mlpconv(x, chain)
    assert len(dispatch._calls) == number + 1


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_CALLS", 3)
    _, chain = call(3, 4, 2)
    for size in range(1, 7):
        dispatch.mlpconv(torch.randn(1, 3, size, size), chain)
    assert len(dispatch._calls) == 3


def test_a_replay_keeps_no_memory(monkeypatch):
    monkeypatch.setenv("NIN_GPU", "triton")
    x, chain = call(8, 12, 4)
    y = dispatch.mlpconv(x, chain)
    y = dispatch.mlpconv(x, chain)
    tensors = [weakref.ref(t) for t in (x, y, *chain.weights)]
    del x, y, chain
    assert [t() for t in tensors] == [None] * 4


def every_kind_of_step(x, weight):
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # a view where the channels lie together, and a copy where not
    out = x.new_empty((weight.shape[0], x.shape[1], 1, 1))
    torch.mm(weight.t()[:3].t(), rows[: weight.shape[1]][:3], out=out.view(out.shape[:2]))
    largest, _ = rows.max(1)
    (whole,) = largest.split(largest.numel())  # a list of one
    left, right = rows.split([2, x.shape[1] - 2], 1)
    scratch = torch.empty(rows.shape[0], dtype=torch.float64)
    scratch.copy_(whole).mul_(2)
    return out, [left, right[1:, 1:]], (x[:, 1:].detach(), scratch.clone().detach())


@pytest.mark.parametrize("public", [False, True], ids=["as Inductor", "by public functions"])
def test_every_kind_of_step_is_replayed_on_the_calls_own_tensors(public, monkeypatch):
    if public:  # those without the dispatcher may be missing from another version of PyTorch
        monkeypatch.setattr(replay, "_EMPTY", {})
        monkeypatch.setattr(replay, "_view", replay._view_slowly)
    else:
        assert set(replay._EMPTY) == {"cpu", "cuda"}
        assert replay._view is not replay._view_slowly

    def inputs(offset):
        store = torch.randn(2 * 3 * 3 * 5 + offset)[offset:].view(2, 3, 3, 5)
        return store.permute(0, 3, 1, 2), torch.randn(4, 6)

    _, recorded = replay.record(every_kind_of_step, inputs(0))
    for offset in (0, 7):
        given = inputs(offset)
        torch.testing.assert_close(recorded(given), every_kind_of_step(*given), rtol=0, atol=0, check_stride=True)


def test_a_replays_results_have_memory_of_their_own(monkeypatch):
    monkeypatch.setenv("NIN_GPU", "triton")
    x, chain = call(8, 12, 4, layout=torch.channels_last)
    for _ in range(2):
        y = dispatch.mlpconv(x, chain)
        results = [y, *gradients(x, chain, y, torch.ones_like(y))]
        assert not any(t._is_view() for t in results)
        addresses = {t.untyped_storage().data_ptr() for t in (x, *chain.weights, *chain.biases, *results)}
        assert len(addresses) == len(results) + 5


class _Alive(TorchDispatchMode):
    """Counts the results that are alive when an operator is called."""

    def __init__(self):
        super().__init__()
        self.results, self.counts = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts.append(sum(result() is not None for result in self.results))
        result = func(*args, **(kwargs or {}))
        self.results.append(weakref.ref(result))
        return result


def test_memory_goes_to_others_after_its_last_use():
    def call(x):
        return ((((x + 1) * 2) - 3) / 4).relu()

    x = torch.randn(8)
    _, recorded = replay.record(call, (x,))
    with _Alive() as mode:
        y = recorded((x,))
    torch.testing.assert_close(y, call(x))
    assert mode.counts == [0, 1, 1, 1, 1]  # an operator's own argument, and none before it


def test_what_returns_its_argument_is_replayed_as_a_view_of_it():
    _, recorded = replay.record(lambda x: x.view(x.shape), (torch.randn(3),))
    x = torch.randn(3)
    y = recorded((x,))
    assert y is not x
    assert y.data_ptr() == x.data_ptr()


def test_a_plan_made_during_capture_is_not_kept(monkeypatch):
    x, chain = call(8, 12, 4)
    monkeypatch.setattr(dispatch, "_is_final", lambda x, groups: False)
    dispatch.mlpconv(x, chain)
    assert dispatch._calls == {}


def test_a_call_through_the_operator_is_counted_once():
    x, chain = call(8, 12, 4)
    with FlopCounterMode(display=False) as counter:
        dispatch.mlpconv(x, chain)
        first = counter.get_total_flops()
        dispatch.mlpconv(x, chain)
    assert counter.get_total_flops() == 2 * first


# -- the engines themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fastest", ["triton", "cublas", "cudnn"])
def test_the_first_call_times_every_engine_on_its_own_tensors(fastest, monkeypatch):
    from nin.ops.gpu import engine_timing, forward

    timed, ran = [], []
    run_engine = forward.run_engine
    monkeypatch.setattr(forward, "run_engine", lambda name, *rest: ran.append(name) or run_engine(name, *rest))

    def time_us(run):
        result = run()
        timed.append(result if isinstance(result, torch.Tensor) else None)
        return 1.0 if ran and ran[-1] == fastest else 2.0 + len(timed)

    monkeypatch.setattr(engine_timing, "GpuTimer", lambda device: time_us)
    monkeypatch.setattr(dispatch, "_can_measure", lambda x: True)
    monkeypatch.setattr(autotune, "BUDGET_S", 1e6)  # by a real clock
    before = torch.random.get_rng_state()
    x, chain = call(17, 33, 9, dtype=torch.bfloat16)
    state = torch.random.get_rng_state()
    y = dispatch.mlpconv(x, chain)
    assert torch.equal(torch.random.get_rng_state(), state)  # a training's random numbers are not touched
    assert not torch.equal(before, state)
    torch.testing.assert_close(y, reference.mlpconv(x, chain), rtol=0.05, atol=0.05)
    (group,) = dispatch.forward_plan(x, chain)
    assert group.choice.engine == fastest
    assert group.choice.source == "measured"
    assert group.choice.microseconds.keys() == {"triton", "cublas", "cudnn"}
    assert group.choice.tiles.keys() == {"chain_forward"}
    count = len(timed)
    for _ in range(2):
        torch.testing.assert_close(dispatch.mlpconv(x, chain), y, rtol=0, atol=0)
    assert len(timed) == count
    assert ran[-1] == fastest


def test_the_first_backward_call_times_both_engines(monkeypatch):
    from nin.ops.gpu import engine_timing

    times = iter(range(100, 0, -1))
    monkeypatch.setattr(engine_timing, "GpuTimer", lambda device: lambda run: (run(), float(next(times)))[1])
    monkeypatch.setattr(dispatch, "_can_measure", lambda x: True)
    monkeypatch.setattr(autotune, "BUDGET_S", 1e6)  # by a real clock
    x, chain = call(6, 20, 33, 10)
    y = dispatch.mlpconv(x, chain)
    grad = torch.randn_like(y)
    for _ in range(2):
        for got, wanted in zip(gradients(x, chain, y, grad), _reference_gradients(x, chain, y, grad), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    plan = dispatch.backward_plan(x, chain)
    assert [group.count for group in plan] == [1, 2]
    for group in plan:
        assert group.choice.source == "measured"
        assert group.choice.microseconds.keys() == {"triton", "cudnn"}
        assert group.choice.tiles.keys() == {f"backward_of_{group.count}"}


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_products_of_matrices_equal_convolutions(activation, bias, size, layout):
    from nin.ops.gpu import matrix_products

    if size != (1, 1):
        layout = torch.channels_last
    x, chain = call(7, 5, 1, size=size)
    x = x.to(memory_format=layout)
    chain = chain._replace(activations=[activation] * 2, biases=chain.biases if bias else [None, None])
    assert matrix_products.is_supported(x, chain)
    y = matrix_products.mlpconv(x, chain)
    want = reference.mlpconv(x, chain)
    torch.testing.assert_close(y, want)
    assert y.stride() == want.stride()


def test_images_of_one_pixel_are_a_row_in_every_format():
    from nin.ops.gpu.strides import coalesce_pixels

    for x in (torch.randn(5, 7, 1, 1), torch.randn(5, 7, 1, 1).to(memory_format=torch.channels_last)):
        walk = coalesce_pixels(x, torch.randn(5, 3, 2, 2)[:, :, :1, :1])
        assert (walk.pixels, walk.height, walk.width) == (5, 1, 5)
        assert walk.strides == ((7, 1, 0, 7), (12, 4, 0, 12))


def test_products_of_matrices_want_rows():
    from nin.ops.gpu import matrix_products

    x, chain = call(8, 6)
    assert not matrix_products.is_supported(x.contiguous(), chain)
    assert not matrix_products.is_supported(x[:, :, ::2], chain)
    assert not matrix_products.is_supported(x, chain._replace(stride=(2, 2)))
    assert not matrix_products.is_supported(x, chain._replace(padding=(1, 1)))
    assert not matrix_products.is_supported(*call(8, 6, kernel_size=3))
