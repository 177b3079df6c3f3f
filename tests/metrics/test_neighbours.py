"""zoo.metrics.neighbours, and the metrics of layers in two processes: starting those is what takes the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.largest_tensor import LargestTensor
from zoo.errors import InputError
from zoo.metrics import neighbours
from zoo.metrics.cka import CKA
from zoo.metrics.mutual_knn import MutualKNN
from zoo.metrics.neighbourhoods import Continuity, Trustworthiness
from zoo.metrics.neighbours import exact_units, nearest_neighbours, nearest_units, neighbour_keys, neighbour_sets


def plain(features: Tensor, k: int) -> list[list[int]]:
    """Sort the others of each row by cosine, to nine digits, and then by position."""
    rows = [[value / (math.hypot(*row) or 1) for value in row] for row in features.double().tolist()]
    cosines = [[round(sum(a * b for a, b in zip(x, y, strict=True)), 9) for y in rows] for x in rows]
    return [
        sorted((j for j in range(len(rows)) if j != i), key=lambda j, own=own: (-own[j], j))[:k]
        for i, own in enumerate(cosines)
    ]


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(2, 14), seed=st.integers(0, 999), coarse=st.booleans(), size=st.integers(1, 20), data=st.data())
def test_properties(rows: int, seed: int, coarse: bool, size: int, data: st.DataObject) -> None:
    """The plain sort; blocks and lengths do not count. Coarse rows repeat and are zero, so that many cosines are equal."""
    features = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    features = features.round().clamp(-1, 1) if coarse else features
    k = data.draw(st.integers(1, rows - 1))
    expected = plain(features, k)
    assert nearest_neighbours(features, k).tolist() == expected
    assert nearest_neighbours(features, k, chunk_size=size).tolist() == expected
    powers = 2.0 ** torch.randint(-60, 60, (rows, 1), generator=torch.Generator().manual_seed(seed))
    assert nearest_neighbours(features * powers, k, chunk_size=size).tolist() == expected
    sets = neighbour_sets(exact_units(features * powers), k, size)
    assert sets.sort(1).values.tolist() == [sorted(row) for row in expected]


@pytest.mark.parametrize("kind", ["spread", "cone", "narrow cone", "copies", "zeros", "steps"])
def test_identity_sets_of_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of float64, ties included, whatever a matrix product of float32 does within its error bound."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 40, generator=generator)
    features = {
        "spread": noise,
        "cone": 1 + 0.1 * noise,
        "narrow cone": 1 + 1e-4 * noise,
        "copies": noise[:40].repeat(10, 1),
        "zeros": noise * (torch.rand(400, 1, generator=generator) > 0.5),
        "steps": noise[:, :4].round(),
    }[kind]
    units = exact_units(features)
    expected = nearest_units(units, 9, 64).sort(1).values
    assert torch.equal(neighbour_sets(units, 9, 64).sort(1).values, expected)
    plain = neighbours.cosines

    def disturbed(queries: Tensor, gallery: Tensor) -> Tensor:
        product = plain(queries, gallery)
        if queries.dtype == torch.float64:
            return product
        # The largest errors that the bound allows, at random; the probe is exact.
        sums = torch.mm(queries.abs().double(), gallery.abs().double().T)
        sums[:, -len(gallery) + len(units) :] = 0
        signs = torch.randint(0, 2, sums.shape, generator=generator) * 2 - 1
        return (product + signs * sums * features.shape[1] * 2.0**-24).float()

    monkeypatch.setattr(neighbours, "cosines", disturbed)
    assert torch.equal(neighbour_sets(units, 9, 64).sort(1).values, expected)


def test_shorter_types_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch that multiplies float32 in bfloat16 or TF32 leaves the choice to float64."""
    units = exact_units(torch.randn(300, 64))
    expected = nearest_units(units, 9, 64).sort(1).values
    plain = neighbours.cosines

    def short(queries: Tensor, gallery: Tensor) -> Tensor:
        if queries.dtype == torch.float64:
            return plain(queries, gallery)
        return plain(queries.bfloat16().float(), gallery.bfloat16().float())

    monkeypatch.setattr(neighbours, "cosines", short)
    assert torch.equal(neighbour_sets(units, 9, 64).sort(1).values, expected)


def test_identity_exact_cosines() -> None:
    """No order of summation changes a bit: the whole numbers are those of Python's own arithmetic."""
    units = exact_units(torch.randn(30, 200))
    assert units.dtype == torch.float64
    assert torch.equal(units, units.round())
    whole = [[int(value) for value in row] for row in units.tolist()]
    exact = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in whole] for x in whole]
    assert torch.equal(units @ units.T, torch.tensor(exact, dtype=torch.float64))
    order = torch.randperm(200)
    assert torch.equal(units[:, order] @ units[:, order].T, units @ units.T)


