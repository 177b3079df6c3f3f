"""What losses share: unit vectors at any length."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.losses.contracts import lengths_may_overflow, shrinking_factor, unit_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_rows_at_extreme_lengths(dtype: torch.dtype) -> None:
    """From the longest that the type holds to the shortest that has a direction; a power of two changes nothing."""
    rows = torch.randn(6, 5, dtype=dtype)
    unit = rows / rows.norm(dim=1, keepdim=True)
    largest = math.frexp(torch.finfo(dtype).max)[1] - 4
    for power in (-10, 0, 60, 63, 64, 70, 120, largest):
        torch.testing.assert_close(unit_rows(rows * 2.0**power), unit)
    # Long and short rows do not disturb each other.
    mixed = rows * torch.tensor([1.0, 1e30, 1e-3, 1e20, 1.0, 1e15], dtype=dtype).unsqueeze(1)
    torch.testing.assert_close(unit_rows(mixed), unit)


def test_gradient_of_unit_rows_at_extreme_lengths() -> None:
    rows = (torch.randn(4, 5) * 1e30).requires_grad_()
    exact = rows.detach().double().requires_grad_()
    weights = torch.randn(4, 5)
    (unit_rows(rows) * weights).sum().backward()
    (unit_rows(exact) * weights.double()).sum().backward()
    assert rows.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(rows.grad.double() * 1e30, exact.grad * 1e30, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_stays_visible() -> None:
    rows = torch.tensor([[math.inf, 1.0], [math.nan, 1.0], [1e30, 1e30], [0.0, 0.0]])
    unit = unit_rows(rows)
    assert unit.isnan().all(1).tolist() == [True, True, False, False]
    assert unit[3].tolist() == [0.0, 0.0]


def test_traced_and_eager_agree() -> None:
    """While a graph is traced the contents cannot be looked at: rows are always shrunk, where they need it."""
    rows = torch.cat([torch.randn(3, 4), torch.randn(2, 4) * 1e25])
    compiled = torch.compile(unit_rows, fullgraph=True, backend="eager")
    assert torch.equal(compiled(rows), unit_rows(rows))


def test_shrinking_is_exact() -> None:
    lengths = torch.tensor([0.0, 1.0, 2.0**59, 2.0**61, 3e38, math.inf])
    assert shrinking_factor(lengths).log2().tolist() == [0, 0, 0, -75, -75, -75]
    assert not lengths_may_overflow(lengths[:3])
    assert all(lengths_may_overflow(lengths[:1], length) for length in lengths[3:])
