"""zoo.metrics.CKA from moments, and the table from blocks, against the matrices written out."""

from __future__ import annotations

import doctest
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

import zoo.metrics.cka
from tests.metrics.structure_layers import IMAGE_LAYERS, TEXT_LAYERS
from zoo.errors import InputError
from zoo.metrics.cka import CKA, cka_table


def plain(first: Tensor, second: Tensor, *, unbiased: bool = False, eps: float = 1e-6, centred: bool = False) -> float:
    """HSIC from the centred matrices of cosines, or Song's estimate from those without diagonals."""
    grams = []
    for rows in (first.double(), second.double()):
        units = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
        units = units - units.mean(0) if centred else units
        grams.append(units @ units.T)
    n = len(first)
    one, centering = torch.ones(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(k: Tensor, l: Tensor) -> float:
        if not unbiased:
            return torch.trace(k @ centering @ l @ centering).item()
        k, l = (m - m.diag().diag() for m in (k, l))
        third = 2 / (n - 2) * (one @ k @ l @ one)
        return ((torch.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - third) / (n * (n - 3))).item()

    length = math.sqrt(max(hsic(grams[0], grams[0]), 0) * max(hsic(grams[1], grams[1]), 0))
    return hsic(*grams) / (length + eps)


def samples(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 5, generator=generator) + 1
    return first, first[:, :3] + torch.randn(count, 3, generator=generator)


def value(first: Tensor, second: Tensor, **options: Any) -> Tensor:
    metric = CKA(**options)
    metric.update(first, second)
    return metric.compute()


def test_golden() -> None:
    """golden/structure.json of the project's notes, c9, first image and first text layer."""
    first, second = IMAGE_LAYERS[0], TEXT_LAYERS[0]
    assert value(first, second).item() == pytest.approx(0.880212380661315, abs=1e-7)
    assert value(first, second, unbiased=True).item() == pytest.approx(0.8502855893165492, abs=1e-7)
    assert cka_table([first], [second]).item() == pytest.approx(0.880212380661315, abs=1e-7)
    assert cka_table([first], [second], unbiased=True).item() == pytest.approx(0.8502855893165492, abs=1e-7)
    # Two millionths less than without eps: the unbiased estimate divides by n (n - 3) first.
    assert value(first, second, unbiased=True, eps=0).item() == pytest.approx(0.850287570089043, abs=1e-7)


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(5, 20), seed=st.integers(0, 999), unbiased=st.booleans(), size=st.integers(1, 9),
    eps=st.sampled_from([0.0, 1e-6, 0.1]),
)  # fmt: skip
def test_properties(count: int, seed: int, unbiased: bool, size: int, eps: float) -> None:
    """The matrices; batches, lengths, rotations and the order of sides and samples do not count."""
    first, second = samples(count, seed=seed)
    options: dict[str, Any] = {"unbiased": unbiased, "eps": eps}
    expected = pytest.approx(plain(first, second, **options), abs=1e-5)
    metric = CKA(**options)
    for start in range(0, count, size):
        metric.update(1e20 * first[start : start + size], 1e-20 * second[start : start + size])
    assert metric.compute().item() == expected
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    order = torch.randperm(count)
    assert value((second @ rotation)[order], first[order], **options).item() == expected
    assert cka_table([second, first], [second], chunk_size=size, **options)[1, 0].item() == expected
    if eps == 0:
        assert value(first, first, **options).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_near_directions(unbiased: bool) -> None:
    """Cosines above 1 - 1e-4, as in early layers."""
    generator = torch.Generator().manual_seed(2)
    first = torch.cat([torch.ones(200, 1), 3e-3 * torch.randn(200, 3, generator=generator)], 1).double()
    second = first + 1e-3 * torch.randn(200, 4, generator=generator)
    # The unbiased estimate does not change when the rows are shifted.
    expected = plain(first, second, unbiased=unbiased, eps=0, centred=True)
    assert 0.5 < expected < 0.99
    assert value(first, second, unbiased=unbiased, eps=0).item() == pytest.approx(expected, abs=1e-6)
    assert cka_table([first], [second], unbiased=unbiased, eps=0).item() == pytest.approx(expected, abs=1e-6)


