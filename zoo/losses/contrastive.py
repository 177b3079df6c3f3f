"""InfoNCE, CLIP and SigLIP: pairs against all other pairs of the batch, without the matrix of pairs.

Sources; formulas as they are commonly stated, none of the papers was read in full for this file:

- InfoNCE: van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748;
- CLIP: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020;
- SigLIP: Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343.

With l_ij = scale <x_i, y_j> and pair i made of x_i and y_i:

    InfoNCE   -1/N sum_i log softmax_j(l_i·)[i]
    CLIP      (InfoNCE of x against y  +  InfoNCE of y against x) / 2
    SigLIP    1/N sum_ij log(1 + exp(-z_ij (l_ij + bias))),  z_ij = 1 for i = j, else -1

As in open_clip, whose `ClipLoss` and `SigLipLoss` these values equal, the caller normalises the features and hands over
the scale itself: `scale = logit_scale.exp()`, one over the temperature.

All are computed in float32 (float64 stays float64) in tiles (`zoo.losses.pairwise`): memory does not grow with the
square of the batch, value and gradient are those of the dense formula. A sample's value depends on its batch. A batch
of one has the InfoNCE 0, gradient 0. An empty batch gives 0, still connected to its features. NaN gives NaN,
and so may scores or products of features beyond 1e38, which float32 does not hold.

With `gather=True` and a process group, every process returns the loss of the global batch, and the mean of the
gradients over processes, which is what DDP takes, is the exact gradient of it, of a learned scale too. All processes
must then have equally large batches. Without a process group `gather` changes nothing.
"""

from __future__ import annotations

from torch import Tensor

from zoo.losses.contracts import require_matrix, require_same_layout
from zoo.losses.pairwise import pairwise_logsumexp, pairwise_softplus
from zoo.losses.ranks import rank_and_size, sum_over_ranks

__all__ = ["batch_mean", "clip_loss", "info_nce", "siglip_loss"]


def info_nce(
    queries: Tensor, keys: Tensor, *, scale: float | Tensor, gather: bool = False, chunk_size: int | None = None
) -> Tensor:
    """Cross-entropy of finding each query's own key among all keys, averaged over queries.

    One direction: queries are anchors, keys are candidates. Nothing is normalised or detached; pass `keys.detach()`
    for constant keys, whose gradient is then not computed.

    Args:
        queries: (N, d), as a rule of unit length.
        keys: (M, d) with M >= N, as a rule of unit length; key i belongs to query i, further keys are negatives for all
            queries.
        scale: factor of the inner products, one over the temperature; a number of at least 0, or a tensor with one
            element, learned or not.
        gather: whether the keys of all processes are candidates (see the module's docstring).
        chunk_size: rows and columns of a tile, at least 1; None lets the engine choose. It does not change the value.

    Returns:
        A scalar of at least 0 in nats, log M where all scores are equal; in float32, in float64 if `queries` are.

    Raises:
        InputError: a tensor is not (batch, width) in floating point; widths, devices or batches do not match; a scale
            that is negative, not finite or not a single number; a chunk size below 1; unequal batches under `gather`.

    Example:
        At a high scale, orthogonal pairs cost nothing:

        >>> info_nce(torch.eye(3), torch.eye(3), scale=1000.0)
        tensor(0.)
    """
    sums = pairwise_logsumexp(queries, keys, scale=scale, columns=False, gather=gather, chunk_size=chunk_size)
    return batch_mean(sums.rows, gather=gather)


def clip_loss(
    x: Tensor, y: Tensor, *, scale: float | Tensor, gather: bool = False, chunk_size: int | None = None
) -> Tensor:
    """Mean of InfoNCE in both directions; symmetric in its two sides.

    Nothing is normalised or detached (see the module's docstring): features of unit length give open_clip's value.

    Args:
        x: features (N, d) of one side.
        y: features (N, d) of the other side; row i belongs to row i of `x`.
        scale: factor of the inner products, one over the temperature; a number of at least 0, or a tensor with one
            element, learned or not.
        gather: whether the batch is that of all processes instead of this one's.
        chunk_size: rows and columns of a tile, at least 1; None lets the engine choose. It does not change the value.

    Returns:
        A scalar of at least 0 in nats, log N where all scores are equal; in float32, in float64 if `x` is.

    Raises:
        InputError: as `info_nce`, or sides of different shapes.

    Example:
        >>> clip_loss(torch.eye(3), torch.eye(3), scale=1000.0)
        tensor(0.)
    """
    _check_sides(x, y)
    sums = pairwise_logsumexp(x, y, scale=scale, gather=gather, chunk_size=chunk_size)
    return batch_mean((sums.rows + sums.columns) / 2, gather=gather)


def siglip_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    gather: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Binary cross-entropy of telling the N pairs from the N (N - 1) others, summed over all and divided by N.

    Divided by N and not by N**2, as in the paper: a sample's value grows with its batch. Nothing is normalised or
    detached (see the module's docstring).

    Args:
        x: features (N, d) of one side.
        y: features (N, d) of the other side; row i belongs to row i of `x`.
        scale: factor of the inner products (10 at the start in the paper); a number of at least 0, or a tensor with one
            element, learned or not.
        bias: added to all scores (-10 at the start in the paper), a finite number or a tensor with one element.
        gather: whether the batch is that of all processes instead of this one's.
        chunk_size: rows and columns of a tile, at least 1; None lets the engine choose. It does not change the value.

    Returns:
        A scalar of at least 0 in nats, N log 2 where all scores are 0; in float32, in float64 if `x` is.

    Raises:
        InputError: as `clip_loss`, or a bias that is not a single finite number.

    Example:
        One pair whose score is 0: a coin's entropy, log 2.

        >>> siglip_loss(torch.ones(1, 2), torch.ones(1, 2), scale=1.0, bias=-2.0)
        tensor(0.6931)
    """
    _check_sides(x, y)
    total = pairwise_softplus(x, y, scale=scale, bias=bias, gather=gather, chunk_size=chunk_size)
    return total / max(x.shape[0] * rank_and_size(gather=gather)[1], 1)


def batch_mean(values: Tensor, *, gather: bool) -> Tensor:
    """Average the values of samples over the batch, which may span processes.

    Args:
        values: one value for each sample of this process; equally many on every rank.
        gather: whether to average over the samples of all processes.

    Returns:
        A scalar, the same on every rank under `gather`; 0 for no values at all.

    Example:
        >>> batch_mean(torch.tensor([1.0, 3.0]), gather=False)
        tensor(2.)
    """
    _, size = rank_and_size(gather=gather)
    total = values.sum()
    if size > 1:
        total = sum_over_ranks(total)
    return total / max(values.shape[0] * size, 1)


def _check_sides(x: Tensor, y: Tensor) -> None:
    require_matrix("x", x)
    require_matrix("y", y)
    require_same_layout("y", y, "x", x)
