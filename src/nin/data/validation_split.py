"""Parts of the training images to choose by: a validation part, and the folds of a cross-validation."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nin.data.dataset import Data
from nin.data.sampler import stratified_holdout
from nin.display.numbers import format_number_of
from nin.errors import UserError


def split_validation(images: Data, fraction: float | None, *, seed: int) -> Data:
    """Set a part of the training images apart to validate on.

    Mean and standard deviation stay those of all training images, so the input is the same with and without.

    Args:
        images: the data set; its test images stay as they are. One that was split so is returned as it is.
        fraction: of the training images of each class. None returns the data set as it is.
        seed: another seed gives another part.

    Raises:
        UserError: no class has two images, so that one could be set apart; or the data set has another validation part.
    """
    record = {"validation": fraction, "validation_seed": seed}
    if fraction is None or (images.validation is not None and record.items() <= images.origin.items()):
        return images
    if images.validation is not None:
        raise UserError(
            f"validation: {images.name} has a validation part already, of "
            f"{format_number_of(len(images.validation), 'image')}: leave --validation away to choose by that"
        )
    labels = images.train.labels.tolist()
    names = images.train.names or map(str, range(len(labels)))
    # named apart from the test images, which are chosen by the same hash
    is_chosen = stratified_holdout((f"validation/{name}" for name in names), labels, fraction=fraction, seed=seed)
    if not is_chosen.any():
        raise UserError("validation: no class has two images to train on, of which one could be set apart")
    train, validation = (torch.from_numpy(np.flatnonzero(part)) for part in (~is_chosen, is_chosen))
    return dataclasses.replace(
        images,
        train=images.train.select(train),
        validation=images.train.select(validation),
        origin={**images.origin, **record},
    )


def take_fold(images: Data, number: int, *, folds: int, seed: int) -> Data:
    """Return the data set of one fold of a cross-validation: its test images are a part of the training images.

    The folds hold as many images of each class, and each training image is in one of them. The test images of the data
    set are in none.

    Args:
        images: the data set.
        number: of the fold, from 1.
        folds: their number.
        seed: another seed gives other folds.

    Raises:
        UserError: a class has fewer images than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold  # takes a second

    labels = images.train.labels.numpy()
    label, count = min(Counter(labels.tolist()).items(), key=lambda pair: pair[1])
    if count < folds:
        raise UserError(
            f"folds: class {images.classes[label]!r} has {count} images to train on, which {folds} folds cannot share: "
            "give fewer"
        )
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    train, test = list(splits)[number - 1]
    return dataclasses.replace(
        images,
        name=f"{images.name}, fold {number} of {folds}",
        train=images.train.select(torch.from_numpy(train)),
        test=images.train.select(torch.from_numpy(test)),
        origin={**images.origin, "fold": number, "folds": folds, "fold_seed": seed},
    )


def with_recorded_parts(images: Data, record: Mapping[str, Any]) -> Data:
    """Return the data set with the parts of a training: what it left out to test on, as a fold, or to choose by.

    Images that a network has learned must not test it, and those that chose it must not train it further.

    Args:
        images: the data set; one that has these parts is returned as it is.
        record: ``data`` of the run folder's ``config.json``.

    Raises:
        UserError: the record is damaged, or the images do not suffice for its folds.
    """
    fold, folds, fold_seed = (record.get(name) for name in ("fold", "folds", "fold_seed"))
    fraction, seed = record.get("validation"), record.get("validation_seed")
    if fold is not None and "fold" not in images.origin:
        if not isinstance(folds, int) or not isinstance(fold_seed, int) or fold not in range(1, folds + 1):
            raise UserError(f"the run's record of its images is damaged ({fold=}, {folds=}, {fold_seed=})")
        images = take_fold(images, fold, folds=folds, seed=fold_seed)
    if fraction is not None and images.validation is None:
        if not isinstance(fraction, float) or not 0 < fraction < 1 or not isinstance(seed, int):
            raise UserError(f"the run's record of its images is damaged (validation={fraction!r}, {seed=})")
        images = split_validation(images, fraction, seed=seed)
    return images
