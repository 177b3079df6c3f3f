"""zoo.metrics.top_items against a sort of exact fractions, one user at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.largest_tensor import LargestTensor
from zoo.errors import InputError
from zoo.interaction_graph import pair_lists
from zoo.metrics.top_items import nearest_items, topk_items


def plain(users: Tensor, items: Tensor, k: int, *, cosine: bool, allowed: list[set[int]]) -> list[list[int]]:
    """Sort by score rounded to 1e-5, then by number."""
    result = []
    for user, wanted in zip(users.double(), allowed, strict=True):
        scores = {}
        for item in wanted:
            vector = items[item].double()
            length = (user.norm() * vector.norm()).item() or 1.0
            scores[item] = round((user @ vector).item() / (length if cosine else 1), 5)
        row = sorted(scores, key=lambda item: (-scores[item], item))[:k]
        result.append(row + [-1] * (k - len(row)))
    return result


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 12),
    cosine=st.booleans(),
    coarse=st.booleans(),
    some=st.booleans(),
    memory=st.sampled_from([1, 300, 2000, 2**28]),
)
def test_properties(seed: int, k: int, cosine: bool, coarse: bool, some: bool, memory: int) -> None:
    """Ties, zeros, excluded items, candidates, any blocks: what a sort of all scores says."""
    generator = torch.Generator().manual_seed(seed)
    users, items = (torch.randn(rows, 3, generator=generator) for rows in (5, 9))
    if coarse:
        users, items = (side.mul(1.5).round().clamp(-1, 1) for side in (users, items))
    pairs = torch.randint(0, 45, (12,), generator=generator)
    exclude = pair_lists(pairs // 9, pairs % 9, num_rows=5, num_columns=9)
    candidates = torch.randperm(9, generator=generator)[:6] if some else None
    wanted = set(candidates.tolist()) if candidates is not None else set(range(9))
    allowed = [wanted - {pair % 9 for pair in pairs.tolist() if pair // 9 == user} for user in range(5)]
    found = topk_items(
        users,
        items,
        k,
        score="cosine" if cosine else "dot",
        exclude=exclude,
        candidates=candidates,
        memory=memory,
    )
    places = min(k, len(wanted))
    assert found.items.tolist() == plain(users, items, places, cosine=cosine, allowed=allowed)
    scores = users @ items.t()
    if cosine:
        scores = scores / (users.norm(dim=1, keepdim=True) * items.norm(dim=1)).clamp_min(1e-9)
    expected = scores.gather(1, found.items.clamp_min(0)).masked_fill(found.items < 0, -math.inf)
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", [1, 4000, 2**28])
def test_identity_equal_items_in_their_order(memory: int) -> None:
    """Rounding that depends on the place in the matrix product does not break ties."""
    torch.manual_seed(0)
    items = torch.randn(1, 77).expand(101, -1).clone()
    users = torch.randn(7, 77)
    found = topk_items(users, items, 20, memory=memory)
    assert (found.items == torch.arange(20)).all()


def test_identity_any_batch_and_blocks() -> None:
    torch.manual_seed(0)
    users, items = torch.randn(20, 16), torch.randn(80, 16) * torch.rand(80, 1) ** 4
    expected = topk_items(users, items, 10)
    for memory in (1, 5000, 20_000):
        assert torch.equal(topk_items(users, items, 10, memory=memory).items, expected.items)
    parts = torch.cat([topk_items(part, items, 10).items for part in users.split(7)])
    assert torch.equal(parts, expected.items)
    exact = (users.double() @ items.double().t()).topk(10, dim=1)
    assert torch.equal(expected.items, exact.indices)
    torch.testing.assert_close(expected.scores, exact.values.float(), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), coarse=st.booleans(), k=st.integers(0, 7), memory=st.sampled_from([1, 2000, 2**28]))
def test_properties_nearest(seed: int, coarse: bool, k: int, memory: int) -> None:
    """Half of the products give the neighbours that the whole search gives."""
    items = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    items = items.mul(1.5).round().clamp(-1, 1) if coarse else items
    allowed = [set(range(8)) - {item} for item in range(8)]
    assert nearest_items(items, k, memory=memory).tolist() == plain(items, items, k, cosine=True, allowed=allowed)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_half_precision_and_extreme_lengths(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    users, items = torch.randn(3, 4).to(dtype), torch.randn(9, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = topk_items(users, items, 4), topk_items(scale * users, items, 4)
        other = topk_items(users, (scale * items.double()).to(dtype), 4)
    assert torch.equal(found.items, expected.items)
    assert torch.equal(other.items, expected.items)
    assert found.scores.dtype == torch.float32


def test_degenerate() -> None:
    items = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [2.0, 0.0], [-math.inf, 0.0], [0.0, 0.0]])
    users = torch.tensor([[1.0, 0.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    found = topk_items(users, items, 4)
    assert found.items.tolist() == [[2, 0, 4, -1], [0, 2, 4, -1], [-1] * 4, [-1] * 4]
    assert found.scores.tolist() == [[2, 1, 0, -math.inf], [0, 0, 0, -math.inf], [-math.inf] * 4, [-math.inf] * 4]
    assert topk_items(users[:0], items, 2).items.shape == (0, 2)
    assert topk_items(users, items[:0], 2).items.shape == (4, 0)
    none = torch.zeros(0, dtype=torch.int64)
    exclude = pair_lists(none, none, num_rows=4, num_columns=5)
    assert topk_items(users, items, 2, candidates=none, exclude=exclude).scores.shape == (4, 0)
    assert topk_items(users[:2], torch.zeros(3, 2), 2).items.tolist() == [[0, 1], [0, 1]]


def test_memory() -> None:
    """No tensor is larger than the budget; the whole matrix would be 160,000 numbers, 1.3 MB."""
    torch.manual_seed(0)
    users, items = torch.randn(200, 1), torch.randn(800, 1)
    with LargestTensor() as largest:
        topk_items(users, items, 2, memory=50_000)
    assert 8 * largest.numel <= 50_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"score": "l2"}, "score must be one of dot, cosine, got 'l2'"),
        ({"memory": 0}, "memory must be at least 1 byte, got 0"),
        ({"items": torch.ones(4, 2)}, "items must have the width and device of users, got 2 on cpu and 3"),
        ({"users": torch.ones(4)}, "users must have two dimensions"),
        ({"candidates": torch.tensor([0, 4])}, r"candidates must be positions in 0 … 3, found 4"),
        ({"candidates": torch.tensor([0.5])}, "candidates must be positions of items, whole numbers"),
        (
            {"exclude": pair_lists(torch.tensor([0]), torch.tensor([0]), num_rows=3, num_columns=4)},
            r"exclude must have one list for each of the 2 rows, got 3; pick theirs with \.select",
        ),
        (
            {"exclude": pair_lists(torch.tensor([0]), torch.tensor([7]), num_rows=2, num_columns=8)},
            r"exclude must hold numbers in 0 … 3, found 7",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"users": torch.ones(2, 3), "items": torch.ones(4, 3), "k": 1} | options
    with pytest.raises(InputError, match=message):
        topk_items(**arguments)


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (torch.ones(3, 2), {"k": 3}, "k must be in 0 … 2, because 3 items have so many others, got 3"),
        (torch.ones(3, 2), {"k": 1, "memory": 0}, "memory must be at least 1 byte"),
        (torch.tensor([[1.0], [math.nan]]), {"k": 1}, "items must be finite, row 1 is not"),
    ],
)
def test_bad_nearest(items: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nearest_items(items, **options)


def test_bad_candidates_in_complex_numbers() -> None:
    with pytest.raises(InputError, match="candidates must be positions of items"):
        topk_items(torch.ones(1, 2), torch.ones(3, 2), 1, candidates=torch.zeros(2, dtype=torch.complex64))
