"""ShuffleNetV2 for small images, size 1.

Ma, Zhang, Zheng, Sun: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018, table 5 (116,
232, 464 and 1024 channels, 4, 8 and 4 blocks). For 32x32 images the 3x3 stem of stride 2 and the max pooling give way to a
1x1 convolution that keeps the resolution, so that the last stage has 4x4 positions, as in the distillation literature (from
memory). Convolutions keep torch's initialisation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.architectures.parts import ChannelShuffle, check_counts

__all__ = ["ShuffleNetV2"]

_STEM = 24
_LAST = 1024


def _branch(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """1x1, 3x3 depthwise, 1x1 convolution; ReLU behind the 1x1 ones."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        *_depthwise(channels, channels, stride),
    )


def _depthwise(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """3x3 depthwise and 1x1 convolution."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class SplitUnit(nn.Module):
    """Half of the channels go through a branch, the other half beside it; then the channels are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, 1)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        beside, through = x.chunk(2, 1)
        out: Tensor = self.shuffle(torch.cat([beside, self.branch(through)], 1))
        return out


class DownUnit(nn.Module):
    """Two branches of stride 2 over all channels, side by side; then the channels are shuffled."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.short = _depthwise(in_channels, channels // 2, 2)
        self.branch = _branch(in_channels, channels // 2, 2)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / 2, W / 2)."""
        out: Tensor = self.shuffle(torch.cat([self.short(x), self.branch(x)], 1))
        return out


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 of size 1 for images of 8 to 64 pixels; the features have 1024 numbers.

    Args:
        num_classes: size of the classifier ``fc``.
        in_chans: channels of the images.

    Raises:
        InputError: a count is not positive.

    Example:
        >>> ShuffleNetV2(num_classes=100).fc
        Linear(in_features=1024, out_features=100, bias=True)
    """

    def __init__(self, *, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_chans=in_chans)
        self.conv1 = nn.Conv2d(in_chans, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu1 = nn.ReLU()
        self.layer1 = self._stage(_STEM, 116, 4)
        self.layer2 = self._stage(116, 232, 8)
        self.layer3 = self._stage(232, 464, 4)
        self.conv2 = nn.Conv2d(464, _LAST, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_LAST)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_LAST, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(DownUnit(in_channels, channels), *(SplitUnit(channels) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = self.relu2(self.bn2(self.conv2(out)))
        logits: Tensor = self.fc(self.avgpool(out).flatten(1))
        return logits
