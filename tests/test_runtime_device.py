"""The device: every verb and public function asks in one place, before it loads anything."""

import pytest
import torch

import nin
from nin import server
from nin.cli import app
from nin.errors import UserError
from nin.narrowing.narrow_to_folder import narrow_run
from nin.narrowing.workflow import choose_narrowing_device
from nin.narrowing.workflow_config import WorkflowConfig
from nin.profiling import bench
from nin.runtime import device

WRONG = ["gpu", "meta", "", "cuda:-1", "cuda:99", "CPU", "hpu", "tpu:x"]
if not torch.cuda.is_available():
    WRONG += ["cuda", "cuda:7"]
if not torch.backends.mps.is_available():
    WRONG.append("mps")
if not torch.xpu.is_available():
    WRONG.append("xpu")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_here_is_one_line(name):
    with pytest.raises(UserError, match=r"^device must be auto or one of this machine \(cpu") as refused:
        device.choose_device(name)
    assert f"got {name!r}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_here():
    assert device.choose_device("cpu") == device.choose_device(torch.device("cpu:0")) == torch.device("cpu")
    assert device.choose_device("auto").type in ("cpu", "cuda")
    for wrong in (None, 0, 1.5, ["cpu"]):
        with pytest.raises(UserError, match="device must be a name such as 'cpu' or 'cuda:0', got "):
            device.choose_device(wrong)


@pytest.mark.parametrize(("gpus", "chosen"), [(8, "cuda:3"), (1, "cuda:0")])
def test_a_process_of_a_job_takes_its_own_gpu(monkeypatch, gpus, chosen):
    """Where it is shown only one, that one."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)
    assert str(device.choose_device("auto")) == str(device.choose_device("cuda")) == chosen


def test_narrowing_needs_float64(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)
    with pytest.raises(UserError, match="device must be one that computes in float64, as narrowing does, got 'mps'"):
        choose_narrowing_device("mps", "pytorch")


@pytest.mark.parametrize(
    ("engine", "chosen"), [("pytorch", "cuda"), ("nin", "cuda"), ("onnxruntime", "cpu"), ("openvino", "cpu")]
)
def test_narrowing_for_an_engine_of_the_cpu_is_on_the_cpu(monkeypatch, engine, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)
    assert choose_narrowing_device("auto", engine).type == chosen
    assert choose_narrowing_device("cuda:0", engine).type == "cuda"  # refused where the engine is made


def test_a_device_without_memory_is_one_line(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has a total capacity of 79 GiB"
        )

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(UserError, match=r"^device 'cuda:0' has no memory left: end what fills it, or give another$"):
        device.choose_device("cuda:0")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99"])  # the command line refuses an empty one anyway
def test_no_verb_loads_anything_for_a_device_that_is_not_here(name, run, tmp_path, monkeypatch, capsys):
    def loads(*args, **options):
        raise AssertionError("the device comes first")

    photo = tmp_path / "a.png"
    photo.touch()
    for place in ("nin.checkpoint.load_model", "nin.data.load", "nin.profiling.bench.runner._inspect_machine"):
        monkeypatch.setattr(place, loads)
    for words in (
        ("train", "digits", "--out", str(tmp_path / "run")),
        ("predict", str(run), str(photo)),
        ("serve", str(run), "--no-browser"),
        ("serve", "--no-browser"),
        ("bench", "chain-192-160-96"),
        ("narrow", str(run), "--data", "digits", "--macs", "0.5", "--dry-run"),
    ):
        with pytest.raises(SystemExit) as stop:
            app.main([*words, "--device", name])
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("nin: device must be auto or one of this machine (cpu")
    for call in (
        lambda: nin.load(run, device=name),
        lambda: nin.train("digits", nin.TrainConfig(device=name)),
        lambda: server.create_app(run, device=name),
        lambda: bench.run([], device=name),
        lambda: narrow_run(run, None, WorkflowConfig({"macs": 0.5}, device=name), out=tmp_path / "out"),
        lambda: nin.NiNClassifier(device=name).fit([[0.0, 1.0], [1.0, 0.0]], [0, 1]),
    ):
        with pytest.raises(UserError, match="device must be auto or one of this machine"):
            call()
