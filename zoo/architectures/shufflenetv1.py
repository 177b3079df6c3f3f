"""ShuffleNet (version 1) for small images, 3 groups.

Zhang, Zhou, Lin, Sun: ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, CVPR 2018, table
1 (240, 480 and 960 channels, 4, 8 and 4 blocks). For 32x32 images the 3x3 stem of stride 2 and the max pooling give way to
a 1x1 convolution that keeps the resolution, so that the last stage has 4x4 positions. From memory of the literature's
network, and not the paper's: a ReLU behind the depthwise convolution as well. Convolutions keep torch's initialisation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.architectures.parts import ChannelShuffle, check_counts

__all__ = ["ShuffleNetV1"]

_STEM = 24
_GROUPS = 3


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; added to its input, or beside its pooled input at stride 2.

    ``relu3`` is behind the sum or the concatenation and used for nothing else.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out = channels - in_channels if stride == 2 else channels
        middle = out // 4
        # Paper, section 3.2: the first 1x1 convolution behind the narrow stem is not grouped.
        groups = 1 if in_channels == _STEM else _GROUPS
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.relu1 = nn.ReLU()
        self.shuffle = ChannelShuffle(groups)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(middle, out, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / stride, W / stride)."""
        out = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        short = self.shortcut(x)
        active: Tensor = self.relu3(torch.cat([out, short], 1) if self.stride == 2 else out + short)
        return active


class ShuffleNetV1(nn.Module):
    """ShuffleNet with 3 groups for images of 8 to 64 pixels; the features have 960 numbers.

    Args:
        num_classes: size of the classifier ``fc``.
        in_chans: channels of the images.

    Raises:
        InputError: a count is not positive.

    Example:
        >>> ShuffleNetV1(num_classes=100).fc
        Linear(in_features=960, out_features=100, bias=True)
    """

    def __init__(self, *, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_chans=in_chans)
        self.conv1 = nn.Conv2d(in_chans, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(_STEM, 240, 4)
        self.layer2 = self._stage(240, 480, 8)
        self.layer3 = self._stage(480, 960, 4)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(960, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        first = ShuffleUnit(in_channels, channels, 2)
        return nn.Sequential(first, *(ShuffleUnit(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(self.avgpool(out).flatten(1))
        return logits
