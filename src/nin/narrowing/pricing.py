"""What layers cost: multiply-accumulates, parameters, or milliseconds measured on this device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nin import timing
from nin.narrowing.structure import LayerShape, make_layer

# The price of a chain of layers that runs one after the other.
Price = Callable[[tuple[LayerShape, ...]], float]


def macs(chain: tuple[LayerShape, ...]) -> float:
    """Return the multiply-accumulates of a chain of layers for one image."""
    return float(sum(shape.macs for shape in chain))


def parameters(chain: tuple[LayerShape, ...]) -> float:
    """Return the weights and biases of a chain of layers."""
    return float(sum(shape.parameters for shape in chain))


class LatencyTable:
    """Milliseconds of chains of layers, measured when they are first asked for and remembered.

    Args:
        like: a tensor on the device and in the dtype to measure in.
        batch: images at a time.
        layout: "contiguous" or "channels_last".
        runs: timings of which the 20th percentile counts: what else the machine does makes them longer only.
    """

    def __init__(self, like: Tensor, batch: int, layout: str = "contiguous", *, runs: int = 7) -> None:
        self.like, self.batch, self.layout, self.runs = like, batch, layout, runs
        self.known: dict[tuple[LayerShape, ...], float] = {}

    def __call__(self, chain: tuple[LayerShape, ...]) -> float:
        """Return the milliseconds of a chain, for as many calls as the model makes."""
        # the name and the parameters' values do not matter: equal geometries are measured once
        key = tuple(dataclasses.replace(shape, name="", calls=1) for shape in chain)
        if key not in self.known:
            self.known[key] = self.measure(key)
        return chain[0].calls * self.known[key]

    def measure(self, chain: tuple[LayerShape, ...]) -> float:
        """Time a chain with random weights."""
        module = nn.Sequential(*(make_layer(shape, self.like) for shape in chain)).eval()
        first = chain[0]
        size = (
            (self.batch, first.input_size[0], first.in_channels)
            if first.kind == "linear"
            else (self.batch, first.in_channels, *first.input_size)
        )
        x = torch.randn(size, device=self.like.device, dtype=self.like.dtype)
        if self.layout == "channels_last" and x.dim() == 4:
            module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

        def run() -> None:
            module(x)
            wait_for(x.device)

        with torch.inference_mode():
            return timing.compare({"chain": run}, runs=self.runs, warmup=2)["chain"].low_ms


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
