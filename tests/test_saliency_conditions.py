"""A network is left as it was, whatever the conditions; names of layers; bad input."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.saliency_networks import GoldenNetwork, activation_and_gradient, images, targets
from tests.saliency_parts import counted, hooks, quiet
from zoo.combined_maps import combine_maps
from zoo.contributions import contribution_map
from zoo.errors import InputError
from zoo.layer_taps import find_layers
from zoo.saliency import METHODS, Method, layer_maps, saliency

GOLDEN: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


# -- a network that is left as it was --------------------------------------------------------------------------------


@pytest.mark.parametrize("meta_lr", [None, 0.1])
def test_nothing_is_touched(meta_lr: float | None) -> None:
    network = counted()
    x = torch.randn(2, 3, 8, 8)
    network(x).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
    state = {name: value.clone() for name, value in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    modes = [module.training for module in network.modules()]
    assert modes.count(False) == 1
    random = torch.random.get_rng_state()
    for call in ("good", "bad"):
        if call == "good":
            found = saliency(network, x, layers=["conv1", "conv2"], meta_lr=meta_lr)
            assert found.shape == (2, 1, 8, 8)
            assert not found.requires_grad
        else:
            with pytest.raises(InputError, match="score must return one number an image"):
                saliency(network, x, layers=["conv1"], score=lambda output, _: output.sum(), meta_lr=meta_lr)
            with pytest.raises(RuntimeError):
                saliency(network, x[:, :2], layers=["conv1"], meta_lr=meta_lr)
        assert hooks(network) == 0
        assert [module.training for module in network.modules()] == modes
        assert torch.equal(torch.random.get_rng_state(), random)
        for name, parameter in network.named_parameters():
            assert parameter is parameters[name]
            assert parameter.requires_grad == (not name.startswith("conv1"))
            kept = gradients[name]
            assert parameter.grad is None if kept is None else torch.equal(parameter.grad, kept)  # type: ignore[arg-type]
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert torch.is_grad_enabled()


def test_one_forward_pass() -> None:
    network = counted()
    saliency(network, torch.randn(2, 3, 8, 8), layers=["", "conv1", "bn", "conv2"])
    assert network.calls == 1


def test_frozen_and_trained_networks_agree() -> None:
    network = counted()
    x = torch.randn(2, 3, 8, 8)
    trained = saliency(network, x, 1, layers=["conv1", "conv2"], meta_lr=0.1)
    frozen = saliency(network.requires_grad_(requires_grad=False), x, 1, layers=["conv1", "conv2"], meta_lr=0.1)
    assert torch.equal(trained, frozen)


@pytest.mark.parametrize("meta_lr", [None, 0.1])
def test_inside_inference_mode(meta_lr: float | None) -> None:
    network = counted()
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    plain = saliency(network, x, labels, layers=["conv1", "conv2"], meta_lr=meta_lr)
    with torch.inference_mode():
        inside = saliency(network, x.clone(), labels.clone(), layers=["conv1", "conv2"], meta_lr=meta_lr)
        text = saliency(network, x.clone(), torch.ones(4), layers="conv2", meta_lr=meta_lr)
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        assert torch.equal(saliency(network, x, labels, layers=["conv1", "conv2"], meta_lr=meta_lr), plain)
    assert torch.equal(inside, plain)
    assert torch.equal(text, saliency(network, x, torch.ones(4), layers="conv2", meta_lr=meta_lr))
    network(x).sum().backward()  # nothing that inference mode made was left behind


def test_compile() -> None:
    """Hooks of a compiled network would be skipped, and the compiled network goes on as before."""
    network = counted()
    x = torch.randn(2, 3, 8, 8)
    plain = saliency(network, x, 1, layers=["conv1", "conv2"])
    compiled = torch.compile(network, backend="eager")
    before = compiled.eval()(x)
    network.bn.eval()
    assert torch.equal(saliency(compiled, x, 1, layers=["conv1", "conv2"]), plain)
    assert torch.equal(compiled(x), before)
    network.compile(backend="eager")
    network(x)
    assert torch.equal(saliency(network, x, 1, layers=["conv1", "conv2"]), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    network = counted()
    x = torch.randn(2, 3, 8, 8)
    plain = saliency(network, x, 1, layers="conv2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(saliency(network, x, 1, layers="conv2"), plain)
    half = copy.deepcopy(network).to(dtype)
    found = saliency(half, x, 1, layers="conv2")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0.1, atol=0.02 * float(plain.max()))


def test_half_precision_keeps_small_gradients() -> None:
    """Gradients of 3e-8 vanish in half precision, unless the score is scaled on the way back."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2)).half()
    with torch.no_grad():
        network[2].weight.fill_(1e-3)  # type: ignore[operator]
        network[0].weight.fill_(3e-5)  # type: ignore[operator]
    found = quiet(network, torch.ones(1, 1, 2, 2), 0, layers="", extract="bias")
    torch.testing.assert_close(found, torch.full((1, 1, 2, 2), 3e-8), rtol=0.05, atol=0)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Tanh())
        self.fc = nn.Linear(4 * 16, 2)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        kind: Any = self.reentrant
        x = self.inner(x) if kind is None else checkpoint(self.inner, x, use_reentrant=kind)
        logits: Tensor = self.fc(x.flatten(1))
        return logits


