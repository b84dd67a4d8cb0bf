"""The web application: the HTTP API, and the files of the page."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from nin import costs, data, models, prediction
from nin.server import answers, inspection, measuring, uploads
from nin.server.batching import Batcher, FullError
from nin.server.guarding import Guard, Limits, RefusedError, busy
from nin.server.pages import add_page
from nin.server.samples import Samples

T = TypeVar("T")

# an image file as the whole body, or several in a form
IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
}


class Service:
    """What the routes share.

    Args:
        run: the run folder; None serves the lesson alone.
        limits: see there.
        device: where to compute.
    """

    def __init__(self, run: Path | None, limits: Limits, device: str) -> None:
        self.limits = limits
        self.classifier = None if run is None else prediction.load(run, device=device)
        self.description = None if self.classifier is None or run is None else describe(self.classifier, run)
        self.batcher = Batcher(self.classifier, waiting=limits.requests)
        self.samples = Samples(None if self.classifier is None else self.classifier.info)
        # no more at once than cores: a decoded picture can be a hundred times its file
        self.decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="nin-decoder")

    def close(self) -> None:
        """End the threads."""
        self.batcher.stop()
        self.decoders.shutdown(wait=False, cancel_futures=True)

    def network(self) -> prediction.Classifier:
        """Return the classifier, or refuse: none was given."""
        if self.classifier is None:
            raise RefusedError(404, "no run was given: start with nin serve RUN")
        return self.classifier

    def nin(self) -> models.NiN:
        """Return the network where it is one that can be looked into."""
        model = self.network().model
        if not isinstance(model, models.NiN):
            raise RefusedError(404, f"looking inside needs a NiN, got {type(model).__name__}")
        return model

    async def pixels(self, request: Request) -> Tensor:
        """Return the images of a request, uint8 (N, C, size, size)."""
        files = await uploads.read_files(request, self.limits)
        loop = asyncio.get_running_loop()
        p = self.network().info.preprocessing
        return await loop.run_in_executor(self.decoders, uploads.decode, files, p, self.limits)

    async def in_turn(self, submit: Callable[[], Future[T]]) -> T:
        """Wait for something that the computing thread does."""
        try:
            future = submit()
        except FullError:
            raise busy(self.limits) from None
        return await asyncio.wrap_future(future)

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return the network's input for images."""
        classifier = self.network()
        p = classifier.info.preprocessing
        return data.to_float(pixels.to(classifier.device), p.mean, p.std)


def create_app(
    run: Path | None = None, *, limits: Limits | None = None, host: str = "127.0.0.1", device: str = "cpu"
) -> FastAPI:
    """Return the application.

    Args:
        run: the folder that `nin.train` made; None serves the lesson alone.
        limits: on requests; the default ones if None.
        host: the name or address that it will be served on, which the Host header may say.
        device: where to compute.

    Raises:
        UserError: the run folder cannot be read.
    """
    limits = limits or Limits()
    service = Service(run, limits, device)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="nin",
        version=version("nin"),
        summary="Network in Network: classify images, and look inside the network that does it.",
        docs_url=None,  # FastAPI's own page loads its scripts from another host; ours is at /api
        redoc_url=None,
        lifespan=lifespan,
        responses=answers.PROBLEMS,
    )
    app.state.service = service
    app.add_middleware(Guard, limits=limits, host=host)

    @app.exception_handler(RefusedError)
    async def refuse(_: Request, refused: RefusedError) -> JSONResponse:
        return refused.response()

    _add_prediction(app, service)
    _add_inspection(app, service)
    add_page(app)
    return app


