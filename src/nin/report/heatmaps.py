"""Class-confidence maps drawn as colour over their images."""

import base64
import io

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nin.data.arrays import to_pillow

# Vermilion and blue of Okabe and Ito's palette: people with any kind of colour vision tell them apart. One fixed
# hue on each side, mixed in by |value|: the amount of colour is the amount of evidence, on dark images too, where
# maps that grow darker with the value (RdBu, PuOr) would vanish.
WARM, COOL = (213, 94, 0), (0, 114, 178)
STRONGEST_ALPHA = 0.88

# Grey levels under a map start here instead of at black, so that colour shows on a black background as well.
# A photo is seldom black over large parts, and what is on it must still be seen: it keeps more of its contrast.
DARKEST_GREY, DARKEST_GREY_OF_PHOTO = 136, 72

# Up to this side an image is enlarged pixel by pixel; above it, it is a photo.
LARGEST_PIXELATED = 64


def overlay(pixels: Tensor, values: Tensor, *, limit: float, size: int) -> Image.Image:
    """Draw a class-confidence map over its image: orange speaks for the class, blue against it.

    The image lies below in grey. The colour's opacity is ``0.88 · min(1, |value| / limit)``.

    Args:
        pixels: uint8 (C, H, H); C is 1 or 3.
        values: the map (h, w), as `nin.Classifier.confidence_maps` gives it, in units of the score.
        limit: the value that gets the full colour; see `symmetric_limit`.
        size: width and height of the result, in pixels.

    Returns:
        An RGB picture of size × size.

    Raises:
        ValueError: the image is not square, the map has not two dimensions, or the limit is not above 0.

    Example:
        >>> overlay(torch.zeros(1, 8, 8, dtype=torch.uint8), torch.ones(4, 4), limit=1.0, size=64).size
        (64, 64)
    """
    if values.dim() != 2:
        raise ValueError(f"values must have shape (h, w), got {tuple(values.shape)}")
    if not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    grey = np.asarray(resized_image(pixels, size).convert("L"), dtype=np.float32)
    darkest = DARKEST_GREY if pixels.shape[-1] <= LARGEST_PIXELATED else DARKEST_GREY_OF_PHOTO
    base = darkest + grey * ((255 - darkest) / 255)
    return Image.fromarray(_tint(base, (_enlarge(values, size) / limit).clip(-1, 1)))


def resized_image(pixels: Tensor, size: int) -> Image.Image:
    """Return a Pillow image of size × size: small images are enlarged pixel by pixel, photos smoothly.

    Args:
        pixels: uint8 (C, H, H); C is 1 or 3.
        size: width and height of the result, in pixels.

    Raises:
        ValueError: the image is not square, or has other channels.
    """
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3) or pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"pixels must have shape (1, H, H) or (3, H, H), got {tuple(pixels.shape)}")
    image = to_pillow(pixels.to(torch.uint8).permute(1, 2, 0))
    pixelated = image.width <= LARGEST_PIXELATED
    return image.resize((size, size), Image.Resampling.NEAREST if pixelated else Image.Resampling.BICUBIC)


def symmetric_limit(values: Tensor) -> float:
    """Return the largest absolute value, so that several maps of one image share a scale; 1 where all are zero."""
    return float(values.abs().max()) or 1.0


def display_size(side: int) -> int:
    """Return the size to draw an image of that side at: a whole multiple near 160 pixels; of photos at most 224."""
    return side * max(1, 160 // side) if side <= LARGEST_PIXELATED else min(side, 224)


def data_uri(image: Image.Image) -> str:
    """Return an image as a ``data:`` URI: a PNG up to 64 pixels, above it a JPEG, a quarter of the size."""
    file, is_small = io.BytesIO(), max(image.size) <= LARGEST_PIXELATED
    kind, options = ("png", {}) if is_small else ("jpeg", {"quality": 88, "subsampling": 0})
    image.save(file, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def colour_bar(width: int, height: int) -> Image.Image:
    """Return the scale of `overlay` as a strip: ``limit`` at the top, 0 in the middle, ``-limit`` at the bottom."""
    evidence = np.linspace(1, -1, height, dtype=np.float32)[:, None].repeat(width, axis=1)
    return Image.fromarray(_tint(np.full_like(evidence, (DARKEST_GREY + 255) / 2), evidence))


def _tint(grey: NDArray[np.float32], evidence: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return (H, W, 3): the colour of the evidence, from -1 (against) to 1 (for), mixed into greys (H, W)."""
    colour = np.where(evidence[..., None] > 0, np.array(WARM, np.float32), np.array(COOL, np.float32))
    alpha = STRONGEST_ALPHA * np.abs(evidence[..., None])
    return np.rint(grey[..., None] * (1 - alpha) + colour * alpha).astype(np.uint8)


def _enlarge(values: Tensor, size: int) -> NDArray[np.float32]:
    """Return the map at size × size, smooth."""
    values = values.detach().to("cpu", torch.float32)
    large = F.interpolate(values[None, None], size=(size, size), mode="bicubic", align_corners=False)[0, 0]
    # bicubic interpolation overshoots: without this a picture would show more evidence than the map holds
    return large.clamp(values.min(), values.max()).numpy()
