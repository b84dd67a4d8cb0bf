"""What every test starts from: the same random numbers, and one thread, as the tensors are small."""

import os

import pytest
import torch

torch.set_num_threads(1)

# Without a GPU, Triton's kernels run in its interpreter; it looks at this when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
