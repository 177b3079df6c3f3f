"""FeatureTap: the input of the classifier of any network, and a network that is left as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from zoo import towers
from zoo.errors import InputError
from zoo.features import FeatureTap

# Networks of each way to end: global pool + linear, token, MLP head, conv classifier, two heads, one head a branch.
TIMM = [
    ("resnet10t", 32, {}),
    ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
    ("convnext_atto", 32, {"depths": (1, 1, 1, 1)}),
    ("mobilenetv3_small_050", 32, {}),
    ("efficientnet_lite0", 32, {}),
    ("dla46_c", 32, {}),
    ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "depth": 2}),
    ("caformer_s18", 32, {}),
    ("crossvit_tiny_240", 240, {}),
    ("levit_128s", 64, {"img_size": 64}),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    yield
    torch.compiler.reset()


def small(**options: Any) -> nn.Module:
    return towers.create("zoo/resnet8", in_chans=1, **options).network.eval()


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())


@pytest.mark.parametrize(("name", "size", "options"), TIMM, ids=[name for name, _, _ in TIMM])
def test_identity_features_are_timms_pre_logits(name: str, size: int, options: dict[str, Any]) -> None:
    network = timm.create_model(name, num_classes=5, **options).eval()
    x = torch.randn(2 if size < 100 else 1, 3, size, size)
    tap = FeatureTap(network)
    with torch.no_grad():
        features, logits = tap(x)
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(logits, network(x))
    assert features.shape == (len(x), tap.dim)
    assert tap.num_classes == 5


def torchvision_features(name: str, network: nn.Module, x: Tensor) -> Tensor:
    """The forward passes of torchvision, up to the last layer."""
    if name == "resnet18":
        stem = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        return network.avgpool(network.layer4(network.layer3(network.layer2(network.layer1(stem))))).flatten(1)
    if name == "mobilenet_v3_small":
        return network.classifier[:-1](network.avgpool(network.features(x)).flatten(1))
    assert name == "squeezenet1_1"
    return network.classifier[0](network.features(x)).mean((2, 3))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_identity_features_of_torchvision(name: str) -> None:
    network = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, logits = FeatureTap(network)(x)
        torch.testing.assert_close(features, torchvision_features(name, network, x))
        torch.testing.assert_close(logits, network(x))
    assert FeatureTap(network).num_classes == 5
    assert FeatureTap(network).dim == features.shape[1]


def test_identity_two_heads_give_the_mean_of_their_inputs() -> None:
    """Distilled DeiT: class token and distillation token, after the last norm."""
    network = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = network.forward_features(x)
        torch.testing.assert_close(FeatureTap(network)(x)[0], (tokens[:, 0] + tokens[:, 1]) / 2)
    assert FeatureTap(network).heads == ("head", "head_dist")


def test_identity_branches_stand_side_by_side() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(2, 3), nn.Linear(4, 3)])

        def get_classifier(self) -> nn.ModuleList:
            return self.heads

        def forward(self, x: Tensor) -> Tensor:
            # Called in the other order: the names decide, not the calls.
            second = self.heads[1](x[:, 2:])
            return self.heads[0](x[:, :2]) + second

    x = torch.randn(5, 6)
    tap = FeatureTap(Branches())
    assert torch.equal(tap(x)[0], x)
    assert (tap.dim, tap.num_classes) == (6, 3)


def test_gradient_flows_through_features() -> None:
    network = small()
    features, _ = FeatureTap(network)(torch.randn(2, 1, 8, 8))
    features.sum().backward()
    assert network.conv1.weight.grad is not None
    assert network.fc.weight.grad is None


def test_network_is_left_without_hooks_and_references() -> None:
    network = small()
    tap = FeatureTap(network)
    features, logits = tap(torch.randn(2, 1, 8, 8))
    assert hooks(network) == 0
    held = weakref.ref(features)
    del features, logits
    gc.collect()
    assert held() is None


def test_install_keeps_the_hooks_and_no_features() -> None:
    network = small()
    tap = FeatureTap(network)
    tap.install()
    tap.install()
    assert hooks(network) == 1
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        features, _ = tap(x)
    network(x)  # outside the tap nothing is kept
    held = weakref.ref(features)
    del features
    gc.collect()
    assert held() is None
    assert hooks(network) == 1
    tap.remove()
    tap.remove()
    assert hooks(network) == 0
    assert tap(x)[0].shape == (2, 64)


@pytest.mark.parametrize("installed", [False, True])
def test_hooks_and_features_go_after_an_exception(installed: bool) -> None:
    network = small()
    tap = FeatureTap(network)
    if installed:
        tap.install()
    with pytest.raises(RuntimeError, match="channels"):
        tap(torch.randn(2, 3, 8, 8))
    assert hooks(network) == int(installed)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(tap(x)[1], network(x))
    assert not tap._inputs


def test_copy_is_independent() -> None:
    tower = towers.create("zoo/resnet8", in_chans=1)
    tower.tap.install()
    twin = copy.deepcopy(tower)
    assert twin.tap.network is twin.network
    with torch.no_grad():
        twin.network.fc.weight.zero_()
        twin.network.fc.bias.zero_()
    x = torch.randn(2, 1, 8, 8)
    assert twin.eval().features_and_logits(x)[1].abs().max() == 0
    assert torch.equal(twin.features(x), tower.eval().features(x))


# -- torch.compile -------------------------------------------------------------------------------------------------


def test_compiled_network_with_installed_hooks_has_no_graph_break() -> None:
    from torch._dynamo.utils import counters

    network = small()
    x = torch.randn(2, 1, 8, 8)
    expected = FeatureTap(network)(x)
    tap = FeatureTap(network)
    tap.install()
    network.compile(backend="eager")
    counters.clear()
    for _ in range(2):
        features, logits = tap(x)
        assert torch.equal(features, expected[0])
        assert torch.equal(logits, expected[1])
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] >= 1


def test_installed_tap_inside_a_compiled_step() -> None:
    """One graph for the whole step, of a trained and of a frozen tower."""
    student, teacher = towers.create("zoo/resnet8", in_chans=1), towers.create("zoo/resnet8", in_chans=1, frozen=True)
    for tower in (student, teacher):
        tower.tap.install()

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted, _ = teacher.features_and_logits(x)
        features, logits = student.tap(x)
        return (features - wanted).square().mean() + logits.square().mean()

    x = torch.randn(4, 1, 8, 8)
    student.eval()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    assert not student.tap._inputs


def test_network_that_was_compiled_and_run_before_the_tap() -> None:
    """Code compiled without hooks does not look for them: a validation before fit must not blind the tap."""
    network = small()
    x = torch.randn(2, 1, 8, 8)
    expected = FeatureTap(network)(x)[0]
    network.compile(backend="eager")
    network(x)
    tap = FeatureTap(network)
    assert torch.equal(tap(x)[0], expected)
    tap.install()
    assert torch.equal(tap(x)[0], expected)
    tap.remove()
    assert torch.equal(tap(x)[0], expected)


def test_tap_without_hooks_inside_a_compiled_step_breaks_the_graph_and_works() -> None:
    network = small()
    x = torch.randn(2, 1, 8, 8)
    expected = FeatureTap(network)(x)[0]
    tap = FeatureTap(network)
    with torch.no_grad():
        assert torch.equal(torch.compile(lambda x: tap(x)[0] * 1, backend="eager")(x), expected)
    assert hooks(network) == 0


# -- bad input -----------------------------------------------------------------------------------------------------


def test_bad_head_shows_the_nearest() -> None:
    with pytest.raises(InputError, match=r"CifarResNet has no module 'fcc'. Did you mean fc"):
        FeatureTap(small(), ("fcc",))


def test_bad_head_that_is_not_called() -> None:
    class Spare(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    network = Spare(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(InputError, match="classifier '1' was not called in the forward pass; name another head"):
        FeatureTap(network)(torch.randn(2, 4))
    assert torch.equal(FeatureTap(network, ("0",))(torch.ones(2, 4))[0], torch.ones(2, 4))


def test_bad_network_without_layers() -> None:
    with pytest.raises(InputError, match="Identity has no linear layer that could be its classifier"):
        FeatureTap(nn.Identity())


def test_bad_network_without_classifier() -> None:
    """timm's num_classes=0 leaves an Identity: the last convolution is not its classifier."""
    with pytest.raises(InputError, match="ResNet has no classifier: build it with num_classes, or name the head"):
        FeatureTap(timm.create_model("resnet10t", num_classes=0))


def test_bad_head_without_width() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with pytest.raises(InputError, match="classifier '1' of Sequential has no linear layer"):
        _ = FeatureTap(network, ("1",)).dim


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 3, 3, 4)])
def test_bad_linear_head_over_positions(shape: tuple[int, ...]) -> None:
    """A linear layer takes channels last: the mean over the last two axes would be no feature."""
    network = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"input of classifier '0' has shape \(2, .*, expected \(B, D\)"):
        FeatureTap(network)(torch.randn(shape))


def test_bad_output_that_is_no_tensor() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return (super().forward(x),)

    with pytest.raises(InputError, match=r"Sequential returned tuple, expected logits \(B, K\)"):
        FeatureTap(nn.Sequential(Pair(4, 3)))(torch.randn(2, 4))
