"""Architectures that the papers use and that timm and torchvision do not have, by name in ``ARCHITECTURES``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from zoo.architectures.cifar_resnet import CifarResNet

__all__ = ["ARCHITECTURES", "CifarResNet"]

_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)

# name -> builder(num_classes=…, in_chans=…); a tower is called "zoo/<name>".
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, _WIDE) for depth in (8, 32)},
}
