"""Images and labels: named sets, image folders and arrays become `Data`; `Data` becomes batches."""

from nin.data.augmentation import augment, to_float
from nin.data.batching import batches, hold
from nin.data.checking import Check, check
from nin.data.findings import MEANINGS, findings_csv
from nin.data.images import EXTENSIONS, decode
from nin.data.loading import load
from nin.data.named import NAMES
from nin.data.randomness import epoch_order
from nin.data.sets import Data, FileSet, Finding, ImageSet, sensible_shift

__all__ = [
    "EXTENSIONS",
    "MEANINGS",
    "NAMES",
    "Check",
    "Data",
    "FileSet",
    "Finding",
    "ImageSet",
    "augment",
    "batches",
    "check",
    "decode",
    "epoch_order",
    "findings_csv",
    "hold",
    "load",
    "sensible_shift",
    "to_float",
]
