"""ImageScan: the header, the bytes and the pixels of every image of a set, each looked at once."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nin.data.dataset import LoadOptions, default_size
from nin.data.decoder import DecodeError, decode_both, decode_options, decode_pixels, read_extent, read_header
from nin.data.folder_listing import FolderListing
from nin.data.image_formats import FORMATS
from nin.data.loader import map_in_threads
from nin.data.sampler import stratified_holdout
from nin.data.value_range import BYTES, Extent, Pixels, ValueRange, choose_range, describe_range
from nin.display.numbers import format_number_of
from nin.errors import UserError

Problems = dict[int, str]  # why the image at an index cannot be read

# One row for each file: 47 bytes. `key` is a hash of path, size and time of modification; `digest` one of the content;
# `format` is a position in FORMAT_NAMES; `frames` says that there are several; `depth`, `low` and `high` are the
# `Extent` of the values; `decoded` says that the pixels were decoded: to `darkest` … `brightest` of 0 to 255.
RECORD = np.dtype(
    [
        ("key", "<u8"),
        ("digest", "<u8", (2,)),
        ("width", "<i4"),
        ("height", "<i4"),
        ("format", "u1"),
        ("grey", "?"),
        ("frames", "?"),
        ("decoded", "?"),
        ("depth", "u1"),
        ("low", "<f4"),
        ("high", "<f4"),
        ("darkest", "u1"),
        ("brightest", "u1"),
    ]
)
FORMAT_NAMES = ("", *FORMATS)

_CHUNK = 64  # images that a thread reads between two reports of progress
_NARROW_RANGE = 64  # of 256 values; fewer are worth a word
_NAMED = 3  # files named in a note


class Parts(NamedTuple):
    """The indices of the readable images of each part of a set, int64 (K,)."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    validation: NDArray[np.int64]


