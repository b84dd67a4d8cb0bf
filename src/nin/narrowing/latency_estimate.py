"""Estimates of layers' latencies from few measured ones: between channel counts that are timed, times are linear.

A plan for a latency weighs thousands of chains of layers. Timed one by one they would take an hour. A layer's time is
about ``a + b C_in + c C_out + d C_in C_out``, piece by piece; so layers are timed at a few numbers of channels only.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterable

from nin.models.layer_spec import LayerSpec

# Numbers of channels (of each group) that layers of every geometry are timed at, where one between them is asked for;
# the network's own numbers are added.
NODES = (1, 16, 64, 256, 1024, 4096, 16384)


class LatencyEstimates:
    """Milliseconds of chains, interpolated between those of single layers at few numbers of channels.

    A chain of several layers is the sum of its layers, corrected by the ratio of the two in the first chain of the same
    geometry that was asked for: an engine may compute a chain faster than its layers one by one.

    Args:
        measure: returns the milliseconds of a chain, measured.
        specs: the network's layers: at their own numbers of channels nothing is interpolated.
    """

    def __init__(self, measure: Callable[[tuple[LayerSpec, ...]], float], specs: Iterable[LayerSpec]) -> None:
        self.measure = measure
        nodes: dict[LayerSpec, tuple[set[int], set[int]]] = {}  # of inputs and outputs, by geometry
        self.layers: dict[LayerSpec, float] = {}
        self.ratios: dict[tuple[LayerSpec, ...], float] = {}
        for spec in specs:
            inputs, outputs = nodes.setdefault(_geometry(spec), (set(NODES), set(NODES)))
            inputs.add(_inputs(spec))
            outputs.add(_outputs(spec))
        self.nodes = {geometry: (sorted(a), sorted(b)) for geometry, (a, b) in nodes.items()}

    def __call__(self, chain: tuple[LayerSpec, ...]) -> float:
        """Return the milliseconds of a chain."""
        for spec in chain:
            if spec not in self.layers:
                self.layers[spec] = self._layer(spec)
        total = sum(self.layers[spec] for spec in chain)
        if len(chain) == 1:
            return total
        geometry = tuple(map(_geometry, chain))
        if geometry not in self.ratios:
            self.ratios[geometry] = self.measure(chain) / total
        return total * self.ratios[geometry]

    def _layer(self, spec: LayerSpec) -> float:
        """Return the milliseconds of one layer, from those at the nearest nodes."""
        inputs, outputs = self.nodes.get(_geometry(spec), (list(NODES), list(NODES)))
        if spec.is_depthwise:  # one number of channels
            return sum(weight * self._at(spec, n, n) for n, weight in _neighbours(inputs, spec.in_channels))
        return sum(
            weight_in * weight_out * self._at(spec, n, m)
            for n, weight_in in _neighbours(inputs, _inputs(spec))
            for m, weight_out in _neighbours(outputs, _outputs(spec))
        )

    def _at(self, spec: LayerSpec, inputs: int, outputs: int) -> float:
        """Return the milliseconds of a layer with these numbers of channels in each group."""
        groups = inputs if spec.is_depthwise else spec.groups
        each = 1 if spec.is_depthwise else groups
        at = dataclasses.replace(spec, in_channels=inputs * each, out_channels=outputs * each, groups=groups, bias=True)
        return self.measure((at,))


def _geometry(spec: LayerSpec) -> LayerSpec:
    """Return a layer without its channels and bias, and without its name and calls."""
    groups = 0 if spec.is_depthwise else spec.groups
    return dataclasses.replace(spec, name="", calls=1, in_channels=0, out_channels=0, bias=True, groups=groups)


def _inputs(spec: LayerSpec) -> int:
    return spec.in_channels if spec.is_depthwise else spec.in_channels // spec.groups


def _outputs(spec: LayerSpec) -> int:
    return spec.out_channels if spec.is_depthwise else spec.out_channels // spec.groups


def _neighbours(nodes: list[int], n: int) -> list[tuple[int, float]]:
    """Return the nodes on both sides of a number with their weights, or the number itself where it is one, or beyond.

    Example:
        >>> from nin.narrowing.latency_estimate import _neighbours
        >>> _neighbours([1, 16, 64], 28), _neighbours([1, 16, 64], 16)
        ([(16, 0.75), (64, 0.25)], [(16, 1.0)])
    """
    place = bisect.bisect_left(nodes, n)
    if place == len(nodes) or nodes[place] == n:
        return [(n, 1.0)]
    if place == 0:
        return [(nodes[0], 1.0)]
    low, high = nodes[place - 1], nodes[place]
    weight = (n - low) / (high - low)
    return [(low, 1 - weight), (high, weight)]
