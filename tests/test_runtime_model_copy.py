"""Copies of models, of those too that PyTorch's deepcopy refuses."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import nin
from nin.errors import UserError
from nin.runtime.model_copy import copy_model


def network():
    torch.manual_seed(0)
    convs = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 24, 3), nn.Conv2d(24, 4, 1)
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


COMPUTED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 30),
    "pruned twice": lambda layer: [prune.random_unstructured(layer, "weight", 0.2) for _ in range(2)],
    "pruned by channels": lambda layer: prune.ln_structured(layer, "weight", 0.25, n=2, dim=0),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 2),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")


def computed(name):
    model = network()
    COMPUTED[name](model[2])
    x = torch.randn(16, 8, 8, 8)
    model(x)  # the layer keeps a weight that was computed with gradients
    return model.eval(), x


@pytest.mark.parametrize("name", COMPUTED)
def test_layers_with_computed_weights_are_copied(name):
    model, x = computed(name)
    new = copy_model(model)
    torch.testing.assert_close(new(x), model(x))
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in new.state_dict().values()}
    new(x).sum().backward()
    assert all(p.grad is not None for p in new.parameters())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for p in new.parameters():  # the copy's weight follows its own parameters
            p.mul_(2)
    assert not torch.allclose(new(x), model(x))


@pytest.mark.parametrize("name", COMPUTED)
def test_the_verbs_take_them(name, tmp_path):
    model, x = computed(name)
    wanted = model(x)
    torch.testing.assert_close(nin.fuse(model).model(x), wanted, rtol=1e-4, atol=1e-5)
    layers = nin.cost(network(), (1, 8, 8, 8)).layers
    counted = {layer.name: layer.macs for layer in nin.cost(model, (1, 8, 8, 8)).layers}
    assert all(counted[layer.name] >= layer.macs for layer in layers)  # and what computes the weight
    nin.export(model, tmp_path / "model.pt2", input_shape=(8, 8, 8))
    exported = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(exported.module()(x), wanted, rtol=1e-4, atol=1e-5)
    assert len(exported.state_dict) == len(network().state_dict())
    narrowed = nin.narrow(model, [x], macs=0.8)
    assert narrowed.report.macs[1] < narrowed.report.macs[0]
    again = nin.apply_plan(model, narrowed.plan)
    again.load_state_dict(narrowed.model.state_dict())
    torch.testing.assert_close(again.eval()(x), narrowed.model(x))


def test_tensors_in_lists_and_dicts_are_copied():
    model = network()
    model.cache = {"a": [torch.ones(2, requires_grad=True) * 3]}
    new = copy_model(model)
    assert new.cache["a"][0].tolist() == [3, 3]
    assert new.cache["a"][0] is not model.cache["a"][0]


def test_shared_tensors_take_their_place():
    model = network()
    new = copy_model(model, {id(p): p for p in model.parameters()})
    assert all(a is b for a, b in zip(new.parameters(), model.parameters(), strict=True))


def test_the_copy_of_a_fused_model_is_plain():
    model = network().eval()
    fused = nin.fuse(model).model
    assert [type(m) for m in copy_model(fused).modules()] == [type(m) for m in model.modules()]


def test_what_cannot_be_copied_is_one_line():
    model = network()
    model.lock = threading.Lock()
    with pytest.raises(UserError, match=r"copy\.deepcopy copies, got Sequential, .* cannot pickle '_thread.lock'"):
        nin.fuse(model)


def test_memory_that_runs_out_is_no_fault_of_the_model():
    class Large(nn.Module):
        def __deepcopy__(self, memo):
            raise MemoryError

    with pytest.raises(MemoryError):
        copy_model(Large())
