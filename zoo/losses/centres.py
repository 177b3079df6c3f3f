"""How near embeddings are to classes that are told by centres, several for each class.

The cosines with the centres of a class become one number. The ways to pool are those that re-implementations around Bind
models use (named in the project's notes on arXiv 2505.11895), and `lme`, which is ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_matrix, require_number, unit_rows, working_dtype

__all__ = ["Pool", "pooled_similarities"]

Pool = Literal["mean_centre", "mean_sim", "max", "lse", "lme"]

_POOLS = ("mean_centre", "mean_sim", "max", "lse", "lme")


def pooled_similarities(
    embeddings: Tensor,
    centres: Tensor,
    *,
    pool: Pool = "mean_centre",
    mask: Tensor | None = None,
    sharpness: float = 1000.0,
) -> Tensor:
    """Cosine of each embedding with each class, which may have several centres.

    Ways to pool the cosines s_j with the M centres of a class; all but the first two need memory for B x K x M numbers:

    - `"mean_centre"`: the cosine with the mean of the centres, of unit length before and after averaging;
    - `"mean_sim"`: the mean of s_j;
    - `"max"`: the largest s_j;
    - `"lse"`: log sum_j exp(sharpness s_j) / sharpness, a smooth maximum that favours classes with many centres, by
      log(M) / sharpness;
    - `"lme"`: the same with the mean in place of the sum, which favours none.

    Args:
        embeddings: (B, D) in floating point, of any length.
        centres: (K, D), one centre a class, for which all ways to pool are one, or (K, M, D); constants or not.
        pool: how the cosines with the centres of a class become one.
        mask: (K, M) booleans, False where a class has fewer than M centres and `centres` holds anything finite. Every
            class needs a centre; on a GPU, where that is not looked at, one without has the cosine 0 by the means, and else
            the lowest finite number.
        sharpness: of `"lse"` and `"lme"`, above 0.

    Returns:
        (B, K) in -1 … 1 (`"lse"`: to 1 + log(M) / sharpness), in float32; in float64 if `embeddings` are.

    Raises:
        InputError: shapes, types or devices that do not fit, an unknown way to pool, a class without a centre.

    Example:
        >>> centres = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
        >>> pooled_similarities(torch.tensor([[2.0, 0.0]]), centres, pool="mean_sim")
        tensor([[ 0.5000, -1.0000]])
    """
    _check_centres(embeddings, centres, mask)
    require_choice("pool", pool, _POOLS)
    require_number("sharpness", sharpness, positive=True)
    with torch.autocast(embeddings.device.type, enabled=False):
        dtype = working_dtype(embeddings)
        unit = unit_rows(embeddings.to(dtype))
        if centres.ndim == 2:
            return unit @ unit_rows(centres.to(dtype)).t()
        classes, count, width = centres.shape
        single = unit_rows(centres.to(dtype).reshape(-1, width)).view(classes, count, width)
        kept = torch.ones(classes, count, dtype=torch.bool, device=centres.device) if mask is None else mask
        if pool in ("mean_centre", "mean_sim"):
            total = torch.where(kept.unsqueeze(2), single, 0).sum(1)
            mean = total / kept.sum(1, keepdim=True).clamp(min=1)
            return unit @ (unit_rows(mean) if pool == "mean_centre" else mean).t()
        cosines = (unit @ single.view(-1, width).t()).view(-1, classes, count)
        # Lowest but finite: a class without centres must not subtract infinity from infinity.
        lowest = torch.finfo(dtype).min
        if pool == "max":
            return cosines.masked_fill(~kept, lowest).amax(2)
        sums = (sharpness * cosines).masked_fill(~kept, lowest).logsumexp(2)
        if pool == "lme":
            sums = sums - kept.sum(1).clamp(min=1).to(dtype).log()
        return sums / sharpness


def _check_centres(embeddings: Tensor, centres: Tensor, mask: Tensor | None) -> None:
    require_matrix("embeddings", embeddings)
    if centres.ndim not in (2, 3) or not centres.is_floating_point() or 0 in centres.shape:
        raise InputError(
            "centres must be (classes, width) or (classes, centres, width) in floating point, none of them 0, got shape "
            f"{tuple(centres.shape)} of {centres.dtype}"
        )
    if centres.shape[-1] != embeddings.shape[1]:
        raise InputError(f"centres must be as wide as the embeddings, {embeddings.shape[1]}, got {centres.shape[-1]}")
    if centres.device != embeddings.device:
        raise InputError(
            f"centres must be on the device of the embeddings, got {centres.device} and {embeddings.device}; move them with "
            f".to({str(embeddings.device)!r})"
        )
    if mask is not None:
        _check_mask(centres, mask)


def _check_mask(centres: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != centres.shape[:-1] or centres.ndim != 3:
        raise InputError(
            "mask must be booleans (classes, centres) for centres (classes, centres, width), got shape "
            f"{tuple(mask.shape)} of {mask.dtype} for {tuple(centres.shape)}"
        )
    if mask.device != centres.device:
        raise InputError(f"mask must be on the device of centres, got {mask.device} and {centres.device}")
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
        empty = int((~mask.any(1)).nonzero()[0])
        raise InputError(f"mask must leave every class a centre, and class {empty} has none")
