"""zoo.metrics.StructureTransfer against scipy's Spearman correlation of all pairs."""

from __future__ import annotations

import doctest
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor
from torchmetrics import MetricCollection

import zoo.metrics.structure
from tests.largest_tensor import LargestTensor
from zoo.errors import InputError
from zoo.metrics.structure import StructureTransfer, cosine_structure_correlation


def plain(first: Tensor, second: Tensor) -> float:
    """Pair by pair, in float64; cosines that agree to six digits are the same. NaN where all are (scipy warns)."""
    cosines = []
    for side in (first, second):
        units = [row / (np.linalg.norm(row) or 1) for row in side.double().numpy()]
        pairs = [float(units[i] @ units[j]) for i in range(len(units)) for j in range(i)]
        cosines.append(np.round(pairs, 6))
    if min(np.ptp(side) for side in cosines) == 0:
        return math.nan
    return float(spearmanr(*cosines).statistic)


def samples(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two embeddings of the same samples that share a part."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 5, generator=generator)
    return shared + torch.randn(count, 5, generator=generator), shared[:, :3]


def on_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_golden() -> None:
    """Four samples on a circle, by hand.

    Angles 0, 10, 30, 70: distances of the pairs 01 02 03 12 13 23 are 10 30 70 20 60 40, ranks of the cosines 6 4 1 5 2 3.
    Angles 0, 20, 10, 50: distances 20 10 50 10 30 40, ranks of the cosines 4 5.5 1 5.5 3 2 (one tie).
    Centred: 2.5 .5 -2.5 1.5 -1.5 -.5 and .5 2 -2.5 2 -.5 -1.5; products 1.25 + 1 + 6.25 + 3 + .75 + .75 = 13.
    """
    first, second = on_circle(0, 10, 30, 70), on_circle(0, 20, 10, 50)
    expected = 13 / math.sqrt(17.5 * 17)
    assert cosine_structure_correlation(first, second).item() == pytest.approx(expected, abs=1e-6)
    metric = StructureTransfer()
    metric.update(3 * first, 0.1 * second)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
    assert plain(first, second) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(3, 15), seed=st.integers(0, 1000), coarse=st.booleans(), size=st.integers(1, 15))
def test_properties(count: int, seed: int, coarse: bool, size: int) -> None:
    """Scipy's value; lengths, batches, rotations and the order of the two sides do not count."""
    first, second = samples(count, seed=seed)
    if coarse:
        second = second.round().clamp(-1, 1)
    expected = plain(first, second)
    expected = 0.0 if math.isnan(expected) else expected
    metric = StructureTransfer()
    scale = 10 ** (40 * torch.rand(count, 1, generator=torch.Generator().manual_seed(seed)) - 20)
    for start in range(0, count, size):
        metric.update((scale * first)[start : start + size], second[start : start + size])
    # The scale moves cosines by a rounding error, which may put two of them into another order.
    assert metric.compute().item() == pytest.approx(expected, abs=0.02)
    value = cosine_structure_correlation(first, second)
    assert value.item() == pytest.approx(expected, abs=0.02)
    assert cosine_structure_correlation(second, first).item() == pytest.approx(value.item(), abs=1e-6)
    assert cosine_structure_correlation(first.flip(1), second).item() == pytest.approx(value.item(), abs=0.02)
    assert cosine_structure_correlation(first, first) == 1


def test_many_ties() -> None:
    """Half of the pairs are tied: 180,000 pairs, whose sums of ranks overflow int32."""
    angles = torch.arange(600) % 2 * 90.0
    first = torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], 1).round()
    second = torch.randn(600, 4)
    rows, columns = np.tril_indices(600, -1)
    units = second.double() / second.double().norm(dim=1, keepdim=True)
    expected = spearmanr(
        (first @ first.T).numpy()[rows, columns], np.round((units @ units.T).numpy()[rows, columns], 6)
    ).statistic
    assert cosine_structure_correlation(first, second).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("numbered", [True, False])
def test_choice(numbered: bool) -> None:
    """The same samples whatever the order and the batches; another seed chooses others; each is as likely."""
    first, second = samples(400)
    ids = torch.arange(400) * 7 if numbered else None

    def chosen(seed: int, size: int, order: Tensor) -> tuple[set[int], float]:
        metric = StructureTransfer(max_samples=30, seed=seed)
        for part in order.split(size):
            metric.update(first[part], second[part], None if ids is None else ids[part])
            assert metric.matrix("embeddings").shape[0] <= 30
        units = first / first.norm(dim=1, keepdim=True)
        found = torch.cdist(metric.matrix("embeddings"), units).argmin(1)
        value = metric.compute().item()
        assert value == pytest.approx(plain(first[found], second[found]), abs=1e-3)
        return set(found.tolist()), value

    forward, backward = torch.arange(400), torch.arange(400).flip(0)
    kept, value = chosen(0, 400, forward)
    assert len(kept) == 30
    for size, order in ((7, forward), (64, backward), (1, torch.randperm(400))):
        again, same = chosen(0, size, order)
        assert again == kept
        assert same == pytest.approx(value, abs=1e-4)
    sets = [chosen(seed, 400, forward)[0] for seed in range(1, 9)]
    assert len({frozenset(each) for each in sets} | {frozenset(kept)}) == 9
    # Of 240 draws half should be from each half, by 3.9 standard deviations.
    assert abs(sum(len([i for i in each if i < 200]) for each in sets) - 120) < 30