@pytest.mark.parametrize("meta_lr", [None, 1.0])
def test_checkpointing(meta_lr: float | None) -> None:
    """What a checkpoint computes anew on the way back has to see the weights after the step."""
    network, x = Checkpointed(), torch.randn(2, 3, 4, 4)
    plain = saliency(network, x, 1, layers=["layer", "inner.0"], meta_lr=meta_lr)
    network.reentrant = False
    torch.testing.assert_close(saliency(network, x, 1, layers=["layer", "inner.0"], meta_lr=meta_lr), plain)
    network.reentrant = True
    with pytest.raises(InputError, match=r"'inner.0' gave in its last call, or the path .*use_reentrant=False"):
        quiet(network, x, 1, layers="inner.0")


def test_outputs_that_are_no_tensor() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"boxes": self.stem(x), "count": self.stem(x).square().sum((1, 2, 3))}

    network, x = Several(), torch.randn(2, 3, 4, 4)
    with pytest.raises(InputError, match=r"must return logits or embeddings .*got dict; give score="):
        saliency(network, x, layers="stem")
    weights = torch.tensor([1.0, 0.0])
    found = layer_maps(network, x, weights, layers="stem", score=lambda output, w: output["count"] * w)
    assert found.output is None
    assert found.maps["stem"][0].any()
    assert not found.maps["stem"][1].any()


def test_two_branches_of_a_tuple() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * x, x

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()
            self.fc = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.pair(x)
            logits: Tensor = self.fc((first.relu_() + second).flatten(1))
            return logits

    network, x = Sum(), torch.randn(1, 3, 2, 2)
    found = saliency(network, x, 1, layers="pair")
    weight = network.fc.weight[1].view(1, 3, 2, 2)
    gradient = torch.where(x > 0, weight, 0.0)
    torch.testing.assert_close(found, ((2 * x).norm(dim=1) * gradient.norm(dim=1)).unsqueeze(1).detach())


# -- names -----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    network = nn.Module()
    network.network = GoldenNetwork()
    network.other = nn.Sequential(nn.ReLU())
    assert find_layers(network, ["conv2", "network.relu1", "conv1:input"]) == {
        "conv2": "network.conv2",
        "network.relu1": "network.relu1",
        "conv1:input": "network.conv1:input",
    }
    network.twin = GoldenNetwork()
    with pytest.raises(InputError, match=r"may stand for network.conv2, twin.conv2 of Module; give the whole name"):
        find_layers(network, "conv2")


# -- captum ----------------------------------------------------------------------------------------------------------


