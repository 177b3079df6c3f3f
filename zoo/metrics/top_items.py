"""The best items of each user among all, in blocks under a memory budget, and the same on any device and in any blocks.

Ranking by floating-point scores depends on the last bit, which depends on the place of an item in a matrix product. Here
vectors are first rounded to whole numbers: users to 25 bits of their own length, items to 25 bits of that of the longest
one (of their own for cosines). Products of such vectors are whole numbers below 2^53, which float64 holds exactly, in
whatever order they are added up. So equal items tie exactly, and of equally good ones the first comes first: the result
does not depend on block sizes, batches, processes, threads or devices. Scores that are closer than about 2^-25 of the
largest possible one may change their order, as they may by the rounding of float32.

On a CPU scores in float32 find the same lists in half the time or less (`zoo.metrics.screening`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.interaction_graph import PairLists, require_lists
from zoo.metrics.embeddings import require_embeddings
from zoo.metrics.exact_lists import best_lists, best_neighbours
from zoo.metrics.screening import can_screen, screened_lists, screened_neighbours
from zoo.metrics.whole_numbers import BITS, exact_scores, largest_entries, longest, row_lengths

__all__ = ["DEFAULT_MEMORY", "ScoreName", "TopItems", "largest_entries", "nearest_items", "ranked_items", "topk_items"]

ScoreName = Literal["dot", "cosine"]

DEFAULT_MEMORY = 2**28
_ITEMS_PER_SCORE = 256


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
    found, scores = _ranked(
        users, items, k, score=score, exclude=exclude, candidates=candidates, memory=memory, with_scores=True
    )
    assert scores is not None
    return TopItems(found, scores)


@torch.no_grad()
def ranked_items(
    users: Tensor,
    items: Tensor,
    k: int,
    *,
    score: ScoreName = "dot",
    exclude: PairLists | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Tensor:
    """The items of `topk_items` alone, which take less time than with their scores.

    Args:
        users: as for `topk_items`, as are the others.
        items: the same.
        k: the same.
        score: the same.
        exclude: the same.
        memory: the same.

    Returns:
        Items (B, min(k, I)).

    Raises:
        InputError: as `topk_items`.

    Example:
        >>> ranked_items(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0], [2.0, 1.0]]), 2)
        tensor([[1, 0]])
    """
    return _ranked(
        users, items, k, score=score, exclude=exclude, candidates=None, memory=memory, with_scores=False
    )[0]  # fmt: skip


def _ranked(
    users: Tensor,
    items: Tensor,
    k: int,
    *,
    score: ScoreName,
    exclude: PairLists | None,
    candidates: Tensor | None,
    memory: int,
    with_scores: bool,
) -> tuple[Tensor, Tensor | None]:
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
        return torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape, device=device)
    of_users, of_items = row_lengths(users, memory), row_lengths(items, memory)
    length = longest(of_items) if score == "dot" else None
    # The exact score of an item that was found costs as much as some hundred that are only compared.
    worth = not with_scores or len(items) >= _ITEMS_PER_SCORE * places
    if worth and length != 0 and can_screen(of_users, of_items, places, users.shape[1]):
        found = screened_lists(
            users, items, places, of_users=of_users, of_items=of_items, dot=score == "dot", exclude=exclude, memory=memory
        )  # fmt: skip
        scores = _scores_of(users, items, found, length, memory) if with_scores else None
    else:
        found, scores = best_lists(users, items, places, item_length=length, exclude=exclude, memory=memory)
        found = found.masked_fill((scores == -torch.inf) | of_users.isfinite().logical_not().unsqueeze(1), -1)
    if scores is not None:
        scores = scores / 2.0 ** (2 * BITS)
        if length is not None:
            scores = scores * (of_users.unsqueeze(1) * length)
        scores = scores.masked_fill(found < 0, -torch.inf).float().to(device)
    if candidates is not None:
        found = candidates[found.clamp_min(0)].masked_fill(found < 0, -1)
    return found.to(device), scores


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
    if k == 0:
        return torch.zeros(len(items), 0, dtype=torch.int64, device=device)
    lengths = row_lengths(items, memory)
    if can_screen(lengths, lengths, k, items.shape[1]):
        return screened_neighbours(items, k, lengths, memory).to(device)
    return best_neighbours(items, k, memory).to(device)


def _scores_of(users: Tensor, items: Tensor, found: Tensor, length: float | None, memory: int) -> Tensor:
    """Whole-number scores of what was found (B, places)."""
    rows = torch.arange(len(found)).repeat_interleave(found.shape[1])
    return exact_scores(users, items, rows, found.clamp_min(0).flatten(), length=length, memory=memory).view(
        found.shape
    )


def _sorted_candidates(candidates: Tensor, items: int) -> Tensor:
    if (
        candidates.ndim != 1
        or candidates.is_floating_point()
        or candidates.is_complex()
        or candidates.dtype == torch.bool
    ):
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
    require_choice("score", score, ("dot", "cosine"))
    if memory < 1:
        raise InputError(f"memory must be at least 1 byte, got {memory}")
    if exclude is not None:
        require_lists("exclude", exclude, rows=len(users), columns=len(items))
