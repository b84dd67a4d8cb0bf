"""Times inverted bottlenecks, and networks of them, beside other engines, in turn within one process.

    python benchmarks/inverted-bottleneck/measure.py [NAME …] [--batches 1 16] [--rounds 15] [--threads 1] [--turn-ms 4]
        [--processor-time] [--bf16]

Float32, random weights, BatchNorm folded beforehand in the blocks, nin's networks compiled. Of a block "nin" is the
operator with frozen weights and "nin compiled" `nin.fuse(block, x).compile()`, a snapshot as the other engines make
one; the ratio is that of the faster. Medians over rounds in which
every engine ran once; a ratio above 1: nin is faster. In a turn of one call an engine finds nothing of its own in the
caches, in one of many calls it is as where one network answers alone. Prints rows of `results.md`. With
--processor-time, for one thread on a machine with other work, the time is the processor's and not the clock's. With
--bf16 nin, eager and torch.compile compute a network in bfloat16, and OpenVINO is told to; ONNX Runtime, which has no
kernels for it, is left out.
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import nn

import nin

# channels, hidden channels, output channels, pixels of a side, taps of a side, stride
BLOCKS = {
    "24→144→24, 3×3, 56×56": (24, 144, 24, 56, 3, 1),
    "96→576→96, 3×3, 14×14": (96, 576, 96, 14, 3, 1),
    "160→960→160, 3×3, 7×7": (160, 960, 160, 7, 3, 1),
    "16→96→24, 3×3 stride 2, 112×112": (16, 96, 24, 112, 3, 2),
    "32→192→32, 3×3, 28×28": (32, 192, 32, 28, 3, 1),
    "112→672→112, 5×5, 14×14": (112, 672, 112, 14, 5, 1),
}
# the same with squeeze-and-excitation of that many channels between
SQUEEZED = {
    "96→576→96, 5×5, 7×7, SE 144": (96, 576, 96, 7, 5, 1, 144),
    "40→240→40, 5×5, 14×14, SE 64": (40, 240, 40, 14, 5, 1, 64),
    "40→240→40, 5×5, 28×28, SE 10": (40, 240, 40, 28, 5, 1, 10),
    "112→672→112, 5×5, 14×14, SE 28": (112, 672, 112, 14, 5, 1, 28),
}
NETWORKS = {
    "MobileNetV2": "mobilenetv2_100",
    "MobileNetV3-small": "mobilenetv3_small_100",
    "EfficientNet-Lite0": "efficientnet_lite0",
    "EfficientNet-B0": "efficientnet_b0",
    "MNASNet-B1": "mnasnet_100",
    "ConvNeXt atto": "convnext_atto",
}


class Block(nn.Module):
    """PyTorch's layers of a block, with ReLU6 twice and the residual where it fits."""

    def __init__(self, channels, hidden, out, pixels, taps, stride, squeezed=None):
        super().__init__()
        self.up, self.down = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, out, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, taps, stride, taps // 2, groups=hidden)
        self.residual = channels == out and stride == 1
        self.squeeze = nn.ModuleList()
        if squeezed:
            self.squeeze.extend([nn.Conv2d(hidden, squeezed, 1), nn.Conv2d(squeezed, hidden, 1)])

    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        if self.squeeze:
            reduce, expand = self.squeeze
            y = y * torch.sigmoid(expand(F.relu(reduce(y.mean((2, 3), keepdim=True)))))
        y = self.down(y)
        return y + x if self.residual else y

    def nin_block(self, x):
        layers = self.up, self.depthwise, *self.squeeze, self.down
        options = {"stride": self.depthwise.stride, "padding": self.depthwise.padding, "residual": self.residual}
        return nin.inverted_bottleneck(x, [c.weight for c in layers], [c.bias for c in layers], **options)


