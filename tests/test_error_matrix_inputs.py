"""zoo.error_matrix: a batch of one, half precision, errors that are not finite, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.error_matrix_cases import MODES, SmallDenoiser, gradient_of, linear_errors, plain, run
from zoo.error_matrix import contrast
from zoo.errors import InputError
from zoo.losses import softrepa_loss


@pytest.mark.parametrize("pairs", MODES)
def test_batch_of_one(pairs: Any) -> None:
    denoiser = SmallDenoiser(1, 1)
    found = run(denoiser, pairs=pairs, negatives=2)
    assert found.loss == 0
    assert all((one == 0).all() for one in gradient_of(found.loss, denoiser))
    weighted = run(denoiser, pairs=pairs, diagonal_weight=10.0)
    torch.testing.assert_close(weighted.loss.detach(), 10 * weighted.errors[0, 0])
    assert all(one.abs().max() > 1e-3 for one in gradient_of(weighted.loss, denoiser))


@pytest.mark.parametrize("pairs", MODES)
def test_bad_errors_stay_visible(pairs: Any) -> None:
    denoiser = SmallDenoiser()
    denoiser.texts[2, 0] = torch.nan
    found = run(denoiser, pairs=pairs)
    assert found.loss.isnan()
    assert all(one.isnan().any() for one in gradient_of(found.loss, denoiser))


@pytest.mark.parametrize("pairs", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pairs: Any, dtype: torch.dtype) -> None:
    """Errors and tokens in half precision; loss and sums over parts in single."""
    denoiser = SmallDenoiser(dtype=dtype)
    found = run(denoiser, pairs=pairs)
    assert found.loss.dtype == torch.float32
    assert found.errors.dtype == dtype
    single = SmallDenoiser(dtype=torch.float32)
    expected, _, expected_gradient = plain(single)
    torch.testing.assert_close(found.loss.detach(), expected, rtol=0.05, atol=0)
    for one, wanted in zip(gradient_of(found.loss, denoiser), expected_gradient, strict=True):
        assert one.dtype == dtype
        assert (one.float() - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("pairs", MODES)
def test_half_precision_backward_scale(pairs: Any) -> None:
    """Gradients that vanish in float16 inside of the denoiser are there with a factor, which the result does not show."""
    small = torch.tensor(1.0, requires_grad=True)

    def errors_of(image: Tensor, text: Tensor) -> Tensor:
        # As a layer in float16 far from the loss: its gradient is 3e-10 of the error's.
        inner = (small * torch.ones(len(image))).half()
        return 0.1 + 1e-11 * (inner.float() * 30) * (image != text) + 0.05 * text

    def gradient(backward_scale: float) -> tuple[Tensor, Tensor]:
        found = contrast(errors_of, rows=3, columns=3, parameters=[small], pairs=pairs, backward_scale=backward_scale)
        return found.loss, torch.autograd.grad(found.loss, small)[0]

    image, text = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
    exact = small.detach().double().requires_grad_()
    errors = 0.1 + 3e-10 * exact * (image != text) + 0.05 * text.double()
    (expected,) = torch.autograd.grad(softrepa_loss(errors.view(3, 3)), exact)
    assert gradient(1.0)[1] == 0
    torch.testing.assert_close(gradient(2.0**26)[1].double(), expected, rtol=2e-3, atol=0)
    loss, overflow = gradient(1e30)
    assert loss.isfinite()
    assert not overflow.isfinite()


@pytest.mark.parametrize("pairs", MODES)
def test_half_precision_autocast(pairs: Any) -> None:
    """Under autocast, the copy of a weight that the pass without a graph has made is not used in the other."""
    images = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.eye(6).requires_grad_()
    errors_of = partial(linear_errors, weight, images)
    sizes: dict[str, Any] = {"rows": 4, "columns": 4, "parameters": [weight], "temperature": 1.0}
    expected = torch.autograd.grad(contrast(errors_of, pairs="full", **sizes).loss, weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrast(errors_of, pairs=pairs, micro_batch=2, **sizes)
    assert found.loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.loss, weight)
    assert (gradient - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("pairs", MODES)
def test_bad_random_errors(pairs: Any) -> None:
    """Noise that is drawn in the call, as dropout would: one pass cannot know it, two have to be told."""
    denoiser = SmallDenoiser()

    def errors_of(image: Tensor, text: Tensor) -> Tensor:
        return denoiser(image, text) * (1 + 0.1 * torch.rand(len(image), dtype=torch.float64))

    options: dict[str, Any] = {"rows": 4, "columns": 4, "parameters": denoiser.tokens, "pairs": pairs}
    if pairs != "two_pass":
        assert contrast(errors_of, **options).loss.isfinite()
        return
    with pytest.raises(InputError, match=r"errors_of to return the same errors twice, and it did not; put .* eval\(\)"):
        contrast(errors_of, **options)


@pytest.mark.parametrize("pairs", MODES)
def test_bad_errors_of(pairs: Any) -> None:
    denoiser = SmallDenoiser()
    options: dict[str, Any] = {"rows": 4, "columns": 4, "parameters": denoiser.tokens, "pairs": pairs}
    with pytest.raises(InputError, match=r"errors_of must depend on one of parameters, .* soft tokens are attached"):
        contrast(lambda image, text: denoiser(image, text).detach(), **options)
    with pytest.raises(InputError, match=r"errors_of must depend on one of parameters"):
        contrast(denoiser, **{**options, "parameters": [torch.ones(1, requires_grad=True)]})
    with pytest.raises(InputError, match=r"one floating-point error for each pair, shape .* got shape \(\) of"):
        contrast(lambda image, text: denoiser(image, text).mean(), **options)
    with pytest.raises(InputError, match=r"one floating-point error for each pair.* of torch.int64"):
        contrast(lambda image, text: image, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, r"rows must be at least 1, the images of the batch, got 0"),
        ({"columns": 3}, r"columns must hold the own caption .* got 4 images, 3 captions and first_row=0"),
        ({"first_row": 1}, r"columns must hold the own caption .* first_row=1"),
        ({"parameters": []}, r"parameters must not be empty"),
        ({"pairs": "all"}, r"pairs must be one of full, rows, two_pass, got 'all'"),
        ({"micro_batch": 0}, r"micro_batch must be at least 1, or None, got 0"),
        ({"negatives": 0}, r"negatives must be at least 1, or None, got 0"),
        ({"mask": torch.zeros(4, 5, dtype=torch.bool)}, r"mask must be boolean .* \(4, 4\), got shape \(4, 5\)"),
        ({"mask": torch.zeros(4, 4)}, r"mask must be boolean .* of torch.float32"),
        ({"backward_scale": 0.0}, r"backward_scale must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, r"temperature must be positive and finite, got -1.0"),
        ({"temperature": torch.ones(3, 1)}, r"temperature must broadcast .* \(4, 4\), got \(3, 1\); .* shape \(4, 1\)"),
        ({"scale": -1.0}, r"scale must be positive and finite, got -1.0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    denoiser = SmallDenoiser()
    arguments: dict[str, Any] = {"rows": 4, "columns": 4, "parameters": denoiser.tokens, **change}
    with pytest.raises(InputError, match=message):
        contrast(denoiser, **arguments)
