"""Train with the compiled kernel and with the reference from the same seed: ``python curves.py DATA_DIR``.

DATA_DIR holds FashionMNIST/raw. 10,000 of its images, two epochs of `nin_digits` in batches of 128, one thread, in
float32 and in bf16; each training is a process of its own, because the instruction set is chosen when nin is imported.
Writes curves.json (the loss of every step, and the accuracy on 2,000 test images) and curves.png beside this file.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch

import nin
from nin import data, version
from nin.runtime.device import processor_name

FOLDER = Path(__file__).parent
IMAGES, TEST_IMAGES = 10_000, 2_000
KERNELS = {"kernel": "", "reference": "reference"}  # NIN_CPU_ISA


def train(data_dir, precision):
    """Train in this process, and print the losses as JSON."""
    images = data.load("fashion-mnist", data_dir=Path(data_dir))
    few = [
        dataclasses.replace(part, images=part.images[:count], labels=part.labels[:count])
        for part, count in ((images.train, IMAGES), (images.test, TEST_IMAGES))
    ]
    losses = []

    def keep(progress):
        if progress.row is None:
            losses.append(progress.loss)

    config = nin.TrainConfig(model="nin_digits", epochs=2, batch_size=128, precision=precision, threads=1, device="cpu")
    result = nin.train(dataclasses.replace(images, train=few[0], test=few[1]), config, on_progress=keep)
    accuracy = result.info.result["test_accuracy"]
    print(json.dumps({"kernel": nin.backends()["cpu"], "loss": losses, "test_accuracy": accuracy}))


def in_a_process(data_dir, precision, instruction_set):
    """Return what `train` prints with that instruction set."""
    environment = os.environ | {"NIN_CPU_ISA": instruction_set}
    command = [sys.executable, __file__, data_dir, precision]
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def draw(curves):
    """Write the picture: both curves of each precision."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, (precision, runs) in zip(axes, curves.items(), strict=True):
        for name, style in (("reference", {"color": "#b8b8b8", "linewidth": 3}), ("kernel", {"color": "#2a6f97"})):
            accuracy = f"{100 * runs[name]['test_accuracy']:.2f} %"
            axis.plot(runs[name]["loss"], label=f"{name}, test accuracy {accuracy}", **style)
        axis.set(title=precision, xlabel="step")
        axis.legend(frameon=False)
    axes[0].set_ylabel("training loss")
    figure.savefig(FOLDER / "curves.png", dpi=120)


def main(data_dir):
    """Train four times and keep the curves."""
    curves = {
        precision: {name: in_a_process(data_dir, precision, value) for name, value in KERNELS.items()}
        for precision in ("fp32", "bf16")
    }
    about = {
        "processor": processor_name(),
        "torch": torch.__version__,
        "nin": version.version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "images": IMAGES,
        "test_images": TEST_IMAGES,
    }
    (FOLDER / "curves.json").write_text(json.dumps(about | {"curves": curves}, indent=1) + "\n")
    draw(curves)
    for precision, runs in curves.items():
        apart = max(abs(a - b) for a, b in zip(runs["kernel"]["loss"], runs["reference"]["loss"], strict=True))
        ends = ", ".join(f"{name} {100 * run['test_accuracy']:.2f} %" for name, run in runs.items())
        print(f"{precision}: {ends}; the losses of a step are at most {apart:.4f} apart")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else train(*sys.argv[1:])
