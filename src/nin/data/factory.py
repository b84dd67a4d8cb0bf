"""Load data sets: `load` dispatches on the source, a name, a folder, shards or arrays."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nin.data.arrays import load_arrays
from nin.data.builtin import DATASET_NAMES, load_builtin
from nin.data.cache import cache_folder
from nin.data.dataset import Data, LoadOptions
from nin.data.folder import read_folder
from nin.data.preprocessing import Preprocessing
from nin.data.resizing import CENTRE_SQUARE, ResizeMode, ResizeOptions
from nin.data.validation_split import with_recorded_parts
from nin.data.value_range import RangeOption
from nin.data.webdataset import is_shards, is_url, read_shards
from nin.errors import UserError
from nin.names import missing_source
from nin.runtime.progress import ProgressCallback


def load(
    source: str | Path | Data | tuple[Any, Any],
    *,
    data_dir: str | Path | None = None,
    size: int | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
    memory_limit_bytes: int = 2 << 30,
    on_progress: ProgressCallback | None = None,
    value_range: RangeOption = "auto",
    resize: ResizeOptions | ResizeMode = CENTRE_SQUARE,
    photos: bool = True,
) -> Data:
    """Load labelled images for training and testing.

    Args:
        source: one of
            - a name: "digits" (comes with scikit-learn), "mnist", "fashion-mnist", "cifar10", "cifar100",
              "svhn" (write "./digits" for a folder of that name);
            - an image folder, `DIR/<class>/**`, or `DIR/train/<class>/**` with `DIR/test` or `DIR/val`
              beside it, in the words that people use for them (training_set, Testing, dev, …). Where both are there,
              val is Data.validation, the images to choose by; what is not used is in Data.notes and Data.findings;
            - WebDataset shards: a folder of tar files, one of them, a pattern such as "DIR/train-{000..009}.tar", or
              a URL that the webdataset package reads. Labels are those of the .cls, .json or .txt members;
            - (images, labels), or ((images, labels), (images, labels)) for training and testing, as arrays
              or tensors: images (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or floats in 0..1;
            - Data, which is returned as it is.
        data_dir: where the files of mnist to svhn lie. The default is ~/.cache/nin, to which they are
            downloaded. A folder given here is only read.
        size: height and width in pixels that the images of a folder are brought to. The default keeps
            square images of one size up to 64, else takes 32, 64, 128 or 224 by the median shorter side, of less than
            5,000 images 96 at most.
        test_fraction: fraction of each class that is held out where the source has no test set: 0.25 for
            digits and 0.2 for all others by default.
        seed: chooses which images are held out. The choice goes by name, not by position.
        strict: stop at the first file that cannot be read, where it would else be listed in Data.skipped.
        workers: threads that read files; the default is one for each usable core. The result is the same.
        memory_limit_bytes: up to here decoded images are held in memory: those of a folder from the beginning, those of
            shards, and of a folder that is larger, once they are needed. What does not fit is decoded on demand.
        on_progress: called with (what is being done, number done, number of all) while a folder is read.
        value_range: the values that become black and white in images with more than 8 bits; "auto" takes those of the
            images where these use a small part of their type, None the whole type. A run folder records it.
        resize: how the images of a folder or of shards become squares: "crop" (the centre square), "squash" (the whole
            image, distorted), "letterbox" (the whole image, with grey bars), or `ResizeOptions`. A run folder records
            it. Named sets and arrays are square already: there it is what is done with other images later.
        photos: where the size is 96 or more, hold the whole photos of a folder's training images too, as far as they
            fit into the limit; a training takes random crops of them. What does not fit it decodes each time, with the
            same result.

    Returns:
        The data set. Its labels follow the natural order of the class names: "2" before "10".

    Raises:
        UserError: the source does not exist or does not have the form above; the message says what to do.

    Example:
        >>> data = load("digits")
        >>> data.train.images.shape, len(data.test), data.classes[:3]
        (torch.Size([1346, 1, 8, 8]), 451, ('0', '1', '2'))
    """
    resize = ResizeOptions.of(resize)
    if isinstance(source, Data):
        return _check_fixed(source, size, resize)
    options = LoadOptions(
        size, test_fraction, seed, strict, workers, memory_limit_bytes, on_progress, value_range, resize, photos
    )
    if isinstance(source, tuple):
        arrays = load_arrays(source, test_fraction=test_fraction, seed=seed)
        return _check_fixed(dataclasses.replace(arrays, resize=resize), size, resize)
    # absolute, so that a report can be made from another folder
    folder = None if data_dir is None else Path(data_dir).resolve()
    origin: dict[str, Any] = {
        "data_dir": folder and str(folder),
        "size": size,
        "test_fraction": test_fraction,
        "seed": seed,
    }
    if resize != CENTRE_SQUARE:  # runs of version 0.1 have none, and are resumed
        origin["resize"] = dataclasses.asdict(resize)
    name = str(source)
    if source in DATASET_NAMES:
        builtin = load_builtin(name, data_dir=folder, test_fraction=test_fraction, seed=seed)
        builtin = dataclasses.replace(builtin, origin={"source": name, **origin}, resize=resize)
        return _check_fixed(builtin, size, resize)
    if is_shards(source):
        images = read_shards(name, options)
    else:
        if not Path(source).exists():
            raise missing_source(source)
        images = read_folder(Path(source), options)
    path = name if is_url(name) else str(Path(source).resolve())
    return dataclasses.replace(images, origin={"source": path, **origin})


def load_from_record(record: Mapping[str, Any], preprocessing: Preprocessing) -> Data:
    """Load the images that a run folder's ``config.json`` says it was trained on, as far as they are on this machine.

    The file may be another person's, so nothing is downloaded and no URL is followed: one such as "pipe:COMMAND" would
    run a program.

    Args:
        record: ``data`` of the file: what `load` left in `Data.origin`.
        preprocessing: of the network.

    Raises:
        UserError: it is not recorded where they lie, they are not here, or the record is damaged.
    """
    source = record.get("source", record.get("name"))
    if not isinstance(source, str) or ("source" not in record and source not in DATASET_NAMES):
        raise UserError("the run does not record where its images lie")
    if is_url(source):
        raise UserError(f"the run's images lie behind a URL, which is not followed ({source})")
    data_dir = record.get("data_dir")
    if not isinstance(data_dir, str | None):
        raise UserError(f"the run's record of its images is damaged ({data_dir=})")
    if source in DATASET_NAMES:
        data_dir = data_dir or str(cache_folder())
    return load_as_recorded(source, record, preprocessing, data_dir=data_dir)


def load_as_recorded(
    source: str | Path,
    record: Mapping[str, Any],
    preprocessing: Preprocessing,
    *,
    data_dir: str | Path | None = None,
    photos: bool = False,
    on_progress: ProgressCallback | None = None,
) -> Data:
    """Load the images of a training from where they lie now, in the same parts.

    With another seed, fraction or fold, images that the network was trained on would be among those that test it.

    Args:
        source: a name, a folder or shards, as for `load`.
        record: ``data`` of the run folder's ``config.json``.
        preprocessing: of the network.
        data_dir: as for `load`.
        photos: as for `load`.
        on_progress: as for `load`.

    Raises:
        UserError: as `load`, or the record is damaged.
    """
    fraction, seed = record.get("test_fraction"), record.get("seed", 0)
    if not isinstance(fraction, int | float | None) or not isinstance(seed, int):
        raise UserError(f"the run's record of its images is damaged (test_fraction={fraction!r}, {seed=})")
    images = load(
        source,
        data_dir=data_dir,
        size=None if source in DATASET_NAMES else preprocessing.size,  # theirs is their own
        test_fraction=fraction,
        seed=seed,
        value_range=preprocessing.value_range,
        resize=preprocessing.resize,
        photos=photos,
        on_progress=on_progress,
    )
    return with_recorded_parts(images, record)


def _check_fixed(data: Data, size: int | None, resize: ResizeOptions) -> Data:
    """Return the data set, whose images are fixed; raise UserError if other ones were asked for."""
    if size is not None and size != data.size:
        raise UserError(f"size: expected {data.size}, the size of {data.name}, got {size}; leave it out")
    if resize not in (CENTRE_SQUARE, data.resize):
        raise UserError(f"resize: expected {data.resize.mode}, which made {data.name}, got {resize.mode}; leave it out")
    return data
