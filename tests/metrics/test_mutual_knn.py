"""zoo.metrics.MutualKNN and the table over layers against sets and loops."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from tests.metrics.structure_layers import IMAGE_LAYERS, TEXT_LAYERS
from zoo.errors import InputError
from zoo.metrics.mutual_knn import MutualKNN, count_shared, mutual_knn, mutual_knn_table, neighbour_count
from zoo.metrics.neighbours import nearest_neighbours

# golden/structure.json of the project's notes, c8: 12 samples, k = 5.
TABLE = [[0.8333333333333335, 0.8833333333333334], [0.9666666666666668, 0.75], [0.8500000000000002, 0.6]]


def plain(first: Tensor, second: Tensor, k: int) -> float:
    """Sets of neighbours, one sample at a time; features without ties."""
    lists = []
    for rows in (first.double(), second.double()):
        units = rows / rows.norm(dim=1, keepdim=True)
        cosines = (units @ units.T).fill_diagonal_(-2)
        lists.append(cosines.argsort(dim=1, descending=True)[:, :k].tolist())
    return sum(len(set(a) & set(b)) / k for a, b in zip(*lists, strict=True)) / len(first)


def samples(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 5, generator=generator)
    return first, first[:, :3] + torch.randn(count, 3, generator=generator)


def value(first: Tensor, second: Tensor, k: Any = "rice", **options: Any) -> Tensor:
    metric = MutualKNN(k, **options)
    metric.update(first, second)
    return metric.compute()


def test_golden() -> None:
    table = mutual_knn_table(IMAGE_LAYERS, TEXT_LAYERS)
    torch.testing.assert_close(table.double(), torch.tensor(TABLE, dtype=torch.float64), rtol=0, atol=1e-7)
    assert [neighbour_count("rice", count) for count in (12, 1000, 5000)] == [5, 20, 35]
    assert value(IMAGE_LAYERS[1], TEXT_LAYERS[0]).item() == pytest.approx(TABLE[1][0], abs=1e-7)


@pytest.mark.parametrize("scale", range(1, 60))
def test_rules_are_exact(scale: int) -> None:
    """At cubes, squares and powers of two, and beside them, where rounding could tip a ceiling."""
    for count in {scale**3, scale**3 + 1, scale**2, scale**2 + 1, 2**scale, 2**scale + 1}:
        rice, root = neighbour_count("rice", count), neighbour_count("sqrt", count)
        assert (rice - 1) ** 3 < 8 * count <= rice**3
        assert (root - 1) ** 2 < count <= root**2
        assert 2 ** (neighbour_count("sturges", count) - 2) < count <= 2 ** (neighbour_count("sturges", count) - 1)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(2, 20), seed=st.integers(0, 999), size=st.integers(1, 9), data=st.data())
def test_properties(count: int, seed: int, size: int, data: st.DataObject) -> None:
    """The sets; batches, blocks, lengths, rotations and the order of sides and samples do not count, a shift does."""
    first, second = samples(count, seed=seed)
    k = data.draw(st.integers(1, count - 1))
    expected = plain(first, second, k)
    metric = MutualKNN(k, chunk_size=size)
    for start in range(0, count, size):
        metric.update(1e20 * first[start : start + size], 1e-20 * second[start : start + size])
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
    assert value(second.flip(1), first, k).item() == pytest.approx(expected, abs=1e-6)
    order = torch.randperm(count)
    assert value(first[order], second[order], k).item() == pytest.approx(expected, abs=1e-6)
    assert value(first, first, k) == 1
    if k == count - 1:
        assert expected == 1


def test_identity_unrelated_encoders() -> None:
    """They share k / (n - 1) in the mean: 175,000 draws without replacement of 35 among 4,999 would be too slow here."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(600, 32, generator=generator) for _ in range(2))
    assert value(first, second, 20).item() == pytest.approx(20 / 599, abs=0.006)


@pytest.mark.parametrize("k", [1, 3, 4, 10])
def test_identity_table(k: int) -> None:
    """Each entry is that of the pair; 17 layers do not fit into the bits of one number at k = 10."""
    generator = torch.Generator().manual_seed(k)
    base = torch.randn(40, 4, generator=generator)
    images, texts = (
        [base + torch.randn(40, 4, generator=generator) for _ in range(layers)] for layers in (17 if k == 10 else 3, 5)
    )
    table = mutual_knn_table(images, texts, k=k)
    expected = [[plain(image, text, k) for text in texts] for image in images]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=0, atol=1e-6)
    assert torch.equal(table, mutual_knn_table(images, texts, k=k, chunk_size=7))
    image, text = nearest_neighbours(images[1], k), nearest_neighbours(texts[2], k)
    assert mutual_knn(image, text) == table[1, 2]
    assert count_shared(image[None], text[None], chunk_size=3).item() == round(table[1, 2].item() * 40 * k)


def test_many_layers_with_one_neighbour() -> None:
    """With k = 1 each of 63 layers has one bit, the last of them the highest."""
    lists = torch.randint(0, 9, (70, 9, 1))
    expected = (lists == lists[-1]).sum((1, 2))
    assert torch.equal(count_shared(lists, lists[-1:]).flatten(), expected)


