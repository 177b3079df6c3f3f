"""One cycle of the learning rate, without the gap of torch's OneCycleLR, which divides by 0 where the rise is one step."""

from __future__ import annotations

import math

__all__ = ["one_cycle"]


def one_cycle(step: int, *, total: int, rise: float = 0.1, start: float = 25.0, final: float = 1e4) -> float:
    """Return the learning rate of a step as a share of the highest: up as a cosine, then down as one.

    Smith, Topin: Super-Convergence, arXiv 1708.07120; the shape and the defaults are those of torch's OneCycleLR, with
    another rise.

    Args:
        step: the step, from 0.
        total: how many there are, at least 1.
        rise: share of them in which the rate grows, in 0 … 1.
        start: the highest rate over the first.
        final: the first rate over the last.

    Example:
        >>> [round(one_cycle(step, total=10), 4) for step in (0, 1, 10)]
        [0.04, 1.0, 0.0]
    """
    top = rise * total
    if step < top:
        return _between(1 / start, 1.0, step / top)
    return _between(1.0, 1 / (start * final), min(1.0, (step - top) / max(1.0, total - top)))


def _between(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
