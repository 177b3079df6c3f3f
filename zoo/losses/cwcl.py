"""CWCL: a contrastive loss whose targets are as soft as the frozen side's own similarities.

Srinivasa, Cho, Yang, Saidutta, Lee, Shen, Jin: "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss"
(NeurIPS 2023, arXiv 2309.14580).

Against InfoNCE in both directions, one direction changes: where a *trained* embedding p_i looks for its partner among
the *frozen* ones q_j, partners that resemble the right one on the frozen side are right in proportion. With unit
vectors p_i (trained), q_j (frozen), r_j (features of the frozen model, constants) and l_ij = scale <p_i, q_j>:

    w_ij = (1 + <r_i, r_j>) / 2                                     in [0, 1], w_ii = 1
    trained -> frozen   -1/N sum_i 1/(sum_k w_ik) sum_j w_ij log softmax_j(l_i·)
    frozen -> trained   -1/N sum_i log softmax_k(l_·i)[i]           plain InfoNCE
    L_CWCL = the sum of both

The first is a cross-entropy with soft targets, entropy + KL: it does not go to 0, and with features in a narrow cone
the entropy is nearly log N. The KL is what training moves; `cwcl_statistics` tells them apart.

Read: abstract and introduction of the paper. The formulas are reconstructed from re-implementations that agree with
them (CellCLIP, MorphoCLIP) and checked against numbers computed apart from this code. No release of the authors was
found. Ours, and off by default: the kernels other than `affine`, weights in both directions, the mean of the directions.

The weights enter only through one vector for each anchor, t_i = sum_j w_ij q_j / sum_j w_ij, since the scores are linear
in q: no matrix of weights is ever made (`zoo.losses.soft_targets`), nor one of scores (`zoo.losses.pairwise`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_matrix, require_same_layout, unit_rows, working_dtype
from zoo.losses.contrastive import batch_mean
from zoo.losses.pairwise import pairwise_logsumexp, scalar, tile_shape
from zoo.losses.soft_targets import Kernel, KernelName, weighted_means, weights_entropy

__all__ = ["cwcl_loss", "cwcl_statistics"]


class _Terms(NamedTuple):
    """Values of samples (N,) in nats, and the unit weight features."""

    from_trained: Tensor
    from_frozen: Tensor
    features: Tensor


def cwcl_loss(
    trained: Tensor,
    frozen: Tensor,
    *,
    scale: float | Tensor,
    weight_features: Tensor | None = None,
    weighted_direction: Literal["trained", "both"] = "trained",
    kernel: KernelName = "affine",
    exponent: float = 2.0,
    kernel_temperature: float = 0.1,
    neighbours: int = 8,
    direction_reduction: Literal["sum", "mean"] = "sum",
    gather: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Weighted InfoNCE from the trained side plus InfoNCE from the frozen side, averaged over the batch.

    The loss makes unit vectors of all features itself; the caller normalises and detaches nothing. The gradient flows
    to `trained`, `scale`, and `frozen` if that side has a trainable projection; `weight_features` are constants. A
    sample's value depends on its batch.

    Defined cases:

    - a vector shorter than 1e-6 counts as zeros with gradient 0: its scores are 0, its weights alike for all;
    - a batch of one: 0 to rounding; an empty batch: 0, still connected to `trained`;
    - duplicates in `weight_features` are partners in full (w = 1) from the trained side, and negatives, as all others,
      from the frozen side;
    - NaN or infinity in any feature: NaN.

    With `gather=True` and a process group, every process returns the loss of the global batch, and the mean of the
    gradients over processes, which is what DDP takes, is the exact gradient of it, of a learned scale too. All
    processes must then have equally large batches. Without a process group `gather` changes nothing.

    Args:
        trained: embeddings (N, d) of the modality in training.
        frozen: embeddings (N, d) of the modality whose geometry is handed over; row i belongs to row i of `trained`.
        scale: factor of the cosines, one over the temperature; a number of at least 0 or a tensor with one element. The
            paper's re-implementations learn its logarithm from log(1 / 0.07) and keep it below log(100).
        weight_features: features (N, r) of the frozen model that make the weights: its output before a trainable
            projection, if there is one. None takes `frozen`.
        weighted_direction: `"trained"` weights the direction from the trained side (the paper's); `"both"` weights the
            other one too (ours).
        kernel: weight as a function of the cosine c. `"affine"`, (1 + c) / 2, is the paper's. Ours, sharper:
            `"power"`, ((1 + c) / 2)**exponent; `"exp"`, exp((c - 1) / kernel_temperature); `"topk"`, the affine weight of
            the `neighbours` nearest, ties included, 0 for others.
        exponent: of `"power"`, above 0.
        kernel_temperature: of `"exp"`, above 0; not that of the scores.
        neighbours: of `"topk"`, at least 1; the sample itself is one of them.
        direction_reduction: `"sum"` of the two directions (the paper's) or their `"mean"`, half of it.
        gather: whether the batch is that of all processes instead of this one's.
        chunk_size: rows and columns of a tile, at least 1; None lets the engine choose. It does not change the value.

    Returns:
        A scalar of at least 0 in nats, in float32; in float64 if `trained` is float64.

    Raises:
        InputError: a tensor is not (batch, width) in floating point, shapes or devices do not match, an unknown option,
            a scale that is negative, not finite or not a single number, a kernel's number or a chunk size out of range,
            or unequal batches under `gather`.

    Example:
        Frozen features that are all alike leave nothing to tell apart: the targets are uniform, both ways cost log 2.

        >>> loss = cwcl_loss(torch.eye(2), torch.ones(2, 2), scale=10.0)
        >>> (loss / torch.tensor(2.0).log()).round()
        tensor(2.)
    """
    require_choice("weighted_direction", weighted_direction, ("trained", "both"))
    require_choice("direction_reduction", direction_reduction, ("sum", "mean"))
    chosen = Kernel.checked(kernel, exponent=exponent, kernel_temperature=kernel_temperature, neighbours=neighbours)
    with torch.autocast(trained.device.type, enabled=False):
        terms = _terms(
            trained,
            frozen,
            weight_features,
            scale=scale,
            both=weighted_direction == "both",
            kernel=chosen,
            gather=gather,
            chunk_size=chunk_size,
        )
        total = batch_mean(terms.from_trained + terms.from_frozen, gather=gather)
        return total / 2 if direction_reduction == "mean" else total


