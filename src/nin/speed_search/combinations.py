"""The combinations that `nin.speed` compares: a form of the network, a number type and an engine."""

import dataclasses
import importlib.util

from nin.version import install_command

ORIGINAL = "original"


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
        wanted = (*self.packages.get("", ()), *self.packages.get(number, ()))
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


@dataclasses.dataclass(frozen=True)
class Combination:
    """A form of the network, a number type and an engine.

    Attributes:
        form: "original", or "narrowed 0.65" for a network of which that share of the multiplications is left.
        number: "float32", "bfloat16" or "int8".
        engine: a name in `ENGINES`. With "nin" the network is one of `nin.fuse`.
    """

    form: str
    number: str
    engine: str

    @property
    def key(self) -> str:
        """A name that a file may have."""
        return f"{self.form}-{self.number}-{self.engine}".replace(" ", "-")

    def __str__(self) -> str:
        """Return the three in words."""
        return f"{self.form}, {self.number}, {ENGINES[self.engine].title}"


# what every other combination is compared with
REFERENCE = Combination(ORIGINAL, "float32", "eager")


def narrowed_form(share: float) -> str:
    """Return the name of a form with that share of the original's multiplications."""
    return f"narrowed {share:g}"
