"""cost: counted by hand, by PyTorch's own counter, and printed."""

import copy
import json
import time

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import nin
from nin.models.factory import create_external_model
from nin.profiling.cost import _copy_to_meta


def test_known_values():
    model = nn.Sequential(nn.Conv2d(192, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 28 * 28, 10))
    result = nin.cost(model, (1, 192, 28, 28))
    conv, linear = result.layers
    assert (conv.name, conv.kind, conv.kernel_size, conv.is_1x1) == ("0", "conv", (1, 1), True)
    assert conv.macs == 28 * 28 * 192 * 32
    assert conv.parameters == 192 * 32 + 32
    assert conv.activation_bytes == 4 * 28 * 28 * 32
    assert (linear.kind, linear.macs) == ("linear", 32 * 28 * 28 * 10)
    assert result.macs == conv.macs + linear.macs
    assert result.fraction_1x1 == 1


def test_a_small_network_counted_on_paper():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nin.MLPConv(8, (6, 5)),
        nn.Flatten(),
        nn.Linear(80, 10),
    )
    result = nin.cost(model, (1, 3, 8, 8))
    # 8×8 pixels become 4×4 = 16; a kernel of 3×3 has 9 taps
    assert [(layer.name, layer.macs, layer.parameters, layer.activation_bytes) for layer in result.layers] == [
        ("0", 16 * 8 * 3 * 9, 8 * 3 * 9 + 8, 4 * 8 * 16),
        ("1", 16 * 8 * 9, 8 * 9 + 8, 4 * 8 * 16),
        ("2.convs.0", 16 * 8 * 6, 8 * 6 + 6, 4 * 6 * 16),
        ("2.convs.1", 16 * 6 * 5, 6 * 5 + 5, 4 * 5 * 16),
        ("4", 80 * 10, 80 * 10 + 10, 4 * 10),
    ]
    assert (result.macs, result.parameters, result.activation_bytes) == (6656, 1203, 1768)
    assert result.uncounted == ()
    assert nin.cost(model, (7, 3, 8, 8)).macs == 7 * 6656


def test_each_call_and_each_module_has_its_own_operations():
    class Products(nn.Module):
        def forward(self, x):
            return x @ x.mT

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.products = nn.Conv2d(3, 3, 1, bias=False), Products()

        def forward(self, x):
            return self.products(self.conv(self.conv(x))) @ x

    result = nin.cost(Network(), (1, 3, 4, 5))
    # 3×3 channels at 20 pixels, twice; (4×5)·(5×4) and (4×4)·(4×5) in each of three channels
    assert [(layer.name, layer.macs) for layer in result.layers] == [
        ("conv", 180),
        ("conv", 180),
        ("products", 3 * 80),
        ("", 3 * 80),
    ]


@pytest.mark.parametrize("name", nin.models.MODELS)
def test_equals_the_flop_counter(name):
    model = nin.models.create(name, 10).eval()
    shape = (2, 1 if name == "nin_digits" else 3, 32, 32) if name != "nin_imagenet" else (1, 3, 99, 99)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(shape))
    assert 2 * nin.cost(model, shape).macs == counter.get_total_flops()


def test_equals_the_flop_counter_with_groups_and_without_nin():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1, stride=2))
    result = nin.cost(model, (3, 8, 9, 9))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(3, 8, 9, 9))
    assert 2 * result.macs == counter.get_total_flops()
    assert result.uncounted == ("1 BatchNorm2d",)
    assert "not counted: 1 BatchNorm2d" in str(result)
    assert result.fraction_1x1 == pytest.approx(16 * 25 / (16 * 25 + 9 * 81))


class Attention(nn.Module):
    """Products of activations, a module that has no formula, and an operator that nobody knows."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.never_run = nn.PReLU(8)

    def forward(self, x):
        tokens = x.flatten(2).mT
        mixed, _ = self.attention(tokens, tokens, tokens)
        boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]], dtype=x.dtype)
        return self.norm(mixed).mean() + torchvision.ops.roi_align(x, boxes, 2).mean()


def test_products_outside_layers_are_counted_and_what_has_no_formula_is_listed():
    result = nin.cost(Attention().double(), (2, 8, 4, 4))
    attention = next(layer for layer in result.layers if layer.module == "attention")
    projections, products = 16 * 8 * 24, 2 * 16 * 16 * 8  # the queries, keys and values; scores and their sums
    assert attention.macs == 2 * (projections + products + 16 * 8 * 8)
    assert (attention.kernel_size, attention.out_channels, attention.is_1x1) == ((0, 0), 0, False)
    assert result.uncounted == ("1 LayerNorm", "1 torchvision::roi_align")
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("name", "size"), [("torchvision:vit_b_16", 224), ("torchvision:shufflenet_v2_x0_5", 64), ("timm:levit_128s", 224)]
)
def test_equals_the_flop_counter_for_others(name, size):
    model = create_external_model(name).model.eval()
    shape = (1, 3, size, size)
    torch.backends.mha.set_fastpath_enabled(False)  # it has no formula
    try:
        # PyTorch 2.10 has no formula for the CPU's attention kernel; in plain matrix products all versions count it
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(shape))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert 2 * nin.cost(model, shape).macs == counter.get_total_flops()


def test_a_network_that_looks_at_values_is_computed():
    class Looking(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum() >= 0 else x

    assert nin.cost(Looking(2, 3, 1), (1, 2, 5, 5)).macs == 6 * 25


class Largest(TorchDispatchMode):
    """Keeps the number of values of the largest result that is no meta tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.count = max(self.count, tensor.numel())
        return result


