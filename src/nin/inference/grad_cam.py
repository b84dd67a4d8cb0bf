"""Grad-CAM, by the package grad-cam: an approximation of class maps for networks whose head allows no exact ones."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from nin.errors import UserError
from nin.version import install_command


def grad_cam(model: nn.Module, x: Tensor, labels: list[int]) -> Tensor:
    """Return where in each image the evidence for a class lies, approximately: (N, H, W), from 0 to 1.

    ``relu(sum over k of w_k A_k)``, where A are the last feature maps and w_k is the mean gradient of the class's score
    by A_k. It is no decomposition of the score, as exact class maps are, shows nothing that speaks against the class,
    and is scaled to 1 in each image.

    Args:
        model: scores (N, classes) from images (N, C, H, W), in evaluation mode.
        x: images, as the network takes them.
        labels: of the class for each image.

    Raises:
        UserError: the package is missing, or the network has no feature maps at its end.

    Source:
        Selvaraju et al.: Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, 2017,
        arXiv 1610.02391.
    """
    library, targets = import_grad_cam()
    layer = last_feature_layer(model, x[:1])
    with torch.enable_grad(), library.GradCAM(model=model, target_layers=[layer]) as cam:
        values = cam(
            input_tensor=x.detach().clone().requires_grad_(),  # the weights may be frozen
            targets=[targets.ClassifierOutputTarget(label) for label in labels],
        )
    model.zero_grad()
    return torch.from_numpy(values).float()


def import_grad_cam() -> tuple[Any, Any]:
    """Return the package grad-cam and its module of targets.

    Raises:
        UserError: it is missing.
    """
    try:
        names = ("pytorch_grad_cam", "pytorch_grad_cam.utils.model_targets")
        return importlib.import_module(names[0]), importlib.import_module(names[1])
    except ImportError as error:
        raise UserError(
            f"maps of this network are approximated by Grad-CAM, which needs: {install_command('gradcam')}"
        ) from error


@torch.no_grad()
def last_feature_layer(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the module whose output are the last feature maps of more than one pixel.

    Args:
        model: in evaluation mode.
        x: one image.

    Raises:
        UserError: there are none, or the network works on tokens after them.
    """
    outputs: list[tuple[nn.Module, int]] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            is_pixel = output.dim() == 4 and output.shape[2] * output.shape[3] == 1  # pooled: nothing is left to show
            outputs.append((module, 2 if is_pixel else output.dim()))

    hooks = [module.register_forward_hook(record) for module in model.modules() if module is not model]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    maps = [number for number, (_, dims) in enumerate(outputs) if dims == 4]
    if not maps or any(dims == 3 for _, dims in outputs[maps[-1] :]):
        raise UserError("maps cannot be approximated by Grad-CAM: the network ends in no feature maps (N, C, h, w)")
    return outputs[maps[-1]][0]
