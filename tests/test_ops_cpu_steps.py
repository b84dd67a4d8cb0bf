"""The steps of compiled networks, one by one, against PyTorch in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nin.fusion.compiled_kernels import convolution, find_step
from nin.ops.cpu import dispatch
from nin.ops.cpu.steps import run_step

pytestmark = pytest.mark.skipif(dispatch.KERNELS is None, reason="steps need the compiled library")

# of float32 the sets with dot products of bfloat16 have the kernels of avx512
each_isa_and_dtype = pytest.mark.parametrize(
    ("isa", "dtype"),
    [
        *((isa, torch.float32) for isa in ("portable", "avx2", "avx512")),
        *((isa, torch.bfloat16) for isa in ("portable", "avx2", "avx512_bf16", "avx512_amx")),
    ],
    indirect=["isa"],
)
each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)

# channels, channels out, groups, taps, stride, padding, dilation
CONVOLUTIONS = [
    *((3, 40, 1, 4, 4, 0, 1), (3, 17, 1, 7, 2, 3, 1), (40, 80, 1, 2, 2, 0, 1), (5, 6, 1, (3, 1), (1, 2), (2, 0), 2)),
    *((33, 8, 1, 3, 1, 1, 1), (130, 34, 1, 1, 2, 0, 1), (12, 18, 3, 3, 1, 1, 1), (64, 128, 8, (1, 3), 2, (0, 1), 1)),
    *((33, 33, 33, 3, 1, 1, 1), (70, 70, 70, 7, 2, 3, 1), (5, 5, 5, (2, 5), (3, 1), 4, 2), (6, 12, 6, 3, 1, 1, 1)),
]


@each_isa_and_dtype
@each_layout
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
def test_convolutions_of_any_geometry(isa, dtype, sizes, layout):
    torch.manual_seed(0)
    channels, out, groups, taps, *geometry = sizes
    layer = nn.Conv2d(channels, out, taps, *geometry, groups=groups, bias=taps != 2).to(dtype)
    wide = torch.randn(2, channels + 3, 15, 13).to(dtype).contiguous(memory_format=layout)
    threads = torch.get_num_threads()
    with torch.no_grad():
        wanted = F.hardswish(copy.deepcopy(layer).double()(wide[:, 2:-1].double()))
        for x in (wide[:, 2:-1], wide[:, 2:-1].clone()):
            found = convolution(x, layer.weight, layer.bias, *geometry, groups, "hardswish")
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                run_step(dispatch.KERNELS, found.step, x, None, found.y.fill_(7))
                results.append(found.y.clone())
            torch.set_num_threads(threads)
            plain = find_step(layer, (x,), {})
            run_step(dispatch.KERNELS, plain.step.with_activation(5), x, None, plain.y.fill_(7))
            assert all(torch.equal(y, results[0]) for y in (*results, plain.y))
            size = wanted.abs().max().item()
            rounding = 1.01 * 2**-8 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(results[0].double(), wanted, rtol=rounding, atol=1e-5 * size)
