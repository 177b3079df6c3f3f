"""The residual networks for small images: ResNet-8 … ResNet-110 and the 4x wide ones of the distillation papers.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2 (depth 6n + 2, three stages).
The widths of ``resnet8x4`` and ``resnet32x4`` are those of the distillation literature: stem 32, stages 64, 128, 256.
Shortcuts that change the shape are 1x1 convolutions with batch norm, as in the distillation literature and not the
zero-padded identities of the original, so parameter counts differ from the 2016 paper by a few thousand.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError

__all__ = ["CifarResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # Modules, so that hooks can reach the map in front of them.
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        activated: Tensor = self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))
        return activated


class CifarResNet(nn.Module):
    """A residual network of depth 6n + 2 for images of 8 to 64 pixels.

    Args:
        depth: 6n + 2 layers, for example 8, 20, 56.
        widths: channels of the stem and of the three stages.
        num_classes: size of the classifier ``fc``.
        in_chans: channels of the images.

    Raises:
        InputError: ``depth`` is not 6n + 2, or a count is not positive.
    """

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], *, num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"depth must be 6n + 2 with n of at least 1, got {depth}")
        if num_classes < 1 or in_chans < 1:
            raise InputError(f"num_classes and in_chans must be positive, got {num_classes} and {in_chans}")
        stem, *stages = widths
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(stem, stages[0], blocks, 1)
        self.layer2 = self._stage(stages[0], stages[1], blocks, 2)
        self.layer3 = self._stage(stages[1], stages[2], blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(self.avgpool(out).flatten(1))
        return logits