def test_identity_captum() -> None:
    attr = pytest.importorskip("captum.attr")
    network = counted().eval()
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([2, 0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cam = attr.LayerGradCam(network, network.conv2).attribute(x, target=labels, relu_attributions=True)
        linear = attr.LayerGradientXActivation(network, network.conv2).attribute(x, target=labels)
        gradient = attr.Saliency(network).attribute(x, target=labels, abs=True)
    ours = {
        method: saliency(network, x, labels, layers="conv2", method=method, size="layer")
        for method in ("gradcam", "linear", "layercam")
    }
    torch.testing.assert_close(ours["gradcam"], cam.detach())
    torch.testing.assert_close(ours["linear"], linear.sum(1, keepdim=True).detach())
    torch.testing.assert_close(ours["layercam"], linear.relu().sum(1, keepdim=True).detach())
    torch.testing.assert_close(
        saliency(network, x, labels, layers="", method="gradient"), gradient.amax(1, keepdim=True)
    )


def test_identity_methods_are_contributions() -> None:
    x, g = (value.float() for value in activation_and_gradient("relu2"))
    theirs = {
        "normgrad": x.norm(dim=1) * g.norm(dim=1),
        "selective": (x * g).relu().norm(dim=1),
        "gradient": g.abs().amax(1),
        "gradient_sum": g.sum(1),
        "linear": (x * g).sum(1),
        "hirescam": (x * g).sum(1).relu(),
        "layercam": (x * g).relu().sum(1),
        "gradcam": (x * g.mean((2, 3), keepdim=True)).sum(1).relu(),
    }
    assert theirs.keys() == METHODS.keys()
    network = GoldenNetwork().float()
    for method, one in theirs.items():
        ours = saliency(network, images(), targets(), layers="relu2", method=method, size="layer")
        torch.testing.assert_close(ours.squeeze(1), one, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            saliency(network, images(), targets(), layers="relu2", method=METHODS[method], size="layer"), ours
        )
    assert Method("conv1x1", "norm") == METHODS["normgrad"]
    maps = [contribution_map(*activation_and_gradient(layer)) for layer in ("relu1", "relu2")]
    combined = saliency(GoldenNetwork(), images(), targets(), layers=["relu1", "relu2"])
    torch.testing.assert_close(combined, combine_maps(maps))


# -- bad input -------------------------------------------------------------------------------------------------------


class Detour(GoldenNetwork):
    """Has a layer that is not called, and one that does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Conv2d(1, 1, 1)
        self.aside = nn.ReLU()
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return super().forward(x) + 0 * self.pooled(x).sum()


BAD: list[tuple[str, dict[str, Any]]] = [
    (r"Detour has no layer 'rellu1'. Did you mean relu1", {"layers": "rellu1"}),
    (r"layers must be a module name or a list", {"layers": []}),
    (r"layers must name each layer once, 'relu1' is there twice", {"layers": ["relu1", "relu1"]}),
    (r"'idle' was not called in the forward pass of Detour", {"layers": "idle"}),
    (r"the score does not depend on what 'aside' gave", {"layers": "aside"}),
    (r"the score does not depend on what 'aside' gave", {"layers": ["relu1", "aside"]}),
    (r"'pooled' gives shape \(2, 2\) for 2 images, expected maps", {"layers": "pooled"}),
    (r"must be the name of an nn.Conv2d, got ReLU", {"extract": "conv"}),
    (r"must be the name of an nn.Conv2d, got Conv2d", {"extract": "conv", "layers": "conv2:input"}),
    (r"method must be one of .*Did you mean normgrad", {"method": "normgard"}),
    (r"method stands for extract and aggregate", {"method": "gradcam", "aggregate": "norm"}),
    (r"extract must be one of", {"extract": "conv3x3"}),
    (r"aggregate must be one of", {"aggregate": "mean"}),
    (r"mode must be one of", {"layers": ["relu1", "relu2"], "combine": "mean"}),
    (r"weights weigh several layers", {"weights": [1]}),
    (r"weights must be one number a map, 2, got 3", {"layers": ["relu1", "relu2"], "weights": [1, 2, 3]}),
    (r"size must be 'input', 'layer' or two numbers", {"size": "image"}),
    (r"size must be 'input', 'layer' or two numbers", {"size": (0, 3)}),
    (r"meta_lr must be finite, got nan", {"meta_lr": float("nan")}),
    (
        r"images must be \(B, C, H, W\) in floating point, at least one, got shape \(2, 6, 6\)",
        {"images": torch.rand(2, 6, 6)},
    ),
    (r"images must be .*uint8", {"images": torch.zeros(2, 2, 6, 6, dtype=torch.uint8)}),
    (r"images must be .*at least one", {"images": torch.zeros(0, 2, 6, 6)}),
    (r"targets must be labels in 0 … 2 \(3 classes\), found 3", {"targets": 3}),
    (r"targets must be one for all images or one each, 2, got 3", {"targets": [0, 1, 2]}),
    (r"targets must be one for all images or one each, 2, got 1", {"targets": torch.tensor([1])}),
    (r"embeddings as wide as the network's, 3, got shape \(2, 5\)", {"targets": torch.rand(2, 5)}),
    (r"targets must be integer labels, got torch.bool", {"targets": torch.tensor([True, False])}),
    (r"score must return one number an image, shape \(2,\), got \(2, 3\)", {"score": lambda output, _: output}),
]


@pytest.mark.parametrize(("match", "options"), BAD, ids=[match[:40] for match, _ in BAD])
def test_bad_arguments(match: str, options: dict[str, Any]) -> None:
    network = Detour()
    arguments = {"images": images(), "targets": targets(), "layers": "relu1"} | options
    with pytest.raises(InputError, match=match):
        quiet(network, arguments.pop("images"), arguments.pop("targets"), **arguments)
    assert hooks(network) == 0
