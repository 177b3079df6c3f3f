"""The best items by scores in float32, where their rounding cannot have changed the result.

Exact scores are products of whole numbers in float64 (`zoo.metrics.whole_numbers`). On a CPU such a product takes twice
the time of one in float32, and the float32 one needs no rounded copies of the vectors. So a list is made from float32
scores, a few places longer than asked:

- an item that is left out of the longer list has no score above that of the last one there. If this is below the score of
  the last place that counts by more than twice the largest error, no item is missing;
- neighbours in the list whose scores differ by less are put in order by their exact scores, of which there are few.

A list for which the first does not hold, such as one with many equal items, is found by exact scores. The bound on the
error holds for any order of summation, so the result is that of exact scores.

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.interaction_graph import PairLists
from zoo.metrics.exact_lists import BYTES_PER_SCORE, best_lists, exclude_pairs
from zoo.metrics.whole_numbers import BITS, blocks, exact_scores, longest

__all__ = ["can_screen", "screened_lists", "screened_neighbours"]

# Half the distance from 1 to the next number of float32, and a number that it holds exactly and shorter types do not.
_ROUNDING = 2.0**-24
_PROBE = 1 + 2.0**-20
# Products of longer vectors are added up from parts of this width: the errors of a sum are in proportion to its length.
_PART = 1024
# Lengths whose products float32 holds, with room for entries of any size.
_SHORTEST, _LONGEST = 1e-12, 1e12
# Products that are not worth a second list.
_SMALL = 1 << 22
# Rows of a block: more of them save fewer of the products of all pairs, and leave less room for columns.
_ROWS = 1024


def can_screen(rows: Tensor, columns: Tensor, places: int, width: int) -> bool:
    """Whether float32 scores are right up to `_error_bound`, and worth while.

    Args:
        rows: lengths of the vectors whose lists are wanted (B,), float64.
        columns: lengths of the vectors that are ranked (I,); those that are not finite are to be left out of all lists.
        places: length of the lists.
        width: d, of the vectors.
    """
    if rows.device.type != "cpu" or len(rows) * len(columns) * width < _SMALL or 4 * _longer(places) > len(columns):
        return False
    for lengths in (rows, columns[columns.isfinite()]):
        usual = (lengths == 0) | ((lengths >= _SHORTEST) & (lengths <= _LONGEST))
        if not bool(usual.all()):
            return False
    # Matrix products that PyTorch was told to make in a shorter type are no float32.
    with torch.autocast("cpu", enabled=False):
        probe = torch.full((64,), _PROBE).diag() @ torch.ones(64, 64)
    return bool((probe.double() == _PROBE).all())


def _error_bound(width: int) -> float:
    """How far a score of `_float32_scores` can be from the exact one, for vectors of width d and length 1."""
    # Both factors of a product and a scale are rounded, then the products, then each partial sum (Higham 2002, section
    # 3.1); the lengths bound the sum of the absolute products (Cauchy and Schwarz).
    roundings = (min(width, _PART) + -(-width // _PART) + 8) * _ROUNDING
    # And the exact one is that of vectors whose entries were rounded to multiples of 2^-25.
    return 1.01 * (roundings / (1 - roundings) + math.sqrt(width) * 2.0**-BITS) + 2.0**-40


def _float32_scores(rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products (B, I) of vectors (B, d) and (I, d), right up to `_error_bound` times the lengths."""
    rows, columns = rows.float(), columns.float()
    with torch.autocast("cpu", enabled=False):
        scores = rows[:, :_PART] @ columns[:, :_PART].t()
        part = torch.empty_like(scores) if rows.shape[1] > _PART else scores
        for start in range(_PART, rows.shape[1], _PART):
            own = slice(start, start + _PART)
            scores += torch.mm(rows[:, own], columns[:, own].t(), out=part)
    return scores


