"""Stratified splits that stay the same for ever: no generator, no library version and no process takes part in them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from zoo.data.draws import random_words
from zoo.errors import InputError

__all__ = ["Indices", "stratified_split", "stratified_subset"]

Indices = npt.NDArray[np.int64]

_SPLIT, _SUBSET = 1, 2  # two streams, so that a subset is not the beginning of what a split left over


def _by_class(labels: Indices, seed: int, stream: int) -> list[Indices]:
    """Return the positions of each class that occurs, each class in its own random order."""
    words = random_words((stream, seed), np.arange(len(labels)))
    order = np.lexsort((words, labels))
    bounds = np.flatnonzero(np.diff(labels[order])) + 1
    return [np.asarray(part, dtype=np.int64) for part in np.split(order, bounds)] if len(labels) else []


def stratified_split(labels: npt.ArrayLike, shares: Mapping[str, float], *, seed: int) -> tuple[Indices, ...]:
    """Split a data set so that every part has its share of every class.

    A class of n samples gives round(share · n) of them to a part (halves are rounded up), chosen by the seed and the
    sample's index alone: neither torch's nor numpy's random state is used or changed. A class may be too small to be
    present in every part.

    Args:
        labels: class of each sample (N,), integers.
        shares: share of the whole for each part, in [0, 1), by the name of the argument that set it (for the message).
        seed: number of the split.

    Returns:
        Ascending indices of each part in the order of ``shares``, and last of the rest.

    Raises:
        InputError: a share is outside [0, 1), their sum is not below 1, or a class is left without a sample in the rest.

    Example:
        >>> validation, rest = stratified_split([0] * 10 + [1] * 20, {"val_share": 0.1}, seed=0)
        >>> len(validation), len(rest)
        (3, 27)
    """
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise InputError(f"{name} must be at least 0 and below 1, got {share}")
    names = " + ".join(shares)
    if sum(shares.values()) >= 1:
        raise InputError(f"{names} must be below 1 so that samples are left to train on, got {sum(shares.values())}")
    labels = np.asarray(labels, dtype=np.int64)
    parts: list[list[Indices]] = [[] for _ in range(len(shares) + 1)]
    for members in _by_class(labels, seed, _SPLIT):
        counts = [int(np.floor(share * len(members) + 0.5)) for share in shares.values()]
        if sum(counts) >= len(members):
            raise InputError(
                f"{names} leaves no sample of class {labels[members[0]]} to train on: the class has {len(members)}; "
                "choose smaller shares"
            )
        for part, piece in zip(parts, np.split(members, np.cumsum(counts)), strict=True):
            part.append(piece)
    return tuple(np.sort(np.concatenate([np.empty(0, dtype=np.int64), *part])) for part in parts)


def stratified_subset(labels: npt.ArrayLike, count: int, *, seed: int) -> Indices:
    """Choose ``count`` samples, of every class in proportion to its size and at least one.

    Subsets of one seed are nested: a smaller one is contained in every larger one.

    Args:
        labels: class of each sample (N,), integers.
        count: size of the subset, between the number of classes and N.
        seed: number of the subset.

    Returns:
        Ascending indices (count,).

    Raises:
        InputError: ``count`` is outside its range.

    Example:
        >>> labels = np.array([0] * 10 + [1] * 20)
        >>> labels[stratified_subset(labels, 6, seed=0)]
        array([0, 0, 1, 1, 1, 1])
    """
    labels = np.asarray(labels, dtype=np.int64)
    classes = _by_class(labels, seed, _SUBSET)
    if not len(classes) <= count <= len(labels):
        raise InputError(
            f"train_samples must lie between the number of classes ({len(classes)}) and the size of the training split "
            f"({len(labels)}), got {count}"
        )
    members = np.concatenate(classes)
    rank = np.concatenate([np.arange(len(part)) for part in classes])
    size = np.concatenate([np.full(len(part), len(part)) for part in classes])
    # The r-th of n samples stands at (r + 1/2) / n of its class; the first of each class goes before everything else.
    order = np.lexsort((labels[members], (rank + 0.5) / size, rank > 0))
    return np.sort(members[order[:count]])
