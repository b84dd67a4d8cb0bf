"""Rightly classified test images, one of a class, with the maps of the predicted class and of the runner-up."""

from collections.abc import Sequence

import torch

from nin import data
from nin.inference.classifier import Classifier
from nin.report.image_grid import ImageRow, MapPanel
from nin.runtime.formatting import format_percent

MIN_CONFIDENCE = 0.5
IMAGES_PER_CLASS = 64


def example_rows(classifier: Classifier, images: data.Data, classes: Sequence[str]) -> list[ImageRow]:
    """Return a row of an image grid for each class that has such an image.

    Args:
        classifier: of a network that has confidence maps.
        images: the first 64 test images of a class are classified.
        classes: names of classes that both know; others are left out.

    Returns:
        Rows for `draw_image_grid`: the first image of the class that is classified rightly with a probability above
        one half, the map of the class, the map of the runner-up.
    """
    rows = []
    for name in classes:
        if name not in images.classes or name not in classifier.classes:
            continue
        of_class = torch.nonzero(images.test.labels == images.classes.index(name)).flatten()
        pixels = images.test.fetch(of_class[:IMAGES_PER_CLASS])
        for image, prediction in zip(pixels, classifier.predict(pixels), strict=True):
            if prediction.label == name and prediction.confidence > MIN_CONFIDENCE:
                maps = classifier.confidence_maps(image)[0]
                order = torch.tensor(prediction.probabilities).argsort(descending=True)[:2].tolist()
                titles = [f"{classifier.classes[i]} {format_percent(prediction.probabilities[i], 0)}" for i in order]
                panels = [MapPanel(title, maps[i]) for title, i in zip(titles, order, strict=True)]
                rows.append(ImageRow(name, image, panels))
                break
    return rows
