"""Means and covariances of layers' input patches and outputs, in float64, collected by hooks in one pass."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nin.errors import UserError
from nin.models.layer_spec import LayerSpec
from nin.narrowing.calibration import in_parts, model_inputs, record_calls
from nin.narrowing.linalg import shrink
from nin.narrowing.patches import extract_outputs, extract_patches, sampled_positions
from nin.runtime import distributed
from nin.runtime.progress import ProgressCallback, ignore_progress

# A patch of more values gets no covariance: 4608 (512 channels, 3×3) takes 170 MB in float64.
LARGEST_PATCH = 4608


class Moments:
    """Running sums from which the means and covariances of patches x and outputs y come.

    Args:
        groups: independent blocks of channels; 1 for most layers.
        inputs: values of x in one group.
        outputs: values of y in one group.
        device: of the sums.
        products: the second moments to keep, of "xx", "yx" and "yy".
        positions: samples that come from one image and so are alike; they lie side by side.
    """

    def __init__(
        self,
        groups: int,
        inputs: int,
        outputs: int,
        *,
        device: torch.device,
        products: tuple[str, ...],
        positions: int = 1,
    ) -> None:
        # float64: a covariance is the difference of two large sums
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        sizes = {"x": inputs, "y": outputs}
        self.products, self.positions = products, positions
        self.sums = {"count": zeros(groups), "x": zeros(groups, inputs), "y": zeros(groups, outputs)}
        # of each image's own second moment of x, the sum of squares beside the diagonal
        self.sums["squares"] = zeros(groups)
        self.origin: Tensor | None = None  # that these are taken about: the mean of the first batch
        self.sums |= {name: zeros(groups, sizes[name[0]], sizes[name[1]]) for name in products}

    @classmethod
    def of_layer(cls, spec: LayerSpec, module: nn.Module, *products: str) -> "Moments":
        """Return empty moments for a layer; where its patches are too large, of its output only."""
        device = next(module.parameters()).device
        kept = products if spec.patch <= LARGEST_PATCH else ("yy",)
        positions = len(sampled_positions(spec.positions))
        outputs = spec.out_channels // spec.groups
        return cls(spec.groups, spec.patch, outputs, device=device, products=kept, positions=positions)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples: x (groups, inputs, M) and y (groups, outputs, M)."""
        values, sums = {"x": x.double(), "y": y.double()}, self.sums
        sums["count"] += x.shape[2]
        for name, value in values.items():
            sums[name] += value.sum(2)
        for name in self.products:
            for g in range(len(x)):  # a single product is twice as fast as a batch of one
                sums[name][g] += values[name[0]][g] @ values[name[1]][g].mT
        if "xx" in self.products and x.shape[2]:
            self._add_squares(x)

    def _add_squares(self, x: Tensor) -> None:
        """Add ``‖X Xᵀ / n‖² - ‖diag(X Xᵀ / n)‖²`` of each image's n samples X about `origin`."""
        x = x.float()  # enough for an estimate, and twice as fast
        if self.origin is None:
            self.origin = x.mean(2, keepdim=True)
        images = (x - self.origin).unflatten(2, (-1, self.positions)).transpose(1, 2)  # (groups, N, inputs, positions)
        # ‖X Xᵀ‖ is ‖Xᵀ X‖, which is the smaller one where there are few positions
        fewer = images.mT @ images if self.positions < images.shape[2] else images @ images.mT
        diagonal = images.square().sum(3)
        squares = fewer.double().square().sum((1, 2, 3)) - diagonal.double().square().sum((1, 2))
        self.sums["squares"] += squares / self.positions**2

    def all_reduce(self) -> None:
        """Add up over all processes of a job, in place."""
        for name, value in self.sums.items():
            self.sums[name] = distributed.all_reduce_sum(value)

    @property
    def has_patch_covariance(self) -> bool:
        """Whether the covariance of x is known."""
        return "xx" in self.products

    @property
    def count(self) -> int:
        """Samples added."""
        return int(self.sums["count"][0])

    def shrinkage(self) -> Tensor:
        """Return how far Cov(x) is to be shrunk towards its diagonal, from 0 to 1, of each group: (groups,).

        The estimate that minimises the expected squared error, ``ρ = Σ Var(sᵢⱼ) / Σ sᵢⱼ²`` beside the diagonal. Samples
        of one image are alike, so the images are the independent ones: few images of many pixels say less than their
        number of pixels.

        Source:
            Ledoit, Wolf: A well-conditioned estimator for large-dimensional covariance matrices, 2004; towards the
            diagonal as in Schäfer, Strimmer: A shrinkage approach to large-scale covariance matrix estimation, 2005.
        """
        images = self.sums["count"] / self.positions
        xx = self.covariance("xx")
        beside = (xx.square().sum((1, 2)) - xx.diagonal(dim1=1, dim2=2).square().sum(1)).clamp_min(0)
        variance = (self.sums["squares"] / images - beside) / (images - 1).clamp_min(1)
        usable = (images > 1) & (beside > 0)
        return torch.where(usable, variance / beside.clamp_min(1e-300), torch.zeros_like(beside)).clamp(0, 1)

    def shrunk_covariance(self) -> Tensor:
        """Return Cov(x), with the groups first, shrunk towards its diagonal."""
        return shrink(self.covariance("xx"), self.shrinkage())

    def mean(self, name: str) -> Tensor:
        """Return the mean of x (groups, inputs) or y (groups, outputs)."""
        return self.sums[name] / self.sums["count"][:, None]

    def covariance(self, name: str) -> Tensor:
        """Return Cov(x) ("xx"), Cov(y, x) ("yx") or Cov(y) ("yy"), each with the groups first."""
        a, b = self.mean(name[0]), self.mean(name[1])
        return self.sums[name] / self.sums["count"][:, None, None] - a[:, :, None] * b[:, None, :]


def collect_moments(
    model: nn.Module, specs: dict[str, LayerSpec], batches: list[Any], on_progress: ProgressCallback = ignore_progress
) -> dict[str, Moments]:
    """Run all batches and return the moments of every layer, over all processes of a job.

    Raises:
        UserError: a layer's input, output or covariance is not finite; the layer is named.
    """
    layers = {name: model.get_submodule(name) for name in specs}
    moments = {name: Moments.of_layer(spec, layers[name], "xx") for name, spec in specs.items()}

    def record(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        check_finite(name, x, y)
        moments[name].add(extract_patches(x, specs[name]), extract_outputs(y, specs[name]))

    with record_calls(layers, record), torch.no_grad():
        for done, batch in enumerate(model_inputs(batches)):
            for args, kwargs in in_parts(*batch):
                model(*args, **kwargs)
            on_progress("Looking at the layers", done + 1, len(batches))
    all_reduce_moments(moments)
    return moments


def all_reduce_moments(moments: dict[str, Moments]) -> None:
    """Add up the moments of layers over all processes of a job, in place.

    Raises:
        UserError: a layer's are not finite, though its values are; it is named.
    """
    for name, value in moments.items():
        value.all_reduce()
        if not all(bool(added.isfinite().all()) for added in value.sums.values()):
            raise UserError(f"the covariances of {name} must be finite, got NaN or infinity: its values are too large")


def check_finite(name: str, x: Tensor, y: Tensor) -> None:
    """Refuse NaN and infinity in a layer's input or output.

    Raises:
        UserError: it names the layer.
    """
    for what, value in (("input", x), ("result", y)):
        # one sum takes 3 ms where isfinite takes 200 (64×64×56×56, one thread); where it overflows, ask every value
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
            raise UserError(f"the {what} of {name} must be finite, got NaN or infinity: check the model and the images")
