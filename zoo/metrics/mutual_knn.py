"""How far two encoders agree on who is near whom: the share of nearest neighbours that they have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import InputError, nearest
from zoo.metrics.embeddings import require_embeddings
from zoo.metrics.neighbours import (
    BYTES_PER_SCORE,
    PairedRows,
    all_alike,
    block_rows,
    exact_units,
    neighbour_sets,
)

__all__ = [
    "MutualKNN",
    "NeighbourRule",
    "count_shared",
    "mutual_knn",
    "mutual_knn_table",
    "neighbour_count",
    "require_layers",
]

NeighbourRule = Literal["rice", "sqrt", "sturges"]
_RULES = ("rice", "sqrt", "sturges")

# A block of the counters that a processor's cache holds.
_COUNTER_BUDGET = 2**20


def mutual_knn(first: Tensor, second: Tensor) -> Tensor:
    """Share of neighbours that two encoders agree on: the mean over rows of |N(r) ∩ M(r)| / k.

    Two encoders that have nothing to do with each other share k / (n - 1).

    Source: the score of the layer selection of STRUCTURE (arXiv 2506.16895), as the project's notes describe the released
    code, section 4.

    Args:
        first: neighbours (n, k) of n samples in one encoder, int64, all of a row different, as `nearest_neighbours` gives
            them.
        second: neighbours of the same samples in the other, of the same shape and on the same device.

    Returns:
        Scalar in 0 … 1, float32; NaN for no rows.

    Raises:
        InputError: other types or shapes.

    Example:
        >>> mutual_knn(torch.tensor([[1, 2], [0, 2]]), torch.tensor([[2, 1], [2, 3]]))
        tensor(0.7500)
    """
    for name, value in (("first", first), ("second", second)):
        if value.ndim != 2 or value.dtype != torch.int64 or value.shape[1] == 0:
            raise InputError(
                f"{name} must be neighbours (n, k), int64, k at least 1, got {value.dtype} of shape {tuple(value.shape)}"
            )
    if first.shape != second.shape or first.device != second.device:
        raise InputError(
            f"second must have the shape and device of first, got {tuple(second.shape)} on {second.device} and "
            f"{tuple(first.shape)} on {first.device}"
        )
    both = torch.cat([first, second], 1).sort(1).values
    return (both[:, 1:] == both[:, :-1]).sum().float() / first.numel()


def mutual_knn_table(
    image_layers: Sequence[Tensor],
    text_layers: Sequence[Tensor],
    *,
    k: int | NeighbourRule = "rice",
    chunk_size: int | None = None,
) -> Tensor:
    """Score every pair of an image layer and a text layer by `mutual_knn`; the neighbours of a layer are found once.

    A layer whose rows are all alike has no neighbours to speak of: its scores are 0. (The order of the rows would stand in
    for them, and two such layers would agree on it.)

    Source: as for `mutual_knn`; section 4.

    Args:
        image_layers: features (n, D_i) of the same n samples, finite, one tensor a layer.
        text_layers: features (n, D_t) of them, row by row.
        k: number of neighbours, or the rule of `neighbour_count`.
        chunk_size: rows a block; None takes as many as need 64 MiB.

    Returns:
        Scores (image layers, text layers) in 0 … 1, float32, on the device of the first image layer.

    Raises:
        InputError: no layers, layers that are no matrices, that differ in rows or are not finite, too few samples for `k`,
            or an option out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> mutual_knn_table([rows, rows.roll(1, 0)], [3 * rows], k=1)
        tensor([[1.],
                [0.]])
    """
    samples = require_layers(image_layers, text_layers)
    count = neighbour_count(k, samples)
    if count >= samples:
        raise InputError(f"k must be below the number of samples, got {count} for {samples}; give more samples")
    device = image_layers[0].device
    rows = block_rows(chunk_size, BYTES_PER_SCORE * samples)
    found, told_apart = [], []
    for layer in (*image_layers, *text_layers):
        units = exact_units(layer)
        told_apart.append(not all_alike(units))
        found.append(neighbour_sets(units, count, rows).to(device))
    images, texts = (torch.stack(part) for part in (found[: len(image_layers)], found[len(image_layers) :]))
    shared = count_shared(images, texts, chunk_size=chunk_size)
    apart = torch.tensor(told_apart, device=device)
    shared *= torch.outer(apart[: len(image_layers)], apart[len(image_layers) :])
    return shared.float() / (samples * count)


def neighbour_count(k: int | NeighbourRule, samples: int) -> int:
    """Return the number of neighbours for n samples, in whole numbers throughout.

    The notes on the released code give the rounding of "rice" alone; that of the other two is ours.

    Args:
        k: a number, which is returned, or "rice", ceil(2 n^(1/3)), "sqrt", ceil(sqrt(n)), or "sturges",
            ceil(log2(n)) + 1.
        samples: the number of samples n.

    Returns:
        The number, at least 1. For few samples (below 5 by "rice") there are not so many others.

    Raises:
        InputError: an unknown rule, or a number below 1.

    Example:
        >>> [neighbour_count("rice", n) for n in (12, 1000, 5000)], neighbour_count("sqrt", 5000)
        ([5, 20, 35], 71)
    """
    if isinstance(k, str):
        if k not in _RULES:
            raise InputError(f"k must be a number or one of {', '.join(_RULES)}, got {k!r}.{nearest(k, _RULES)}")
        if k == "sqrt":
            return max(1, math.isqrt(max(samples - 1, 0)) + 1)
        if k == "sturges":
            return max(samples - 1, 0).bit_length() + 1
        # Floating point may miss the cube root of a cube by its last bit.
        root = max(1, round(2 * math.cbrt(samples)) - 1)
        while root**3 < 8 * samples:
            root += 1
        return root
    if type(k) is not int or k < 1:
        raise InputError(f"k must be a whole number of at least 1, or one of {', '.join(_RULES)}, got {k!r}")
    return k


def count_shared(first: Tensor, second: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Count the neighbours that each pair of layers has in common, over all samples.

    Args:
        first: neighbours (L, n, k) of each layer of one encoder, positions in 0 … n - 1, all of a row different.
        second: neighbours (M, n, k) of the same samples in each layer of the other.
        chunk_size: rows a block; None takes as many as fit into a processor's cache.

    Returns:
        Counts (L, M) in 0 … n k, int64.

    Example:
        >>> count_shared(torch.tensor([[[1], [0], [0]]]), torch.tensor([[[1], [2], [0]], [[2], [2], [1]]]))
        tensor([[2, 0]])
    """
    # Several layers are counted at once: each has as many bits of an int64 as k needs, so that a sum of k of them does not
    # carry over into the bits of the next.
    layers, samples, k = first.shape
    bits = k.bit_length()
    rows = chunk_size or max(1, _COUNTER_BUDGET // (8 * samples))
    counts = torch.zeros(layers, len(second), dtype=torch.int64, device=first.device)
    for start in range(0, samples, rows):
        wanted = second[:, start : start + rows].transpose(0, 1).flatten(1)
        for index, group in enumerate(torch.split(first[:, start : start + rows], 63 // bits)):
            counters = torch.zeros(len(wanted), samples, dtype=torch.int64, device=first.device)
            for place, neighbours in enumerate(group):
                one = torch.full((1, 1), 1 << bits * place, device=first.device).expand_as(neighbours)
                counters.scatter_add_(1, neighbours, one)
            found = counters.gather(1, wanted).view(-1, len(second), k).sum(2)
            for place in range(len(group)):
                counts[index * (63 // bits) + place] += ((found >> bits * place) & ((1 << bits) - 1)).sum(0)
    return counts


class MutualKNN(PairedRows):
    """Share of the k nearest neighbours by cosine that two encoders agree on, over batches and processes.

    See `mutual_knn` and `nearest_neighbours`. Two encoders that have nothing to do with each other share k / (n - 1) of
    their neighbours. If all rows of one side are alike, they share none: 0.

    Source: as for `mutual_knn`; section 4.

    Args:
        k: number of neighbours, or "rice", "sqrt" or "sturges" for a number that grows with the samples, see
            `neighbour_count`.
        chunk_size: rows a block; None takes as many as need 64 MiB.

    Raises:
        InputError: `k` or `chunk_size` is out of range.

    Example:
        >>> metric = MutualKNN(k=1)
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> metric.update(rows, 5 * rows)
        >>> metric.compute()
        tensor(1.)
    """

    def __init__(self, k: int | NeighbourRule = "rice", *, chunk_size: int | None = None) -> None:
        super().__init__("image_features", "text_features")
        neighbour_count(k, 1)
        block_rows(chunk_size, 1)
        self.k = k
        self.chunk_size = chunk_size

    def update(self, image_features: Tensor, text_features: Tensor, sample_ids: Tensor | None = None) -> None:
        """Keep a batch.

        Args:
            image_features: features (B, D) of any length; detached here.
            text_features: features (B, D') of the same samples, row by row.
            sample_ids: numbers (B,) of the samples, at least 0. Give them in all batches or in none.

        Raises:
            InputError: wrong shapes or types, or negative numbers. The numbers are looked at on every device.
        """
        self.keep_pair(image_features, text_features, sample_ids)

    def compute(self) -> Tensor:
        """Compare the neighbours among the samples of all processes.

        Returns:
            Scalar in 0 … 1, float32. NaN where a sample has no k others, and if a feature is not finite.

        Raises:
            InputError: features of different width, or sample numbers in some batches only.
        """
        sides = self.units()
        samples = len(sides[0])
        count = neighbour_count(self.k, samples)
        if count >= samples or not all(bool(units.isfinite().all()) for units in sides):
            return torch.full((), torch.nan, device=self.device)
        if any(all_alike(units) for units in sides):
            return torch.zeros((), device=self.device)
        rows = block_rows(self.chunk_size, BYTES_PER_SCORE * samples)
        return mutual_knn(*(neighbour_sets(units, count, rows) for units in sides)).to(self.device)


def require_layers(image_layers: Sequence[Tensor], text_layers: Sequence[Tensor]) -> int:
    """Refuse anything but features of the same samples, at least one layer a side, and return how many samples.

    Args:
        image_layers: features (n, D_i), one tensor a layer.
        text_layers: features (n, D_t).

    Raises:
        InputError: no layer, no matrix, another number of rows, or a row that is not finite.

    Example:
        >>> require_layers([torch.ones(3, 2)], [torch.ones(3, 1), torch.ones(3, 4)])
        3
    """
    for name, layers in (("image_layers", image_layers), ("text_layers", text_layers)):
        if len(layers) == 0:
            raise InputError(f"{name} must be a list of features, one tensor a layer, at least one")
        for index, layer in enumerate(layers):
            require_embeddings(f"{name}[{index}]", layer)
            if len(layer) != len(image_layers[0]):
                raise InputError(
                    f"{name}[{index}] must have the rows of image_layers[0], {len(image_layers[0])}, got {len(layer)}"
                )
            if not bool(layer.isfinite().all()):
                raise InputError(f"{name}[{index}] must be finite; leave the layer or the samples out")
    return len(image_layers[0])
