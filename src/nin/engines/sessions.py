"""Networks in ONNX Runtime and OpenVINO: loaded from a file or its bytes, for a number of threads."""

import io
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]


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
