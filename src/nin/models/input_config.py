"""InputConfig: the images that a network of another package, or its published weights, were made for."""

import dataclasses
from typing import Any, get_args

from nin.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from nin.data.resizing import Interpolation, ResizeMode, ResizeOptions


@dataclasses.dataclass(frozen=True)
class InputConfig(Preprocessing):
    """What published weights were trained with, of a network of another package."""

    def with_channels(self, channels: int) -> "InputConfig":
        """Return the same for images of another number of channels, each with the mean over the channels."""
        if channels == self.channels:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return dataclasses.replace(self, channels=channels, mean=(mean,) * channels, std=(std,) * channels)

    @classmethod
    def from_timm(cls, cfg: Any) -> "InputConfig":
        """Return timm's configuration of weights, a ``PretrainedCfg`` or the dict of one."""
        values = cfg if isinstance(cfg, dict) else cfg.to_dict()
        channels, height, width = values.get("input_size", (3, 224, 224))
        mean, std = (tuple(map(float, values.get(key) or usual)) for key, usual in _IMAGENET.items())
        if len(mean) != channels:
            mean, std = mean[:1] * channels, std[:1] * channels
        # timm draws the filter at random in training only, and crops what "squash" and "border" do not distort
        resize = _resize_options(values.get("interpolation"), values.get("crop_pct"), values.get("crop_mode"))
        return cls(max(height, width), channels, mean, std, resize=resize)

    @classmethod
    def from_torchvision(cls, weights: Any) -> "InputConfig":
        """Return what torchvision's weights were trained with, of an enum of weights that may be empty."""
        try:
            preset = weights.DEFAULT.transforms()
            size = _first(preset.crop_size)
            resize = _resize_options(preset.interpolation.value, size / _first(preset.resize_size))
            mean, std = tuple(map(float, preset.mean)), tuple(map(float, preset.std))
        except AttributeError:  # no published weights, or those of a segmentation or detection network
            return cls()
        return cls(size, len(mean), mean, std, resize=resize)


_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _resize_options(interpolation: Any, crop_fraction: Any, mode: Any = None) -> ResizeOptions:
    """Return the options of a published network; a filter that nin lacks becomes the bicubic one."""
    chosen: Any = interpolation if interpolation in get_args(Interpolation) else "bicubic"
    modes: dict[Any, ResizeMode] = {"squash": "squash", "border": "letterbox"}
    return ResizeOptions(modes.get(mode, "crop"), chosen, min(1.0, float(crop_fraction or 1.0)))


def _first(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)