def test_degenerate() -> None:
    first, second = samples(20)
    flat = torch.randn(1, 4).expand(20, -1) * (1 + torch.rand(20, 1))
    for alike in (flat, torch.zeros(20, 3), flat + 1e-7 * torch.randn(20, 4)):
        assert value(alike, alike, 4) == 0
        assert value(first, alike, 4) == 0
        assert mutual_knn_table([first, alike], [second, alike, alike], k=4).bool().tolist() == [
            [True, False, False],
            [False, False, False],
        ]
    with_zero = torch.cat([torch.zeros(1, 5), first[1:]])
    assert value(with_zero, with_zero, 4) == 1
    assert value(first, second, 20).isnan()
    assert value(first[:4], second[:4]).isnan()  # rice: 4 neighbours of 4 samples
    assert value(first[:0], second[:0]).isnan()
    for bad in (math.nan, math.inf):
        broken = first.clone()
        broken[3, 1] = bad
        assert value(broken, second).isnan()
        assert value(second, broken).isnan()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert MutualKNN().compute().isnan()
    assert mutual_knn(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)).isnan()


def test_sample_ids() -> None:
    """What comes twice counts once, and the order of the numbers breaks ties."""
    first, second = (rows.round().clamp(-1, 1) for rows in samples(30))
    expected = value(first, second)
    metric, ids = MutualKNN(), torch.cat([torch.randperm(30), torch.arange(12)])
    for part in ids.split(8):
        metric.update(first[part], second[part], 5 * part)
    assert metric.compute() == expected
    metric.update(first[:2], second[:2])
    with pytest.raises(InputError, match="sample_ids must be given in all batches or in none, got none for 2 of 44"):
        metric.compute()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision(dtype: torch.dtype) -> None:
    first, second = (side.to(dtype) for side in samples(30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = value(first, second, 6)
        table = mutual_knn_table([first], [second], k=6)
    assert result.dtype == table.dtype == torch.float32
    assert result == table
    # Rows of half numbers have ties, which the plain form breaks otherwise.
    assert result.item() == pytest.approx(plain(first, second, 6), abs=0.01)
    metric = MutualKNN()
    metric.update(first, second)
    metric.to(torch.bfloat16)
    assert metric.image_features[0].dtype == torch.float32


def test_stop_gradient() -> None:
    first, second = (rows.requires_grad_() for rows in samples(10))
    metric = MutualKNN(2)
    assert not metric(first, second).requires_grad
    assert not metric.text_features[0].requires_grad


def test_identity_forward_and_merge() -> None:
    first, second = samples(20)
    metric, other = MutualKNN(3), MutualKNN(3)
    assert metric(first[:8], second[:8]).item() == pytest.approx(plain(first[:8], second[:8], 3), abs=1e-6)
    other.update(first[8:], second[8:])
    metric.merge_state(other)
    assert metric.compute().item() == pytest.approx(plain(first, second, 3), abs=1e-6)


def test_pickle_and_reset() -> None:
    first, second = samples(20)
    metric = MutualKNN(3)
    metric.update(first[:8], second[:8])
    again = pickle.loads(pickle.dumps(metric))
    again.update(first[8:], second[8:])
    assert again.compute().item() == pytest.approx(plain(first, second, 3), abs=1e-6)
    metric.reset()
    metric.update(second, first)  # another width
    assert metric.compute().item() == pytest.approx(plain(first, second, 3), abs=1e-6)
    assert metric.state_dict() == {}


def test_collection_does_not_confuse_two_k() -> None:
    first, second = samples(20)
    pair = MetricCollection({"few": MutualKNN(2), "many": MutualKNN(7)})
    for part in torch.arange(20).split(6):
        pair.update(first[part], second[part])
    expected = {"few": plain(first, second, 2), "many": plain(first, second, 7)}
    assert {name: result.item() for name, result in pair.compute().items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MutualKNN("rise"), "k must be a number or one of rice, sqrt, sturges, got 'rise'. Did you mean rice"),
        (lambda: MutualKNN(0), "k must be a whole number of at least 1, or one of rice, sqrt, sturges, got 0"),
        (lambda: MutualKNN(2, chunk_size=-1), "chunk_size must be at least 1, or None for blocks of 64 MiB, got -1"),
        (lambda: mutual_knn_table([], [torch.ones(9, 2)]), "image_layers must be a list of features, one tensor a layer"),
        (lambda: mutual_knn_table([torch.ones(9, 2)], [torch.ones(8, 2)]), r"text_layers\[0\] must have the rows of"),
        (lambda: mutual_knn_table([torch.ones(9, 2)], [torch.ones(9)]), r"text_layers\[0\] must have two dimensions"),
        (lambda: mutual_knn_table([torch.ones(9, 2), torch.ones(9, 2) / 0], [torch.ones(9, 2)]), r"layers\[1\] must be fin"),
        (lambda: mutual_knn_table([torch.eye(4)], [torch.eye(4)]), "k must be below the number of samples, got 4 for 4"),
        (lambda: mutual_knn(torch.ones(3, 1), torch.ones(3, 1)), r"first must be neighbours \(n, k\),.* got torch.float32"),
        (lambda: mutual_knn(torch.ones(3, 1).long(), torch.ones(3, 2).long()), "second must have the shape and device of"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(3), torch.ones(3, 1)), "image_features must have two dimensions"),
        (
            (torch.ones(3, 1), torch.ones(2, 1)),
            "text_features must have a row for each row of image_features, got 2 and 3",
        ),
        ((torch.ones(2, 1), torch.ones(2, 1), torch.tensor([0, -3])), "sample_ids must be at least 0, found -3"),
    ],
)
def test_bad_batch(batch: tuple[Any, ...], message: str) -> None:
    metric = MutualKNN()
    with pytest.raises(InputError, match=message):
        metric.update(*batch)
    assert metric.image_features == metric.sample_ids == []
