"""Makes the README's picture: photos, and where a trained network found evidence for its answer and the runner-up.

    python docs/pictures.py RUN CLASS …

The photos are the first of each class in the run's test images that the network names rightly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nin
from nin import data
from nin.report import draw_image_grid, example_rows

if __name__ == "__main__":
    run, *classes = sys.argv[1:]
    classifier = nin.load(run)
    images = data.load_from_record(classifier.info.data, classifier.info.preprocessing)
    picture = draw_image_grid(example_rows(classifier, images, classes), size=200)
    path = Path(__file__).parent / "confidence-maps.png"
    picture.save(path, optimize=True)
    print(path, picture.size)
