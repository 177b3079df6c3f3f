"""What zoo.losses.softrepa makes of types, precisions, compilation, degenerate batches, and bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.losses import equal_captions, softrepa_gradient, softrepa_loss


def random_errors(rows: int = 5, columns: int = 5, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 + 0.2 * torch.rand(rows, columns, dtype=dtype)).requires_grad_()


def test_batch_of_one() -> None:
    errors = random_errors(1, 1)
    loss = softrepa_loss(errors)
    assert loss == 0
    assert torch.autograd.grad(loss, errors)[0] == 0
    assert softrepa_gradient(errors) == 0
    weighted = softrepa_loss(errors, diagonal_weight=10.0)
    torch.testing.assert_close(weighted, 10 * errors[0, 0])
    assert softrepa_gradient(errors, diagonal_weight=10.0) == 10


@pytest.mark.parametrize("columns", [0, 3])
def test_empty_batch(columns: int) -> None:
    errors = random_errors(0, columns)
    loss = softrepa_loss(errors, diagonal_weight=1.0, mask=torch.zeros(0, columns, dtype=torch.bool))
    assert loss == 0
    assert torch.autograd.grad(loss, errors)[0].shape == (0, columns)
    assert softrepa_loss(errors, reduction="none").shape == (0,)
    assert softrepa_gradient(errors).shape == (0, columns)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e3, 3e38])
def test_extreme_errors(size: float) -> None:
    """All perfect or all hopeless: nothing to choose, log N; only the former can still learn."""
    errors = torch.full((4, 4), size, requires_grad=True)
    loss = softrepa_loss(errors)
    torch.testing.assert_close(loss, torch.tensor(4.0).log())
    (gradient,) = torch.autograd.grad(loss, errors)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient, softrepa_gradient(errors))
    assert bool((gradient == 0).all()) == (size > 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(1, 1), (1, 3)])
def test_bad_errors_stay_visible(value: float, where: tuple[int, int]) -> None:
    errors = random_errors().detach()
    errors[where] = value
    for options in ({}, {"diagonal_weight": 1.0}, {"mask": torch.zeros(5, 5, dtype=torch.bool)}):
        chosen: Any = options
        assert softrepa_loss(errors, **chosen).isnan()
        rows = softrepa_loss(errors, reduction="none", **chosen)
        assert rows.isnan().tolist() == [False, True, False, False, False]
        gradient = softrepa_gradient(errors, **chosen)
        assert gradient.isnan().all(1).tolist() == [False, True, False, False, False]
        assert gradient[[0, 2, 3, 4]].isfinite().all()
    mask = torch.arange(25).view(5, 5) == 5 + (where[1] + 1) % 5
    assert softrepa_gradient(errors, mask=mask)[1].isnan().tolist() == [not masked for masked in mask[1].tolist()]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 3e38])
def test_masked_errors_are_not_looked_at(value: float) -> None:
    errors = random_errors()
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[1, 3] = True
    expected = softrepa_loss(errors, mask=mask)
    with torch.no_grad():
        errors[1, 3] = value
    loss = softrepa_loss(errors, mask=mask)
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, errors)
    for found in (gradient, softrepa_gradient(errors, mask=mask)):
        assert found.isfinite().all()
        assert found[1, 3] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    errors = random_errors().detach().to(dtype).requires_grad_()
    loss = softrepa_loss(errors, diagonal_weight=2.0)
    assert loss.dtype == torch.float32
    exact = softrepa_loss(errors.detach().double(), diagonal_weight=2.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, errors)
    assert gradient.dtype == dtype
    closed = softrepa_gradient(errors, diagonal_weight=2.0)
    assert closed.dtype == torch.float32
    torch.testing.assert_close(gradient, closed.to(dtype))
    assert softrepa_gradient(errors.double()).dtype == torch.float64
    assert softrepa_loss(errors, temperature=torch.tensor(0.07, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_autocast(dtype: torch.dtype) -> None:
    errors = random_errors()
    expected = softrepa_loss(errors), softrepa_gradient(errors)
    with torch.autocast("cpu", dtype=dtype):
        assert F.linear(errors, torch.eye(5)).dtype == dtype
        found = softrepa_loss(errors), softrepa_gradient(errors)
    assert torch.equal(found[0], expected[0]), "autocast must not reach into the loss"
    assert torch.equal(found[1], expected[1])


def test_compile_fullgraph() -> None:
    """Also where a temperature is not looked into: one that cannot be used is NaN and not a loss that looks well."""
    options: dict[str, Any] = {"diagonal_weight": 10.0, "reduction": "none", "first_row": 2}
    options["mask"] = torch.arange(15).view(3, 5) % 4 == 0
    temperature = torch.tensor([[0.05], [0.07], [0.2]])
    compiled = torch.compile(softrepa_loss, fullgraph=True, backend="aot_eager")
    errors = random_errors(3, 5)
    found, expected = (function(errors, temperature=temperature, **options) for function in (compiled, softrepa_loss))
    torch.testing.assert_close(found, expected)
    (ours,), (eager,) = (torch.autograd.grad(value.sum(), errors) for value in (found, expected))
    torch.testing.assert_close(ours, eager)
    for value in (0.0, -0.07, math.inf, math.nan):
        temperature[1] = value
        assert compiled(errors, temperature=temperature, **options).isnan().tolist() == [False, True, False]


def test_compile_fullgraph_dynamic() -> None:
    compiled = torch.compile(softrepa_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, temperature in ((3, 0.07), (8, 0.3)):
        errors = random_errors(rows, 8)
        found = compiled(errors, temperature=temperature, first_row=8 - rows)
        torch.testing.assert_close(found, softrepa_loss(errors, temperature=temperature, first_row=8 - rows))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_equal_captions_types(dtype: torch.dtype) -> None:
    found = equal_captions(torch.tensor([[1, 0], [0, 1], [1, 0], [0, 0]]).to(dtype))
    assert found.nonzero().tolist() == [[0, 2], [2, 0]]


def test_equal_captions_shapes() -> None:
    assert equal_captions(torch.tensor([4, 5, 4])).nonzero().tolist() == [[0, 2], [2, 0]]
    embeddings = torch.randn(3, 7, 5, requires_grad=True)
    repeated = embeddings[[0, 1, 0, 2, 1]]
    assert equal_captions(repeated).nonzero().tolist() == [[0, 2], [1, 4], [2, 0], [4, 1]]
    assert not equal_captions(embeddings).any()
    assert equal_captions(torch.zeros(0, 3)).shape == (0, 0)
    assert torch.equal(equal_captions(torch.zeros(2, 0)), ~torch.eye(2, dtype=torch.bool))
    large = torch.tensor([2**53, 2**53 + 1])  # equal in double precision
    assert not equal_captions(large).any()
    with pytest.raises(InputError, match=r"texts must hold one caption a row, got a single number"):
        equal_captions(torch.tensor(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": torch.zeros(4)}, r"errors must have two dimensions .* got shape \(4,\)"),
        ({"errors": torch.zeros(4, 4, dtype=torch.int64)}, r"errors must be floating point, got torch.int64"),
        ({"errors": torch.zeros(5, 4)}, r"own caption of each row.* got 5 rows, 4 columns and first_row=0"),
        ({"first_row": 2}, r"own caption of each row.* got 3 rows, 4 columns and first_row=2"),
        ({"first_row": -1}, r"own caption of each row.* first_row=-1"),
        ({"temperature": 0.0}, r"temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, r"temperature must be positive and finite, got nan"),
        ({"temperature": torch.tensor([0.1, 0.1, 0.0, 0.2])}, r"temperature must be positive and finite, found 0.0"),
        ({"temperature": torch.tensor(math.inf)}, r"temperature must be positive and finite, found inf"),
        ({"temperature": torch.ones(3)}, r"temperature must broadcast to .* \(3, 4\), got \(3,\); .* \(rows, 1\)"),
        ({"temperature": torch.ones(1, 3, 4)}, r"temperature must broadcast to the shape of errors"),
        ({"temperature": torch.ones(4, device="meta")}, r"temperature must be on the device of errors, got meta and"),
        ({"scale": 0.0}, r"scale must be positive and finite, got 0.0"),
        ({"scale": math.inf}, r"scale must be positive and finite, got inf"),
        ({"diagonal_weight": -1.0}, r"diagonal_weight must be finite and not negative, got -1.0"),
        (
            {"mask": torch.zeros(4, 4, dtype=torch.bool)},
            r"mask must have the shape of errors, got \(4, 4\) and \(3, 4\)",
        ),
        ({"mask": torch.zeros(3, 4)}, r"mask must be boolean, True where a caption is no negative, got torch.float32"),
        ({"reduction": "sum"}, r"reduction must be one of mean, none, got 'sum'"),
    ],
)
@pytest.mark.parametrize("function", [softrepa_loss, softrepa_gradient])
def test_bad_arguments(function: Any, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"errors": torch.zeros(3, 4), **change}
    with pytest.raises(InputError, match=message):
        function(**arguments)


def test_complex_numbers() -> None:
    texts = torch.tensor([[1 + 1j, 0], [1 - 1j, 0], [1 + 1j, 0]])
    assert equal_captions(texts).nonzero().tolist() == [[0, 2], [2, 0]]
    assert equal_captions(texts[:, 0]).nonzero().tolist() == [[0, 2], [2, 0]]
    with pytest.raises(InputError, match="temperature must be real"):
        softrepa_loss(torch.zeros(2, 2), temperature=torch.ones(2, 1, dtype=torch.complex64))
