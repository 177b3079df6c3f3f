"""Trustworthiness and continuity: whether an embedding keeps the neighbours that the samples had before."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.metrics.embeddings import settings_digest
from zoo.metrics.neighbours import (
    BYTES_PER_SCORE,
    PairedRows,
    block_rows,
    exact_units,
    neighbour_keys,
    neighbour_sets,
)
from zoo.metrics.structure import SampledRows

__all__ = ["Continuity", "NeighbourhoodTransfer", "Trustworthiness"]


class _Neighbourhoods(PairedRows):
    """What both share: 1 minus the ranks beyond k of the k nearest neighbours, scaled so that the worst case is 0."""

    def __init__(self, k: int = 100, *, chunk_size: int | None = None) -> None:
        super().__init__("embeddings", "reference")
        if type(k) is not int or k < 1:
            raise InputError(f"k must be a whole number of at least 1, got {k!r}")
        block_rows(chunk_size, 1)
        self.k = k
        self.chunk_size = chunk_size

    def update(self, embeddings: Tensor, reference: Tensor, sample_ids: Tensor | None = None) -> None:
        """Keep a batch.

        Args:
            embeddings: embeddings (B, D) of any length, such as those of a trained head; detached here.
            reference: features (B, D') of the same samples, row by row, such as those of the frozen encoder.
            sample_ids: numbers (B,) of the samples, at least 0. Give them in all batches or in none.

        Raises:
            InputError: wrong shapes or types, or negative numbers. The numbers are looked at on every device.
        """
        self.keep_pair(embeddings, reference, sample_ids)

    def _value(self, neighbours_in: Tensor, ranks_in: Tensor) -> Tensor:
        return _kept(neighbours_in, ranks_in, self.k, self.chunk_size).to(self.device)


class Trustworthiness(_Neighbourhoods):
    """Whether the neighbours in an embedding were neighbours before, over batches and processes.

    1 - 2 / (n k (2n - 3k - 1)) Σ_i Σ_j max(0, r(i, j) - k) over the k nearest neighbours j of sample i in the embedding;
    r(i, j) is the rank of j among the others by nearness to i in the reference, from 1. Nearness is the cosine in both,
    which orders as the Euclidean distance of unit rows does, and ties go to the first sample (of the smallest number), see
    `zoo.metrics.nearest_neighbours`. An embedding in random order gives about 1/2 for few neighbours.

    Kept are unit rows in float32; matrices of all pairs are never held, and time is quadratic in the samples.

    Source: Venna and Kaski 2001, as scikit-learn's `trustworthiness` computes it; STRUCTURE reports k = 100 and 1000 (the
    project's notes on arXiv 2506.16895, section 5). The paper was not read.

    Args:
        k: neighbours, at least 1; fewer than half of the samples.
        chunk_size: rows a block; None takes as many as need 64 MiB.

    Raises:
        InputError: `k` or `chunk_size` is out of range.

    Example:
        >>> metric = Trustworthiness(k=1)
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> metric.update(-3 * rows, rows)
        >>> metric.compute()
        tensor(1.)
    """

    def compute(self) -> Tensor:
        """Rank the neighbours among the samples of all processes.

        Returns:
            Scalar in 0 … 1, float32; 1 where every neighbour was one. NaN for 2k samples or fewer, and if a row is not
            finite.

        Raises:
            InputError: rows of different width, or sample numbers in some batches only.
        """
        embeddings, reference = self.units()
        return self._value(embeddings, reference)


class Continuity(_Neighbourhoods):
    """Whether the neighbours that samples had are neighbours still: `Trustworthiness` with both sides exchanged.

    The neighbours are those of the reference, and the ranks are taken in the embedding.

    Source: as for `Trustworthiness`.

    Args:
        k: neighbours, at least 1; fewer than half of the samples.
        chunk_size: rows a block; None takes as many as need 64 MiB.

    Raises:
        InputError: `k` or `chunk_size` is out of range.

    Example:
        >>> metric = Continuity(k=1)
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> metric.update(rows[[0, 2, 1, 3]], rows)  # ranks of what was nearest: 3, 3, 2, 2
        >>> metric.compute()  # 1 - (2 + 2 + 1 + 1) / 8
        tensor(0.2500)
    """

    def compute(self) -> Tensor:
        """Rank the neighbours among the samples of all processes.

        Returns:
            Scalar in 0 … 1, float32; 1 where every neighbour still is one. NaN for 2k samples or fewer, and if a row is
            not finite.

        Raises:
            InputError: rows of different width, or sample numbers in some batches only.
        """
        embeddings, reference = self.units()
        return self._value(reference, embeddings)


class NeighbourhoodTransfer(SampledRows):
    """`Trustworthiness` and `Continuity` of some of the samples, for evaluation during training.

    Time is quadratic in the samples, so it is that of some of them: see `SampledRows`.

    Args:
        k: neighbours, at least 1; fewer than half of the samples.
        max_samples: how many samples to compare at most, at least 3.
        seed: chooses them, at least 0.

    Raises:
        InputError: `k`, `max_samples` or `seed` is out of range.

    Example:
        >>> metric = NeighbourhoodTransfer(k=1)
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> metric.update(-3 * rows, rows)
        >>> metric.compute()
        {'trustworthiness': tensor(1.), 'continuity': tensor(1.)}
    """

    def __init__(self, k: int = 10, max_samples: int = 2000, *, seed: int = 0) -> None:
        super().__init__(max_samples, seed=seed)
        if type(k) is not int or k < 1:
            raise InputError(f"k must be a whole number of at least 1, got {k!r}")
        self.k = k
        self.add_state("neighbours", settings_digest(k), dist_reduce_fx="max")

    def compute(self) -> dict[str, Tensor]:
        """Rank the neighbours among the samples of all processes, or among those chosen.

        Returns:
            ``"trustworthiness"`` and ``"continuity"``, scalars in 0 … 1, float32; NaN for 2k samples or fewer, and if a row
            is not finite.

        Raises:
            InputError: batches or processes gave rows of different width.
        """
        embeddings, reference = (exact_units(rows) for rows in self.chosen_rows())
        values = {
            "trustworthiness": _kept(embeddings, reference, self.k, None),
            "continuity": _kept(reference, embeddings, self.k, None),
        }
        return {name: value.to(self.device) for name, value in values.items()}


def _kept(neighbours_in: Tensor, ranks_in: Tensor, k: int, chunk_size: int | None) -> Tensor:
    """Sum up how far behind k the neighbours of one space are in the other."""
    samples = len(neighbours_in)
    if samples <= 2 * k or not all(bool(units.isfinite().all()) for units in (neighbours_in, ranks_in)):
        return torch.full((), torch.nan)
    # The keys, their sorted copy and the places that the sort notes.
    rows = block_rows(chunk_size, 2 * BYTES_PER_SCORE * samples)
    neighbours = neighbour_sets(neighbours_in, k, rows)
    behind = torch.zeros((), dtype=torch.int64, device=neighbours.device)
    for start in range(0, samples, rows):
        part = neighbours[start : start + rows]
        keys = neighbour_keys(ranks_in, start, start + len(part))
        ranks = samples - torch.searchsorted(keys.sort(1).values, keys.gather(1, part))
        behind += (ranks - k).clamp_min_(0).sum()
    return (1 - behind.double() * 2 / (samples * k * (2 * samples - 3 * k - 1))).float()
