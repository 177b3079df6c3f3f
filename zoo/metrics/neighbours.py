"""Nearest neighbours by cosine that are the same on any device, and rows of two features kept over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.metrics.embeddings import TIE, RowsMetric, cosines, first_of_each, require_embeddings, require_ids, unit_rows

__all__ = [
    "BYTES_PER_SCORE",
    "PairedRows",
    "all_alike",
    "block_rows",
    "exact_units",
    "nearest_neighbours",
    "nearest_units",
    "neighbour_keys",
    "neighbour_sets",
]

# Entries of unit rows are rounded to multiples of 2^-26. The products of two are multiples of 2^-52 and no partial sum
# exceeds 1 by much: float64 holds each of them exactly, whatever the order in which a device adds them up.
_UNIT = 2.0**26
# Cosines count in multiples of 2^-40, so that a key of 63 bits has room for the position too.
_COSINE = 2.0**-12
_SAMPLES = 2**22
# Bytes that a block of scores and what is derived from it may take, if `chunk_size` does not say how many rows it has.
_BUDGET = 64 * 2**20
# A cosine and its key.
BYTES_PER_SCORE = 16
# Half the distance from 1 to the next number of float32, and a number that it holds exactly and shorter types do not.
_ROUNDING = 2.0**-24
_PROBE = 1 + 2.0**-20
# More than what float64 loses on the way to a float32 score, and than the rounding of cosines to multiples of 2^-40.
_SLACK = 2.0**-36


def nearest_neighbours(features: Tensor, k: int, *, chunk_size: int | None = None) -> Tensor:
    """Find the k nearest other rows of each row by cosine, the nearest first; of equally near rows, the first ones.

    The result is the same for any block size, number of threads and device. Entries of the unit rows are rounded to
    multiples of 2^-26; the cosines of such rows are exact in float64, and equal rows tie exactly. Cosines count as equal if
    they round to the same multiple of 2^-40; they are right to about 2^-26. Only a device that gets another last bit for
    the length of a row can move an entry, about one in 10^8, to the next multiple.

    Time is quadratic in the rows; memory is that of a block of cosines. On devices without float64 (MPS) the CPU does the
    work.

    Source: N_k of the layer selection of STRUCTURE (arXiv 2506.16895), as the project's notes describe the released code,
    section 4. How ties break is ours.

    Args:
        features: features (n, D) of any length, finite. A row of zeros has the cosine 0 with every other.
        k: neighbours of each row, 1 … n - 1.
        chunk_size: rows a block; None takes as many as need 64 MiB, at least one.

    Returns:
        Positions (n, k), int64, on the device of `features`.

    Raises:
        InputError: no matrix, a row that is not finite, or `k` or `chunk_size` out of range.

    Example:
        >>> nearest_neighbours(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.1]]), 2)
        tensor([[2, 3],
                [2, 3],
                [3, 0],
                [2, 0]])
    """
    require_embeddings("features", features)
    samples = len(features)
    if type(k) is not int or not 1 <= k < samples:
        raise InputError(
            f"k must be a whole number in 1 … {samples - 1}, because {samples} rows have so many others, got {k!r}"
        )
    rows = block_rows(chunk_size, BYTES_PER_SCORE * samples)
    units = exact_units(features)
    finite = units.isfinite().all(1)
    if not bool(finite.all()):
        raise InputError(f"features must be finite, row {int(finite.int().argmin())} is not; leave it out")
    return nearest_units(units, k, rows).to(features.device)


class PairedRows(RowsMetric):
    """A metric that keeps two features of each sample, as unit rows in float32 (4 (D + D') bytes a sample).

    A process gathers the rows of all others at the end. Samplers that pad a shard repeat samples: with sample numbers such
    a sample counts once, and the order of the samples, which breaks ties, is that of their numbers.

    Args:
        first: name of the first features, for states and messages.
        second: name of the second.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self._names = (first, second)
        for name in self._names:
            self.add_rows(name)
        self.add_numbers("sample_ids")

    def keep_pair(self, first: Tensor, second: Tensor, sample_ids: Tensor | None) -> None:
        """Keep a batch; one that is refused leaves what is kept as it was.

        Args:
            first: features (B, D) of any length; detached here.
            second: features (B, D') of the same samples.
            sample_ids: numbers (B,) of the samples, at least 0, or None.

        Raises:
            InputError: wrong shapes or types, or negative numbers.
        """
        for name, value in zip(self._names, (first, second), strict=True):
            require_embeddings(name, value)
        if len(first) != len(second):
            raise InputError(
                f"{self._names[1]} must have a row for each row of {self._names[0]}, got {len(second)} and {len(first)}"
            )
        if sample_ids is not None:
            require_ids("sample_ids", sample_ids, len(first))
        for name, value in zip(self._names, (first, second), strict=True):
            self.keep(name, unit_rows(value))
        self.keep("sample_ids", torch.full((len(first),), -1) if sample_ids is None else sample_ids)

    def units(self) -> tuple[Tensor, Tensor]:
        """Return the exact unit rows of both features, of all processes after a sync.

        Raises:
            InputError: features of different width, or sample numbers in some batches only.
        """
        first, second = (self.matrix(name) for name in self._names)
        ids = self.numbers("sample_ids")
        missing = int((ids < 0).sum())
        if 0 < missing < len(ids):
            raise InputError(
                f"sample_ids must be given in all batches or in none, got none for {missing} of {len(ids)} samples"
            )
        if missing == 0:
            kept = first_of_each(ids)
            first, second = first[kept], second[kept]
        return exact_units(first), exact_units(second)


def exact_units(features: Tensor) -> Tensor:
    """Unit rows times 2^26, rounded to whole numbers in float64: the products of such rows are exact.

    Args:
        features: rows (n, D); detached here.

    Returns:
        Rows (n, D) of length 2^26, on the CPU where the device has no float64 (MPS). A row of zeros stays so; a row with
        NaN or infinity holds NaN.

    Example:
        >>> exact_units(torch.tensor([[3.0, 4.0]])) / 2**26
        tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """
    rows = features.detach()
    rows = rows.cpu() if rows.device.type == "mps" else rows
    return unit_rows(rows.double()).mul_(_UNIT).round_()


def neighbour_keys(units: Tensor, start: int, stop: int) -> Tensor:
    """Numbers that order the other rows by their cosine with each row of a block, all different in a row.

    Args:
        units: rows (n, D) of `exact_units`, finite.
        start: the first row of the block.
        stop: the row behind the last.

    Returns:
        Keys (stop - start, n), int64, largest for the nearest row; of rows with the same cosine the first has the largest.
        The row itself has the smallest of all.

    Example:
        >>> neighbour_keys(exact_units(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])), 0, 1).argsort(descending=True)
        tensor([[2, 1, 0]])
    """
    return _keys(units, torch.arange(start, stop, device=units.device))


def block_rows(chunk_size: int | None, bytes_per_row: int) -> int:
    """Return how many rows a block has: `chunk_size`, or as many as need 64 MiB, at least one.

    Args:
        chunk_size: the user's choice, at least 1, or None.
        bytes_per_row: bytes that a row of a block needs.

    Raises:
        InputError: `chunk_size` is below 1.

    Example:
        >>> block_rows(None, 2**20), block_rows(7, 2**20)
        (64, 7)
    """
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, or None for blocks of 64 MiB, got {chunk_size}")
    return chunk_size or max(1, _BUDGET // max(1, bytes_per_row))


def all_alike(units: Tensor) -> bool:
    """Whether no entry of a row differs from that of the first by more than 1e-6: such rows are told apart by errors alone.

    Args:
        units: rows (n, D) of `exact_units`, at least one.

    Example:
        >>> all_alike(exact_units(torch.tensor([[1.0, 2.0], [3.0, 6.0]])))
        True
    """
    # A few rows settle it for almost any features.
    return all(bool((part - units[0]).abs().max() <= TIE * _UNIT) for part in (units[:16], units))


def nearest_units(units: Tensor, k: int, rows: int) -> Tensor:
    """Neighbours (n, k) of rows of `exact_units`, as `nearest_neighbours` finds them.

    Args:
        units: rows (n, D), finite.
        k: neighbours of each row, 1 … n - 1.
        rows: rows a block.

    Example:
        >>> nearest_units(exact_units(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])), 1, rows=2).flatten()
        tensor([2, 2, 0])
    """
    samples = len(units)
    blocks = [
        neighbour_keys(units, start, min(start + rows, samples)).topk(k, dim=1).indices
        for start in range(0, samples, rows)
    ]
    return torch.cat(blocks)


def neighbour_sets(units: Tensor, k: int, rows: int) -> Tensor:
    """The neighbours of `nearest_units` in any order, in about half the time on a CPU.

    Scores in float32 decide wherever the k nearest are apart from the rest by more than their rounding errors can be, and
    the exact cosines of float64 decide the other rows, ties among them. The bound holds for any order of summation, so the
    sets are those of `nearest_units`. A GPU has float64 to begin with.

    With c the mean row, the cosines x·y of one row x differ from (x - c)·(y - c) + c·(y - c) by a constant, and rounding
    errors are in proportion to the lengths of what is multiplied: rows in a narrow cone are told apart as well as others.

    Source: ours.

    Args:
        units: rows (n, D) of `exact_units`, finite.
        k: neighbours of each row, 1 … n - 1.
        rows: rows a block.

    Returns:
        Positions (n, k), int64.

    Example:
        >>> neighbour_sets(exact_units(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])), 1, rows=2).flatten()
        tensor([2, 2, 0])
    """
    if units.device.type != "cpu":
        return nearest_units(units, k, rows)
    samples = len(units)
    left, right, errors = _float32_scores(units)
    blocks = []
    for start in range(0, samples, rows):
        block = torch.arange(start, min(start + rows, samples))
        scores = cosines(left[block], right)
        # Matrix products that PyTorch was told to make in a shorter type are no float32: the bound does not hold.
        sound = scores[:, samples] == _PROBE
        scores[:, samples:] = -torch.inf
        scores[torch.arange(len(block)), block] = -torch.inf
        nearest = scores.topk(k + 1, dim=1)
        gap = nearest.values[:, k - 1] - nearest.values[:, k]
        found = nearest.indices[:, :k]
        unclear = ~(sound & (gap > 2 * errors[block]))
        found[unclear] = _keys(units, block[unclear]).topk(k, dim=1).indices
        blocks.append(found)
    return torch.cat(blocks)


def _float32_scores(units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors whose product (n, n + 1 or more) orders a row's others as its cosines do, up to errors (n,).

    Row n of the second is a probe: its product with any row is exactly `_PROBE`. Zeros fill both sides up to multiples of
    16, because matrix products of other sizes take up to half as long again.
    """
    width = units.shape[1]
    centre = units.mean(0) / _UNIT
    centred = units / _UNIT - centre
    offsets = centred @ centre
    lengths = torch.linalg.vector_norm(centred, dim=1)
    samples, columns = len(units), _filled(width + 1)
    left, right = torch.zeros(samples, columns), torch.zeros(_filled(samples + 1), columns)
    left[:, :width] = right[:samples, :width] = centred
    left[:, width], right[:samples, width], right[samples, width] = 1, offsets, _PROBE
    # Both factors of a product are rounded, then the product, then each of the D + 1 partial sums (Higham 2002, section
    # 3.1); the lengths bound the sum of the absolute products (Cauchy and Schwarz).
    roundings = (width + 8) * _ROUNDING
    share = roundings / (1 - roundings) if roundings < 1 else torch.inf
    errors = share * (lengths * lengths.max() + offsets.abs().max()) + _SLACK
    return left, right, errors


def _filled(size: int) -> int:
    return -(-size // 16) * 16


def _keys(units: Tensor, block: Tensor) -> Tensor:
    """`neighbour_keys` for rows at some positions."""
    samples = len(units)
    assert samples <= _SAMPLES, "a key has 63 bits"
    scores = cosines(units[block], units).mul_(_COSINE).round_()
    keys = scores.to(torch.int64).mul_(samples).sub_(torch.arange(samples, device=units.device))
    keys[torch.arange(len(block), device=units.device), block] = torch.iinfo(torch.int64).min
    return keys