def other_engines(model, x, threads, compiles, dtype):
    """Return {name: a call} of eager in both layouts, torch.compile, OpenVINO and ONNX Runtime."""
    typed, images = copy.deepcopy(model).to(dtype), x.to(dtype)
    last = images.contiguous(memory_format=torch.channels_last)
    calls = {"eager": lambda: typed(last), "eager NCHW": lambda: typed(images)}
    if compiles:
        torch._dynamo.reset()
        torch._inductor.config.freezing = True
        compiled = torch.compile(typed)
        calls["compile"] = lambda: compiled(last)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }
    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    request = openvino.compile_model(converted, "CPU", options).create_infer_request()
    array = x.numpy()
    calls["OpenVINO"] = lambda: request.infer({0: array}, share_inputs=True, share_outputs=True)
    if dtype == torch.bfloat16:
        return calls
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"])
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, settings)
    calls["ONNX Runtime"] = lambda: session.run(None, {"x": array})
    return calls


def median_ms(calls, rounds, now, turn_ms):
    """Return {name: (median, lower and upper quartile)} in ms; every round runs each call for its turn, or once."""
    repeats, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        call()
        start = now()
        call()
        repeats[name] = max(1, int(turn_ms / 1e3 / (now() - start)))
    waits = torch.get_num_threads() > 1
    for _ in range(rounds):
        for name, call in calls.items():
            if waits:  # until the threads of the engine before have stopped to look for work: they take a core for that
                time.sleep(0.15)
                call()
            start = now()
            for _ in range(repeats[name]):
                call()
            times[name].append((now() - start) / repeats[name] * 1e3)
    return {name: np.percentile(t, (50, 25, 75)) for name, t in times.items()}


def report(name, batch, calls, rounds, now, turn_ms):
    """Print a row: each engine's median and quartiles, and the ratio to the fastest of the others."""
    times = median_ms(calls, rounds, now, turn_ms)
    others = {engine: t[0] for engine, t in times.items() if not engine.startswith("nin")}
    own = min(t[0] for engine, t in times.items() if engine.startswith("nin"))
    fastest = min(others, key=others.get)
    cells = [f"{t[0]:.3f} ({t[1]:.3f} to {t[2]:.3f})" for t in times.values()]
    ratios = [f"{others['eager'] / own:.2f}", f"{others[fastest] / own:.2f} ({fastest})"]
    print(f"| {name} | {batch} | {' | '.join([*cells, *ratios])} |", flush=True)
    return others[fastest] / own


@torch.no_grad()
def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join((*BLOCKS, *SQUEEZED, *NETWORKS))}")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turn-ms", type=float, default=4, help="how long an engine runs before it is another's turn")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ratios, blocks = [], {**BLOCKS, **SQUEEZED}
    now = time.process_time if options.processor_time else time.perf_counter
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    for name in options.names or (*blocks, *NETWORKS):
        for batch in options.batches:
            torch.manual_seed(0)
            if name in blocks:
                model, pixels = Block(*blocks[name]).eval(), blocks[name][3]
                x = torch.randn(batch, blocks[name][0], pixels, pixels)
                plain, fused = model, nin.freeze(copy.deepcopy(model).to(dtype)).nin_block
            else:
                model = timm.create_model(NETWORKS[name]).eval()
                x = torch.randn(batch, 3, 224, 224)
                plain = model.to(memory_format=torch.channels_last)
                typed = copy.deepcopy(plain).to(dtype)
                fused = nin.fuse(typed, x.to(dtype).contiguous(memory_format=torch.channels_last)).compile()
            last = x.to(dtype).contiguous(memory_format=torch.channels_last)
            forms = {"nin": fused}
            if name in blocks:
                typed = copy.deepcopy(model).to(dtype, memory_format=torch.channels_last)
                forms["nin compiled"] = nin.fuse(typed, last).compile()
            expected = plain(x)
            for form in forms.values():
                error = (form(last) - expected).abs().max() / expected.abs().max()
                assert error < (0.1 if options.bf16 else 1e-4), error
            calls = {form: lambda call=call, last=last: call(last) for form, call in forms.items()}
            calls |= other_engines(plain, x, options.threads, not options.no_compile, dtype)
            ratios.append(report(name, batch, calls, options.rounds, now, options.turn_ms))
    print(f"\ngeometric mean of nin beside the fastest: {statistics.geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
