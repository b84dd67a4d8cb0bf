"""Export to ONNX, torch.export and OpenVINO: files that run without nin, compared with the network first."""

import dataclasses
import importlib.util
import io
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nin import checkpoint, models
from nin.checkpoint import Preprocessing, RunInfo
from nin.display.numbers import format_bytes
from nin.engines.sessions import explain_refusal
from nin.errors import UserError, is_out_of_memory
from nin.layers import MLPConv
from nin.names import EXPORT_SUFFIXES
from nin.ops import bottleneck_reference
from nin.ops.arguments import as_dispatcher_kernel
from nin.ops.reference import conv2d_chain
from nin.runtime.files import write_atomically
from nin.runtime.model_copy import copy_model, keep_computed_weights
from nin.runtime.progress import ProgressCallback, ignore_progress
from nin.version import install_command, installed_version

REQUIRED_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
}

# Batch sizes at which every file is compared with the network. One is often a special case, and an odd one is no
# multiple of a vector's length.
CHECK_BATCH_SIZES = (1, 2, 7)

# Largest difference from the network, relative to the largest score. The engines sum in other orders: up to 3e-6 was
# measured in ONNX Runtime and OpenVINO for the networks of `nin.models`.
TOLERANCE = 1e-4

RunModel = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """The file that `export` wrote, and how far it is from the network.

    Attributes:
        path: of the file; OpenVINO's weights are in a second one that ends in ``.bin``.
        format: "onnx", "pt2" or "openvino".
        file_bytes: of the file or files, with the weights.
        differences: by batch size, the largest difference from the network's scores relative to the largest score.
        metadata: the metadata in the file: input, output, and where known classes and preprocessing.
    """

    path: Path
    format: str
    file_bytes: int
    differences: dict[int, float]
    metadata: dict[str, Any]

    def __str__(self) -> str:
        """Return one line: path, size, and the largest difference."""
        checked = ", ".join(map(str, self.differences))
        size, most = format_bytes(self.file_bytes), max(self.differences.values())
        return f"{self.path}: {size}, checked with {checked} images at a time: within {most:.1e} of the network"


class Preprocessed(nn.Module):
    """A network with its preprocessing: it takes pixels as image decoders give them.

    ``scores = model((pixels / 255 - mean) / std)``

    Args:
        model: scores (N, classes) from images (N, C, H, W).
        preprocessing: mean and standard deviation of each channel.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("offset", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return scores (N, classes) for ``pixels`` of shape (N, H, W, C), uint8."""
        return self.model(pixels.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.offset)


def export(
    model: Any,
    path: str | Path,
    *,
    format: str | None = None,
    input_shape: Sequence[int] | None = None,
    preprocessing: bool = False,
    on_progress: ProgressCallback = ignore_progress,
) -> ExportResult:
    """Write a network into a file that runs without nin, at any batch size.

    ``nin::mlpconv`` is decomposed into standard convolutions and activations, weight standardisation is folded. The
    file's scores are compared with the network's before it is written, atomically.

    Args:
        model: a run folder, a `nin.Classifier`, what `nin.train` returns, or any network of images.
        path: of the file to write.
        format: "onnx", "pt2" (for ``torch.export.load``) or "openvino"; if not given, from the ending ``.onnx``,
            ``.pt2`` or ``.xml`` of the path.
        input_shape: (C, H, W) of one image; known for a run and for the networks of `nin.models`.
        preprocessing: include the normalisation: the file then takes pixels (N, H, W, C), uint8, at the size that the
            network was trained with. Else it takes ``(pixels / 255 - mean) / std`` as (N, C, H, W), float32.
        on_progress: called before each step with (what is being done, number done, number of all).

    Returns:
        What was written, and how far its scores are from the network's.

    Raises:
        UserError: a package for the format is missing, the network cannot be exported, the scores differ by more than
            `TOLERANCE`, or the arguments contradict each other.
        OSError: the file cannot be written; it is named.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = nin.export(nin.models.nin_digits(), f"{folder}/digits.pt2")
        >>> exported.format, list(exported.differences)
        ('pt2', [1, 2, 7])
    """
    path = Path(path)
    format = format or {suffix: name for name, suffix in EXPORT_SUFFIXES.items()}.get(path.suffix)
    if format not in EXPORT_SUFFIXES:
        raise UserError(f"format must be one of {', '.join(EXPORT_SUFFIXES)}, got {format!r} for {path}")
    if format == "openvino" and path.suffix != ".xml":
        raise UserError(f"path must end in .xml for OpenVINO, which puts the weights beside it, got {path}")
    check_packages(format)
    on_progress("Loading the network", 0, 4)
    network, info = _copy_network(model)
    shape = _image_shape(network, info, input_shape)
    metadata = model_metadata(shape, info, preprocessing=preprocessing)
    if preprocessing:
        if info is None:
            raise UserError("preprocessing is known for a run folder or a Classifier, got a bare network")
        network = Preprocessed(network, info.preprocessing)
    inputs = [_example_input(shape, count, pixels=preprocessing) for count in CHECK_BATCH_SIZES]
    on_progress("Tracing the network", 1, 4)
    program = portable_program(network, inputs[1])
    on_progress("Converting the network", 2, 4)
    with explain_refusal(f"{path} was not written, {format} cannot take this network"):
        contents, run = _CONVERTERS[format](program, metadata)
        on_progress("Comparing the scores", 3, 4)
        scores = [run(x) for x in inputs]
    with torch.inference_mode():
        differences = {len(x): _relative_difference(y, network(x)) for x, y in zip(inputs, scores, strict=True)}
    if max(differences.values()) > TOLERANCE:
        raise UserError(f"{path} was not written: its scores differ from the network's, relative {differences}")
    for suffix, content in contents.items():
        write_atomically(path.with_suffix(suffix or path.suffix), content)
    return ExportResult(path, format, sum(map(len, contents.values())), differences, metadata)


