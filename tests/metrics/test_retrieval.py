"""zoo.metrics.RetrievalRecall against ranks from the whole matrix of cosines, one query at a time."""

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
from torch import Tensor
from torchmetrics import MetricCollection

import zoo.metrics.neighbours
from tests.largest_tensor import LargestTensor
from zoo.errors import InputError
from zoo.metrics.retrieval import RetrievalRecall


def plain_ranks(queries: Tensor, query_ids: list[int], gallery: Tensor, gallery_ids: list[int]) -> list[float]:
    """Rank of the best match among the items that are no match; ties against the query."""
    rows, items = (
        np.stack([row / (np.linalg.norm(row) or 1) for row in side.double().numpy()]) for side in (queries, gallery)
    )
    ranks = []
    for row, number in zip(rows, query_ids, strict=True):
        cosines = items @ row
        own = np.array(gallery_ids) == number
        if own.any():
            ranks.append(1 + float((cosines[~own] >= cosines[own].max() - 1e-6).sum()))
    return ranks


def plain(
    images: Tensor, image_ids: list[int], texts: Tensor, text_image_ids: list[int], ks: tuple[int, ...]
) -> dict[str, float]:
    result = {}
    for name, arguments in (
        ("image_to_text", (images, image_ids, texts, text_image_ids)),
        ("text_to_image", (texts, text_image_ids, images, image_ids)),
    ):
        ranks = plain_ranks(*arguments)
        result |= {f"{name}/r{k}": float(np.mean([rank <= k for rank in ranks])) for k in ks}
        result[f"{name}/median_rank"] = float(np.median(ranks))
    return result


def values(metric: RetrievalRecall) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def on_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


# Images at 0, 100 and 200 degrees, two texts each. Distances of the texts to (image 0, image 1, image 2):
#   text 10  of 0:  10  90 170 -> rank 1      text 95  of 1:  95   5 105 -> rank 1
#   text 60  of 0:  60  40 140 -> rank 2      text 190 of 1: 170  90  10 -> rank 2
#   text 205 of 2: 155 105   5 -> rank 1      text 5   of 2:   5  95 165 -> rank 3
# and of the images to their nearest text: image 0 has text 10 at 10 behind text 5 of image 2 -> rank 2, image 1 has text 95
# at 5 -> rank 1, image 2 has text 205 at 5 -> rank 1.
IMAGES, TEXTS = on_circle(0, 100, 200), on_circle(10, 60, 95, 190, 205, 5)
IMAGE_IDS, TEXT_IMAGE_IDS = [0, 1, 2], [0, 0, 1, 1, 2, 2]
GOLDEN = {
    "image_to_text/r1": 2 / 3,
    "image_to_text/r2": 1.0,
    "image_to_text/median_rank": 1.0,
    "text_to_image/r1": 0.5,
    "text_to_image/r2": 5 / 6,
    "text_to_image/median_rank": 1.5,
}


def test_golden() -> None:
    metric = RetrievalRecall(k=(1, 2))
    metric.update(3 * IMAGES, 0.1 * TEXTS, torch.tensor(IMAGE_IDS), torch.tensor(TEXT_IMAGE_IDS))
    assert values(metric) == pytest.approx(GOLDEN)
    assert plain(IMAGES, IMAGE_IDS, TEXTS, TEXT_IMAGE_IDS, (1, 2)) == pytest.approx(GOLDEN)


def test_identity_ways_to_give_batches() -> None:
    """Pairs that repeat the image, texts before their image, and ids far apart give the same."""
    pairs = RetrievalRecall(k=(1, 2))
    for part in (slice(0, 4), slice(4, 6)):
        ids = torch.tensor(TEXT_IMAGE_IDS)[part]
        pairs.update(IMAGES[ids], TEXTS[part], ids)
    assert values(pairs) == pytest.approx(GOLDEN)
    apart = RetrievalRecall(k=(1, 2))
    none = torch.zeros(0, dtype=torch.int64)
    far = torch.tensor([2**40, 3, 2**62])
    apart.update(torch.zeros(0, 2), TEXTS, none, far[TEXT_IMAGE_IDS])
    apart.update(IMAGES, torch.zeros(0, 2), far, none)
    assert values(apart) == pytest.approx(GOLDEN)


def test_identity_pairs_without_ids() -> None:
    metric, images, texts = RetrievalRecall(k=(1, 3)), torch.randn(11, 4), torch.randn(11, 4)
    for rows in (slice(0, 5), slice(5, 11)):
        metric.update(images[rows], texts[rows])
    numbers = list(range(11))
    assert values(metric) == pytest.approx(plain(images, numbers, texts, numbers, (1, 3)))


