"""One channel: a 1×1 convolution only scales the image.

With one channel in and one filter there is a single weight, here 2, and every pixel is multiplied by it. That is
not yet useful: a volume control would do.
"""

import torch

import nin

IMAGE = [
    [1, 2, 3, 6, 5, 8],
    [3, 5, 5, 1, 3, 4],
    [2, 1, 3, 4, 9, 3],
    [4, 7, 8, 5, 7, 9],
    [1, 5, 3, 7, 4, 8],
    [5, 4, 9, 8, 3, 5],
]


def main() -> torch.Tensor:
    """Print the 6×6 image and the result; return the result, (6, 6)."""
    x = torch.tensor(IMAGE, dtype=torch.float32).reshape(1, 1, 6, 6)  # (N, C_in, H, W)
    weight = torch.tensor([2.0]).reshape(1, 1, 1, 1)  # (C_out, C_in, 1, 1)
    y = nin.conv1x1(x, weight)[0, 0]
    print("6×6 image         times 2")
    for before, after in zip(IMAGE, y.int().tolist(), strict=True):
        print(" ".join(map(str, before)), "     ", " ".join(f"{value:2}" for value in after))
    return y


if __name__ == "__main__":
    main()
