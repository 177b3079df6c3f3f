"""zoo.metrics.FullRanking against the notes' numbers and a loop over users, alone and in two processes."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from tests.processes import run_processes
from zoo.errors import InputError
from zoo.interaction_graph import PairLists, pair_lists
from zoo.metrics.ranking import MEASURES, FullRanking, ranking_values

# Section 7.5 of the project's notes on CM3 (shared/papers/cm3.md), compared there with the official metrics.
HITS = [[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 1, 1, 1, 0]]
HELD_OUT = [3, 1, 7]
GOLDEN = {
    1: (0.1111111111, 0.3333333333, 0.3333333333, 0.3333333333),
    2: (0.1587301587, 0.3333333333, 0.3333333333, 0.2500000000),
    3: (0.3174603175, 0.4115464543, 0.4444444444, 0.3148148148),
    5: (0.6984126984, 0.5401352045, 0.4000000000, 0.3796296296),
}


def plain(scores: Tensor, wanted: list[set[int]], seen: list[set[int]], ks: tuple[int, ...]) -> dict[str, float]:
    """The definitions, user by user and place by place."""
    users = [user for user in range(len(scores)) if wanted[user]]
    result = {}
    for k in ks:
        sums = dict.fromkeys(MEASURES, 0.0)
        for user in users:
            order = [item for item in range(scores.shape[1]) if item not in seen[user]]
            order.sort(key=lambda item: (-round(scores[user, item].item(), 5), item))
            hits = [float(item in wanted[user]) for item in order[:k]]
            n = len(wanted[user])
            sums["recall"] += sum(hits) / n
            best = sum(1 / math.log2(j + 2) for j in range(min(n, k)))
            sums["ndcg"] += sum(hit / math.log2(j + 2) for j, hit in enumerate(hits)) / best
            sums["precision"] += sum(hits) / k
            sums["map"] += sum(hit * sum(hits[: j + 1]) / (j + 1) for j, hit in enumerate(hits)) / min(n, k)
        result |= {f"{name}@{k}": value / len(users) for name, value in sums.items()}
    return result


def values(metric: FullRanking) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def random_case(seed: int = 0, users: int = 7, items: int = 12) -> tuple[Tensor, Tensor, PairLists, PairLists]:
    """Users (the last one without held-out items), items, held-out and seen ones."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(rows, 3, generator=generator) for rows in (users, items)]
    pairs = torch.randperm(users * items, generator=generator)
    lists = []
    for some in (pairs[: 3 * users], pairs[3 * users : 6 * users]):
        part = some[some // items < users - 1]
        lists.append(pair_lists(part // items, part % items, num_rows=users, num_columns=items))
    return sides[0], sides[1], lists[0], lists[1]


def as_sets(lists: PairLists) -> list[set[int]]:
    return [set(lists.columns[a:b].tolist()) for a, b in pairwise(lists.offsets.tolist())]


def test_golden() -> None:
    table = ranking_values(torch.tensor(HITS).bool(), torch.tensor(HELD_OUT), list(GOLDEN))
    assert table.shape == (4, 3, 4)
    for column, expected in enumerate(GOLDEN.values()):
        assert table[:, :, column].mean(1).tolist() == pytest.approx(expected, abs=1e-10)


def test_golden_metric() -> None:
    """The same lists, made of scores: item j of five is on place j for everybody, and two more items cannot be found."""
    rows, columns = torch.tensor(HITS).nonzero(as_tuple=True)
    # The held-out items that no hit stands for are among those that are never found.
    more = torch.tensor([0, 2, 2, 2, 2]), torch.tensor([5, 5, 6, 7, 8])
    held_out = pair_lists(torch.cat([rows, more[0]]), torch.cat([columns, more[1]]), num_rows=3, num_columns=9)
    assert held_out.lengths().tolist() == HELD_OUT
    metric = FullRanking(k=tuple(GOLDEN))
    metric.update(torch.ones(3, 1), torch.arange(9, 0, -1).float().unsqueeze(1), held_out)
    for k, expected in GOLDEN.items():
        found = [values(metric)[f"{name}@{k}"] for name in MEASURES]
        assert found == pytest.approx(expected, abs=1e-7)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    coarse=st.booleans(),
    memory=st.sampled_from([1, 1000, 2**28]),
    cut=st.integers(0, 7),
    cosine=st.booleans(),
)
def test_properties(seed: int, coarse: bool, memory: int, cut: int, cosine: bool) -> None:
    """Ties, seen items, users without held-out ones, short lists, any batches: what a loop says, to the last bit."""
    users, items, held_out, seen = random_case(seed)
    if coarse:
        users, items = users.round().clamp(-1, 1), items.round().clamp(-1, 1)
    scores = users.double() @ items.double().t()
    if cosine:
        scores = scores / (users.norm(dim=1, keepdim=True) * items.norm(dim=1)).clamp_min(1e-9)
    metric = FullRanking(k=(1, 3, 20), memory=memory, score="cosine" if cosine else "dot")
    for rows in (torch.arange(cut), torch.arange(cut, 7)):
        metric.update(users[rows], items, held_out.select(rows), seen.select(rows))
    assert values(metric) == pytest.approx(plain(scores, as_sets(held_out), as_sets(seen), (1, 3, 20)), abs=1e-7)
    whole = FullRanking(k=(1, 3, 20), score="cosine" if cosine else "dot")
    whole.update(users, items, held_out, seen)
    assert torch.equal(whole.sums, metric.sums)
    assert metric.users == whole.users == sum(map(bool, as_sets(held_out)))


def test_held_out_item_that_was_seen_is_a_miss() -> None:
    held_out = pair_lists(torch.tensor([0, 0]), torch.tensor([0, 1]), num_rows=1, num_columns=3)
    seen = pair_lists(torch.tensor([0]), torch.tensor([0]), num_rows=1, num_columns=3)
    metric = FullRanking(k=3)
    metric.update(torch.ones(1, 1), torch.tensor([[3.0], [2.0], [1.0]]), held_out, seen)
    assert values(metric)["recall@3"] == 0.5


def test_not_finite_embeddings_find_nothing() -> None:
    users, items, held_out, _ = random_case()
    metric = FullRanking(k=50)
    metric.update(torch.full_like(users, math.nan), items, held_out)
    assert values(metric)["recall@50"] == 0
    assert metric.users == 6


def test_no_user() -> None:
    metric = FullRanking(k=2)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert all(math.isnan(value) for value in values(metric).values())
    users, items, held_out, _ = random_case()
    metric.update(users[6:], items, held_out.select(torch.tensor([6])))
    metric.update(users[:0], items, held_out.select(torch.zeros(0, dtype=torch.int64)))
    assert metric.users == 0
    assert all(math.isnan(value) for value in values(metric).values())


def test_pickle_reset_types_and_collection() -> None:
    users, items, held_out, seen = random_case()
    metric = FullRanking(k=(2, 5))
    metric.update(users, items, held_out, seen)
    again = pickle.loads(pickle.dumps(metric)).to(torch.bfloat16)
    again.set_dtype(torch.float16)
    assert again.sums.dtype == torch.int64
    assert values(again) == values(metric)
    metric.reset()
    assert not metric.sums.any()
    assert metric.state_dict() == {}
    both = MetricCollection({"dot": FullRanking(k=1), "cosine": FullRanking(k=1, score="cosine")}, prefix="val/")
    only = pair_lists(torch.tensor([0]), torch.tensor([0]), num_rows=1, num_columns=2)
    for second in ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [2.0, 1.0]]):  # they differ in the second batch
        both.update(torch.tensor([[1.0, 0.0]]), torch.tensor(second), only)
    assert both.compute()["val/dot_recall@1"] == 0.5
    assert both.compute()["val/cosine_recall@1"] == 1.0


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    users, items, held_out, seen = random_case(users=7)
    results: dict[str, Any] = {}
    for name, shards in {"odd": [[0, 3, 5, 6], [1, 2, 4]], "one is empty": [[], list(range(7))]}.items():
        metric = FullRanking(k=(1, 3))
        rows = torch.tensor(shards[rank], dtype=torch.int64)
        for part in rows.split(2):
            metric.update(users[part], items, held_out.select(part), seen.select(part))
        results[name] = metric.compute()
    return results


