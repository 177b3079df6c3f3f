"""STRUCTURE: a head that keeps the neighbourhoods of the frozen encoder which feeds it.

Gröger, Wen, Le, Brbić: "With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You" (NeurIPS 2025, arXiv
2506.16895 v2).

Against a contrastive loss alone, each modality pays for every sample whose neighbours, as the head sees them, are no
longer those that the encoder saw. With X the frozen features of a batch of N, A = head(X), and for both

    Z = unit rows less their mean over the batch        P = softmax of each row of Z Z^T / temperature, diagonal included
    D_l = mean over rows of divergence(P_A^l, P_X^l)                       P^l: the random walk of l steps
    R_S(X, A) = 1/L sum_l c_l max(D_l - margin, 0)                         c_l = 1 or 1/l

The objective of the paper is CLIP + lambda (R_S(X1, A1) + R_S(X2, A2)) / 2 over the two modalities, lambda = 10 after a
warm-up; the modality pairs never meet here.

Paper against release. The paper names the Jensen-Shannon divergence; the release has the arguments of its
Kullback-Leibler divergences the other way round:

    released   (KL(M || P_A) + KL(M || P_X)) / 2, M = (P_A + P_X) / 2, with 1e-12 added to each of the three
    js         (KL(P_A || M) + KL(P_X || M)) / 2                                                   at most log 2

They agree to second order where the rows nearly agree. Far apart, `released` has no bound of its own, and it is the
1e-12 that sets its value: 13.12 for rows without a common neighbour. Therefore 1e-12 is kept here as a part of the
definition and not taken for a guard that logarithms could do without; `js` has no such constant. A neighbour to which
the head gives much less than 1e-12 has a value close to that limit and hardly a gradient, under either.

Read: the authors' code, through the project's notes on it, and the abstract. Not read: the paper's equations. Ours: the
random-walk engine (`zoo.losses.random_walks`), neighbours and mean over all processes, zero vectors, batches of one.

What it measures at 0.05: the features' inner products differ so much from 1 that P is nearly the identity, and little
but the nearest neighbour or two counts. `structure_statistics` tells whether a temperature suits an encoder.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_matrix, require_number, unit_rows, working_dtype
from zoo.losses.random_walks import DivergenceName, walk_divergence, walk_spread
from zoo.losses.ranks import gather_rows, rank_and_size, require_equal_batches, sum_over_ranks

__all__ = ["Centering", "structure_loss", "structure_statistics"]

Centering = Literal["mean", "none", "standard", "before"]

# Rows of a block. On a CPU, of 64 … 512 the fewest that cost little time at N = 4096 (benchmarks/structure.py). More
# than one level makes P again for each block, for which these are too few. Not measured on a GPU yet.
_ROWS, _ROWS_OF_LEVELS = 256, 1024
_CHOICES = {
    "level_weights": ("none", "inverse"),
    "divergence": ("released", "js"),
    "centering": ("mean", "none", "standard", "before"),
}


def structure_loss(
    frozen: Tensor,
    aligned: Tensor,
    *,
    temperature: float = 0.05,
    levels: int = 1,
    level_weights: Literal["none", "inverse"] = "none",
    divergence: DivergenceName = "released",
    centering: Centering = "mean",
    margin: float = 0.0,
    gather: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """How far the neighbourhoods of a batch have moved from the frozen features to the aligned ones: R_S of one modality.

    Features come in raw: the loss normalises and centres, and detaches `frozen`. The gradient flows to `aligned` alone
    and is exact, through the mean too. A sample's value depends on its batch. The value is 0 for equal features, does
    not change with a rotation of either side or with a positive factor on any row, and does change with a shift of the
    raw features (the mean is taken off unit vectors).

    Memory beyond inputs and their gradient is that of a few blocks of `chunk_size` x N numbers and of copies of the
    features. With one level, value and gradient cost four products of N x N x width together and nothing twice. Each
    further level takes N^3 (4 + 5 d / chunk_size) multiplications more, and 2 blocks: on a CPU it is for N up to a few
    thousand; at N = 32,768 it is 2e14 multiplications, work for a GPU. A `margin` above 0 costs a pass without gradient
    more, because which levels count is known only when all rows are.

    Defined cases:

    - a batch of one: 0 with gradient 0, whatever the centering; an empty batch: 0, still connected to `aligned`;
    - a vector shorter than 1e-6 counts as zeros with gradient 0; centred, it has the direction against the mean;
    - `centering="standard"`: a coordinate that is the same in all samples stays 0;
    - NaN or infinity in any feature: NaN.

    With `gather=True` and a process group, mean and neighbours are those of all processes, each process compares its
    own rows, and all return the same global value; the gradients' mean over ranks, which DDP takes, is that of the
    global loss. Without it, each process has its own batch's loss, which is another one: fewer neighbours.

    Args:
        frozen: features (N, d) of the frozen encoder as they enter the head, in any floating-point type; constants.
        aligned: what the head made of them, (N, d').
        temperature: of the similarities, positive; the release shares it with its contrastive loss.
        levels: the longest random walk L, at least 1; the paper's main results have 1.
        level_weights: c_l, `"none"` for 1 or `"inverse"` for 1/l (released with more than one level).
        divergence: `"released"` or `"js"`, see the module's docstring.
        centering: `"mean"` takes the mean off the unit vectors; `"none"` leaves it; `"standard"` also divides each
            coordinate by its standard deviation (of N - 1); `"before"` takes the mean off first and normalises then.
        margin: divergence of a level in nats that costs nothing, at least 0.
        gather: whether to span the batches of all processes, which must be equally large.
        chunk_size: rows of a block, at least 1; None for 256, on a GPU N / 32 if that is more, and 1024 with more than
            one level. The value does not depend on it beyond rounding.

    Returns:
        A scalar in nats, at least 0, averaged over rows and levels; float32, or float64 if `aligned` is float64.

    Raises:
        InputError: a tensor is not (batch, width) in floating point, batches or devices differ, a number is out of
            range, an option has no such name, or processes hold batches of different sizes.

    Example:
        A head that mirrors everything keeps every neighbourhood; one that makes two distant samples the same does not.

        >>> frozen = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> structure_loss(frozen, -frozen)
        tensor(0.)
        >>> structure_loss(frozen, torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])) > 1
        tensor(True)
    """
    _check(frozen, aligned, temperature=temperature, margin=margin, levels=levels)
    _check_choices(level_weights=level_weights, divergence=divergence, centering=centering)
    rank, size = rank_and_size(gather=gather)
    row_tile = _row_tile(chunk_size, size * aligned.shape[0], aligned.device, levels=levels)
    with torch.autocast(aligned.device.type, enabled=False):
        dtype, rows = working_dtype(aligned), aligned.shape[0]
        frozen, aligned = frozen.detach().to(dtype), aligned.to(dtype)
        if size > 1:
            require_equal_batches(frozen, aligned)
            frozen, aligned = gather_rows(frozen), gather_rows(aligned)
        if rows == 0:
            return aligned.sum()
        frozen, aligned = _prepared(frozen, centering), _prepared(aligned, centering)
        weights = aligned.new_full((levels,), 1 / (levels * rows * size))
        if level_weights == "inverse":
            weights = weights / torch.arange(1, levels + 1, device=aligned.device)

        def compare(aligned: Tensor, weights: Tensor, *, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
            return walk_divergence(  # type: ignore[no-any-return]
                frozen,
                aligned,
                weights,
                start=rank * rows,
                rows=rows,
                temperature=temperature,
                divergence=divergence,
                row_tile=row_tile,
                learns=learns,
            )

        free = margin * rows * size
        if margin > 0:
            sums = compare(aligned.detach(), weights, learns=False)[1]
            weights = weights * ((sum_over_ranks(sums) if size > 1 else sums) > free)
        total = compare(aligned, weights, learns=torch.is_grad_enabled() and aligned.requires_grad)[0]
        if size > 1:
            total = sum_over_ranks(total)
        return total - free * weights.sum() if margin > 0 else total


@torch.no_grad()
def structure_statistics(
    frozen: Tensor,
    *,
    temperature: float = 0.05,
    centering: Centering = "mean",
    gather: bool = False,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """What the loss sees of an encoder's neighbourhoods at a temperature, without a graph.

    With nearly all mass on the diagonal, each sample is its own only neighbour, and the loss tells little of the
    encoder's structure: raise the temperature. With as many effective neighbours as samples, all are alike: lower it.
    Options and defined cases are as for `structure_loss`; the statistics of an empty batch are 0.

    Source: ours, section 1 of the project's notes on arXiv 2506.16895.

    Args:
        frozen: features (N, d) of the frozen encoder, as for the loss.
        temperature: as for the loss.
        centering: as for the loss.
        gather: as for the loss.
        chunk_size: as for the loss.

    Returns:
        Scalars, means over the rows of P: `diagonal_mass`, the probability P_ii to stay, in 0 … 1;
        `effective_neighbours`, the exponential of the row's entropy, from 1 (the sample alone) to N.

    Raises:
        InputError: as for the loss.

    Example:
        >>> statistics = structure_statistics(torch.ones(4, 2))
        >>> {name: round(float(value), 4) for name, value in statistics.items()}
        {'diagonal_mass': 0.25, 'effective_neighbours': 4.0}
    """
    require_matrix("frozen", frozen)
    require_number("temperature", temperature, positive=True)
    _check_choices(centering=centering)
    rank, size = rank_and_size(gather=gather)
    row_tile = _row_tile(chunk_size, size * frozen.shape[0], frozen.device)
    with torch.autocast(frozen.device.type, enabled=False):
        rows, frozen = frozen.shape[0], frozen.to(working_dtype(frozen))
        if size > 1:
            require_equal_batches(frozen)
            frozen = gather_rows(frozen)
        if rows == 0:
            return dict.fromkeys(("diagonal_mass", "effective_neighbours"), frozen.new_zeros(()))
        sums = walk_spread(
            _prepared(frozen, centering), start=rank * rows, rows=rows, temperature=temperature, row_tile=row_tile
        )
        means = (sum_over_ranks(sums) if size > 1 else sums) / (rows * size)
        return {"diagonal_mass": means[0], "effective_neighbours": means[1]}


def _prepared(features: Tensor, centering: Centering) -> Tensor:
    if centering == "before":
        return unit_rows(features - features.mean(0))
    units = unit_rows(features)
    if centering == "none":
        return units
    units = units - units.mean(0)
    if centering == "standard":
        variance = units.square().sum(0) / max(len(units) - 1, 1)
        units = units / torch.where(variance == 0, 1, variance).sqrt()
    return units


def _row_tile(chunk_size: int | None, samples: int, device: torch.device, *, levels: int = 1) -> int:
    if chunk_size is None:
        if levels > 1:
            return _ROWS_OF_LEVELS
        # A GPU has work for more rows at a time; N / 32 of them make blocks of a fiftieth of what the dense form holds.
        return max(_ROWS, samples // 32) if device.type == "cuda" else _ROWS
    if chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, or None to let the engine choose, got {chunk_size}")
    return chunk_size


def _check(frozen: Tensor, aligned: Tensor, *, temperature: float, margin: float, levels: int) -> None:
    require_matrix("frozen", frozen)
    require_matrix("aligned", aligned)
    if frozen.shape[0] != aligned.shape[0]:
        raise InputError(
            f"aligned must have one row for each row of frozen, got {aligned.shape[0]} and {frozen.shape[0]}: both "
            "are features of the same samples"
        )
    if frozen.device != aligned.device:
        raise InputError(
            f"aligned must be on the device of frozen, got {aligned.device} and {frozen.device}; "
            f"move it with .to({str(frozen.device)!r})"
        )
    require_number("temperature", temperature, positive=True)
    require_number("margin", margin, positive=False)
    if levels < 1:
        raise InputError(f"levels must be at least 1, the longest random walk, got {levels}")


def _check_choices(**chosen: str) -> None:
    for name, value in chosen.items():
        require_choice(name, value, _CHOICES[name])
