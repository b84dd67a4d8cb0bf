"""A 1×1 convolution is a fully connected layer, applied at every pixel with the same weights.

The same 6×6×32 image goes through `nin.conv1x1`, and pixel by pixel through `torch.nn.Linear` with the same
weights. In float64 the two agree to the last bits: they add the same 32 products, in another order.
"""

import torch
from torch import nn

import nin


def main() -> float:
    """Print how far the two are apart; return it in units of float64's last place at the largest value."""
    torch.manual_seed(0)
    dense = nn.Linear(32, 8).double()
    x = torch.randn(1, 32, 6, 6, dtype=torch.float64)

    with torch.no_grad():
        convolved = nin.conv1x1(x, dense.weight.reshape(8, 32, 1, 1), dense.bias)
        at_every_pixel = torch.empty_like(convolved)
        for row in range(6):
            for column in range(6):
                at_every_pixel[0, :, row, column] = dense(x[0, :, row, column])

    difference = (convolved - at_every_pixel).abs().max().item()
    last_place = torch.finfo(torch.float64).eps * convolved.abs().max().item()
    print(f"{convolved.numel()} numbers up to {convolved.abs().max():.2f}, computed both ways")
    print(f"largest difference: {difference:.1e}, which is {difference / last_place:.1f} units in the last place")
    return difference / last_place


if __name__ == "__main__":
    main()
