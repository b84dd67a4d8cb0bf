"""ShardScan: the images of WebDataset shards, each looked at once, for `nin check`."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nin.data.dataset import LoadOptions
from nin.data.folder_listing import FolderListing
from nin.data.image_scan import ImageScan, read_record
from nin.data.webdataset import class_notes, open_labelled, part_masks
from nin.errors import UserError


class ShardScan(ImageScan):
    """The labelled images of shards.

    Args:
        source: the shards, as `nin.data.load` takes them.
        options: how to read them.

    Raises:
        UserError: a shard is no tar file, damaged or cut off; no image has a label, or none can be read.
    """

    def __init__(self, source: str | Path, options: LoadOptions) -> None:
        self.shards, classes, findings = open_labelled(source)
        labels = self.shards.labels.numpy()
        is_test, is_validation = part_masks(self.shards, options)
        listing = FolderListing(
            root=Path(source),
            classes=classes,
            names=self.shards.names,
            labels=labels,
            is_test=is_test,
            is_validation=is_validation,
            notes=class_notes(classes, self.shards.labels[~(is_test | is_validation)]),
            findings=findings,
        )
        super().__init__(listing, options)

    def source(self, index: int) -> bytes:
        """Return the bytes of the image at an index."""
        return self.shards.read(index)

    def test_mask(self) -> NDArray[np.bool_]:
        """Return which images are for testing; a number for which there is no image is no class that lacks some."""
        assert self.listing.is_test is not None
        is_test = self.listing.is_test & (self.records["width"] > 0)
        if not is_test.any() or not len(self.partition(is_test).train):
            raise UserError(f"{self.listing.root}: no image is left for {'training' if is_test.any() else 'testing'}")
        return is_test

    def _read_header(self, index: int) -> None:
        self.records[index] = read_record(self.source(index), self.listing.names[index], np.uint64(0))
