"""Schemas of the HTTP API's responses; the names of the classes are those of the OpenAPI document."""

import base64
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field
from torch import Tensor

from nin.server.pca import PrincipalComponents
from nin.version import installed_version


class Health(BaseModel):
    """That the server answers, and what it serves."""

    status: str = "ok"
    model: bool = Field(description="whether a run was given")
    beside: bool = Field(description="whether a second run was given, to look at beside the first")
    version: str

    @classmethod
    def of(cls, runs: int) -> "Health":
        """Return the response where that many runs are served."""
        return cls(model=runs > 0, beside=runs > 1, version=installed_version())


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Training(BaseModel):
    """How far the training of the run is."""

    state: Literal["none", "training", "interrupted", "finished"]
    text: str = Field(description="the same in a sentence")
    name: str = Field(default="", description="of the run folder")
    step: int = Field(default=0, description="done, while it trains")
    steps: int = Field(default=0, description="in the whole training, while it trains")
    note: str = Field(default="", description="what should be known, such as that it has stopped learning")
    epochs_done: int = 0
    answers: str = Field(default="", description="which epoch the network that is served is of, until it has ended")
    charts: dict[str, str] = Field(default={}, description="the curves as SVG, by their titles")


class Numbers(BaseModel):
    """An array of float32, little-endian, row by row, in base64."""

    shape: list[int]
    values: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Numbers":
        """Return the encoded numbers of a tensor."""
        array = np.ascontiguousarray(tensor.numpy(), dtype="<f4")
        return cls(shape=list(array.shape), values=base64.b64encode(array.tobytes()).decode())


class Prediction(BaseModel):
    """What the network says of one image; of one among others that cannot be read, the problem alone."""

    label: str | None = None
    confidence: float | None = None
    probabilities: dict[str, float] | None = Field(None, description="of every class; they add up to 1")
    scores: dict[str, float] | None = Field(None, description="before the softmax; the mean of each map")
    maps: list[list[list[float]]] | None = Field(
        None, description="(classes, h, w): what each place adds to each class, where they were asked for"
    )
    problem: str | None = Field(None, description="why the image cannot be read; the other fields are missing then")


class Predictions(BaseModel):
    """One prediction for each image, in their order."""

    predictions: list[Prediction]


class LayerShape(BaseModel):
    """One layer of the network."""

    name: str
    kind: str
    block: int
    place: str = Field(description="the same for the layer of a narrowed network that stands for it")
    inputs: list[int] = Field(description="the layers that it takes, by their place in this list")
    channels: int
    in_channels: int
    kernel_size: int
    stride: int
    padding: int
    activation: str


class Model(BaseModel):
    """The network that is served."""

    name: str
    run: str
    classes: list[str]
    size: int = Field(description="height and width of its input, in pixels")
    channels: int
    mean: list[float]
    std: list[float]
    parameters: int
    macs: int = Field(description="multiply-accumulates for one image")
    test_accuracy: float | None
    no_maps_reason: str = Field("", description="why there are no exact class maps; Grad-CAM approximates them then")
    unfinished: str = Field("", description="where its training has not ended: which epoch it is of")
    layers: list[LayerShape]


class Weights(BaseModel):
    """Of one convolution."""

    weight: Numbers = Field(description="(C_out, C_in, k, k)")
    bias: Numbers | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "Weights":
        """Return the response for a convolution."""
        return cls(weight=Numbers.of(weight), bias=None if bias is None else Numbers.of(bias))


class Spectrum(BaseModel):
    """The principal components of what a convolution gives before its activation."""

    mean: Numbers = Field(description="(C,)")
    directions: Numbers = Field(description="(C, C): a direction in each row, the strongest first")
    variances: Numbers = Field(description="(C,): of the values in each direction")
    pixels: int = Field(description="height times width of what the layer gives")
    images: int = Field(description="test images looked at")

    @classmethod
    def of(cls, components: PrincipalComponents) -> "Spectrum":
        """Return the response for principal components."""
        parts = {name: Numbers.of(getattr(components, name)) for name in ("mean", "directions", "variances")}
        return cls(**parts, pixels=components.pixels, images=components.images)


class Narrowed(BaseModel):
    """What the network says where one convolution has fewer directions."""

    rank: int = Field(description="directions that are kept")
    images: int = Field(description="test images looked at")
    right: int = Field(description="of them, with these directions")
    right_before: int = Field(description="of them, with all directions")


class SampleImage(BaseModel):
    """A test image as a data: address."""

    label: str
    image: str


class SampleImages(BaseModel):
    """Test images of the run, where they lie on this machine."""

    state: str = Field(description="reading, ready or none")
    reason: str
    samples: list[SampleImage]


class Mistakes(BaseModel):
    """Test images that the network classifies wrongly, the surest answers first."""

    images: int = Field(description="test images looked at")
    wrong: int = Field(description="of them")
    samples: list[SampleImage] = Field(description="the first of the wrong ones, with their true classes")


class DeadChannels(BaseModel):
    """For each layer the channels that are zero at every pixel of all images looked at."""

    images: int
    channels: list[list[int]]


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "nothing in it, or a form that cannot be read"},
    403: {"model": Problem, "description": "Host or Origin are not this server's"},
    404: {"model": Problem, "description": "no such layer, or no run was given"},
    408: {"model": Problem, "description": "the request took too long to arrive"},
    413: {"model": Problem, "description": "too many bytes or pixels"},
    415: {"model": Problem, "description": "no image format that is known"},
    503: {"model": Problem, "description": "too many requests are waiting: come again after Retry-After seconds"},
    504: {"model": Problem, "description": "the answer took too long"},
}
