"""Images and labels: named sets, image folders and arrays become `Data`; `Data` becomes batches."""

from nin.data.builtin import NAMES
from nin.data.dataset import Data, DecodedSet, FileSet, Finding, ImageSet, PathList, sensible_shift
from nin.data.decoder import EXTENSIONS, decode
from nin.data.factory import load, load_recorded
from nin.data.folder_check import Check, check
from nin.data.folder_issues import MEANINGS, findings_csv
from nin.data.folder_listing import images_below
from nin.data.loader import batches, hold
from nin.data.sampling import epoch_order
from nin.data.transforms import augment, to_float
from nin.data.webdataset import ShardSet, is_shards, open_shards
from nin.data.webdataset_writer import write_shards

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
