"""The benchmark: the same numbers from every engine, results that say what ran, a table and a chart of them."""

import dataclasses
import io
import json
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

import nin
from nin.errors import UserError
from nin.profiling import bench
from nin.profiling.bench import engines
from nin.profiling.bench.cases import CASES, Case
from nin.runtime.timer import Timing

SMALL = Case("small", lambda: nin.MLPConv(3, (8, 5), kernel_size=3, padding=1), (2, 3, 8, 8))
SMALL_NETWORK = Case("small-network", lambda: nin.models.nin_digits().fold(), (2, 1, 8, 8), True, True)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(CASES, "small", SMALL)
    monkeypatch.setitem(CASES, "small-network", SMALL_NETWORK)
    monkeypatch.setattr("nin.profiling.bench.runner.SECONDS_PER_CASE", 0.01)
    monkeypatch.setattr("nin.profiling.bench.runner.SETTLE_MS", 0.0)
    monkeypatch.setattr("nin.profiling.bench.runner.keep_freed_memory", lambda: False)  # of this process, for good


@pytest.mark.parametrize("make", [SMALL.model, lambda: nin.Inception(8, 4, 4, 4, 2, 3, 5), SMALL_NETWORK.model])
def test_the_plain_model_computes_the_same(make):
    model = make().eval()
    plain = engines.to_torch_modules(model)
    assert not any(isinstance(m, (nin.MLPConv, nin.Conv1x1)) for m in plain.modules())
    x = torch.randn(2, next(model.parameters()).shape[1], 8, 8)
    torch.testing.assert_close(plain(x), model(x))


def test_the_compiled_network_computes_the_same():
    for case in (SMALL, SMALL_NETWORK):
        plain = dataclasses.replace(case, training=False)
        compiled, eager = (engines.prepare(name, plain, torch.float32)() for name in ("nin compiled", "eager"))
        torch.testing.assert_close(compiled, eager)
    with pytest.raises(engines.UnavailableError, match="for inference only"):
        engines.prepare("nin compiled", SMALL_NETWORK, torch.float32)


def test_cases_are_what_the_names_say():
    assert CASES["chain-192-160-96"].input_shape == (64, 192, 32, 32)
    for case in CASES.values():
        with torch.device("meta"):
            model = case.model()
        assert isinstance(model, nn.Module)


def test_a_run_says_what_ran(small):
    lines = []
    told = []
    options = {"progress": lines.append, "on_progress": lambda *a: told.append(a)}
    result = bench.run(["small", "small-network"], engines=["nin", "eager"], **options)
    assert [(done, total) for _, done, total in told] == [(i, 4) for i in range(4)]
    assert [(m.case, m.dtype, m.engine) for m in result.measurements[:4]] == [
        ("small", "float32", "nin"),
        ("small", "float32", "eager"),
        ("small", "bfloat16", "nin"),
        ("small", "bfloat16", "eager"),
    ]
    assert len(lines) == 4
    assert all(m.timing.runs >= 5 and m.timing.median_ms > 0 for m in result.measurements)
    assert result.machine.kernel == nin.backends()["cpu"]
    assert result.ratio("small", "float32") > 0
    assert result.ratio("small", "float16") is None
    assert json.loads(json.dumps(result.to_dict()))["measurements"][0]["engine"] == "nin"


def test_engines_that_are_missing_are_listed(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    result = bench.run(["small"], dtypes=["float32"], engines=["nin", "OpenVINO", "ONNX Runtime"])
    assert [m.reason for m in result.measurements][
        1
    ] == "not installed (openvino; pip install 'network-in-network[bench]')"
    assert "not installed (openvino" in shown(result)
    assert "not installed (onnxruntime" in bench.html_page(result)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"cases must be among chain-192-160-96, .+ got '2x2'"):
        bench.run(["2x2"])
    with pytest.raises(ValueError, match=r"dtypes must be among float32, bfloat16, got 'int8'"):
        bench.run(dtypes=["int8"])


def shown(result):
    console = Console(width=200, file=io.StringIO())
    console.print(bench.rich_table(result))
    return console.file.getvalue()


def test_the_table_and_the_chart_hold_the_numbers():
    machine = bench.Machine("A <chip>", 2, "nin", {"float32": 470.0}, 27.0, "tuned", {"torch": "2"}, "3", "L", "d")
    rows = [
        bench.EngineResult("c", "float32", "nin", Timing(2.0, 1.9, 2.2, 9), share_of_limit=0.5),
        bench.EngineResult("c", "float32", "eager", Timing(5.0, 4.0, 6.0, 9)),
    ]
    result = bench.Benchmark(machine, rows)
    assert result.ratio("c", "float32") == 2.5
    assert all(text in shown(result) for text in ("2.000", "50%", "2.50", "470 GFLOP/s"))
    page = bench.html_page(result)
    assert "Over 100 %" not in shown(result)
    faster = dataclasses.replace(rows[0], share_of_limit=1.6)
    assert "Over 100 %: less arithmetic" in shown(bench.Benchmark(machine, [faster]))
    assert "A &lt;chip&gt;" in page
    assert page.count("<rect") == 2
    assert "http" not in page
    assert dataclasses.asdict(result)["measurements"][1]["timing"]["runs"] == 9


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"device must be auto or one of this machine \(cpu.*\), got 'cuda:9'"):
        bench.run([], device="cuda:9")


def test_what_ran_on_a_gpu_is_in_the_table():
    from nin.ops.gpu import dispatch
    from nin.ops.gpu.engine_choice import Choice
    from nin.ops.gpu.engine_plan import LayerGroup
    from nin.ops.gpu.problem import ChainProblem

    problem = ChainProblem(1024, 192, (160, 96), ("relu", "relu"))
    choice = Choice("triton", "measured", {"cudnn": 828.0, "triton": 177.2})
    groups = [
        LayerGroup(0, 1, Choice("cudnn", "table (H100)"), problem.subchain(0, 1)),
        LayerGroup(1, 2, choice, problem),
    ]
    assert dispatch.engine_summary(groups) == "Triton 2 layers, cuDNN 1 layers"
    lines = dispatch.choice_lines([*groups, *groups])
    assert lines == [
        "192→160 forward: cudnn, table (H100)",
        "192→160→96 forward: triton 177 µs, cudnn 828 µs, measured",
    ]
    machine = bench.Machine("A GPU", 2, "nin", {"float32": None}, None, "tuned", {"torch": "2"}, "3", "L", "d")
    ran = dispatch.engine_summary(groups)
    row = bench.EngineResult("c", "float32", "nin", Timing(2.0, 1.9, 2.2, 9), ran=ran, choices=tuple(lines))
    page = shown(bench.Benchmark(machine, [row]))
    assert "nin (Triton 2 layers, cuDNN 1 layers)" in page
    assert "192→160→96 forward: triton 177 µs, cudnn 828 µs, measured" in page


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_a_gpu_says_which_kernels_ran(small):
    result = bench.run(["small", "small-network"], engines=["nin", "eager", "OpenVINO"], device="cuda")
    assert result.machine.kernel == nin.backends()["cuda"]
    assert all(m.ran for m in result.measurements if m.engine == "nin")
    assert {m.reason for m in result.measurements if m.engine == "OpenVINO"} <= {
        "for inference only",
        "timed on the CPU only",
    }
