"""zoo.interaction_graph against dense matrices and Python's sets."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.errors import InputError
from zoo.interaction_graph import PairLists, interaction_graph, pair_lists, propagate_interactions

USERS, ITEMS = torch.tensor([0, 2, 0, 2, 2, 3, 0]), torch.tensor([1, 1, 0, 4, 1, 3, 1])  # two pairs are there twice
NUM_USERS, NUM_ITEMS = 5, 6  # users 1 and 4, items 2 and 5 have no interaction


def dense_adjacency() -> np.ndarray:
    nodes = NUM_USERS + NUM_ITEMS
    adjacency = np.zeros((nodes, nodes))
    for user, item in zip(USERS.tolist(), ITEMS.tolist(), strict=True):
        adjacency[user, NUM_USERS + item] = adjacency[NUM_USERS + item, user] = 1
    scale = 1 / np.sqrt(adjacency.sum(1) + 1e-7)
    return scale[:, None] * adjacency * scale


def graph() -> PairLists:
    return interaction_graph(USERS, ITEMS, num_users=NUM_USERS, num_items=NUM_ITEMS)


def embeddings(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(NUM_USERS + NUM_ITEMS, 3, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("hops", [0, 1, 2, 5])
@pytest.mark.parametrize("readout", ["sum", "mean"])
def test_identity_dense(hops: int, readout: Literal["sum", "mean"]) -> None:
    """The recursion is the sum of the powers, and its gradient the transposed sum."""
    powers = sum(np.linalg.matrix_power(dense_adjacency(), layer) for layer in range(hops + 1))
    expected = powers / (hops + 1 if readout == "mean" else 1)
    x = embeddings()
    result = propagate_interactions(graph(), x, hops=hops, readout=readout)
    np.testing.assert_allclose(result.detach().numpy(), expected @ x.detach().numpy(), atol=1e-13)
    probe = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(result, x, probe)
    np.testing.assert_allclose(gradient.numpy(), expected.T @ probe.numpy(), atol=1e-13)


def test_nothing_is_kept_for_the_backward_pass() -> None:
    """What autograd saves is the graph: no tensor of the embeddings' size."""
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    wide = embeddings().detach().repeat(1, 20).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        propagate_interactions(graph(), wide, hops=3, readout="mean").sum().backward()
    assert max(saved) < wide.numel() / 10


def test_gradcheck() -> None:
    lists = graph()
    assert torch.autograd.gradcheck(lambda x: propagate_interactions(lists, x, hops=3), embeddings())
    assert torch.autograd.gradgradcheck(lambda x: propagate_interactions(lists, x, hops=3).square(), embeddings())


def test_input_stays_as_it_was() -> None:
    x = embeddings()
    before = x.detach().clone()
    for hops in (0, 2):
        result = propagate_interactions(graph(), x, hops=hops)
        result.detach().zero_()
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(dtype: torch.dtype) -> None:
    x = embeddings(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = propagate_interactions(graph(), x, hops=3)
    assert result.dtype == torch.float32
    expected = propagate_interactions(graph(), x.detach().double(), hops=3)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(result.sum(), x)[0].dtype == dtype


def test_compile() -> None:
    lists, x = graph(), embeddings()
    compiled = torch.compile(propagate_interactions, fullgraph=True, backend="aot_eager")
    result, expected = (function(lists, x, hops=2) for function in (compiled, propagate_interactions))
    torch.testing.assert_close(result, expected)
    probe = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(result, x, probe), torch.autograd.grad(expected, x, probe))


def test_no_interactions() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    empty = interaction_graph(none, none, num_users=2, num_items=1)
    x = torch.randn(3, 2)
    torch.testing.assert_close(propagate_interactions(empty, x, hops=2), x)
    assert propagate_interactions(interaction_graph(none, none, num_users=0, num_items=0), x[:0], hops=2).shape == (
        0,
        2,
    )


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=25),
    rows=st.lists(st.integers(0, 4), max_size=6),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_properties_lists(pairs: list[tuple[int, int]], rows: list[int], dtype: torch.dtype) -> None:
    """Sets of columns, sorted; a selection is those of the rows asked for."""
    table = torch.tensor(pairs, dtype=dtype).view(-1, 2)
    lists = pair_lists(table[:, 0], table[:, 1], num_rows=5, num_columns=6)
    sets = [sorted({column for row, column in pairs if row == wanted}) for wanted in range(5)]

    def unpack(lists: PairLists) -> list[list[int]]:
        return [lists.columns[a:b].tolist() for a, b in pairwise(lists.offsets.tolist())]

    assert unpack(lists) == sets
    assert lists.lengths().tolist() == [len(columns) for columns in sets]
    assert lists.rows().tolist() == [row for row, columns in enumerate(sets) for _ in columns]
    chosen = lists.select(torch.tensor(rows, dtype=torch.int64))
    assert unpack(chosen) == [sets[row] for row in rows]
    asked = torch.tensor([[-1, 0, 1, 5, 7]] * len(rows), dtype=torch.int64).view(-1, 5)
    expected = [[column in sets[row] for column in (-1, 0, 1, 5, 7)] for row in rows]
    assert chosen.contains(asked).tolist() == expected
    assert unpack(lists.to("cpu")) == sets


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair_lists(torch.tensor([0, 5]), torch.tensor([0, 0]), num_rows=5, num_columns=1), r"rows must be in"),
        (lambda: pair_lists(torch.tensor([-1]), torch.tensor([0]), num_rows=5, num_columns=1), "0 … 4, found -1"),
        (
            lambda: pair_lists(torch.tensor([0, 1]), torch.tensor([0]), num_rows=5, num_columns=1),
            "the shape and device",
        ),
        (lambda: pair_lists(torch.tensor([0.0]), torch.tensor([0]), num_rows=5, num_columns=1), "rows must be whole"),
        (lambda: interaction_graph(USERS, ITEMS, num_users=5, num_items=4), r"items must be in 0 … 3, found 4"),
        (lambda: interaction_graph(USERS[:2], ITEMS, num_users=5, num_items=6), "items must have the shape of users"),
        (
            lambda: propagate_interactions(graph(), torch.ones(4, 2), hops=1),
            "each of the graph's 11 nodes on cpu, got 4",
        ),
        (lambda: propagate_interactions(graph(), embeddings(), hops=-1), "hops must be at least 0, got -1"),
        (lambda: propagate_interactions(graph(), embeddings(), hops=1, readout="max"), "readout must be one of sum, "),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