def test_choice_by_number_does_not_look_at_the_embeddings() -> None:
    first, second = samples(100)
    kept = []
    for epoch in range(2):
        metric = StructureTransfer(max_samples=10)
        metric.update(first + epoch, second, torch.arange(100))
        kept.append(metric.keys[0].sort().values)
    assert torch.equal(kept[0], kept[1])


def test_what_comes_twice_counts_once() -> None:
    first, second = samples(12)
    expected = plain(first, second)
    for ids in (None, torch.arange(12)):
        metric = StructureTransfer()
        for part in (slice(0, 8), slice(4, 12)):
            metric.update(first[part], second[part], None if ids is None else ids[part])
        assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


def test_degenerate() -> None:
    first, second = samples(20)
    constant = torch.randn(1, 7).expand(20, -1)
    for flat in (constant, torch.zeros(20, 7), constant * torch.rand(20, 1)):
        assert cosine_structure_correlation(flat, second) == 0
        metric = StructureTransfer()
        metric.update(flat, second)
        assert metric.compute() == 0
    with_zero = torch.cat([torch.zeros(1, 5), first[1:]])
    assert cosine_structure_correlation(with_zero, second).item() == pytest.approx(plain(with_zero, second), abs=1e-4)
    assert cosine_structure_correlation(first[:2], second[:2]).isnan()
    assert cosine_structure_correlation(first[:0], second[:0]).isnan()
    for bad in (math.nan, math.inf):
        broken = first.clone()
        broken[3, 1] = bad
        assert cosine_structure_correlation(broken, second).isnan()
        assert cosine_structure_correlation(second, broken).isnan()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert StructureTransfer().compute().isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision(dtype: torch.dtype) -> None:
    """Half-precision rows are compared in float32, under autocast too."""
    first, second = (side.to(dtype) for side in samples(30))
    metric = StructureTransfer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(first, second)
        value = metric.compute()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(plain(first, second), abs=1e-4)
    metric.to(torch.bfloat16)
    metric.set_dtype(torch.float16)
    assert metric.keys[0].dtype == torch.int64
    assert metric.embeddings[0].dtype == torch.float32


def test_memory() -> None:
    """Quadratic in `max_samples` and not in the samples."""
    first, second = samples(3000)
    metric = StructureTransfer(max_samples=100)
    with LargestTensor() as largest:
        for part in torch.arange(3000).split(500):
            metric.update(first[part], second[part])
        metric.compute()
    assert largest.numel == 100 * 100
    assert metric.matrix("reference").shape == (100, 3)


def test_stop_gradient() -> None:
    metric = StructureTransfer()
    value = metric(torch.randn(5, 2, requires_grad=True), torch.randn(5, 2, requires_grad=True))
    assert not value.requires_grad
    assert not metric.embeddings[0].requires_grad


def test_identity_forward_and_merge() -> None:
    first, second = samples(20)
    metric, other = StructureTransfer(), StructureTransfer()
    assert metric(first[:8], second[:8]).item() == pytest.approx(plain(first[:8], second[:8]), abs=1e-4)
    metric(first[8:14], second[8:14])
    other.update(first[14:], second[14:])
    metric.merge_state(other)
    assert metric.compute().item() == pytest.approx(plain(first, second), abs=1e-4)


def test_pickle_and_reset() -> None:
    first, second = samples(20)
    metric = StructureTransfer(seed=3)
    metric.update(first[:8], second[:8])
    again = pickle.loads(pickle.dumps(metric))
    again.update(first[8:], second[8:])
    assert again.compute().item() == pytest.approx(plain(first, second), abs=1e-4)
    metric.reset()
    assert metric.embeddings == []
    metric.update(second, first)  # another width
    assert metric.compute().item() == pytest.approx(plain(first, second), abs=1e-4)
    assert metric.state_dict() == {}


def test_collection_does_not_confuse_two_choices() -> None:
    """After the first batch both hold the same samples; torchmetrics would go on with one of them."""
    first, second = samples(60)
    few, many = StructureTransfer(max_samples=10), StructureTransfer(max_samples=100)
    pair = MetricCollection({"few": few, "many": many})
    for part in (slice(0, 6), slice(6, 60)):
        pair.update(first[part], second[part])
    values = pair.compute()
    assert values["many"].item() == pytest.approx(plain(first, second), abs=1e-4)
    assert pair["few"].matrix("embeddings").shape[0] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 2}, "max_samples must be at least 3, got 2"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StructureTransfer(**options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(3), torch.ones(3, 1)), "embeddings must have two dimensions"),
        ((torch.ones(3, 1), torch.ones(3, 0)), "reference must have at least one column"),
        (
            (torch.ones(3, 1), torch.ones(2, 1)),
            "reference must have a row for each row of embeddings, got 2 and 3 rows",
        ),
        (
            (torch.ones(3, 1), torch.ones(3, 1, device="meta")),
            "reference must be on the device of embeddings, got meta",
        ),
        ((torch.ones(3, 1), torch.ones(3, 1), torch.ones(3)), "sample_ids must be whole numbers, got torch.float32"),
        ((torch.ones(3, 1), torch.ones(3, 1), torch.tensor([0, 1, -3])), "sample_ids must be at least 0, found -3"),
    ],
)
def test_bad_batch(batch: tuple[Any, ...], message: str) -> None:
    metric = StructureTransfer()
    with pytest.raises(InputError, match=message):
        metric.update(*batch)
    assert metric.keys == []


def test_examples() -> None:
    result = doctest.testmod(zoo.metrics.structure, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
