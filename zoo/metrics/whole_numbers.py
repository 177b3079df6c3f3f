"""Vectors rounded to whole numbers, whose inner products float64 holds exactly in whatever order they are added up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "BITS",
    "BYTES_PER_ENTRY",
    "blocks",
    "exact_scores",
    "largest_entries",
    "longest",
    "row_lengths",
    "whole_numbers",
]

BITS = 25
"""Bits of a unit vector's entries. Products stay below 2^53 even where rounding has made the vectors longer."""
BYTES_PER_ENTRY = 32
"""A row in float64 and its scaled and rounded copies."""


def whole_numbers(rows: Tensor, length: float | None) -> tuple[Tensor, Tensor]:
    """Round rows, divided by their own or a common length, to multiples of 2^-25.

    Args:
        rows: (N, d).
        length: the common length; None for their own.

    Returns:
        The multiples (N, d), whole numbers in float64; and which rows are finite (N,), bool. Others become zeros.

    Example:
        >>> whole_numbers(torch.tensor([[3.0, 4.0]]), None)[0] / 2**25
        tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """
    finite = largest_entries(rows).isfinite()
    if length is None:
        lengths = _lengths_of_block(rows).unsqueeze(1)
    else:
        lengths = torch.full((), length, dtype=torch.float64, device=rows.device)
    wanted = finite.unsqueeze(1) & (lengths > 0)
    scaled = torch.where(wanted, rows.double(), 0).div_(torch.where(wanted, lengths, 1))
    return scaled.mul_(2.0**BITS).round_(), finite


def exact_scores(
    users: Tensor, items: Tensor, rows: Tensor, columns: Tensor, *, length: float | None, memory: int
) -> Tensor:
    """Inner products of some pairs of `whole_numbers`.

    Args:
        users: (B, d).
        items: (I, d).
        rows: the user of each pair (P,).
        columns: the item of each pair (P,).
        length: the common length of items; None for their own.
        memory: bytes to work in.

    Returns:
        (P,), whole numbers in float64.

    Example:
        >>> both = torch.eye(2)
        >>> exact_scores(both, both, torch.tensor([0, 0]), torch.tensor([0, 1]), length=None, memory=2**20) / 2**50
        tensor([1., 0.], dtype=torch.float64)
    """
    found = torch.zeros(len(rows), dtype=torch.float64, device=users.device)
    for part in blocks(len(rows), max(1, memory // (2 * BYTES_PER_ENTRY * users.shape[1]))):
        of_users, place = torch.unique(rows[part], return_inverse=True)
        vectors = whole_numbers(users[of_users], None)[0][place]
        found[part] = vectors.mul_(whole_numbers(items[columns[part]], length)[0]).sum(1)
    return found


def largest_entries(rows: Tensor) -> Tensor:
    """Largest magnitude in each row, without a copy of the rows.

    Args:
        rows: (N, d).

    Returns:
        (N,): 0 for a row of zeros, and not finite for a row that is not.

    Example:
        >>> largest_entries(torch.tensor([[1.0, -2.0], [0.0, 0.0], [torch.nan, 1.0]]))
        tensor([2., 0., nan])
    """
    largest: Tensor = torch.linalg.vector_norm(rows, torch.inf, dim=1)
    return largest


def row_lengths(rows: Tensor, memory: int) -> Tensor:
    """Length of each row in float64, (N,), of whatever size its entries are.

    Args:
        rows: (N, d).
        memory: bytes to work in.

    Example:
        >>> row_lengths(torch.tensor([[3e30, 4e30]]), 2**20)
        tensor([5.0000e+30], dtype=torch.float64)
    """
    parts = blocks(len(rows), max(1, memory // (BYTES_PER_ENTRY * rows.shape[1])))
    return torch.cat([_lengths_of_block(rows[part]) for part in parts])


def _lengths_of_block(rows: Tensor) -> Tensor:
    rows = rows.double()
    largest = largest_entries(rows).unsqueeze(1)
    usable = (largest > 0) & largest.isfinite()
    lengths: Tensor = torch.linalg.vector_norm(rows / torch.where(usable, largest, 1), dim=1) * largest.squeeze(1)
    return lengths


def longest(lengths: Tensor) -> float:
    """The largest of the lengths that are finite.

    Example:
        >>> longest(torch.tensor([1.0, torch.inf]))
        1.0
    """
    return float(torch.where(lengths.isfinite(), lengths, 0).amax())


def blocks(count: int, size: int) -> Iterator[slice]:
    """Cut numbers below `count` into slices of at most `size`.

    Example:
        >>> list(blocks(3, 2))
        [slice(0, 2, None), slice(2, 3, None)]
    """
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
