"""The memory format in which a network computes fastest.

`torch.fx` cannot trace the condition on the device, so a module whose networks call `fastest_layout` asks for it to be
one node: ``torch.fx.wrap("fastest_layout")``, which holds for the calls by that name in the module that says it.
Narrowing and fusing trace networks.
"""

import torch
from torch import Tensor


def fastest_layout(x: Tensor) -> Tensor:
    """Return images in the layout in which a network computes fastest: on the CPU channels_last.

    In NCHW, PyTorch's max pooling takes 30 % (float32) to 46 % (bfloat16) of a network's time on the CPU, and
    the 1×1 layers are slower too; converting the images, of few channels, takes less than 1 %.
    """
    # an exported program may run on another device
    if x.device.type != "cpu" or x.dim() != 4 or torch.compiler.is_exporting():
        return x
    if torch._C._are_functorch_transforms_active():
        # vmap has no memory format, as its tensors have a dimension more; it can permute
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.to(memory_format=torch.channels_last)
