"""Test images of the run's own data, where they lie on this machine, for people to look at."""

from __future__ import annotations

import base64
import dataclasses
import io
import threading

import torch
from torch import Tensor

from nin import data
from nin.checkpoint import RunInfo
from nin.data.arrays import to_pillow
from nin.errors import UserError

SHOWN = 24
NOT_HERE = "the test images are not here: "
# Images that statistics are made of, such as which channels are dead; fewer where images are large.
MOST_LOOKED_AT, FEWEST_LOOKED_AT = 256, 32


@dataclasses.dataclass(frozen=True)
class Sample:
    """One test image: its true class, and a PNG that decodes to the very pixels that the network was tested on."""

    label: str
    png: bytes

    @property
    def uri(self) -> str:
        """Return it as a ``data:`` address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


class Samples:
    """The test images of a run, read in the background: a folder of many files takes its time.

    Attributes:
        state: "reading", "ready" or "none".
        reason: why there are none.
        shown: a few of each class.
        pixels: uint8 (N, C, H, W), evenly from the whole test set; None until it is read.
        labels: int64 (N,), of those.
    """

    def __init__(self, info: RunInfo) -> None:
        self.state, self.reason = "reading", ""
        self.shown: list[Sample] = []
        self.pixels: Tensor | None = None
        self.labels: Tensor | None = None
        self.thread = threading.Thread(target=self._read, args=(info,), daemon=True, name="nin-samples")
        self.thread.start()

    def _read(self, info: RunInfo) -> None:
        try:
            images = _load(info)
            self.shown = _choose(images)
            evenly = torch.linspace(0, len(images.test) - 1, looked_at(images)).long()
            self.labels, self.pixels = images.test.labels[evenly], images.test.fetch(evenly)
        except (UserError, OSError) as error:
            self.reason, self.state = f"{NOT_HERE}{error}", "none"
        else:
            self.state = "ready"


def looked_at(images: data.Data) -> int:
    """Return how many test images statistics are made of: as many pixels as 256 images of 64×64 have."""
    fitting = MOST_LOOKED_AT * 64**2 // images.size**2
    return min(len(images.test), max(FEWEST_LOOKED_AT, min(MOST_LOOKED_AT, fitting)))


def _load(info: RunInfo) -> data.Data:
    """Return the run's data."""
    images = data.load_from_record(info.data, size=info.preprocessing.size)
    if info.mismatch(images):
        raise UserError("the images found there are not those that the run was trained on")
    if not len(images.test):
        raise UserError("the data have no test images")
    return images


def _choose(images: data.Data) -> list[Sample]:
    """Return test images of all classes in turn, the first of each class first."""
    labels = images.test.labels
    places = [(labels == label).nonzero().flatten().tolist() for label in range(len(images.classes))]
    rounds = max(map(len, places))
    order = [of_class[turn] for turn in range(min(rounds, SHOWN)) for of_class in places if turn < len(of_class)]
    chosen = torch.tensor(order[:SHOWN], dtype=torch.int64)
    return [
        Sample(images.classes[int(labels[index])], _png(pixels))
        for index, pixels in zip(chosen.tolist(), images.test.fetch(chosen), strict=True)
    ]


def _png(pixels: Tensor) -> bytes:
    file = io.BytesIO()
    to_pillow(pixels.permute(1, 2, 0)).save(file, "PNG")
    return file.getvalue()
