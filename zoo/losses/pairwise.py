"""Sums over all pairs of two batches, exact and without the matrix of pairs: the engine of the contrastive family.

For queries q_i (n, d), keys k_j (M, d) and a scale s, the scores are l_ij = s <q_i, k_j>, and the positive of query i
is key i. InfoNCE and what descends from it need the log-sum-exp of each row and of each column of l; the dense form
keeps about five n x M matrices for it and for its gradient. Here one pass over tiles of l keeps a running (maximum,
sum) for each row and each column, and the backward pass computes the tiles again:

    row_i = log sum_j exp(l_ij - l_ii) = log(1 + exp(n_i - l_ii)),   n_i = log sum_{j != i} exp(l_ij)
    column_j likewise, with sums over i

so that memory is that of a tile beside inputs and gradients, and the work is four matrix products (scores, scores
again, two gradients) against three of the dense form, which loses more than one product's time to memory traffic. A
batch that fits in one tile keeps it, and needs three.

Choices:

- positives stay out of the sums, which are kept as (maximum, sum) and never as a whole log-sum-exp: a loss near 0, and
  the factor 1 - p_ii of its gradient, keep their relative precision in float32 where the dense form rounds them to
  units of 1e-7, and no value is negative;
- powers of two, with log2(e) folded into the scale: on CPUs `exp2` takes a third of the time of `exp`, and a tenth of
  it or less where results are subnormal;
- half-precision inputs stay as they are and are multiplied with float32 results: exactly on the CPU (each tile of them
  is converted), with bfloat16 products of float32 sums on a GPU, where the probabilities are rounded to bfloat16 before
  they are multiplied into the gradients (a relative error of 2**-9 in each of their terms);
- the tile loops are custom operators, opaque to `torch.compile`, which therefore neither unrolls nor breaks at them;
- a derivative of the gradient (`create_graph=True`) is supported and exact, but dense: it needs the n x M matrices.

The precision of float32 products is PyTorch's setting (`torch.set_float32_matmul_precision`), "highest" by default.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.contracts import require_matrix, require_number, working_dtype
from zoo.losses.log_sums import log_sums
from zoo.losses.ranks import combine_log_sums, gather_rows, rank_and_size, require_equal_batches, sum_over_ranks
from zoo.losses.softplus_sum import softplus_sum
from zoo.losses.tiles import LINEAR_FROM, LOG2_E

__all__ = ["PairwiseLogSums", "pairwise_logsumexp", "pairwise_softplus", "tile_shape"]

# Tiles of 256 … 2048 a side differ by 6 % on cores with 1 MiB of L2 (N = 6000, one thread); this one is the fastest.
_CPU_TILE = (1024, 1024)
_GPU_TILE = (2048, 4096)  # not measured yet: two float32 buffers of 32 MiB


class PairwiseLogSums(NamedTuple):
    """What `pairwise_logsumexp` returns, in nats, for this process's own queries and keys."""

    rows: Tensor  # (n,): log sum_j exp(l_ij - l_ii), at least 0
    columns: Tensor  # (n,): log sum_i exp(l_ij - l_jj), at least 0; (0,) if not asked for
    positives: Tensor  # (n,): l_ii, so that rows + positives is the log-sum-exp of a row


