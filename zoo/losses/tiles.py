"""What loops over tiles of pairwise scores share: blocks, buffers, products, positives, running gradients.

Scores are `factor * queries @ keys.T`; the positive of row i is column `offset + i`; a tile has at most `row_tile` rows
and `column_tile` columns. What the loops compute is told in `zoo.losses.pairwise`. Nothing is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.losses.contracts import working_dtype

__all__ = [
    "LINEAR_FROM",
    "LOG2_E",
    "Gradients",
    "Workspace",
    "dense_gradients",
    "dense_scores",
    "like_if",
    "on_diagonal",
    "positives",
    "tiles",
]

LOG2_E = math.log2(math.e)
# log(1 + e^x) is x to float64's last place from here on; PyTorch's default of 20 is good for float32 only.
LINEAR_FROM = 40.0


def tiles(rows: int, columns: int, *, row_tile: int, column_tile: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield each block of rows with all blocks of columns.

    Args:
        rows: how many there are.
        columns: how many there are.
        row_tile: the most rows of a block.
        column_tile: the most columns of a block.

    Yields:
        A slice of rows, and the slices of columns.

    Example:
        >>> list(tiles(3, 2, row_tile=2, column_tile=2))
        [(slice(0, 2, None), [slice(0, 2, None)]), (slice(2, 3, None), [slice(0, 2, None)])]
    """
    blocks = [slice(start, min(start + column_tile, columns)) for start in range(0, columns, column_tile)]
    for start in range(0, rows, row_tile):
        yield slice(start, min(start + row_tile, rows)), blocks


