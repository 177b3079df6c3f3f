"""What zoo.losses.structure makes of types, precisions, compilation, degenerate batches, and bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.structure import structure_loss, structure_statistics

CENTRINGS = ["mean", "none", "standard", "before"]


def random_case(rows: int = 7, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    frozen = torch.randn(rows, 6, dtype=dtype)
    aligned = frozen @ torch.randn(6, 4, dtype=dtype) + 0.3 * torch.randn(rows, 4, dtype=dtype)
    return frozen, aligned.requires_grad_()


@pytest.mark.parametrize("centering", CENTRINGS)
@pytest.mark.parametrize("levels", [1, 2])
def test_batch_of_one(centering: Any, levels: int) -> None:
    frozen, aligned = random_case(1)
    loss = structure_loss(frozen, aligned, centering=centering, levels=levels)
    assert loss == 0
    assert (torch.autograd.grad(loss, aligned)[0] == 0).all()
    statistics = structure_statistics(frozen, centering=centering)
    assert {name: float(value) for name, value in statistics.items()} == {
        "diagonal_mass": 1.0,
        "effective_neighbours": 1.0,
    }


@pytest.mark.parametrize("centering", CENTRINGS)
def test_empty_batch(centering: Any) -> None:
    frozen, aligned = random_case(0)
    loss = structure_loss(frozen, aligned, centering=centering, levels=2, margin=0.1)
    assert loss == 0
    assert torch.autograd.grad(loss, aligned)[0].shape == (0, 4)
    assert all(value == 0 for value in structure_statistics(frozen, centering=centering).values())


@pytest.mark.parametrize("centering", CENTRINGS)
def test_zero_vectors(centering: Any) -> None:
    """A row of zeros is a point of its own, without direction and without gradient; negligible ones alike."""
    frozen, aligned = (tensor.detach().clone() for tensor in random_case())
    frozen[1], aligned[2], aligned[3] = 0, 0, 1e-8
    aligned.requires_grad_()
    loss = structure_loss(frozen, aligned, temperature=0.5, centering=centering)
    assert 0 < loss < 14
    (gradient,) = torch.autograd.grad(loss, aligned)
    assert gradient.isfinite().all()
    if centering != "before":
        assert (gradient[2:4] == 0).all()
    assert gradient.abs().max() > 1e-4


def test_zero_vectors_by_hand() -> None:
    """Orthogonal features against nothing but zeros, which are all equally near: P_X = (p, q), P_A = (1/2, 1/2)."""
    loss = structure_loss(torch.eye(2), torch.zeros(2, 3), temperature=0.5, divergence="js", centering="none")
    p = math.exp(2) / (math.exp(2) + 1)
    terms = [(mass, (mass + 0.5) / 2) for mass in (p, 1 - p)]
    expected = sum(x * math.log(x / m) + 0.5 * math.log(0.5 / m) for x, m in terms) / 2
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_constant_coordinate() -> None:
    """A coordinate that no sample has, as of a dead unit, has no deviation to be divided by."""
    frozen, aligned = random_case()
    wider = F.pad(aligned, (0, 2))
    plain, padded = (structure_loss(frozen, a, centering="standard") for a in (aligned, wider))
    torch.testing.assert_close(padded, plain)
    assert torch.autograd.grad(padded, aligned)[0].isfinite().all()


def test_extreme_temperatures() -> None:
    """Far below, P is the identity on both sides; far above, all are alike: 0 in both limits, and finite between."""
    frozen, aligned = random_case(dtype=torch.float32)
    for temperature in (1e-6, 1e-3, 1.0, 1e6):
        for divergence in ("released", "js"):
            chosen: Any = divergence
            loss = structure_loss(frozen, aligned, temperature=temperature, divergence=chosen)
            assert 0 <= loss < 14
            assert torch.autograd.grad(loss, aligned)[0].isfinite().all()
            if temperature in (1e-6, 1e6):
                assert loss < 1e-6
    for temperature, neighbours in ((1e-6, 1.0), (1e6, 7.0)):
        statistics = structure_statistics(frozen, temperature=temperature)
        torch.testing.assert_close(statistics["effective_neighbours"], torch.tensor(neighbours))
        torch.testing.assert_close(statistics["diagonal_mass"], torch.tensor(1 / neighbours))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["frozen", "aligned"])
@pytest.mark.parametrize("options", [{}, {"divergence": "js", "levels": 2}, {"margin": 100.0}])
def test_bad_features_stay_visible(value: float, where: str, options: dict[str, Any]) -> None:
    frozen, aligned = (tensor.detach() for tensor in random_case())
    {"frozen": frozen, "aligned": aligned}[where][1, 2] = value
    for centering in CENTRINGS:
        assert structure_loss(frozen, aligned, centering=centering, chunk_size=3, **options).isnan()  # type: ignore[arg-type]
    if where == "frozen":
        assert all(value.isnan() for value in structure_statistics(frozen).values())


@pytest.mark.parametrize("centering", CENTRINGS[:3])
def test_extreme_lengths(centering: Any) -> None:
    """The square of such a length is beyond float32, and lengths are no matter but for "before"."""
    frozen, aligned = (tensor.detach() for tensor in random_case(dtype=torch.float32))
    wanted = structure_loss(frozen, aligned, centering=centering)
    aligned[0] *= 2.0**90
    frozen[1] *= 2.0**100
    assert structure_loss(frozen, aligned, centering=centering) == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    frozen, aligned = (300 * tensor.detach() for tensor in random_case(16))  # squares overflow fp16
    half = aligned.to(dtype).requires_grad_()
    exact = structure_loss(frozen.to(dtype).double(), half.detach().double())
    loss = structure_loss(frozen.to(dtype), half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float(), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype
    assert half.grad.isfinite().all()
    assert structure_statistics(frozen.to(dtype))["diagonal_mass"].dtype == torch.float32


def test_half_precision_mixed() -> None:
    """The aligned side alone decides the precision."""
    frozen, aligned = random_case()
    assert structure_loss(frozen.half(), aligned).dtype == torch.float64
    assert structure_loss(frozen, aligned.float()).dtype == torch.float32
    assert structure_statistics(frozen)["diagonal_mass"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_autocast(dtype: torch.dtype) -> None:
    frozen, aligned = random_case(dtype=torch.float32)
    expected = structure_loss(frozen, aligned, levels=2)
    (gradient,) = torch.autograd.grad(expected, aligned)
    with torch.autocast("cpu", dtype=dtype):
        inside = structure_loss(frozen, aligned, levels=2)
        (found,) = torch.autograd.grad(inside, aligned)
        projected = F.linear(aligned, torch.eye(4))
        assert projected.dtype == dtype
        structure_loss(frozen, projected).backward()
    assert torch.equal(inside, expected), "autocast must not reach into the loss"
    assert torch.equal(found, gradient)
    assert aligned.grad is not None
    assert aligned.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{}, {"levels": 3, "level_weights": "inverse", "divergence": "js"}, {"centering": "standard", "margin": 0.001}],
)
def test_compile_fullgraph(options: dict[str, Any]) -> None:
    compiled = torch.compile(structure_loss, fullgraph=True, backend="aot_eager")
    frozen, aligned = random_case(dtype=torch.float32)
    loss, expected = (function(frozen, aligned, chunk_size=3, **options) for function in (compiled, structure_loss))
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, aligned)
    (eager,) = torch.autograd.grad(expected, aligned)
    torch.testing.assert_close(ours, eager)


def test_compile_fullgraph_dynamic_and_statistics() -> None:
    compiled = torch.compile(structure_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    statistics = torch.compile(structure_statistics, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 8, 9):
        frozen, aligned = random_case(rows, dtype=torch.float32)
        loss, expected = (function(frozen, aligned, margin=0.001) for function in (compiled, structure_loss))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, aligned)[0] for value in (loss, expected)))
        torch.testing.assert_close(statistics(frozen), structure_statistics(frozen))


def test_operators() -> None:
    """What torch itself asks of an operator: its schema, its gradient's registration, its shapes without data."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    frozen, aligned = random_case()
    options: dict[str, Any] = {"start": 2, "rows": 3, "temperature": 0.5, "row_tile": 2}
    own: dict[str, Any] = {"divergence": "js", "learns": True, **options}
    operator = torch.ops.zoo.walk_divergence.default
    torch.library.opcheck(operator, (frozen, aligned, aligned.new_ones(2).detach()), own, test_utils=checks)
    torch.library.opcheck(torch.ops.zoo.walk_spread.default, (frozen,), options, test_utils=checks)


