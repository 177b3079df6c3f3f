"""NormGrad on whole networks: golden values, layouts, and a network that is left as it was."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.saliency_networks import GoldenNetwork, activation_and_gradient, expected, golden, images, targets
from zoo import towers
from zoo.combined_maps import combine_maps, normalize_map
from zoo.contributions import contribution_map
from zoo.errors import InputError
from zoo.layer_taps import find_layers
from zoo.saliency import METHODS, Method, layer_maps, saliency
from zoo.stage_names import stage_names

GOLDEN: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


class Counted(nn.Module):
    """A network with all that a pass could disturb: batch norm, dropout, an in-place ReLU, noise that eval mode keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.fc = nn.Linear(8 * 16, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.drop(self.relu(self.bn(self.conv1(x))))
        x = self.conv2(x)
        x = x.add_(0.0 * torch.rand_like(x)).relu_()
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def counted() -> Counted:
    network = Counted()
    network.bn.eval()  # as users freeze it
    network.conv1.requires_grad_(requires_grad=False)
    return network


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())


def quiet(*args: Any, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return saliency(*args, **options)


# -- golden values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_golden(inplace: bool) -> None:
    """An in-place ReLU behind ``conv2`` would overwrite what the hook saw."""
    network = GoldenNetwork(inplace=inplace)
    found = layer_maps(network, images(), targets(), layers=["relu2", "conv2", "relu1"])
    assert list(found.maps) == ["relu2", "conv2", "relu1"]
    for layer, ours in found.maps.items():
        torch.testing.assert_close(ours, expected("maps", layer, "conv1x1", "norm"), **GOLDEN)
    assert found.output is not None
    torch.testing.assert_close(found.output, expected("logits_flat"), **GOLDEN)
    torch.testing.assert_close(found.scores, expected("logits_flat").gather(1, targets()[:, None]).squeeze(1), **GOLDEN)
    for extract, aggregate, name, part in (
        ("scaling", "selective", "scaling", "posnorm"),
        ("convNxN", "norm", "conv3x3", "norm"),
        ("depthwise", "sum", "dwconv3x3", "sum"),
    ):
        options: Any = {"extract": extract, "aggregate": aggregate}
        ours = saliency(network, images(), targets(), layers="conv2", size="layer", **options)
        torch.testing.assert_close(ours, expected("maps", "conv2", name, part), **GOLDEN)


def test_golden_real_convolution() -> None:
    ours = saliency(GoldenNetwork(), images(), targets(), layers="conv2", extract="conv", size="layer")
    torch.testing.assert_close(ours, expected("real_conv2_norm"), **GOLDEN)


def test_golden_relatives() -> None:
    network = GoldenNetwork()
    for method, name in (
        ("gradient", "gradient_absmax"),
        ("linear", "linear_approx"),
        ("gradcam", "grad_cam"),
        ("layercam", "layer_cam"),
    ):
        ours = saliency(network, images(), targets(), layers="relu2", method=method, size="layer")
        torch.testing.assert_close(ours, expected("baselines_relu2", name), **GOLDEN)


def test_golden_combination() -> None:
    network = GoldenNetwork()
    tolerance: Any = {"rtol": 1e-8, "atol": 1e-9}
    for weights, combine, name in (
        (None, "product", "product"),
        (None, "geomean", "geomean_uniform"),
        ((1, 3), "geomean", "geomean_w_1_3"),
        ((1, 3), "sum", "sum_w_1_3"),
    ):
        options: Any = {"weights": weights, "combine": combine}
        ours = saliency(network, images(), targets(), layers=["relu1", "relu2"], **options)
        torch.testing.assert_close(ours, expected("combine", name), **tolerance)
    selective = saliency(network, images(), targets(), layers=["relu1", "relu2"], method="selective")
    torch.testing.assert_close(selective, expected("combine", "selective_geomean_uniform"), **tolerance)


def test_golden_score() -> None:
    """Back from the cross-entropy instead of the logit."""

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels, reduction="none")

    network = GoldenNetwork()
    ours = saliency(network, images(), targets(), layers="relu2", score=loss, size="layer")
    torch.testing.assert_close(ours, expected("ce_seed", "relu2_conv1x1_norm"), **GOLDEN)
    minus = saliency(
        network, images(), targets(), layers="relu2", score=lambda *pair: -loss(*pair), method="selective", size="layer"
    )
    torch.testing.assert_close(minus, expected("ce_seed", "relu2_scaling_posnorm_of_minus_loss"), **GOLDEN)


