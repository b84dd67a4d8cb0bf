"""Many channels: a filter as deep as the image turns the channels of one pixel into one number.

The image is 6×6 with 32 channels and there are F filters of 1×1×32. At each pixel a filter multiplies its 32
weights with the 32 channels, adds the 32 products up, and a ReLU follows: one number. F filters give F numbers,
so 6×6×32 becomes 6×6×F.
"""

import torch

import nin

FILTERS = 8


def main() -> tuple[torch.Tensor, float]:
    """Print one pixel spelled out; return the result, (1, F, 6, 6), and the number worked out by hand."""
    torch.manual_seed(12)
    x = torch.randint(0, 3, (1, 32, 6, 6)).float()  # whole numbers, so that the sum is easy to follow
    weight = torch.randint(-2, 3, (FILTERS, 32, 1, 1)).float()
    y = nin.conv1x1(x, weight, activation="relu")

    channels, weights = x[0, :, 0, 0], weight[0, :, 0, 0]
    products = channels * weights
    by_hand = max(0.0, sum(products.tolist()))
    print("the 32 channels of the first pixel:", *channels.int().tolist())
    print("the 32 weights of the first filter:", *weights.int().tolist())
    print("32 products:", *products.int().tolist())
    print(
        f"their sum: {sum(products.tolist()):.0f}, after the ReLU: {by_hand:.0f}, the layer says: {y[0, 0, 0, 0]:.0f}"
    )
    print(f"all {FILTERS} filters at this pixel:", *y[0, :, 0, 0].int().tolist())
    print("6×6×32 →", "×".join(str(y.shape[d]) for d in (2, 3, 1)))
    return y, by_hand


if __name__ == "__main__":
    main()
