"""zoo.item_graph against the whole matrix of cosines, one item at a time. The notes' numbers are in test_cm3_parts.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.errors import InputError
from zoo.item_graph import ItemGraph, item_graph, item_neighbours, propagate_items


def plain_neighbours(features: np.ndarray, k: int, members: list[int]) -> dict[int, list[int]]:
    """Itself and the k - 1 nearest others among the members; of equally near ones the first."""
    units = {row: features[row] / np.linalg.norm(features[row]) for row in members}
    result = {}
    for row in members:
        others = [other for other in members if other != row]
        others.sort(key=lambda other: (-round(float(units[row] @ units[other]), 12), other))
        result[row] = [row, *others[: k - 1]]
    return result


def plain_matrix(features: list[np.ndarray], k: int, shares: list[float], present: np.ndarray) -> np.ndarray:
    items = len(features[0])
    matrix = np.zeros((items, items))
    tables = [plain_neighbours(rows, k, [i for i in range(items) if present[i, m]]) for m, rows in enumerate(features)]
    for item in range(items):
        total = sum(share for m, share in enumerate(shares) if present[item, m])
        for m, share in enumerate(shares):
            if present[item, m] and total:
                for neighbour in tables[m][item]:
                    matrix[item, neighbour] += share / total / (k + 1e-7)
    return matrix


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 3),
    modalities=st.integers(1, 3),
    memory=st.sampled_from([1, 700, 2**28]),
)
def test_properties(seed: int, k: int, modalities: int, memory: int) -> None:
    """Missing modalities, rows of zeros, ties, any blocks: what the whole matrix says."""
    generator = np.random.default_rng(seed)
    # Random directions: of small integers, different rows may be equally near, and rounding then decides.
    features = [generator.standard_normal((8, 3 + m)).astype(np.float32).astype(np.float64) for m in range(modalities)]
    present = generator.random((8, modalities)) < 0.8
    present[:3] = True
    for m, rows in enumerate(features):
        rows[4] = rows[5]  # equal features
        rows[6, :] = 0
        rows[~present[:, m]] = math.nan
    shares = [0.5, 0.0, 0.3][:modalities]
    graph = item_graph(
        [torch.from_numpy(rows).float() for rows in features],
        k=k,
        modality_weights=shares,
        present=torch.from_numpy(present),
        dtype=torch.float64,
        memory=memory,
    )
    known = present & np.stack([(rows != 0).any(1) for rows in features], 1)
    expected = plain_matrix(features, k, shares, known)
    dense = propagate_items(graph, torch.eye(8, dtype=torch.float64))
    np.testing.assert_allclose(dense.numpy(), expected, atol=1e-15)
    assert not dense[6].any()


def test_identity_first_is_the_item_itself() -> None:
    """Even among more equal items than there are places; the others come in their order."""
    graph = item_graph([torch.ones(6, 4)], k=3)
    assert graph.neighbours[:, 0].tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 1], [4, 0, 1], [5, 0, 1]]


def test_golden_equal_weights_of_what_an_item_has() -> None:
    image, text = torch.eye(3), torch.eye(3)
    present = torch.tensor([[True, True], [True, False], [False, False]])
    graph = item_graph([image, text], k=1, present=present)
    torch.testing.assert_close(graph.weights, torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(propagate_items(graph, torch.ones(3, 2)), torch.tensor([[1.0, 1], [1, 1], [0, 0]]))


def test_rows_of_a_batch_and_gradient() -> None:
    torch.manual_seed(0)
    graph = item_graph([torch.randn(9, 4), torch.randn(9, 2)], k=3, modality_weights=[1, 9])
    h = torch.randn(9, 5, requires_grad=True)
    rows = torch.tensor([4, 0, 4])
    torch.testing.assert_close(propagate_items(graph, h, rows), propagate_items(graph, h)[rows])
    dense = propagate_items(graph, torch.eye(9))
    torch.testing.assert_close(propagate_items(graph, h), dense @ h)
    probe = torch.randn(9, 5)
    torch.testing.assert_close(torch.autograd.grad(propagate_items(graph, h), h, probe)[0], dense.t() @ probe)
    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: propagate_items(graph, x, rows), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert propagate_items(graph, h.bfloat16()).dtype == torch.float32
    assert torch.equal(graph.to("cpu").neighbours, graph.neighbours)
    assert propagate_items(graph, h, rows[:0]).shape == (0, 5)


def test_new_items() -> None:
    torch.manual_seed(0)
    features, queries = torch.randn(20, 6), torch.randn(4, 6)
    features[3], features[5, 0] = 0, math.inf
    found = item_neighbours(queries, features, 5, memory=500)
    for row, query in zip(found.tolist(), queries.double().numpy(), strict=True):
        usable = [i for i in range(20) if i not in {3, 5}]
        units = {i: features[i].double().numpy() / np.linalg.norm(features[i].double().numpy()) for i in usable}
        assert row == sorted(usable, key=lambda i: -float(units[i] @ query))[:5]
    short = item_neighbours(queries, features[:4], 5)
    assert (short >= 0).sum(1).tolist() == [3] * 4
    assert (short[:, 3:] == -1).all()


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ([], {}, "features must be one tensor"),
        (
            [torch.ones(3, 2), torch.ones(4, 2)],
            {},
            r"features\[1\] must have the rows and device of features\[0\], got 4",
        ),
        ([torch.ones(3)], {}, r"features\[0\] must have two dimensions"),
        ([torch.ones(3, 2)], {"k": 4}, r"k must be at most the number .* got 4 and 3 with features\[0\]"),
        ([torch.ones(3, 2)], {"k": 0}, "k must be at least 1, got 0"),
        ([torch.tensor([[1.0], [math.nan], [1.0]])], {"k": 2}, r"features\[0\] must be finite, row 1 is not"),
        ([torch.ones(3, 2)], {"present": torch.ones(3, 2) > 0}, r"present must be bool of shape \(3, 1\)"),
        ([torch.ones(3, 2)], {"modality_weights": [0.5, 0.5]}, "modality_weights must be 1, one a modality, got 2"),
        ([torch.ones(3, 2)], {"modality_weights": [-1.0]}, "modality_weights must be finite and not negative"),
        ([torch.ones(3, 2)] * 2, {"modality_weights": [0.0, 0.0]}, "must not all be 0"),
    ],
)
def test_bad_input(features: list[Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        item_graph(features, **options)


def test_bad_propagation() -> None:
    graph = ItemGraph(torch.zeros(3, 1, 2, dtype=torch.int64), torch.ones(3, 1))
    with pytest.raises(InputError, match="each of the graph's 3 items on cpu, got 2 rows"):
        propagate_items(graph, torch.ones(2, 4))
    with pytest.raises(InputError, match="width"):
        item_neighbours(torch.ones(2, 3), torch.ones(2, 4), 1)
