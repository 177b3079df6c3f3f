"""What the networks for small images share: sizes, stages, gradients, bad sizes, features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zoo import towers
from zoo.architectures import (
    ARCHITECTURES,
    CifarBottleneckResNet,
    MobileNetV2,
    ShuffleNetV1,
    ShuffleNetV2,
    WideResNet,
)
from zoo.architectures.parts import check_counts
from zoo.errors import InputError

# name -> width of the features, parameters for 100 classes, and (channels, side) of each stage for 32x32 images.
# Parameters: of the networks of CRD and mdistiller, from memory (None: not remembered well enough). The wide residual
# networks are also counted by hand in test_wide_resnet.py; ResNet-50 is torchvision's but for stem and classifier.
SIZES: dict[str, tuple[int, int | None, list[tuple[int, int]]]] = {
    "wrn40_2": (128, 2_255_156, [(32, 32), (64, 16), (128, 8)]),
    "wrn40_1": (64, 569_780, [(16, 32), (32, 16), (64, 8)]),
    "wrn16_2": (128, None, [(32, 32), (64, 16), (128, 8)]),
    "wrn16_1": (64, None, [(16, 32), (32, 16), (64, 8)]),
    "resnet50": (2048, 23_705_252, [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
    "mobilenetv2_x0_5": (1280, 812_836, [(12, 16), (16, 8), (48, 4), (160, 2)]),
    "shufflenetv1": (960, 949_258, [(240, 16), (480, 8), (960, 4)]),
    "shufflenetv2": (1024, 1_355_528, [(116, 16), (232, 8), (464, 4)]),
}
# One of each kind, small where there is a choice.
SMALL = ["wrn16_1", "mobilenetv2_x0_5", "shufflenetv1", "shufflenetv2"]


def small(name: str, **options: Any) -> nn.Module:
    """The network of a name; for ResNet-50 one block a stage."""
    return CifarBottleneckResNet((1, 1, 1, 1), **options) if name == "resnet50" else ARCHITECTURES[name](**options)


def test_every_name_is_covered() -> None:
    others = {name for name in ARCHITECTURES if name.startswith("resnet") and name != "resnet50"}
    others |= {"features", "log_mel", "text_transformer", "tiny_text_to_image"}  # encoders, and a generator
    assert ARCHITECTURES.keys() - others == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_golden_sizes(name: str) -> None:
    dim, parameters, stages = SIZES[name]
    with torch.device("meta"):
        network = ARCHITECTURES[name](num_classes=100)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert parameters in (None, count)
    assert network.fc.in_features == dim
    found: list[tuple[int, int]] = []
    for index in range(len(stages)):
        layer = network.get_submodule(f"layer{index + 1}")
        layer.register_forward_hook(lambda _m, _x, out: found.append((out.shape[1], out.shape[2])))
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 100)
    assert found == stages
    assert not hasattr(network, f"layer{len(stages) + 1}")


def test_golden_resnet50_is_torchvisions_behind_another_stem() -> None:
    """He et al.'s ResNet-50 has 25,557,032 parameters (torchvision's documentation), 1000 classes, a 7x7 stem."""
    with torch.device("meta"):
        network = ARCHITECTURES["resnet50"](num_classes=1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 25_557_032 - 64 * 3 * (49 - 9)


def test_identity_resnet50_is_torchvisions() -> None:
    """The same weights in the same order: our stages give what torchvision's give."""
    from torchvision.models import ResNet
    from torchvision.models.resnet import Bottleneck

    ours, theirs = small("resnet50").eval(), ResNet(Bottleneck, [1, 1, 1, 1]).eval()
    x = torch.randn(2, 64, 8, 8)
    for index in range(1, 5):
        mine, other = ours.get_submodule(f"layer{index}"), theirs.get_submodule(f"layer{index}")
        state = zip(mine.state_dict(), other.state_dict().values(), strict=True)
        mine.load_state_dict(dict(state))
        torch.testing.assert_close(mine(x), other(x))
        x = mine(x)


@pytest.mark.parametrize("name", SIZES)
def test_features_are_the_input_of_fc(name: str) -> None:
    with torch.device("meta"):
        tower = towers.create(f"zoo/{name}", num_classes=100)
    assert tower.tap.heads == ("fc",)
    assert (tower.dim, tower.num_classes) == (SIZES[name][0], 100)


@pytest.mark.parametrize("name", [*SMALL, "resnet50"])
def test_features_are_not_negative(name: str) -> None:
    """ReLU before the pooling: the features and with them the class means have no negative number."""
    network = small(name)
    inputs: list[torch.Tensor] = []
    network.fc.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    network(torch.randn(2, 3, 32, 32))
    assert inputs[0].ndim == 2
    assert inputs[0].min() >= 0
    assert inputs[0].max() > 0


@pytest.mark.parametrize("name", [*SMALL, "resnet50"])
def test_gradient_reaches_every_parameter(name: str) -> None:
    network = small(name, num_classes=5, in_chans=1)
    network(torch.randn(4, 1, 32, 32)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", [*SMALL, "resnet50"])
def test_state_dict_round_trip(name: str) -> None:
    first, second = small(name).train(), small(name)
    x = torch.randn(2, 3, 16, 16)
    first(x)  # moves the running statistics
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("name", ["resnet50", "shufflenetv1"])
def test_last_relu_of_a_block_sees_the_pre_activation(name: str) -> None:
    """Feature distillation hooks the input of the last block's ``relu3``; its output is the stage's."""
    network = small(name).eval()
    seen: dict[str, torch.Tensor] = {}
    network.layer2[-1].relu3.register_forward_pre_hook(lambda _m, args: seen.update(before=args[0].clone()))
    network.layer2.register_forward_hook(lambda _m, _x, out: seen.update(after=out))
    network(torch.randn(2, 3, 16, 16))
    assert seen["before"].min() < 0
    torch.testing.assert_close(seen["before"].clamp_min(0), seen["after"])


BUILDERS: list[Any] = [
    lambda **options: WideResNet(16, 1, **options),
    lambda **options: CifarBottleneckResNet((1, 1, 1, 1), **options),
    lambda **options: MobileNetV2(0.5, **options),
    ShuffleNetV1,
    ShuffleNetV2,
]


@pytest.mark.parametrize("build", BUILDERS)
def test_bad_counts(build: Any) -> None:
    with pytest.raises(InputError, match="num_classes and in_chans must be positive, got 0 and 3"):
        build(num_classes=0)
    with pytest.raises(InputError, match="num_classes and in_chans must be positive, got 10 and -1"):
        build(in_chans=-1)


def test_counts_of_one_are_accepted() -> None:
    check_counts(num_classes=1, in_chans=1)
    assert ShuffleNetV2(num_classes=1, in_chans=1).eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 1)


def test_bad_blocks() -> None:
    with pytest.raises(InputError, match=r"blocks must be positive in every stage, got \(3, 4, 0, 3\)"):
        CifarBottleneckResNet((3, 4, 0, 3))


def test_bad_option_of_a_named_network() -> None:
    with pytest.raises(InputError, match=r"'zoo/shufflenetv1' takes no option 'in_chan'\. Did you mean in_chans"):
        towers.create("zoo/shufflenetv1", in_chan=1)
