"""What the recipes put in the place of training settings that are not given, each number with its reason."""

import math
from typing import Any

# Peak learning rates for batches of 128 images; they grow with the root of the batch (Krizhevsky 2014, arXiv 1404.5997,
# section 4), to twice that at most. Of SGD: 660 photos in batches of 32 learned nothing at 0.1 (see
# benchmarks/photos/README.md); with 0.4 for batches of 512 a network without BatchNorm unlearned in the second epoch
# on CIFAR-10 (JPEG) what it knew after the first. Muon's is the part of a weight that a step exchanges (rows rate-… of
# benchmarks/recipes).
LEARNING_RATES = {"sgd": 0.1, "muon": 0.025}
MUON_SGD_FACTOR = 2.0  # SGD's rate for biases, gains and the class layer, in times of Muon's
ADAMW_LEARNING_RATE = 2e-3  # its steps have one length, whatever the batch

# The recipe finetune has its rate and BatchNorm's own moments of each batch from so many steps on. In fewer, the first
# steps of AdamW, as long as all others, and moments that are half of the weights', half of the images' would only harm:
# docs/finetuning.md.
FINETUNE_STEPS = 100


def optimizer_by_network(*, is_standardised: bool) -> str:
    """Return the optimiser for training a network from nothing, whose recipe names none.

    Muon where the weights are standardised: in equal minutes of a short training on CIFAR-10 (JPEG) it was right on
    74 % of the images held out, SGD on 69 % (row sgd of benchmarks/recipes).
    """
    return "muon" if is_standardised else "sgd"


def learning_rate_by_batch(optimizer: str, batch_size: int) -> float:
    """Return the peak learning rate of an optimiser for batches of so many images."""
    if optimizer == "adamw":
        return ADAMW_LEARNING_RATE
    return float(f"{LEARNING_RATES[optimizer] * min(2.0, math.sqrt(batch_size / 128)):.2g}")


# What a recipe puts in the place of settings that are not given; where it says nothing, the default recipe does.
RECIPES: dict[str, dict[str, Any]] = {
    # Rows of benchmarks/recipes vary each number; it stays as long as none of them is beyond chance.
    "default": {
        # a usual one of one-cycle schedules (rows warmup-0.1, trapezoid)
        "warmup": 0.2,
        # row triangle
        "schedule": "cosine",
        # usual for CIFAR; of standardised weights it keeps the length, and so the size of the steps (rows decay-…)
        "weight_decay": 5e-4,
        # rows smoothing-…
        "label_smoothing": 0.1,
        # averages over 200 steps, half an epoch of 60,000 images (rows ema-…, average-end)
        "ema": 0.995,
    },
    # Few, large steps, so that a GPU is the limit and not the launching of kernels; after Jordan, 94 % on CIFAR-10 in
    # 3.29 seconds on a single GPU, 2024, arXiv 2404.00498 (airbench), whose alternating flip and two-pixel shift are
    # in the default recipe already. No whitening, no BatchNorm: the network is the paper's.
    "speed": {
        # its figures were measured with it; Muon has not met a GPU yet
        "optimizer": "sgd",
        # an epoch of CIFAR-10 is 97 steps; airbench has 1,024, at which a network without BatchNorm has too few
        "batch_size": 512,
        # airbench's; a short training ends better on softer targets
        "label_smoothing": 0.2,
        # airbench's; the straight line keeps the rate high for longer than the cosine's end does
        "schedule": "triangle",
        # averages over as many images as 0.995 does with batches of 128
        "ema": 0.98,
    },
    # From weights, for as few as some hundred images. Before the first epoch the class layer is fitted to the features
    # that the weights give (see `nin.training.head_fit`): the gradients of a random one would undo them. Figures:
    # docs/finetuning.md.
    "finetune": {
        # its steps have one length in layers whose gradients differ by orders of magnitude, so one learning rate serves
        # networks of all kinds: Steiner et al. 2021, arXiv 2106.10270, section 3
        "optimizer": "adamw",
        "weight_decay": 0.05,
        # 20 steps an epoch for 660 photos
        "batch_size": 32,
        # the class layer is fitted already, and has to follow what the body learns
        "learning_rate": ADAMW_LEARNING_RATE,
        # the body has learned from a million images, the class layer from a few hundred. With a fifth of these rates
        # and frozen moments of BatchNorm the network hardly left what the class layer alone reaches
        "body_rate": 0.5,
        # some hundred images, each seen 40 times
        "augment": "strong",
        "warmup": 0.1,
        # averages over the last 50 steps, two or three epochs of some hundred images
        "ema": 0.98,
    },
}
