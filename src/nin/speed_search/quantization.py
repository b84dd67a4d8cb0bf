"""Static int8 by the engines' own tools, in a process of its own: ONNX Runtime's `quantize_static`, OpenVINO's NNCF.

Started as ``python -m nin.speed_search.quantization SPEC``: the tools take much memory and print much.
"""

import dataclasses
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nin.speed_search.parent_watch import lifeline, watch_parent
from nin.speed_search.processes import WorkerError, error_line, worker_environment
from nin.speed_search.worker import normalise

# images at a time while the ranges of activations are measured
CALIBRATION_BATCH_SIZE = 1


@dataclasses.dataclass(frozen=True)
class QuantizationSpec:
    """What is quantised.

    Attributes:
        engine: "onnxruntime" or "openvino".
        source: the ONNX file, float32.
        target: the file to write; OpenVINO's has a second one that ends in ``.bin``.
        pixels: a file of NumPy with the calibration images, uint8 (N, C, H, W).
        mean: of each channel, for values from 0 to 1.
        std: the same.
        full_range: weights may have all 8 bits; with 7, sums of 16 bits do not overflow on processors without VNNI.
    """

    engine: str
    source: str
    target: str
    pixels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    full_range: bool


def quantize(spec: QuantizationSpec, folder: Path, name: str) -> None:
    """Write the int8 network.

    Raises:
        WorkerError: the tool failed; the message is its last line.
    """
    path = folder / f"{name}.json"
    path.write_text(json.dumps(dataclasses.asdict(spec)), encoding="utf-8")
    with lifeline() as stdin:
        done = subprocess.run(
            [sys.executable, "-m", "nin.speed_search.quantization", str(path)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=worker_environment(),
            start_new_session=True,
            check=False,
        )
    (folder / f"{name}.log").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise WorkerError(error_line(done.stdout) or f"its process ended with status {done.returncode}")


def calibration_inputs(spec: QuantizationSpec) -> Iterator[Any]:
    """Yield the calibration images as the network takes them."""
    import numpy as np

    pixels = np.load(spec.pixels)
    for start in range(0, len(pixels), CALIBRATION_BATCH_SIZE):
        yield normalise(pixels[start : start + CALIBRATION_BATCH_SIZE], spec.mean, spec.std)


def quantize_onnx(spec: QuantizationSpec) -> None:
    """Write an ONNX file with QDQ nodes: weights per output channel, activations unsigned."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(spec.source, load_external_data=False).graph.input[0].name

    class Images(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
        """The calibration images, one batch after the other."""

        def __init__(self) -> None:
            self.batches = calibration_inputs(spec)

        def get_next(self) -> dict[str, Any] | None:
            """Return the next input, or None after the last."""
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # BatchNorm is folded before: quantised by itself it would cost accuracy and time
        quant_pre_process(spec.source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            spec.target,
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=not spec.full_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def quantize_openvino(spec: QuantizationSpec) -> None:
    """Write OpenVINO's files, quantised by NNCF."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    batches = list(calibration_inputs(spec))
    network = openvino.Core().read_model(spec.source)
    quantized = nncf.quantize(
        network,
        nncf.Dataset(batches),
        subset_size=len(batches),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
    )
    openvino.save_model(quantized, spec.target, compress_to_fp16=False)


def main() -> None:
    """Quantise what the file on the command line says."""
    watch_parent()
    values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    spec = QuantizationSpec(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
    {"onnxruntime": quantize_onnx, "openvino": quantize_openvino}[spec.engine](spec)


if __name__ == "__main__":
    main()
