"""MobileNetV2 for small images: blocks against the formula, widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.architectures import MobileNetV2
from zoo.architectures.mobilenetv2 import InvertedResidual
from zoo.errors import InputError


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (6, 1), (4, 2)])
def test_identity_block_is_the_formula(channels: int, stride: int) -> None:
    """Expand, filter each channel, project without activation; the input is added where the shape stays."""
    block = InvertedResidual(4, channels, stride, 6).eval()
    x = torch.randn(2, 4, 6, 6)
    scale = (1 + 1e-5) ** -0.5  # a fresh batch norm in eval mode
    out = F.relu(scale * F.conv2d(x, block.conv1.weight))
    out = F.relu(scale * F.conv2d(out, block.conv2.weight, stride=stride, padding=1, groups=24))
    out = scale * F.conv2d(out, block.conv3.weight)
    torch.testing.assert_close(block(x), x + out if (channels, stride) == (4, 1) else out)


def test_table_of_the_paper() -> None:
    """Sandler et al., table 2, at width 1: channels and blocks of the rows, strides but for the second row."""
    with torch.device("meta"):
        network = MobileNetV2(1.0)
    blocks = [m for m in network.modules() if isinstance(m, InvertedResidual)]
    rows = [(16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)]
    expected = [(c, s if i == 0 else 1) for c, n, s in rows for i in range(n)]
    assert [(block.conv3.out_channels, block.conv2.stride[0]) for block in blocks] == expected
    expansions = [block.conv1.out_channels // block.conv1.in_channels for block in blocks]
    assert expansions == [1] + [6] * 16
    assert (network.conv1.out_channels, network.conv2.out_channels) == (32, 1280)


def test_half_width_halves_all_but_the_last_channels() -> None:
    with torch.device("meta"):
        full, half = MobileNetV2(1.0), MobileNetV2(0.5)
    pairs = zip(full.modules(), half.modules(), strict=True)
    widths = [(a.out_channels, b.out_channels) for a, b in pairs if isinstance(a, nn.Conv2d)]
    assert widths.pop() == (1280, 1280)
    assert all(a == 2 * b for a, b in widths)


@pytest.mark.parametrize("width", [0, -1.0, 0.01, 1.4])
def test_bad_width(width: float) -> None:
    with pytest.raises(InputError, match=rf"width must be 1/16 … 1, so that every layer has a channel, got {width}"):
        MobileNetV2(width)
