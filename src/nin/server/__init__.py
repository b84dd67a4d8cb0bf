"""``nin serve``: a web application that predicts for programs, and its page, where people look inside."""

from nin.server.app import create_app
from nin.server.middleware import Limits
from nin.server.static_export import write_copy
from nin.server.uvicorn_server import serve

__all__ = ["Limits", "create_app", "serve", "write_copy"]
