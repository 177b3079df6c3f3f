"""SoftREPA: soft text tokens that make a frozen diffusion model tell captions apart, trained through denoising errors.

Lee, Cha, Kim, Ye: "Aligning Text to Image in Diffusion Models is Easier Than You Think" (NeurIPS 2025, arXiv 2503.08250).

As CLIP, it asks for an image's own caption among those of the batch. The score of a pair is not a product of features but
how well the model denoises the image under the caption. With one timestep t and one noise for all pairs, x_t^i the noised
image i, and f the frozen model with its tokens:

    E_ij = mean over elements of ( f(x_t^i, t, caption_j) - target_i )^2
    l_ij = scale exp( -E_ij / temperature )
    L = 1/R sum_i [ log sum_j exp(l_ij) - l_ii ]  +  diagonal_weight / R sum_i E_ii

Only captions compete, for a fixed image: there is no term in the other direction. An exponential goes into a softmax, so
that scores stay in 0 … scale and the first term between log(1 + (N - 1) e^-scale) and log(1 + (N - 1) e^scale): for
N = 4 it begins at about log 4 and cannot fall below 0.0535. A pair's gradient fades as exp(-E / temperature): the loss
learns at timesteps whose errors are not much larger than the temperature.

Paper against release. The release, in which there is one more constant (scale = 4), has the same temperature, 0.07, at all
times; the project's notes report a schedule over t in the paper, for which `temperature` takes a tensor. The mean over
elements, and not their sum, is the release's too, whose class gives these values. The release's diagonal weight is 0 for
SD3 and 10 for SD1.5 and SDXL. Ours: equal captions need not count as negatives (`mask`, `equal_captions`).

Read: the authors' code, through the project's notes on it, and the paper's opening. Not read: the paper's equations.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_matrix, require_number, require_same_layout, working_dtype

__all__ = ["equal_captions", "softrepa_gradient", "softrepa_loss"]

Reduction = Literal["mean", "none"]
_REDUCTIONS = ("mean", "none")


class _Scores(NamedTuple):
    """What value and gradient have in common, in the working precision."""

    errors: Tensor  # (R, N), 0 where masked
    temperature: float | Tensor
    scores: Tensor  # (R, N), l
    logits: Tensor  # (R, N), l, -inf where masked


def softrepa_loss(
    errors: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    scale: float = 4.0,
    diagonal_weight: float = 0.0,
    mask: Tensor | None = None,
    first_row: int = 0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of finding each image's own caption by its denoising errors, averaged over images.

    The loss is a sum over rows, and a row's value depends on no other row: a batch may be split by images, over calls or
    processes, as long as each part has all captions; `first_row` says which images they are. The mean over equally large
    parts is the value of the whole.

    Defined cases:

    - an image without negatives (a batch of one, or all masked): 0 and gradient 0, but for the diagonal term;
    - no images: 0, still connected to `errors`;
    - errors far above the temperature: all scores are 0, which gives the logarithm of the number of captions, gradient 0;
    - NaN or infinity in a row: NaN in its value and so in the mean. Masked entries are not looked at.

    Args:
        errors: (R, N) mean squared errors of image i under caption j, at least 0 (looked at on the CPU only), in any
            floating-point type. The caption of row i is column `first_row` + i.
        temperature: what an error is divided by, positive: a number, or a tensor that broadcasts to (R, N), as (R, 1) for
            images that have timesteps of their own. In a tensor that is not on the CPU, or under `torch.compile`, a
            value that is not positive and finite gives NaN.
        scale: factor of the scores, positive; the highest score.
        diagonal_weight: factor of the mean error of the true pairs, at least 0.
        mask: (R, N) booleans, True where a caption is no negative of an image, such as `equal_captions`. An image's own
            caption is never masked, whatever stands there.
        first_row: the column of the first row's own caption.
        reduction: `"mean"` over rows, or `"none"` for a value of each row.

    Returns:
        A scalar, or (R,), of at least 0 in nats (the diagonal term in the unit of the errors); in float32, in float64 if
        `errors` are.

    Raises:
        InputError: `errors` is no floating-point matrix, lacks columns or is negative, `mask` or `temperature` do not fit
            it, a number is out of range, or the reduction has no such name.

    Example:
        Errors that are all alike tell no captions apart:

        >>> softrepa_loss(torch.full((4, 4), 0.1)), torch.tensor(4.0).log()
        (tensor(1.3863), tensor(1.3863))
    """
    _check(
        errors,
        mask,
        temperature=temperature,
        scale=scale,
        diagonal_weight=diagonal_weight,
        first_row=first_row,
        reduction=reduction,
    )
    with torch.autocast(errors.device.type, enabled=False):
        parts = _scores(errors, temperature, scale, mask, first_row)
        own = torch.arange(first_row, first_row + len(errors), device=errors.device)
        values = F.cross_entropy(parts.logits, own, reduction="none")
        if diagonal_weight > 0:  # 0 times an infinite error would be NaN twice
            values = values + diagonal_weight * parts.errors.diagonal(first_row)
        return values if reduction == "none" else values.sum() / max(len(errors), 1)


