"""Test images of a run, loaded in the background where they lie on this machine."""

import base64
import dataclasses
import io
import itertools
import threading

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from nin import data
from nin.checkpoint import RunInfo
from nin.data.arrays import to_pillow
from nin.errors import UserError

MAX_SAMPLES = 24
# Marks the PNG of a sample, which is the input of a network already: nothing is cropped off it again.
SAMPLE_COMMENT = "input of a network, made by nin"
NOT_HERE = "the test images are not here: "
# Images that statistics are computed on, such as which channels are dead; fewer where images are large.
MAX_CALIBRATION_IMAGES, MIN_CALIBRATION_IMAGES = 256, 32


@dataclasses.dataclass(frozen=True)
class Sample:
    """A test image: its true class, and a PNG that decodes to exactly the pixels that the network was tested on."""

    label: str
    png: bytes

    @classmethod
    def of(cls, pixels: Tensor, label: str) -> "Sample":
        """Return the sample of pixels, uint8 (C, H, W)."""
        file, comment = io.BytesIO(), PngInfo()
        comment.add_text("Comment", SAMPLE_COMMENT)
        to_pillow(pixels.permute(1, 2, 0)).save(file, "PNG", pnginfo=comment)
        return cls(label, file.getvalue())

    @property
    def uri(self) -> str:
        """Return it as a ``data:`` URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


class SampleLoader:
    """Loads test images of a run in a thread, so that the server answers at once.

    Attributes:
        state: "reading", "ready" or "none".
        reason: why there are none.
        shown: a few of each class.
        pixels: uint8 (N, C, H, W), evenly from the whole test set; None until it is loaded.
        labels: int64 (N,), of those.
    """

    def __init__(self, info: RunInfo) -> None:
        self.state, self.reason = "reading", ""
        self.shown: list[Sample] = []
        self.pixels: Tensor | None = None
        self.labels: Tensor | None = None
        self.thread = threading.Thread(target=self._load, args=(info,), daemon=True, name="nin-samples")
        self.thread.start()

    def _load(self, info: RunInfo) -> None:
        try:
            images = load_run_images(info)
            self.shown = _choose_samples(images)
            evenly = torch.linspace(0, len(images.test) - 1, calibration_count(images)).long()
            self.labels, self.pixels = images.test.labels[evenly], images.test.fetch(evenly)
        except (UserError, OSError) as error:
            self.reason, self.state = f"{NOT_HERE}{error}", "none"
        else:
            self.state = "ready"


def calibration_count(images: data.Data) -> int:
    """Return how many test images statistics are computed on: as many pixels as 256 images of 64×64 have."""
    fitting = MAX_CALIBRATION_IMAGES * 64**2 // images.size**2
    return min(len(images.test), max(MIN_CALIBRATION_IMAGES, min(MAX_CALIBRATION_IMAGES, fitting)))


def load_run_images(info: RunInfo) -> data.Data:
    """Return the data that a run was trained on.

    Raises:
        UserError: they are not on this machine, or others are, or they have no test images.
    """
    images = data.load_from_record(info.data, info.preprocessing)
    if info.mismatch(images):
        raise UserError("the images found there are not those that the run was trained on")
    if not len(images.test):
        raise UserError("the data have no test images")
    return images


def _choose_samples(images: data.Data) -> list[Sample]:
    """Return test images of all classes in turn, the first of each class first."""
    labels = images.test.labels
    of_class = [(labels == label).nonzero().flatten().tolist() for label in range(len(images.classes))]
    in_turn = [index for turn in itertools.zip_longest(*of_class) for index in turn if index is not None]
    chosen = torch.tensor(in_turn[:MAX_SAMPLES], dtype=torch.int64)
    return [
        Sample.of(pixels, images.classes[int(labels[index])])
        for index, pixels in zip(chosen.tolist(), images.test.fetch(chosen), strict=True)
    ]


def is_sample(file: bytes) -> bool:
    """Return whether an image file is the PNG of a sample."""
    return SAMPLE_COMMENT.encode() in file[:200]  # the comment is behind the header
