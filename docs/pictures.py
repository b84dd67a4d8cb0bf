"""Makes the README's picture: photos, and where a trained network found evidence for its answer and the runner-up.

    python docs/pictures.py RUN FOLDER        (RUN trained on the image folder FOLDER)

The images are the first of each class in the test set that the network names rightly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nin
from nin import data
from nin.report import draw_image_grid, example_rows

if __name__ == "__main__":
    run, folder = Path(sys.argv[1]), Path(sys.argv[2])
    picture = draw_image_grid(example_rows(nin.load(run), data.load(folder), ["airplane", "cat", "horse"]), size=200)
    path = Path(__file__).parent / "confidence-maps.png"
    picture.save(path)
    print(path, picture.size)
