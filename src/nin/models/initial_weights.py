"""Weights that a training begins with: matched with a network by name or by order, but for the class layer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from nin.errors import UserError
from nin.models.package_networks import first_convolution, weight_for_channels
from nin.runtime.weight_files import is_safetensors, read_weights

# Counted by BatchNorm layers, and missing in older files.
_COUNTER = "num_batches_tracked"

# Tensors of a network that must be in a file by name: with fewer it is the file of another network.
SMALLEST_FIT = 0.5


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The tensors of a weights file or of a run.

    Attributes:
        tensors: by the names in the file.
        source: the file or folder, for messages.
        class_layer: whether its class layer may be of the same classes; one of others would be worth nothing.
        ordered: whether they are in the order of the layers, so that other names may be matched by it.
    """

    tensors: Mapping[str, Tensor]
    source: str
    class_layer: bool = True
    ordered: bool = True

    @classmethod
    def of_file(cls, path: Path) -> "InitialWeights":
        """Return the weights in a file, see `nin.runtime.weight_files.read_weights`."""
        return cls(read_weights(path), str(path), ordered=not is_safetensors(path))

    @property
    def is_of_classifier(self) -> bool:
        """Whether the tensors are named as those of an `ExternalClassifier`."""
        return all(name.partition(".")[0] in ("body", "between", "head") for name in self.tensors)

    def load_into(self, network: nn.Module, class_layer: str | None) -> str:
        """Copy the tensors into a network, in place; return in one line what did not fit, or "".

        Names are compared first. Where some are others, but all shapes agree in their order, the order counts, of
        tensors that have one. Of a
        first convolution for other channels the weights are summed or repeated. A class layer for another number of
        classes keeps the network's own weights. What the file has beyond the network is named.

        Args:
            network: as its package makes it.
            class_layer: its name, or None where it is not known.

        Raises:
            UserError: they are the weights of another network.
        """
        expected = network.state_dict()
        of_classes = _of_layer(class_layer, expected)
        first = _first_weight(network)
        matched = self._matched(first, expected, of_classes)
        found = _with_channels(matched, first, expected)
        fitting = {name: t for name, t in found.items() if t.shape == expected[name].shape}
        if not self.class_layer:
            fitting = {name: t for name, t in fitting.items() if name not in of_classes}
        needed = [name for name in expected if not name.endswith(_COUNTER) and name not in of_classes]
        missing = [name for name in needed if name not in fitting]
        if not needed or len(missing) > (1 - SMALLEST_FIT) * len(needed):
            raise UserError(
                f"{self.source} holds the weights of another network: {len(needed) - len(missing)} of "
                f"{len(needed)} tensors fit"
                + (f"; {missing[0]} does not, for example" if missing else "")
                + self._order_note(expected)
            )
        network.load_state_dict({**expected, **fitting})
        return self._note(expected, fitting, missing, of_classes, self._without_place(matched))

    def find_other_numbers(self, network: nn.Module, class_layer: str | None) -> dict[str, int]:
        """Return the numbers of "classes" and of "channels" of images of the tensors, where the network has others.

        Args:
            network: that they are of, but for these two numbers.
            class_layer: its name, or None where it is not known.
        """
        first = _first_weight(network)
        expected = network.state_dict()
        found = self._matched(first, expected, _of_layer(class_layer, expected))
        places = {"classes": (f"{class_layer}.weight", 0), "channels": (first, 1)}
        numbers = {
            what: (found[key].shape[axis], expected[key].shape[axis])
            for what, (key, axis) in places.items()
            if key in found
        }
        return {what: theirs for what, (theirs, ours) in numbers.items() if theirs != ours}

    def load_all_into(self, network: nn.Module, class_layer: str | None, name: str) -> None:
        """Copy the tensors into a network, in place; every one of both must fit.

        Args:
            network: as its package makes it.
            class_layer: its name, or None where it is not known.
            name: of the network, for messages.

        Raises:
            UserError: they are the weights of another network.
        """
        expected = network.state_dict()
        found = self._matched(_first_weight(network), expected, _of_layer(class_layer, expected))
        needed = [key for key in expected if not key.endswith(_COUNTER)]
        if wrong := [key for key in needed if key not in found or found[key].shape != expected[key].shape]:
            raise UserError(
                f"{self.source} does not fit {name}: {len(wrong)} of its {len(needed)} tensors are missing there or "
                f"have another shape ({_abbreviate(wrong)})" + self._order_note(expected)
            )
        if extra := self._without_place(found):
            raise UserError(f"{self.source} does not fit {name}, which has no {_abbreviate(extra)}")
        network.load_state_dict({**expected, **found})

    def _order_note(self, expected: Mapping[str, Tensor]) -> str:
        """Return why the order of as many tensors under other names says nothing; "" where that is not it."""
        counts = [sum(not name.endswith(_COUNTER) for name in tensors) for tensors in (self.tensors, expected)]
        if self.ordered or counts[0] != counts[1]:
            return ""
        return (
            ". A .safetensors file is sorted by name, so tensors under other names cannot be matched by their order: "
            "give the state_dict as torch.save writes it (.pth), or with the network's names"
        )

    def _without_place(self, found: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the file's tensors that are none of those found, but for counters."""
        kept = {id(tensor) for tensor in found.values()}
        return [key for key, t in self.tensors.items() if id(t) not in kept and not key.endswith(_COUNTER)]

    def _matched(self, first: str, expected: Mapping[str, Tensor], of_classes: set[str]) -> dict[str, Tensor]:
        """Return the tensors of the file by the network's names.

        Args:
            first: the name of the weights that take the images, which may be for another number of channels.
            expected: the network's tensors.
            of_classes: names of those that may be for another number of classes.
        """
        by_name = {name: t for name, t in self.tensors.items() if name in expected}
        if all(key in by_name for key in expected if not key.endswith(_COUNTER) and key not in of_classes):
            return by_name
        ours = [(key, t) for key, t in expected.items() if not key.endswith(_COUNTER)]
        theirs = [t for key, t in self.tensors.items() if not key.endswith(_COUNTER)]
        if self.ordered and len(ours) == len(theirs):
            by_order = {key: t for (key, _), t in zip(ours, theirs, strict=True)}
            usable = _with_channels(by_order, first, expected)
            if all(
                usable[key].shape == t.shape or _is_other_classes(usable[key], t, key in of_classes) for key, t in ours
            ):
                return by_order
        return by_name

    def _note(
        self,
        expected: Mapping[str, Tensor],
        fitting: Mapping[str, Tensor],
        missing: list[str],
        of_classes: set[str],
        extra: list[str],
    ) -> str:
        """Return in one line what of the weights does not fit.

        Args:
            expected: the network's tensors.
            fitting: those that the file gives it.
            missing: names of those that it should give, too.
            of_classes: names of those of the class layer.
            extra: names of the file's tensors that the network has no place for.
        """
        parts = []
        if of_classes - fitting.keys():
            count = expected[next(iter(sorted(of_classes)))].shape[0]
            parts.append(f"the class layer is a new one, for {count:,} classes")
        if missing:
            parts.append(f"{len(missing)} of {len(expected)} tensors keep random weights ({_abbreviate(missing)})")
        if extra:
            has = "has" if len(extra) == 1 else "have"
            text = f"{len(extra)} of the file's {len(self.tensors)} tensors {has} no place ({_abbreviate(extra)})"
            # those of a class layer by another name are left over wherever the classes are others
            other = len(extra) > max(2, len(of_classes))
            parts.append(f"{text}, so it is probably of another, larger network: compare the names" if other else text)
        return f"Begun with {self.source}: {'; '.join(parts)}" if parts else f"Begun with {self.source}"


def _of_layer(layer: str | None, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the tensors of a layer."""
    return {name for name in tensors if layer is not None and name.startswith(f"{layer}.")}


def _first_weight(network: nn.Module) -> str:
    """Return the name of the weights that take the images, or "" where they are of no convolution."""
    first = first_convolution(network)
    return next((f"{name}.weight" for name, module in network.named_modules() if module is first), "")


def _with_channels(found: dict[str, Tensor], name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with that of the first convolution for the network's number of channels."""
    weight = found.get(name)
    if weight is None or weight.dim() != 4 or weight.shape == expected[name].shape:
        return found
    return {**found, name: weight_for_channels(weight, expected[name].shape[1])}


def _is_other_classes(got: Tensor, expected: Tensor, of_classes: bool) -> bool:
    return of_classes and got.shape[1:] == expected.shape[1:]


def _abbreviate(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
