"""What tells in one native call that Python's and PyTorch's objects are what they were."""

import pytest
import torch
from torch import nn

from nin.ops.cpu import object_memory
from nin.ops.cpu.object_memory import watch_modules, watch_tensors

pytestmark = pytest.mark.skipif(object_memory._layout() is None, reason="no layout of the objects is known")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4, 1, 1))
        self.register_buffer("mean", torch.ones(4))
        self.mode, self.inside = "a", nn.Identity()


def _watched(layer):
    tensors = watch_tensors((layer.weight, layer.mean), (layer.weight, layer.mean))
    dicts = vars(layer), layer._parameters, layer._buffers, layer._modules
    modules = watch_modules((layer,), dicts)
    return [memory for memory in (tensors, modules) if memory is not None]


@torch.no_grad()
def test_reading_changes_nothing():
    layer = Layer()
    memories = _watched(layer)
    for _ in range(3):
        layer.weight.sum(), layer.weight.detach().view(4, 4), layer.state_dict(), list(layer.modules())
        layer.mean.mul(2), layer.weight.grad, repr(layer), layer.weight.numpy()
        assert all(memory.is_unchanged() for memory in memories)


TENSOR_CHANGES = {
    "in place": lambda m: m.mean.add_(1),
    "through a view": lambda m: m.weight[0].zero_(),
    "loaded": lambda m: m.load_state_dict(Layer().state_dict()),
    "other memory": lambda m: setattr(m.weight, "data", torch.ones(4, 4, 1, 1)),
    "other strides": lambda m: setattr(m.weight, "data", m.weight.data.transpose(0, 1)),
    "another shape": lambda m: setattr(m.mean, "data", m.mean.data.view(2, 2)),
    "a part": lambda m: setattr(m.mean, "data", m.mean.data[1:]),
    "another dtype": lambda m: m.double(),
    "shared": lambda m: m.share_memory(),
    "gradients": lambda m: m.requires_grad_(False),
    "gradients of a buffer": lambda m: m.mean.requires_grad_(),
    "swapped": lambda m: torch.utils.swap_tensors(m.mean, torch.ones(4)),
    "resized": lambda m: m.mean.resize_(1 << 16),
}
MODULE_CHANGES = {
    "an attribute": lambda m: setattr(m, "mode", "b"),
    "a new attribute": lambda m: setattr(m, "new", 1),
    "none any more": lambda m: delattr(m, "mode"),
    "past setattr": lambda m: vars(m).update(mode="b"),
    "training": lambda m: m.eval(),
    "a module": lambda m: setattr(m, "inside", nn.ReLU()),
    "a module past setattr": lambda m: m._modules.update(inside=nn.ReLU()),
    "a parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(4, 4, 1, 1))),
    "a buffer": lambda m: m.register_buffer("mean", torch.ones(4)),
    "no buffer": lambda m: m._buffers.clear(),
    "parametrised": lambda m: nn.utils.parametrizations.weight_norm(m),
    "a class": lambda m: setattr(m, "__class__", type("Other", (Layer,), {})),
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_changes_of_tensors_are_seen(change):
    layer = Layer()
    tensors = watch_tensors((layer.weight, layer.mean), (layer.weight, layer.mean))
    with torch.no_grad():
        TENSOR_CHANGES[change](layer)
    assert not tensors.is_unchanged()


@pytest.mark.parametrize("change", MODULE_CHANGES)
def test_changes_of_modules_are_seen(change):
    layer = Layer()
    modules = watch_modules((layer,), (vars(layer), layer._parameters, layer._buffers, layer._modules))
    if modules is None:
        pytest.skip("dicts have no word that tells their changes")
    MODULE_CHANGES[change](layer)
    assert not modules.is_unchanged()


def test_the_layout_is_found_whatever_lay_in_the_memory_before():
    tensors = [torch.full((i % 9 + 1,), -1.0) for i in range(200)]
    for _ in range(40):
        del tensors[::7]
        assert object_memory._find_layout() == object_memory._layout()


def test_without_a_layout_nothing_is_watched(monkeypatch):
    monkeypatch.setattr(object_memory, "_layout", lambda: None)
    layer = Layer()
    assert watch_tensors((layer.weight,)) is None
    assert watch_modules((layer,), (vars(layer),)) is None


def test_a_layout_that_misses_a_change_is_not_used(monkeypatch):
    monkeypatch.setattr(object_memory, "_TENSOR_CHANGES", (lambda m: None,))
    assert object_memory._layout.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setattr(object_memory, "_MODULE_CHANGES", (lambda m: None,))
    assert object_memory._layout.__wrapped__().tag is None


def test_no_tensors_and_no_modules_are_unchanged():
    """A network whose layers all run as they are makes nothing of its weights."""
    for memory in (watch_tensors([]), watch_modules([], [])):
        assert memory.is_unchanged()
