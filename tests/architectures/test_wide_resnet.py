"""Wide residual networks: counted by hand, and the blocks against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.architectures import ARCHITECTURES, WideResNet
from zoo.architectures.wide_resnet import PreActivationBlock
from zoo.errors import InputError


def by_hand(depth: int, width: int, num_classes: int) -> int:
    """Weights of the 3x3 convolutions and 1x1 shortcuts, two numbers a channel for each batch norm, the classifier."""
    n = (depth - 4) // 6
    total, channels = 27 * 16, 16
    for out in (16 * width, 32 * width, 64 * width):
        total += 9 * channels * out + 9 * (2 * n - 1) * out * out
        total += 2 * channels + 2 * (2 * n - 1) * out
        total += channels * out if channels != out else 0
        channels = out
    return total + 2 * channels + channels * num_classes + num_classes


@pytest.mark.parametrize(("depth", "width"), [(16, 1), (16, 2), (40, 1), (40, 2)])
def test_sizes_by_hand(depth: int, width: int) -> None:
    with torch.device("meta"):
        network = ARCHITECTURES[f"wrn{depth}_{width}"](num_classes=100)
    assert sum(parameter.numel() for parameter in network.parameters()) == by_hand(depth, width, 100)


# Zagoruyko and Komodakis, table 4 (CIFAR): WRN-40-1 0.6, WRN-40-2 2.2, WRN-40-4 8.9, WRN-16-8 11.0, WRN-28-10 36.5 million.
@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (16, 8, 11.0), (28, 10, 36.5)]
)
def test_golden_sizes_of_the_paper(depth: int, width: int, millions: float) -> None:
    with torch.device("meta"):
        network = WideResNet(depth, width, num_classes=10)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["wrn16_1", "wrn16_2", "wrn40_1", "wrn40_2"])
def test_depth_is_the_number_of_layers_with_weights(name: str) -> None:
    """The paper counts the shortcuts of the three stages as well: depth - 4 = 6n layers in blocks, stem, 3 shortcuts."""
    with torch.device("meta"):
        network = ARCHITECTURES[name]()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 3 == int(name.removeprefix("wrn").partition("_")[0])


@pytest.mark.parametrize("stride", [1, 2])
def test_identity_block_is_the_formula(stride: int) -> None:
    """x + W2 relu(bn(W1 relu(bn(x)))); where the shape changes, the shortcut starts from relu(bn(x))."""
    channels = 4 * stride
    block = PreActivationBlock(4, channels, stride).eval()
    x = torch.randn(2, 4, 6, 6)
    # A fresh batch norm in eval mode divides by sqrt(1 + 1e-5).
    scale = (1 + 1e-5) ** -0.5
    active = F.relu(scale * x)
    middle = F.relu(scale * F.conv2d(active, block.conv1.weight, stride=stride, padding=1))
    branch = F.conv2d(middle, block.conv2.weight, padding=1)
    short = x if block.shortcut is None else F.conv2d(active, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), branch + short)
    assert (block.shortcut is None) == (stride == 1)


def test_initial_scale() -> None:
    """He initialisation, fan out: variance 2 / (9 · channels)."""
    weight = ARCHITECTURES["wrn16_2"]().layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("depth", [4, 0, -2, 9, 20])
def test_bad_depth(depth: int) -> None:
    with pytest.raises(InputError, match=rf"depth must be 6n \+ 4 with n of at least 1, got {depth}"):
        WideResNet(depth, 1)


def test_bad_width() -> None:
    with pytest.raises(InputError, match="width must be positive, got 0"):
        WideResNet(16, 0)
