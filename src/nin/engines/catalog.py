"""The engines that networks are timed in, the number types of each, and the packages that it needs."""

import dataclasses
import importlib.util
from collections.abc import Iterable

from nin.errors import UserError
from nin.version import install_command


@dataclasses.dataclass(frozen=True)
class Engine:
    """What computes a network.

    Attributes:
        title: for people.
        numbers: the number types that it computes in.
        packages: that must be installed, by number type; "" for all of them.
    """

    title: str
    numbers: tuple[str, ...]
    packages: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def missing(self, number: str) -> str:
        """Return in one line which packages are missing and what installs them; "" where none is."""
        wanted = dict.fromkeys((*self.packages.get("", ()), *self.packages.get(number, ())))
        absent = [name for name in wanted if importlib.util.find_spec(name) is None]
        return f"not installed ({', '.join(absent)}): {install_command('speed')}" if absent else ""


ENGINES: dict[str, Engine] = {
    "eager": Engine("PyTorch eager", ("float32", "bfloat16")),
    "compile": Engine("torch.compile", ("float32", "bfloat16")),
    "nin": Engine("nin's operator", ("float32", "bfloat16")),
    "onnxruntime": Engine("ONNX Runtime", ("float32", "int8"), {"": ("onnx", "onnxscript", "onnxruntime")}),
    "openvino": Engine(
        "OpenVINO",
        ("float32", "bfloat16", "int8"),
        {"": ("onnx", "onnxscript", "onnxruntime", "openvino"), "int8": ("nncf",)},
    ),
}

# Those that `nin narrow` times layers in, "pytorch" for PyTorch eager: torch.compile would take minutes for each plan.
NARROWING_ENGINES = {"pytorch": "eager", "nin": "nin", "onnxruntime": "onnxruntime", "openvino": "openvino"}

# Those of them that are timed on the CPU, wherever the network is.
CPU_ENGINES = ("onnxruntime", "openvino")


def check_engines(names: Iterable[str]) -> None:
    """Check the engines that `nin.speed` is asked for: where all are, those that are missing are named in its result.

    Raises:
        UserError: there is no engine of a name, or some are asked for by name and one is not installed.
    """
    names = tuple(names)
    for name in names:
        if name not in ENGINES:
            raise UserError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
        if set(names) != set(ENGINES) and (missing := ENGINES[name].missing("")):
            raise UserError(f"engine {name} is {missing}")


def check_narrowing_engine(name: object) -> None:
    """Check that layers can be timed in an engine.

    Raises:
        UserError: there is no engine of that name, or it is not installed; the message says what installs it.
    """
    if name not in NARROWING_ENGINES:
        raise UserError(f"engine must be one of {', '.join(NARROWING_ENGINES)}, got {name!r}")
    if missing := ENGINES[NARROWING_ENGINES[str(name)]].missing(""):
        raise UserError(f"engine {name} is {missing}")
