"""Images and labels: named sets, image folders and arrays become `Data`; `Data` becomes batches."""

from nin.data.augmentation import augment, to_float
from nin.data.batching import batches, hold
from nin.data.checking import Check, check
from nin.data.findings import MEANINGS, findings_csv
from nin.data.folder_listing import images_below
from nin.data.images import EXTENSIONS, decode
from nin.data.loading import load, load_recorded
from nin.data.named import NAMES
from nin.data.randomness import epoch_order
from nin.data.sets import Data, DecodedSet, FileSet, Finding, ImageSet, PathList, sensible_shift
from nin.data.sharding import write_shards
from nin.data.shards import ShardSet, is_shards, open_shards

__all__ = [
    "EXTENSIONS",
    "MEANINGS",
    "NAMES",
    "Check",
    "Data",
    "DecodedSet",
    "FileSet",
    "Finding",
    "ImageSet",
    "PathList",
    "ShardSet",
    "augment",
    "batches",
    "check",
    "decode",
    "epoch_order",
    "findings_csv",
    "hold",
    "images_below",
    "is_shards",
    "load",
    "load_recorded",
    "open_shards",
    "sensible_shift",
    "to_float",
    "write_shards",
]
