"""The relatives of NormGrad against captum's gradients and activations, where captum is installed; CI does without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.saliency_networks import GoldenNetwork, images, targets
from zoo.saliency import layer_maps, saliency

attr = pytest.importorskip("captum.attr")


def cases() -> list[tuple[nn.Module, Tensor, Tensor, str]]:
    """The golden network, signed and not; a ResNet with in-place ReLUs, whose maps are not square."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=7).double().eval()
    x, labels = torch.randn(3, 3, 32, 64, dtype=torch.float64), torch.tensor([6, 0, 3])
    return [
        (GoldenNetwork(), images(), targets(), "conv2"),
        (GoldenNetwork(), images(), targets(), "relu1"),
        (resnet, x, labels, "layer2"),
        (resnet, x, labels, "layer3.1.bn1"),
        (resnet, x, labels, "layer4"),
    ]


CASES = cases()


def gradient_and_activation(network: nn.Module, x: Tensor, labels: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    module = network.get_submodule(layer)
    options: Any = {"target": labels}
    gradient = attr.LayerGradientXActivation(network, module, multiply_by_inputs=False).attribute(x, **options)
    return gradient.detach(), attr.LayerActivation(network, module).attribute(x).detach()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{type(case[0]).__name__}-{case[3]}")
def test_captum_agrees(case: tuple[nn.Module, Tensor, Tensor, str]) -> None:
    network, x, labels, layer = case
    module = network.get_submodule(layer)
    gradient, activation = gradient_and_activation(*case)
    product = attr.LayerGradientXActivation(network, module).attribute(x, target=labels).detach()
    torch.testing.assert_close(product, gradient * activation)
    theirs = {
        "gradcam": attr.LayerGradCam(network, module).attribute(x, target=labels, relu_attributions=True).detach(),
        "linear": product.sum(1, keepdim=True),
        "hirescam": product.sum(1, keepdim=True).clamp_min(0),
        "layercam": product.clamp_min(0).sum(1, keepdim=True),
        "gradient": gradient.abs().amax(1, keepdim=True),
        "gradient_sum": gradient.sum(1, keepdim=True),
        "selective": product.clamp_min(0).norm(dim=1, keepdim=True),
        "normgrad": gradient.norm(dim=1, keepdim=True) * activation.norm(dim=1, keepdim=True),
    }
    if layer == "layer4":  # directly in front of the pooling, where the maps of these do not depend on the class
        for method in ("gradient", "gradient_sum", "normgrad"):
            with pytest.warns(UserWarning, match="the same map for every class"):
                ours = layer_maps(network, x, labels, layers=layer, method=method).maps[layer]
            torch.testing.assert_close(ours, theirs.pop(method), rtol=1e-9, atol=1e-12)
    for method, expected in theirs.items():
        ours = layer_maps(network, x, labels, layers=layer, method=method).maps[layer]
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_captum_agrees_on_the_input() -> None:
    network, x, labels, _ = CASES[2]
    leaf = x.clone().requires_grad_()  # captum warns otherwise
    theirs = attr.Saliency(network).attribute(leaf, target=labels).amax(1, keepdim=True)
    torch.testing.assert_close(saliency(network, x, labels, layers="", method="gradient"), theirs)
    product = attr.InputXGradient(network).attribute(leaf, target=labels).detach().sum(1, keepdim=True)
    torch.testing.assert_close(saliency(network, x, labels, layers="", method="linear"), product)


def test_captum_resizes_as_we_do() -> None:
    network, x, labels, layer = CASES[3]
    raw = attr.LayerGradCam(network, network.get_submodule(layer)).attribute(x, target=labels, relu_attributions=True)
    theirs = attr.LayerAttribution.interpolate(raw.detach(), (32, 64), interpolate_mode="bilinear")
    torch.testing.assert_close(saliency(network, x, labels, layers=layer, method="gradcam"), theirs)