def _add_prediction(app: FastAPI, service: Service) -> None:
    """Add what programs ask for."""

    @app.get("/api/health")
    async def health() -> answers.Health:
        """Say that the server answers."""
        return answers.Health(model=service.classifier is not None, version=version("nin"))

    @app.get("/api/model")
    async def model() -> answers.Model:
        """Describe the network."""
        service.network()
        assert service.description is not None
        return service.description

    @app.post("/api/predict", openapi_extra=IMAGE_BODY, response_model=answers.Predictions)
    async def predict(
        request: Request,
        maps: Annotated[bool, Query(description="whether to send the class maps too")] = False,
    ) -> Response:
        """Classify one image (the body) or several (a form)."""
        classifier = service.network()
        pixels = await service.pixels(request)
        answer = await service.in_turn(lambda: service.batcher.classify(pixels))
        if maps and answer.maps is None:
            raise RefusedError(
                404, f"this network makes no class maps: it is no NiN but {type(classifier.model).__name__}"
            )
        names = classifier.classes
        probabilities = answer.scores.softmax(1)
        best = probabilities.argmax(1).tolist()
        return JSONResponse(
            {
                "predictions": [
                    {
                        "label": names[best[i]],
                        "confidence": row[best[i]],
                        "probabilities": dict(zip(names, row, strict=True)),
                        "scores": dict(zip(names, answer.scores[i].tolist(), strict=True)),
                        "maps": answer.maps[i].tolist() if maps and answer.maps is not None else None,
                    }
                    for i, row in enumerate(probabilities.tolist())
                ]
            }
        )


def _add_inspection(app: FastAPI, service: Service) -> None:
    """Add what the page asks for to look inside."""

    @app.get("/api/samples")
    async def samples() -> answers.SampleImages:
        """Give test images of the run, where they lie on this machine."""
        shown = [answers.SampleImage(label=s.label, image=s.uri) for s in service.samples.shown]
        return answers.SampleImages(state=service.samples.state, reason=service.samples.reason, samples=shown)

    @app.get("/api/layers/{index}/weights")
    async def weights(index: int) -> answers.Weights:
        """Give the weights of one convolution."""
        try:
            weight, bias = inspection.weights(service.nin(), index)
        except LookupError as error:
            raise RefusedError(404, str(error.args[0])) from error
        return answers.Weights(
            weight=answers.Numbers.of(weight), bias=None if bias is None else answers.Numbers.of(bias)
        )

    @app.post("/api/layers/{index}/activations", openapi_extra=IMAGE_BODY)
    async def activations(request: Request, index: int) -> answers.Numbers:
        """Give what one layer makes of an image: (channels, h, w)."""
        network = service.nin()
        x = service.inputs((await service.pixels(request))[:1])
        try:
            values = await service.in_turn(
                lambda: service.batcher.compute(lambda: inspection.activations(network, x, index))
            )
        except LookupError as error:
            raise RefusedError(404, str(error.args[0])) from error
        return answers.Numbers.of(values[0])

    @app.get("/api/dead")
    async def dead() -> answers.DeadChannels:
        """Name the channels that say nothing on any of the run's test images looked at."""
        network, pixels = service.nin(), service.samples.pixels
        if pixels is None:
            raise RefusedError(404, "the run's test images are not here, or not read yet")
        x = service.inputs(pixels)
        found = await service.in_turn(lambda: service.batcher.compute(lambda: inspection.dead_channels(network, x)))
        return answers.DeadChannels(images=len(pixels), channels=found)

    @app.post("/api/bottleneck")
    async def bottleneck(
        r: Annotated[int, Query(ge=measuring.NARROWEST, le=measuring.WIDEST, description="channels it leaves")],
    ) -> answers.Bottleneck:
        """Time 256 → 1×1 → r → 4×4 → 256 beside 256 → 4×4 → 256 on this machine."""
        measured = await service.in_turn(lambda: service.batcher.compute(lambda: measuring.measure_bottleneck(r)))
        return answers.Bottleneck.model_validate(dataclasses.asdict(measured))


def describe(classifier: prediction.Classifier, run: Path) -> answers.Model:
    """Return what the page says of a network."""
    info, model = classifier.info, classifier.model
    p = info.preprocessing
    counted = costs.cost(model, (1, p.channels, p.size, p.size))
    is_nin = isinstance(model, models.NiN)
    layers = inspection.layers(model) if isinstance(model, models.NiN) else []
    return answers.Model(
        name=str(info.model.get("config", {}).get("name", info.model.get("kind", "network"))),
        run=run.resolve().name,
        classes=list(classifier.classes),
        size=p.size,
        channels=p.channels,
        mean=list(p.mean),
        std=list(p.std),
        parameters=counted.parameters,
        macs=counted.macs,
        test_accuracy=info.result.get("test_accuracy"),
        has_maps=is_nin,
        layers=[answers.LayerShape(**dataclasses.asdict(layer)) for layer in layers],
    )
