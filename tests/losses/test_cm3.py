"""zoo.losses.cm3 against the numbers of the notes and the matrices of the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.largest_tensor import LargestTensor
from zoo.errors import InputError
from zoo.losses.cm3 import alignment_loss, calibrated_uniformity_loss, calibration_statistics, uniformity_loss
from zoo.losses.pair_log_sum import row_blocks

# Inputs and numbers: section 7.3 of the project's notes on CM3 (shared/papers/cm3.md), compared there with the official
# functions in float64.
X_USER = [[0, 1, 0], [0.8, 0.6, 0], [0, 0, 1], [-0.6, 0, 0.8]]
X_ITEM = [[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8], [-0.8, 0, 0.6]]
M = [[1, 0], [0.6, 0.8], [-0.6, 0.8], [0.9, 0.1]]
CALIBRATED = {(0, 0.8): 0.6113620967, (0, 1): 0.6112810200, (1, 1): -2.5393536123, (0, 0): 1.4606463877}
OF_M = [
    [0.0000000000, -0.2893926808],
    [0.3847796095, -0.2885847071],
    [-0.6182930453, -0.4637197839],
    [0.0003047700, -0.0027429300],
]
OF_X_ITEM = [
    [0.0000000000, 0.5064371914, 0.2897533127],
    [-0.0021013208, 0.0015759906, 0.6461125681],
    [-1.1291531643, -0.2984214010, 0.2238160507],
    [0.9484460310, 1.4831946762, 1.2645947080],
]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-10}


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def plain(
    x: Tensor,
    features: Tensor | None = None,
    *,
    t: float = 2.0,
    min_similarity: float = 0.0,
    max_similarity: float = 1.0,
    detach_similarity: bool = False,
) -> Tensor:
    """The formula over a list of pairs, with squared distances."""
    x = F.normalize(x)
    first, second = torch.triu_indices(len(x), len(x), 1)
    scores = -t * (x[first] - x[second]).square().sum(1)
    if features is not None:
        units = F.normalize(features.detach() if detach_similarity else features)
        cosines = (units[first] * units[second]).sum(1)
        scores = scores + 2 * t * (1 - cosines.clamp(min_similarity, max_similarity))
    return scores.exp().mean().log()


def random_case(rows: int = 13, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 5, dtype=dtype).requires_grad_(), torch.randn(rows, 3, dtype=dtype).requires_grad_()


def test_golden() -> None:
    users, items, features = double(X_USER), double(X_ITEM), double(M)
    assert alignment_loss(users, items).item() == pytest.approx(0.64, abs=2e-10)
    assert uniformity_loss(users).item() == pytest.approx(-2.1358600896, abs=2e-10)
    assert uniformity_loss(items).item() == pytest.approx(-2.5393536123, abs=2e-10)
    for (lowest, highest), expected in CALIBRATED.items():
        value = calibrated_uniformity_loss(items, features, min_similarity=lowest, max_similarity=highest)
        assert value.item() == pytest.approx(expected, abs=2e-10)
    total = alignment_loss(users, items) + 0.25 * (
        uniformity_loss(users) + calibrated_uniformity_loss(items, features, max_similarity=0.8)
    )
    assert total.item() == pytest.approx(0.2588755018, abs=2e-10)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
def test_golden_gradients(chunk_size: int | None) -> None:
    items, features = double(X_ITEM).requires_grad_(), double(M).requires_grad_()
    loss = calibrated_uniformity_loss(items, features, max_similarity=0.8, chunk_size=chunk_size)
    of_items, of_features = torch.autograd.grad(loss, (items, features))
    torch.testing.assert_close(of_items, double(OF_X_ITEM), **CLOSE)
    torch.testing.assert_close(of_features, double(OF_M), **CLOSE)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"t": 0.3, "max_similarity": 0.4},
    {"t": 60.0, "min_similarity": -1.0},
    {"min_similarity": -0.2, "max_similarity": 0.2},
    {"detach_similarity": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13])
def test_identity_dense(options: dict[str, Any], chunk_size: int | None) -> None:
    """Any blocks give value and gradients of the list of pairs, with rows that are there twice.

    The largest terms of the plain uniformity are in the last blocks: what was summed before has to shrink.
    """
    x, features = random_case()
    doubled = torch.cat([x, x[-4:]]), torch.cat([features, features[-4:]])
    loss = calibrated_uniformity_loss(*doubled, chunk_size=chunk_size, **options)
    expected = plain(*doubled, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    inputs = [x] if options.get("detach_similarity") else [x, features]
    for mine, other in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    alone = uniformity_loss(doubled[0], t=options.get("t", 2.0), chunk_size=chunk_size)
    expected = plain(doubled[0], t=options.get("t", 2.0))
    torch.testing.assert_close(alone, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(alone, x), torch.autograd.grad(expected, x), rtol=1e-9, atol=1e-11)


def test_identity_constant_similarity() -> None:
    """s = 1 is the plain uniformity, s = 0 that and 2t."""
    x, features = random_case()
    plain_value = uniformity_loss(x, t=1.5)
    one = calibrated_uniformity_loss(x, features, t=1.5, min_similarity=1.0, max_similarity=1.0)
    none = calibrated_uniformity_loss(x, features, t=1.5, min_similarity=0.0, max_similarity=0.0)
    torch.testing.assert_close(one, plain_value)
    torch.testing.assert_close(none, plain_value + 3)


def test_gradcheck() -> None:
    x, features = random_case(6)
    options: dict[str, Any] = {"min_similarity": -0.3, "max_similarity": 0.6, "chunk_size": 2}
    assert torch.autograd.gradcheck(lambda a, b: calibrated_uniformity_loss(a, b, **options), (x, features))
    assert torch.autograd.gradgradcheck(lambda a, b: calibrated_uniformity_loss(a, b, **options), (x, features))
    assert torch.autograd.gradgradcheck(lambda a: uniformity_loss(a, chunk_size=4), (x,))
    assert torch.autograd.gradcheck(alignment_loss, (x, x.detach().flip(0).requires_grad_()))


def test_stop_gradient_of_similarities() -> None:
    x, features = random_case()
    assert calibrated_uniformity_loss(x.detach(), features).requires_grad
    assert not calibrated_uniformity_loss(x.detach(), features, detach_similarity=True).requires_grad
    with torch.no_grad():
        assert not calibrated_uniformity_loss(x, features).requires_grad


def test_clip_passes_gradients_on_the_closed_interval() -> None:
    """Orthogonal features are on the lower bound of 0, opposite ones beyond it."""
    x = torch.eye(2, dtype=torch.float64)
    gradients = []
    for second in ([0.0, 1.0], [-1.0, 0.1]):
        features = double([[1.0, 0.0], second]).requires_grad_()
        gradients.append(torch.autograd.grad(calibrated_uniformity_loss(x, features), features)[0])
    assert gradients[0].any()
    assert not gradients[1].any()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), rows=st.integers(2, 9), scale=st.sampled_from([1e-3, 1.0, 1e10]))
def test_properties(seed: int, rows: int, scale: float) -> None:
    """Lengths and order do not matter, bounds hold, and the gradient is finite and tangent."""
    generator = torch.Generator().manual_seed(seed)
    x, features = (torch.randn(rows, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    value = calibrated_uniformity_loss(x, features, max_similarity=0.8)
    order = torch.randperm(rows, generator=generator)
    scaled = (scale * x[order]).requires_grad_()
    again = calibrated_uniformity_loss(scaled, 3 * features[order], max_similarity=0.8, chunk_size=2)
    torch.testing.assert_close(again, value)
    assert -2 * 2 * 1.8 <= value <= 4
    assert -8 <= uniformity_loss(x) <= 1e-12
    assert 0 <= alignment_loss(x, features) <= 4
    (gradient,) = torch.autograd.grad(again, scaled)
    assert gradient.isfinite().all()
    assert ((gradient * scaled).sum(1).abs() < 1e-9).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_without_a_pair(rows: int) -> None:
    x, features = random_case(rows)
    loss = calibrated_uniformity_loss(x, features) + uniformity_loss(x)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (x, features)))
    assert calibration_statistics(features)["clipped_share"].item() == 0
    assert alignment_loss(x[:0], x[:0]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_rows(dtype: torch.dtype) -> None:
    """Equal and opposite rows, and zeros, which have the cosine 0 with all others: finite, gradient 0 for zeros."""
    equal = torch.ones(4, 3, dtype=dtype).requires_grad_()
    loss = uniformity_loss(equal)
    torch.testing.assert_close(loss, torch.zeros((), dtype=dtype), rtol=0, atol=1e-6)
    assert torch.autograd.grad(loss, equal)[0].abs().max() < 1e-6
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(uniformity_loss(opposite), torch.full((), -8.0, dtype=dtype))
    torch.testing.assert_close(alignment_loss(opposite[:1], opposite[1:]), torch.full((), 4.0, dtype=dtype))
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=dtype).requires_grad_()
    features = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]], dtype=dtype).requires_grad_()
    loss = calibrated_uniformity_loss(x, features)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (x, features)):
        assert gradient.isfinite().all()
        assert not gradient[1].any()
    torch.testing.assert_close(alignment_loss(x[:2], x[1:]), torch.full((), 2.0, dtype=dtype))


def test_alignment_keeps_precision() -> None:
    """The gradient of nearly aligned rows is theirs and not that of rounding."""
    torch.manual_seed(0)
    x = torch.randn(50, 16)
    y = x + 1e-5 * torch.randn(50, 16)
    single, exact = (x.clone().requires_grad_(), x.double().requires_grad_())
    values = alignment_loss(single, y), alignment_loss(exact, y.double())
    torch.testing.assert_close(values[0].double(), values[1], rtol=5e-2, atol=0)
    gradients = torch.autograd.grad(values[0], single)[0], torch.autograd.grad(values[1], exact)[0]
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


def test_not_a_number_stays_visible() -> None:
    x, features = random_case()
    for value in (math.nan, math.inf):
        broken = features.detach().clone()
        broken[-1, 0] = value
        assert calibrated_uniformity_loss(x, broken).isnan()
        assert uniformity_loss(broken, chunk_size=5).isnan()
        assert alignment_loss(broken, features).isnan()
        assert calibration_statistics(broken)["similarity"].isnan()
    assert uniformity_loss(torch.full((1, 2), math.nan)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, features = (side.detach().to(dtype).requires_grad_() for side in random_case(40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = calibrated_uniformity_loss(x, features, chunk_size=7)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain(x.double(), features.double()), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(loss, x)[0].dtype == dtype


def test_compile() -> None:
    x, features = random_case()

    def total(x: Tensor, features: Tensor) -> Tensor:
        return alignment_loss(x[:, :3], features) + uniformity_loss(x) + calibrated_uniformity_loss(x, features)

    expected = torch.autograd.grad(total(x, features), (x, features))
    result = torch.compile(total, fullgraph=True, backend="aot_eager")(x, features)
    for mine, other in zip(torch.autograd.grad(result, (x, features)), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_memory() -> None:
    """No tensor is larger than three blocks; the matrix of pairs would be 640,000 numbers."""
    x, features = random_case(800)
    with LargestTensor() as largest:
        torch.autograd.grad(calibrated_uniformity_loss(x, features, chunk_size=8), (x, features))
    assert largest.numel <= 3 * 8 * 800


@pytest.mark.parametrize(("rows", "size"), [(2, 1), (2, 2), (3, 2), (9, 2), (16, 3), (17, 4)])
def test_shares_are_all_pairs_once(rows: int, size: int) -> None:
    seen = torch.zeros(rows, rows, dtype=torch.int64)
    for rank in range(size):
        for own in row_blocks(rows, rank=rank, size=size, row_tile=3):
            assert own.start < own.stop < rows
            for row in range(own.start, own.stop):
                seen[row, row + 1 :] += 1
    assert torch.equal(seen, torch.ones(rows, rows, dtype=torch.int64).triu(1))


def test_statistics() -> None:
    """Against the pairs one by one: cosines 0.6, -0.6, 0.9939, 0.28, 0.6847, -0.5080."""
    statistics = calibration_statistics(double(M), max_similarity=0.8, chunk_size=2)
    units = F.normalize(double(M))
    cosines = [float(units[b] @ units[c]) for b in range(4) for c in range(b + 1, 4)]
    expected = sum(min(max(cosine, 0), 0.8) for cosine in cosines) / 6
    assert statistics["similarity"].item() == pytest.approx(expected)
    assert statistics["clipped_share"].item() == pytest.approx(3 / 6)
    assert statistics["clipped_above"].item() == pytest.approx(1 / 6)
    same = calibration_statistics(torch.ones(5, 7), max_similarity=1.0)
    assert same["similarity"].item() == pytest.approx(1)
    assert same["clipped_share"].item() == 0  # rounding is no clipping
    assert not calibration_statistics(torch.ones(5, 7, requires_grad=True))["similarity"].requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t": 0.0}, r"t must be positive and finite, got 0\.0"),
        ({"min_similarity": 0.9, "max_similarity": 0.8}, r"-1 <= min_similarity <= max_similarity <= 1, got 0\.9 and"),
        ({"max_similarity": 1.5}, r"must be cosines, .* got 0\.0 and 1\.5"),
        ({"min_similarity": math.nan}, "got nan and"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"features": torch.ones(3, 2)}, "features must have one row for each row of x, got 3 and 2"),
        ({"features": torch.ones(2)}, r"features must have two dimensions"),
        ({"features": torch.ones(2, 2, device="meta")}, "features must be on the device of x, got meta and cpu"),
        ({"x": torch.ones(2, 2, dtype=torch.int64)}, "x must be floating point"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(2, 3), "features": torch.ones(2, 2)} | options
    with pytest.raises(InputError, match=message):
        calibrated_uniformity_loss(**arguments)


def test_bad_alignment() -> None:
    with pytest.raises(InputError, match="y must have the shape of x"):
        alignment_loss(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(InputError, match="max_similarity"):
        calibration_statistics(torch.ones(2, 3), max_similarity=2.0)
