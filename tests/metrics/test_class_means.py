"""zoo.metrics.ClassMeans against the mean of each class's rows."""

from __future__ import annotations

import doctest
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo.metrics.class_means
from zoo.errors import InputError
from zoo.losses import nd_loss
from zoo.metrics import ClassMeans


def plain_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    rows = [features[labels == k].double() for k in range(classes)]
    return torch.stack([row.sum(0) / len(row) if len(row) else row.sum(0) for row in rows])


def filled(batches: int = 3) -> tuple[ClassMeans, Tensor, Tensor]:
    metric = ClassMeans(num_classes=4, dim=3)
    features, labels = torch.randn(5 * batches, 3), torch.arange(5 * batches) % 3  # class 3 has no sample
    for rows, targets in zip(features.split(5), labels.split(5), strict=True):
        metric.update(rows, targets)
    return metric, features, labels


def test_golden() -> None:
    """The bank of section 6 of the project's notes on arXiv 2305.17007: two, three, two and no samples."""
    bank = [[2, 0, 1, 0.5], [1, 0.5, 0, 0.5], [0, 3, 0.5, 0], [0.5, 2, 0, 1], [1, 2.25, 0.25, 0.5]]
    bank += [[0, 0.5, 1.5, 2], [0.5, 0, 2.5, 1]]
    metric = ClassMeans(num_classes=4, dim=4)
    metric.update(torch.tensor(bank), torch.tensor([0, 0, 1, 1, 1, 2, 2]))
    expected = [[1.5, 0.25, 0.5, 0.5], [0.5, 7.25 / 3, 0.25, 0.5], [0.25, 0.25, 2, 1.5], [0, 0, 0, 0]]
    torch.testing.assert_close(metric.compute(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)
    assert metric.counts.tolist() == [2, 3, 2, 0]


def test_identity_batches() -> None:
    metric, features, labels = filled()
    torch.testing.assert_close(metric.compute(), plain_means(features, labels, 4), rtol=0, atol=1e-15)
    assert metric.counts.tolist() == [5, 5, 5, 0]
    assert metric.counts.dtype == torch.int64


def test_identity_forward() -> None:
    """Calling the metric returns the batch's means and accumulates as update does."""
    metric = ClassMeans(num_classes=2, dim=1)
    first = metric(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))
    second = metric(torch.tensor([[8.0], [5.0]]), torch.tensor([0, 1]))
    assert first.tolist() == [[2.0], [0.0]]
    assert second.tolist() == [[8.0], [5.0]]
    assert metric.compute().tolist() == [[4.0], [5.0]]
    assert metric.counts.tolist() == [3, 1]


@settings(deadline=None, max_examples=30)
@given(data=st.data(), scale=st.floats(1e-3, 1e6))
def test_properties(data: st.DataObject, scale: float) -> None:
    """Neither the order of the samples nor their division into batches counts."""
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=20)))
    features = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(1)) * scale
    size = data.draw(st.integers(1, 20))
    metric = ClassMeans(num_classes=5, dim=2)
    order = torch.tensor(data.draw(st.permutations(range(len(labels)))))
    for rows, targets in zip(features[order].split(size), labels[order].split(size), strict=True):
        metric.update(rows, targets)
    torch.testing.assert_close(metric.compute(), plain_means(features, labels, 5), rtol=1e-12, atol=1e-12 * scale)
    assert torch.equal(metric.counts, torch.bincount(labels, minlength=5))


def test_stop_gradient_features() -> None:
    metric = ClassMeans(num_classes=2, dim=3)
    metric.update(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 1, 0]))
    # torchmetrics itself lets gradients through when the metric is called.
    assert not metric(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 1, 0])).requires_grad
    assert not metric.class_sums.requires_grad
    assert not metric.compute().requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision(dtype: torch.dtype) -> None:
    """Sums are float64: 4096 equal halves, and a large value that float32 would swallow the others with."""
    metric = ClassMeans(num_classes=1, dim=2)
    metric.update(torch.full((4096, 2), 0.5, dtype=dtype), torch.zeros(4096, dtype=torch.int64))
    assert metric.compute().tolist() == [[0.5, 0.5]]
    metric.reset()
    metric.update(torch.tensor([[2.0**30, 0]] + [[1.0, 0]] * 3), torch.zeros(4, dtype=torch.int64))
    assert metric.compute().tolist() == [[(2.0**30 + 3) / 4, 0]]


@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16), nn.Module.float]
)
def test_half_precision_conversion(convert: Callable[[nn.Module], nn.Module]) -> None:
    """Converting a module that holds the metric does not round the sums."""
    metric, features, labels = filled()
    convert(nn.ModuleDict({"metric": metric, "layer": nn.Linear(1, 1)}))
    assert metric.class_sums.dtype == torch.float64
    assert metric.class_counts.dtype == torch.int64
    torch.testing.assert_close(metric.compute(), plain_means(features, labels, 4), rtol=0, atol=1e-15)


