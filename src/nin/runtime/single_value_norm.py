"""Normalisation over a batch where it is a single value for each channel: by the running statistics."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


@contextlib.contextmanager
def normalise_single_values(model: nn.Module) -> Iterator[None]:
    """Let normalisation layers in training mode take their running statistics where a channel has a single value.

    One value has no variance, so PyTorch refuses it: a batch of one image under a BatchNorm behind global pooling, such
    as the 65th image with batches of 64, or an InstanceNorm over one pixel. Within the block such a call computes as in
    evaluation, by the statistics of the batches before, which it leaves as they are; scale, shift and all other layers
    learn from it. Every image is trained on, and what is computed depends on the batch alone, so an interrupted
    training resumes to the same numbers. Layers without running statistics refuse as before.

    Args:
        model: whose layers get hooks for the time of the block.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm | _InstanceNorm) and m.track_running_stats]
    with contextlib.ExitStack() as handles:
        for layer in layers:
            if not isinstance(layer, nn.SyncBatchNorm):  # it has the values of all processes
                handles.enter_context(layer.register_forward_pre_hook(_leave_training, with_kwargs=True))
                handles.enter_context(layer.register_forward_hook(_enter_training, always_call=True))
        yield


def _leave_training(layer: _BatchNorm | _InstanceNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs.get("input")
    if not layer.training or not isinstance(x, Tensor):
        return
    if isinstance(layer, _BatchNorm):
        values = x.numel() // layer.num_features
    else:  # normalises each image alone
        values = x[0].numel() // (1 if x.dim() == layer._get_no_batch_dim() else layer.num_features)
    if values == 1:
        layer.training, layer.__dict__["_left_training"] = False, True


def _enter_training(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if layer.__dict__.pop("_left_training", False):
        layer.training = True
