"""Routes of the HTTP API: predictions, sample images, weights, activations, dead channels, principal components."""

from typing import Annotated, TypeAlias

from fastapi import FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from nin.errors import UserError
from nin.inference.classifier import Classifier
from nin.inference.grad_cam import grad_cam
from nin.profiling import bottleneck_timing
from nin.server import schemas
from nin.server.activations import dead_channels, layer_weights
from nin.server.batcher import classify
from nin.server.pca import MAX_CHANNELS, narrowed_scores
from nin.server.sample_images import MAX_SAMPLES, Sample
from nin.server.service import ServedRun, Service
from nin.server.uploads import IMAGE_BODY

RunNumber: TypeAlias = Annotated[int, Query(alias="run", ge=0, le=1, description="0, or 1 for the run beside it")]
LayerNumber: TypeAlias = Annotated[int, Path(ge=0, le=100_000, description="its place among the layers of the model")]


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of the HTTP API."""
    _add_model_routes(app, service)
    _add_image_routes(app, service)
    _add_layer_routes(app, service)
    _add_narrowing_routes(app, service)


def _add_model_routes(app: FastAPI, service: Service) -> None:
    @app.get("/api/health")
    async def health() -> schemas.Health:
        """Say that the server answers."""
        await service.refresh()
        return schemas.Health.of(len(service.runs))

    @app.get("/api/model")
    async def model(number: RunNumber = 0) -> schemas.Model:
        """Describe the network."""
        return (await service.run(number)).metadata

    @app.post("/api/predict", openapi_extra=IMAGE_BODY, response_model=schemas.Predictions)
    async def predict(
        request: Request,
        maps: Annotated[bool, Query(description="whether to send the class maps too")] = False,
        number: RunNumber = 0,
    ) -> Response:
        """Classify one image (the body) or several (a form); one that cannot be read has a problem and no label."""
        run = await service.run(number)
        pixels, problems = await service.pixels(request, run)
        class_maps = await service.wait_for(lambda: service.batcher.classify(run.classifier, pixels))
        predictions = prediction_dicts(run.classifier, class_maps, with_maps=maps)
        for index, problem in sorted(problems.items()):
            predictions.insert(index, {"problem": problem})
        # FastAPI validates no Response against the schema: maps are many numbers
        return JSONResponse({"predictions": predictions})

    @app.post("/api/approximate-map", openapi_extra=IMAGE_BODY)
    async def approximate_map(
        request: Request,
        label: Annotated[int, Query(ge=0, description="the class, by its place among those of the model")],
        number: RunNumber = 0,
    ) -> schemas.Numbers:
        """Approximate by Grad-CAM where an image speaks for a class, from 0 to 1: (1, size, size)."""
        run = await service.run(number)
        if label >= len(run.classifier.classes):
            raise HTTPException(404, f"there are {len(run.classifier.classes)} classes")
        pixels, problems = await service.pixels(request, run)
        if 0 in problems:
            raise HTTPException(422, problems[0])
        x = run.classifier.inputs(pixels[:1])
        try:
            return schemas.Numbers.of(await service.compute(lambda: grad_cam(run.classifier.model, x, [label])))
        except UserError as error:  # the package is missing, or the network ends in no feature maps
            raise HTTPException(422, str(error)) from error


def _add_image_routes(app: FastAPI, service: Service) -> None:
    @app.get("/api/samples")
    async def samples() -> schemas.SampleImages:
        """Give test images of the run, where they lie on this machine."""
        await service.refresh()
        if not service.runs:
            return schemas.SampleImages(state="none", reason="", samples=[])
        return sample_images(await service.run())

    @app.get("/api/mistakes")
    async def mistakes(number: RunNumber = 0) -> schemas.Mistakes:
        """Give test images that the network classifies wrongly, of those that statistics are computed on."""
        run = await service.run(number)
        return await service.compute(lambda: find_mistakes(run))

    @app.get("/api/dead")
    async def dead(number: RunNumber = 0) -> schemas.DeadChannels:
        """Name the channels that say nothing on any of the run's test images looked at."""
        run = await service.run(number)
        return await service.compute(lambda: find_dead_channels(run))

    @app.post("/api/bottleneck")
    async def measured_bottleneck(
        r: Annotated[
            int, Query(ge=bottleneck_timing.MIN_R, le=bottleneck_timing.MAX_R, description="channels it leaves")
        ],
    ) -> bottleneck_timing.Measurement:
        """Time 256 → 1×1 → r → 4×4 → 256 beside 256 → 4×4 → 256 on this machine."""
        return await service.compute(lambda: bottleneck_timing.measure(r))


