"""The operator behind the uniformity losses: the log-sum-exp over all pairs of a batch, in one pass with its gradient.

With unit rows x_b (N, d) and, perhaps, unit features m_b:

    S = log sum_{b<c} exp(slope (<x_b, x_c> - clip(<m_b, m_c>, lowest, highest)))

A block of rows meets itself and the rows that follow it. Its exponentials are taken relative to the largest score so
far, and multiplied at once into the gradients, which shrink with it when a larger one comes: no block is computed
twice, and value and gradient together cost a third of the products that the dense form takes (scores of the upper
triangle, and their two products with the rows). Memory is that of three blocks (row_tile x N).

The gradient passes the clip on the closed interval. A derivative of the gradient (`create_graph=True`) is supported and
exact, but dense. `torch.compile` takes the operator whole.

The losses are in `zoo.losses.cm3`. Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.losses.tiles import like_if

__all__ = ["pair_log_sum", "row_blocks"]


def row_blocks(rows: int, *, rank: int, size: int, row_tile: int) -> Iterator[slice]:
    """Yield the blocks of rows whose pairs with following rows are a process's share.

    Rows are cut into twice as many parts as there are processes. The first parts have the most pairs, and each process
    takes one from either end.

    Args:
        rows: how many there are.
        rank: the process.
        size: how many processes there are.
        row_tile: the most rows of a block.

    Yields:
        Slices, none of them empty; never the last row alone, which no row follows.

    Example:
        >>> [list(row_blocks(9, rank=rank, size=2, row_tile=2)) for rank in (0, 1)]
        [[slice(0, 2, None), slice(6, 8, None)], [slice(2, 4, None), slice(4, 6, None)]]
    """
    for part in (rank, 2 * size - 1 - rank):
        start, stop = (rows * edge // (2 * size) for edge in (part, part + 1))
        stop = min(stop, rows - 1)
        for first in range(start, stop, row_tile):
            yield slice(first, min(first + row_tile, stop))


@torch.library.custom_op(
    "zoo::pair_log_sum",
    mutates_args=(),
    schema="(Tensor units, Tensor? features, *, SymInt rank, SymInt size, float slope, float lowest, float highest, "
    "SymInt row_tile, bool learns, bool features_learn) -> (Tensor, Tensor, Tensor)",
)
def pair_log_sum(
    units: Tensor,
    features: Tensor | None,
    *,
    rank: int,
    size: int,
    slope: float,
    lowest: float,
    highest: float,
    row_tile: int,
    learns: bool,
    features_learn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithm of a process's share of the sum over pairs, and its gradients.

    Args:
        units: (N, d), the rows of all processes, at least two, in the working precision.
        features: (N, d') likewise, or None for a sum without similarities.
        rank: the process whose share is wanted.
        size: how many processes share the pairs.
        slope: factor of the differences.
        lowest: lower bound of the similarities.
        highest: upper bound of the similarities.
        row_tile: the most rows of a block.
        learns: whether the gradient in `units` is wanted; it is empty otherwise.
        features_learn: whether the gradient in `features` is wanted.

    Returns:
        The logarithm (), which alone is differentiable, -inf for a share without pairs; gradients in `units` and
        `features`.
    """
    with torch.autocast(units.device.type, enabled=False):
        peak, total = units.new_full((), -torch.inf), units.new_zeros(())
        of_units = like_if(learns, units).zero_()
        of_features = like_if(features_learn, units if features is None else features).zero_()
        sides, gradients = (units, features), (of_units, of_features)
        needs = (learns, features_learn)
        memory = units.new_empty(3 if features is not None else 1, min(row_tile, len(units)) * len(units))
        for own in row_blocks(len(units), rank=rank, size=size, row_tile=row_tile):
            scores, cosines = _scores(sides, own, memory, slope=slope, lowest=lowest, highest=highest)
            higher = torch.maximum(peak, scores.amax())
            shrink = (peak - higher).exp()
            weights = scores.sub_(higher).exp_()
            total = total * shrink + weights.sum()
            peak = higher
            for side, gradient, needed in zip(sides, gradients, needs, strict=True):
                if needed and side is not None:
                    if side is features:
                        weights.mul_((cosines >= lowest).logical_and_(cosines <= highest)).neg_()
                    gradient.mul_(shrink)
                    gradient[own].addmm_(weights, side[own.start :])
                    gradient[own.start :].addmm_(weights.t(), side[own])
        inverse = torch.where(total == 0, 0, slope / total)
        return peak + total.log(), of_units.mul_(inverse), of_features.mul_(inverse)


@pair_log_sum.register_fake
def _(
    units: Tensor, features: Tensor | None, *, learns: bool, features_learn: bool, **_: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        units.new_empty(()),
        like_if(learns, units),
        like_if(features_learn, units if features is None else features),
    )


def _scores(
    sides: tuple[Tensor, Tensor | None], own: slice, memory: Tensor, *, slope: float, lowest: float, highest: float
) -> tuple[Tensor, Tensor]:
    """Scores of a block, -inf for what is no pair, and the cosines of the features."""
    units, features = sides
    shape = own.stop - own.start, len(units) - own.start
    blocks = [buffer[: shape[0] * shape[1]].view(shape) for buffer in memory]
    scores = torch.mm(units[own], units[own.start :].t(), out=blocks[0])
    if features is not None:
        torch.mm(features[own], features[own.start :].t(), out=blocks[1])
        scores.sub_(torch.clamp(blocks[1], lowest, highest, out=blocks[2]))
    scores.mul_(slope)
    no_pair = torch.ones(shape[0], shape[0], dtype=torch.bool, device=units.device).tril_()
    scores[:, : shape[0]].masked_fill_(no_pair, -torch.inf)
    return scores, blocks[-2 if features is not None else -1]


def _keep_gradients(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.options = keyword_only_inputs


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
    units, features, *found = ctx.saved_tensors
    needs = [ctx.options["learns"], ctx.options["features_learn"]]
    if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated in its turn
        wanted = [side for side, needed in zip((units, features), needs, strict=True) if needed]
        made = iter(torch.autograd.grad(_dense(units, features, **ctx.options), wanted, create_graph=True))
        found = [next(made) if needed else None for needed in needs]
    of_units, of_features = (gradients[0] * x if needed else None for x, needed in zip(found, needs, strict=True))
    return of_units, of_features


pair_log_sum.register_autograd(_differentiate, setup_context=_keep_gradients)


def _dense(
    units: Tensor,
    features: Tensor | None,
    *,
    rank: int,
    size: int,
    slope: float,
    lowest: float,
    highest: float,
    row_tile: int,
    **_: bool,
) -> Tensor:
    scores = units @ units.t()
    if features is not None:
        scores = scores - (features @ features.t()).clamp(lowest, highest)
    pairs = torch.zeros_like(scores, dtype=torch.bool)
    for own in row_blocks(len(units), rank=rank, size=size, row_tile=row_tile):
        pairs[own] = True
    return (slope * scores)[pairs.triu_(1)].logsumexp(0)