@pytest.mark.parametrize(
    ("name", "lr"), [("descent_lr0.05", 0.05), ("ascent_lr0.05", -0.05), ("descent_lr0.0025", 0.0025)]
)
def test_golden_meta(name: str, lr: float) -> None:
    network = GoldenNetwork()
    before = copy.deepcopy(network.state_dict())
    found = layer_maps(network, images(), targets(), layers="relu2", meta_lr=lr)
    assert found.output is not None
    for row, one in enumerate(golden()["expected"]["meta"][name]):
        logits = torch.tensor(one["logits"], dtype=torch.float64)
        torch.testing.assert_close(found.output[row], logits, **GOLDEN)
        theirs = torch.tensor(one["relu2_conv1x1_norm"], dtype=torch.float64)
        torch.testing.assert_close(found.maps["relu2"][row].squeeze(), theirs.squeeze(), **GOLDEN)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


# -- identities ------------------------------------------------------------------------------------------------------


def test_identity_meta_is_a_step_of_sgd() -> None:
    network = counted()
    x = torch.randn(3, 3, 8, 8)
    ours = saliency(network, x, [0, 3, 1], layers="conv2", meta_lr=0.1)
    for row, label in enumerate([0, 3, 1]):
        stepped = copy.deepcopy(network).eval().requires_grad_(requires_grad=True)
        F.cross_entropy(stepped(x[row : row + 1]), torch.tensor([label])).backward()
        torch.optim.SGD(stepped.parameters(), lr=0.1).step()
        theirs = saliency(stepped, x[row : row + 1], label, layers="conv2")
        torch.testing.assert_close(ours[row : row + 1], theirs)
    # For a score of one's own the step makes the score greater.
    embedding = torch.randn(4)
    first, second = (layer_maps(network, x, embedding, layers="conv2", meta_lr=lr).scores for lr in (None, 0.01))
    assert (second > first).all()


def test_identity_gradcam_before_average_pooling() -> None:
    network = GoldenNetwork(gap=True)
    ours, theirs = (
        saliency(network, images(), targets(), layers="relu2", method=method, size="layer")
        for method in ("gradcam", "hirescam")
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, expected("gap", "grad_cam"), **GOLDEN)
    linear = saliency(network, images(), targets(), layers="relu2", method="linear", size="layer")
    torch.testing.assert_close(linear, expected("gap", "linear_approx"), **GOLDEN)


def test_identity_each_image_by_itself() -> None:
    network = counted()
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([3, 0, 2])
    together = saliency(network, x, labels, layers=["bn", "conv2"])
    for row in range(3):
        alone = saliency(network, x[row : row + 1], int(labels[row]), layers=["bn", "conv2"])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_identity_predicted_class() -> None:
    network, x = counted(), torch.randn(4, 3, 8, 8)
    found = layer_maps(network, x, layers="conv2")
    assert found.targets is not None
    assert found.output is not None
    assert torch.equal(found.targets, found.output.argmax(1))
    torch.testing.assert_close(
        saliency(network, x, found.targets, layers="conv2"), saliency(network, x, layers="conv2")
    )


def test_identity_sizes() -> None:
    network, x = counted(), torch.randn(2, 3, 8, 8)
    raw = layer_maps(network, x, 1, layers="conv2").maps["conv2"]
    assert raw.shape == (2, 1, 4, 4)
    assert torch.equal(saliency(network, x, 1, layers="conv2", size="layer"), raw)
    for size, shape in (("input", (8, 8)), ((5, 3), (5, 3))):
        resized = F.interpolate(raw, shape, mode="bilinear", align_corners=False)
        ours: Any = saliency(network, x, 1, layers="conv2", size=size)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, resized)
    assert saliency(network, x, 1, layers=["conv1", "conv2"], size="layer").shape == (2, 1, 8, 8)


def test_identity_of_the_input() -> None:
    network, x = counted().eval(), torch.randn(2, 3, 8, 8)
    leaf = x.clone().requires_grad_()
    network(leaf)[:, 2].sum().backward()
    assert leaf.grad is not None
    kept = x.clone()
    for name in ("", ":input", "conv1:input"):
        ours = saliency(network, x, 2, layers=name, method="gradient")
        torch.testing.assert_close(ours, leaf.grad.abs().amax(1, keepdim=True))
    assert torch.equal(x, kept)
    assert not x.requires_grad


