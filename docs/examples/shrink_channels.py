"""Shrinking channels: pooling makes an image smaller in height and width, a 1×1 convolution in depth.

A 28×28 image with 192 channels meets 32 filters of 1×1×192 and leaves with 32 channels. With 192 filters its
shape stays as it was, and the layer is still worth having: the weights mix the channels, and the ReLU adds a bend
that the network can learn with.
"""

import torch

import nin
from nin.profiling.cost import Cost


def main() -> dict[int, Cost]:
    """Print both cases with what they cost; return the costs by number of filters."""
    torch.manual_seed(0)
    x = torch.randn(1, 192, 28, 28)
    print("before         after         multiplications   parameters   left at zero by the ReLU")
    costs = {}
    for filters in (32, 192):
        layer = nin.Conv1x1(192, filters, activation="relu")
        y = layer(x)
        costs[filters] = nin.cost(layer, (1, 192, 28, 28))
        shape = "×".join(str(y.shape[d]) for d in (2, 3, 1))
        macs, parameters = costs[filters].macs, costs[filters].parameters
        print(f"28×28×192  →   {shape:9} {macs:19,} {parameters:12,} {(y == 0).float().mean():15.0%}")
    return costs


if __name__ == "__main__":
    main()
