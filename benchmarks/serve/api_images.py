"""What schemathesis sends where the description says "a file": images, as no schema can say it. See README.md."""

import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image


def draw(mode: str, size: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 90).convert(mode).save(file, kind)
    return file.getvalue()


IMAGES = [
    draw("L", (8, 8), "PNG"),
    draw("RGB", (40, 30), "JPEG"),
    draw("RGB", (1, 300), "BMP"),
    draw("L", (9, 9), "TIFF"),
]

schemathesis.openapi.format("binary", st.sampled_from(IMAGES))
schemathesis.openapi.media_type("image/*", st.sampled_from(IMAGES))
