"""Static files of the page: read once, each under one fixed URL, so that no path comes from a request."""

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request, Response

HERE = Path(__file__).parent / "page"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
NAMES = {"index.html": "/", "api.html": "/api", "training.html": "/training"}

# what each page begins with, in the place of this line
HEAD, HEAD_LINE = "head.html", b"<!-- head.html -->\n"


@cache
def read_page() -> dict[str, tuple[str, bytes]]:
    """Return media type and content of each file, by its URL."""
    found, head = {}, (HERE / HEAD).read_bytes()
    for path in sorted(HERE.rglob("*")):
        if path.suffix in TYPES and path.name != HEAD:
            name = path.relative_to(HERE).as_posix()
            found[NAMES.get(name, f"/{name}")] = (TYPES[path.suffix], path.read_bytes().replace(HEAD_LINE, head))
    photo = resources.files("sklearn.datasets.images") / "flower.jpg"  # comes with scikit-learn
    found["/flower.jpg"] = (TYPES[".jpg"], photo.read_bytes())
    return found


def add_page(app: FastAPI) -> None:
    """Add a route for each file of the page."""
    for address, (media_type, content) in read_page().items():
        _add_file(app, address, media_type, content)


def _add_file(app: FastAPI, address: str, media_type: str, content: bytes) -> None:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}

    @app.api_route(address, methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)
