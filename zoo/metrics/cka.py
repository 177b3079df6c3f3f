"""Linear CKA: how alike two encoders are up to rotation and scale, from moments, without a matrix of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.contracts import require_number
from zoo.metrics.embeddings import RowsMetric, require_embeddings, unit_rows
from zoo.metrics.mutual_knn import require_layers
from zoo.metrics.neighbours import block_rows

__all__ = ["CKA", "cka_table"]


class CKA(RowsMetric):
    """Linear CKA of unit rows, HSIC(K, L) / (sqrt(HSIC(K, K) HSIC(L, L)) + eps), over batches and processes.

    K and L are the matrices of cosines within each encoder. HSIC is tr(K H L H), H = 1 - 11ᵀ/n, or its unbiased estimate:
    with the diagonals of K and L set to zero, [tr(KL) + 1ᵀK1 1ᵀL1 / ((n - 1)(n - 2)) - 2 1ᵀKL1 / (n - 2)] / (n (n - 3)).
    Both follow from the second moments of (x, y, x = 0, y = 0, 1), float64, which are all that is kept: 8 (D + D' + 3)²
    bytes, 34 MB at D = D' = 1024, whatever the number of samples. The device has to know float64.

    Biased CKA is near 1 for any two encoders where there are fewer samples than dimensions; the unbiased one is not.

    Source: the CKA of the layer selection of STRUCTURE (arXiv 2506.16895), as the project's notes describe the released
    code, section 4, and golden c9, which shows that rows are unit-normalised and that `eps` is added to sums over all
    pairs, unbiased to means. The unbiased estimate is that of Song et al. 2012 (HSIC_1), reconstructed and not read.

    Args:
        unbiased: take the unbiased estimate, which can be a little below 0 or above 1.
        eps: added to the denominator, at least 0; 1e-6 as released. It draws the values of nearly constant features to 0.

    Raises:
        InputError: `eps` is out of range.

    Example:
        >>> cka = CKA()
        >>> rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
        >>> cka.update(rows, rows.flip(1) * 7)  # a reflection
        >>> cka.compute()
        tensor(1.0000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    moments: list[Tensor]
    widths: list[Tensor]

    def __init__(self, *, unbiased: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        require_number("eps", eps, positive=False)
        self.unbiased = unbiased
        self.eps = eps
        # Flat matrices, one a process after a sync, because a process without samples does not know their size.
        self._add("moments", torch.float64)
        self._add("widths", torch.int64)

    def update(self, image_features: Tensor, text_features: Tensor) -> None:
        """Add the moments of a batch.

        Args:
            image_features: features (B, D) of any length; detached here.
            text_features: features (B, D') of the same samples, row by row.

        Raises:
            InputError: wrong shapes or types, or another width than before.
        """
        require_embeddings("image_features", image_features)
        require_embeddings("text_features", text_features)
        if len(image_features) != len(text_features):
            raise InputError(
                f"text_features must have a row for each row of image_features, got {len(text_features)} and "
                f"{len(image_features)}"
            )
        widths = torch.tensor([image_features.shape[1], text_features.shape[1]])
        if self.widths and widths.tolist() != self.widths[0][:2].tolist():
            raise InputError(
                f"image_features and text_features must keep their widths, {self.widths[0][:2].tolist()}, got "
                f"{widths.tolist()}; reset() the metric first"
            )
        sides = [unit_rows(rows.detach().to(self.device).double()) for rows in (image_features, text_features)]
        zero = [(rows == 0).all(1, keepdim=True).double() for rows in sides]
        rows = torch.cat([*sides, *zero, torch.ones_like(zero[0])], 1)
        with torch.autocast(rows.device.type, enabled=False):
            batch = torch.mm(rows.T, rows)
        total = batch if not self.moments else self._total() + batch
        self.moments, self.widths = [], []
        self.keep("moments", total.flatten())
        self.keep("widths", widths)

    def compute(self) -> Tensor:
        """Return the CKA of the samples of all processes.

        Returns:
            Scalar, float32, in 0 … 1 unless unbiased; 0 where the rows of one side are all alike. NaN for fewer than two
            samples, four if unbiased, and if a feature is not finite.

        Raises:
            InputError: processes gave features of different width.
        """
        total = self._total()
        samples = int(total[-1, -1]) if len(total) and bool(total[-1, -1].isfinite()) else 0
        if samples < (4 if self.unbiased else 2):
            return torch.full((), torch.nan, device=self.device)
        first, second = self.numbers("widths")[:2].tolist()
        sides = (slice(0, first), slice(first, first + second))
        centred = _centred(total, sides)
        hsic = [_hsic(centred, sides, *pair, unbiased=self.unbiased) for pair in ((0, 1), (0, 0), (1, 1))]
        # Rounding errors can make what should be zero negative.
        length = (hsic[1].clamp_min(0) * hsic[2].clamp_min(0)).sqrt()
        return _divided(hsic[0], length + self.eps)

    def _total(self) -> Tensor:
        pairs = torch.unique(self.numbers("widths").view(-1, 2), dim=0)
        if len(pairs) > 1:
            raise InputError(
                f"image_features and text_features must keep their widths, got {pairs.tolist()} from different processes"
            )
        size = int(pairs.sum()) + 3 if len(pairs) else 0
        return self.numbers("moments").view(-1, size, size).sum(0) if size else torch.zeros(0, 0, device=self.device)


def cka_table(
    image_layers: Sequence[Tensor],
    text_layers: Sequence[Tensor],
    *,
    unbiased: bool = False,
    eps: float = 1e-6,
    chunk_size: int | None = None,
) -> Tensor:
    """Score every pair of an image layer and a text layer by linear CKA of unit rows, see `CKA`.

    The matrices of cosines are made a block at a time for all layers: time n² (sum of all widths), memory that of a block.

    Source: as for `CKA`.

    Args:
        image_layers: features (n, D_i) of the same n samples, finite, one tensor a layer.
        text_layers: features (n, D_t) of them, row by row.
        unbiased: see `CKA`.
        eps: see `CKA`.
        chunk_size: rows a block; None takes as many as need 64 MiB.

    Returns:
        Scores (image layers, text layers), float32, on the device of the first image layer.

    Raises:
        InputError: no layers, layers that are no matrices, that differ in rows or are not finite, fewer than two samples
            (four if unbiased), or an option out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
        >>> cka_table([rows, torch.ones(4, 3)], [rows.flip(1)])
        tensor([[1.0000],
                [0.0000]])
    """
    require_number("eps", eps, positive=False)
    samples = require_layers(image_layers, text_layers)
    if samples < (4 if unbiased else 2):
        raise InputError(f"CKA needs at least {4 if unbiased else 2} samples, got {samples}")
    device = image_layers[0].device
    layers = [unit_rows(layer.to(device).double()) for layer in (*image_layers, *text_layers)]
    layers = [layer - layer.mean(0) for layer in layers]
    hsic = torch.zeros(len(layers), len(layers), dtype=torch.float64, device=device)
    sums = torch.zeros(len(layers), samples, dtype=torch.float64, device=device)
    rows = block_rows(chunk_size, 8 * len(layers) * samples)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, samples, rows):
            part = slice(start, min(start + rows, samples))
            block = torch.stack([layer[part] @ layer.T for layer in layers])
            if unbiased:
                block.diagonal(start, 1, 2).zero_()
            sums[:, part] = block.sum(2)
            hsic += block.flatten(1) @ block.flatten(1).T
        if unbiased:
            totals = sums.sum(1)
            hsic += torch.outer(totals, totals) / ((samples - 1) * (samples - 2)) - sums @ sums.T * 2 / (samples - 2)
            hsic /= samples * (samples - 3)
    own = hsic.diagonal().clamp_min(0)
    lengths = torch.outer(own[: len(image_layers)], own[len(image_layers) :]).sqrt()
    return _divided(hsic[: len(image_layers), len(image_layers) :], lengths + eps)


def _divided(hsic: Tensor, length: Tensor) -> Tensor:
    """The quotient in float32; 0 where both are 0, as with `eps=0` and rows that are all alike."""
    return (hsic / torch.where(length == 0, 1, length)).float()


def _centred(moments: Tensor, sides: Sequence[slice]) -> Tensor:
    """Moments of (x - m, y - l, |x - m|², |y - l|², 1), m and l the means, which are linear in the rows as they are.

    Rows have the length 1, or 0 as z says, so |x - m|² = t - z - 2 m·(x - m), with the t that makes the sums agree: 1 - |m|²
    itself would lose its digits where all rows are near their mean. Each step is taken for what stands in the rows of the
    matrix, then for what stands in its columns.
    """
    mean = moments[-1] / moments[-1, -1]
    for _ in range(2):
        shifted = moments.clone()
        for side in sides:
            shifted[side] -= torch.outer(mean[side], moments[-1])
        moments = shifted.T
    levels = [(moments.diagonal()[side].sum() + moments[z, -1]) / moments[-1, -1] for z, side in enumerate(sides, -3)]
    for _ in range(2):
        shifted = moments.clone()
        for z, side in enumerate(sides, -3):
            shifted[z] = levels[z + 3] * moments[-1] - moments[z] - 2 * mean[side] @ moments[side]
        moments = shifted.T
    return moments


def _hsic(moments: Tensor, sides: Sequence[slice], first: int, second: int, *, unbiased: bool) -> Tensor:
    """HSIC of two sides from the moments of centred rows: their sums are zero, which leaves out most terms."""
    x, y, x_square, y_square = sides[first], sides[second], first - 3, second - 3
    total = moments[x, y].square().sum()
    if not unbiased:
        return total
    samples = moments[-1, -1]
    # Σ |x_i|² |y_i|², the diagonal of KL; the rows of K without diagonal sum to -|x_i|².
    diagonal = moments[x_square, y_square]
    whole = moments[x_square, -1] * moments[y_square, -1]
    total = total - diagonal + whole / ((samples - 1) * (samples - 2)) - 2 * diagonal / (samples - 2)
    return total / (samples * (samples - 3))
