"""Run folders: model.safetensors and config.json, and the training state."""

import contextlib
import dataclasses
import json
import platform
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nin import epoch_metrics, folders, models
from nin.data import CENTRE_SQUARE, Data
from nin.data.preprocessing import Preprocessing as Preprocessing
from nin.display.numbers import shorten
from nin.epoch_metrics import METRICS_FILE
from nin.errors import UserError
from nin.folders import CONFIG_FILE as CONFIG_FILE
from nin.folders import FILES as FILES
from nin.folders import FINDINGS_FILE as FINDINGS_FILE
from nin.folders import MODEL_FILE as MODEL_FILE
from nin.folders import PROGRESS_FILE as PROGRESS_FILE
from nin.folders import REPORT_FILE as REPORT_FILE
from nin.folders import STATE_FILE as STATE_FILE
from nin.models.description import model_description as model_description
from nin.models.description import model_from_description
from nin.models.description import narrowed_description as narrowed_description
from nin.ops import backends
from nin.runtime import device, distributed
from nin.runtime.files import locked_folder, write_atomically
from nin.runtime.fingerprint import fingerprint
from nin.runtime.weight_files import read_tensors
from nin.version import installed_version

# Raised when a field of config.json changes its meaning, or comes that must not be overlooked; `load_model` reads all
# versions up to this one.
FORMAT_VERSION = 2

# What building a network from a damaged or forged description may raise.
DESCRIPTION_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)

# A config.json holds names and numbers; one that is larger is not ours.
LARGEST_CONFIG_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """The contents of a run folder's ``config.json``.

    Attributes:
        model: the architecture, from which `model_from_description` builds the network.
        classes: names, in the order of the scores.
        preprocessing: from image to input.
        recipe: the settings of the training.
        data: what it was trained on: source, counts, images left out.
        result: test accuracy and other figures; empty while training.
        environment: versions and machine.
    """

    model: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    recipe: dict[str, Any]
    data: dict[str, Any]
    result: dict[str, Any]
    environment: dict[str, Any]

    def to_json(self) -> str:
        """Return the text of ``config.json``."""
        # ASCII, so that a class folder whose name is no valid Unicode can be written down too
        return json.dumps({"format_version": self.format_version, **dataclasses.asdict(self)}, indent=2)

    @property
    def format_version(self) -> int:
        """The version of the format that a reader must know: the first one crops every image's centre square."""
        return 1 if self.preprocessing.resize == CENTRE_SQUARE else FORMAT_VERSION

    def mismatch(self, images: Data, *, test_images: bool = False) -> str | None:
        """Return in what a data set differs from the one that the network was trained on, or None if in nothing.

        Args:
            images: compared in classes, channels, size, value range and the way of resizing.
            test_images: compare the number of test images too.
        """
        p, count = self.preprocessing, len(images.test)
        for what, expected, got in (
            ("classes", list(self.classes), list(images.classes)),
            ("number of channels", p.channels, images.channels),
            ("size", p.size, images.size),
            ("value range", p.value_range, images.value_range),
            ("way of resizing", p.resize, images.resize),
            ("number of test images", self.data.get("test_images", count) if test_images else count, count),
        ):
            if expected != got:
                verb, that = ("are", "those") if what == "classes" else ("is", "that")
                return f"its {what} {verb} {shorten(str(expected))}, {that} of {images.name} {verb} {shorten(str(got))}"
        return None


def save_model(folder: Path, model: nn.Module, info: RunInfo) -> None:
    """Write ``model.safetensors`` and ``config.json`` into the run folder."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomically(folder / MODEL_FILE, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, info.to_json())


def load_model(folder: Path) -> tuple[nn.Module, RunInfo]:
    """Read a run folder.

    Returns:
        The network, in evaluation mode on the CPU, and what the folder says of it.

    Raises:
        UserError: the folder or a file in it is missing, damaged, of a newer version, or does not fit the other; or its
            network is made by somebody's module, which is not trusted (see `nin.models.trust`).
    """
    folder = Path(folder)
    info = load_info(folder)
    path = folder / MODEL_FILE
    try:
        _check_counts(info.model, info)
        with torch.device("meta"), _SkipInit():  # takes no memory, whatever sizes the file asks for
            model = model_from_description(info.model)
        _check_fits(model, info)
        expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except DESCRIPTION_ERRORS as error:
        raise UserError(f"{folder / CONFIG_FILE}: 'model' does not describe a network of nin: {error}") from error
    tensors, _ = read_tensors(path)
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != got:
        wrong = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))[0]
        raise UserError(
            f"{path} does not fit {CONFIG_FILE}: {wrong} must have shape {expected.get(wrong)}, got {got.get(wrong)}"
        )
    # copied, not assigned: the parameters keep their dtype and memory format, and nothing maps a file that may change
    if any(t.is_meta for t in model.state_dict().values()):
        model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    return model.eval(), info


class _SkipInit(TorchFunctionMode):
    """Skip the functions of `torch.nn.init`.

    Their work would be overwritten, and the first ``normal_`` of a meta tensor imports 836 modules in 3 s (torch 2.15).
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def unfinished_note(folder: Path, info: RunInfo) -> str:
    """Return that a run's training has not ended, and how it goes on; "" where it has ended."""
    if info.result:
        return ""
    epochs = len(epoch_metrics.read_csv(folder / METRICS_FILE)) if (folder / METRICS_FILE).is_file() else "some"
    source = shlex.quote(str(info.data.get("source", "DATA")))
    return (
        f"{folder} is unfinished, after {epochs} of {info.recipe.get('epochs', 'all')} epochs: its answers are those "
        f"of the network so far. Go on with: nin train {source} --out {shlex.quote(str(folder))} --resume"
    )


