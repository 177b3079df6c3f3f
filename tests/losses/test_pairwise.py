"""zoo.losses.pairwise against the dense formulas, in value, gradient and second derivative."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.pairwise import pairwise_logsumexp, pairwise_softplus

CHUNKS = [None, 1, 3, 5, 100]


def features(count: int = 13, width: int = 5, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, width, dtype=dtype).requires_grad_()


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def dense_sums(queries: Tensor, keys: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    scores = scale * queries @ keys.t()
    positives = scores.diagonal()
    columns = scores.logsumexp(0)[: len(queries)] - positives
    return scores.logsumexp(1) - positives, columns, positives


def dense_softplus(queries: Tensor, keys: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    sign = 2 * torch.eye(len(queries), dtype=queries.dtype) - 1
    return F.softplus(-sign * (scale * queries @ keys.t() + bias)).sum()


def gradients(outputs: Any, inputs: Any) -> tuple[Tensor, ...]:
    """Of a sum of the outputs with weights of both signs."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    weights = [torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape) for out in outputs]
    return torch.autograd.grad(sum((w * out).sum() for w, out in zip(weights, outputs, strict=True)), inputs)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_identity_dense_formula(chunk_size: int | None) -> None:
    queries, keys, scale = features(), features(), number(2.3)
    ours = pairwise_logsumexp(queries, keys, scale=scale, chunk_size=chunk_size)
    dense = dense_sums(queries, keys, scale)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for name, expected in zip(("rows", "columns", "positives"), dense, strict=True):
        torch.testing.assert_close(getattr(ours, name), expected, **close)
    inputs = queries, keys, scale
    for found, expected in zip(gradients(ours, inputs), gradients(dense, inputs), strict=True):
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_identity_dense_formula_single_precision(chunk_size: int | None) -> None:
    unit = [F.normalize(torch.randn(70, 32), dim=1).requires_grad_() for _ in range(2)]
    scale = number(14.3, torch.float32)
    ours = pairwise_logsumexp(*unit, scale=scale, chunk_size=chunk_size)
    dense = dense_sums(*unit, scale)
    for found, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(found.mean(), expected.mean(), rtol=1e-6, atol=1e-7)
    for found, expected in zip(gradients(ours, (*unit, scale)), gradients(dense, (*unit, scale)), strict=True):
        assert (found - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_identity_more_keys_than_queries(chunk_size: int | None) -> None:
    queries, keys = features(4), features(11)
    ours = pairwise_logsumexp(queries, keys, scale=1.5, columns=False, chunk_size=chunk_size)
    rows, _, positives = dense_sums(queries, keys, 1.5)
    assert ours.columns.shape == (0,)
    torch.testing.assert_close(ours.rows, rows)
    for found, expected in zip(
        gradients(ours, (queries, keys)), gradients((rows, positives[:0], positives), (queries, keys)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_identity_softplus(chunk_size: int | None) -> None:
    inputs = features(), features(), number(2.3), number(-1.2)
    ours = pairwise_softplus(*inputs[:2], scale=inputs[2], bias=inputs[3], chunk_size=chunk_size)
    dense = dense_softplus(*inputs)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ours, dense, **close)
    for found, expected in zip(gradients(ours, inputs), gradients(dense, inputs), strict=True):
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("learns", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_identity_each_gradient_alone(learns: tuple[int, ...]) -> None:
    """What needs no gradient gets none, and the others do not change."""
    inputs = features(), features(), number(2.3)
    expected = gradients(dense_sums(*inputs), inputs)
    for tensor, needed in zip(inputs, learns, strict=True):
        tensor.requires_grad_(bool(needed))
    ours = pairwise_logsumexp(*inputs[:2], scale=inputs[2], chunk_size=4)
    wanted = [index for index, needed in enumerate(learns) if needed]
    for index, found in zip(wanted, gradients(ours, [inputs[index] for index in wanted]), strict=True):
        torch.testing.assert_close(found, expected[index])


def test_gradcheck() -> None:
    inputs = features(5, 3), features(5, 3), number(1.7)

    def sums(queries: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return tuple(pairwise_logsumexp(queries, keys, scale=scale, chunk_size=2))

    assert torch.autograd.gradcheck(sums, inputs)
    assert torch.autograd.gradgradcheck(sums, inputs)

    def softplus(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return pairwise_softplus(queries, keys, scale=scale, bias=bias, chunk_size=2)

    assert torch.autograd.gradcheck(softplus, (*inputs, number(-0.8)))
    assert torch.autograd.gradgradcheck(softplus, (*inputs, number(-0.8)))


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(1, 12),
    chunk_size=st.integers(1, 13),
    scale=st.sampled_from([0.0, 1.0, 14.0, 100.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_properties(count: int, chunk_size: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (F.normalize(torch.randn(count, 6, generator=generator), dim=1) for _ in range(2))
    queries.requires_grad_()
    sums = pairwise_logsumexp(queries, keys, scale=scale, chunk_size=chunk_size)
    assert torch.stack(sums[:2]).isfinite().all()
    assert torch.stack(sums[:2]).min() >= 0, "a positive is one of the sum's terms"
    (gradient,) = torch.autograd.grad(sums.rows.sum() + sums.columns.sum(), queries)
    assert gradient.isfinite().all()
    assert gradient.norm(dim=1).max() <= 4 * scale * count + 1e-6
    # Against double precision: the scores are as exact as their size allows.
    exact = pairwise_logsumexp(queries.detach().double(), keys.double(), scale=scale)
    torch.testing.assert_close(sums.rows.detach(), exact.rows.float(), rtol=1e-5, atol=1e-6 * (1 + scale))
    # A rotation of both sides changes nothing, an order of the pairs goes through; a rotation of one side does change.
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    turned = pairwise_logsumexp(queries @ turn, keys @ turn, scale=scale, chunk_size=chunk_size)
    torch.testing.assert_close(turned.rows, sums.rows, rtol=1e-5, atol=2e-6 * (1 + scale))
    order = torch.randperm(count, generator=generator)
    mixed = pairwise_logsumexp(queries[order], keys[order], scale=scale, chunk_size=chunk_size)
    torch.testing.assert_close(mixed.columns, sums.columns[order], rtol=1e-5, atol=2e-6 * (1 + scale))


def test_properties_one_side_turned() -> None:
    queries, keys = features(), features()
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    plain, turned = (pairwise_logsumexp(q, keys, scale=1.0).rows for q in (queries, queries @ turn))
    assert (plain - turned).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4])
def test_extreme_equal_rows(scale: float) -> None:
    same = torch.full((7, 3), 1 / math.sqrt(3)).requires_grad_()
    sums = pairwise_logsumexp(same, same.detach(), scale=scale, chunk_size=2)
    for values in sums[:2]:
        torch.testing.assert_close(values, torch.full((7,), math.log(7)))
    (gradient,) = torch.autograd.grad(sums.rows.sum() + sums.columns.sum(), same)
    assert gradient.norm() <= 1e-5 * (1 + scale)


def test_extreme_one_pair() -> None:
    queries, keys, scale = features(1), features(1), number(1e4)
    sums = pairwise_logsumexp(queries, keys, scale=scale)
    assert (sums.rows, sums.columns) == (0, 0)
    for gradient in torch.autograd.grad(sums.rows.sum() + sums.columns.sum(), (queries, keys, scale)):
        assert (gradient == 0).all()


def test_extreme_no_pair() -> None:
    queries, keys, scale = features(0), features(0), number(2.0)
    sums = pairwise_logsumexp(queries, keys, scale=scale)
    total = pairwise_softplus(queries, keys, scale=scale, bias=0.0)
    assert sums.rows.shape == sums.columns.shape == (0,)
    assert total == 0
    for gradient in torch.autograd.grad(sums.rows.sum() + total, (queries, keys, scale)):
        assert (gradient == 0).all()


def test_small_values_keep_their_precision() -> None:
    """A nearly solved batch at scale 100: the sum is 1e-5 in a score of 100, whose last place is 8e-6."""
    directions = torch.linalg.qr(torch.randn(64, 41)).Q.t()
    sides = math.sqrt(0.85) * directions[:1] + math.sqrt(0.15) * directions[1:]  # cosines of 1 in pairs, 0.85 elsewhere
    ours = pairwise_logsumexp(sides, sides, scale=100.0, chunk_size=16)
    rows, columns, _ = dense_sums(sides.double(), sides.double(), 100.0)
    assert 1e-5 < rows.mean() < 2e-5
    torch.testing.assert_close(ours.rows.double(), rows, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.columns.double(), columns, rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_bad_features_stay_visible(value: float, side: int) -> None:
    sides = [torch.randn(9, 4), torch.randn(9, 4)]
    sides[side][3, 1] = value
    sums = pairwise_logsumexp(*sides, scale=1.0, chunk_size=2)
    assert (sums.rows + sums.columns)[3].isnan()
    if math.isnan(value):
        assert sums[1 - side].isnan().all(), "it is one of every sum's terms"
    assert not pairwise_softplus(*sides, scale=1.0, bias=0.0, chunk_size=2).isfinite()


def test_bad_positive_stays_visible() -> None:
    """An infinite positive above negatives of minus infinity would make the sum 0."""
    sums = pairwise_logsumexp(torch.tensor([[math.inf], [1.0]]), torch.tensor([[1.0], [-1.0]]), scale=1.0)
    assert sums.rows[0].isnan()


def test_small_softplus_keeps_its_precision() -> None:
    x = torch.eye(4)
    total = pairwise_softplus(x, x, scale=60.0, bias=-30.0)
    torch.testing.assert_close(total, torch.tensor(16 * math.exp(-30)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_backward_twice(chunk_size: int | None) -> None:
    """The backward pass overwrites nothing that a second one needs."""
    inputs = features(), features()
    sums = pairwise_logsumexp(*inputs, scale=1.0, chunk_size=chunk_size)
    first, second = (torch.autograd.grad(sums.rows.sum(), inputs, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_half_precision(dtype: torch.dtype, chunk_size: int | None) -> None:
    """Half-precision features are taken at their values: only the gradient is rounded to their type."""
    half = [F.normalize(torch.randn(30, 16), dim=1).to(dtype).requires_grad_() for _ in range(2)]
    exact = [side.detach().double().requires_grad_() for side in half]
    for function in (
        lambda x, y: pairwise_logsumexp(x, y, scale=30.0, chunk_size=chunk_size).rows.mean(),
        lambda x, y: pairwise_logsumexp(x, y, scale=30.0, chunk_size=chunk_size).columns.mean(),
        lambda x, y: pairwise_softplus(x, y, scale=10.0, bias=-10.0, chunk_size=chunk_size) / 30,
    ):
        ours, expected = function(*half), function(*exact)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=1e-6)
        for found, precise in zip(torch.autograd.grad(ours, half), torch.autograd.grad(expected, exact), strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), precise, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_half_precision_autocast() -> None:
    sides = [features(9, dtype=torch.float32) for _ in range(2)]
    expected = pairwise_logsumexp(*sides, scale=2.0).rows.sum()
    outside = torch.autograd.grad(expected, sides)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pairwise_logsumexp(*sides, scale=2.0).rows.sum()
        for found, precise in zip(torch.autograd.grad(inside, sides), outside, strict=True):
            assert torch.equal(found, precise), "autocast must not reach into the backward pass either"
    assert torch.equal(inside, expected)


def test_memory() -> None:
    """No operation allocates as much as an eighth of the matrix of pairs."""
    sides = [torch.randn(1024, 4, requires_grad=True) for _ in range(2)]
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        sums = pairwise_logsumexp(*sides, scale=1.0, chunk_size=128)
        total = sums.rows.sum() + sums.columns.sum() + pairwise_softplus(*sides, scale=1.0, bias=0.0, chunk_size=128)
        total.backward()
    largest = max(event.self_cpu_memory_usage for event in profiler.function_events)
    assert 4 * 128 * 128 <= largest <= 4 * 1024 * 1024 / 8


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    def loss(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        sums = pairwise_logsumexp(queries, keys, scale=scale, chunk_size=4)
        return sums.rows.mean() + sums.columns.mean() + pairwise_softplus(queries, keys, scale=scale, bias=-1.0)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (9, 6):
        inputs = features(count), features(count), number(2.0)
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
        for found, expected in zip(
            torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_operators() -> None:
    """PyTorch's own checks of a custom operator: schema, aliasing, fake tensors, autograd registration."""
    inputs = features(5, 3), features(5, 3), number(1.7)
    options = {"offset": 0, "columns": True, "row_tile": 2, "column_tile": 3}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.zoo.log_sums.default, inputs, options, test_utils=checks)
    options = {"offset": 0, "learns": True, "row_tile": 2, "column_tile": 3}
    torch.library.opcheck(torch.ops.zoo.softplus_sum.default, (*inputs, number(-1.0)), options, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(4)}, r"queries must have two dimensions"),
        ({"keys": torch.zeros(4, 3, dtype=torch.int64)}, r"keys must be floating point, got torch.int64"),
        ({"keys": torch.zeros(4, 5)}, r"keys must have the width of queries, got 5 and 3; project one of them"),
        ({"keys": torch.zeros(3, 3)}, r"keys must have as many rows as queries, got 3 and 4"),
        ({"keys": torch.zeros(5, 3)}, r"keys must have as many rows as queries, got 5 and 4"),
        (
            {"keys": torch.zeros(3, 3), "columns": False},
            r"keys must have at least as many rows as queries, got 3 and 4",
        ),
        ({"keys": torch.zeros(4, 3, device="meta")}, r"keys must be on the device of queries, got meta and cpu"),
        ({"scale": -1.0}, r"scale must be finite and not negative, got -1.0"),
        ({"scale": math.nan}, r"scale must be finite and not negative, got nan"),
        ({"scale": torch.ones(2)}, r"scale must be a number or a floating-point tensor with one element, got shape"),
        ({"scale": torch.tensor(3)}, r"scale must be a number or a floating-point tensor with one element"),
        ({"scale": torch.ones((), device="meta")}, r"scale must be on the device of the features, got meta and cpu"),
        ({"chunk_size": 0}, r"chunk_size must be at least 1, or None to let the engine choose, got 0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"queries": torch.zeros(4, 3), "keys": torch.zeros(4, 3), "scale": 1.0} | change
    with pytest.raises(InputError, match=message):
        pairwise_logsumexp(**arguments)


def test_bad_bias() -> None:
    zeros = torch.zeros(4, 3)
    with pytest.raises(InputError, match="bias must be finite"):
        pairwise_softplus(zeros, zeros, scale=1.0, bias=-math.inf)
