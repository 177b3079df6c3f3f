"""Architectures that the papers use and that timm and torchvision do not have, by name in ``ARCHITECTURES``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from zoo.architectures.cifar_bottleneck import CifarBottleneckResNet
from zoo.architectures.cifar_resnet import CifarResNet
from zoo.architectures.encoders import Features, LogMelEncoder, text_transformer
from zoo.architectures.mobilenetv2 import MobileNetV2
from zoo.architectures.shufflenetv1 import ShuffleNetV1
from zoo.architectures.shufflenetv2 import ShuffleNetV2
from zoo.architectures.tiny_mmdit import TinyTextToImage
from zoo.architectures.wide_resnet import WideResNet

__all__ = [
    "ARCHITECTURES",
    "CifarBottleneckResNet",
    "CifarResNet",
    "Features",
    "LogMelEncoder",
    "MobileNetV2",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "TinyTextToImage",
    "WideResNet",
    "text_transformer",
]

_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)

# name -> builder(num_classes=…, in_chans=…) of a classifier, builder(output_dim=…) of an encoder, or builder(…) of a
# text-to-image backbone; a tower is called "zoo/<name>".
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, _WIDE) for depth in (8, 32)},
    **{f"wrn{depth}_{width}": partial(WideResNet, depth, width) for depth in (16, 40) for width in (1, 2)},
    "resnet50": partial(CifarBottleneckResNet, (3, 4, 6, 3)),
    "mobilenetv2_x0_5": partial(MobileNetV2, 0.5),
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    "text_transformer": text_transformer,
    "log_mel": LogMelEncoder,
    "features": Features,
    "tiny_text_to_image": TinyTextToImage,
}
