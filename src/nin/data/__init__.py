"""Data sets of labelled images: load (built-in names, folders, WebDataset shards, arrays), check, augment, batch."""

from nin.data.builtin import DATASET_NAMES
from nin.data.dataset import Data, DecodedSet, FileSet, ImageSet, PathList, default_shift
from nin.data.decoder import decode
from nin.data.factory import load, load_as_recorded, load_from_record
from nin.data.findings import FINDING_KINDS, HARMLESS_KINDS, UNREADABLE, Finding, findings_csv
from nin.data.folder import Check, check
from nin.data.folder_entries import MAP_COMMENT, find_images
from nin.data.image_formats import FORMAT_EXAMPLES, IMAGE_EXTENSIONS
from nin.data.loader import batches, to_device
from nin.data.resizing import CENTRE_SQUARE, ResizeOptions
from nin.data.sampler import balanced_order, epoch_order
from nin.data.transforms import augment, to_float
from nin.data.validation_split import split_validation, take_fold, with_recorded_parts
from nin.data.webdataset import ShardSet, is_shards, open_shards
from nin.data.webdataset_writer import write_shards

__all__ = [
    "CENTRE_SQUARE",
    "DATASET_NAMES",
    "FINDING_KINDS",
    "FORMAT_EXAMPLES",
    "HARMLESS_KINDS",
    "IMAGE_EXTENSIONS",
    "MAP_COMMENT",
    "UNREADABLE",
    "Check",
    "Data",
    "DecodedSet",
    "FileSet",
    "Finding",
    "ImageSet",
    "PathList",
    "ResizeOptions",
    "ShardSet",
    "augment",
    "balanced_order",
    "batches",
    "check",
    "decode",
    "default_shift",
    "epoch_order",
    "find_images",
    "findings_csv",
    "is_shards",
    "load",
    "load_as_recorded",
    "load_from_record",
    "open_shards",
    "split_validation",
    "take_fold",
    "to_device",
    "to_float",
    "with_recorded_parts",
    "write_shards",
]