class ImageScan(ABC):
    """The images of a set: what their headers say, which can be read, and how to train on them.

    Args:
        listing: the images.
        options: how to read them.

    Attributes:
        listing: the images.
        records: one `RECORD` for each; zeros where it cannot be read.
        problems: why images cannot be read, by index.
        channels: 1 if all readable images are grey, else 3.
        size: height and width to train at, in pixels.
        value_range: what becomes black and white in images with more than 8 bits, see `nin.data.decode`.
        resize: how images become squares.

    Raises:
        UserError: none of the images can be read.
    """

    def __init__(self, listing: FolderListing, options: LoadOptions) -> None:
        self.listing, self.options = listing, options
        self.records = np.zeros(len(self.listing.names), dtype=RECORD)
        self.problems: Problems = {}
        self._for_each(range(len(self.records)), self._read_header, "looking at files")
        readable = self.records[self.readable()]
        if len(readable) == 0:
            name, reason = listing.names[0], self.problems[0]
            count = len(self.records)
            raise UserError(
                f"{listing.root}: none of {format_number_of(count, 'image')} can be read; the first is {name}: {reason}"
            )
        self.channels = 1 if readable["grey"].all() else 3
        self.size = options.size or default_size(readable["width"], readable["height"], images=len(readable))
        self.resize = options.resize
        self.value_range: ValueRange | None
        if options.value_range == "auto":
            self.value_range = choose_range(readable["depth"], readable["low"], readable["high"])
        else:
            self.value_range = options.value_range

    @abstractmethod
    def source(self, index: int) -> str | bytes:
        """Return the path of the image file at an index, or its bytes.

        Raises:
            DecodeError: it cannot be read.
        """

    @abstractmethod
    def _read_header(self, index: int) -> None:
        """Fill the record at an index from the header and the bytes of the image.

        Raises:
            DecodeError: it cannot be read.
        """

    def decode(self, pixels: Pixels | None = None, photos: dict[int, Pixels] | None = None) -> None:
        """Decode the images at `size`: a file that is truncated fails here, not when its header is read.

        Args:
            pixels: takes all images, (N, channels, size, size); None decodes only what was never decoded.
            photos: takes the whole photos by index, see `nin.data.decoder.decode_photo`.
        """
        how = decode_options(self)

        def read(index: int) -> None:
            source, name = self.source(index), self.listing.names[index]
            if photos is None:
                image = decode_pixels(source, name=name, **how)
            else:
                image, photos[index] = decode_both(source, name=name, **how)
            if pixels is not None:
                pixels[index] = image
            self.records["darkest"][index], self.records["brightest"][index] = image.min(), image.max()
            self.records["decoded"][index] = True

        wanted = self.readable()
        if pixels is None:
            wanted = wanted[~self.records["decoded"][wanted]]
        self._for_each(wanted.tolist(), read, "reading images")

    def notes(self) -> tuple[str, ...]:
        """Return sentences about the values of all images, once they are decoded."""
        known = self.records[self.readable()]
        if len(known) == 0:
            return ()
        notes = describe_range(known["depth"], self.value_range)
        darkest, brightest = known["darkest"], known["brightest"]
        plain = np.flatnonzero(darkest == brightest)
        low, high = int(darkest.min()), int(brightest.max())
        if 0 < high - low < _NARROW_RANGE:
            notes.append(f"The images use values {low} to {high} of 0 to 255 only; a training normalises them")
        if 0 < 2 * len(plain) <= len(known):
            names = self.listing.names.select(self.readable()[plain[:_NAMED]])
            count = f"{len(plain):,} images are" if len(plain) > 1 else "1 image is"
            notes.append(f"{count} of one colour: {', '.join(names)}{', …' if len(plain) > _NAMED else ''}")
        return tuple(notes)

    def readable(self) -> NDArray[np.int64]:
        """Return the indices of the files that can be read."""
        return np.flatnonzero(self.records["width"] > 0)

    def test_mask(self) -> NDArray[np.bool_]:
        """Return which files are for testing, bool (N,): those of the test folder, else a part of each class.

        Raises:
            UserError: a class has no readable image to train on, or none is left for testing.
        """
        listing, readable, is_test = self.listing, self.readable(), np.zeros(len(self.records), dtype=np.bool_)
        labels = listing.labels[readable]
        if listing.is_test is not None:
            is_test[readable] = listing.is_test[readable]
        else:
            names, options = listing.names.select(readable), self.options
            is_test[readable] = stratified_holdout(
                names, labels.tolist(), fraction=options.test_fraction, seed=options.seed
            )
        is_train = ~(is_test | listing.is_validation)[readable]
        train_counts = np.bincount(labels[is_train], minlength=len(listing.classes))
        for label in np.flatnonzero(train_counts == 0)[:1]:
            unreadable = sum(int(listing.labels[index]) == label for index in self.problems)
            raise UserError(
                f"{listing.root}: class {listing.classes[label]!r} has no readable training image "
                f"({unreadable} unreadable); add images to its folder, or remove the folder"
            )
        if not is_test.any():
            raise UserError(f"{listing.root}: no image is left for testing; expected two images or more in a class")
        return is_test

    def partition(self, is_test: NDArray[np.bool_]) -> Parts:
        """Return the readable files of each part."""
        readable, is_validation = self.readable(), self.listing.is_validation
        is_train = ~(is_test | is_validation)
        return Parts(*(readable[part[readable]] for part in (is_train, is_test, is_validation)))

    def _for_each(self, indices: Sequence[int], read: Callable[[int], None], stage: str) -> None:
        """Call read(index) in threads; record why it failed in `problems`, or raise that if strict."""

        def read_chunk(chunk: Sequence[int]) -> Problems:
            problems = {}
            for index in chunk:
                try:
                    read(index)
                except DecodeError as error:
                    problems[index] = error.reason
            return problems

        chunks = (indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK))
        results = map_in_threads(read_chunk, chunks, workers=self.options.workers)
        for number, found in enumerate(results, start=1):
            self.problems |= found
            self.records[list(found)] = np.zeros((), dtype=RECORD)
            # the results come in the order of the files, so the same file is named every time
            if self.options.strict and found:
                index = min(found)
                raise UserError(
                    f"{self.listing.root / self.listing.names[index]}: {found[index]}; replace or remove the file"
                )
            if self.options.on_progress is not None:
                self.options.on_progress(stage, min(number * _CHUNK, len(indices)), len(indices))


def read_record(source: str | bytes, name: str, key: np.uint64) -> NDArray[np.void]:
    """Return the `RECORD` of an image.

    Args:
        source: the path of its file, or its bytes.
        name: of the file that bytes come from.
        key: of the record.

    Raises:
        DecodeError: it cannot be read.
        OSError: the file cannot be opened.
    """
    if isinstance(source, bytes):
        content, header = hashlib.blake2b(source, digest_size=16).digest(), read_header(source, name)
        extent = read_extent(source, name) if header.wide else Extent(BYTES, 0, 255)
    else:
        with open(source, "rb") as file:
            header = read_header(file)
            extent = read_extent(file) if header.wide else Extent(BYTES, 0, 255)
            file.seek(0)
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    file_format = FORMAT_NAMES.index(header.format)
    about = (header.width, header.height, file_format, header.grey, header.frames, False)
    return np.array((key, np.frombuffer(content, "<u8"), *about, *extent, 0, 0), dtype=RECORD)