class Workspace:
    """Two buffers for tiles, and the products that fill and empty them.

    Args:
        queries: the features of the rows.
        keys: the features of the columns, of the same type.
        row_tile: the most rows of a tile.
        column_tile: the most columns of a tile.
    """

    def __init__(self, queries: Tensor, keys: Tensor, *, row_tile: int, column_tile: int) -> None:
        self.dtype = working_dtype(queries)
        # The one half type that a GPU multiplies without the risk that a factor overflows or underflows.
        self.native = queries.dtype == torch.bfloat16 and queries.device.type == "cuda"
        size = min(row_tile, queries.shape[0]) * min(column_tile, keys.shape[0])
        self.first, self.second = (torch.empty(size, dtype=self.dtype, device=queries.device) for _ in range(2))

    def load(self, block: Tensor) -> Tensor:
        """The rows in the type in which they are multiplied."""
        return block if self.native else block.to(self.dtype)

    def scores(self, queries: Tensor, keys: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tile `factor * queries @ keys.T`, and a buffer like it."""
        shape = queries.shape[0], keys.shape[0]
        tile, other = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (self.first, self.second))
        if self.native:
            torch.mm(queries, keys.t(), out_dtype=self.dtype, out=tile)
        else:
            torch.mm(queries, keys.t(), out=tile)
        return tile if factor is None else tile.mul_(factor), other

    def copy(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """A tile that was kept, to be overwritten, and a buffer like it."""
        return self.first.view_as(kept).copy_(kept), self.second.view_as(kept)

    def add_product(self, total: Tensor, weights: Tensor, features: Tensor) -> None:
        """Add `weights @ features` to a total in the working precision."""
        if self.native:
            total += torch.mm(weights.to(features.dtype), features, out_dtype=self.dtype)
        else:
            total.addmm_(weights, features)


class Gradients:
    """Running gradients of a sum over tiles in queries, keys and the factor of the scores.

    Args:
        queries: the features of the rows.
        keys: the features of the columns.
        factor: the factor of the scores, in the working precision.
        needs: which of the three gradients are needed; the others stay empty.
    """

    def __init__(self, queries: Tensor, keys: Tensor, factor: Tensor, needs: list[bool]) -> None:
        self.of_queries = like_if(needs[0], queries)
        self.of_keys = like_if(needs[1], keys, factor.dtype).zero_()
        self.of_factor = like_if(needs[2], factor).zero_()
        self.needs = needs
        # The factor's gradient is sum_i <q_i, dL/dq_i> / factor, or the same over keys: no product of its own.
        self.by_rows = needs[0] or (needs[2] and not needs[1])

    def open(self, query: Tensor) -> None:
        """Begin a block of rows."""
        self.query = query
        self.row_block = torch.zeros_like(query, dtype=self.of_keys.dtype) if self.by_rows else query

    def add(self, work: Workspace, weights: Tensor, key: Tensor, block: slice) -> None:
        """Take in the gradients of a tile of scores."""
        if self.by_rows:
            work.add_product(self.row_block, weights, key)
        if self.needs[1]:
            work.add_product(self.of_keys[block], weights.t(), self.query)

    def close(self, rows: slice, factor: Tensor) -> None:
        """End a block of rows."""
        if self.by_rows and self.needs[2]:
            self.of_factor += (self.query * self.row_block).sum()
        if self.needs[0]:
            self.of_queries[rows] = self.row_block.mul_(factor)

    def result(self, keys: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three gradients, each in the type of what it is the gradient of."""
        if self.needs[2] and not self.by_rows:
            self.of_factor += (keys * self.of_keys).sum()
        return self.of_queries, self.of_keys.mul_(factor).to(keys.dtype), self.of_factor


def positives(tile: Tensor, rows: slice, columns: slice, offset: int) -> tuple[Tensor, slice]:
    """Find the entries of a tile that are the positives of its rows.

    Args:
        tile: scores of a block of rows against a block of columns.
        rows: the block of rows.
        columns: the block of columns.
        offset: the column of the first row's positive.

    Returns:
        The entries, a view of the tile's diagonal, perhaps of none; and the rows that they belong to.
    """
    start = max(rows.start, columns.start - offset)
    stop = max(start, min(rows.stop, columns.stop - offset))
    top, left = start - rows.start, start + offset - columns.start
    return tile[top : top + stop - start, left : left + stop - start].diagonal(), slice(start, stop)


def like_if(needed: bool, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor like `like`, or an empty one.

    Args:
        needed: whether its elements are needed.
        like: gives shape, device and type.
        dtype: another type.

    Returns:
        A new tensor of the shape of `like`, or (0,).

    Example:
        >>> like_if(False, torch.zeros(2, 3)).shape
        torch.Size([0])
    """
    return like.new_empty(like.shape if needed else (0,), dtype=dtype or like.dtype)


def on_diagonal(values: Tensor, scores: Tensor, offset: int) -> Tensor:
    """Set the positives of a matrix of zeros, differentiably.

    Args:
        values: one for each row.
        scores: gives shape, device and type.
        offset: the column of the first row's positive.

    Returns:
        A matrix like `scores`.

    Example:
        >>> on_diagonal(torch.ones(1), torch.zeros(1, 3), 1)
        tensor([[0., 1., 0.]])
    """
    index = torch.arange(values.shape[0], device=values.device)
    return torch.zeros_like(scores).index_put((index, index + offset), values)


def dense_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products of all pairs as a matrix, differentiable: for second derivatives.

    Args:
        queries: (n, d).
        keys: (M, d).

    Returns:
        (n, M) in the working precision.
    """
    dtype = working_dtype(queries)
    return queries.to(dtype) @ keys.to(dtype).t()


def dense_gradients(
    queries: Tensor, keys: Tensor, factor: Tensor, *, scores: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a sum over scores, differentiable: for second derivatives.

    Args:
        queries: (n, d).
        keys: (M, d).
        factor: factor of the scores.
        scores: (n, M) without the factor.
        weights: (n, M), gradients of the scores with the factor.

    Returns:
        The gradients in queries, keys and factor.
    """
    scaled = factor * weights
    return (
        (scaled @ keys.to(scaled.dtype)).to(queries.dtype),
        (scaled.t() @ queries.to(scaled.dtype)).to(keys.dtype),
        (weights * scores).sum(),
    )