def test_pairs_with_and_without_ids_together() -> None:
    metric, images, texts = RetrievalRecall(k=(1, 3)), torch.randn(7, 4), torch.randn(7, 4)
    metric.update(images[:3], texts[:3], torch.tensor([1, 0, 5]))
    metric.update(images[3:], texts[3:])
    numbers = list(range(7))
    assert values(metric) == pytest.approx(plain(images, numbers, texts, numbers, (1, 3)))


def test_what_comes_twice_counts_once() -> None:
    """As under a sampler that pads a shard; without text ids a text that comes twice is two texts."""
    metric = RetrievalRecall(k=(1, 2))
    for part in (slice(0, 3), slice(3, 6), slice(1, 4)):
        ids = torch.tensor(TEXT_IMAGE_IDS)[part]
        metric.update(IMAGES[ids], TEXTS[part], ids, text_ids=torch.arange(6)[part])
    assert values(metric) == pytest.approx(GOLDEN)
    metric.update(IMAGES[:1], TEXTS[:1], torch.tensor([0]))
    assert metric.compute()["text_to_image/r1"] == pytest.approx(4 / 7)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), seed=st.integers(0, 100), coarse=st.booleans(), chunk_size=st.sampled_from([None, 1, 3, 100]))
def test_properties(data: st.DataObject, seed: int, coarse: bool, chunk_size: int | None) -> None:
    """Ties, zeros, unmatched items, any blocks and batches: what the whole matrix says."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    sides = [torch.randn(rows, 2, generator=generator) for rows in (images, texts)]
    if coarse:
        sides = [side.round().clamp(-1, 1) for side in sides]
    image_ids = torch.randperm(images + 1, generator=generator)[:images]
    text_image_ids = torch.randint(0, images + 1, (texts,), generator=generator)
    metric = RetrievalRecall(k=(1, 2, 50), chunk_size=chunk_size)
    cut = data.draw(st.integers(0, texts))
    order = torch.randperm(texts, generator=generator)
    metric.update(1e-20 * sides[0], sides[1][order[:cut]], image_ids, text_image_ids[order[:cut]])
    metric.update(sides[0][:1], 1e20 * sides[1][order[cut:]], image_ids[:1], text_image_ids[order[cut:]])
    if not set(image_ids.tolist()) & set(text_image_ids.tolist()):
        assert all(math.isnan(value) for value in values(metric).values())
        return
    expected = plain(sides[0], image_ids.tolist(), sides[1], text_image_ids.tolist(), (1, 2, 50))
    assert values(metric) == pytest.approx(expected)


@pytest.mark.parametrize("width", [1, 7, 512])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_constant_embeddings_score_nothing(width: int, scale: float) -> None:
    """Rounding that depends on the place in the matrix product does not break the tie."""
    vector = scale * torch.randn(1, width)
    metric = RetrievalRecall(k=(1, 36, 37), chunk_size=10)
    metric.update(vector.expand(37, -1), vector.expand(37, -1) * torch.rand(37, 1))
    result = values(metric)
    for name in ("image_to_text", "text_to_image"):
        assert [result[f"{name}/{key}"] for key in ("r1", "r36", "r37", "median_rank")] == [0, 0, 1, 37]


def test_not_finite_embeddings_are_never_found() -> None:
    metric = RetrievalRecall(k=(1, 10))
    images = torch.eye(3)
    images[1, 1] = math.nan
    metric.update(images, torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, math.inf]]))
    # Image 0 has text 2 before it, image 1 is nowhere, image 2 has no text with a number; the texts likewise.
    expected = {"r1": 0, "r10": 1 / 3, "median_rank": 4}
    assert values(metric) == pytest.approx(
        {f"{name}/{key}": value for name in ("image_to_text", "text_to_image") for key, value in expected.items()}
    )
    alone = RetrievalRecall(k=1)
    alone.update(torch.full((1, 2), math.nan), torch.ones(1, 2))
    assert values(alone)["image_to_text/r1"] == values(alone)["text_to_image/r1"] == 0
    assert values(alone)["image_to_text/median_rank"] == 2


@pytest.mark.parametrize("images", [0, 3])
def test_no_query(images: int) -> None:
    metric, none = RetrievalRecall(), torch.zeros(0, dtype=torch.int64)
    metric.update(torch.randn(images, 2), torch.zeros(0, 2), torch.arange(images), none)
    assert all(math.isnan(value) for value in values(metric).values())
    empty = RetrievalRecall()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert all(value.isnan() for value in empty.compute().values())


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_memory(monkeypatch: pytest.MonkeyPatch, chunk_size: int | None) -> None:
    """No tensor is larger than the embeddings or a block; the whole matrix would be 3.2 million numbers."""
    budget = 16 * 4000 * 12
    monkeypatch.setattr(zoo.metrics.neighbours, "_BUDGET", budget)
    images, texts = torch.randn(800, 4), torch.randn(4000, 4)
    metric = RetrievalRecall(chunk_size=chunk_size)
    metric.update(images, texts, torch.arange(800), torch.arange(4000) % 800)
    with LargestTensor() as largest:
        result = metric.compute()
    assert largest.numel == 16 * 4000
    assert result["image_to_text/r10"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision(dtype: torch.dtype) -> None:
    """Cosines are float32 under autocast: bfloat16 cannot tell the first two apart."""
    metric = RetrievalRecall(k=1)
    texts = torch.tensor([[1.0, 0.0], [1.0, 2e-2], [0.0, 1.0]], dtype=dtype)
    images = torch.tensor([[1.0, 0.0], [1.0, 2e-2], [0.0, 6e4]], dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(images, texts)
        result = values(metric)
    assert all(value == 1 for value in result.values())
    metric.to(torch.bfloat16)
    metric.set_dtype(torch.float16)
    metric.update(images, texts)
    assert metric.image_embeddings[0].dtype == torch.float32
    assert metric.numbers("text_ids").dtype == torch.int64


def test_stop_gradient() -> None:
    metric = RetrievalRecall()
    result = metric(torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True))
    assert not any(value.requires_grad for value in result.values())
    assert not metric.image_embeddings[0].requires_grad


def test_identity_forward_and_merge() -> None:
    metric, other = RetrievalRecall(k=(1, 3)), RetrievalRecall(k=(1, 3))
    images, texts, numbers = torch.randn(9, 4), torch.randn(9, 4), list(range(9))
    batch = metric(images[:4], texts[:4])
    assert {name: value.item() for name, value in batch.items()} == pytest.approx(
        plain(images[:4], numbers[:4], texts[:4], numbers[:4], (1, 3))
    )
    metric(images[4:6], texts[4:6])
    other.update(images[6:], texts[6:])
    metric.merge_state(other)
    assert values(metric) == pytest.approx(plain(images, numbers, texts, numbers, (1, 3)))


def test_pickle_and_reset() -> None:
    metric = RetrievalRecall(k=(1, 2))
    metric.update(IMAGES, TEXTS[:4], torch.tensor(IMAGE_IDS), torch.tensor(TEXT_IMAGE_IDS[:4]))
    again = pickle.loads(pickle.dumps(metric))
    again.update(IMAGES, TEXTS[4:], torch.tensor(IMAGE_IDS), torch.tensor(TEXT_IMAGE_IDS[4:]))
    assert values(again) == pytest.approx(GOLDEN)
    metric.reset()
    assert metric.image_embeddings == []
    metric.update(torch.eye(5), torch.eye(5))  # another width
    assert values(metric)["image_to_text/r1"] == 1
    assert metric.state_dict() == {}


def test_collection() -> None:
    metrics = MetricCollection({"few": RetrievalRecall(k=1), "many": RetrievalRecall(k=(2, 3))}, prefix="val/")
    for rows in (slice(0, 1), slice(1, 3)):
        metrics.update(torch.eye(3)[rows], torch.eye(3)[rows])
    assert metrics.compute()["val/few_image_to_text/r1"] == 1
    assert metrics.compute()["val/many_text_to_image/r3"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be one whole number of at least 1 or several different ones, got 0"),
        ({"k": [5, 5]}, r"k must be .* got \[5, 5\]"),
        ({"k": ()}, r"k must be .* got \(\)"),
        ({"chunk_size": 0}, r"chunk_size must be at least 1, or None for blocks of 64 MiB, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RetrievalRecall(**options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(2), torch.ones(2, 3)), r"image_embeddings must have two dimensions"),
        ((torch.ones(2, 3), torch.ones(2, 4)), r"text_embeddings must have the width of image_embeddings, 3, got 4"),
        ((torch.ones(2, 3), torch.ones(4, 3)), r"must be pairs, got 2 and 4 rows; say which image a text belongs to"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.arange(2)), r"must be pairs, got 2 and 4 rows"),
        ((torch.ones(2, 3), torch.ones(2, 3), None, torch.arange(2)), r"text_image_ids needs image_ids"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), r"image_ids must be whole numbers, got torch.float32"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.arange(3)), r"image_ids must be one number a row, shape \(2,\)"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, -1])), r"image_ids must be at least 0, found -1"),
    ],
)
def test_bad_batch(batch: tuple[Any, ...], message: str) -> None:
    metric = RetrievalRecall()
    with pytest.raises(InputError, match=message):
        metric.update(*batch)
    assert metric.image_embeddings == []


def test_bad_width_over_batches() -> None:
    metric = RetrievalRecall()
    metric.update(torch.ones(2, 3), torch.ones(2, 3))
    metric.update(torch.ones(2, 6), torch.ones(2, 6))
    with pytest.raises(InputError, match=r"image_embeddings must have one width, got 3, 6; reset\(\) the metric first"):
        metric.compute()


def test_examples() -> None:
    result = doctest.testmod(zoo.metrics.retrieval, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
