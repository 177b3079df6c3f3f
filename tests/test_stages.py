"""Maps out of timm's, torchvision's and our networks, and hooks that leave nothing behind."""

from __future__ import annotations

import copy
import doctest
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import zoo.stages
from zoo import towers
from zoo.architectures import CifarResNet
from zoo.errors import InputError
from zoo.features import FeatureTap
from zoo.losses.review_kd import review_kd_loss
from zoo.review_fusion import ReviewFusion
from zoo.stage_names import preactivations, stage_names
from zoo.stages import StageTap, as_map


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def cifar(depth: int = 14) -> CifarResNet:
    return CifarResNet(depth, (4, 4, 6, 8), in_chans=1).eval()


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=5, **options)


# -- maps ------------------------------------------------------------------------------------------------------------


def test_identity_maps_of_our_networks() -> None:
    network = cifar()
    x = torch.randn(2, 1, 8, 8)
    logits, maps = StageTap(network, stage_names(network)).collect(network, x)
    expected = F.relu(network.bn1(network.conv1(x)))
    for stage, captured in zip((network.layer1, network.layer2, network.layer3), maps, strict=True):
        expected = stage(expected)
        assert torch.equal(captured, expected)
    assert torch.equal(logits, network(x))


SMALL = [
    ("resnet10t", 64, {}),
    ("vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 8}),
    ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "patch_size": 8}),
    ("vit_small_patch14_reg4_dinov2", 28, {"img_size": 28, "embed_dim": 24, "num_heads": 2, "depth": 4}),
    ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)}),
]


@pytest.mark.parametrize(("name", "size", "options"), SMALL, ids=[name for name, _, _ in SMALL])
def test_identity_timms_own_intermediates(name: str, size: int, options: dict[str, Any]) -> None:
    network = timm.create_model(name, num_classes=3, **options).eval()
    names = stage_names(network)
    x = torch.randn(2, 3, size, size)
    stages = StageTap(network, names)
    with torch.no_grad():
        _, maps = stages.collect(network, x)
        indices = [[entry["module"] for entry in network.feature_info].index(stage) for stage in names]
        expected = network.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert stages.channels == tuple(m.shape[1] for m in expected)
    for captured, own in zip(maps, expected, strict=True):
        torch.testing.assert_close(captured, own)


def test_identity_timms_own_intermediates_of_an_oblong() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=(64, 16), patch_size=8, depth=2).eval()
    x = torch.randn(2, 3, 64, 16)
    _, maps = StageTap(network, ["blocks.1"]).collect(network, x)
    (expected,) = network.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert maps[0].shape == (2, 192, 8, 2)
    torch.testing.assert_close(maps[0], expected)


def test_identity_torchvisions_tokens() -> None:
    network = torchvision.models.VisionTransformer(16, 4, 4, 2, 8, 16, num_classes=3).eval()
    x = torch.randn(2, 3, 16, 16)
    layers: Any = network.encoder.layers
    (captured,) = StageTap(network, ["encoder.layers.encoder_layer_3"]).collect(network, x)[1]
    patches = network._process_input(x)
    tokens = torch.cat([network.class_token.expand(2, -1, -1), patches], 1) + network.encoder.pos_embedding
    expected = layers(tokens)[:, 1:]
    assert captured.shape == (2, 8, 4, 4)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(captured[:, :, row, column], expected[:, 4 * row + column])


def test_identity_torchvisions_swin() -> None:
    network = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    stages = StageTap(network, [*stage_names(network), "permute"])
    _, (first, last, permuted) = stages.collect(network, x)
    assert stages.channels == (8, 16, 16)
    assert [m.shape for m in (first, last)] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    torch.testing.assert_close(network.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), permuted)


def test_tokens_without_the_class_token_yet() -> None:
    """XCiT declares one prefix token and adds it after its blocks; VOLO keeps channels last and does not say so."""
    late = StageTap(on_meta("xcit_nano_12_p16_224"), ["blocks.11"])
    assert late.channels == (128,)
    assert StageTap(on_meta("volo_d1_224"), ["network.0"]).channels == (192,)


