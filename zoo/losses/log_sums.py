"""The operator behind InfoNCE: logarithms of the sums of rows and columns, tile by tile, and their gradient.

`torch.compile` takes it whole, autograd knows it. What it computes and why in this way is told in `zoo.losses.pairwise`,
which is its only way in for losses. Nothing is checked here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.losses.tiles import (
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

__all__ = ["log_sums"]


@torch.library.custom_op(
    "zoo::log_sums",
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, Tensor factor, *, int offset, bool columns, int row_tile, int column_tile) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def log_sums(
    queries: Tensor, keys: Tensor, factor: Tensor, *, offset: int, columns: bool, row_tile: int, column_tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums of `2**score` of the *negatives* over rows and over columns, as `2**peak * 2**logarithm`, and the positives.

    The gradient is carried by the logarithms and the positives; the peaks are constants that cancel. Where there is no
    negative, the peak is the lowest finite number and the logarithm -inf.

    Args:
        queries: (n, d).
        keys: (M, d), of the same type.
        factor: () in the working precision, log2(e) included.
        offset: the column of the first row's positive.
        columns: whether the sums of the columns are wanted; their vectors are empty otherwise.
        row_tile: the most rows of a tile.
        column_tile: the most columns of a tile.

    Returns:
        Peak and logarithm of the rows (n,), of the columns (M,), and the positives (n,), all in base 2; and the only
        tile, for the backward pass, or nothing (0,) if there are several.
    """
    with torch.autocast(queries.device.type, enabled=False):
        work = Workspace(queries, keys, row_tile=row_tile, column_tile=column_tile)
        # Lowest but finite: a tile that holds nothing but a positive must not subtract infinity from infinity.
        lowest = torch.finfo(work.dtype).min
        row_peak = factor.new_full((queries.shape[0],), lowest)
        column_peak = factor.new_full((keys.shape[0] if columns else 0,), lowest)
        row_sum, column_sum, positive = (torch.zeros_like(x) for x in (row_peak, column_peak, row_peak))
        for rows, blocks in tiles(len(queries), len(keys), row_tile=row_tile, column_tile=column_tile):
            query = work.load(queries[rows])
            for block in blocks:
                tile, scratch = work.scores(query, work.load(keys[block]), factor)
                diagonal, owners = positives(tile, rows, block, offset)
                positive[owners] = diagonal
                diagonal.fill_(-math.inf)
                if columns:
                    _accumulate(tile, scratch, column_peak[block], column_sum[block], dim=0)
                _accumulate(tile, scratch, row_peak[rows], row_sum[rows], dim=1)
        kept = factor.new_empty(0)
        if _one_tile(queries, keys, row_tile, column_tile):
            kept = tile
        return row_peak, row_sum.log2_(), column_peak, column_sum.log2_(), positive, kept


def _one_tile(queries: Tensor, keys: Tensor, row_tile: int, column_tile: int) -> bool:
    return 0 < queries.shape[0] <= row_tile and 0 < keys.shape[0] <= column_tile


def _accumulate(tile: Tensor, scratch: Tensor, peak: Tensor, total: Tensor, *, dim: int) -> None:
    """Take a tile of exponents into the running `2**peak * total` along `dim`."""
    highest = torch.maximum(peak, tile.amax(dim))
    torch.sub(tile, highest.unsqueeze(dim), out=scratch).exp2_()
    total.mul_(torch.exp2(peak - highest)).add_(scratch.sum(dim))
    peak.copy_(highest)


def _weigh(tile: Tensor, scratch: Tensor, of_rows: tuple[Tensor, Tensor], of_columns: tuple[Tensor, Tensor]) -> None:
    """Turn a tile of exponents into gradients, given peak and weight of its rows and columns (of none, if empty)."""
    peak, weight = of_columns
    if len(peak):
        torch.sub(tile, peak, out=scratch).exp2_().mul_(weight)
    peak, weight = of_rows
    tile.sub_(peak.unsqueeze(1)).exp2_().mul_(weight.unsqueeze(1))
    if len(of_columns[0]):
        tile.add_(scratch)