def pairwise_logsumexp(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float | Tensor,
    columns: bool = True,
    gather: bool = False,
    chunk_size: int | None = None,
) -> PairwiseLogSums:
    """Log-sum-exp of each row and column of `scale * queries @ keys.T`, less the positive's score.

    Nothing is normalised. The gradient flows to `queries`, `keys` and `scale`, is exact, and is computed only for those
    that need it. NaN or infinity in the features gives NaN in every sum that it enters. The value does not depend on
    `chunk_size` beyond rounding.

    With `gather=True` and a process group, rows run over the keys of all ranks and columns over the queries of all
    ranks; what is returned is the part of this rank. Ranks exchange keys, two numbers a key, and the keys' gradients.
    The gradient is that of the sum over ranks (see `zoo.losses.ranks`).

    Args:
        queries: (n, d), floating point.
        keys: (M, d) with M >= n; key i is the positive of query i, further ones are negatives only.
        scale: factor of the inner products, a number of at least 0 or a tensor with one element.
        columns: whether the columns are needed; they need M = n.
        gather: whether to span the batches of all processes, which must be equally large.
        chunk_size: rows and columns of a tile, at least 1; None lets the engine choose.

    Returns:
        Three vectors in float32, in float64 if `queries` are float64.

    Raises:
        InputError: a tensor is not (batch, width) in floating point, widths, devices or batches do not match, a scale
            that is no single number, or a chunk size below 1.

    Example:
        Three equal keys: each query finds its own among them with probability 1/3.

        >>> sums = pairwise_logsumexp(torch.ones(3, 2), torch.ones(3, 2), scale=5.0)
        >>> (sums.rows.exp().round(), sums.columns.exp().round(), sums.positives)
        (tensor([3., 3., 3.]), tensor([3., 3., 3.]), tensor([10., 10., 10.]))
    """
    _check_pairs(queries, keys, square=columns)
    rank, size = rank_and_size(gather=gather)
    tile = tile_shape(chunk_size, queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = _same_type(queries, keys)
        factor = scalar("scale", scale, queries) * LOG2_E
        offset = rank * keys.shape[0]
        if size > 1:
            require_equal_batches(queries, keys)
            keys = gather_rows(keys)
        row_peak, row_log, column_peak, column_log, positive, _ = log_sums(
            queries, keys, factor, offset=offset, columns=columns, row_tile=tile[0], column_tile=tile[1]
        )
        if columns and size > 1:
            column_peak, column_log = combine_log_sums(column_peak, column_log)
        rows = _with_positive(row_peak, row_log, positive)
        if columns:
            own = slice(offset, offset + queries.shape[0])
            column_log = _with_positive(column_peak[own], column_log[own], positive)
        return PairwiseLogSums(rows, column_log, positive / LOG2_E)


def pairwise_softplus(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    gather: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum over all pairs of `log(1 + exp(-z_ij (scale <q_i, k_j> + bias)))`, z = 1 for i = j and -1 for other pairs.

    Nothing is normalised. No pair's weight depends on another pair, so the gradient is computed with the value, in one
    pass of three matrix products, if anything needs it. Types, devices, `gather` and `chunk_size` are as for
    `pairwise_logsumexp`.

    Args:
        queries: (n, d), floating point.
        keys: (n, d); key i is the positive of query i.
        scale: factor of the inner products, a number of at least 0 or a tensor with one element.
        bias: added to every score, a finite number or a tensor with one element.
        gather: whether to span the batches of all processes, which must be equally large.
        chunk_size: rows and columns of a tile, at least 1; None lets the engine choose.

    Returns:
        A scalar in nats; with `gather` the sum over all pairs of the global batch.

    Raises:
        InputError: as `pairwise_logsumexp`, or a bias that is no single finite number.

    Example:
        >>> pairwise_softplus(torch.zeros(3, 2), torch.zeros(3, 2), scale=1.0, bias=0.0) / torch.tensor(2.0).log()
        tensor(9.)
    """
    _check_pairs(queries, keys, square=True)
    rank, size = rank_and_size(gather=gather)
    tile = tile_shape(chunk_size, queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = _same_type(queries, keys)
        factor, shift = scalar("scale", scale, queries), scalar("bias", bias, queries, signed=True)
        offset = rank * keys.shape[0]
        if size > 1:
            require_equal_batches(queries, keys)
            keys = gather_rows(keys)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, factor, shift))
        total: Tensor = softplus_sum(
            queries, keys, factor, shift, offset=offset, learns=learns, row_tile=tile[0], column_tile=tile[1]
        )[0]
        return sum_over_ranks(total) if size > 1 else total


def tile_shape(chunk_size: int | None, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile: those asked for, or those that suit the device.

    Args:
        chunk_size: rows and columns alike, at least 1, or None.
        device: where the scores will be computed.

    Returns:
        (rows, columns).

    Raises:
        InputError: the chunk size is below 1.

    Example:
        >>> tile_shape(256, torch.device("cpu"))
        (256, 256)
    """
    if chunk_size is None:
        return _GPU_TILE if device.type == "cuda" else _CPU_TILE
    if chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, or None to let the engine choose, got {chunk_size}")
    return chunk_size, chunk_size


def scalar(name: str, value: float | Tensor, like: Tensor, *, signed: bool = False) -> Tensor:
    """Return a number as a tensor () in the working precision of `like`; a tensor keeps its graph.

    Args:
        name: the argument's name, for messages.
        value: a finite number or a tensor with one element.
        like: the tensor whose device and precision count.
        signed: whether a number below 0 is allowed.

    Returns:
        A tensor without dimensions.

    Raises:
        InputError: a tensor with more or fewer elements or in integers or on another device, or a number out of range.

    Example:
        >>> scalar("scale", 2, torch.zeros(1))
        tensor(2.)
    """
    dtype = working_dtype(like)
    if not isinstance(value, Tensor):
        require_number(name, abs(value) if signed else value, positive=False)
        return torch.full((), value, dtype=dtype, device=like.device)
    if value.numel() != 1 or not value.is_floating_point():
        raise InputError(
            f"{name} must be a number or a floating-point tensor with one element, got shape {tuple(value.shape)} "
            f"in {value.dtype}"
        )
    if value.device != like.device:
        raise InputError(f"{name} must be on the device of the features, got {value.device} and {like.device}")
    return value.reshape(()).to(dtype)


def _with_positive(peak: Tensor, log_sum: Tensor, positive: Tensor) -> Tensor:
    """Natural logarithm of the whole sum over the positive's term, from the sum of the negatives in base 2."""
    # 0 * positive: an infinite positive makes the sum 0 in some directions, and has to stay visible in all.
    return F.softplus(((peak.detach() - positive) + log_sum) / LOG2_E, threshold=LINEAR_FROM) + 0 * positive


def _check_pairs(queries: Tensor, keys: Tensor, *, square: bool) -> None:
    require_matrix("queries", queries)
    require_matrix("keys", keys)
    if queries.shape[1] != keys.shape[1]:
        raise InputError(
            f"keys must have the width of queries, got {keys.shape[1]} and {queries.shape[1]}; project one of them"
        )
    if keys.device != queries.device:
        raise InputError(f"keys must be on the device of queries, got {keys.device} and {queries.device}")
    if keys.shape[0] < queries.shape[0] or (square and keys.shape[0] != queries.shape[0]):
        rule = "as many rows as queries" if square else "at least as many rows as queries"
        raise InputError(
            f"keys must have {rule}, got {keys.shape[0]} and {queries.shape[0]}: key i is the positive of query i"
        )


def _same_type(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Half precision that both share stays; anything else becomes the working precision of the queries."""
    if queries.dtype == keys.dtype and queries.dtype in (torch.bfloat16, torch.float16):
        return queries, keys
    dtype = working_dtype(queries)
    return queries.to(dtype), keys.to(dtype)
