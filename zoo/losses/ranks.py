"""Losses over the batches of all processes: what goes between ranks, and which gradient comes back.

With a process group, every rank computes a part of one global loss and returns the same global value. The gradient that
a rank's backward leaves is that of the *sum of all ranks' losses*, which is what the functions here pass back (each is
the exact adjoint of its forward over ranks). With W equal losses this is W times the gradient of the global loss, split
over the ranks, so that the mean over ranks, which DDP takes, is the exact gradient of the global loss for every
parameter: those behind the rank's own embeddings and those that all ranks share, such as a logit scale. Embeddings
themselves are not averaged by anybody: their gradient on a rank is W times the one of a single process.

All ranks must call the same functions in the same order, in forward and backward. They wait for each other; a rank
that raises before it has sent its part leaves the others waiting, and therefore the checks of sizes are made on numbers
that all ranks have received.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.errors import InputError

__all__ = ["combine_log_sums", "gather_rows", "rank_and_size", "require_equal_batches", "sum_over_ranks"]


def rank_and_size(*, gather: bool) -> tuple[int, int]:
    """Return this process's rank and the number of processes, or (0, 1) where nothing is to be gathered.

    Args:
        gather: whether the loss spans processes.

    Returns:
        (rank, world size); (0, 1) without `gather` or without an initialised process group.

    Example:
        >>> rank_and_size(gather=True)
        (0, 1)
    """
    if gather and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def require_equal_batches(*tensors: Tensor) -> None:
    """Refuse, on all ranks alike, batches whose row counts differ between ranks.

    Args:
        tensors: what will be gathered; each must have as many rows on every rank.

    Raises:
        InputError: a rank has another number of rows. For tensors on a GPU and under `torch.compile` this is an
            assertion (device-side on a GPU), which does not make the host wait.
    """
    own = torch.tensor([tensor.shape[0] for tensor in tensors], device=tensors[0].device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    sizes = torch.stack(parts)
    if own.device.type == "cpu" and not torch.compiler.is_compiling():
        for column in sizes.t().tolist():
            if len(set(column)) > 1:
                raise InputError(
                    f"gather=True needs equally large batches in all processes, got {column} by rank; "
                    "use drop_last=True or a sampler that pads"
                )
    else:
        torch._assert_async((sizes == own).all(), "gather=True needs equally large batches in all processes")


def gather_rows(rows: Tensor) -> Tensor:
    """Put the rows of all ranks one after another, by rank.

    Args:
        rows: (n, …), equally many on every rank.

    Returns:
        (W n, …), the same on every rank. Its gradient is summed over ranks, and each rank gets its own part.
    """
    return _GatherRows.apply(rows)  # type: ignore[no-any-return]


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add the tensors of all ranks.

    Args:
        value: a tensor of the same shape on every rank.

    Returns:
        The sum, the same on every rank. Its gradient is summed over ranks, and each rank gets all of it.
    """
    return _SumOverRanks.apply(value)  # type: ignore[no-any-return]


def combine_log_sums(peak: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Join the ranks' parts of sums of powers of two, each given as `2**peak * 2**log_sum`.

    Args:
        peak: the exponent that a rank has taken out of its part, a constant; (M,), equally many on every rank.
        log_sum: the base-2 logarithm of what is left, which carries the gradient; (M,).

    Returns:
        Peak and logarithm of the global sums, the same on every rank; the logarithm is at least 0 if each part has
        taken out its largest exponent. The gradient is summed over ranks, and each rank gets its share of the sum.
    """
    return _CombineLogSums.apply(peak, log_sum)  # type: ignore[no-any-return]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.rows = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        if gradient.device.type == "cuda":  # gloo has had no reduce-scatter for most of its life
            own = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
            dist.reduce_scatter_tensor(own, gradient)
            return own
        total = gradient.clone()
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        # A tensor of its own: torch 2.11 compiles a result that was reduced in place into one without a gradient.
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.clone()


class _CombineLogSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, peak: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        highest = peak.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        # A maximum over ranks may lose NaN; the sum does not.
        part = torch.exp2(peak - highest + log_sum)
        total = part.clone()
        dist.all_reduce(total)
        ctx.save_for_backward(part / total)
        ctx.mark_non_differentiable(highest)
        return highest, total.log2()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (share,) = ctx.saved_tensors
        total = gradients[1].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return None, total * share
