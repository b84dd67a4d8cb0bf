"""Decide whether images may be mirrored: by the names of the classes, then by a quick look at the images."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The quick look takes about a second for so many images, whatever the size of the set.
_MAX_IMAGES = 2000
_MAX_CLASSES = 200
# In fewer images of a class than these, chance could look like a mirror image.
_MIN_IMAGES = 12

# Classes are mirror images of each other if so many more images of each are taken for the other one when they are
# mirrored, and if that is so many standard errors. Of two classes that are so, all would be; Fashion-MNIST has 1 %,
# CIFAR-10 1 %, photos of rubbish (TrashNet) 5 %; arrows to the left and right 100 %.
_MIN_SWAPPED = 0.25
_MIN_STANDARD_ERRORS = 3.5

_SIDE = 16  # pixels that the images are shrunk to
_CHUNK = 128  # images whose features are computed at a time

_DIRECTIONS = {
    *("left", "right", "leftward", "rightward", "leftwards", "rightwards", "lefthand", "righthand"),
    *("links", "rechts", "gauche", "droite", "droit", "izquierda", "izquierdo", "derecha", "derecho"),
    *("esquerda", "esquerdo", "direita", "direito", "sinistra", "sinistro", "destra", "destro", "vanster", "hoger"),
    *("east", "west", "eastward", "westward", "northeast", "northwest", "southeast", "southwest", "ost", "osten"),
    *("westen", "ouest", "oeste", "ovest", "clockwise", "anticlockwise", "counterclockwise", "cw", "ccw", "acw"),
    *("mirrored", "unmirrored", "mirror", "flipped", "unflipped", "reversed", "chiral", "左", "右", "лево", "право"),
}
_COMPASS = {"n", "e", "s", "w", "ne", "nw", "se", "sw", "north", "south", "east", "west"}
_NUMBER_WORDS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}
# "class 3" is the third of something, "digit 3" is a 3.
_ORDINALS = {"class", "grade", "type", "stage", "level", "group", "category", "cluster", "label", "kind", "score"}
_SIDES = ({"l", "r"}, {"lt", "rt"}, {"lh", "rh"}, {"od", "os"})


class FlipChoice(NamedTuple):
    """Whether images are mirrored, and why, in words for the user."""

    flip: bool
    reason: str


def choose_flip(classes: Sequence[str], images: Tensor, labels: Tensor) -> FlipChoice:
    """Return whether a mirrored image keeps its label.

    Args:
        classes: the name of each label.
        images: some of the images, uint8 (N, C, H, W), of each class as many as there are.
        labels: their labels, int64 (N,).

    Example:
        >>> choose_flip(("turn left", "turn right"), torch.zeros(0, 3, 8, 8), torch.zeros(0))
        FlipChoice(flip=False, reason="the class 'turn left' has a direction in its name")
    """
    by_name = reason_in_names(classes)
    if by_name is not None:
        return FlipChoice(False, by_name)
    if int((torch.bincount(labels.long(), minlength=1) >= _MIN_IMAGES).sum()) < 2:
        return FlipChoice(True, "no class has a name that speaks against it, and too few images for a look at them")
    swapped = find_swapped_classes(images, labels, len(classes))
    if swapped is not None:
        first, second = (classes[label] for label in swapped)
        return FlipChoice(False, f"mirrored images of {first!r} look like {second!r}, and the other way round")
    return FlipChoice(True, "mirrored images look like no other class")


def reason_in_names(classes: Sequence[str]) -> str | None:
    """Return what the names of the classes say against mirroring, or None.

    They are characters or numbers, angles, points of the compass, or they have directions in them. What all names have
    in common does not count.
    """
    words = [_words(name) for name in classes]
    common = set.intersection(*map(set, words)) if len(words) > 1 else set()
    for name, parts in zip(classes, words, strict=True):
        if any(word in _DIRECTIONS for word in parts):
            return f"the class {name!r} has a direction in its name"
    rest = [[word for word in parts if word not in common] for parts in words]
    single = [parts[0] if len(parts) == 1 else "" for parts in rest]
    characters = sum(len(word) == 1 or word in _NUMBER_WORDS for word in single)
    # not all: letters come with "space" and "nothing"
    if characters >= 0.75 * len(single) and not common & _ORDINALS:
        return "the classes are called like digits or letters"
    if all(word in _COMPASS for word in single):
        return "the classes are called like points of the compass"
    if _are_angles(single):
        return "the classes are called like angles"
    for parts, name in zip(rest, classes, strict=True):
        for pair in _SIDES:
            sides = pair & set(parts)
            if sides and any(sorted(_opposite(parts, pair)) == sorted(other) for other in rest):
                return f"the class {name!r} has a side in its name"
    return None


def find_swapped_classes(images: Tensor, labels: Tensor, classes: int) -> tuple[int, int] | None:
    """Return two classes of which each one's mirrored images look like the other's, or None.

    Half of the images train a small kernel classifier on shapes in 16 × 16 pixels, the other half is classified as it
    is and mirrored, and the other way round.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        classes: their number.
    """
    images, labels = _balanced(images, labels, classes)
    present, labels = torch.unique(labels, return_inverse=True)
    count = len(present)
    if count < 2:
        return None
    chunks = images.split(_CHUNK)  # 2,000 photos as floats would take a gigabyte
    plain = torch.cat([features(chunk) for chunk in chunks])
    mirrored = torch.cat([features(chunk.flip(3)) for chunk in chunks])
    half = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(count):
        half[torch.nonzero(labels == label)[1::2, 0]] = True
    answers = torch.zeros(2, count, count, dtype=torch.float64)
    for train in (half, ~half):
        predict = _kernel_classifier(plain[train], labels[train], count)
        for table, inputs in zip(answers, (plain, mirrored), strict=True):
            pairs = labels[~train] * count + predict(inputs[~train])
            table += torch.bincount(pairs, minlength=count * count).view(count, count)
    numbers = answers[0].sum(1, keepdim=True)
    before, after = answers / numbers
    errors = (((before * (1 - before) + after * (1 - after)) * numbers + 1).sqrt()) / numbers
    swapped = (after - before - _MIN_SWAPPED).minimum((after - before) / errors - _MIN_STANDARD_ERRORS)
    both = swapped.minimum(swapped.T)
    best = int(both.argmax())
    if both.flatten()[best] < 0:
        return None
    first, second = sorted(divmod(best, count))
    return int(present[first]), int(present[second])


def features(images: Tensor) -> Tensor:
    """Return what shapes an image has: gradients by direction in 4 × 4 places, and its brightness in 8 × 8.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        float64 (N, 192).
    """
    grey = images.float().mean(1, keepdim=True)
    grey = F.interpolate(grey, size=(_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)
    grey = (grey - grey.mean((2, 3), keepdim=True)) / (grey.std((2, 3), keepdim=True) + 1e-3)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    right = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    bins = torch.arange(8).view(1, 8, 1, 1) * (torch.pi / 4)
    lobes = (torch.atan2(down, right) - bins).cos().clamp_min(0) ** 4
    gradients = F.avg_pool2d(right.hypot(down) * lobes, 4).flatten(1)
    brightness = F.avg_pool2d(grey, 2).flatten(1)
    return torch.cat([F.normalize(gradients), F.normalize(brightness)], 1).double()


def _kernel_classifier(x: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Return a function from features to labels: kernel ridge regression with Gaussians."""
    distances = torch.cdist(x, x).square()
    width = distances[:256, :256].median().clamp_min(1e-6)
    targets = F.one_hot(labels, classes).double() * 2 - 1
    ridge = 0.05 * torch.eye(len(x), dtype=torch.float64)
    weights = torch.linalg.solve((-distances / width).exp() + ridge, targets)
    return lambda inputs: ((-torch.cdist(inputs, x).square() / width).exp() @ weights).argmax(1)