def test_identity_real_convolutions_in_a_network() -> None:
    """Grouped, with a stride, ``padding="same"`` and other padding than zeros: the gradient of the weights, by place."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), nn.ReLU(inplace=True),
        nn.Flatten(), nn.LazyLinear(3),
    ).double().eval()  # fmt: skip
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    network(x)
    found = layer_maps(network, x, 1, layers=["0", "2"], extract="conv")
    for (name, ours), place in itertools.product(found.maps.items(), ((1, 2), (0, 3))):
        layer: Any = network.get_submodule(name)

        def only_there(_module: nn.Module, _args: Any, output: Tensor, place: tuple[int, int] = place) -> Tensor:
            mask = torch.zeros(output.shape[2:], dtype=torch.bool)
            mask[place] = True
            return torch.where(mask, output, output.detach())

        handle = layer.register_forward_hook(only_there)
        (gradient,) = torch.autograd.grad(network(x)[0, 1], layer.weight)
        handle.remove()
        torch.testing.assert_close(ours[0, 0][place], gradient.norm(), rtol=1e-10, atol=1e-12)


def test_identity_input_of_a_convolution_that_changes_afterwards() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1, bias=False)
            self.fc = nn.Linear(3 * 9, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = 2 * x
            y = self.conv(x)
            x.zero_()
            logits: Tensor = self.fc(y.flatten(1))
            return logits

    network, x = Later(), torch.randn(1, 2, 3, 3)
    ours = saliency(network, x, 1, layers="conv", extract="conv")
    gradient = network.fc.weight[1].detach().view(1, 3, 3, 3)
    torch.testing.assert_close(ours, (2 * x).norm(dim=1, keepdim=True) * gradient.norm(dim=1, keepdim=True))


# -- the known property ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"extract": "convNxN"}, {"aggregate": "selective"}], ids=str)
def test_normgrad_cannot_tell_classes_apart_before_average_pooling(options: dict[str, Any]) -> None:
    """A property of the method and no defect: one linear layer behind a mean gives every place the same gradient."""
    network = GoldenNetwork(gap=True)
    maps = []
    for label in range(3):
        with pytest.warns(
            UserWarning, match="the same map for every class.*method='selective' or 'gradcam', or an earlier"
        ):
            maps.append(normalize_map(saliency(network, images(), label, layers="relu2", size="layer", **options)))
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[0], maps[2])
    if not options:
        theirs = expected("gap", "conv1x1_norm_minmax_any_class")
        torch.testing.assert_close(maps[0], theirs, rtol=1e-8, atol=1e-9)
    first, second = (saliency(network, images(), k, layers="relu2", method="selective") for k in (0, 2))
    assert not torch.allclose(normalize_map(first), normalize_map(second), atol=0.05)
    earlier = [normalize_map(saliency(network, images(), k, layers="relu1")) for k in (0, 2)]
    assert not torch.allclose(*earlier, atol=0.05)


def test_the_warning_comes_once() -> None:
    network = GoldenNetwork(gap=True)
    with pytest.warns(UserWarning, match="the same map for every class") as caught:
        saliency(network, images(), layers=["relu1", "relu2"])
    assert [str(one.message)[:7] for one in caught] == ["'relu2'"]
    assert caught[0].filename == __file__


def test_bias_is_constant_before_average_pooling() -> None:
    with (
        pytest.warns(UserWarning, match="'relu2': the gradient is the same"),
        pytest.warns(UserWarning, match="'relu2' is constant for 2 of 2 images"),
    ):
        found = saliency(GoldenNetwork(gap=True), images(), targets(), layers=["relu1", "relu2"], extract="bias")
    alone = saliency(GoldenNetwork(gap=True), images(), targets(), layers="relu1", extract="bias")
    torch.testing.assert_close(found, normalize_map(alone))


def test_zero_gradients_are_named() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
    nn.init.normal_(network.head.weight)
    with pytest.warns(UserWarning, match=r"zero everywhere at 'blocks.1', and so is the map.*its norm1"):
        found = saliency(network, torch.randn(1, 3, 32, 32), layers="blocks.1")
    assert not found.any()


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
