"""``nin serve``: a web application that predicts for programs, and its page, where people look inside."""

from nin.server.application import create_app
from nin.server.copying import write_copy
from nin.server.guarding import Limits
from nin.server.serving import serve

__all__ = ["Limits", "create_app", "serve", "write_copy"]
