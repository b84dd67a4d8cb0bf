"""Test images that the network names rightly, one of a class, beside the maps of its answer and of the runner-up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nin import data
from nin.inference.classifier import Classifier
from nin.report.image_grid import Panel, SheetRow
from nin.runtime.formatting import format_percent

SURE = 0.5
LOOKED_AT = 64


def example_rows(classifier: Classifier, images: data.Data, classes: Sequence[str]) -> list[SheetRow]:
    """Return a row of a contact sheet for each class that has such an image.

    Args:
        classifier: of a network that has confidence maps.
        images: their test images are looked at, the first 64 of a class.
        classes: names of classes that both know; others are left out.

    Returns:
        Rows for `contact_sheet`: the first image of the class that the network names rightly with a probability
        above one half, the map of the answer, the map of the runner-up.
    """
    rows = []
    for name in classes:
        if name not in images.classes or name not in classifier.classes:
            continue
        wanted = torch.nonzero(images.test.labels == images.classes.index(name)).flatten()[:LOOKED_AT]
        pixels = images.test.fetch(wanted)
        for image, prediction in zip(pixels, classifier.predict(pixels), strict=True):
            if prediction.label == name and prediction.confidence > SURE:
                maps = classifier.confidence_maps(image)[0]
                order = torch.tensor(prediction.probabilities).argsort(descending=True)[:2].tolist()
                titles = [f"{classifier.classes[i]} {format_percent(prediction.probabilities[i], 0)}" for i in order]
                panels = [Panel(title, maps[i]) for title, i in zip(titles, order, strict=True)]
                rows.append(SheetRow(name, image, panels))
                break
    return rows
