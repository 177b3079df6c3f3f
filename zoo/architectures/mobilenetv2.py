"""MobileNetV2 for small images, at half width in the distillation literature.

Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, table 2. For
32x32 images the blocks of 24 channels keep the resolution, so that the strides multiply to 16 and not to 32; the other
strides, the expansion by 6 and the last 1280 channels are the paper's. From memory of the literature's network, and not
the paper's: ReLU and not ReLU6, the first block has a 1x1 convolution although it does not expand, and there is no dropout.
"""

from __future__ import annotations

from torch import Tensor, nn

from zoo.architectures.parts import check_counts, initialise_convolutions
from zoo.errors import InputError

__all__ = ["MobileNetV2"]

_LAST = 1280
# Each stage has one resolution: (expansion, channels at width 1, blocks, stride of the first block) of its rows.
_STAGES = (
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; around a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.conv1 = nn.Conv2d(in_channels, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(wide, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        projected: Tensor = self.bn3(self.conv3(out))
        return x + projected if self.has_shortcut else projected


class MobileNetV2(nn.Module):
    """MobileNetV2 for images of 16 to 64 pixels; the features have 1280 numbers.

    ``layer1`` … ``layer4`` have a half, a fourth, an eighth and a sixteenth of the resolution of the images.

    Args:
        width: factor of all channels but the last 1280, above 0 and at most 1.
        num_classes: size of the classifier ``fc``.
        in_chans: channels of the images.

    Raises:
        InputError: ``width`` is out of its range, or a count is not positive.

    Example:
        >>> MobileNetV2(0.5, num_classes=100).fc
        Linear(in_features=1280, out_features=100, bias=True)
    """

    def __init__(self, width: float, *, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        if not 1 / 16 <= width <= 1:
            raise InputError(f"width must be 1/16 … 1, so that every layer has a channel, got {width}")
        check_counts(num_classes=num_classes, in_chans=in_chans)
        stem = int(32 * width)
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu1 = nn.ReLU()
        stages, channels = [], stem
        for rows in _STAGES:
            blocks: list[nn.Module] = []
            for expansion, full, repeats, stride in rows:
                for repeat in range(repeats):
                    out = int(full * width)
                    blocks.append(InvertedResidual(channels, out, stride if repeat == 0 else 1, expansion))
                    channels = out
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.conv2 = nn.Conv2d(channels, _LAST, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_LAST)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_LAST, num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = self.relu2(self.bn2(self.conv2(out)))
        logits: Tensor = self.fc(self.avgpool(out).flatten(1))
        return logits
