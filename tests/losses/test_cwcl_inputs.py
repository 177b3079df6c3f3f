"""What zoo.losses.cwcl makes of zeros, ties, extremes, precisions, compilation, and arguments that cannot be used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses.cwcl_cases import dense_directions, dense_weights, double, random_case
from zoo.errors import InputError
from zoo.losses.cwcl import cwcl_loss, cwcl_statistics
from zoo.losses.soft_targets import Kernel, weights_entropy

KERNELS: dict[str, dict[str, Any]] = {
    "affine": {},
    "power": {"exponent": 2.0},
    "exp": {"kernel_temperature": 0.1},
    "topk": {"neighbours": 3},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("direction", ["trained", "both"])
def test_zero_vectors(kernel: Any, direction: Any) -> None:
    """A vector of zeros has the score 0 with all, weighs alike for all, and its gradient is 0."""
    trained, frozen, backbone = random_case()
    with torch.no_grad():
        trained[2], frozen[3], backbone[4] = 0, 0, 0
    options = {"scale": 3.0, "kernel": kernel, "weighted_direction": direction, **KERNELS[kernel]}
    loss = cwcl_loss(trained, frozen, weight_features=backbone, **options)
    gradients = torch.autograd.grad(loss, (trained, frozen))
    assert loss.isfinite()
    assert (gradients[0][2] == 0).all()
    assert (gradients[1][3] == 0).all()
    weights = dense_weights(backbone, kernel, KERNELS[kernel])
    torch.testing.assert_close(weights[4], torch.full((11,), 1 / 11, dtype=torch.float64))
    weighted, hard, reverse = dense_directions(trained, frozen, weights, 3.0)
    torch.testing.assert_close(loss, weighted + (reverse if direction == "both" else hard))
    nothing = cwcl_loss(0 * trained, 0 * frozen, weight_features=0 * backbone, **options)
    torch.testing.assert_close(nothing, double(2 * math.log(11)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_extreme_weights(kernel: Any) -> None:
    """Antipodal features weigh nothing, and no exponent or temperature makes all weights vanish."""
    options: dict[str, Any] = {"kernel": kernel, "exponent": 500.0, "kernel_temperature": 1e-6, "neighbours": 1}
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    trained = torch.randn(3, 4, requires_grad=True)
    loss = cwcl_loss(trained, torch.randn(3, 4), scale=100.0, weight_features=features, **options)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, trained)[0].isfinite().all()
    statistics = cwcl_statistics(trained[:2], trained[:2], scale=1.0, weight_features=features[:2], **options)
    torch.testing.assert_close(statistics["effective_positives"], torch.tensor(1.0))


def test_extreme_temperature() -> None:
    """A cosine that rounding lifts above 1 is 1: divided by 1e-10, the excess would overflow."""
    features = torch.randn(1, 64).repeat(9, 1) * torch.linspace(1, 2, 9).unsqueeze(1)
    trained = torch.randn(9, 64)
    assert cwcl_loss(
        trained, trained, scale=1.0, weight_features=features, kernel="exp", kernel_temperature=1e-10
    ).isfinite()


def test_extreme_ties_beyond_rounding() -> None:
    """Orders of the same numbers have the same cosine with a constant vector, up to rounding."""
    values = torch.randn(64).abs()
    features = torch.stack([torch.ones(64)] + [values[torch.randperm(64)] for _ in range(19)])
    kernel = Kernel.checked("topk", exponent=1.0, kernel_temperature=1.0, neighbours=2)
    entropy = weights_entropy(F.normalize(features, dim=1), kernel, tile=(8, 8))
    assert entropy[0].exp() > 19.5, "all 19 tie for the second place"


def test_extreme_ties_stay_together() -> None:
    """Copies of a sample are equally near: `topk` keeps all or none of them, whatever their place in the batch."""
    features = F.normalize(torch.randn(1, 64), dim=1).repeat(9, 1)
    trained = torch.randn(9, 64)
    statistics = cwcl_statistics(trained, trained, scale=1.0, weight_features=features, kernel="topk", neighbours=2)
    torch.testing.assert_close(statistics["effective_positives"], torch.tensor(9.0))


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_to_compare(kernel: Any) -> None:
    trained, frozen, backbone = random_case(1)
    loss = cwcl_loss(trained, frozen, scale=100.0, weight_features=backbone, kernel=kernel)
    assert loss.abs() < 1e-12
    empty, other, none = random_case(0)
    loss = cwcl_loss(empty, other, scale=100.0, weight_features=none, kernel=kernel)
    assert loss == 0
    loss.backward()
    assert empty.grad is not None
    assert all(value == 0 for value in cwcl_statistics(empty, other, scale=1.0, kernel=kernel).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bad_features_stay_visible(value: float, where: int, kernel: Any) -> None:
    trained, frozen, backbone = (tensor.detach().float() for tensor in random_case())
    (trained, frozen, backbone)[where][3, 1] = value
    assert cwcl_loss(trained, frozen, scale=2.0, weight_features=backbone, kernel=kernel).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision(dtype: torch.dtype, kernel: Any) -> None:
    trained, frozen, backbone = (tensor.detach().mul(300).to(dtype) for tensor in random_case())
    trained.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cwcl_loss(trained, frozen, scale=10.0, weight_features=backbone, kernel=kernel)
        loss.backward()
    assert loss.dtype == torch.float32
    exact = cwcl_loss(trained.double(), frozen.double(), scale=10.0, weight_features=backbone.double(), kernel=kernel)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    assert trained.grad is not None
    assert trained.grad.dtype == dtype


@pytest.mark.parametrize("kernel", ["affine", "topk"])
def test_compile_fullgraph(kernel: Any) -> None:
    inputs = random_case(dtype=torch.float32)
    scale = torch.tensor(3.0, requires_grad=True)

    def loss(trained: Tensor, frozen: Tensor, backbone: Tensor, scale: Tensor) -> Tensor:
        return cwcl_loss(
            trained, frozen, scale=scale, weight_features=backbone, kernel=kernel, weighted_direction="both"
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(*inputs, scale), loss(*inputs, scale)
    torch.testing.assert_close(ours, eager)
    learned = *inputs[:2], scale
    for found, wanted in zip(torch.autograd.grad(ours, learned), torch.autograd.grad(eager, learned), strict=True):
        torch.testing.assert_close(found, wanted)


def test_compile_fullgraph_statistics() -> None:
    trained, frozen, backbone = random_case(dtype=torch.float32)
    compiled = torch.compile(cwcl_statistics, fullgraph=True, backend="aot_eager")
    expected = cwcl_statistics(trained, frozen, scale=2.0, weight_features=backbone)
    torch.testing.assert_close(compiled(trained, frozen, scale=2.0, weight_features=backbone), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained": torch.zeros(4)}, r"trained must have two dimensions"),
        ({"frozen": torch.zeros(4, 5)}, r"frozen must have the shape of trained, got \(4, 5\) and \(4, 3\)"),
        ({"frozen": torch.zeros(4, 3, dtype=torch.int32)}, r"frozen must be floating point, got torch.int32"),
        ({"weight_features": torch.zeros(4)}, r"weight_features must have two dimensions"),
        (
            {"weight_features": torch.zeros(3, 9)},
            r"weight_features must have one row for each row of trained, got 3 and",
        ),
        ({"weight_features": torch.zeros(4, 9, device="meta")}, r"weight_features must be on the device of trained"),
        ({"scale": -1.0}, r"scale must be finite and not negative, got -1.0"),
        ({"kernel": "gauss"}, r"kernel must be one of affine, power, exp, topk, got 'gauss'"),
        ({"kernel": "power", "exponent": 0.0}, r"exponent must be positive and finite, got 0.0"),
        ({"kernel": "exp", "kernel_temperature": 0.0}, r"kernel_temperature must be positive and finite, got 0.0"),
        ({"kernel": "topk", "neighbours": 0}, r"neighbours must be at least 1 .* got 0"),
        ({"chunk_size": 0}, r"chunk_size must be at least 1, or None to let the engine choose, got 0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"trained": torch.zeros(4, 3), "frozen": torch.zeros(4, 3), "scale": 1.0} | change
    for function in (cwcl_loss, cwcl_statistics):
        with pytest.raises(InputError, match=message):
            function(**arguments)


def test_bad_options() -> None:
    zeros: Any = torch.zeros(4, 3)
    wrong: Any = "frozen"
    with pytest.raises(InputError, match="weighted_direction must be one of trained, both, got 'frozen'"):
        cwcl_loss(zeros, zeros, scale=1.0, weighted_direction=wrong)
    with pytest.raises(InputError, match="direction_reduction must be one of sum, mean, got 'frozen'"):
        cwcl_loss(zeros, zeros, scale=1.0, direction_reduction=wrong)


@pytest.mark.parametrize(
    "kernel", [{"kernel": "exp", "kernel_temperature": 1e-20}, {"kernel": "power", "exponent": 1e20}]
)
def test_extreme_kernels_keep_the_sample_itself(kernel: dict[str, Any]) -> None:
    """A cosine with itself that rounding leaves below 1 is 1: the weights never vanish altogether."""
    features, trained = torch.randn(300, 77), torch.randn(300, 8)
    # Nothing but the sample itself is left: InfoNCE in both directions.
    loss = cwcl_loss(trained, trained, scale=1.0, weight_features=features, **kernel)
    plain = cwcl_loss(trained, trained, scale=1.0, weight_features=torch.eye(300), kernel="topk", neighbours=1)
    assert loss.isfinite()
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-4)


def test_weight_features_without_columns() -> None:
    """All are alike then, as with features that are all zero."""
    trained = torch.randn(4, 3)
    losses = [cwcl_loss(trained, trained, scale=2.0, weight_features=torch.zeros(4, width)) for width in (0, 5)]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_extreme_lengths(kernel: Any) -> None:
    """The square of such a length is beyond float32, and lengths are no matter."""
    sides = [tensor.detach().float() for tensor in random_case()]
    wanted = cwcl_loss(*sides[:2], scale=2.0, weight_features=sides[2], kernel=kernel)
    for side in sides:
        side[3] *= 2.0**90
    assert cwcl_loss(*sides[:2], scale=2.0, weight_features=sides[2], kernel=kernel) == wanted