def test_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in for MPS: sums become float32 before they move."""
    monkeypatch.setattr(zoo.metrics.class_means, "_WITHOUT_FLOAT64", frozenset({"meta"}))
    metric = filled()[0].to("meta")
    assert metric.class_sums.dtype == torch.float32
    assert metric.class_sums.device.type == "meta"
    assert metric.class_counts.dtype == torch.int64
    metric.reset()
    assert metric.class_sums.dtype == torch.float32


def test_missing_classes_are_left_out_by_the_loss() -> None:
    metric, features, _ = filled()
    assert metric.compute()[3].tolist() == [0, 0, 0]
    values = nd_loss(features[:2], features[:2], metric.compute(), torch.tensor([3, 0]), reduction="none")
    assert values[0] == 0
    assert values[1] != 0


def test_batch_of_one_and_empty_batch() -> None:
    metric = ClassMeans(num_classes=2, dim=2)
    metric.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert metric.compute().tolist() == [[0, 0], [0, 0]]
    metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
    assert metric.compute().tolist() == [[0, 0], [1, 2]]


def test_reset_and_counts() -> None:
    metric, _, _ = filled()
    metric.compute()
    assert metric.counts.sum() == 15
    metric.update(torch.zeros(1, 3), torch.tensor([3]))
    assert metric.counts.tolist() == [5, 5, 5, 1]
    metric.reset()
    assert metric.counts.sum() == 0
    assert metric.class_sums.abs().sum() == 0


def test_large_features_are_not_mistaken_for_broken_ones() -> None:
    """The sum over a float64 batch overflows although every feature is finite."""
    metric = ClassMeans(num_classes=2, dim=1)
    metric.update(torch.tensor([[1.7e308], [1.7e308]], dtype=torch.float64), torch.tensor([0, 1]))
    assert metric.compute().tolist() == [[1.7e308], [1.7e308]]


def test_inference_mode() -> None:
    """A reset inside inference_mode does not make a later update outside of it impossible."""
    metric = ClassMeans(num_classes=1, dim=2)
    with torch.inference_mode():
        metric.reset()
        metric.update(torch.ones(1, 2), torch.tensor([0]))
    metric.update(3 * torch.ones(1, 2), torch.tensor([0]))
    assert metric.compute().tolist() == [[2.0, 2.0]]


def test_pickle() -> None:
    metric, features, labels = filled()
    again = pickle.loads(pickle.dumps(metric))
    again.update(features, labels)
    assert again.counts.tolist() == [10, 10, 10, 0]
    torch.testing.assert_close(again.compute(), metric.compute())


def test_no_state_in_the_checkpoint() -> None:
    assert filled()[0].state_dict() == {}


def _shard(rank: int) -> tuple[Tensor, Tensor]:
    features = torch.randn(11, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 2, 0, 0, 1, 0])
    rows = slice(0, 8) if rank == 0 else slice(8, 11)
    return (features, labels) if rank < 0 else (features[rows], labels[rows])


def _on_rank(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    metric = ClassMeans(num_classes=4, dim=3)
    metric.update(*_shard(rank))
    before = metric.counts.clone()
    means = metric.compute()
    after = metric.counts.clone()
    metric.update(torch.zeros(1, 3), torch.tensor([3]))
    return means, before, after, metric.counts


def test_two_processes_equal_one(two_processes: Callable[..., list[Any]]) -> None:
    """Shards of 8 and 3 samples with other class shares: the mean of the two means would be another number."""
    features, labels = _shard(-1)
    expected = plain_means(features, labels, 4)
    results = two_processes(_on_rank)
    for rank, (means, before, after, later) in enumerate(results):
        torch.testing.assert_close(means, expected, rtol=0, atol=1e-12)
        own = torch.bincount(_shard(rank)[1], minlength=4)
        assert torch.equal(before, own)
        assert after.tolist() == [6, 4, 1, 0]
        assert torch.equal(later, own + torch.tensor([0, 0, 0, 1]))


@pytest.mark.parametrize("bad", [-1, 4])
def test_bad_label(bad: int) -> None:
    metric, _, _ = filled()
    kept = metric.class_sums.clone()
    with pytest.raises(InputError, match=rf"targets must be labels in 0 … 3 \(4 classes\), found {bad}"):
        metric.update(torch.ones(2, 3), torch.tensor([0, bad]))
    assert torch.equal(metric.class_sums, kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_features(bad: float) -> None:
    metric, _, _ = filled()
    kept = metric.class_sums.clone()
    features = torch.ones(6, 3)
    features[2, 1] = features[4, 0] = bad
    with pytest.raises(
        InputError, match="features must be finite, 2 of 6 samples hold NaN or infinity, the first at position 2"
    ):
        metric.update(features, torch.zeros(6, dtype=torch.int64))
    assert torch.equal(metric.class_sums, kept)


@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        (torch.ones(2), torch.tensor([0, 1]), r"features must have two dimensions"),
        (torch.ones(2, 4), torch.tensor([0, 1]), r"features must have the width dim=3, got shape \(2, 4\)"),
        (
            torch.ones(2, 3, dtype=torch.int64),
            torch.tensor([0, 1]),
            r"features must be floating point, got torch.int64",
        ),
        (torch.ones(2, 3), torch.tensor([0]), r"targets must be one label per sample, shape \(2,\), got shape \(1,\)"),
        (torch.ones(2, 3), torch.ones(2), r"targets must be integer labels, got torch.float32"),
        (torch.ones(2, 3), torch.tensor([True, False]), r"targets must be integer labels, got torch.bool"),
    ],
)
def test_bad_batch(features: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassMeans(num_classes=4, dim=3).update(features, targets)


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="num_classes must be at least 1, got 0"):
        ClassMeans(num_classes=0, dim=3)
    with pytest.raises(InputError, match="dim must be at least 1, got -2"):
        ClassMeans(num_classes=3, dim=-2)


def test_examples() -> None:
    result = doctest.testmod(zoo.metrics.class_means)
    assert result.attempted > 0
    assert result.failed == 0
