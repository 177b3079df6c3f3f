"""zoo.losses.softrepa against the numbers of the authors' loss class and a plain restatement of the formula."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoo.losses.softrepa
from zoo.losses.softrepa import equal_captions, softrepa_gradient, softrepa_loss

# Section 5 of the project's notes on arXiv 2503.08250 (shared/papers/softrepa.md), in float64. The authors' loss class,
# executed there, gives the first and the weighted value. E2 is not printed there; these are the entries that its gradient
# determines, and the loss agrees.
E4 = [
    [0.050, 0.081, 0.120, 0.060],
    [0.093, 0.040, 0.071, 0.110],
    [0.150, 0.066, 0.048, 0.072],
    [0.085, 0.095, 0.130, 0.055],
]
E2 = [[0.30, 0.31], [0.52, 0.50]]
VALUES: list[tuple[dict[str, float], float]] = [
    ({}, 0.8319954049),
    ({"diagonal_weight": 10.0}, 1.3144954049),
    ({"scale": 1.0}, 1.2246991449),
    ({"temperature": 0.5}, 1.1688768823),
]
ROWS = [0.9387658431, 0.6865373673, 0.8769788092, 0.8256996001]
FIRST_SCORES = [1.9581666382, 1.2575325458, 0.7203692486, 1.6974913827]
FIRST_GRADIENT = [4.2582415568, -0.8717237064, -0.2918285198, -1.8270014685]
OTHERS = {"symmetric": 0.8310310613, "-E / temperature": 0.9758085565}
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 6e-11}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5, "scale": 1.5},
    {"diagonal_weight": 10.0},
    {"masked": True},
    {"masked": True, "diagonal_weight": 0.5, "temperature": "rows"},
    {"temperature": "entries"},
]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_errors(rows: int = 5, columns: int = 5, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.02 + 0.2 * torch.rand(rows, columns, dtype=dtype)).requires_grad_()


def with_tensors(options: dict[str, Any], errors: Tensor) -> dict[str, Any]:
    """The options, with a mask and a temperature of the errors' shape where they ask for it."""
    rows, columns = errors.shape
    found = dict(options)
    if found.pop("masked", False):
        found["mask"] = torch.arange(rows * columns).view(rows, columns) % 3 == 0
    if (kind := found.get("temperature")) in ("rows", "entries"):
        shape = (rows, 1) if kind == "rows" else (rows, columns)
        found["temperature"] = torch.linspace(0.05, 0.2, math.prod(shape), dtype=errors.dtype).view(shape)
    return found


