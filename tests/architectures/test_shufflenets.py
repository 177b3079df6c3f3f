"""ShuffleNet, both versions: the shuffle, and the units against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.architectures import ARCHITECTURES
from zoo.architectures.parts import ChannelShuffle
from zoo.architectures.shufflenetv1 import ShuffleUnit
from zoo.architectures.shufflenetv2 import DownUnit, SplitUnit

SCALE = (1 + 1e-5) ** -0.5  # a fresh batch norm in eval mode


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channel j of group i goes to place j * groups + i."""
    size = x.shape[1] // groups
    order = [i * size + j for j in range(size) for i in range(groups)]
    return x[:, order]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_identity_shuffle(groups: int) -> None:
    x = torch.randn(2, 6, 3, 5)
    assert torch.equal(ChannelShuffle(groups)(x), shuffled(x, groups))
    assert torch.equal(ChannelShuffle(6 // groups)(ChannelShuffle(groups)(x)), x)


@pytest.mark.parametrize(("in_channels", "stride"), [(60, 1), (12, 2), (24, 2)])
def test_identity_unit_of_version_1(in_channels: int, stride: int) -> None:
    unit = ShuffleUnit(in_channels, 60, stride).eval()
    x = torch.randn(2, in_channels, 6, 6)
    groups = 1 if in_channels == 24 else 3
    out = shuffled(F.relu(SCALE * F.conv2d(x, unit.conv1.weight, groups=groups)), groups)
    middle = out.shape[1]
    out = F.relu(SCALE * F.conv2d(out, unit.conv2.weight, stride=stride, padding=1, groups=middle))
    out = SCALE * F.conv2d(out, unit.conv3.weight, groups=3)
    out = out + x if stride == 1 else torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1)
    expected = F.relu(out)
    torch.testing.assert_close(unit(x), expected)
    assert expected.shape[1] == 60


def test_identity_units_of_version_2() -> None:
    x = torch.randn(2, 8, 6, 6)
    split = SplitUnit(8).eval()
    torch.testing.assert_close(split(x), shuffled(torch.cat([x[:, :4], split.branch(x[:, 4:])], 1), 2))
    down = DownUnit(8, 20).eval()
    torch.testing.assert_close(down(x), shuffled(torch.cat([down.short(x), down.branch(x)], 1), 2))
    assert down(x).shape == (2, 20, 3, 3)

    first, depthwise, last = (split.branch[index].weight for index in (0, 3, 5))
    out = F.relu(SCALE * F.conv2d(x[:, 4:], first))
    out = SCALE * F.conv2d(out, depthwise, padding=1, groups=4)
    torch.testing.assert_close(split.branch(x[:, 4:]), F.relu(SCALE * F.conv2d(out, last)))
    out = SCALE * F.conv2d(x, down.short[0].weight, stride=2, padding=1, groups=8)
    torch.testing.assert_close(down.short(x), F.relu(SCALE * F.conv2d(out, down.short[2].weight)))


@pytest.mark.parametrize("name", ["shufflenetv1", "shufflenetv2"])
def test_blocks_of_the_paper(name: str) -> None:
    """4, 8 and 4 units in the stages."""
    with torch.device("meta"):
        network = ARCHITECTURES[name]()
    assert [len(network.get_submodule(f"layer{index}")) for index in (1, 2, 3)] == [4, 8, 4]
