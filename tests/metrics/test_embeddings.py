"""zoo.metrics.embeddings, and the metrics that use it in two processes: starting those is what takes the time."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo.metrics.embeddings
from zoo.errors import InputError
from zoo.metrics.embeddings import RowsMetric, first_of_each, settings_digest, unit_rows
from zoo.metrics.retrieval import RetrievalRecall
from zoo.metrics.structure import StructureTransfer
from zoo.metrics.zero_shot import ZeroShotAccuracy


def numbers(result: Any) -> list[float]:
    return [value.item() for value in result.values()] if isinstance(result, dict) else [result.item()]


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30])
def test_unit_rows_at_extreme_lengths(scale: float) -> None:
    rows = scale * torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    torch.testing.assert_close(unit_rows(rows), torch.tensor([[0.6, -0.8], [0, 0]]), rtol=0, atol=1e-2)
    large = torch.full((1, 4), 3e38)
    assert unit_rows(large).tolist() == [[0.5] * 4]
    assert unit_rows(torch.tensor([[math.inf, 1.0], [1.0, math.nan]])).isnan().any(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision(dtype: torch.dtype) -> None:
    result = unit_rows(torch.tensor([[3e4, 4e4]], dtype=dtype))
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.float(), torch.tensor([[0.6, 0.8]]), rtol=0, atol=1e-2)
    assert result.norm().item() == pytest.approx(1, abs=1e-6)


def test_first_of_each() -> None:
    ids = torch.randint(0, 9, (50,))
    expected = [ids.tolist().index(number) for number in sorted(set(ids.tolist()))]
    assert first_of_each(ids).tolist() == expected
    assert first_of_each(ids[:0]).tolist() == []


def test_settings_digest() -> None:
    assert torch.equal(settings_digest(torch.eye(2), (1, 5)), settings_digest(torch.eye(2), (1, 5)))
    others = [(torch.eye(2), (1,)), (torch.eye(2).flip(0), (1, 5)), (None, (1, 5)), (torch.eye(2),)]
    assert not any(torch.equal(settings_digest(torch.eye(2), (1, 5)), settings_digest(*other)) for other in others)


class _Keeps(RowsMetric):
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_rows("rows")
        self.add_numbers("ids")

    def update(self, rows: Tensor, ids: Tensor) -> None:
        self.keep("rows", rows)
        self.keep("ids", ids)

    def compute(self) -> dict[str, Tensor]:
        return {"rows": self.matrix("rows"), "ids": self.numbers("ids")}


def test_rows_and_numbers() -> None:
    metric, large = _Keeps(), 2**53 + 1  # a whole number that no float64 is
    metric.update(torch.ones(2, 3), torch.tensor([5, large]))
    metric.to(torch.bfloat16).set_dtype(torch.float64)
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    result = metric.compute()
    assert result["rows"].dtype == torch.float32
    assert result["rows"].tolist() == [[1, 1, 1]] * 2
    assert result["ids"].tolist() == [5, large]
    metric.update(torch.ones(1, 4), torch.tensor([1]))
    with pytest.raises(InputError, match=r"rows must have one width, got 3, 4; reset\(\) the metric first"):
        metric.compute()
    metric.reset()
    assert metric.rows == metric.ids == metric.rows_width == []


def _data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, 3, generator=generator, dtype=torch.float64)

    images = draw(7)
    owners = torch.randint(0, 7, (17,), generator=generator)
    texts = images[owners] + 0.7 * draw(17)
    return {"images": images, "texts": texts, "owners": owners, "pairs": images + 0.7 * draw(7)}


# What each process sees, of images and texts: uneven shards, none in the first process, texts apart from their images, and
# shards that overlap.
SHARDS = {
    "all": [(slice(None), slice(None))],
    "uneven": [(slice(0, 2), slice(0, 12)), (slice(2, 7), slice(12, 17))],
    "one-sided": [(slice(0, 0), slice(0, 0)), (slice(0, 7), slice(0, 17))],
    "apart": [(slice(0, 7), slice(0, 0)), (slice(0, 0), slice(0, 17))],
    "padded": [(slice(0, 4), slice(0, 12)), (slice(3, 7), slice(9, 17))],
}


def _compute(shards: str, rank: int) -> dict[str, list[float]]:
    data, (images, texts) = _data(), SHARDS[shards][rank]
    retrieval, pairs = RetrievalRecall(k=(1, 2)), RetrievalRecall(k=(1, 2))
    structures = {(limit, given): StructureTransfer(limit) for limit in (2000, 9) for given in (False, True)}
    accuracies = {
        average: ZeroShotAccuracy(torch.eye(8, 3), k=(1, 2, 8), average=average) for average in ("micro", "macro")
    }
    metrics = [retrieval, pairs, *structures.values(), *accuracies.values()]
    if images == texts == slice(0, 0):
        for metric in metrics:
            metric._update_count = 1  # as after a batch, so that compute does not warn
    else:
        retrieval.update(
            data["images"][images], data["texts"][texts], torch.arange(7)[images], data["owners"][texts],
            torch.arange(17)[texts],
        )  # fmt: skip
        pairs.update(data["images"][images], data["pairs"][images])
        for (_, given), structure in structures.items():
            structure.update(data["images"][images], data["pairs"][images], torch.arange(7)[images] if given else None)
        for accuracy in accuracies.values():
            accuracy.update(data["texts"][texts], data["owners"][texts])
    names = ["retrieval", "pairs", *map(str, structures), *accuracies]
    return {name: numbers(metric.compute()) for name, metric in zip(names, metrics, strict=True)}


def _on_rank(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {shards: _compute(shards, rank) for shards in SHARDS if shards != "all"}
    # What was gathered for a result is not kept: the next batch adds to what this process has seen.
    metric = _Keeps()
    for start in (0, 2):
        metric.update(torch.full((1 + rank, 2), float(rank)), torch.arange(start, start + 1 + rank))
        results[f"ids {start}"] = metric.compute()["ids"].tolist()
    return results


def test_two_processes_equal_one(two_processes: Callable[..., list[Any]]) -> None:
    expected = _compute("all", 0)
    for result in two_processes(_on_rank):
        for shards in ("uneven", "one-sided", "apart", "padded"):
            # Rows that come twice without numbers of their own count twice: left out are pairs and accuracies.
            names = [name for name in expected if shards != "padded" or name not in ("pairs", "micro", "macro")]
            assert {name: result[shards][name] for name in names} == {
                name: pytest.approx(expected[name], abs=1e-6) for name in names
            }
        assert result["ids 0"] == [0, 0, 1]
        assert result["ids 2"] == [0, 2, 0, 1, 2, 3]


def test_examples() -> None:
    result = doctest.testmod(zoo.metrics.embeddings, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