def softrepa_gradient(
    errors: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    scale: float = 4.0,
    diagonal_weight: float = 0.0,
    mask: Tensor | None = None,
    first_row: int = 0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Gradient of `softrepa_loss` with respect to the errors, in closed form and without a graph.

    With p the softmax of a row's scores, dL/dE_ij = ( (delta_ij - p_ij) l_ij / temperature + delta_ij diagonal_weight ) / R.
    With it the pairs can be differentiated one after another, as sum_ij dL/dE_ij E_ij, once all errors are known.

    Source: the project's notes on arXiv 2503.08250, section 1.2, where it was compared with the authors' code.

    Args:
        errors: as for `softrepa_loss`; constants.
        temperature: as for `softrepa_loss`.
        scale: as for `softrepa_loss`.
        diagonal_weight: as for `softrepa_loss`.
        mask: as for `softrepa_loss`.
        first_row: as for `softrepa_loss`.
        reduction: `"mean"` for the gradient of the mean, `"none"` for that of the sum over rows (R times as much).

    Returns:
        (R, N): at least 0 at the images' own captions, at most 0 elsewhere, 0 where masked; in float32, in float64 if
        `errors` are. NaN in all of a row that has NaN or infinity, but for its masked entries.

    Raises:
        InputError: as for `softrepa_loss`.

    Example:
        Lower errors of the true pairs, higher ones of the others:

        >>> softrepa_gradient(torch.zeros(2, 2), temperature=1.0)
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    _check(
        errors,
        mask,
        temperature=temperature,
        scale=scale,
        diagonal_weight=diagonal_weight,
        first_row=first_row,
        reduction=reduction,
    )
    with torch.no_grad(), torch.autocast(errors.device.type, enabled=False):
        parts = _scores(errors, temperature, scale, mask, first_row)
        slopes = parts.scores / parts.temperature
        # What is masked has the probability 0, which times a row's NaN would be NaN again.
        gradient = torch.where(parts.logits == -torch.inf, 0, -parts.logits.softmax(1) * slopes)
        gradient.diagonal(first_row).add_(slopes.diagonal(first_row) + diagonal_weight)
        return gradient if reduction == "none" else gradient / max(len(errors), 1)


def equal_captions(texts: Tensor) -> Tensor:
    """Which captions of a batch are the same, for `mask`: with few captions, equal ones are no negatives of each other.

    Args:
        texts: (N, …), token numbers or the embeddings of the captions, of any type; captions are equal if all their
            numbers are.

    Returns:
        (N, N) booleans, False on the diagonal; rows `first_row` … are the mask of a part of the images.

    Raises:
        InputError: `texts` has no dimension.

    Example:
        >>> equal_captions(torch.tensor([[3, 1], [5, 1], [3, 1]]))
        tensor([[False, False,  True],
                [False, False, False],
                [ True, False, False]])
    """
    if texts.ndim == 0:
        raise InputError("texts must hold one caption a row, got a single number; stack them along the first dimension")
    if texts.numel() == 0:  # no captions, or captions without tokens
        same = torch.ones(len(texts), len(texts), dtype=torch.bool, device=texts.device)
    else:
        texts = torch.view_as_real(texts) if texts.is_complex() else texts
        # Numbers the captions: comparing all with all would take N^2 times the size of one, which is large for embeddings.
        numbers = torch.unique(texts.detach().flatten(1) if texts.ndim > 1 else texts, dim=0, return_inverse=True)[1]
        same = numbers.unsqueeze(1) == numbers
    return same.fill_diagonal_(fill_value=False)


def _scores(errors: Tensor, temperature: float | Tensor, scale: float, mask: Tensor | None, first_row: int) -> _Scores:
    errors = errors.to(working_dtype(errors))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(errors)
        # A division by 0 or below would pass for a pair without or with all of the probability.
        usable = (temperature > 0) & temperature.isfinite()
        temperature = torch.where(usable, temperature, torch.nan)
    if mask is not None:
        columns = torch.arange(errors.shape[1], device=errors.device)
        rows = torch.arange(first_row, first_row + len(errors), device=errors.device)
        mask = mask & (columns != rows.unsqueeze(1))
        errors = errors.masked_fill(mask, 0)
    # An infinite error has the score 0, as a large one; 0 times infinity makes it NaN.
    scores = scale * torch.exp(-errors / temperature) + 0 * errors
    return _Scores(errors, temperature, scores, scores if mask is None else scores.masked_fill(mask, -torch.inf))


def _check(
    errors: Tensor,
    mask: Tensor | None,
    *,
    temperature: float | Tensor,
    scale: float,
    diagonal_weight: float,
    first_row: int,
    reduction: str,
) -> None:
    require_matrix("errors", errors)
    if errors.device.type == "cpu" and errors.numel() and not torch.compiler.is_compiling():
        lowest = float(errors.detach().min())
        if -torch.inf < lowest < 0:  # infinity is told by NaN
            raise InputError(f"errors must be mean squares, at least 0, found {lowest}")
    rows, columns = errors.shape
    if not 0 <= first_row <= columns - rows:
        raise InputError(
            f"errors must have a column for the own caption of each row, which begin at first_row; got {rows} rows, "
            f"{columns} columns and first_row={first_row}"
        )
    _check_temperature(temperature, errors)
    require_number("scale", scale, positive=True)
    require_number("diagonal_weight", diagonal_weight, positive=False)
    if mask is not None:
        require_same_layout("mask", mask, "errors", errors)
        if mask.dtype != torch.bool:
            raise InputError(f"mask must be boolean, True where a caption is no negative, got {mask.dtype}")
    require_choice("reduction", reduction, _REDUCTIONS)


def _check_temperature(temperature: float | Tensor, errors: Tensor) -> None:
    if not isinstance(temperature, Tensor):
        require_number("temperature", temperature, positive=True)
        return
    sizes = zip(reversed(temperature.shape), reversed(errors.shape), strict=False)
    if temperature.ndim > errors.ndim or any(own not in (1, wanted) for own, wanted in sizes):
        raise InputError(
            f"temperature must broadcast to the shape of errors, {tuple(errors.shape)}, got {tuple(temperature.shape)}; "
            "a temperature for each row has the shape (rows, 1)"
        )
    if temperature.is_complex():
        raise InputError(f"temperature must be real, got {temperature.dtype}")
    if temperature.device != errors.device and temperature.ndim:
        raise InputError(f"temperature must be on the device of errors, got {temperature.device} and {errors.device}")
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((temperature > 0) & temperature.isfinite())
        if bad.any():
            raise InputError(f"temperature must be positive and finite, found {float(temperature[bad][0])}")
