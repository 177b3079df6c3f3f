"""Canonical correlation: linear maps of two encoders under which the samples of a pair correlate most, in closed form.

With the covariances S11, S22 of two sets of features, S12 between them, and a ridge r (a share of the mean variance)::

    S11^(-1/2) S12 S22^(-1/2) = U diag(rho) V'          W1 = (S11 + r I)^(-1/2) U,  W2 = (S22 + r I)^(-1/2) V
    u = (x - mean) W1,  v = (y - mean) W2               corr(u_i, v_i) = rho_i, all other correlations 0 (r = 0)

CSA (Li, Chinchali, Topcu: Data-efficient Mapping of Unimodal Features to Multimodal Features, ICLR 2025, arXiv 2410.07610)
compares a pair by the sum of rho_i u_i v_i over the first directions of unit rows u and v; STRUCTURE (arXiv 2506.16895) has
it as one of its objectives. Read of both: the authors' code; not the equations of CSA's paper.

Ours: the ridge, the second moments (two encoders of width 1,024 take 25 MB in place of all features), how directions without
variance and signs are settled, and the weights inside of the maps (`CanonicalHead`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.losses.contracts import require_matrix, require_number

__all__ = [
    "CanonicalCorrelation",
    "CanonicalHead",
    "PairMoments",
    "canonical_correlation",
    "canonical_similarity",
    "fit_heads",
    "pair_moments",
    "solve_correlation",
    "whiten_heads",
]

# Directions whose variance is below this share of the largest have none: features in float32 leave about as much of zero.
_NO_VARIANCE = 1e-10


@dataclass(frozen=True)
class PairMoments:
    """Means and covariances of the features of pairs, float64.

    Attributes:
        count: number of pairs n.
        means: mean of each side, (d,) and (d').
        covariances: of each side, divided by n: (d, d) and (d', d').
        cross: covariance between the sides, (d, d').
    """

    count: int
    means: tuple[Tensor, Tensor]
    covariances: tuple[Tensor, Tensor]
    cross: Tensor


@dataclass(frozen=True)
class CanonicalCorrelation:
    """Maps to the canonical directions, the most correlated first.

    Attributes:
        maps: W1 (d, s) and W2 (d', s), float64; (x - mean) W are the canonical variables.
        means: mean of each side, (d,) and (d').
        correlations: (s,), falling, in 0 … 1.
    """

    maps: tuple[Tensor, Tensor]
    means: tuple[Tensor, Tensor]
    correlations: Tensor


def pair_moments(batches: Iterable[tuple[Tensor, Tensor]]) -> PairMoments:
    """Add up the first and second moments of pairs, a batch at a time, in float64.

    Args:
        batches: features (B, d) and (B, d') of the same samples, row by row.

    Returns:
        The moments, on the CPU.

    Raises:
        InputError: fewer than two pairs, no matrices, widths that change, or features that are not finite.

    Example:
        >>> moments = pair_moments([(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]]))])
        >>> moments.means[0].item(), moments.cross.item()
        (2.0, 1.0)
    """
    count, sums, products = 0, None, None
    shift, widths = torch.zeros(0), (0, 0)
    for first, second in batches:
        for name, value in (("first", first), ("second", second)):
            require_matrix(name, value)
        if len(first) != len(second) or (count and (first.shape[1], second.shape[1]) != widths):
            raise InputError(
                f"batches must be pairs of the same widths, got {tuple(first.shape)} and {tuple(second.shape)}"
                + (f" after widths {widths[0]} and {widths[1]}" if count else "")
            )
        if len(first) == 0:
            continue
        rows = torch.cat([first.detach(), second.detach()], 1)
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()
        if sums is None or products is None:
            # Near the mean, so that the products lose no digits to it.
            widths, shift = (first.shape[1], second.shape[1]), rows.mean(0)
            sums, products = torch.zeros_like(shift), torch.zeros_like(torch.outer(shift, shift))
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows - shift
            sums += rows.sum(0)
            products += rows.T @ rows
        count += len(rows)
    if sums is None or products is None or count < 2:
        raise InputError(f"canonical correlation needs at least 2 pairs, got {count}")
    if not bool(products.isfinite().all()):
        raise InputError("features must be finite; leave out the samples that are not")
    mean, shift = (sums / count).cpu(), shift.cpu()
    covariance = products.cpu() / count - torch.outer(mean, mean)
    own, other = slice(0, widths[0]), slice(widths[0], None)
    centre = shift + mean
    return PairMoments(
        count, (centre[own], centre[other]), (covariance[own, own], covariance[other, other]), covariance[own, other]
    )


def canonical_correlation(
    first: Tensor, second: Tensor, *, dim: int | None = None, ridge: float = 0.0
) -> CanonicalCorrelation:
    """Find the linear maps of two sets of features under which the pairs correlate most.

    With fewer pairs than dimensions and no ridge, all correlations are 1 and say nothing: maps fit anything. A ridge makes
    directions of little variance count less.

    Args:
        first: features (n, d) of n samples, in any floating-point type.
        second: features (n, d') of the same samples, row by row.
        dim: number of directions; all that have variance if omitted.
        ridge: added to the variance of each direction, as a share of the mean variance of its side, at least 0.

    Returns:
        See `CanonicalCorrelation`. Of `dim` directions those beyond the rank of either side are zeros, with correlation 0.
        Features without variance have no directions.

    Raises:
        InputError: what `pair_moments` refuses, or an option out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [2.0, 0.5]])
        >>> canonical_correlation(rows, rows @ torch.tensor([[2.0], [1.0]])).correlations
        tensor([1.], dtype=torch.float64)
    """
    return solve_correlation(pair_moments([(first, second)]), dim=dim, ridge=ridge)


def solve_correlation(moments: PairMoments, *, dim: int | None = None, ridge: float = 0.0) -> CanonicalCorrelation:
    """`canonical_correlation` from moments.

    Args:
        moments: of the pairs.
        dim: as there, at least 1.
        ridge: as there.

    Raises:
        InputError: an option is out of range.
    """
    require_number("ridge", ridge, positive=False)
    if dim is not None and dim < 1:
        raise InputError(f"dim must be at least 1, or None for all directions, got {dim}")
    roots = [_inverse_root(covariance, ridge) for covariance in moments.covariances]
    left, values, right = torch.linalg.svd(roots[0].T @ moments.cross @ roots[1], full_matrices=False)
    found = len(values)
    wanted = found if dim is None else dim
    maps = [root @ rotation for root, rotation in zip(roots, (left, right.T), strict=True)]
    # The sign of a direction is that of its largest entry; a decomposition leaves it open.
    signs = maps[0].gather(0, maps[0].abs().argmax(0, keepdim=True)).sign() if found else maps[0].sum(0)
    maps = [_columns(part * signs, wanted) for part in maps]
    # Rounding errors go beyond 1.
    correlations = _columns(values.clamp(0, 1).unsqueeze(0), wanted).squeeze(0)
    return CanonicalCorrelation((maps[0], maps[1]), moments.means, correlations)


def canonical_similarity(first: Tensor, second: Tensor, correlations: Tensor, *, power: float = 1.0) -> Tensor:
    """CSA's similarity of all pairs: sum of rho_i^power u_i v_i over unit rows u and v.

    Args:
        first: canonical variables (N, s).
        second: canonical variables (M, s).
        correlations: rho (s,), at least 0.
        power: of the correlations; 0 is the cosine.

    Returns:
        Similarities (N, M) in -1 … 1; 0 for a row of zeros.

    Raises:
        InputError: shapes do not match, or `power` is negative.

    Example:
        >>> u = torch.tensor([[3.0, 4.0]])
        >>> canonical_similarity(u, u, torch.tensor([1.0, 0.5]))
        tensor([[0.6800]])
    """
    for name, value in (("first", first), ("second", second)):
        require_matrix(name, value)
    require_number("power", power, positive=False)
    if not first.shape[1] == second.shape[1] == len(correlations) or correlations.ndim != 1:
        raise InputError(
            f"first, second and correlations must have one width, got {tuple(first.shape)}, {tuple(second.shape)} and "
            f"{tuple(correlations.shape)}"
        )
    units = [nn.functional.normalize(rows, dim=1) for rows in (first, second)]
    similarity: Tensor = units[0] * correlations.to(first.dtype) ** power @ units[1].T
    return similarity


class CanonicalHead(nn.Module):
    """A linear map of centred features with a weight for each direction: A = ((x - mean) W') * weights.

    `W` trains, mean and weights do not. It is random until `fit_heads` sets it.

    Args:
        in_dim: width d of the features.
        output_dim: number D of directions.
    """

    mean: Tensor
    weights: Tensor

    def __init__(self, in_dim: int, output_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.output_dim = output_dim
        self.weight = nn.Parameter(torch.empty(output_dim, in_dim))
        nn.init.orthogonal_(self.weight)
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("weights", torch.ones(output_dim))

    def centred(self, x: Tensor) -> Tensor:
        """Return the features less the mean of the training pairs."""
        return x - self.mean

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, d) to embeddings (B, D), which are not normalised."""
        embeddings: Tensor = nn.functional.linear(self.centred(x), self.weight) * self.weights
        return embeddings


def _inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    """Columns (d, r) that give each direction with variance, shifted by the ridge, variance 1; r is the rank."""
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > _NO_VARIANCE * variances[-1].clamp_min(0)
    scales = (variances[kept] + ridge * variances.clamp_min(0).mean()).rsqrt()
    scaled: Tensor = directions[:, kept] * scales
    return scaled


def _columns(part: Tensor, count: int) -> Tensor:
    """The first columns, filled up with zeros."""
    return nn.functional.pad(part[:, :count], (0, max(0, count - part.shape[1])))


def fit_heads(
    heads: tuple[CanonicalHead, CanonicalHead], moments: PairMoments, *, ridge: float = 0.0, power: float = 1.0
) -> None:
    """Set two heads to the canonical correlation of the features that feed them.

    The weight of a direction is rho^(power / 2) in both, so that the inner product of two embeddings has rho^power, as CSA's
    similarity has. CSA divides by the lengths without weights, a cosine of embeddings by those with them.

    Args:
        heads: of the first and the second side, of one output width.
        moments: of the pairs.
        ridge: see `canonical_correlation`.
        power: at least 0; with 0 all directions count alike.

    Raises:
        InputError: an option is out of range.
    """
    require_number("power", power, positive=False)
    found = solve_correlation(moments, dim=heads[0].output_dim, ridge=ridge)
    with torch.no_grad():
        for head, part, mean in zip(heads, found.maps, found.means, strict=True):
            head.weight.copy_(part.T)
            head.mean.copy_(mean)
            head.weights.copy_(found.correlations ** (power / 2))


def whiten_heads(
    heads: tuple[CanonicalHead, CanonicalHead], moments: PairMoments, *, ridge: float = 0.0, power: float = 1.0
) -> None:
    """Take what training did to the scale of the directions off two heads: W <- C^(-1/2) W, and weigh them anew.

    C is the covariance of the canonical variables, with the ridge. Heads that `fit_heads` has set do not change, nor do
    those that were whitened before; directions without variance become zeros.

    Args:
        heads: as for `fit_heads`.
        moments: of the pairs that set the heads.
        ridge: as for `fit_heads`.
        power: as for `fit_heads`.
    """
    maps = []
    for head, covariance in zip(heads, moments.covariances, strict=True):
        weight = head.weight.detach().cpu().double()
        shift = ridge * covariance.diagonal().mean()
        variances, directions = torch.linalg.eigh(weight @ covariance @ weight.T + shift * weight @ weight.T)
        kept = variances > _NO_VARIANCE * variances[-1].clamp_min(0)
        axes = directions[:, kept]
        maps.append(axes * variances[kept].rsqrt() @ axes.T @ weight)
    correlations = (maps[0] @ moments.cross * maps[1]).sum(1).clamp(0, 1)
    with torch.no_grad():
        for head, part in zip(heads, maps, strict=True):
            head.weight.copy_(part)
            head.weights.copy_(correlations ** (power / 2))
