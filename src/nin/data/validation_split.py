"""Parts of the training images to choose by: a validation part, and the folds of a cross-validation."""

import dataclasses
from collections import Counter

import numpy as np
import torch

from nin.data.dataset import Data
from nin.data.sampler import stratified_holdout
from nin.errors import UserError


def split_validation(images: Data, fraction: float | None, *, seed: int) -> Data:
    """Set a part of the training images apart to validate on.

    Mean and standard deviation stay those of all training images, so the input is the same with and without.

    Args:
        images: the data set; its test images stay as they are. One with a validation part is returned as it is.
        fraction: of the training images of each class. None returns the data set as it is.
        seed: another seed gives another part.

    Raises:
        UserError: no class has two images, so that one could be set apart.
    """
    if fraction is None or images.validation is not None:
        return images
    labels = images.train.labels.tolist()
    names = images.train.names or map(str, range(len(labels)))
    # named apart from the test images, which are chosen by the same hash
    is_chosen = stratified_holdout((f"validation/{name}" for name in names), labels, fraction=fraction, seed=seed)
    if not is_chosen.any():
        raise UserError("validation: no class has two images to train on, of which one could be set apart")
    train, validation = (torch.from_numpy(np.flatnonzero(part)) for part in (~is_chosen, is_chosen))
    return dataclasses.replace(images, train=images.train.select(train), validation=images.train.select(validation))


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
