"""The best items by exact scores: blocks of products in float64, and running lists."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.interaction_graph import PairLists
from zoo.metrics.whole_numbers import BYTES_PER_ENTRY, blocks, whole_numbers

__all__ = ["BYTES_PER_SCORE", "best_lists", "best_neighbours", "exclude_pairs"]

BYTES_PER_SCORE = 16
"""A score in float64, and what topk takes."""


def best_lists(
    users: Tensor, items: Tensor, places: int, *, item_length: float | None, exclude: PairLists | None, memory: int
) -> tuple[Tensor, Tensor]:
    """Find the items with the largest scores, of equal ones the first.

    Args:
        users: vectors (B, d).
        items: vectors (I, d).
        places: length of the lists, 1 … I.
        item_length: what items are divided by; None for their own lengths.
        exclude: items that each row is not to find.
        memory: bytes of a block and what is made of it.

    Returns:
        Positions and whole-number scores (B, places), -inf for what may not be found.
    """
    rows, columns = _block_shape(len(users), len(items), users.shape[1], memory)
    best = _Best(len(users), places, users.device)
    excluded = None if exclude is None else (exclude.rows(), exclude.columns, exclude.offsets.tolist())
    for block in blocks(len(items), columns):
        vectors, usable = whole_numbers(items[block], item_length)
        broken = usable.logical_not().nonzero().squeeze(1)
        for own in blocks(len(users), rows):
            scores = whole_numbers(users[own], None)[0] @ vectors.t()
            scores.index_fill_(1, broken, -torch.inf)
            if excluded is not None:
                exclude_pairs(scores, *excluded, own=own, block=block)
            best.add(own, scores, block.start)
    return best.items, best.scores


def best_neighbours(items: Tensor, k: int, memory: int) -> Tensor:
    """Find the k nearest other items of each by cosine: (I, k). Each pair of blocks is multiplied once.

    Args:
        items: vectors (I, d), finite.
        k: neighbours, 1 … I - 1.
        memory: bytes of a block and what is made of it.
    """
    best = _Best(len(items), k, items.device)
    size = min(_block_shape(len(items), len(items), items.shape[1], memory))
    parts = list(blocks(len(items), size))
    for index, block in enumerate(parts):
        vectors = whole_numbers(items[block], None)[0]
        # The lists of a block meet the others in their order: those before it now, those behind it in their turn.
        for own in parts[:index]:
            scores = whole_numbers(items[own], None)[0] @ vectors.t()
            best.add(own, scores, block.start)
            best.add(block, scores.t(), own.start)
        best.add(block, (vectors @ vectors.t()).fill_diagonal_(-torch.inf), block.start)
    return best.items


class _Best:
    """Running lists of the best, to which blocks of items are added in their order."""

    def __init__(self, rows: int, places: int, device: torch.device) -> None:
        self.places = places
        self.items = torch.zeros(rows, places, dtype=torch.int64, device=device)
        self.scores = torch.full_like(self.items, -torch.inf, dtype=torch.float64)

    def add(self, own: slice, scores: Tensor, start: int) -> None:
        """Take in the scores of some rows with the items from `start` on."""
        positions = _first_best(scores, min(self.places, scores.shape[1]))
        # What came from earlier blocks stands first among equals.
        both = torch.cat([self.scores[own], scores.gather(1, positions)], 1).sort(dim=1, descending=True, stable=True)
        order = both.indices[:, : self.places]
        self.scores[own] = both.values[:, : self.places]
        self.items[own] = torch.cat([self.items[own], positions + start], 1).gather(1, order)


def _first_best(scores: Tensor, places: int) -> Tensor:
    """Positions (B, places) of the largest scores, the first of equal ones, in that order."""
    top = scores.topk(min(places + 1, scores.shape[1]), dim=1)
    positions = top.indices[:, :places]
    if top.indices.shape[1] > places:
        # Which of the equals topk has taken at the end of the list is chance.
        last = top.values[:, places - 1]
        tied = ((last == top.values[:, places]) & (last > -torch.inf)).nonzero().squeeze(1)
        if len(tied):
            some, limit = scores[tied], last[tied].unsqueeze(1)
            above, equal = some > limit, some == limit
            taken = above | (equal & (equal.cumsum(1) <= places - above.sum(1, keepdim=True)))
            positions[tied] = taken.nonzero()[:, 1].view(-1, places)
    positions = positions.sort(1).values
    return positions.gather(1, scores.gather(1, positions).sort(dim=1, descending=True, stable=True).indices)


def exclude_pairs(
    scores: Tensor, rows: Tensor, columns: Tensor, offsets: list[int], *, own: slice, block: slice
) -> None:
    """Take excluded pairs out of a block of scores.

    Args:
        scores: those of rows `own` with the items of `block`; they are set to -inf in place.
        rows: the row of each excluded pair, ascending.
        columns: its item.
        offsets: where each row's pairs begin, and where the last ends.
        own: rows of the block.
        block: its columns.
    """
    pairs = slice(offsets[own.start], offsets[own.stop])
    rows, columns = rows[pairs], columns[pairs]
    here = (columns >= block.start) & (columns < block.stop)
    scores[rows[here] - own.start, columns[here] - block.start] = -torch.inf


def _block_shape(users: int, items: int, width: int, memory: int) -> tuple[int, int]:
    """Rows and columns of a block: half of the memory for vectors, half for scores, and as square as that allows."""
    vectors = max(1, memory // (4 * BYTES_PER_ENTRY * width))
    scores = max(1, memory // (2 * BYTES_PER_SCORE))
    rows = min(users, vectors, max(1, math.isqrt(scores)))
    return rows, min(items, vectors, max(1, scores // rows))