def test_two_processes_equal_one(tmp_path: Any) -> None:
    """No padding: seven users on two processes, and all on one of them, give the same bits."""
    users, items, held_out, seen = random_case(users=7)
    metric = FullRanking(k=(1, 3))
    metric.update(users, items, held_out, seen)
    expected = metric.compute()
    assert 0 < expected["recall@3"] < 1
    for result in run_processes(on_rank, world_size=2, folder=tmp_path):
        assert result["odd"] == expected
        assert result["one is empty"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": ()}, "k must be one whole number"),
        ({"k": (0, 5)}, "k must be one whole number"),
        ({"score": "l2"}, "score must be one of dot, cosine"),
        ({"memory": 0}, "memory must be at least 1 byte"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FullRanking(**options)


def test_bad_update() -> None:
    users, items, held_out, seen = random_case()
    metric = FullRanking(k=2)
    with pytest.raises(InputError, match=r"held_out must have one list for each of the 3 rows, got 7; pick theirs"):
        metric.update(users[:3], items, held_out)
    with pytest.raises(InputError, match=r"seen must hold numbers in 0 … 3"):
        metric.update(users, items[:4], PairLists(torch.zeros(8, dtype=torch.int64), held_out.columns[:0]), seen)
    with pytest.raises(InputError, match="item_embeddings must be floating point"):
        metric.update(users, items.long(), held_out)
    assert metric.users == 0


@pytest.mark.parametrize(
    ("hits", "held_out", "ks", "match"),
    [
        (torch.zeros(2, 3), torch.ones(2).long(), [1], "hits must be bool"),
        (torch.zeros(2, 3, 1).bool(), torch.ones(2).long(), [1], "hits must be bool"),
        (torch.zeros(2, 3).bool(), torch.ones(3).long(), [1], "held_out must be one whole number a user"),
        (torch.zeros(2, 3).bool(), torch.ones(2), [1], "held_out must be one whole number a user"),
        (torch.ones(2, 3).bool(), torch.ones(2).long(), [1], "at least the number of hits"),
        (torch.zeros(2, 3).bool(), torch.ones(2).long(), [], "ks must be one whole number"),
        (torch.zeros(2, 3).bool(), torch.ones(2).long(), [0], "ks must be one whole number"),
    ],
)
def test_bad_values(hits: Tensor, held_out: Tensor, ks: list[int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        ranking_values(hits, held_out, ks)


@pytest.mark.parametrize(
    ("lists", "match"),
    [
        (PairLists(torch.tensor([0.0, 1.0]), torch.tensor([0])), "got offsets in torch.float32"),
        (PairLists(torch.tensor([0, 1]), torch.tensor([[0]])), "got columns in torch.int64 of shape"),
        (PairLists(torch.tensor([0, 2]), torch.tensor([0])), "offsets that rise from 0 to .*, 1, got 0 … 2"),
        (PairLists(torch.tensor([0, 1]), torch.tensor([-1])), r"numbers in 0 … 2, found -1"),
    ],
)
def test_bad_lists(lists: PairLists, match: str) -> None:
    with pytest.raises(InputError, match=match):
        FullRanking(k=1).update(torch.ones(1, 2), torch.ones(3, 2), lists)