def check_packages(format: str) -> None:
    """Check that the packages for a format are installed.

    Raises:
        UserError: one is missing; the message says how to install it.
    """
    missing = [name for name in REQUIRED_PACKAGES[format] if importlib.util.find_spec(name) is None]
    if missing:
        extra = "bench" if "openvino" in missing else "onnx"
        raise UserError(f"{format} needs {', '.join(missing)}: {install_command(extra)}")


def portable_program(model: nn.Module, x: Tensor) -> ExportedProgram:
    """Return the network as a graph of PyTorch's own operators, with a dynamic batch size.

    Args:
        model: in evaluation mode.
        x: an input of two images or more: torch.export specialises sizes of 0 and 1.

    Raises:
        UserError: torch.export cannot trace it; the message ends with what it says.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # it runs the forward of somebody's own network, which may raise anything
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise UserError(f"the network cannot be traced by torch.export: {reason}") from error
    decompositions = {
        torch.ops.nin.mlpconv.default: as_dispatcher_kernel(conv2d_chain),
        torch.ops.nin.inverted_bottleneck.default: bottleneck_reference.as_dispatcher_kernel(
            bottleneck_reference.conv2d_layers
        ),
    }
    program = program.run_decompositions(decompositions)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths on this machine
    return program


def onnx_bytes(model: nn.Module, x: Tensor) -> bytes:
    """Return the network as an ONNX file's content, to be timed: nothing is compared, and no metadata are in it.

    Args:
        model: in evaluation mode, on the CPU.
        x: an input of two images or more; any number may be given to the file.

    Raises:
        UserError: it cannot be exported; the message ends with what the exporter says.
    """
    program = portable_program(model, x)
    with explain_refusal("the network cannot be exported to ONNX"):
        converted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert converted is not None
    return bytes(converted.model_proto.SerializeToString())


def model_metadata(shape: Sequence[int], info: RunInfo | None, *, preprocessing: bool) -> dict[str, Any]:
    """Return the metadata of a file: input, output, classes in the order of the scores, preprocessing."""
    channels, height, width = shape
    pixels = {"name": "pixels", "shape": ["batch", height, width, channels], "dtype": "uint8"}
    images = {"name": "images", "shape": ["batch", channels, height, width], "dtype": "float32"}
    metadata: dict[str, Any] = {
        "nin": installed_version(),
        "input": pixels if preprocessing else images,
        "output": {"name": "scores", "meaning": "one score for each class, before the softmax"},
    }
    if info is not None:
        metadata["classes"] = list(info.classes)
        metadata["preprocessing"] = {**dataclasses.asdict(info.preprocessing), "inside": preprocessing}
    return metadata


def _copy_network(model: Any) -> tuple[nn.Module, RunInfo | None]:
    """Return a folded copy of the network in evaluation mode, float32 on the CPU, and its run's info where known."""
    if isinstance(model, str | Path):
        network, info = checkpoint.load_model(Path(model))
    elif isinstance(model, nn.Module):
        network, info = copy_model(model), None
    elif isinstance(getattr(model, "info", None), RunInfo) and isinstance(model.model, nn.Module):
        network, info = copy_model(model.model), model.info
    else:
        raise TypeError(f"model must be a run folder, a Classifier or a torch.nn.Module, got {type(model).__name__}")
    for module in network.modules():
        if isinstance(module, MLPConv):
            module.fold()
    network = network.cpu().float().eval()
    keep_computed_weights(network)
    network.requires_grad_(False)
    return network.to(memory_format=torch.contiguous_format), info


