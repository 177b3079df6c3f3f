"""Wide residual networks for small images: WRN-d-k, pre-activation blocks.

Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016, arXiv 1605.07146, table 1 (depth d = 6n + 4, stages of 16k, 32k
and 64k channels), without dropout. A stage ends in the bare sum of its last block; the batch norm and the ReLU behind it
are the first of the next stage or, at the end, ``bn1`` and ``relu``. The stem and the shortcuts that change the shape are
convolutions without batch norm; such a shortcut starts from the activated input, as in the distillation literature.
"""

from __future__ import annotations

from torch import Tensor, nn

from zoo.architectures.parts import check_counts, initialise_convolutions
from zoo.errors import InputError

__all__ = ["WideResNet"]


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice, around a shortcut; nothing behind the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / stride, W / stride)."""
        active = self.relu1(self.bn1(x))
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """A wide residual network of depth 6n + 4 for images of 8 to 64 pixels.

    Args:
        depth: 6n + 4 layers, for example 16, 40; shortcuts do not count.
        width: factor k of the channels of the three stages; the stem has 16.
        num_classes: size of the classifier ``fc``.
        in_chans: channels of the images.

    Raises:
        InputError: ``depth`` is not 6n + 4, or a count is not positive.

    Example:
        >>> WideResNet(16, 2, num_classes=100).fc
        Linear(in_features=128, out_features=100, bias=True)
    """

    def __init__(self, depth: int, width: int, *, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"depth must be 6n + 4 with n of at least 1, got {depth}")
        if width < 1:
            raise InputError(f"width must be positive, got {width}")
        check_counts(num_classes=num_classes, in_chans=in_chans)
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.layer1 = self._stage(16, 16 * width, blocks, 1)
        self.layer2 = self._stage(16 * width, 32 * width, blocks, 2)
        self.layer3 = self._stage(32 * width, 64 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        initialise_convolutions(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = PreActivationBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(self.avgpool(self.relu(self.bn1(out))).flatten(1))
        return logits
