"""Items that a user has not interacted with, drawn for a whole batch at once."""

from __future__ import annotations

import numpy as np

from zoo.data.draws import random_words
from zoo.data.splits import Indices
from zoo.errors import InputError

__all__ = ["NegativeSampler"]

_NEGATIVES = 6  # the stream of random numbers


class NegativeSampler:
    """Draws items uniformly among those that occur in training, without the user's own.

    The distribution is that of rejection sampling: draw among all items of training until one is none of the user's. Here
    one draw is enough: the r-th of the items that are left is found by a binary search, so that users with many items cost
    no more than others. A draw depends on (seed, epoch, position) alone: on no generator, process or batch.

    Source: section 1.8 of the project's notes on CM3 (arXiv 2508.01226).

    Args:
        users: number of the user of each training interaction (N,).
        items: the same for items (N,).
        seed: number of the draws.

    Raises:
        InputError: a user has interacted with every item that occurs.

    Example:
        User 0 has items 3 and 5; only 8 is left:

        >>> sampler = NegativeSampler(np.array([0, 0, 1]), np.array([5, 3, 8]))
        >>> sampler.draw(np.array([0, 0]), np.array([0, 1]), epoch=0)
        array([8, 8])
    """

    def __init__(self, users: Indices, items: Indices, *, seed: int = 0) -> None:
        self.seed = seed
        occurs = np.zeros(int(items.max()) + 1, dtype=bool)
        occurs[items] = True
        self.candidates = np.flatnonzero(occurs)
        size = len(self.candidates)
        keys = np.sort(users * size + (np.cumsum(occurs) - 1)[items])
        keys = keys[np.diff(keys, prepend=-1) > 0]  # one a pair, by user and place
        owners = keys // size
        counts = np.bincount(owners)
        greedy = np.flatnonzero(counts == size)
        if len(greedy):
            raise InputError(
                f"{len(greedy)} users have interacted with all {size} items of training, the first is number {greedy[0]}: "
                "no negative item is left for them; leave such users out"
            )
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        # p_j - j is how many of the left items are before the user's j-th item, at place p_j. So p_j - j <= r says that
        # the r-th of the left items is behind it. These numbers ascend within a user.
        self._left_before = keys - owners * size - (np.arange(len(keys)) - self._starts[owners])

    def draw(self, users: Indices, positions: Indices, *, epoch: int) -> Indices:
        """Draw an item for each of some users.

        Args:
            users: their numbers (B,), each with an interaction.
            positions: positions (B,) in the training split, which choose the random numbers.
            epoch: the epoch, from 0.

        Returns:
            Items (B,).
        """
        starts, ends = self._starts[users], self._starts[users + 1]
        left = len(self.candidates) - (ends - starts)
        words = random_words((_NEGATIVES, self.seed, epoch), positions)
        ranks = (words % left.astype(np.uint64)).astype(np.int64)
        drawn: Indices = self.candidates[ranks + self._own_before(ranks, starts, ends)]
        return drawn

    def _own_before(self, ranks: Indices, starts: Indices, ends: Indices) -> Indices:
        """Count the user's items before the item of each rank, by a binary search in the user's part alone.

        It takes a fifth of the time of `numpy.searchsorted` over all users at once, whose first steps are all over memory.
        """
        low, high = starts, ends
        for _ in range(int((ends - starts).max(initial=0)).bit_length()):
            middle = (low + high) // 2
            behind = (low < high) & (self._left_before[np.minimum(middle, len(self._left_before) - 1)] <= ranks)
            low, high = np.where(behind, middle + 1, low), np.where(behind, high, middle)
        return low - starts