def _balanced(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return images of classes that have enough of them, of each as many, so that there are `_MAX_IMAGES` at most."""
    counts = torch.bincount(labels.long(), minlength=classes)
    usable = torch.nonzero(counts >= _MIN_IMAGES)[:, 0]
    if len(usable) > _MAX_CLASSES:  # neighbours in pairs, as their names may differ in the end only
        first = torch.linspace(0, len(usable) - 2, _MAX_CLASSES // 2).long()
        usable = usable[torch.unique(torch.cat([first, first + 1]))]
    most = max(_MIN_IMAGES, _MAX_IMAGES // max(1, len(usable)))
    chosen = []
    for label in usable.tolist():
        members = torch.nonzero(labels == label)[:, 0]
        chosen.append(members[:: max(1, -(-len(members) // most))])
    indices = torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)
    return images[indices], labels[indices].long()


def _words(name: str) -> list[str]:
    """Return the words and numbers of a name, in lower case and without accents: "turnLeft" has two."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    found = re.findall(r"\d+|[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])|[^\W\d_]+", plain)
    return [word.casefold() for word in found] or [name]


def _are_angles(words: Sequence[str]) -> bool:
    """Return whether all names are degrees: multiples of 15 up to 360, some of 45 or more."""
    if not all(word.isdecimal() for word in words):
        return False
    numbers = [int(word) for word in words]
    return max(numbers) in range(45, 361) and all(number % 15 == 0 for number in numbers)


def _opposite(words: Sequence[str], pair: set[str]) -> list[str]:
    """Return the words with each side exchanged for the other of its pair."""
    return [(pair - {word}).pop() if word in pair else word for word in words]
