"""ResNet-50 for small images: the ImageNet network behind a 3x3 stem that keeps the resolution.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, table 1 (bottlenecks, four stages). The 7x7
stem of stride 2 and the max pooling are left out, so that 32x32 images reach the last stage with 4x4 positions, as in the
distillation literature. The stride of a block is that of its 3x3 convolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from zoo.architectures.parts import check_counts, initialise_convolutions
from zoo.errors import InputError

__all__ = ["CifarBottleneckResNet"]

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut; X for nothing else."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = _EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != wide:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 4 * channels, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + self.shortcut(x)
        active: Tensor = self.relu3(out)
        return active


class CifarBottleneckResNet(nn.Module):
    """A residual network of bottlenecks for images of 8 to 64 pixels; the features have 2048 numbers.

    Args:
        blocks: number of blocks in each of the four stages; (3, 4, 6, 3) is ResNet-50.
        num_classes: size of the classifier ``fc``.
        in_chans: channels of the images.

    Raises:
        InputError: a count is not positive.

    Example:
        >>> CifarBottleneckResNet((1, 1, 1, 1), num_classes=100).fc
        Linear(in_features=2048, out_features=100, bias=True)
    """

    def __init__(self, blocks: tuple[int, int, int, int], *, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        if min(blocks) < 1:
            raise InputError(f"blocks must be positive in every stage, got {blocks}")
        check_counts(num_classes=num_classes, in_chans=in_chans)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(64, 64, blocks[0], 1)
        self.layer2 = self._stage(256, 128, blocks[1], 2)
        self.layer3 = self._stage(512, 256, blocks[2], 2)
        self.layer4 = self._stage(1024, 512, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)
        initialise_convolutions(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Bottleneck(in_channels, channels, stride)
        return nn.Sequential(first, *(Bottleneck(_EXPANSION * channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(self.avgpool(out).flatten(1))
        return logits