def _add_layer_routes(app: FastAPI, service: Service) -> None:
    @app.get("/api/layers/{index}/weights")
    async def weights(index: LayerNumber, number: RunNumber = 0) -> schemas.Weights:
        """Give the weights of one convolution."""
        run = await service.run(number)
        try:
            return schemas.Weights.of(*layer_weights(run.network, index))
        except LookupError as error:
            raise HTTPException(404, str(error.args[0])) from error

    @app.post("/api/layers/{index}/activations", openapi_extra=IMAGE_BODY)
    async def activations(
        request: Request,
        index: LayerNumber,
        number: RunNumber = 0,
        sums: Annotated[bool, Query(description="what it gives before its activation")] = False,
    ) -> schemas.Numbers:
        """Give what one layer makes of an image: (channels, h, w)."""
        run = await service.run(number)
        pixels, problems = await service.pixels(request, run)
        if 0 in problems:
            raise HTTPException(422, problems[0])
        values = await service.compute(lambda: run.outputs(pixels[:1], index, sums=sums), request)
        return schemas.Numbers.of(values[0])


def _add_narrowing_routes(app: FastAPI, service: Service) -> None:
    @app.get("/api/layers/{index}/spectrum")
    async def spectrum(request: Request, index: LayerNumber, number: RunNumber = 0) -> schemas.Spectrum:
        """Give the principal components of a convolution's sums over the run's test images looked at."""
        run = await service.run(number)
        return schemas.Spectrum.of(await service.compute(lambda: run.principal_components(index), request))

    @app.get("/api/layers/{index}/narrowed")
    async def narrowed(
        request: Request,
        index: LayerNumber,
        rank: Annotated[int, Query(ge=1, le=MAX_CHANNELS, description="directions that are kept")],
        number: RunNumber = 0,
    ) -> schemas.Narrowed:
        """Say how many test images looked at are right with all of a convolution's directions, and with some."""
        run = await service.run(number)
        return await service.compute(lambda: count_correct(run, index, rank), request)


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


def sample_images(run: ServedRun) -> schemas.SampleImages:
    """Return the test images of a run that the page shows, and whether they are loaded."""
    shown = [schemas.SampleImage(label=sample.label, image=sample.uri) for sample in run.samples.shown]
    return schemas.SampleImages(state=run.samples.state, reason=run.samples.reason, samples=shown)


def find_mistakes(run: ServedRun) -> schemas.Mistakes:
    """Return the test images looked at that the network classifies wrongly."""
    pixels, labels = run.calibration_images()
    confidence, predicted = classify(run.classifier, pixels).mean((2, 3)).softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    samples = [Sample.of(pixels[i], run.classifier.classes[int(labels[i])]) for i in wrong[:MAX_SAMPLES].tolist()]
    shown = [schemas.SampleImage(label=sample.label, image=sample.uri) for sample in samples]
    return schemas.Mistakes(images=len(pixels), wrong=len(wrong), samples=shown)


def find_dead_channels(run: ServedRun) -> schemas.DeadChannels:
    """Return the channels that are dead on the test images that statistics are computed on."""
    x, _ = run.calibration_batch()
    return schemas.DeadChannels(images=len(x), channels=dead_channels(run.network, x))


def count_correct(run: ServedRun, index: int, rank: int) -> schemas.Narrowed:
    """Return how many test images are classified rightly before and after one layer is narrowed.

    Raises:
        LookupError: there is no such layer.
    """
    x, labels = run.calibration_batch()
    components = run.principal_components(index)
    channels = len(components.mean)
    rank = min(rank, channels)

    def count(kept: int) -> int:
        return int((narrowed_scores(run.network, x, index, components, kept).argmax(1) == labels).sum())

    if index not in run.right_before:
        # all directions instead of the layer as it is: both numbers come from the same arithmetic
        run.right_before[index] = count(channels)
    return schemas.Narrowed(rank=rank, images=len(x), right=count(rank), right_before=run.right_before[index])
