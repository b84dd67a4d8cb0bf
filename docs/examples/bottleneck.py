"""A bottleneck: look at fewer channels before the expensive convolution.

A 4×4 convolution from 256 to 256 channels multiplies a deep volume. Put a 1×1 convolution to 64 channels before it,
and the 4×4 has only 64 channels to look at:

    256 → 1×1 → 64 → 4×4 → 256   beside   256 → 4×4 → 256
"""

import torch
from torch import nn

import nin
from nin.profiling.cost import Cost
from nin.runtime.timer import Timing, time_interleaved


def main(*, images: int = 4, runs: int = 15) -> tuple[dict[str, Cost], dict[str, Timing]]:
    """Print costs and measured times; return both by name."""
    torch.manual_seed(0)
    models = {
        "256 → 1×1 → 64 → 4×4 → 256": nin.Bottleneck(256, 64, 256, kernel_size=4),
        "256 → 4×4 → 256": nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), nin.MLPConv(256, (256,), kernel_size=4)),
    }
    costs = {name: nin.cost(model, (1, 256, 28, 28)) for name, model in models.items()}
    print("layers                        multiplications   parameters")
    for name, cost in costs.items():
        print(f"{name:28} {cost.macs:16,} {cost.parameters:12,}")
    narrow, wide = costs.values()
    print(f"{wide.macs / narrow.macs:.2f} times fewer multiplications, for a 28×28 image")

    x = torch.randn(images, 256, 28, 28).contiguous(memory_format=torch.channels_last)
    for model in models.values():
        model.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        timings = time_interleaved({name: lambda model=model: model(x) for name, model in models.items()}, runs=runs)
    print()
    threads = torch.get_num_threads()
    print(f"measured: {images} images, float32, channels_last, {threads} threads, torch {torch.__version__}")
    print("layers                        median ms   20th to 80th percentile")
    for name, timing in timings.items():
        print(f"{name:28} {timing.median_ms:10.2f}   {timing.low_ms:.2f} to {timing.high_ms:.2f} ({timing.runs} runs)")
    fast, slow = timings.values()
    print(f"{slow.median_ms / fast.median_ms:.2f} times faster")
    return costs, timings


if __name__ == "__main__":
    main()
