"""Lists by float32 scores are those of exact scores, whatever comes near their rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.interaction_graph import pair_lists
from zoo.metrics import screening, top_items
from zoo.metrics.screening import can_screen
from zoo.metrics.top_items import nearest_items, ranked_items, topk_items
from zoo.metrics.whole_numbers import row_lengths


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screens whatever it can, in parts of three numbers."""
    monkeypatch.setattr(screening, "_SMALL", 0)
    monkeypatch.setattr(screening, "_PART", 3)
    monkeypatch.setattr(screening, "_ROWS", 16)
    monkeypatch.setattr(top_items, "_ITEMS_PER_SCORE", 0)


def near(seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Users and items: at random, near ties, ties, or vectors that are zero or not finite among them."""
    generator = torch.Generator().manual_seed(seed)
    users, items = (torch.randn(rows, 8, generator=generator) for rows in (20, 70))
    if kind == "near":
        items = items[:10].repeat(7, 1) * (1 + 2e-7 * torch.randn(70, 8, generator=generator))
    if kind == "ties":
        users, items = users.round().clamp(-1, 1), items.round().clamp(-1, 1)
    if kind == "broken":
        items[3], items[5], items[7:30], users[2] = torch.nan, torch.inf, 0, 0
    return users, items


def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_items, "can_screen", lambda *_: False)


@pytest.mark.usefixtures("small")
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["random", "near", "ties", "broken"]),
    k=st.integers(1, 6),
    score=st.sampled_from(["dot", "cosine"]),
    memory=st.sampled_from([20_000, 2**28]),
)
def test_identity_with_exact_lists(seed: int, kind: str, k: int, score: str, memory: int) -> None:
    users, items = near(seed, kind)
    pairs = torch.randint(0, 20 * 70, (200,), generator=torch.Generator().manual_seed(seed))
    exclude = pair_lists(pairs // 70, pairs % 70, num_rows=20, num_columns=70)
    options = {"score": score, "exclude": exclude, "memory": memory}
    assert can_screen(row_lengths(users, memory), row_lengths(items, memory), k, 8)
    found, listed = topk_items(users, items, k, **options), ranked_items(users, items, k, **options)
    finite = items[items.isfinite().all(1)]
    neighbours = nearest_items(finite, k, memory=memory)
    with pytest.MonkeyPatch.context() as patch:
        exact(patch)
        expected = topk_items(users, items, k, **options)
        assert torch.equal(neighbours, nearest_items(finite, k, memory=memory))
    assert torch.equal(found.items, expected.items)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(listed, expected.items)


@pytest.mark.usefixtures("small")
def test_no_list_of_exact_scores_where_float32_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    users, items = near(0, "random")
    expected = ranked_items(users, items, 5), nearest_items(items, 5)
    for name in ("best_lists", "best_neighbours"):
        monkeypatch.setattr(top_items, name, None)
    monkeypatch.setattr(screening, "best_lists", None)
    assert torch.equal(ranked_items(users, items, 5), expected[0])
    assert torch.equal(nearest_items(items, 5), expected[1])


@pytest.mark.parametrize(("width", "dtype"), [(192, torch.float32), (4096, torch.float32), (500, torch.float64)])
def test_bound(width: int, dtype: torch.dtype) -> None:
    """Vectors all of one sign, whose partial sums are largest, and such that cancel."""
    generator = torch.Generator().manual_seed(0)
    for sign in (torch.abs, torch.clone):
        users, items = (sign(torch.randn(30, width, generator=generator, dtype=dtype)) for _ in range(2))
        lengths = users.double().norm(dim=1, keepdim=True) * items.double().norm(dim=1)
        errors = (screening._float32_scores(users, items).double() - users.double() @ items.double().t()) / lengths
        assert errors.abs().max() < screening._error_bound(width)


@pytest.mark.usefixtures("small")
def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that float32 cannot multiply, products in a shorter type, lists as long as the items."""
    ones = torch.ones(50, dtype=torch.float64)
    assert can_screen(ones, ones, 3, 8)
    assert can_screen(ones, torch.cat([ones, torch.tensor([torch.nan, torch.inf, 0.0])]), 3, 8)
    assert not can_screen(ones * 1e-20, ones, 3, 8)
    assert not can_screen(ones, ones * 1e20, 3, 8)
    assert not can_screen(ones * torch.nan, ones, 3, 8)
    assert not can_screen(ones, ones, 40, 8)
    monkeypatch.setattr(screening, "_PROBE", 1 + 2.0**-30)  # which float32 rounds, as shorter types round the true one
    assert not can_screen(ones, ones, 3, 8)


@pytest.mark.usefixtures("small")
def test_autocast_changes_nothing() -> None:
    users, items = near(1, "random")
    expected = ranked_items(users, items, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ranked_items(users, items, 5), expected)