def _image_shape(model: nn.Module, info: RunInfo | None, given: Sequence[int] | None) -> tuple[int, int, int]:
    if given is not None:
        shape = tuple(int(size) for size in given)
        if len(shape) != 3 or min(shape) < 1:
            raise UserError(f"input_shape must be (C, H, W), each at least 1, got {shape}")
        return shape
    if info is not None:
        p = info.preprocessing
        return p.channels, p.size, p.size
    if isinstance(model, models.NiN):
        return model.config.in_channels, model.config.image_size, model.config.image_size
    if isinstance(model, models.ExternalClassifier):
        config = model.input_config
        return config.channels, config.size, config.size
    if isinstance(model, models.GoogLeNet):
        size = models.IMAGE_SIZES["googlenet"]
        return model.in_channels, size, size
    raise UserError(f"input_shape must be given as (C, H, W): it cannot be told from a {type(model).__name__}")


def _example_input(shape: tuple[int, int, int], count: int, *, pixels: bool) -> Tensor:
    channels, height, width = shape
    generator = torch.Generator().manual_seed(count)
    if pixels:
        return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator)
    return torch.randn(count, channels, height, width, generator=generator)


def _relative_difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite where shapes differ or a value is NaN."""
    if got.shape != expected.shape:
        return float("inf")
    ratio = ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    return ratio if math.isfinite(ratio) else float("inf")


def _to_onnx(program: ExportedProgram, metadata: dict[str, Any]) -> bytes:
    """Return the bytes of an ONNX file that ``onnx.checker`` accepts."""
    import onnx

    name = metadata["input"]["name"]
    converted = torch.onnx.export(program, dynamo=True, input_names=[name], output_names=["scores"], verbose=False)
    assert converted is not None
    proto = converted.model_proto
    graph = proto.graph
    # the exporter names the dynamic dimension by a symbol of its own
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == batch:
                size.dim_param = "batch"
    for part in (*graph.node, *graph.value_info, graph):
        del part.metadata_props[:]  # stack traces with paths of this machine
    onnx.helper.set_model_props(proto, {key: _metadata_text(value) for key, value in metadata.items()})
    proto.producer_name, proto.producer_version = "nin", metadata["nin"]
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def _convert_onnx(program: ExportedProgram, metadata: dict[str, Any]) -> tuple[dict[str, bytes], RunModel]:
    import onnxruntime

    content = _to_onnx(program, metadata)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = metadata["input"]["name"]
    return {"": content}, lambda x: torch.from_numpy(session.run(["scores"], {name: x.numpy()})[0])


def _convert_pt2(program: ExportedProgram, metadata: dict[str, Any]) -> tuple[dict[str, bytes], RunModel]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"nin.json": json.dumps(metadata)})
    file.seek(0)
    return {"": file.getvalue()}, torch.export.load(file).module()


def _convert_openvino(program: ExportedProgram, metadata: dict[str, Any]) -> tuple[dict[str, bytes], RunModel]:
    import openvino

    core = openvino.Core()
    network = core.read_model(io.BytesIO(_to_onnx(program, metadata)))
    for key, value in metadata.items():
        network.set_rt_info(_metadata_text(value), ["nin", key])
    # on processors with bf16 instructions OpenVINO computes in bf16 by default, whose rounding is beyond the tolerance
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.xml"
        openvino.save_model(network, target, compress_to_fp16=False)
        # weights first: whoever sees the .xml finds the .bin
        contents = {".bin": target.with_suffix(".bin").read_bytes(), ".xml": target.read_bytes()}
    return contents, lambda x: torch.from_numpy(compiled(x.numpy())[0])


def _metadata_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_CONVERTERS = {"onnx": _convert_onnx, "pt2": _convert_pt2, "openvino": _convert_openvino}