def plain_loss(
    errors: Tensor,
    *,
    temperature: Any = 0.07,
    scale: float = 4.0,
    diagonal_weight: float = 0.0,
    mask: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """The formula, row by row and term by term."""
    tau = torch.as_tensor(temperature, dtype=errors.dtype).expand(errors.shape)
    values = []
    for i in range(len(errors)):
        own = first_row + i
        scores = [scale * (-errors[i, j] / tau[i, j]).exp() for j in range(errors.shape[1])]
        counted = [s for j, s in enumerate(scores) if j == own or mask is None or not mask[i, j]]
        values.append(sum(s.exp() for s in counted).log() - scores[own] + diagonal_weight * errors[i, own])  # type: ignore[union-attr]
    return torch.stack(values).mean()


@pytest.mark.parametrize(("options", "expected"), VALUES)
def test_golden(options: dict[str, float], expected: float) -> None:
    torch.testing.assert_close(softrepa_loss(double(E4), **options), double(expected), **CLOSE)  # type: ignore[arg-type]


def test_golden_rows_and_scores() -> None:
    torch.testing.assert_close(softrepa_loss(double(E4), reduction="none"), double(ROWS), **CLOSE)
    scores = double(FIRST_SCORES)
    torch.testing.assert_close(4 * (-double(E4)[0] / 0.07).exp(), scores, **CLOSE)
    torch.testing.assert_close(softrepa_loss(double(E4[:1])), scores.logsumexp(0) - scores[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(softrepa_loss(double(E2)), double(0.6911218573), **CLOSE)


@pytest.mark.parametrize("closed_form", [True, False])
def test_golden_gradient(closed_form: bool) -> None:
    def gradient(values: Any, **options: float) -> Tensor:
        errors = double(values).requires_grad_()
        if closed_form:
            return softrepa_gradient(errors, **options)  # type: ignore[arg-type]
        return torch.autograd.grad(softrepa_loss(errors, **options), errors)[0]  # type: ignore[arg-type]

    found = gradient(E4)
    torch.testing.assert_close(found[0], double(FIRST_GRADIENT), **CLOSE)
    torch.testing.assert_close(found.sum(), double(6.2372540429), **CLOSE)
    weighted = [6.7582415568, *FIRST_GRADIENT[1:]]
    torch.testing.assert_close(gradient(E4, diagonal_weight=10.0)[0], double(weighted), **CLOSE)
    small = [0.1959049882, -0.1698257047, -0.0084828875, 0.0112882819]
    torch.testing.assert_close(gradient(E2).flatten(), double(small), **CLOSE)


def test_golden_bounds() -> None:
    """All alike, all right and all wrong, for 4 and 16 captions."""
    torch.testing.assert_close(softrepa_loss(torch.full((4, 4), 0.2).double()), double(1.3862943611), **CLOSE)
    for count, lowest, highest in ((4, 0.0534904497, 5.1046989403), (16, 0.2427379870, 6.7092704988)):
        right = 1e6 * (1 - torch.eye(count, dtype=torch.float64))
        torch.testing.assert_close(softrepa_loss(right), double(lowest), **CLOSE)
        torch.testing.assert_close(softrepa_loss(1e6 - right), double(highest), **CLOSE)


def test_golden_others() -> None:
    """Neither the loss in both directions nor that of -E / temperature, whose numbers are given as well."""
    errors = double(E4)
    both = (softrepa_loss(errors) + softrepa_loss(errors.t())) / 2
    torch.testing.assert_close(both, double(OTHERS["symmetric"]), **CLOSE)
    single = torch.nn.functional.cross_entropy(-errors / 0.07, torch.arange(4))
    torch.testing.assert_close(single, double(OTHERS["-E / temperature"]), **CLOSE)
    assert all(abs(float(softrepa_loss(errors)) - value) > 5e-4 for value in OTHERS.values())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "columns", "first_row"), [(5, 5, 0), (2, 5, 0), (3, 7, 2), (1, 4, 3)])
def test_identity_plain_formula(options: dict[str, Any], rows: int, columns: int, first_row: int) -> None:
    errors = random_errors(rows, columns)
    given_options = {**with_tensors(options, errors), "first_row": first_row}
    loss, expected = softrepa_loss(errors, **given_options), plain_loss(errors, **given_options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (plain,) = torch.autograd.grad(expected, errors)
    torch.testing.assert_close(torch.autograd.grad(loss, errors)[0], plain, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(softrepa_gradient(errors, **given_options), plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_identity_rows(options: dict[str, Any]) -> None:
    """Rows are independent: parts with all captions, of one image each or of several, make up the whole."""
    errors = random_errors(6, 6)
    whole = with_tensors(options, errors)
    values = softrepa_loss(errors, reduction="none", **whole)
    torch.testing.assert_close(values.mean(), softrepa_loss(errors, **whole))
    gradient = softrepa_gradient(errors, reduction="none", **whole)
    torch.testing.assert_close(gradient / 6, softrepa_gradient(errors, **whole))
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        part = {name: value[start:stop] if isinstance(value, Tensor) else value for name, value in whole.items()} | {
            "first_row": start
        }
        torch.testing.assert_close(softrepa_loss(errors[start:stop], reduction="none", **part), values[start:stop])
        torch.testing.assert_close(
            softrepa_gradient(errors[start:stop], reduction="none", **part), gradient[start:stop]
        )


def test_identity_temperatures() -> None:
    """A tensor says the same as a number, whatever its shape and type."""
    errors = random_errors(3, 4)
    expected = softrepa_loss(errors, temperature=0.25)
    for shape in ((), (1,), (4,), (3, 1), (1, 4), (3, 4)):
        for dtype in (torch.float16, torch.float64):
            temperature = torch.full(shape, 0.25, dtype=dtype)
            torch.testing.assert_close(softrepa_loss(errors, temperature=temperature), expected)
    learned = double(0.25).requires_grad_()
    torch.autograd.gradcheck(lambda tau: softrepa_loss(errors.detach(), temperature=tau), learned)


def test_identity_mask() -> None:
    """A masked caption is as one that is not there; an image's own is there whatever the mask says."""
    errors = random_errors(3, 3).detach()
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 2] = True
    expected = softrepa_loss(errors[:1, :2])
    torch.testing.assert_close(softrepa_loss(errors, mask=mask, reduction="none")[0], expected)
    torch.testing.assert_close(softrepa_loss(errors, mask=mask | torch.eye(3).bool()), softrepa_loss(errors, mask=mask))
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert softrepa_loss(errors, mask=everything) == 0
    assert (softrepa_gradient(errors, mask=everything) == 0).all()


def test_identity_equal_captions() -> None:
    """Doubled captions, masked, cost what the images cost with each caption once."""
    tokens = torch.tensor([[1, 2], [3, 4], [1, 2], [1, 4]])
    mask = equal_captions(tokens)
    pairs = {(0, 2), (2, 0)}
    assert {(int(i), int(j)) for i, j in mask.nonzero()} == pairs
    assert torch.equal(equal_captions(torch.nn.functional.one_hot(tokens, 5).float()), mask)
    errors = random_errors(4, 4).detach()
    errors[:, 2] = errors[:, 0]  # the same caption, the same error
    first = softrepa_loss(errors[:2, [0, 1, 3]], reduction="none")
    torch.testing.assert_close(softrepa_loss(errors, mask=mask, reduction="none")[0], first[0])
    # Both are negatives of another image, as two captions are.
    assert softrepa_loss(errors, mask=mask, reduction="none")[1] > first[1]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict[str, Any]) -> None:
    errors = random_errors(3, 4)
    given_options = with_tensors(options, errors)
    for reduction in ("mean", "none"):

        def loss(errors: Tensor, reduction: Any = reduction) -> Tensor:
            return softrepa_loss(errors, reduction=reduction, **given_options)

        assert torch.autograd.gradcheck(loss, errors)
        assert torch.autograd.gradgradcheck(loss, errors)


def test_stop_gradient_closed_form() -> None:
    assert not softrepa_gradient(random_errors()).requires_grad


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6),
    more=st.integers(0, 4),
    temperature=st.sampled_from([1e-3, 0.07, 1.0, 100.0]),
    scale=st.sampled_from([0.5, 4.0, 60.0]),
    size=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 1e4, 1e30]),
    seed=st.integers(0, 2**16),
)
def test_properties(rows: int, more: int, temperature: float, scale: float, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = rows + more
    first_row = int(torch.randint(more + 1, (), generator=generator))
    errors = (size * torch.rand(rows, columns, generator=generator)).requires_grad_()
    mask = torch.rand(rows, columns, generator=generator) < 0.2
    options: dict[str, Any] = {"temperature": temperature, "scale": scale, "first_row": first_row}
    for given_mask in (None, mask):
        loss = softrepa_loss(errors, mask=given_mask, **options)
        assert loss.isfinite()
        if given_mask is None:
            lowest, highest = (math.log1p((columns - 1) * math.exp(sign * scale)) for sign in (-1, 1))
            assert lowest - 1e-5 <= loss <= highest * (1 + 1e-6) + 1e-5
        exact = softrepa_loss(errors.detach().double(), mask=given_mask, **options)
        torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(loss, errors)
        closed = softrepa_gradient(errors, mask=given_mask, **options)
        torch.testing.assert_close(closed, gradient, rtol=1e-4, atol=1e-6 * scale / temperature)
        own = torch.zeros(rows, columns, dtype=torch.bool)
        own.diagonal(first_row).fill_(value=True)
        assert (closed[own] >= 0).all()
        assert (closed[~own] <= 0).all()
        if given_mask is not None:
            assert (gradient[mask & ~own] == 0).all()
    # Units: errors and temperature in another one. The order of the negatives is no matter.
    in_double = errors.detach().double()
    same = softrepa_loss(7 * in_double, **{**options, "temperature": 7 * temperature})
    torch.testing.assert_close(same, softrepa_loss(in_double, **options), rtol=1e-9, atol=1e-12)
    if rows == 1:
        others = [j for j in range(columns) if j != first_row]
        shuffled = in_double[:, [first_row, *reversed(others)]]
        torch.testing.assert_close(softrepa_loss(shuffled, **{**options, "first_row": 0}), same, rtol=1e-9, atol=1e-12)


def test_properties_shift_counts() -> None:
    """Tempting and false, as the scores are exponentials: errors that all grow alike do not leave the loss as it is."""
    errors = double(E4)
    assert softrepa_loss(errors + 0.1) > softrepa_loss(errors) + 0.1
    assert softrepa_loss(errors.t()) != softrepa_loss(errors)


def test_examples() -> None:
    assert doctest.testmod(zoo.losses.softrepa).attempted > 0
    assert doctest.testmod(zoo.losses.softrepa).failed == 0
