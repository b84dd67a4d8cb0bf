"""The FastAPI application: its limits, the routes of the HTTP API, and the files of the page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from nin.server import schemas
from nin.server.middleware import Limits, SecurityMiddleware
from nin.server.routes import add_routes
from nin.server.service import Service
from nin.server.static_files import add_page
from nin.server.training_route import add_training
from nin.version import installed_version


def create_app(
    run: Path | None = None,
    *,
    beside: Path | None = None,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
    device: str = "cpu",
) -> FastAPI:
    """Return the application.

    Args:
        run: the folder that `nin.train` made; None serves the lesson alone.
        beside: a second one to show beside it, such as the same network narrowed.
        limits: on requests; the defaults if None.
        host: the name or address that it will be served on, which the Host header may say.
        device: where to compute.

    Raises:
        UserError: a run folder cannot be read, or the runs do not know the same classes.
    """
    limits = limits or Limits()
    service = Service([folder for folder in (run, beside) if folder is not None], limits, device)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="nin",
        version=installed_version(),
        summary="Network in Network: classify images, and look inside the network that does it.",
        docs_url=None,  # FastAPI's own page loads its scripts from another host; ours is at /api
        redoc_url=None,
        lifespan=lifespan,
        responses=schemas.PROBLEMS,
    )
    app.state.service = service
    app.add_middleware(SecurityMiddleware, limits=limits, host=host)

    add_routes(app, service)
    add_training(app, run, service)
    add_page(app)
    return app
