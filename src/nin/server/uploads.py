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
from nin.server.sample_images import is_sample

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
                    "additionalProperties": True,
                    "properties": {"images": {"type": "array", "minItems": 1, "items": _FILE}},
                }
            },
        },
    }
}

# text fields in a form, which are not looked at: pages send a token or a caption along
MAX_FIELDS = 100

ACCEPTED_FORMATS = data.FORMAT_EXAMPLES


async def read_files(request: Request, limits: Limits) -> list[bytes]:
    """Return the image files in a request: its multipart parts, or its body as one file.

    Raises:
        HTTPException: there is none, there are too many, or the content type is no image's.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        options = {"max_files": limits.images, "max_fields": MAX_FIELDS, "max_part_size": limits.body_bytes}
        async with request.form(**options) as form:
            parts = form.multi_items()
            files = [await part.read() for _, part in parts if isinstance(part, UploadFile)]
        if not files:
            fields = ", ".join(name for name, _ in parts)
            got = f"only the fields {fields}, which are no files" if fields else "no file"
            raise HTTPException(400, f"send at least one image file; the form has {got}")
        return files
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise HTTPException(415, f"this is no image, but {kind}; expected {ACCEPTED_FORMATS}")
    body = await request.body()
    if not body:
        raise HTTPException(400, f"the file is empty; expected an image: {ACCEPTED_FORMATS}")
    return [body]


def decode_images(
    files: Sequence[bytes], preprocessing: Preprocessing, limits: Limits
) -> tuple[Tensor, dict[int, str]]:
    """Return the files' pixels in the size and the channels of the network's input, and what is wrong with the others.

    Returns:
        uint8 (N, C, size, size) of those that can be read, in their order; and the reasons by the index of the others.

    Raises:
        HTTPException: none can be read: the first is no image, damaged, or has too many pixels; the message says which.
    """
    pixels: list[Tensor] = []
    problems: dict[int, HTTPException] = {}
    for i, file in enumerate(files):
        try:
            pixels.append(_decode_image(file, preprocessing, limits))
        except HTTPException as error:
            if len(files) > 1:  # say which
                error.detail = f"image {i}: {error.detail}"
            problems[i] = error
    if not pixels:
        raise problems[0]
    return torch.stack(pixels), {i: error.detail for i, error in problems.items()}


def _decode_image(file: bytes, preprocessing: Preprocessing, limits: Limits) -> Tensor:
    try:
        header = read_header(file)
        if header.width * header.height > limits.pixels:
            size = f"{header.width}×{header.height}"
            raise HTTPException(413, f"the image must have at most {limits.pixels:,} pixels, got {size}")
        how = preprocessing.decoding
        return data.decode(file, **(how | {"resize": data.CENTRE_SQUARE} if is_sample(file) else how))
    except DecodeError as error:
        message = f"{error.reason}; expected {ACCEPTED_FORMATS}"
        raise HTTPException(_status_code(error.__cause__), message) from error


def _status_code(cause: BaseException | None) -> int:
    if isinstance(cause, UnidentifiedImageError):
        return 415
    return 413 if isinstance(cause, Image.DecompressionBombError | Image.DecompressionBombWarning) else 422
