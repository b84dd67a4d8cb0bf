"""Evaluation: on tensors that are said to be on a GPU, and have no memory."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import nin
from nin import data
from nin.inference import evaluation
from nin.inference.evaluation import evaluate


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU, see test_gpu_paths.py")
@pytest.mark.parametrize("flip", [False, True])
def test_no_operation_mixes_devices(flip):
    """PyTorch's own check: FakeTensorDeviceMismatchError where an operation gets tensors of two devices."""
    images = data.load(
        (torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8).numpy(), (torch.arange(40) % 3).numpy())
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = nn.Sequential(nn.Conv2d(1, 3, 3, device="cuda"), nin.GlobalAveragePooling()).eval()
        scores, labels = evaluate(network, images, device=torch.device("cuda"), dtype=torch.float32, flip=flip)
    assert scores.shape == (len(images.test), 3)
    assert scores.device.type == labels.device.type == "cpu"


def test_batches_of_larger_images_have_fewer():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [evaluation.evaluation_batch_size(size, cpu) for size in (8, 96, 224, 448, 8192)] == [250, 250, 45, 11, 1]
    assert [evaluation.evaluation_batch_size(size, gpu) for size in (96, 224)] == [2000, 367]
