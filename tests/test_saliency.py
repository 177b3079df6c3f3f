"""NormGrad on whole networks: golden values, identities, and the property that it cannot tell classes apart."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.saliency_networks import GoldenNetwork, expected, golden, images, targets
from tests.saliency_parts import counted
from zoo.combined_maps import normalize_map
from zoo.saliency import layer_maps, saliency

GOLDEN: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


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