def test_other_layouts() -> None:
    """Transposed, strided and expanded features give what their copies give."""
    frozen, aligned = (tensor.detach() for tensor in random_case(6))
    wide = torch.stack((aligned, aligned), 2)[:, :, 0].requires_grad_()
    loss = structure_loss(frozen.t().contiguous().t(), wide, levels=2, chunk_size=4)
    torch.testing.assert_close(loss, structure_loss(frozen, aligned, levels=2))
    assert torch.autograd.grad(loss, wide)[0].shape == aligned.shape
    assert structure_loss(frozen[:1].expand(6, 6), frozen[:1].expand(6, 6)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frozen": torch.zeros(7)}, r"frozen must have two dimensions .* got shape \(7,\)"),
        ({"aligned": torch.zeros(7, 4, 2)}, r"aligned must have two dimensions"),
        ({"aligned": torch.zeros(7, 4, dtype=torch.int64)}, r"aligned must be floating point, got torch.int64"),
        ({"aligned": torch.zeros(6, 4)}, r"aligned must have one row for each row of frozen, got 6 and 7"),
        ({"aligned": torch.zeros(7, 4, device="meta")}, r"aligned must be on the device of frozen, got meta and cpu"),
        ({"temperature": 0.0}, r"temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, r"temperature must be positive and finite, got nan"),
        ({"levels": 0}, r"levels must be at least 1, the longest random walk, got 0"),
        ({"margin": -0.1}, r"margin must be finite and not negative, got -0.1"),
        ({"chunk_size": 0}, r"chunk_size must be at least 1, or None to let the engine choose, got 0"),
        ({"level_weights": "1/l"}, r"level_weights must be one of none, inverse, got '1/l'"),
        ({"divergence": "kl"}, r"divergence must be one of released, js, got 'kl'"),
        ({"centering": None}, r"centering must be one of mean, none, standard, before, got None"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    frozen, aligned = random_case(dtype=torch.float32)
    arguments: dict[str, Any] = {"frozen": frozen, "aligned": aligned, **change}
    with pytest.raises(InputError, match=message):
        structure_loss(**arguments)
    if change.keys() & {"frozen", "temperature", "chunk_size", "centering"}:
        arguments.pop("aligned")
        with pytest.raises(InputError, match=message):
            structure_statistics(**arguments)