def test_what_is_changed_in_place_later_is_captured_as_it_was() -> None:
    """torchvision's DenseNet applies a ReLU in place to the output of its last norm."""
    network = torchvision.models.DenseNet(4, (1, 1), 8, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, maps = StageTap(network, ["features", "features.norm5:input"]).collect(network, x)
        assert torch.equal(maps[0], network.features(x))
        assert maps[0].min() < 0
        assert torch.equal(network.features.norm5(maps[1]), maps[0])


def test_vectors_stay_vectors() -> None:
    network = cifar()
    stages = StageTap(network, ["layer3", "fc:input"])
    _, (last, pooled) = stages.collect(network, torch.randn(2, 1, 8, 8))
    torch.testing.assert_close(pooled, last.mean((2, 3)))
    assert stages.channels == (8, 8)


def test_as_map_is_row_by_row() -> None:
    tokens = torch.arange(14.0).reshape(1, 7, 2)
    assert as_map(tokens, prefix_tokens=1, grid=(2, 3)).tolist() == [
        [[[2, 4, 6], [8, 10, 12]], [[3, 5, 7], [9, 11, 13]]]
    ]
    image = torch.randn(2, 3, 4, 5)
    assert as_map(image) is image
    assert torch.equal(as_map(image.permute(0, 2, 3, 1), channels_last=True), image)
    assert as_map(torch.zeros(0, 4, 8)).shape == (0, 8, 2, 2)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3), {}, r"expected a map of four dimensions or tokens \(B, N, C\), got shape \(2, 3\)"),
        ((2, 17, 3), {}, "17 tokens after 0 prefix tokens are not a square; give the number of prefix_tokens"),
        ((2, 16, 3), {"prefix_tokens": 1}, "15 tokens after 1 prefix tokens are not a square"),
        ((2, 16, 3), {"grid": (3, 5)}, "16 tokens after 0 prefix tokens are not a grid of 3 x 5"),
        ((2, 1, 3), {"prefix_tokens": 1}, "0 tokens after 1 prefix tokens"),
    ],
)
def test_bad_tokens(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_map(torch.zeros(shape), **options)


# -- the tap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("installed", [False, True])
def test_one_pass_with_the_features(installed: bool) -> None:
    network = cifar()
    features, stages = FeatureTap(network), StageTap(network, ["layer1", "layer3"])
    passes = []
    network.conv1.register_forward_hook(lambda *_: passes.append(1))
    if installed:
        features.install()
        stages.install()
    (vector, logits), maps = stages.collect(features, torch.randn(2, 1, 8, 8))
    assert len(passes) == 1
    torch.testing.assert_close(vector, maps[1].mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits.sum(), maps[0])
    assert gradient.abs().max() > 0
    stages.remove()
    features.remove()
    assert hooks(network) == 1


def test_no_references_between_steps() -> None:
    network = cifar()
    stages = StageTap(network, ["layer1"])
    stages.install()
    stages.install()
    assert hooks(network) == 1
    network(torch.randn(2, 1, 8, 8))
    assert not stages._outputs, "a validation step is not listened to"
    stages.collect(network, torch.randn(2, 1, 8, 8))
    assert not stages._outputs
    stages.remove()
    assert hooks(network) == 0


@pytest.mark.parametrize("installed", [False, True])
def test_hooks_after_an_error(installed: bool) -> None:
    network = cifar()
    stages = StageTap(network, ["layer1", "layer2:input"])
    if installed:
        stages.install()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stages.collect(lambda x: network.fc(network.layer1(x)), torch.randn(2, 4, 6, 6))
    assert not stages._outputs
    assert not stages._listening
    assert hooks(network) == (2 if installed else 0)


def test_copies_have_their_own_network() -> None:
    network = cifar()
    stages = StageTap(network, ["layer1"])
    for twin in (copy.deepcopy(stages), pickle.loads(pickle.dumps(stages))):
        assert twin.network is not network
        assert twin.collect(twin.network, torch.ones(1, 1, 8, 8))[1][0].shape == (1, 4, 8, 8)
    assert hooks(network) == 0


def test_installed_tap_inside_a_compiled_step() -> None:
    """The whole of ReviewKD in one graph: student, frozen teacher, fusion, loss."""
    student, teacher = (towers.create(cifar(depth), frozen=depth == 14) for depth in (8, 14))
    own = StageTap(student.network, stage_names(student.network))
    other = StageTap(teacher.network, preactivations(teacher.network, stage_names(teacher.network)))
    fusion = ReviewFusion(own.channels, other.channels)
    for tap in (student.tap, teacher.tap, own, other):
        tap.install()

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            (_, _), wanted = other.collect(teacher.features_and_logits, x)
        (_, logits), maps = own.collect(student.tap, x)
        return review_kd_loss(fusion(maps, [m.shape[2:] for m in wanted]), wanted) + logits.square().mean()

    x = torch.randn(4, 1, 8, 8)
    student.eval()
    fusion.eval()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    assert not own._outputs


def test_network_that_was_compiled_and_run_before_the_tap() -> None:
    network = cifar()
    x = torch.randn(2, 1, 8, 8)
    stages = StageTap(network, ["layer2"])
    (expected,) = stages.collect(network, x)[1]
    network.compile(backend="eager")
    network(x)
    assert torch.equal(stages.collect(network, x)[1][0], expected)
    stages.install()
    assert torch.equal(stages.collect(network, x)[1][0], expected)
    assert StageTap(network, ["layer3"]).channels == (8,)


@pytest.mark.parametrize("teacher", ["vit_tiny_patch16_224", "resnet10t"])
def test_review_of_a_pair(teacher: str) -> None:
    """A small CNN learns from a ViT's 4 x 4 tokens, or from a CNN with other sizes: every parameter gets a gradient."""
    options = {"img_size": 32, "patch_size": 8, "depth": 4} if teacher.startswith("vit") else {}
    guide = timm.create_model(teacher, num_classes=3, **options).eval()
    student = timm.create_model("resnet10t", num_classes=3)
    own, other = (StageTap(network, stage_names(network)) for network in (student, guide))
    fusion = ReviewFusion(own.channels, other.channels, mid_channels=16)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, wanted = other.collect(guide, x)
    logits, maps = own.collect(student, x)
    loss = review_kd_loss(fusion(maps, [m.shape[2:] for m in wanted]), wanted)
    (loss + logits.square().mean()).backward()
    trained = [*student.parameters(), *fusion.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


# -- bad input -------------------------------------------------------------------------------------------------------


class Spare(nn.Module):
    """A module that is not called, one that gives a list, and one that gives a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.spare = nn.Conv2d(3, 4, 3)
        self.listing = Listing()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        (maps,) = self.listing(self.first(x))
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


class Listing(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"names must be a list of module names, at least one, got \[\]"),
        ("first", "names must be a list of module names, at least one, got 'first'"),
        (["frist"], "Spare has no module 'frist'. Did you mean first"),
        (["first", ""], "Spare has no module ''"),
        (["spare"], "'spare' was not called in the forward pass of Spare; name another layer"),
        (["listing"], r"'listing' of Spare gives list, expected a map \(B, C, H, W\), tokens .* name another layer"),
    ],
)
def test_bad_names(names: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        StageTap(Spare(), names)


def test_bad_run_that_skips_the_module() -> None:
    network = Spare()
    with pytest.raises(InputError, match="'head' was not called in the forward pass of Spare"):
        StageTap(network, ["head"]).collect(network.first, torch.zeros(1, 3, 8, 8))


def test_bad_tokens_of_a_network() -> None:
    network = on_meta("vit_tiny_patch16_224", img_size=32, patch_size=8)
    with pytest.raises(InputError, match=r"'blocks.0' of VisionTransformer gives 17 tokens, .*; give prefix_tokens="):
        StageTap(network, ["blocks.0"], prefix_tokens=3)
    with pytest.raises(InputError, match="Hiera does not keep its tokens row by row; use another network"):
        StageTap(on_meta("hiera_tiny_224"), ["blocks.0"])


def test_examples() -> None:
    results = doctest.testmod(zoo.stages)
    assert results.attempted > 0
    assert results.failed == 0