@torch.no_grad()
def cwcl_statistics(
    trained: Tensor,
    frozen: Tensor,
    *,
    scale: float | Tensor,
    weight_features: Tensor | None = None,
    kernel: KernelName = "affine",
    exponent: float = 2.0,
    kernel_temperature: float = 0.1,
    neighbours: int = 8,
    gather: bool = False,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Tell what is learned from what is given: the directions of the loss, entropy of the targets, KL, partners.

    Computed without a graph, in tiles, by one more product of the batch with itself than the loss: call it every so
    many steps, or on a part of the batch. An empty batch gives zeros.

    Args:
        trained: as for `cwcl_loss`.
        frozen: as for `cwcl_loss`.
        scale: as for `cwcl_loss`.
        weight_features: as for `cwcl_loss`.
        kernel: as for `cwcl_loss`.
        exponent: as for `cwcl_loss`.
        kernel_temperature: as for `cwcl_loss`.
        neighbours: as for `cwcl_loss`.
        gather: as for `cwcl_loss`; the values are then those of the global batch.
        chunk_size: as for `cwcl_loss`.

    Returns:
        Scalars in float32 (float64 if `trained` is float64): `from_trained`, the weighted direction in nats;
        `from_frozen`, the plain one in nats; `entropy`, the mean entropy H_i of the targets in nats, which no training
        changes while the weight features stay; `kl`, `from_trained - entropy`, at least 0; `effective_positives`, the
        mean of exp(H_i), from 1 to the size of the batch.

    Raises:
        InputError: as for `cwcl_loss`.

    Example:
        >>> statistics = cwcl_statistics(torch.eye(2), torch.ones(2, 2), scale=10.0)
        >>> statistics["effective_positives"].round(), statistics["kl"].abs().round()
        (tensor(2.), tensor(0.))
    """
    chosen = Kernel.checked(kernel, exponent=exponent, kernel_temperature=kernel_temperature, neighbours=neighbours)
    with torch.autocast(trained.device.type, enabled=False):
        terms = _terms(
            trained,
            frozen,
            weight_features,
            scale=scale,
            both=False,
            kernel=chosen,
            gather=gather,
            chunk_size=chunk_size,
        )
        tile = tile_shape(chunk_size, trained.device)
        entropy = weights_entropy(terms.features, chosen, tile=tile, gather=gather)
        names = {
            "from_trained": terms.from_trained,
            "from_frozen": terms.from_frozen,
            "entropy": entropy,
            "kl": terms.from_trained - entropy,
            "effective_positives": entropy.exp(),
        }
        return {name: batch_mean(values, gather=gather) for name, values in names.items()}


def _terms(
    trained: Tensor,
    frozen: Tensor,
    weight_features: Tensor | None,
    *,
    scale: float | Tensor,
    both: bool,
    kernel: Kernel,
    gather: bool,
    chunk_size: int | None,
) -> _Terms:
    _check(trained, frozen, weight_features)
    dtype = working_dtype(trained)
    scale = scalar("scale", scale, trained)
    tile = tile_shape(chunk_size, trained.device)
    trained, frozen = unit_rows(trained.to(dtype)), unit_rows(frozen.to(dtype))
    features = frozen.detach() if weight_features is None else unit_rows(weight_features.detach().to(dtype))
    sums = pairwise_logsumexp(trained, frozen, scale=scale, gather=gather, chunk_size=chunk_size)
    values = torch.cat((frozen, trained), dim=1) if both else frozen
    means = weighted_means(features, values, kernel, tile=tile, gather=gather)
    # -sum_j w_j log softmax_j = lse - l_ii + scale <p_i, q_i - t_i>, and the mean t_i is q_i itself for hard targets.
    width = frozen.shape[1]
    from_trained = sums.rows + scale * (trained * (frozen - means[:, :width])).sum(1)
    from_frozen = sums.columns
    if both:
        from_frozen = from_frozen + scale * (frozen * (trained - means[:, width:])).sum(1)
    return _Terms(from_trained, from_frozen, features)


def _check(trained: Tensor, frozen: Tensor, weight_features: Tensor | None) -> None:
    require_matrix("trained", trained)
    require_matrix("frozen", frozen)
    require_same_layout("frozen", frozen, "trained", trained)
    if weight_features is None:
        return
    require_matrix("weight_features", weight_features)
    if weight_features.shape[0] != trained.shape[0]:
        raise InputError(
            f"weight_features must have one row for each row of trained, got {weight_features.shape[0]} and "
            f"{trained.shape[0]}"
        )
    if weight_features.device != trained.device:
        raise InputError(
            f"weight_features must be on the device of trained, got {weight_features.device} and {trained.device}; "
            f"move it with .to({str(trained.device)!r})"
        )
