"""Rules that split interactions into training, validation and test: pure functions of the interactions and a seed."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from zoo.data.draws import random_words
from zoo.data.splits import Indices
from zoo.errors import InputError

__all__ = ["SplitRule", "k_core", "leave_one_out_split", "random_user_split", "temporal_split"]

SplitRule = Literal["random", "temporal", "leave_one_out"]

_SPLIT = 5  # the stream of random numbers of `random_user_split`
_TRAIN, _VAL, _TEST = 0, 1, 2


def k_core(users: Indices, items: Indices, k: int) -> Indices:
    """Find the largest part of the interactions in which every user and every item has at least k.

    Args:
        users: number of the user of each interaction (N,).
        items: the same for items (N,).
        k: at least 0; 0 and 1 keep everything.

    Returns:
        Ascending positions of the interactions that stay; there may be none.

    Raises:
        InputError: k is below 0.

    Example:
        >>> k_core(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 0]), 2)
        array([0, 1, 2, 3])
    """
    if k < 0:
        raise InputError(f"k_core must be at least 0, got {k}")
    kept = np.arange(len(users))
    while len(kept):
        rich = np.bincount(users[kept])[users[kept]] >= k
        rich &= np.bincount(items[kept])[items[kept]] >= k
        if rich.all():
            break
        kept = kept[rich]
    return kept


def _places(users: Indices, order: Indices) -> tuple[Indices, Indices]:
    """Return the place of each interaction among those of its user in an order, and how many those are."""
    counts = np.bincount(users)
    place = np.empty(len(users), dtype=np.int64)
    grouped = order[np.argsort(users[order], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place[grouped] = np.arange(len(users)) - starts[users[grouped]]
    return place, counts[users]


def random_user_split(users: Indices, *, seed: int) -> Indices:
    """Split the interactions of each user at random, about 8 : 1 : 1.

    Of n interactions, n - 2 are for training and one each for validation and test if n < 10. From 10 on, h = ⌊0.2 n⌋ are
    held out, ⌊h / 2⌋ of them for validation and the rest for the test. Users with fewer than 3 only train. The rule is
    that of MMRec's notebooks, which do not record a seed: their very splits exist only in the published files.

    Source: section 2.2 of the project's notes on CM3 (arXiv 2508.01226).

    Args:
        users: number of the user of each interaction (N,).
        seed: number of the split, which depends on it and on the interactions' order alone.

    Returns:
        0, 1 or 2 for training, validation and test (N,).

    Example:
        >>> np.bincount(random_user_split(np.zeros(20, dtype=int), seed=0))
        array([16,  2,  2])
    """
    order = np.argsort(random_words((_SPLIT, seed), np.arange(len(users))), kind="stable")
    place, count = _places(users, order)
    held_out = np.where(count < 10, 2, count // 5)
    held_out[count < 3] = 0
    for_validation = held_out // 2
    labels = np.full(len(users), _TRAIN)
    labels[place >= count - held_out] = _VAL
    labels[place >= count - held_out + for_validation] = _TEST
    return labels


def leave_one_out_split(users: Indices, times: npt.NDArray[np.float64] | None) -> Indices:
    """Hold out the last interaction of each user for the test, and the one before it for validation.

    Users with fewer than 3 interactions only train. Of equal times, the later row is the later one.

    Args:
        users: number of the user of each interaction (N,).
        times: when each was (N,); None takes the order of the rows.

    Returns:
        0, 1 or 2 for training, validation and test (N,).

    Example:
        >>> leave_one_out_split(np.array([0, 0, 0, 0]), np.array([4.0, 1.0, 2.0, 3.0]))
        array([2, 0, 0, 1])
    """
    order = np.arange(len(users)) if times is None else np.argsort(times, kind="stable")
    place, count = _places(users, order)
    labels = np.full(len(users), _TRAIN)
    labels[(count >= 3) & (place == count - 2)] = _VAL
    labels[(count >= 3) & (place == count - 1)] = _TEST
    return labels


def temporal_split(
    times: npt.NDArray[np.float64] | None, *, val_share: float = 0.1, test_share: float = 0.1
) -> Indices:
    """Split all interactions at two moments: what is earlier trains, what is later is held out.

    Interactions of one moment stay together, in the later part.

    Args:
        times: when each interaction was (N,).
        val_share: share of the interactions between the two moments, in [0, 1).
        test_share: share of those behind the second, in [0, 1).

    Returns:
        0, 1 or 2 for training, validation and test (N,).

    Raises:
        InputError: there are no times, a share is out of its range, or nothing is left to train on.

    Example:
        >>> temporal_split(np.arange(10.0))
        array([0, 0, 0, 0, 0, 0, 0, 0, 1, 2])
    """
    if times is None:
        raise InputError("split='temporal' needs a column of times: name it with time_column")
    if min(val_share, test_share) < 0 or val_share + test_share >= 1:
        raise InputError(
            f"val_share and test_share must be at least 0 and below 1 in sum, got {val_share}, {test_share}"
        )
    ordered, count = np.sort(times), len(times)
    labels = np.full(count, _TRAIN)
    for label, share in ((_VAL, val_share + test_share), (_TEST, test_share)):
        late = int(np.floor(share * count + 0.5))
        if late:
            labels[times >= ordered[count - late]] = label
    if not (labels == _TRAIN).any():
        raise InputError(
            "split='temporal' leaves nothing to train on: too many interactions have one time; choose another"
        )
    return labels
