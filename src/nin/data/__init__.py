"""Images and labels: named sets, image folders and arrays become `Data`; `Data` becomes batches."""

from nin.data.augmentation import augment, to_float
from nin.data.batching import batches
from nin.data.images import EXTENSIONS, decode
from nin.data.loading import load
from nin.data.named import NAMES
from nin.data.randomness import epoch_order
from nin.data.sets import Data, FileSet, ImageSet, sensible_shift

__all__ = [
    "EXTENSIONS",
    "NAMES",
    "Data",
    "FileSet",
    "ImageSet",
    "augment",
    "batches",
    "decode",
    "epoch_order",
    "load",
    "sensible_shift",
    "to_float",
]
