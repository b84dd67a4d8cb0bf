"""Makes the README's picture: photos, and where a trained network found evidence for its answer and the runner-up.

    python docs/pictures.py RUN FOLDER        (RUN trained on the image folder FOLDER)

The images are the first of each class in the test set that the network names rightly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import nin
from nin import data
from nin.report import Panel, SheetRow, contact_sheet


def rows(run: Path, folder: Path, classes: list[str]) -> list[SheetRow]:
    """Return a row for each class: the image, the map of the answer, the map of the runner-up."""
    images, classifier = data.load(folder), nin.load(run)
    made = []
    for name in classes:
        wanted = torch.nonzero(images.test.labels == images.classes.index(name)).flatten()
        for index in wanted.tolist():
            pixels = images.test.fetch(torch.tensor([index]))[0]
            prediction = classifier.predict(pixels)[0]
            if prediction.label == name and prediction.confidence > 0.5:
                break
        maps = classifier.confidence_maps(pixels)[0]
        order = torch.tensor(prediction.probabilities).argsort(descending=True)[:2].tolist()
        panels = [Panel(f"{classifier.classes[i]} {100 * prediction.probabilities[i]:.0f} %", maps[i]) for i in order]
        made.append(SheetRow(name, pixels, panels))
    return made


if __name__ == "__main__":
    run, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sheet = contact_sheet(rows(run, folder, ["airplane", "cat", "horse"]), size=200)
    path = Path(__file__).parent / "confidence-maps.png"
    sheet.save(path)
    print(path, sheet.size)
