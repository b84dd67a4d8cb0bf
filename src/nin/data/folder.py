"""Read an image folder: into memory where the images fit, else decoded on demand."""

from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nin.data.dataset import Data, FileSet, ImageSet
from nin.data.folder_check import collect_findings, imbalance_notes
from nin.data.folder_scan import FolderScan
from nin.data.options import LoadOptions


def read_folder(root: Path, options: LoadOptions) -> Data:
    """Return an image folder as Data; see `nin.data.load`."""
    scan = FolderScan(root, options)
    listing = scan.listing
    shape = (len(listing.names), scan.channels, scan.size, scan.size)
    pixels = np.zeros(shape, dtype=np.uint8) if prod(shape) <= options.memory_limit_bytes else None
    scan.decode(pixels)
    is_test = scan.test_mask()

    def subset(indices: NDArray[np.int64]) -> ImageSet | FileSet:
        labels, names = torch.from_numpy(listing.labels[indices]), listing.names.select(indices)
        if pixels is None:
            return FileSet(labels=labels, names=names, channels=scan.channels, size=scan.size, root=root)
        return ImageSet(torch.from_numpy(pixels[indices]), labels, tuple(names))

    train, test = map(subset, scan.partition(is_test))
    counts = torch.bincount(train.labels, minlength=len(listing.classes)).tolist()
    return Data.from_sets(
        root.resolve().name,
        train,
        test,
        listing.classes,
        skipped=tuple((listing.names[index], problem) for index, problem in sorted(scan.problems.items())),
        notes=(*listing.notes, *imbalance_notes(listing.classes, counts)),
        findings=collect_findings(scan, is_test),
    )
