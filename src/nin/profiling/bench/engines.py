"""The engines of the benchmark: each turns a case's model into a call without arguments, in its best layout."""

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import layers
from nin.engines.sessions import onnxruntime_session, openvino_options
from nin.fusion import fuse
from nin.profiling.bench.cases import Case
from nin.version import install_command

Call = Callable[[], object]
CPU = torch.device("cpu")


class UnavailableError(RuntimeError):
    """The engine cannot run this case; the message says why."""


def to_torch_modules(model: nn.Module) -> nn.Module:
    """Return a copy with each `MLPConv` and `Conv1x1` replaced by a sequence of PyTorch's own modules."""
    if isinstance(model, layers.MLPConv | layers.Conv1x1):
        sequence = copy.deepcopy(model).to_sequential()
        for module in sequence.modules():
            if isinstance(module, nn.ReLU | nn.SiLU):
                module.inplace = True  # faster than out of place, and as common
        return sequence
    changed = copy.copy(model)  # shallow: the parameters of other modules are shared, not copied
    changed._modules = {
        name: to_torch_modules(child) if child is not None else None for name, child in model._modules.items()
    }
    return changed


def eager(case: Case, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """Call the model as it is, for inference or for a training step."""
    return _training_step(case, model, x, dtype) if case.training else _inference(model, x)


def nin_compiled(case: Case, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """Call the snapshot of the fused model, whose weights are constant as in the other engines that compile."""
    if case.training:
        raise UnavailableError("for inference only")
    return _inference(fuse(model, x).compile(), x)


def compiled(case: Case, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """Call the model through ``torch.compile`` with its defaults."""
    return eager(case, _compile(model), x, dtype)


def compiled_max_autotune(case: Case, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """Call the model through ``torch.compile`` with frozen weights and the longest search for kernels."""
    if case.training:
        raise UnavailableError("freezing is for inference")
    import torch._inductor.config as inductor  # slow to import, and no other engine needs it

    call = _inference(_compile(model, mode="max-autotune"), x)
    with inductor.patch(freezing=True):
        call()  # compiles
    return call


def onnxruntime(case: Case, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """Call the exported model in ONNX Runtime."""
    _check_inference(case, x, "onnxruntime", "onnx", "onnxscript")
    if dtype != torch.float32:
        raise UnavailableError(f"no {str(dtype).removeprefix('torch.')} on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x.contiguous(),), path, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime_session(str(path), torch.get_num_threads())
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed)


def openvino(case: Case, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """Call the converted model in OpenVINO, which chooses the layout itself."""
    _check_inference(case, x, "openvino")
    import openvino as ov

    number = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    converted = ov.convert_model(model.float(), example_input=x.float().contiguous(), input=[list(x.shape)])
    settings = openvino_options(number, torch.get_num_threads())
    request = ov.compile_model(converted, "CPU", settings).create_infer_request()
    feed = [x.float().contiguous().numpy()]
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)


# name → (what makes the call, channels_last, whether the layers are nin's; else they are PyTorch's own modules)
ENGINES: dict[str, tuple[Callable[[Case, nn.Module, Tensor, torch.dtype], Call], bool, bool]] = {
    "nin": (eager, True, True),
    "nin NCHW": (eager, False, True),
    "nin compiled": (nin_compiled, True, True),
    "eager": (eager, True, False),
    "eager NCHW": (eager, False, False),
    "compile": (compiled, True, False),
    "compile max": (compiled_max_autotune, True, False),
    "ONNX Runtime": (onnxruntime, False, False),
    "OpenVINO": (openvino, False, False),
}


def prepare(engine: str, case: Case, dtype: torch.dtype, device: torch.device = CPU) -> Call:
    """Return the call to time; on a GPU it waits until the work is done.

    Raises:
        UnavailableError: the engine is not installed, or cannot do this.
    """
    make, channels_last, ours = ENGINES[engine]
    torch.manual_seed(0)
    model = case.model().train(case.training)
    model = model if ours else to_torch_modules(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if not (case.training and case.network):  # a network is trained in float32 under autocast
        model = model.to(dtype)
    x = torch.randn(case.input_shape).to(device, next(model.parameters()).dtype)
    model = model.to(device).to(memory_format=layout)
    call = make(case, model, x.contiguous(memory_format=layout), dtype)
    if device.type != "cuda":
        return call

    def call_and_wait() -> None:
        call()
        torch.cuda.synchronize(device)

    return call_and_wait


def _inference(model: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            y: Tensor = model(x)
            return y

    return call


def _training_step(case: Case, model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    parameters = list(model.parameters())
    if not case.network:
        x.requires_grad_()
        with torch.no_grad():
            grad = torch.randn_like(model(x))
        return lambda: torch.autograd.grad(model(x), [x, *parameters], grad)
    optimiser = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    target = torch.randint(0, 10, (x.shape[0],), device=x.device)
    autocast = dtype == torch.bfloat16

    def call() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return call


def _compile(model: nn.Module, **options: str) -> nn.Module:
    compiled_model: nn.Module = torch.compile(model, dynamic=False, **options)  # type: ignore[call-overload]
    return compiled_model


def _check_inference(case: Case, x: Tensor, *packages: str) -> None:
    if case.training:
        raise UnavailableError("for inference only")
    if x.device.type != "cpu":
        raise UnavailableError("timed on the CPU only")
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"not installed ({package}; {install_command('bench')})")
