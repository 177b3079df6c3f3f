"""zoo.metrics.Trustworthiness and Continuity against scikit-learn on unit rows, whose distances order as cosines do."""

from __future__ import annotations

import doctest
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.manifold import trustworthiness
from torch import Tensor

import zoo.metrics.neighbourhoods
from zoo.errors import InputError
from zoo.metrics.neighbourhoods import Continuity, NeighbourhoodTransfer, Trustworthiness


def plain(reference: Tensor, embeddings: Tensor, k: int) -> float:
    units = [rows.double() / rows.double().norm(dim=1, keepdim=True) for rows in (reference, embeddings)]
    return float(trustworthiness(units[0].numpy(), units[1].numpy(), n_neighbors=k))


def samples(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A reference and an embedding that keeps a part of it."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(count, 5, generator=generator)
    return reference, reference[:, :3] + torch.randn(count, 3, generator=generator)


def test_golden() -> None:
    """Five samples on a circle, by hand.

    Reference 0, 10, 25, 45, 70 degrees, embedding 45, 0, 10, 25, 70, k = 1. In the embedding the nearest of 0, 1, 2, 3, 4
    are 3, 2, 1, 2, 0. In the reference 0 ranks 3 behind 1 and 2, 1 ranks 2 behind 0, 2 ranks 1 first, 3 ranks 2 first and
    4 ranks 0 behind 3, 2 and 1: ranks 3, 2, 1, 1, 4 and 2 + 1 + 0 + 0 + 3 = 6. The scale is 2 / (5 (10 - 3 - 1)) = 1 / 15.
    """
    reference, embeddings = (
        torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in angles])
        for angles in ((0, 10, 25, 45, 70), (45, 0, 10, 25, 70))
    )
    metric = Trustworthiness(1)
    metric.update(embeddings, reference)
    assert metric.compute().item() == pytest.approx(1 - 6 / 15, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(3, 30), seed=st.integers(0, 999), size=st.integers(1, 9), data=st.data())
def test_properties(count: int, seed: int, size: int, data: st.DataObject) -> None:
    """scikit-learn's value; batches, blocks, lengths and the order of the samples do not count; sides change places."""
    reference, embeddings = samples(count, seed=seed)
    k = data.draw(st.integers(1, (count - 1) // 2))
    trust, still, exchanged = Trustworthiness(k, chunk_size=size), Continuity(k, chunk_size=size), Continuity(k)
    for part in torch.randperm(count).split(size):
        trust.update(1e-20 * embeddings[part], 1e20 * reference[part])
        still.update(embeddings[part], reference[part])
    exchanged.update(reference, embeddings)
    assert trust.compute().item() == pytest.approx(plain(reference, embeddings, k), abs=1e-6)
    assert still.compute().item() == pytest.approx(plain(embeddings, reference, k), abs=1e-6)
    assert exchanged.compute() == trust.compute()


@pytest.mark.parametrize("kind", [Trustworthiness, Continuity])
def test_identity(kind: type[Trustworthiness | Continuity]) -> None:
    reference, _ = samples(60)
    same, mixed = kind(7), kind(7)
    same.update(3 * reference, reference)
    assert same.compute() == 1
    many = torch.randn(400, 6)
    mixed.update(torch.randn(400, 6), many)
    assert mixed.compute().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", [Trustworthiness, Continuity])
def test_degenerate(kind: type[Trustworthiness | Continuity]) -> None:
    reference, embeddings = samples(21)

    def value(first: Tensor, second: Tensor, k: int = 10) -> Tensor:
        metric = kind(k)
        metric.update(first, second)
        return metric.compute()

    assert value(embeddings, reference).isfinite()
    assert value(embeddings[:20], reference[:20]).isnan()
    assert value(embeddings[:0], reference[:0]).isnan()
    for flat in (torch.ones(21, 2), torch.zeros(21, 2)):
        assert 0 <= value(flat, reference, 3) <= 1
        assert value(flat, flat, 3) == 1
    for bad in (math.nan, math.inf):
        broken = embeddings.clone()
        broken[3, 1] = bad
        assert value(broken, reference).isnan()
        assert value(reference, broken).isnan()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert kind(3).compute().isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision(dtype: torch.dtype) -> None:
    reference, embeddings = (rows.to(dtype) for rows in samples(40))
    metric = Trustworthiness(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(embeddings.requires_grad_(), reference)
        result = metric.compute()
    assert result.dtype == torch.float32
    assert not result.requires_grad
    # Rows of half numbers have ties, which scikit-learn breaks otherwise.
    assert result.item() == pytest.approx(plain(reference, embeddings.detach(), 6), abs=1e-2)


def test_sample_ids_and_pickle() -> None:
    reference, embeddings = samples(30)
    metric = Continuity(4)
    metric.update(embeddings[:20], reference[:20], torch.arange(20))
    again = pickle.loads(pickle.dumps(metric))
    again.update(embeddings[15:], reference[15:], torch.arange(15, 30))
    assert again.compute().item() == pytest.approx(plain(embeddings, reference, 4), abs=1e-6)
    again.reset()
    assert again.embeddings == again.sample_ids == []
    assert again.state_dict() == {}


@pytest.mark.parametrize("kind", [Trustworthiness, Continuity])
def test_bad_arguments(kind: type[Trustworthiness | Continuity]) -> None:
    with pytest.raises(InputError, match="k must be a whole number of at least 1, got 0"):
        kind(0)
    with pytest.raises(InputError, match="chunk_size must be at least 1"):
        kind(3, chunk_size=0)
    metric: Any = kind()
    assert metric.k == 100
    with pytest.raises(InputError, match="reference must have a row for each row of embeddings, got 2 and 3"):
        metric.update(torch.ones(3, 1), torch.ones(2, 1))
    assert metric.embeddings == []


def test_examples() -> None:
    result = doctest.testmod(zoo.metrics.neighbourhoods, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_some_of_the_samples() -> None:
    """All of them give what the two metrics give; a part is chosen by number, whatever the batches; few give NaN."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(90, 8, generator=generator)
    embeddings = reference[:, :4] + 0.3 * torch.randn(90, 4, generator=generator)
    expected = []
    for kind in (Trustworthiness, Continuity):
        whole = kind(5)
        whole.update(embeddings, reference)
        expected.append(float(whole.compute()))
    metric = NeighbourhoodTransfer(5)
    metric.update(embeddings, reference, torch.arange(90))
    found = metric.compute()
    assert list(found) == ["trustworthiness", "continuity"]
    assert [float(value) for value in found.values()] == pytest.approx(expected, abs=1e-6)
    parts = []
    for size in (90, 7):
        metric = NeighbourhoodTransfer(5, max_samples=40)
        order = torch.randperm(90, generator=generator)
        for rows in order.split(size):
            metric.update(embeddings[rows], reference[rows], rows)
        parts.append([float(value) for value in metric.compute().values()])
    assert parts[0] == parts[1]
    assert parts[0] != expected
    few = NeighbourhoodTransfer(5, max_samples=10)
    few.update(embeddings, reference)
    assert all(value.isnan() for value in few.compute().values())
    with pytest.raises(InputError, match="k must be a whole number of at least 1, got 0"):
        NeighbourhoodTransfer(0)
    with pytest.raises(InputError, match="max_samples must be at least 3, got 2"):
        NeighbourhoodTransfer(5, 2)
