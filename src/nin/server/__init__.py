"""``nin serve``: the HTTP API of a classifier, and a page that shows the inside of its network."""

from nin.server.app import create_app
from nin.server.middleware import Limits
from nin.server.static_export import export_page
from nin.server.uvicorn_server import serve

__all__ = ["Limits", "create_app", "export_page", "serve"]
