"""CM3: alignment and uniformity on the sphere, with a uniformity that leaves similar items near each other.

Zhou et al.: "Calibrating Multimodal Recommendation" (arXiv 2508.01226).

Its parent is alignment and uniformity (Wang and Isola, arXiv 2005.10242; for recommendation: DirectAU). For unit
vectors x_b of users and y_b of what they chose, and over the pairs b < c of a batch:

    alignment    L_a = mean_b |x_b - y_b|^2
    uniformity   L_u = log mean_{b<c} exp(-t |x_b - x_c|^2)            = log mean exp(2t (<x_b, x_c> - 1))

CM3 asks of items that look or read alike to be pushed apart less. With m_b what their modalities say (the fused unit
features, `zoo.losses.spherical_bezier`):

    calibrated   L_i = log mean_{b<c} exp(2t (<x_b, x_c> - s_bc))      s_bc = <m_b, m_c> clipped to [min, max]

    L = L_a + gamma (L_u + L_i) / 2

s = 1 for all pairs is the plain uniformity, s = 0 for all is that plus 2t, a constant: only differences of s count.

Read: the abstract and the project's notes on the released code, whose values and gradients these are. Not read: the
paper's equations; the halves of L_u and L_i are the release's. The gradient of L_i goes into the features as well, as
released. The cheapest way down is then to make all features alike until s is clipped everywhere and the calibration
is off; `detach_similarity=True` is ours, and `calibration_statistics` shows it coming.

All pairs are summed in blocks of rows (`zoo.losses.pair_log_sum`): memory is that of a few blocks of
`chunk_size` x batch numbers, value and gradient are those of the dense formula. Everything is computed in float32
(float64 stays float64). The functions normalise what they get. A vector shorter than 1e-6 has the cosine 0 with every
other and the gradient 0. A batch of one, and an empty one, has the uniformity 0 with gradient 0, so that L falls back to
L_a. NaN gives NaN.

With `gather=True` and a process group, every process returns the value of the global batch, and the mean of the
gradients over processes, which is what DDP takes, is the exact gradient of it. All processes must then have equally
large batches; each works on an equal share of the pairs. Without a process group `gather` changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.contracts import require_matrix, require_number, require_same_layout, unit_rows, working_dtype
from zoo.losses.contrastive import batch_mean
from zoo.losses.pair_log_sum import pair_log_sum, row_blocks
from zoo.losses.pairwise import tile_shape
from zoo.losses.ranks import gather_rows, rank_and_size, require_equal_batches, sum_over_ranks

__all__ = ["alignment_loss", "calibrated_uniformity_loss", "calibration_statistics", "uniformity_loss"]

# Rows of a block on a CPU: a block meets only rows that follow it, so that small ones compute few pairs twice.
_CPU_ROWS = 256
# A cosine beyond a bound by less than this is that bound and its rounding.
_ROUNDING = 1e-6


def alignment_loss(x: Tensor, y: Tensor, *, gather: bool = False) -> Tensor:
    """Mean squared distance of the directions of paired vectors, 2 - 2 cos.

    Source: L_a, section 1.5 of the project's notes on CM3. Defined cases and `gather`: see the module's docstring.

    Args:
        x: vectors (N, d) of any length.
        y: vectors (N, d); row i belongs to row i of `x`.
        gather: whether to average over the batches of all processes.

    Returns:
        A scalar in 0 … 4 in float32, in float64 if `x` is; 0 for an empty batch.

    Raises:
        InputError: no matrices in floating point, or of different shapes or devices; unequal batches under `gather`.

    Example:
        >>> alignment_loss(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        tensor(1.)
    """
    require_matrix("x", x)
    require_matrix("y", y)
    require_same_layout("y", y, "x", x)
    with torch.autocast(x.device.type, enabled=False):
        dtype = working_dtype(x)
        if rank_and_size(gather=gather)[1] > 1:
            require_equal_batches(x)
        x, y = unit_rows(x.to(dtype)), unit_rows(y.to(dtype))
        # The difference keeps its relative precision where 2 - 2 cos has none. Zeros have the cosine 0: 2, and not 1.
        missing = sum((side == 0).all(1).to(dtype) for side in (x, y))
        return batch_mean((x - y).square().sum(1) + missing, gather=gather)


def uniformity_loss(x: Tensor, *, t: float = 2.0, gather: bool = False, chunk_size: int | None = None) -> Tensor:
    """Logarithm of the mean Gaussian potential of all pairs of rows, each pair once.

    Rows that are there twice count twice. Source: L_u, section 1.5 of the project's notes on CM3. Defined cases and
    `gather`: see the module's docstring.

    Args:
        x: vectors (N, d) of any length.
        t: sharpness of the potential, positive; 2 in the release.
        gather: whether to span the batches of all processes.
        chunk_size: rows of a block, at least 1; None lets the engine choose. It does not change the value.

    Returns:
        A scalar in -4t … 0 in nats, 0 where all directions are equal; in float32, in float64 if `x` is.

    Raises:
        InputError: no matrix in floating point, `t` or `chunk_size` out of range; unequal batches under `gather`.

    Example:
        >>> uniformity_loss(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))  # |x - y|^2 = 4
        tensor(-8.)
    """
    require_matrix("x", x)
    return _log_mean(x, None, t=t, bounds=(1.0, 1.0), gather=gather, chunk_size=chunk_size)


def calibrated_uniformity_loss(
    x: Tensor,
    features: Tensor,
    *,
    t: float = 2.0,
    min_similarity: float = 0.0,
    max_similarity: float = 1.0,
    detach_similarity: bool = False,
    gather: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Uniformity in which a pair's potential is the lower the more its features resemble each other.

    Source: L_i, section 1.5 of the project's notes on CM3. The clip passes the gradient on the closed interval. Defined
    cases and `gather`: see the module's docstring.

    Args:
        x: vectors (N, d) of any length.
        features: what the same rows' modalities say, (N, d'), of any length.
        t: sharpness of the potential, positive; 2 in the release.
        min_similarity: lower bound of the cosine of two rows' features, in -1 … 1.
        max_similarity: upper bound, at least `min_similarity` and at most 1; released runs have 0.8 and 1.
        detach_similarity: whether `features` are constants here. Otherwise they are trained to be alike.
        gather: whether to span the batches of all processes.
        chunk_size: rows of a block, at least 1; None lets the engine choose. It does not change the value.

    Returns:
        A scalar in nats, from -2t (1 + max) to 2t (1 - min); in float32, in float64 if `x` is.

    Raises:
        InputError: no matrices in floating point, batches or devices that differ, or a number out of range; unequal
            batches under `gather`.

    Example:
        Two orthogonal rows, once with features that have nothing in common and once with equal ones:

        >>> x = torch.eye(2)
        >>> calibrated_uniformity_loss(x, torch.eye(2)), calibrated_uniformity_loss(x, torch.ones(2, 1))
        (tensor(0.), tensor(-4.))
    """
    require_matrix("x", x)
    require_matrix("features", features)
    if features.shape[0] != x.shape[0]:
        raise InputError(f"features must have one row for each row of x, got {features.shape[0]} and {x.shape[0]}")
    if features.device != x.device:
        raise InputError(f"features must be on the device of x, got {features.device} and {x.device}")
    _check_bounds(min_similarity, max_similarity)
    return _log_mean(
        x,
        features.detach() if detach_similarity else features,
        t=t,
        bounds=(min_similarity, max_similarity),
        gather=gather,
        chunk_size=chunk_size,
    )


