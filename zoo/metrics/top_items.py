"""The best items of each user among all, in blocks under a memory budget, and the same on any device and in any blocks.

Ranking by floating-point scores depends on the last bit, which depends on the place of an item in a matrix product. Here
vectors are first rounded to whole numbers: users to 25 bits of their own length, items to 25 bits of that of the longest
one (of their own for cosines). Products of such vectors are whole numbers below 2^53, which float64 holds exactly, in
whatever order they are added up. So equal items tie exactly, and of equally good ones the first comes first: the result
does not depend on block sizes, batches, processes, threads or devices. Scores that are closer than about 2^-25 of the
largest possible one may change their order, as they may by the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError
from zoo.interaction_graph import PairLists, require_lists
from zoo.metrics.embeddings import require_embeddings

__all__ = ["DEFAULT_MEMORY", "ScoreName", "TopItems", "largest_entries", "nearest_items", "topk_items"]

ScoreName = Literal["dot", "cosine"]

DEFAULT_MEMORY = 2**28
# Products stay below 2^53 even where rounding has made the vectors longer.
_BITS = 25
# A score in float64, and what topk takes.
_BYTES_PER_SCORE = 16
# A row in float64 and its scaled and rounded copies.
_BYTES_PER_ENTRY = 32


class TopItems(NamedTuple):
    """What `topk_items` returns, the best first; places that no item is left for hold -1 and -inf."""

    items: Tensor  # (users, places) int64
    scores: Tensor  # (users, places) float32


@torch.no_grad()
def topk_items(
    users: Tensor,
    items: Tensor,
    k: int,
    *,
    score: ScoreName = "dot",
    exclude: PairLists | None = None,
    candidates: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
) -> TopItems:
    """Find the k items with the largest scores for each user; of equal scores the lower position comes first.

    Neither the matrix of scores nor a float64 copy of the items is ever held. On devices without float64 (MPS) the CPU
    does the work. How scores are rounded, and why the result is the same everywhere, is told in the module's docstring.

    An item with NaN or infinity is never found, and a user with them finds nothing.

    Args:
        users: embeddings (B, d).
        items: embeddings (I, d) on the same device.
        k: places, at least 1.
        score: inner product, or cosine; a vector of zeros has the score 0 with all others.
        exclude: items (as positions in `items`) that each of the B users is not to find, such as those seen.
        candidates: positions (C,) of the items that count, in any order; None for all.
        memory: bytes that a block of scores and what is made of it may take. One score at a time is the least.

    Returns:
        Items and scores (B, min(k, number of candidates)), without a graph. Scores carry the rounding.

    Raises:
        InputError: no matrices, widths or devices that differ, or an option out of range.

    Example:
        >>> users, items = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0], [2.0, 1.0], [0.5, 3.0]])
        >>> topk_items(users, items, 3)
        TopItems(items=tensor([[1, 0, 2]]), scores=tensor([[2.0000, 0.5000, 0.5000]]))
        >>> topk_items(users, items, 1, score="cosine").items
        tensor([[0]])
    """
    _check(users, items, k=k, score=score, exclude=exclude, memory=memory)
    device = users.device
    if device.type == "mps":
        users, items = users.cpu(), items.cpu()
    exclude = None if exclude is None else exclude.to(users.device)
    if candidates is not None:
        candidates = _sorted_candidates(candidates, len(items)).to(users.device)
        items = items[candidates]
        exclude = None if exclude is None else _among(exclude, candidates)
    places = min(k, len(items))
    if places == 0 or len(users) == 0:
        shape = len(users), places
        empty = TopItems(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))
        return TopItems(*(part.to(device) for part in empty))
    length = _longest(items, memory) if score == "dot" else None
    found, scores = _best(users, items, places, item_length=length, exclude=exclude, memory=memory)
    nothing = (scores == -torch.inf) | largest_entries(users).isfinite().logical_not().unsqueeze(1)
    scores = scores / 2.0 ** (2 * _BITS)
    if length is not None:
        scores = scores * (_lengths(users, memory).unsqueeze(1) * length)
    found = found if candidates is None else candidates[found]
    best = TopItems(found.masked_fill(nothing, -1), scores.masked_fill(nothing, -torch.inf).float())
    return TopItems(*(part.to(device) for part in best))


@torch.no_grad()
def nearest_items(items: Tensor, k: int, *, memory: int = DEFAULT_MEMORY) -> Tensor:
    """Find the k nearest other items of each item by cosine; of equally near ones the lower position comes first.

    As `topk_items` of the items among themselves, with half of the products: each pair of blocks is multiplied once.

    Args:
        items: vectors (I, d), finite; one of zeros has the cosine 0 with all others.
        k: neighbours of each item, 0 … I - 1.
        memory: as for `topk_items`.

    Returns:
        Positions (I, k), int64, the nearest first.

    Raises:
        InputError: no matrix, a row that is not finite, or an option out of range.

    Example:
        >>> nearest_items(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.2], [2.0, 0.2]]), 2)
        tensor([[2, 3],
                [2, 3],
                [3, 0],
                [2, 0]])
    """
    require_embeddings("items", items)
    if not 0 <= k < max(len(items), 1):
        raise InputError(f"k must be in 0 … {len(items) - 1}, because {len(items)} items have so many others, got {k}")
    if memory < 1:
        raise InputError(f"memory must be at least 1 byte, got {memory}")
    broken = largest_entries(items).isfinite().logical_not()
    if bool(broken.any()):
        raise InputError(f"items must be finite, row {int(broken.int().argmax())} is not")
    device = items.device
    items = items.cpu() if device.type == "mps" else items
    best = _Best(len(items), k, items.device)
    size = min(_block_shape(len(items), len(items), items.shape[1], memory))
    blocks = list(_blocks(len(items), size)) if k else []
    for index, block in enumerate(blocks):
        vectors = _whole_numbers(items[block], None)[0]
        # The lists of a block meet the others in their order: those before it now, those behind it in their turn.
        for own in blocks[:index]:
            scores = _whole_numbers(items[own], None)[0] @ vectors.t()
            best.add(own, scores, block.start)
            best.add(block, scores.t(), own.start)
        best.add(block, (vectors @ vectors.t()).fill_diagonal_(-torch.inf), block.start)
    return best.items.to(device)


def _best(
    users: Tensor, items: Tensor, places: int, *, item_length: float | None, exclude: PairLists | None, memory: int
) -> tuple[Tensor, Tensor]:
    """Positions and whole-number scores (B, places), -inf for what may not be found."""
    rows, columns = _block_shape(len(users), len(items), users.shape[1], memory)
    best = _Best(len(users), places, users.device)
    excluded = None if exclude is None else (exclude.rows(), exclude.columns, exclude.offsets.tolist())
    for block in _blocks(len(items), columns):
        vectors, usable = _whole_numbers(items[block], item_length)
        broken = usable.logical_not().nonzero().squeeze(1)
        for own in _blocks(len(users), rows):
            scores = _whole_numbers(users[own], None)[0] @ vectors.t()
            scores.index_fill_(1, broken, -torch.inf)
            if excluded is not None:
                _exclude(scores, *excluded, own=own, block=block)
            best.add(own, scores, block.start)
    return best.items, best.scores


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


def _exclude(scores: Tensor, rows: Tensor, columns: Tensor, offsets: list[int], *, own: slice, block: slice) -> None:
    pairs = slice(offsets[own.start], offsets[own.stop])
    rows, columns = rows[pairs], columns[pairs]
    here = (columns >= block.start) & (columns < block.stop)
    scores[rows[here] - own.start, columns[here] - block.start] = -torch.inf


def _whole_numbers(rows: Tensor, length: float | None) -> tuple[Tensor, Tensor]:
    """Rows divided by their own or a common length, times 2^25, rounded; and which are finite (others become zeros)."""
    finite = largest_entries(rows).isfinite()
    if length is None:
        lengths = _lengths_of_block(rows).unsqueeze(1)
    else:
        lengths = torch.full((), length, dtype=torch.float64, device=rows.device)
    wanted = finite.unsqueeze(1) & (lengths > 0)
    scaled = torch.where(wanted, rows.double(), 0).div_(torch.where(wanted, lengths, 1))
    return scaled.mul_(2.0**_BITS).round_(), finite


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


def _lengths(rows: Tensor, memory: int) -> Tensor:
    blocks = _blocks(len(rows), max(1, memory // (_BYTES_PER_ENTRY * rows.shape[1])))
    return torch.cat([_lengths_of_block(rows[block]) for block in blocks])


def _lengths_of_block(rows: Tensor) -> Tensor:
    rows = rows.double()
    largest = largest_entries(rows).unsqueeze(1)
    usable = (largest > 0) & largest.isfinite()
    lengths: Tensor = torch.linalg.vector_norm(rows / torch.where(usable, largest, 1), dim=1) * largest.squeeze(1)
    return lengths


def _longest(items: Tensor, memory: int) -> float:
    """Length of the longest item that is finite."""
    lengths = _lengths(items, memory)
    return float(torch.where(lengths.isfinite(), lengths, 0).amax())


def _block_shape(users: int, items: int, width: int, memory: int) -> tuple[int, int]:
    """Rows and columns of a block: half of the memory for vectors, half for scores, and as square as that allows."""
    vectors = max(1, memory // (4 * _BYTES_PER_ENTRY * width))
    scores = max(1, memory // (2 * _BYTES_PER_SCORE))
    rows = min(users, vectors, max(1, math.isqrt(scores)))
    return rows, min(items, vectors, max(1, scores // rows))


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _sorted_candidates(candidates: Tensor, items: int) -> Tensor:
    if candidates.ndim != 1 or candidates.is_floating_point() or candidates.dtype == torch.bool:
        raise InputError(
            f"candidates must be positions of items, whole numbers (C,), got {candidates.dtype} of shape "
            f"{tuple(candidates.shape)}"
        )
    candidates = torch.unique(candidates.to(torch.int64))
    if len(candidates) and (int(candidates[0]) < 0 or int(candidates[-1]) >= items):
        wrong = int(candidates[0]) if int(candidates[0]) < 0 else int(candidates[-1])
        raise InputError(f"candidates must be positions in 0 … {items - 1}, found {wrong}")
    return candidates


def _among(exclude: PairLists, candidates: Tensor) -> PairLists:
    """What is excluded, as positions among the candidates."""
    if len(candidates) == 0:
        return PairLists(torch.zeros_like(exclude.offsets), exclude.columns[:0])
    places = torch.searchsorted(candidates, exclude.columns).clamp_max(len(candidates) - 1)
    kept = candidates[places] == exclude.columns
    counts = torch.bincount(exclude.rows()[kept], minlength=len(exclude.offsets) - 1)
    return PairLists(F.pad(counts.cumsum(0), (1, 0)), places[kept])


def _check(users: Tensor, items: Tensor, *, k: int, score: str, exclude: PairLists | None, memory: int) -> None:
    require_embeddings("users", users)
    require_embeddings("items", items)
    if users.shape[1] != items.shape[1] or users.device != items.device:
        raise InputError(
            f"items must have the width and device of users, got {items.shape[1]} on {items.device} and "
            f"{users.shape[1]} on {users.device}"
        )
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if score not in ("dot", "cosine"):
        raise InputError(f"score must be 'dot' or 'cosine', got {score!r}")
    if memory < 1:
        raise InputError(f"memory must be at least 1 byte, got {memory}")
    if exclude is not None:
        require_lists("exclude", exclude, rows=len(users), columns=len(items))
