"""Random numbers by position: a pure function of a key and an index.

A shuffled epoch, a random crop or a split of a data set should not depend on how often some generator was used before:
then a resumed run, another number of workers or of processes, or another version of numpy would see other data. The
numbers here are SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) used as a counter: every key part and finally the index is
folded into a 64-bit state by the finaliser of the generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["random_words"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def random_words(key: Sequence[int], indices: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return 64 random bits for each index, which depend on the key and the index alone.

    Args:
        key: integers that name the stream, such as seed and epoch; taken modulo 2**64.
        indices: non-negative integers (N,).

    Returns:
        Words (N,), equal on every machine, version and process; different indices under one key have different words.

    Example:
        >>> words = random_words((0, 3), [5, 6])
        >>> bool(words[0] == random_words((0, 3), [6, 5])[1])
        True
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part & _MASK))
    return _mix(state ^ np.asarray(indices, dtype=np.uint64))
