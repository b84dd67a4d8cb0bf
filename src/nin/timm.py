"""The networks in timm: ``import nin.timm``, then ``timm.create_model("nin_cifar")``.

Importing this module imports timm and registers the networks; importing nin does neither. They are the networks of
`nin.models` with the same names in their ``state_dict``: a run folder's ``model.safetensors`` is a checkpoint of them.
"""

import dataclasses
from typing import Any, cast

import torch.fx
from torch import Tensor, nn

from nin import models
from nin.layers import MLPConv
from nin.models.memory_format import fastest_layout
from nin.ops import conv1x1
from nin.version import install_command

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"nin.timm needs {error.name}: {install_command('timm')}", name=error.name) from error

POOLS = ("avg", "")

torch.fx.wrap("fastest_layout")  # tracing sees one call, see `nin.models.memory_format`


def _cfg(size: int, **values: Any) -> dict[str, Any]:
    """Return timm's default configuration of a network, without pretrained weights.

    What is not here is as timm's `PretrainedCfg` has it: 1,000 classes, bicubic, mean and std of ImageNet.
    """
    cfg = {
        "url": "",
        "input_size": (3, size, size),
        "crop_pct": 0.875 if size > 32 else 1.0,
        "first_conv": "blocks.0.0.convs.0",
        "license": "apache-2.0",
        "origin_url": "https://arxiv.org/abs/1312.4400",
        "paper_ids": "arXiv:1312.4400",
        "paper_name": "Network in Network",
    }
    return {**cfg, **values}


CIFAR_CFG = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)}  # of CIFAR-10's training images
DIGITS_CFG = {"mean": (0.305,), "std": (0.376,), "input_size": (1, 8, 8)}
GOOGLENET_CFG = {
    "first_conv": "stem.0.convs.0",
    "origin_url": "https://arxiv.org/abs/1409.4842",
    "paper_ids": "arXiv:1409.4842",
    "paper_name": "Going Deeper with Convolutions",
}

default_cfgs = generate_default_cfgs(
    {
        "nin_digits.untrained": _cfg(8, num_classes=10, classifier="blocks.1.0.convs.2", **DIGITS_CFG),
        "nin_cifar.untrained": _cfg(32, num_classes=10, classifier="blocks.2.0.convs.2", **CIFAR_CFG),
        "nin_imagenet.untrained": _cfg(224, classifier="blocks.3.0.convs.2"),
        "nin_googlenet.untrained": _cfg(224, classifier="classifier", **GOOGLENET_CFG),
    }
)