def test_ties_go_to_the_first() -> None:
    features = torch.randn(1, 16).repeat(50, 1)
    features[1::2] = torch.randn(16)
    expected = [[j for j in range(50) if j % 2 == i % 2 and j != i][:5] for i in range(50)]
    assert nearest_neighbours(features, 5).tolist() == expected
    assert nearest_neighbours(3 * features, 5, chunk_size=7).tolist() == expected
    assert nearest_neighbours(torch.zeros(4, 2), 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


def test_near_directions_are_told_apart() -> None:
    """All cosines are above 1 - 1e-4, as in early layers. Ties at 1e-6, as for other metrics, would go by position."""
    features = torch.cat([torch.ones(200, 1), 1e-3 * torch.randn(200, 64)], 1).double()
    units = features / features.norm(dim=1, keepdim=True)
    cosines = units @ units.T
    assert cosines.min() > 1 - 2e-4
    expected = cosines.fill_diagonal_(-1).topk(5).indices
    assert (nearest_neighbours(features.float(), 5) == expected).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(dtype: torch.dtype) -> None:
    features = torch.randn(20, 6).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_neighbours(features.requires_grad_(), 4)
    assert found.tolist() == plain(features.detach(), 4)
    assert found.dtype == torch.int64


def test_keys() -> None:
    units = exact_units(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0]]))
    keys = neighbour_keys(units, 1, 5)
    assert keys.argsort(1, descending=True).tolist() == [
        [2, 3, 0, 4, 1],
        [0, 1, 4, 3, 2],
        [0, 1, 4, 2, 3],
        [0, 2, 3, 1, 4],
    ]
    assert (keys.sort(1).values.diff(dim=1) > 0).all()


def test_memory() -> None:
    """A block of rows at a time."""
    rows, embeddings = torch.randn(900, 4), torch.randn(900, 4)
    metrics = [Trustworthiness(5, chunk_size=40), Continuity(5, chunk_size=40), MutualKNN(5, chunk_size=40)]
    for metric in metrics:
        metric.update(embeddings, rows)
    with LargestTensor() as largest:
        for metric in metrics:
            metric.compute()
    # Products in float32 are made for a multiple of 16 rows.
    assert largest.numel == 912 * 40


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (torch.ones(3), {"k": 1}, "features must have two dimensions"),
        (torch.ones(3, 0), {"k": 1}, "features must have at least one column"),
        (torch.ones(3, 2), {"k": 3}, r"k must be a whole number in 1 … 2, because 3 rows have so many others, got 3"),
        (torch.ones(3, 2), {"k": 0}, "k must be a whole number in 1 … 2"),
        (torch.ones(3, 2), {"k": 1.0}, "got 1.0"),
        (torch.ones(3, 2), {"k": 1, "chunk_size": 0}, "chunk_size must be at least 1, or None for blocks of 64 MiB"),
        (torch.tensor([[1.0], [math.nan], [math.inf]]), {"k": 1}, "features must be finite, row 1 is not"),
    ],
)
def test_bad_features(features: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nearest_neighbours(features, **options)


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(23, 6, generator=generator, dtype=torch.float64)
    return images, images[:, :3] + torch.randn(23, 3, generator=generator, dtype=torch.float64)


# What each process sees: uneven shards, none in the first process, and shards that overlap.
SHARDS = {
    "all": [slice(0, 23)],
    "uneven": [slice(0, 5), slice(5, 23)],
    "one-sided": [slice(0, 0), slice(0, 23)],
    "padded": [slice(0, 12), slice(9, 23)],
}


def _compute(shards: str, rank: int) -> dict[str, float]:
    images, texts = _data()
    part = SHARDS[shards][rank]
    metrics: dict[str, Any] = {
        "knn": MutualKNN(),
        "trustworthiness": Trustworthiness(4),
        "continuity": Continuity(4, chunk_size=5),
        "cka": CKA(),
        "unbiased": CKA(unbiased=True),
    }
    for name, metric in metrics.items():
        ids = [] if name in ("cka", "unbiased") else [torch.arange(23)[part]]
        if part == slice(0, 0):
            metric._update_count = 1  # as after a batch, so that compute does not warn
        else:
            half = (part.start + part.stop) // 2
            for batch in (slice(part.start, half), slice(half, part.stop)):
                metric.update(images[batch], texts[batch], *(torch.arange(23)[batch] for _ in ids))
    return {name: metric.compute().item() for name, metric in metrics.items()}


def _on_rank(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    return {shards: _compute(shards, rank) for shards in SHARDS if shards != "all"}


def test_two_processes_equal_one(two_processes: Callable[..., list[Any]]) -> None:
    expected = _compute("all", 0)
    assert all(0 < value < 1 for value in expected.values())
    for result in two_processes(_on_rank):
        for shards, values in result.items():
            # CKA takes no numbers, so that samples that come twice count twice.
            names = [name for name in expected if shards != "padded" or name not in ("cka", "unbiased")]
            assert {name: values[name] for name in names} == {
                name: pytest.approx(expected[name], abs=1e-6) for name in names
            }