def test_counting_copies_no_values_and_keeps_what_is_tied():
    tied = nn.Linear(1000, 1000, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 1000), tied, tied)
    model.append(nn.Linear(1000, 1000, bias=False))
    model[-1].weight = tied.weight
    with Largest() as largest:
        result = nin.cost(model, (1, 3, 8, 8))
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert [layer.macs for layer in result.layers][-3:] == [10**6] * 3
    assert largest.count < 1000
    copied = _copy_to_meta(model)
    assert copied[4] is copied[5]
    assert copied[4].weight is copied[6].weight
    assert {t.device.type for t in copied.state_dict().values()} == {"meta"}
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}


def test_measured_layers_have_times_and_bounds():
    told = []
    model = nn.Sequential(nin.MLPConv(3, (8, 6), kernel_size=3, padding=1), nn.Flatten(), nn.Linear(6 * 64, 5))
    result = nin.cost(model, (2, 3, 8, 8), measured=True, on_progress=lambda *done: told.append(done))
    assert told[-1][0] == told[-1][1] == len(told)
    measured = result.measured
    assert [layer.module for layer in measured.layers] == ["0", "2"]
    assert all(layer.timing.runs == measured.total.runs >= 5 for layer in measured.layers)
    rows = result.rows()
    assert (rows[0][-2:], rows[2][-2]) == (("ms", "at least"), "in above")
    assert not model[0]._forward_hooks
    if measured.peak_flops is None:
        assert measured.layers[0].bound_ms is None
        return
    moved = 4 * (2 * (6 * 64 + 5) + 5 * (6 * 64 + 1))
    seconds = {
        "memory": moved / measured.copy_bandwidth,
        "arithmetic": 2 * 2 * 5 * 6 * 64 / measured.peak_flops,
    }
    linear = measured.layers[1]
    assert linear.bound_ms == pytest.approx(1e3 * seconds[linear.bound_by]) == 1e3 * max(seconds.values())
    assert json.loads(json.dumps(result.to_dict()))["measured"]["threads"] == torch.get_num_threads()


def test_a_layer_that_runs_twice_is_timed_over_both_calls():
    layer = nn.Conv2d(4, 4, 1)
    result = nin.cost(nn.Sequential(layer, nn.ReLU(), layer), (1, 4, 6, 6), measured=True)
    assert len(result.layers) == 2
    assert len(result.measured.layers) == 1
    assert result.measured.layers[0].timing.runs == result.measured.total.runs


def test_the_parameters_are_the_whole_model_and_shared_ones_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.LayerNorm(4))
    assert nin.cost(model, (1, 3, 4, 4)).parameters == 16 + 4 + 4 + 8
    standardised = nin.MLPConv(3, (8, 6), kernel_size=3, normalisation="weight_standardisation")
    # of standardised filters those that answer: their gains are folded into them
    counted, folded = nin.cost(standardised, (1, 3, 8, 8)), copy.deepcopy(standardised).fold()
    assert counted.parameters == sum(p.numel() for p in folded.parameters())
    assert counted.parameters == sum(layer.parameters for layer in counted.layers)
    assert sum(p.numel() for p in standardised.parameters()) == counted.parameters + 8 + 6  # it is left as it is


def test_the_whole_may_be_timed_in_another_form():
    """As `nin predict` computes a narrowed run: fused, which hooks at its layers would end."""

    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            return x

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    measured = nin.cost(model, (1, 3, 8, 8), measured=True, whole=Slow()).measured
    assert measured.total.median_ms >= 20
    assert [layer.module for layer in measured.layers] == ["0", "2"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_is_left_as_it_was(dtype):
    model = nin.models.nin_digits().to(dtype).train()
    nin.cost(model, (1, 1, 8, 8))
    assert model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not any(m._forward_hooks for m in model.modules())


def test_to_dict_is_json_and_holds_the_totals():
    result = nin.cost(nin.models.nin_cifar(), (1, 3, 32, 32))
    values = json.loads(json.dumps(result.to_dict()))
    assert values["macs"] == sum(layer["macs"] for layer in values["layers"]) == 222_486_528
    assert values["parameters"] == 966_986


def test_the_table():
    result = nin.cost(nin.models.nin_cifar(), (1, 3, 32, 32))
    lines = str(result).splitlines()
    assert len(lines) == 11  # a header, nine convolutions, the totals
    assert " ".join(lines[1].split()) == "blocks.0.0.convs.0 5×5 3 → 192 192×32×32 14,592 14,745,600 6.6 786.4 kB"
    assert lines[-1].startswith("total")
    assert "966,986" in lines[-1]
    assert result._repr_html_().count("<tr>") == 11


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 0, 32)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match="input_shape must be"):
        nin.cost(nin.models.nin_cifar(), shape)
