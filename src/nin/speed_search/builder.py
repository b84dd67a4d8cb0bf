"""Writes the files of each combination, those that are measured and delivered."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from nin import exporters
from nin.engines.sessions import explain_refusal
from nin.speed_search.combinations import Combination
from nin.speed_search.quantization import QuantizationSpec, quantize
from nin.speed_search.state import SearchState
from nin.speed_search.subject import Subject


class Builder:
    """Writes files into a folder for each form of the network; what is there already is not written again.

    Args:
        subject: the network and its images.
        state: knows what is written.
        calibration: a file of NumPy with the images that int8 is calibrated on.
        full_range: see `nin.speed_search.quantization.QuantizationSpec`.
    """

    def __init__(self, subject: Subject, state: SearchState, calibration: Path, full_range: bool) -> None:
        self.subject, self.state, self.calibration, self.full_range = subject, state, calibration, full_range
        self.models: dict[str, nn.Module] = {}

    def folder(self, form: str) -> Path:
        """Return the folder of a form."""
        return self.state.folder / form.replace(" ", "-")

    def path(self, combination: Combination) -> Path:
        """Return the file or folder that a combination is loaded from."""
        folder, quantized = self.folder(combination.form), combination.number == "int8"
        if combination.engine == "onnxruntime":
            return folder / ("int8.onnx" if quantized else "model.onnx")
        if combination.engine == "openvino":
            return folder / ("int8.xml" if quantized else "model.xml")
        return folder / "network"

    def files(self, combination: Combination) -> list[Path]:
        """Return the files of a combination."""
        path = self.path(combination)
        if path.is_dir():
            return sorted(path.iterdir())
        return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]

    def build(self, combination: Combination) -> None:
        """Write the files of a combination.

        Raises:
            UserError: the network cannot be exported, or OpenVINO cannot read it.
            WorkerError: it cannot be quantised.
        """
        if combination.engine not in ("onnxruntime", "openvino"):
            return  # the network itself is written with its form
        self._once(combination.form, "model.onnx", self._export)
        path = self.path(combination)
        if combination.number == "int8":
            self._once(combination.form, path.name, lambda form: self._quantize(form, combination.engine, path))
        elif combination.engine == "openvino":
            self._once(combination.form, path.name, lambda form: self._convert(path))

    def _once(self, form: str, name: str, write: Callable[[str], None]) -> None:
        key = f"built {form} {name}"
        if not self.state.get(key):
            write(form)
            self.state.set(key, True)

    def _export(self, form: str) -> None:
        path = self.folder(form) / "model.onnx"
        exporters.export(self.models[form], path, format="onnx", input_shape=self.subject.input_shape)

    def _convert(self, path: Path) -> None:
        import openvino

        with explain_refusal("OpenVINO cannot take this network"):
            network = openvino.Core().read_model(path.with_suffix(".onnx"))
        openvino.save_model(network, path, compress_to_fp16=False)

    def _quantize(self, form: str, engine: str, path: Path) -> None:
        p = self.subject.preprocessing
        source, calibration = str(self.folder(form) / "model.onnx"), str(self.calibration)
        spec = QuantizationSpec(engine, source, str(path), calibration, p.mean, p.std, self.full_range)
        quantize(spec, self.folder(form), f"quantize-{engine}")
