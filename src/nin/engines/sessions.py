"""Networks in ONNX Runtime and OpenVINO: loaded from a file or its bytes, for a number of threads."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from nin.errors import UserError, is_out_of_memory

Call = Callable[[], Any]

# What ONNX Runtime says of a network, each a class of its own; those of a missing file or device are not among them.
_OF_ONNXRUNTIME = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")


@contextlib.contextmanager
def explain_refusal(what: str) -> Iterator[None]:
    """Turn what an exporter or an engine says of a network that it cannot take into one line.

    Args:
        what: the beginning of the line, such as "engine openvino cannot take this network".

    Raises:
        UserError: it cannot take it; the message ends with what it says.
    """
    try:
        yield
    except _refusals() as error:
        if is_out_of_memory(error):
            raise
        said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())  # PyTorch's exporter colours its words
        raise UserError(f"{what}: {type(error).__name__}: {said[:240]}") from error


def _refusals() -> tuple[type[Exception], ...]:
    """Return the classes: RuntimeError for PyTorch's exporter and OpenVINO, and those of the packages in use."""
    found: list[type[Exception]] = [RuntimeError]
    if "onnxruntime" in sys.modules:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        found += [getattr(state, name) for name in _OF_ONNXRUNTIME]
    if "onnx" in sys.modules:
        from onnx.checker import ValidationError
        from onnx.shape_inference import InferenceError

        found += [ValidationError, InferenceError]
    return tuple(found)


def onnxruntime_session(network: str | bytes, threads: int, *, spinning: bool = True) -> Any:
    """Return a session on the CPU.

    Args:
        network: a file of ONNX, or what is in it.
        threads: of the session.
        spinning: its threads go on spinning for a while after a call, which makes the next one faster. Where other
            networks are timed in the same process, they would take the processor from them.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])


def onnxruntime_call(session: Any, x: Any) -> Call:
    """Return the call of a session on an array, which gives its first result."""
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0]


def openvino_request(core: Any, network: str | bytes, shape: tuple[int, ...], number: str, threads: int) -> Any:
    """Return an inference request of a network that is compiled for inputs of one shape, its fastest form.

    Args:
        core: an ``openvino.Core``.
        network: a file of ONNX or OpenVINO, or what is in one of ONNX.
        shape: of the input.
        number: "float32", "bfloat16" or "int8".
        threads: of its inferences.
    """
    model = core.read_model(io.BytesIO(network) if isinstance(network, bytes) else network)
    model.reshape(list(shape))
    return core.compile_model(model, "CPU", openvino_options(number, threads)).create_infer_request()


def openvino_call(request: Any, x: Any) -> Call:
    """Return the call of a request on an array, which gives its first result.

    The result stays in OpenVINO's memory and is overwritten by the next call: so it is copied, as elsewhere.
    """
    return lambda: request.infer([x], share_inputs=True)[0]


def openvino_options(number: str, threads: int) -> dict[str, Any]:
    """Return OpenVINO's options; what is not quantised in a network of int8 is computed in float32."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if number == "bfloat16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
