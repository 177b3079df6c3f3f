"""Which modules are the stages of timm's, torchvision's, our and users' networks, and which end in a ReLU."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import zoo.stage_names
from zoo.architectures import CifarResNet
from zoo.errors import InputError
from zoo.stage_names import preactivations, stage_names
from zoo.stages import StageTap


def cifar() -> CifarResNet:
    return CifarResNet(14, (4, 4, 6, 8), in_chans=1).eval()


def on_meta(library: str, name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name, num_classes=5, **options)
        network: nn.Module = torchvision.models.get_model(name, **options)
        return network


FOUR = "layer1 layer2 layer3 layer4"
TIMM = {
    "resnet10t": FOUR,
    "vit_tiny_patch16_224": "blocks.2 blocks.5 blocks.8 blocks.11",
    "swin_tiny_patch4_window7_224": "layers.0 layers.1 layers.2 layers.3",
    "convnext_atto": "stages.0 stages.1 stages.2 stages.3",
    "mobilenetv3_small_050": "blocks.0 blocks.1 blocks.3 blocks.5",
    "mixer_s32_224": "blocks.1 blocks.3 blocks.5 blocks.7",
    "vgg11": "features.9 features.14 features.19 features.20",
}
TORCHVISION = {
    "resnet18": FOUR,
    "shufflenet_v2_x0_5": "maxpool stage2 stage3 conv5",
    "mobilenet_v3_small": "features.1 features.3 features.8 features",
    "vgg11": "features.9 features.14 features.19 features",
    "densenet121": "features.denseblock1 features.denseblock2 features.denseblock3 features",
    "convnext_tiny": "features.1 features.3 features.5 features",
    "swin_t": "features.1 features.3 features.5 features.7",
    "squeezenet1_1": "features.1 features.4 features.7 features",
    "vit_b_32": " ".join(f"encoder.layers.encoder_layer_{index}" for index in (2, 5, 8, 11)),
}
NAMED = [("timm", *item) for item in TIMM.items()] + [("torchvision", *item) for item in TORCHVISION.items()]


@pytest.mark.parametrize(
    ("library", "name", "expected"), NAMED, ids=[f"{library}/{name}" for library, name, _ in NAMED]
)
def test_stage_names(library: str, name: str, expected: str) -> None:
    assert stage_names(on_meta(library, name)) == tuple(expected.split())


def test_stage_names_of_our_networks() -> None:
    assert stage_names(cifar()) == ("layer1", "layer2", "layer3")


class Wrapped(nn.Module):
    """A user's network: the backbone one step down, an auxiliary branch, and blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()
        )
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)])
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        for block in self.blocks:
            x = block(x)
        x = x * self.gate(x).sigmoid()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_stage_names_of_a_users_network() -> None:
    """The deeper level of the tree shows three sizes, the upper one two; the gate's single pixel is no stage."""
    assert stage_names(Wrapped()) == ("backbone.1", "backbone", "blocks.1")


def test_stage_names_of_a_network_for_small_images_only() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 14**2, 3)
    )
    assert stage_names(network) == ("0", "1", "2")


def test_stage_names_leave_the_network_as_it_was() -> None:
    network = cifar().train()
    network.layer1.eval()
    modes = [module.training for module in network.modules()]
    state = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    stage_names(network)
    preactivations(network, ["layer1"])
    StageTap(network, ["layer1"])
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_stage_names_with_an_example_where_meta_will_not_do() -> None:
    class Counting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) == 0 else x

    network = Counting(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(
        InputError, match=r"cannot be run with images of 224 x 224, 32 x 32 pixels .*give example=, an i"
    ):
        stage_names(network)
    example = torch.zeros(2, 1, 8, 8)
    assert stage_names(network, example=example) == ("0", "1")
    assert preactivations(network, ["1"], example=example) == ("1",)
    assert StageTap(network, ["1"], example=example).channels == (2,)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(4, 3)), "Sequential has no convolution that images could enter; give example="),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            "shows no stages: .*; name the layers",
        ),
    ],
)
def test_bad_network_without_stages(network: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stage_names(network)


def test_bad_network_with_several_lists_of_tokens() -> None:
    """CrossViT has two branches: which of them counts is not guessed, and its patches are no stages."""
    with pytest.raises(InputError, match="CrossVit shows no stages"):
        stage_names(on_meta("timm", "crossvit_tiny_240"))


RESIDUAL = [
    ("timm", "resnet10t", "layer1.0.act2 layer2.0.act2 layer3.0.act2 layer4.0.act2"),
    ("timm", "resnet26", "layer1.1.act3 layer2.1.act3 layer3.1.act3 layer4.1.act3"),
    ("torchvision", "resnet18", "layer1.1.relu layer2.1.relu layer3.1.relu layer4.1.relu"),
]


@pytest.mark.parametrize(("library", "name", "expected"), RESIDUAL)
def test_preactivations(library: str, name: str, expected: str) -> None:
    found = preactivations(on_meta(library, name), FOUR.split())
    assert found == tuple(f"{relu}:input" for relu in expected.split())


def test_preactivations_of_our_networks() -> None:
    expected = ("layer1.1.relu2:input", "layer2.1.relu2:input", "layer3.1.relu2:input")
    assert preactivations(cifar(), stage_names(cifar())) == expected


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_preactivations_of_stages_that_end_otherwise(name: str) -> None:
    network = on_meta("timm", name)
    assert preactivations(network, stage_names(network)) == stage_names(network)


class Residual(nn.Module):
    """An activation in place, and then a sum in place: the same tensor is returned, and it is no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(x * 2)
        out += x
        return out


def test_preactivations_sum_after_the_activation() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(), nn.Flatten())
    assert preactivations(network, ["1", "0"]) == ("1", "0")
    with pytest.raises(InputError, match="Sequential has no module '9'"):
        preactivations(network, ["9"])


def test_identity_relu_of_preactivations_is_the_stage() -> None:
    """torchvision's ReLU works in place and is called twice: the last input, as it was before."""
    network = torchvision.models.resnet18(num_classes=3).eval()
    names = FOUR.split()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, after = StageTap(network, names).collect(network, x)
        _, before = StageTap(network, preactivations(network, names)).collect(network, x)
    for relued, raw in zip(after, before, strict=True):
        assert raw.min() < 0
        assert torch.equal(raw.relu(), relued)


def test_examples() -> None:
    results = doctest.testmod(zoo.stage_names)
    assert results.attempted > 0
    assert results.failed == 0