def load_info(folder: Path) -> RunInfo:
    """Read a run folder's ``config.json``.

    Raises:
        UserError: the folder is no run folder, or the file is damaged or of a newer version.
    """
    path = Path(folder) / CONFIG_FILE
    folders.check_is_run(Path(folder))
    if path.stat().st_size > LARGEST_CONFIG_BYTES:
        raise UserError(f"{path} is no {CONFIG_FILE} of nin: it is larger than {LARGEST_CONFIG_BYTES} bytes")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        if isinstance(version, int) and 1 <= version <= FORMAT_VERSION:
            return _info_from_dict(values)
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no {CONFIG_FILE} of nin: {error}") from error
    raise UserError(f"{path} has format version {version}, this nin reads 1 to {FORMAT_VERSION}: update nin")


def _info_from_dict(values: dict[str, Any]) -> RunInfo:
    """Return the fields of a ``config.json`` as a `RunInfo`, and check their types."""
    preprocessing = Preprocessing.from_dict(values["preprocessing"])
    info = RunInfo(**{**values, "preprocessing": preprocessing, "classes": tuple(values["classes"])})
    for field in ("model", "recipe", "data", "result", "environment"):
        if not isinstance(getattr(info, field), dict):
            raise TypeError(f"{field} must be an object")
    if not info.classes or not all(isinstance(name, str) for name in info.classes):
        raise TypeError("classes must be a list of names")
    return info


def _check_counts(description: Mapping[str, Any], info: RunInfo) -> None:
    """Refuse another package's network, which is not built on the meta device, before it takes its memory."""
    while description["kind"] == "narrowed":
        description = description["base"]
    wanted = (len(info.classes), info.preprocessing.channels)
    got = (description.get("num_classes"), description.get("in_channels"))
    if description["kind"] == "external" and got != wanted:
        raise ValueError(f"it has (classes, channels) {got}, the rest of the file {wanted}")


def _check_fits(model: nn.Module, info: RunInfo) -> None:
    """Refuse a network that does not take the images or answer with the classes of the same file."""
    shape = model.config if isinstance(model, models.NiN) else model
    wanted = (len(info.classes), info.preprocessing.channels)
    got = (getattr(shape, "num_classes", None), getattr(shape, "in_channels", None))
    if got != wanted:
        raise ValueError(f"it has (classes, channels) {got}, the rest of the file {wanted}")
    if isinstance(model, models.NiN) and model.smallest_input > info.preprocessing.size:
        raise ValueError(f"images must have {model.smallest_input} pixels a side, got {info.preprocessing.size}")


def save_state(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write ``state.safetensors``: tensors, and values that JSON can hold, with a checksum over both.

    The file is read back before it replaces the one before.

    Raises:
        OSError: the disk is full, the folder cannot be written, or the disk gives back something else.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(values)
    content = save(plain, metadata={"json": text, "sha256": _digest(plain, text)})
    write_atomically(folder / STATE_FILE, content, read_back=True)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the training state that `save_state` wrote.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(folder) / STATE_FILE
    tensors, metadata = read_tensors(path)
    text = metadata.get("json", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise UserError(
            f"{path} is damaged, its checksum does not fit what it holds: bring it back from a copy, or begin "
            "again with another --out"
        )
    return tensors, json.loads(text)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the SHA-256 of the text, and of the tensors' names, shapes, dtypes and values."""
    parts: list[str | Tensor] = [text]
    for name in sorted(tensors):
        parts += [f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}", tensors[name]]
    return fingerprint(parts)


@contextlib.contextmanager
def output_folder(out: Path | None, *, may_contain: Collection[str] | None = ()) -> Iterator[None]:
    """Create a run folder for the block that writes into it; remove it again if nothing was written.

    Temporary files of interrupted writes are removed. Of several processes only rank 0 does anything.

    Args:
        out: the folder, or None where nothing is written.
        may_contain: names of files and folders that it may hold already; None allows all.

    Raises:
        UserError: it holds something else, or another process writes into it.
        OSError: it cannot be made.
    """
    if out is None or not distributed.is_main_process():
        yield
        return
    folders.check_is_empty(out, may_contain=may_contain)
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out):
        for leftover in (path for name in FILES for path in out.glob(f".{name}.*")):
            leftover.unlink()
        try:
            yield
        finally:
            if not any(out.iterdir()):
                out.rmdir()


def remove_state(folder: Path) -> None:
    """Remove ``state.safetensors``, when the training has ended."""
    (Path(folder) / STATE_FILE).unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Return versions and machine for ``config.json``."""
    return {
        "nin": installed_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": device.processor_name(),
        "threads": torch.get_num_threads(),
        "backends": backends(),
    }
