"""Images beside their class-confidence maps in rows, as one picture; and rightly classified examples for the rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nin import data
from nin.display.numbers import format_percent
from nin.inference.classifier import Classifier
from nin.report import heatmaps

# `example_rows` looks at so many images of a class, and takes one that is classified with at least this probability.
IMAGES_PER_CLASS, MIN_CONFIDENCE = 64, 0.5

INK, QUIET, PAPER = (27, 27, 27), (95, 91, 85), (255, 255, 255)


@dataclass(frozen=True)
class MapPanel:
    """One map in a row of the grid.

    Attributes:
        title: such as the class and its probability.
        values: the map (h, w), in units of the score.
    """

    title: str
    values: Tensor


@dataclass(frozen=True)
class ImageRow:
    """One row of the grid.

    Attributes:
        title: above the image, such as its true class.
        pixels: uint8 (C, H, W), square.
        panels: the maps, from left to right.
    """

    title: str
    pixels: Tensor
    panels: Sequence[MapPanel]


def example_rows(classifier: Classifier, images: data.Data, classes: Sequence[str]) -> list[ImageRow]:
    """Return an image grid's row for each class: a rightly classified test image, with the maps of two classes.

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


def draw_image_grid(rows: Sequence[ImageRow], *, title: str = "", size: int = 192) -> Image.Image:
    """Draw images beside their class-confidence maps: one row per image, on white.

    The maps of a row share a scale, which the bar at its right end gives in units of the score.

    Args:
        rows: the images and their maps; they may differ in the number of maps.
        title: a line above everything; none where empty.
        size: width and height of each panel, in pixels; margins and letters grow with it.

    Returns:
        An RGB picture.

    Raises:
        ValueError: there are no rows.

    Example:
        >>> panel = MapPanel("seven 98 %", torch.ones(4, 4))
        >>> row = ImageRow("seven", torch.zeros(1, 8, 8, dtype=torch.uint8), [panel])
        >>> draw_image_grid([row], size=96).mode
        'RGB'
    """
    if not rows:
        raise ValueError("rows must hold at least one image, got none")
    margin, gap, label, bar = round(0.1 * size), round(0.07 * size), round(0.15 * size), round(0.3 * size)
    head = round(0.2 * size) if title else 0
    columns = 1 + max(len(row.panels) for row in rows)
    width = 2 * margin + columns * (size + gap) + bar
    grid = Image.new("RGB", (width, 2 * margin + head + len(rows) * (label + size + gap) - gap), PAPER)
    if title:
        ImageDraw.Draw(grid).text((margin, margin), title, INK, _font(0.105 * size, bold=True), anchor="lt")
    for i, row in enumerate(rows):
        _draw_row(grid, row, left=margin, top=margin + head + i * (label + size + gap) + label, size=size, gap=gap)
    return grid


def _draw_row(grid: Image.Image, row: ImageRow, *, left: int, top: int, size: int, gap: int) -> None:
    draw, baseline = ImageDraw.Draw(grid), top - round(0.04 * size)
    grid.paste(heatmaps.resized_image(row.pixels, size).convert("RGB"), (left, top))
    bold, plain, small = _font(0.08 * size, bold=True), _font(0.08 * size), _font(0.066 * size)
    draw.text((left, baseline), _fitting(row.title, bold, size), INK, bold, anchor="ls")
    if not row.panels:
        return
    limit = heatmaps.symmetric_limit(torch.cat([panel.values.flatten() for panel in row.panels]))
    for panel in row.panels:
        left += size + gap
        grid.paste(heatmaps.overlay(row.pixels, panel.values, limit=limit, size=size), (left, top))
        draw.text((left, baseline), _fitting(panel.title, plain, size), INK, plain, anchor="ls")
    left += size + gap
    strip = heatmaps.colour_bar(max(1, size // 20), size)
    grid.paste(strip, (left, top))
    left += strip.width + round(0.03 * size)
    draw.text((left, top), f"+{limit:.1f}", QUIET, small, anchor="lt")
    draw.text((left, top + size / 2), "0", QUIET, small, anchor="lm")
    draw.text((left, top + size), _legible(f"\N{MINUS SIGN}{limit:.1f}", small), QUIET, small, anchor="lb")


def _font(size: float, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has the letters of most alphabets and comes with matplotlib; else Pillow's own font."""
    try:
        import matplotlib
    except ImportError:
        font = ImageFont.load_default(max(6, round(size)))
        assert isinstance(font, ImageFont.FreeTypeFont)  # as a size is given
        return font
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, max(6, round(size)))


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return the text on one line, truncated to a width in pixels."""
    text, dots = _legible(text, font), _legible("…", font)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + dots) > width:
        text = text[:-1]
    return text + dots


def _legible(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Return the text with what cannot be shown replaced: Pillow's own font has ASCII alone."""
    if font.getname()[0] == "DejaVu Sans":
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    text = "".join(c if c.isprintable() else "?" for c in text.replace("\N{MINUS SIGN}", "-").replace("…", "..."))
    return text.encode("ascii", "replace").decode()