@log_sums.register_fake
def _(
    queries: Tensor, keys: Tensor, factor: Tensor, *, columns: bool, row_tile: int, column_tile: int, **_: int
) -> tuple[Tensor, ...]:
    row, column = factor.new_empty(queries.shape[0]), factor.new_empty(keys.shape[0] if columns else 0)
    one = _one_tile(queries, keys, row_tile, column_tile)
    kept = factor.new_empty((queries.shape[0], keys.shape[0]) if one else (0,))
    return row, torch.empty_like(row), column, torch.empty_like(column), torch.empty_like(row), kept


@torch.library.custom_op(
    "zoo::log_sums_backward",
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, Tensor factor, Tensor[] parts, *, int offset, bool[] needs, int row_tile, "
    "int column_tile) -> (Tensor, Tensor, Tensor)",
)
def _log_sums_backward(
    queries: Tensor,
    keys: Tensor,
    factor: Tensor,
    parts: list[Tensor],
    *,
    offset: int,
    needs: list[bool],
    row_tile: int,
    column_tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in `queries`, `keys` and `factor`; those not needed are empty.

    The gradient of a negative's score is `2**(score - row_peak) row_weight + 2**(score - column_peak) column_weight`,
    with no power above 1, whatever the scores; that of a positive's is `of_positive`.
    """
    row_peak, row_weight, column_peak, column_weight, of_positive, kept = parts
    with torch.autocast(queries.device.type, enabled=False):
        work = Workspace(queries, keys, row_tile=row_tile, column_tile=column_tile)
        sums = Gradients(queries, keys, factor, needs)
        for rows, blocks in tiles(len(queries), len(keys), row_tile=row_tile, column_tile=column_tile):
            query = work.load(queries[rows])
            sums.open(query)
            for block in blocks:
                key = work.load(keys[block])
                tile, scratch = work.scores(query, key, factor) if kept.ndim == 1 else work.copy(kept)
                _weigh(tile, scratch, (row_peak[rows], row_weight[rows]), (column_peak[block], column_weight[block]))
                diagonal, owners = positives(tile, rows, block, offset)
                diagonal.copy_(of_positive[owners])
                sums.add(work, tile, key, block)
            sums.close(rows, factor)
        return sums.result(keys, factor)


@_log_sums_backward.register_fake
def _(
    queries: Tensor, keys: Tensor, factor: Tensor, _: list[Tensor], *, needs: list[bool], **__: int
) -> tuple[Tensor, ...]:
    return tuple(like_if(needed, x) for needed, x in zip(needs, (queries, keys, factor), strict=True))


def _keep_inputs(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)  # the tile that is kept would get a gradient of zeros
    ctx.save_for_backward(*inputs, *output[:4], output[5])
    ctx.options = keyword_only_inputs


def _differentiate_log_sums(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    queries, keys, factor, row_peak, row_log, column_peak, column_log, kept = ctx.saved_tensors
    of_row, of_column, of_positive = (
        torch.zeros_like(like) if given is None else given
        for given, like in zip((gradients[1], *gradients[3:5]), (row_log, column_log, row_log), strict=True)
    )
    options = dict(ctx.options)
    columns = options.pop("columns")
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated in its turn
        scores = dense_scores(queries, keys)
        is_positive = on_diagonal(torch.ones_like(of_positive), scores, options["offset"]).bool()
        exponents = (scores * (factor / LOG2_E)).masked_fill(is_positive, torch.finfo(scores.dtype).min)
        weights = of_row.unsqueeze(1) * exponents.softmax(1)
        if columns:
            weights = weights + of_column * exponents.softmax(0)
        weights = torch.where(is_positive, on_diagonal(of_positive, scores, options["offset"]), weights)
        found = dense_gradients(queries, keys, factor, scores=scores, weights=weights)
    else:
        row_weight, column_weight = of_row * torch.exp2(-row_log), of_column * torch.exp2(-column_log)
        parts = [row_peak, row_weight, column_peak, column_weight, of_positive, kept]
        found = _log_sums_backward(queries, keys, factor, parts, needs=needs, **options)
    return tuple(x if needed else None for x, needed in zip(found, needs, strict=True))


log_sums.register_autograd(_differentiate_log_sums, setup_context=_keep_inputs)
