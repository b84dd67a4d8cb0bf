"""The FastAPI application: the HTTP API, and the files of the page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from nin import distribution
from nin.inference.classifier import Classifier
from nin.server import schemas
from nin.server.middleware import Limits, SecurityMiddleware
from nin.server.routes import RunNumber, add_inspection_routes
from nin.server.service import Service
from nin.server.static_files import add_page
from nin.server.uploads import IMAGE_BODY


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
        version=distribution.version(),
        summary="Network in Network: classify images, and look inside the network that does it.",
        docs_url=None,  # FastAPI's own page loads its scripts from another host; ours is at /api
        redoc_url=None,
        lifespan=lifespan,
        responses=schemas.PROBLEMS,
    )
    app.state.service = service
    app.add_middleware(SecurityMiddleware, limits=limits, host=host)

    _add_model_routes(app, service)
    add_inspection_routes(app, service)
    add_page(app)
    return app


def _add_model_routes(app: FastAPI, service: Service) -> None:

    @app.get("/api/health")
    async def health() -> schemas.Health:
        """Say that the server answers."""
        return schemas.Health.of(len(service.runs))

    @app.get("/api/model")
    async def model(number: RunNumber = 0) -> schemas.Model:
        """Describe the network."""
        return service.run(number).metadata

    @app.post("/api/predict", openapi_extra=IMAGE_BODY, response_model=schemas.Predictions)
    async def predict(
        request: Request,
        maps: Annotated[bool, Query(description="whether to send the class maps too")] = False,
        number: RunNumber = 0,
    ) -> Response:
        """Classify one image (the body) or several (a form)."""
        run = service.run(number)
        pixels = await service.pixels(request, run)
        class_maps = await service.wait_for(lambda: service.batcher.classify(run.classifier, pixels))
        # FastAPI validates no Response against the schema: maps are many numbers
        return JSONResponse({"predictions": prediction_dicts(run.classifier, class_maps, with_maps=maps)})


def prediction_dicts(classifier: Classifier, maps: Tensor, *, with_maps: bool) -> list[dict[str, object]]:
    """Return the fields of `schemas.Prediction` for each image as plain data, from class maps (N, classes, h, w)."""
    names, scores = classifier.classes, maps.mean((2, 3))
    probabilities = scores.softmax(1)
    best = probabilities.argmax(1).tolist()
    return [
        {
            "label": names[best[i]],
            "confidence": row[best[i]],
            "probabilities": dict(zip(names, row, strict=True)),
            "scores": dict(zip(names, scores[i].tolist(), strict=True)),
            "maps": maps[i].tolist() if with_maps else None,
        }
        for i, row in enumerate(probabilities.tolist())
    ]