class _Candidates:
    """Running lists of the items with the largest float32 scores.

    Args:
        rows: number of lists.
        places: places of a list that count.
    """

    def __init__(self, rows: int, places: int) -> None:
        self.places = places
        self.scores = torch.full((rows, _longer(places)), -torch.inf)
        self.items = torch.zeros(rows, _longer(places), dtype=torch.int64)

    def add(self, own: slice, scores: Tensor, start: int) -> None:
        """Take in the scores of some rows with the items from `start` on; -inf for what is no candidate."""
        longest = self.scores.shape[1]
        top = scores.topk(min(longest, scores.shape[1]), dim=1)
        both = torch.cat([self.scores[own], top.values], 1).topk(longest, dim=1)
        self.scores[own] = both.values
        self.items[own] = torch.cat([self.items[own], top.indices + start], 1).gather(1, both.indices)

    def lists(self, units: Tensor, error: float, exact: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Put the items in order.

        Args:
            units: what a row's scores are to be divided by (B,), positive, so that their errors are below `error`.
            error: the bound.
            exact: exact scores (P,) of pairs of a row (P,) and an item (P,), divided alike.

        Returns:
            Items (B, places), the best first and the first of equal ones first, -1 where there is none; and which lists
            are clear (B,), bool.
        """
        scores = self.scores.double() / units.unsqueeze(1)
        last = scores[:, self.places - 1]
        limit = (last - 2 * error).unsqueeze(1)
        clear = (scores[:, -1:] < limit) | (scores[:, -1:] == -torch.inf)
        near = (scores[:, :-1] - scores[:, 1:] <= 2 * error) & (scores[:, 1:] >= limit) & clear
        near &= scores[:, 1:] > -torch.inf
        unclear = torch.zeros_like(scores, dtype=torch.bool)
        unclear[:, :-1] |= near
        unclear[:, 1:] |= near
        rows, places = unclear.nonzero(as_tuple=True)
        scores[rows, places] = exact(rows, self.items[rows, places])
        by_item = self.items.argsort(1)
        order = scores.gather(1, by_item).sort(dim=1, descending=True, stable=True).indices[:, : self.places]
        chosen = by_item.gather(1, order)
        found = self.items.gather(1, chosen).masked_fill(scores.gather(1, chosen) == -torch.inf, -1)
        return found, clear.squeeze(1)


def _longer(places: int) -> int:
    return places + places // 4 + 8


def screened_lists(
    users: Tensor,
    items: Tensor,
    places: int,
    *,
    of_users: Tensor,
    of_items: Tensor,
    dot: bool,
    exclude: PairLists | None,
    memory: int,
) -> Tensor:
    """Find the items with the largest scores, of equal ones the first, as `best_lists` does.

    Args:
        users: vectors (B, d), for which `can_screen` holds with the items.
        items: vectors (I, d).
        places: length of the lists.
        of_users: lengths of the users (B,).
        of_items: lengths of the items (I,); those that are not finite are never found.
        dot: whether scores are inner products, and not cosines.
        exclude: items that each user is not to find.
        memory: bytes of a block and what is made of it.

    Returns:
        Positions (B, places), -1 where no item is left.
    """
    length = longest(of_items) if dot else None
    broken = of_items.isfinite().logical_not()
    inverse = torch.where(of_items > 0, of_items, torch.inf).reciprocal().float()
    listed = _Candidates(len(users), places)
    rows, columns = _block_shape(users, items, memory)
    excluded = None if exclude is None else (exclude.rows(), exclude.columns, exclude.offsets.tolist())
    for block in blocks(len(items), columns):
        out = broken[block].nonzero().squeeze(1)
        for own in blocks(len(users), rows):
            scores = _float32_scores(users[own], items[block])
            if not dot:
                scores.mul_(inverse[block])
            scores.index_fill_(1, out, -torch.inf)
            if excluded is not None:
                exclude_pairs(scores, *excluded, own=own, block=block)
            listed.add(own, scores, block.start)
    found, clear = listed.lists(
        torch.where(of_users > 0, of_users, 1) * (length or 1),
        _error_bound(users.shape[1]),
        lambda rows, columns: (
            exact_scores(users, items, rows, columns, length=length, memory=memory) / 2.0 ** (2 * BITS)
        ),
    )
    rest = clear.logical_not().nonzero().squeeze(1)
    if len(rest):
        some = None if exclude is None else exclude.select(rest)
        best, scores = best_lists(users[rest], items, places, item_length=length, exclude=some, memory=memory)
        found[rest] = best.masked_fill(scores == -torch.inf, -1)
    return found


def screened_neighbours(items: Tensor, k: int, lengths: Tensor, memory: int) -> Tensor:
    """Find the k nearest other items of each, (I, k), as `best_neighbours` does.

    Args:
        items: vectors (I, d), for which `can_screen` holds.
        k: neighbours, 1 … I - 1.
        lengths: of the items (I,).
        memory: bytes of a block and what is made of it.
    """
    inverse = torch.where(lengths > 0, lengths, torch.inf).reciprocal().float()
    listed = _Candidates(len(items), k)
    parts = list(blocks(len(items), min(_block_shape(items, items, memory))))
    for index, block in enumerate(parts):
        for own in parts[: index + 1]:
            scores = _float32_scores(items[own], items[block])
            scores.mul_(inverse[block]).mul_(inverse[own].unsqueeze(1))
            if own == block:
                listed.add(own, scores.fill_diagonal_(-torch.inf), block.start)
            else:
                listed.add(own, scores, block.start)
                listed.add(block, scores.t().contiguous(), own.start)
    found, clear = listed.lists(
        torch.ones(len(items)),
        _error_bound(items.shape[1]),
        lambda rows, columns: exact_scores(items, items, rows, columns, length=None, memory=memory) / 2.0 ** (2 * BITS),
    )
    rest = clear.logical_not().nonzero().squeeze(1)
    if len(rest):
        itself = PairLists(torch.arange(len(rest) + 1), rest)
        found[rest] = best_lists(items[rest], items, k, item_length=None, exclude=itself, memory=memory)[0]
    return found


def _block_shape(users: Tensor, items: Tensor, memory: int) -> tuple[int, int]:
    """Rows and columns of a block: half of the memory for vectors that are not in float32 yet, half for scores."""
    vectors = max(1, memory // (16 * users.shape[1]))
    rows = min(_ROWS, len(users), vectors, max(1, math.isqrt(memory // (2 * BYTES_PER_SCORE))))
    return rows, min(len(items), vectors, max(1, memory // (2 * BYTES_PER_SCORE * rows)))
