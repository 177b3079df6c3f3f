"""The residual networks for small images: sizes of the papers, depth, shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.architectures import ARCHITECTURES, CifarResNet
from zoo.errors import InputError

DEPTHS = [8, 14, 20, 32, 44, 56, 110]
NAMES = [*(f"resnet{depth}" for depth in DEPTHS), "resnet8x4", "resnet32x4"]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def by_hand(depth: int, widths: tuple[int, int, int, int], num_classes: int, *, shortcuts: bool) -> int:
    """Weights of the convolutions, two numbers a channel for each batch norm, and the classifier."""
    n = (depth - 2) // 6
    stem, a, b, c = widths
    convolutions = 9 * (3 * stem + stem * a + (2 * n - 1) * a * a + a * b + (2 * n - 1) * b * b + b * c)
    convolutions += 9 * (2 * n - 1) * c * c
    norms = 2 * (stem + 2 * n * (a + b + c))
    changed = a * b + 2 * b + b * c + 2 * c + (stem * a + 2 * a if stem != a else 0)
    return convolutions + norms + c * num_classes + num_classes + (changed if shortcuts else 0)


# He et al., table 6: 0.27, 0.46, 0.66, 0.85, 1.7 million parameters with identity shortcuts.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_golden_sizes_of_the_paper(depth: int, millions: float) -> None:
    narrow = (16, 16, 32, 64)
    digits = 1 if depth == 110 else 2
    assert round(by_hand(depth, narrow, 10, shortcuts=False) / 1e6, digits) == millions
    assert count(ARCHITECTURES[f"resnet{depth}"](num_classes=10)) == by_hand(depth, narrow, 10, shortcuts=True)
    # The 1x1 convolutions of the two shortcuts: 16·32 + 64 and 32·64 + 128.
    assert by_hand(depth, narrow, 10, shortcuts=True) - by_hand(depth, narrow, 10, shortcuts=False) == 2752


# The pair of the distillation papers on CIFAR-100: 1.23 and 7.43 million.
@pytest.mark.parametrize(("depth", "millions"), [(8, 1.23), (32, 7.43)])
def test_golden_sizes_of_the_wide_pair(depth: int, millions: float) -> None:
    network = ARCHITECTURES[f"resnet{depth}x4"](num_classes=100)
    assert count(network) == by_hand(depth, (32, 64, 128, 256), 100, shortcuts=True)
    assert round(count(network) / 1e6, 2) == millions


@pytest.mark.parametrize("name", NAMES)
def test_depth_is_the_number_of_layers_with_weights(name: str) -> None:
    with torch.device("meta"):
        network = ARCHITECTURES[name]()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == int(name.removeprefix("resnet").partition("x")[0])
    assert all(parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", ["resnet8", "resnet14", "resnet8x4"])
def test_shapes(name: str, size: int) -> None:
    network = ARCHITECTURES[name](num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, size, size)
    maps = F.relu(network.bn1(network.conv1(x)))
    for stage, side in ((network.layer1, size), (network.layer2, size // 2), (network.layer3, size // 4)):
        maps = stage(maps)
        assert maps.shape[2:] == (side, side)
    torch.testing.assert_close(network(x), network.fc(maps.mean((2, 3))))
    assert network(x).shape == (2, 7)


def test_identity_block_with_zero_branch_is_its_shortcut() -> None:
    """relu(F(x) + x) with F = 0: the last block then passes its non-negative input on."""
    block = ARCHITECTURES["resnet14"]().eval().layer1[1]
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(block(x), x)


def test_initial_scale() -> None:
    """He initialisation, fan out: variance 2 / (9 · channels)."""
    weight = ARCHITECTURES["resnet8x4"]().layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


def test_every_parameter_is_used() -> None:
    network = ARCHITECTURES["resnet8"](in_chans=1)
    network(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("depth", [7, 2, 0, -4, 9, 21])
def test_bad_depth(depth: int) -> None:
    with pytest.raises(InputError, match=rf"depth must be 6n \+ 2 with n of at least 1, got {depth}"):
        CifarResNet(depth, (16, 16, 32, 64))


def test_bad_counts() -> None:
    with pytest.raises(InputError, match="num_classes and in_chans must be positive, got 0 and 3"):
        CifarResNet(8, (16, 16, 32, 64), num_classes=0)
    with pytest.raises(InputError, match="num_classes and in_chans must be positive, got 10 and -1"):
        CifarResNet(8, (16, 16, 32, 64), in_chans=-1)


def test_names_and_sizes() -> None:
    assert set(NAMES) <= ARCHITECTURES.keys()
