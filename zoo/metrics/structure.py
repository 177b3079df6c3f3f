"""How far a trained embedding orders pairs of samples as a reference does."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.metrics.embeddings import (
    TIE,
    RowsMetric,
    cosines,
    first_of_each,
    require_embeddings,
    require_ids,
    settings_digest,
    unit_rows,
)

__all__ = ["SampledRows", "StructureTransfer", "cosine_structure_correlation"]

# The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers that looks random.
_SHIFTS_AND_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_GOLDEN = 0x9E3779B97F4A7C15


def cosine_structure_correlation(embeddings: Tensor, reference: Tensor) -> Tensor:
    """Spearman correlation between the pairwise cosines of two embeddings of the same samples.

    All N (N - 1) / 2 pairs of different samples count; ties share the mean of their ranks, and cosines count as tied
    when they round to the same multiple of 1e-6. Both matrices of cosines are held, 8 N^2 bytes and a few times that
    for the ranks, which are computed on the CPU.

    Source: the structure transfer check of the project's notes on CWCL (arXiv 2309.14580), section 5; it is ours and
    not the paper's.

    Args:
        embeddings: embeddings (N, D) of any length.
        reference: embeddings (N, D') of the same samples, row by row; another width is fine.

    Returns:
        Scalar in -1 … 1, float32, on the device of `embeddings`; 1 for cosines in the same order. 0 if all cosines of
        one side are equal, because they order nothing. NaN for fewer than three samples, and if an embedding is not
        finite.

    Raises:
        InputError: no matrices, or another number of rows.

    Example:
        >>> reference = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0]])
        >>> cosine_structure_correlation(7 * reference, reference)
        tensor(1.)
    """
    _require_samples(embeddings, reference)
    samples = len(embeddings)
    units = [unit_rows(rows) for rows in (embeddings, reference)]
    if samples < 3 or not all(bool(rows.isfinite().all()) for rows in units):
        return torch.full((), torch.nan, device=embeddings.device)
    first, second = (_centred_ranks(_pairs(rows)) for rows in units)
    length = first.norm() * second.norm()
    value = torch.zeros(()) if length == 0 else (first @ second / length).clamp(-1, 1)
    return value.to(embeddings.device, torch.float32)


class SampledRows(RowsMetric):
    """A metric that keeps two features of each sample, of at most `max_samples` samples, over batches and processes.

    Kept are those with the smallest hash of `seed` and their number, which is a random choice that depends neither on the
    order of the samples nor on batches or processes. Without numbers the hash is that of the two features, in float32; then
    the choice is another one in each epoch, and after any change in the last bit. A sample that comes twice counts once.

    Args:
        max_samples: how many samples to compare at most, at least 3.
        seed: chooses them, at least 0.

    Raises:
        InputError: `max_samples` or `seed` is out of range.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    keys: list[Tensor]
    settings: Tensor

    def __init__(self, max_samples: int = 2000, *, seed: int = 0) -> None:
        super().__init__()
        if max_samples < 3:
            raise InputError(f"max_samples must be at least 3, got {max_samples}")
        if seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        self.max_samples = max_samples
        self.seed = seed
        self.add_rows("embeddings")
        self.add_rows("reference")
        self.add_numbers("keys")
        self.add_state("settings", settings_digest(max_samples, seed), dist_reduce_fx="max")

    def update(self, embeddings: Tensor, reference: Tensor, sample_ids: Tensor | None = None) -> None:
        """Keep a batch, or what the choice leaves of it.

        Args:
            embeddings: embeddings (B, D) that are trained, of any length; detached here.
            reference: embeddings (B, D') of the same samples, row by row.
            sample_ids: numbers (B,) of the samples, at least 0, the same in each epoch and process. Give them in all
                batches or in none.

        Raises:
            InputError: wrong shapes or types, or negative numbers. The numbers are looked at on every device.
        """
        _require_samples(embeddings, reference)
        if sample_ids is not None:
            require_ids("sample_ids", sample_ids, len(embeddings))
        rows = [unit_rows(side).to(self.device, torch.float32) for side in (embeddings, reference)]
        numbers = self._content(torch.cat(rows, 1)) if sample_ids is None else sample_ids.to(self.device, torch.int64)
        self.keep("embeddings", rows[0])
        self.keep("reference", rows[1])
        self.keep("keys", _mix(numbers ^ _signed((self.seed + 1) * _GOLDEN)))
        if sum(map(len, self.keys)) > self.max_samples:
            chosen = self._chosen()
            for name in ("embeddings", "reference"):
                setattr(self, name, [self.matrix(name)[chosen].flatten()])
            self.keys = [self.numbers("keys")[chosen]]

    def chosen_rows(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings and the reference of the samples of all processes, or of those chosen among them.

        Raises:
            InputError: batches or processes gave embeddings of different width.
        """
        chosen = self._chosen()
        return self.matrix("embeddings")[chosen], self.matrix("reference")[chosen]

    def _chosen(self) -> Tensor:
        return first_of_each(self.numbers("keys"))[: self.max_samples]

    def _content(self, rows: Tensor) -> Tensor:
        """A 64-bit number of the bits of each float32 row."""
        generator = torch.Generator().manual_seed(self.seed)
        factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device)
        # Adding zero makes one number of the two zeros.
        return ((rows + 0.0).view(torch.int32).to(torch.int64) * (2 * factors + 1)).sum(1)


class StructureTransfer(SampledRows):
    """Spearman correlation between the pairwise cosines of two embeddings of the same samples, over batches and processes.

    See `cosine_structure_correlation`. Its cost is quadratic in the samples, so it is that of some of them: see
    `SampledRows`.

    Args:
        max_samples: how many samples to compare at most, at least 3.
        seed: chooses them, at least 0.

    Raises:
        InputError: `max_samples` or `seed` is out of range.

    Example:
        >>> metric = StructureTransfer()
        >>> trained = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0]])
        >>> metric.update(trained, torch.tensor([[1.0], [-1.0], [1.0]]))
        >>> round(metric.compute().item(), 4)  # cosines 0.89, 0, 0.45 against -1, 1, -1
        -0.866
    """

    def compute(self) -> Tensor:
        """Correlate the cosines of the samples of all processes, or of those chosen among them.

        Returns:
            Scalar in -1 … 1, float32; see `cosine_structure_correlation`.

        Raises:
            InputError: batches or processes gave embeddings of different width.
        """
        return cosine_structure_correlation(*self.chosen_rows())


def _pairs(units: Tensor) -> Tensor:
    """Cosines of the pairs of different rows, in multiples of the rounding error, float64 on the CPU."""
    first, second = torch.triu_indices(len(units), len(units), offset=1, device=units.device)
    return (cosines(units, units)[first, second].cpu().double() / TIE).round()


def _centred_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, the mean of them for equal values, minus the mean rank. In float64: float32 ends at 2^24 pairs."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts - 1).double() / 2
    return ranks[inverse] - (len(values) + 1) / 2


def _mix(numbers: Tensor) -> Tensor:
    for shift, factor in _SHIFTS_AND_FACTORS:
        numbers = (numbers ^ _shifted(numbers, shift)) * _signed(factor)
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, shift: int) -> Tensor:
    # A logical shift: that of torch repeats the sign.
    return (numbers >> shift) & ((1 << (64 - shift)) - 1)


def _signed(number: int) -> int:
    """The int64 with the lowest 64 bits of a number."""
    return (number + 2**63) % 2**64 - 2**63


def _require_samples(embeddings: Tensor, reference: Tensor) -> None:
    require_embeddings("embeddings", embeddings)
    require_embeddings("reference", reference)
    if len(embeddings) != len(reference):
        raise InputError(
            f"reference must have a row for each row of embeddings, got {len(reference)} and {len(embeddings)} rows"
        )
    if embeddings.device != reference.device:
        raise InputError(
            f"reference must be on the device of embeddings, got {reference.device} and {embeddings.device}"
        )
