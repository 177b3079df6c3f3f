"""Maps from networks whose activations lie differently in memory: tokens, channels last, towers with a text."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from tests.saliency_parts import quiet
from zoo import towers
from zoo.errors import InputError
from zoo.saliency import layer_maps, saliency
from zoo.stage_names import stage_names

GOLDEN: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


# -- layouts ---------------------------------------------------------------------------------------------------------


def plain_capture(network: nn.Module, layer: str, x: Tensor, label: int) -> tuple[Tensor, Tensor]:
    kept = []
    handle = network.get_submodule(layer).register_forward_hook(lambda _m, _a, output: kept.append(output))
    score = network.eval()(x)[:, label].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept)
    return kept[0].detach(), gradient


def randomized(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


LAYOUTS: list[tuple[str, Any, int, str, tuple[int, int], Any]] = [
    (
        "timm ViT",
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=12, num_classes=3
        ),
        32,
        "blocks.1.norm1",
        (4, 4),
        lambda t: t[:, 1:],
    ),
    (
        "timm ViT with registers, oblong",
        lambda: timm.create_model(
            "vit_small_patch14_reg4_dinov2", img_size=(42, 28), embed_dim=12, num_heads=2, depth=2, num_classes=3
        ),
        0,
        "blocks.0",
        (3, 2),
        lambda t: t[:, 5:],
    ),
    (
        "torchvision ViT",
        lambda: torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=3),
        16,
        "encoder.layers.encoder_layer_1.ln_1",
        (4, 4),
        lambda t: t[:, 1:],
    ),
    (
        "timm Swin",
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=2,
            embed_dim=24,
            depths=(1, 1),
            num_heads=(2, 2),
            num_classes=3,
        ),
        32,
        "layers.0",
        (8, 8),
        lambda t: t.flatten(1, 2),
    ),
    (
        "torchvision Swin",
        lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3),
        32,
        "features.1",
        (8, 8),
        lambda t: t.flatten(1, 2),
    ),
    (
        "ConvNeXt, inside a block",
        lambda: timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3),
        64,
        "stages.1.blocks.0.norm",
        (8, 8),
        lambda t: t.flatten(1, 2),
    ),
    (
        "ConvNeXt, a stage",
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3),
        64,
        "stages.1",
        (8, 8),
        lambda t: t.flatten(2).transpose(1, 2),
    ),
    (
        "ConvNeXt of convolutions, inside a block",
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3),
        64,
        "stages.1.blocks.0.norm",
        (8, 8),
        lambda t: t.flatten(2).transpose(1, 2),
    ),
    (
        "MLP-Mixer",
        lambda: timm.models.MlpMixer(3, img_size=32, patch_size=8, num_blocks=2, embed_dim=12),
        32,
        "blocks.1.norm1",
        (4, 4),
        lambda t: t,
    ),
]


@pytest.mark.parametrize(("name", "make", "side", "layer", "grid", "places"), LAYOUTS, ids=[c[0] for c in LAYOUTS])
def test_layouts(name: str, make: Any, side: int, layer: str, grid: tuple[int, int], places: Any) -> None:
    network = randomized(make())
    x = torch.randn(2, 3, *((side, side) if side else (42, 28)))
    activation, gradient = plain_capture(network, layer, x, 1)
    ours = saliency(network, x, 1, layers=layer, size="layer")
    assert ours.shape == (2, 1, *grid)
    theirs = places(activation).norm(dim=2) * places(gradient).norm(dim=2)
    torch.testing.assert_close(ours.flatten(1), theirs, rtol=1e-4, atol=1e-7)
    assert ours.std() > 0


def test_our_networks_in_a_tower() -> None:
    """Layers by the names that the network gives them, without the ``network.`` of the tower around it."""
    tower = towers.create("zoo/resnet8", num_classes=3)
    x = torch.randn(2, 3, 16, 16)
    names = stage_names(tower.network)
    found = quiet(tower, x, 1, layers=names)
    assert found.shape == (2, 1, 16, 16)
    torch.testing.assert_close(found, quiet(tower.network, x, 1, layers=names))


def test_layout_by_hand() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    network = nn.Sequential(Last(), nn.Flatten(), nn.Linear(48, 3))
    x = torch.randn(2, 3, 4, 4)
    ours = saliency(network, x, 1, layers="0", channels_last=True)
    torch.testing.assert_close(ours, saliency(network, x, 1, layers=""))
    tokens = nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(54, 3))
    odd = torch.randn(1, 6, 3, 3)  # tokens 6, of which 2 are prefixes, and 9 channels
    assert saliency(tokens, odd, 1, layers="0", prefix_tokens=2, size="layer").shape == (1, 1, 2, 2)
    with pytest.raises(InputError, match="prefix_tokens"):
        saliency(tokens, odd, 1, layers="0")


def test_towers_with_a_text() -> None:
    """The image side of CLIP: the score is the cosine with a text's embedding."""
    from open_clip.transformer import VisionTransformer

    side = VisionTransformer((32, 16), 8, 16, 2, 2, 2.0, output_dim=12)
    tower = towers.create(side, embedding=True, frozen=True)
    x, text = torch.randn(2, 3, 32, 16), torch.randn(2, 12)
    found = layer_maps(tower, x, text, layers=["transformer.resblocks.0", "conv1"])
    assert [tuple(one.shape) for one in found.maps.values()] == [(2, 1, 4, 2)] * 2
    cosine = (F.normalize(side(x), dim=1) * F.normalize(text, dim=1)).sum(1)
    torch.testing.assert_close(found.scores, cosine.detach())
    one = layer_maps(tower, x, text[0], layers="conv1")
    torch.testing.assert_close(one.maps["conv1"][0], found.maps["conv1"][0])
    assert not torch.allclose(one.maps["conv1"][1], found.maps["conv1"][1])
    kept = []
    handle = side.transformer.resblocks[0].register_forward_hook(lambda _m, _a, y: kept.append(y.requires_grad_()))
    gradient = torch.autograd.grad(F.cosine_similarity(side(x), text).sum(), kept)[0]
    handle.remove()
    theirs = (kept[0].norm(dim=2) * gradient.norm(dim=2))[:, 1:].detach()
    torch.testing.assert_close(found.maps["transformer.resblocks.0"].flatten(1), theirs)
