"""Decode the images of a request; those that are damaged, too large or too many get an HTTP error that says so."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor

from nin import data
from nin.checkpoint import Preprocessing
from nin.data.decoder import DecodeError, read_header
from nin.server.middleware import Limits

# an image file as the whole body, or several in a form
_FILE = {"type": "string", "format": "binary"}
IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _FILE},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "additionalProperties": False,
                    "properties": {"images": {"type": "array", "minItems": 1, "items": _FILE}},
                }
            },
        },
    }
}

ACCEPTED_FORMATS = data.FORMAT_EXAMPLES


async def read_files(request: Request, limits: Limits) -> list[bytes]:
    """Return the image files in a request: its multipart parts, or its body as one file.

    Raises:
        HTTPException: there is none, there are too many, or the content type is no image's.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=limits.images, max_fields=0) as form:
            parts = [part for _, part in form.multi_items()]
            files = [await part.read() for part in parts if isinstance(part, UploadFile)]
        if not files:
            raise HTTPException(400, "the form must hold at least one file, got none")
        return files
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise HTTPException(415, f"the body must be an image or multipart/form-data with images, got {kind!r}")
    body = await request.body()
    if not body:
        raise HTTPException(400, "the body must be an image, got nothing")
    return [body]


def decode_images(files: Sequence[bytes], preprocessing: Preprocessing, limits: Limits) -> Tensor:
    """Return the files' pixels in the size and the channels of the network's input, uint8 (N, C, size, size).

    Raises:
        HTTPException: a file is no image, damaged, or has too many pixels; the message says which.
    """
    return torch.stack([_decode_image(file, i, preprocessing, limits) for i, file in enumerate(files)])


def _decode_image(file: bytes, index: int, preprocessing: Preprocessing, limits: Limits) -> Tensor:
    try:
        header = read_header(file)
        if header.width * header.height > limits.pixels:
            size = f"{header.width}×{header.height}"
            raise HTTPException(413, f"image {index} must have at most {limits.pixels} pixels, got {size}")
        p = preprocessing
        return data.decode(file, size=p.size, channels=p.channels, value_range=p.value_range)
    except DecodeError as error:
        message = f"image {index}: {error.reason}; expected {ACCEPTED_FORMATS}"
        raise HTTPException(_status_code(error.__cause__), message) from error


def _status_code(cause: BaseException | None) -> int:
    if isinstance(cause, UnidentifiedImageError):
        return 415
    return 413 if isinstance(cause, Image.DecompressionBombError | Image.DecompressionBombWarning) else 422
