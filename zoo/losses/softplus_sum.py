"""The operator behind the sigmoid loss: the sum over all pairs, tile by tile, in one pass with its gradient.

`torch.compile` takes it whole, autograd knows it. What it computes and why in this way is told in `zoo.losses.pairwise`,
which is its only way in for losses. Nothing is checked here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.losses.tiles import (
    LINEAR_FROM,
    LOG2_E,
    Gradients,
    Workspace,
    dense_gradients,
    dense_scores,
    like_if,
    on_diagonal,
    positives,
    tiles,
)

__all__ = ["softplus_sum"]


@torch.library.custom_op(
    "zoo::softplus_sum",
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, Tensor factor, Tensor shift, *, int offset, bool learns, int row_tile, "
    "int column_tile) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def softplus_sum(
    queries: Tensor,
    keys: Tensor,
    factor: Tensor,
    shift: Tensor,
    *,
    offset: int,
    learns: bool,
    row_tile: int,
    column_tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of `softplus(score)` over all pairs, with the score's sign changed on positives, and its gradients.

    Args:
        queries: (n, d).
        keys: (M, d), of the same type.
        factor: () in the working precision.
        shift: () in the working precision, added to every score.
        offset: the column of the first row's positive.
        learns: whether the gradients are wanted; they are empty or 0 otherwise.
        row_tile: the most rows of a tile.
        column_tile: the most columns of a tile.

    Returns:
        The sum (), which alone is differentiable, and its gradients in queries, keys, factor and shift.
    """
    with torch.autocast(queries.device.type, enabled=False):
        work = Workspace(queries, keys, row_tile=row_tile, column_tile=column_tile)
        sums = Gradients(queries, keys, factor, [learns] * 3)
        total, of_shift = torch.zeros_like(factor), torch.zeros_like(factor)
        for rows, blocks in tiles(len(queries), len(keys), row_tile=row_tile, column_tile=column_tile):
            query = work.load(queries[rows])
            sums.open(query)
            for block in blocks:
                key = work.load(keys[block])
                tile, scratch = work.scores(query, key, factor)
                tile.add_(shift)
                diagonal, _ = positives(tile, rows, block, offset)
                diagonal.neg_()
                total += _softplus_of_tile(tile, scratch)
                if learns:
                    tile.sigmoid_()
                    diagonal.neg_()
                    of_shift += tile.sum()
                    sums.add(work, tile, key, block)
            sums.close(rows, factor)
        return total, *sums.result(keys, factor), of_shift


def _softplus_of_tile(tile: Tensor, scratch: Tensor) -> Tensor:
    if tile.device.type == "cuda":
        return F.softplus(tile, threshold=LINEAR_FROM).sum()
    # max(x, 0) + log(1 + e), e = exp(-|x|), without log1p, which on a CPU takes as long as the scores: with w = 1 + e
    # as it is rounded, log w + (e - (w - 1)) / w is exact to the last place.
    total = torch.clamp_min(tile, 0, out=scratch).sum()
    torch.abs(tile, out=scratch).mul_(-LOG2_E).exp2_()
    rounded = scratch + 1
    scratch.sub_(rounded.sub_(1))
    scratch.div_(rounded.add_(1))
    return total + scratch.sum() + rounded.log_().sum()


@softplus_sum.register_fake
def _(queries: Tensor, keys: Tensor, factor: Tensor, shift: Tensor, *, learns: bool, **_: int) -> tuple[Tensor, ...]:
    gradients = (like_if(learns, x) for x in (queries, keys, factor))
    return torch.empty_like(factor), *gradients, torch.empty_like(shift)


def _keep_gradients(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.offset = keyword_only_inputs["offset"]


def _differentiate_softplus_sum(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    queries, keys, factor, shift, *found = ctx.saved_tensors
    if torch.is_grad_enabled():
        scores = dense_scores(queries, keys)
        sign = 1 - 2 * on_diagonal(torch.ones_like(scores[:, 0]), scores, ctx.offset)
        weights = sign * torch.sigmoid(sign * (scores * factor + shift))
        found = [*dense_gradients(queries, keys, factor, scores=scores, weights=weights), weights.sum()]
    needs = ctx.needs_input_grad[:4]
    return tuple(gradients[0].to(x.dtype) * x if needed else None for x, needed in zip(found, needs, strict=True))


softplus_sum.register_autograd(_differentiate_softplus_sum, setup_context=_keep_gradients)