class TimmNiN(models.NiN):
    """`nin.models.NiN` with timm's interface: the classifier is the last 1×1 convolution, its input the features.

    Args:
        architecture: a name of `nin.models.MODELS`.
        num_classes: 0 for a network without a classifier.
        in_chans: channels of the images.
        global_pool: "avg", or "" for maps that are not pooled.
        drop_rate: of the network's dropouts; the network's own if not given.
        options: other fields of `nin.models.NiNConfig`.
    """

    def __init__(
        self,
        architecture: str,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float | None = None,
        **options: Any,
    ) -> None:
        with torch.device("meta"):  # only its configuration is needed
            plain = cast(models.NiN, models.create(architecture, max(1, num_classes), in_channels=in_chans, **options))
        config = plain.config
        if drop_rate is not None:
            blocks = tuple(dataclasses.replace(b, dropout=drop_rate if b.dropout else 0.0) for b in config.blocks)
            config = dataclasses.replace(config, blocks=blocks)
        super().__init__(config)
        self.num_classes = config.num_classes
        self.num_features = self.head_hidden_size = config.blocks[-1].channels[-2]
        self.global_pool = _checked_pool(global_pool)
        self.feature_info = self._feature_info()
        if num_classes == 0:
            self.reset_classifier(0)

    def _feature_info(self) -> list[dict[str, Any]]:
        reduction, info = 1, []
        for i, block in enumerate(self.config.blocks):
            reduction *= block.stride * (2 if block.pool else 1)
            channels = block.channels[-1] if i + 1 < len(self.config.blocks) else self.num_features
            info.append({"num_chs": channels, "reduction": reduction, "module": f"blocks.{i}"})
        return info

    @property
    def _last_mlpconv(self) -> MLPConv:
        return cast(MLPConv, cast(nn.Sequential, self.blocks[-1])[0])

    def get_classifier(self) -> nn.Module:
        """Return the last 1×1 convolution, or an identity where there is none."""
        return self._last_mlpconv.convs[-1] if self.num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for other classes; 0 leaves it out, so that features come out."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        last, block = self._last_mlpconv, self.config.blocks[-1]
        if self.num_classes:
            del last.convs[-1], last.activations[-1]
        if num_classes:
            activation = self.config.last_activation
            weight = next(self.parameters())
            new = MLPConv(self.num_features, (num_classes,), activation=activation).convs[0]
            last.convs.append(new.to(weight.device, weight.dtype))
            last.activations.append(activation)
            block = dataclasses.replace(block, channels=(*block.channels[:-1], num_classes))
            blocks = (*self.config.blocks[:-1], block)
            self.config = dataclasses.replace(self.config, blocks=blocks, num_classes=num_classes)
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the classifier's input, (N, num_features, h, w)."""
        x = fastest_layout(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self._last_mlpconv.hidden(x) if self.num_classes else self._last_mlpconv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return scores (N, num_classes) for features; with ``pre_logits``, the pooled features."""
        if self.num_classes and not pre_logits:
            conv, activation = cast(nn.Conv2d, self._last_mlpconv.convs[-1]), self._last_mlpconv.activations[-1]
            x = conv1x1(x, conv.weight, conv.bias, activation=activation)
        return self.head(x) if self.global_pool else x

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, num_classes) for images (N, in_chans, H, W): the chain with the classifier as one op."""
        maps = self.maps(x)
        return self.head(maps) if self.global_pool else maps

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters' depth, for timm's layer-wise learning rate decay."""
        return {"stem": r"^blocks\.0", "blocks": r"^blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse: a 1×1 chain recomputes its hidden layers in the backward pass anyway."""
        assert not enable, "gradient checkpointing not supported"


class TimmGoogLeNet(models.GoogLeNet):
    """`nin.models.GoogLeNet` with timm's interface; the arguments are those of `TimmNiN`."""

    def __init__(
        self, *, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.4
    ) -> None:
        super().__init__(max(1, num_classes), in_channels=in_chans, dropout=drop_rate)
        self.num_features = self.head_hidden_size = 1024
        stages = ((64, 2, "stem.0"), (192, 4, "stem.3"), (480, 8, "inceptions.1"), (832, 16, "inceptions.7"))
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": module}
            for channels, reduction, module in (*stages, (1024, 32, "inceptions.10"))
        ]
        self.global_pool = _checked_pool(global_pool)
        if num_classes == 0:
            self.reset_classifier(0)

    def get_classifier(self) -> nn.Module:
        """Return the fully connected layer, or an identity where there is none."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for other classes; 0 leaves it out, so that features come out."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        weight = next(self.parameters())
        new = nn.Linear(1024, num_classes, device=weight.device, dtype=weight.dtype) if num_classes else nn.Identity()
        self.classifier = cast(nn.Linear, new)
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the maps before the global average pooling, (N, 1024, h, w)."""
        return self.inceptions(self.stem(fastest_layout(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return scores (N, num_classes) for features; with ``pre_logits``, the pooled features."""
        if not self.global_pool:
            return x
        x = self.dropout(self.pool(x))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, num_classes) for images (N, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters' depth, for timm's layer-wise learning rate decay."""
        return {"stem": r"^stem", "blocks": r"^inceptions\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse: a 1×1 chain recomputes its hidden layers in the backward pass anyway."""
        assert not enable, "gradient checkpointing not supported"


def _checked_pool(global_pool: str) -> str:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be one of {POOLS}, got {global_pool!r}")
    return global_pool


def _create_model(cls: type[nn.Module], variant: str, pretrained: bool, stages: int, **options: Any) -> nn.Module:
    features = {"feature_cls": "hook", "out_indices": tuple(range(stages))}
    model: nn.Module = build_model_with_cfg(cls, variant, pretrained, feature_cfg=features, **options)
    return model


@register_model
def nin_digits(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return a small NiN for 8×8 images; see `nin.models.nin_digits`."""
    return _create_model(TimmNiN, "nin_digits", pretrained, 2, architecture="nin_digits", **options)


@register_model
def nin_cifar(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return the paper's network for 32×32 images; see `nin.models.nin_cifar`."""
    return _create_model(TimmNiN, "nin_cifar", pretrained, 3, architecture="nin_cifar", **options)


@register_model
def nin_imagenet(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return the authors' network for 224×224 images; see `nin.models.nin_imagenet`."""
    return _create_model(TimmNiN, "nin_imagenet", pretrained, 4, architecture="nin_imagenet", **options)


@register_model
def nin_googlenet(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return GoogLeNet; see `nin.models.googlenet`."""
    return _create_model(TimmGoogLeNet, "nin_googlenet", pretrained, 5, **options)
