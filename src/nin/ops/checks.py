"""Checks of what a person gives to an operator, which name the argument, what was expected and what was got."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Pair = int | tuple[int, int]

_DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def want_gradients(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    """Return (height, width) of an option that is one number or two."""
    both = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2 or not (_is_count(both[0], least) and _is_count(both[1], least)):
        raise ValueError(f"{name} must be a whole number of at least {least}, or two of them, got {value!r}")
    return both


def _is_count(value: object, least: int) -> bool:
    # the usual type first, as this is asked six times in each call
    return (type(value) is int or (isinstance(value, int) and not isinstance(value, bool))) and value >= least


def no_list(**given: object) -> TypeError:
    """Return the error for lists of tensors, one for each layer, of which one cannot be gone through."""
    is_list = {name: isinstance(value, Iterable) and not isinstance(value, Tensor) for name, value in given.items()}
    name = min(is_list, key=is_list.__getitem__)
    each = "one for each layer, each a tensor or None" if name == "biases" else "one tensor for each layer"
    return TypeError(f"{name} must be a list or tuple, {each}, got {type(given[name]).__name__}")


def check_images(x: Tensor) -> None:
    """Raise unless ``x`` holds images of a dtype that the operators take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.is_nested:
        raise ValueError(
            "x must be one tensor, got a nested one: torch.nested.to_padded_tensor(x, 0.0) pads the images"
        )
    if x.dim() != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must have a floating dtype of 16 bits or more, got {x.dtype}")


def check_reach(x: Tensor, kernel_size: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    """Raise unless the padded images are as large as what the kernel's taps reach over."""
    size = x.shape[2:]
    for d, side in enumerate(("height", "width")):
        reach = dilation[d] * (kernel_size[d] - 1) + 1
        if size[d] + 2 * padding[d] < reach:
            raise ValueError(
                f"x must have a padded {side} of at least {reach} (the kernel's reach), "
                f"got {size[d]} with padding {padding[d]}: x has shape {tuple(x.shape)}"
            )


def check_like(name: str, t: Tensor, x: Tensor) -> None:
    """Raise unless ``t`` is a tensor of the dtype and on the device of the images."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.is_nested:
        raise ValueError(f"{name} must be one tensor, got a nested one")
    # autocast casts all of them to one dtype
    if t.device != x.device or (t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"{name} must be {x.dtype} on {x.device} as x is, got {t.dtype} on {t.device}")