@torch.no_grad()
def calibration_statistics(
    features: Tensor,
    *,
    min_similarity: float = 0.0,
    max_similarity: float = 1.0,
    gather: bool = False,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Whether the calibration still tells pairs apart: mean similarity and share of clipped pairs, without a graph.

    Where nearly all pairs are clipped at the top, `calibrated_uniformity_loss` is the plain uniformity and a constant,
    and passes no gradient to the features. Section 7.6 of the project's notes on CM3 saw 93 % after three epochs.

    Args:
        features: (N, d'), as for the loss.
        min_similarity: as for the loss.
        max_similarity: as for the loss.
        gather: as for the loss.
        chunk_size: as for the loss.

    Returns:
        Scalars over the pairs of different rows: `similarity`, the mean of s; `clipped_share`, in 0 … 1, the share of
        pairs with a cosine outside the bounds by more than 1e-6; `clipped_above`, the share of those beyond
        `max_similarity`. All are 0 without a pair.

    Raises:
        InputError: as for the loss.

    Example:
        >>> statistics = calibration_statistics(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), max_similarity=0.5)
        >>> {name: round(float(value), 4) for name, value in statistics.items()}
        {'similarity': 0.1667, 'clipped_share': 0.3333, 'clipped_above': 0.3333}
    """
    require_matrix("features", features)
    _check_bounds(min_similarity, max_similarity)
    rank, size = rank_and_size(gather=gather)
    row_tile = _row_tile(chunk_size, features.device)
    names = ("similarity", "clipped_share", "clipped_above")
    with torch.autocast(features.device.type, enabled=False):
        units = unit_rows(features.to(working_dtype(features)))
        if size > 1:
            require_equal_batches(units)
            units = gather_rows(units)
        rows = units.shape[0]
        if rows < 2:
            return dict.fromkeys(names, units.new_zeros(()))
        sums = units.new_zeros(3, dtype=units.dtype)
        for own in row_blocks(rows, rank=rank, size=size, row_tile=row_tile):
            cosines = units[own] @ units[own.start :].t()
            count = own.stop - own.start
            # The cosine itself stays NaN where it was; what is no pair gets weight 0.
            pairs = torch.ones_like(cosines, dtype=torch.bool)
            pairs[:, :count].triu_(1)
            cosines = cosines[pairs]
            above = (cosines > max_similarity + _ROUNDING).sum()
            below = (cosines < min_similarity - _ROUNDING).sum()
            sums += torch.stack([cosines.clamp(min_similarity, max_similarity).sum(), above + below, above])
        means = (sum_over_ranks(sums) if size > 1 else sums) / math.comb(rows, 2)
        return dict(zip(names, means.unbind(), strict=True))


def _log_mean(
    x: Tensor,
    features: Tensor | None,
    *,
    t: float,
    bounds: tuple[float, float],
    gather: bool,
    chunk_size: int | None,
) -> Tensor:
    require_number("t", t, positive=True)
    rank, size = rank_and_size(gather=gather)
    row_tile = _row_tile(chunk_size, x.device)
    with torch.autocast(x.device.type, enabled=False):
        dtype = working_dtype(x)
        units = unit_rows(x.to(dtype))
        if features is not None:
            features = unit_rows(features.to(dtype))
        if size > 1:
            require_equal_batches(units)
            units = gather_rows(units)
            features = None if features is None else gather_rows(features)
        rows = units.shape[0]
        if rows < 2:
            connected = 0 * units.sum()
            return connected if features is None else connected + 0 * features.sum()
        grad = torch.is_grad_enabled()
        log_sum: Tensor = pair_log_sum(
            units,
            features,
            rank=rank,
            size=size,
            slope=2.0 * t,
            lowest=bounds[0],
            highest=bounds[1],
            row_tile=row_tile,
            learns=grad and units.requires_grad,
            features_learn=grad and features is not None and features.requires_grad,
        )[0]
        if size > 1:
            log_sum = gather_rows(log_sum.unsqueeze(0)).logsumexp(0)
        # Without features, s is 1 throughout.
        return log_sum - math.log(rows * (rows - 1) / 2) - (2 * t if features is None else 0)


def _row_tile(chunk_size: int | None, device: torch.device) -> int:
    if chunk_size is None and device.type == "cpu":
        return _CPU_ROWS
    return tile_shape(chunk_size, device)[0]


def _check_bounds(lowest: float, highest: float) -> None:
    if not -1 <= lowest <= highest <= 1:
        raise InputError(
            "min_similarity and max_similarity must be cosines, -1 <= min_similarity <= max_similarity <= 1, "
            f"got {lowest} and {highest}"
        )