def test_identity_bias() -> None:
    """Unrelated encoders with more dimensions than samples: biased CKA says that they are alike, unbiased CKA does not."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(40, 400, generator=generator) for _ in range(2))
    assert value(first, second).item() > 0.8
    assert value(first, second, unbiased=True).abs().item() < 0.1


def test_degenerate() -> None:
    first, second = samples(9)
    for unbiased in (False, True):
        for flat in (torch.ones(9, 3), torch.zeros(9, 3), torch.randn(1, 50).expand(9, -1)):
            assert value(flat, second, unbiased=unbiased).item() == pytest.approx(0, abs=1e-6)
            assert value(flat, flat, unbiased=unbiased).item() == pytest.approx(0, abs=1e-6)
            assert cka_table([flat], [flat, second], unbiased=unbiased).abs().max() < 1e-6
        enough = 4 if unbiased else 2
        assert value(first[: enough - 1], second[: enough - 1], unbiased=unbiased).isnan()
        assert value(first[:0], second[:0], unbiased=unbiased).isnan()
        assert value(first[:enough], second[:enough], unbiased=unbiased).isfinite()
        with_zero = torch.cat([torch.zeros(2, 5), first[2:]])
        expected = pytest.approx(plain(with_zero, second, unbiased=unbiased), abs=1e-6)
        assert value(with_zero, second, unbiased=unbiased).item() == expected
        assert cka_table([second], [with_zero], unbiased=unbiased).item() == expected
        broken = first.clone()
        broken[3, 1] = math.nan
        assert value(broken, second, unbiased=unbiased).isnan()
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            assert CKA(unbiased=unbiased).compute().isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision(dtype: torch.dtype) -> None:
    first, second = (side.to(dtype) for side in samples(30))
    metric = CKA()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(first, second)
        metric.to(torch.bfloat16).set_dtype(torch.float16)
        result = metric.compute()
        table = cka_table([first], [second])
    assert metric.moments[0].dtype == torch.float64
    assert result.dtype == table.dtype == torch.float32
    assert result.item() == pytest.approx(plain(first, second), abs=1e-6)
    assert table.item() == pytest.approx(plain(first, second), abs=1e-6)


def test_memory() -> None:
    """Nothing that grows with the samples is kept."""
    metric = CKA()
    for _ in range(5):
        metric.update(*samples(50))
    assert [tuple(state.shape) for state in metric.moments + metric.widths] == [(11 * 11,), (2,)]


def test_stop_gradient() -> None:
    first, second = (rows.requires_grad_() for rows in samples(10))
    metric = CKA()
    assert not metric(first, second).requires_grad
    assert not metric.moments[0].requires_grad


def test_identity_forward_and_merge() -> None:
    first, second = samples(20)
    metric, other = CKA(), CKA()
    assert metric(first[:8], second[:8]).item() == pytest.approx(plain(first[:8], second[:8]), abs=1e-6)
    metric(first[8:14], second[8:14])
    other.update(first[14:], second[14:])
    metric.merge_state(other)
    assert metric.compute().item() == pytest.approx(plain(first, second), abs=1e-6)


def test_pickle_and_reset() -> None:
    first, second = samples(20)
    metric = CKA()
    metric.update(first[:8], second[:8])
    again = pickle.loads(pickle.dumps(metric))
    again.update(first[8:], second[8:])
    assert again.compute().item() == pytest.approx(plain(first, second), abs=1e-6)
    metric.reset()
    metric.update(second, first)  # other widths
    assert metric.compute().item() == pytest.approx(plain(first, second), abs=1e-6)
    assert metric.state_dict() == {}


def test_collection_does_not_confuse_two_estimates() -> None:
    first, second = samples(20)
    pair = MetricCollection({"biased": CKA(), "unbiased": CKA(unbiased=True)})
    for part in torch.arange(20).split(6):
        pair.update(first[part], second[part])
    expected = {"biased": plain(first, second), "unbiased": plain(first, second, unbiased=True)}
    assert {name: result.item() for name, result in pair.compute().items()} == pytest.approx(expected, abs=1e-6)


def test_bad_arguments() -> None:
    metric = CKA()
    with pytest.raises(InputError, match="eps must be finite and not negative, got -1"):
        CKA(eps=-1)
    with pytest.raises(InputError, match="image_features must have two dimensions"):
        metric.update(torch.ones(3), torch.ones(3, 1))
    with pytest.raises(InputError, match="text_features must have a row for each row of image_features, got 2 and 3"):
        metric.update(torch.ones(3, 1), torch.ones(2, 1))
    assert metric.moments == []
    metric.update(torch.ones(3, 1), torch.ones(3, 2))
    with pytest.raises(InputError, match=r"must keep their widths, \[1, 2\], got \[2, 1\]; reset\(\) the metric first"):
        metric.update(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(InputError, match="CKA needs at least 4 samples, got 3"):
        cka_table([torch.ones(3, 1)], [torch.ones(3, 1)], unbiased=True)
    with pytest.raises(InputError, match="text_layers must be a list of features, one tensor a layer, at least one"):
        cka_table([torch.ones(3, 1)], [])


def test_examples() -> None:
    result = doctest.testmod(zoo.metrics.cka, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_no_eps_and_rows_all_alike() -> None:
    """0 / 0 is the documented 0."""
    rows, alike = torch.randn(5, 3), torch.zeros(5, 2)
    assert cka_table([alike], [rows], eps=0.0).tolist() == [[0.0]]
    metric = CKA(eps=0.0)
    metric.update(alike, rows)
    assert metric.compute() == 0
