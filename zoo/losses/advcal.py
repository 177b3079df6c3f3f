"""Objectives of adversarial calibration: a head on a frozen encoder that undoes what an attack does to embeddings.

Liao, Ren, Mei, Zheng: "Adversarial Robustness for Unified Multi-Modal Encoders via Efficient Calibration" (arXiv
2505.11895v1). Reconstructed from the abstract: no equation of the paper was seen. The abstract names three objectives, to
be compared and not summed, and a regularisation for alignment across modalities. With the clean embedding z = unit(f(x)),
the head's output on the attacked input y' = unit(head(f(x'))), on the clean one y, and c_kj the centres of class k, which
are all of unit length and constants but for y and y':

    centre_cross_entropy          -1/N sum_i log softmax_k( scale * pool_j <y'_i, c_kj> )[label_i]
    clean_adversarial_l2           1/N sum_i || y'_i - z_i ||^2
    clean_adversarial_info_nce    -1/N sum_i log softmax_j( <y'_i, z_j> / temperature )[i]
    calibration_consistency        1/N sum_i || y_i - z_i ||^2  +  1/N sum_i KL( p(z_i) || p(y'_i) ),
                                   p(e) = softmax_k( scale * pool_j <e, c_kj> )

The form of the last is ours: since all modalities share the centres, a modality that keeps its distribution over them
stays where the others can find it. So are the temperature and the scale, and `lme` among the ways to pool.

All unit vectors are made here, so that the length of an embedding is no matter; a vector shorter than 1e-6 counts as zeros
with gradient 0. All is computed in float32 (float64 stays), whatever comes in. NaN gives NaN, an empty batch gives 0, still
connected to its features.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.errors import InputError
from zoo.losses.centres import Pool, pooled_similarities
from zoo.losses.contracts import (
    require_labels,
    require_matrix,
    require_number,
    require_same_layout,
    unit_rows,
    working_dtype,
)
from zoo.losses.contrastive import batch_mean
from zoo.losses.pairwise import pairwise_logsumexp, tile_shape
from zoo.losses.ranks import gather_rows, rank_and_size, require_equal_batches
from zoo.losses.tiles import LINEAR_FROM

__all__ = [
    "calibration_consistency",
    "centre_cross_entropy",
    "centre_divergence",
    "clean_adversarial_info_nce",
    "clean_adversarial_l2",
]


def centre_cross_entropy(
    embeddings: Tensor,
    centres: Tensor,
    labels: Tensor,
    *,
    scale: float = 100.0,
    pool: Pool = "mean_centre",
    mask: Tensor | None = None,
    sharpness: float = 1000.0,
) -> Tensor:
    """Cross-entropy of classes that are told by their centres, averaged over the batch.

    Args:
        embeddings: (B, D) in floating point, of any length: the head's output on attacked inputs.
        centres: as for `pooled_similarities`.
        labels: (B,) integers in 0 … K - 1.
        scale: factor of the cosines, at least 0; 100 as in CLIP. At 100 a sure sample's gradient is far below float16.
        pool: as for `pooled_similarities`.
        mask: as for `pooled_similarities`.
        sharpness: as for `pooled_similarities`.

    Returns:
        A scalar of at least 0 in nats, log K where all cosines are equal; in float32, in float64 if `embeddings` are.

    Raises:
        InputError: as `pooled_similarities`, labels that do not fit, or a scale that is negative or not finite.

    Example:
        >>> centre_cross_entropy(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
        tensor(0.)
    """
    require_number("scale", scale, positive=False)
    logits = scale * pooled_similarities(embeddings, centres, pool=pool, mask=mask, sharpness=sharpness)
    require_labels("labels", labels, rows=len(embeddings), classes=len(centres))
    return batch_mean(F.cross_entropy(logits, labels.long(), reduction="none"), gather=False)


def clean_adversarial_l2(attacked: Tensor, clean: Tensor) -> Tensor:
    """Squared distance of unit vectors, summed over dimensions and averaged over the batch: 2 - 2 cos.

    Args:
        attacked: (B, D) in floating point, of any length: the head's output.
        clean: (B, D), of any length: the frozen encoder's embeddings of the clean inputs, constants.

    Returns:
        A scalar in 0 … 4; in float32, in float64 if `attacked` is.

    Raises:
        InputError: shapes, types or devices that do not fit.

    Example:
        >>> clean_adversarial_l2(torch.eye(2), torch.eye(2).flip(0))
        tensor(2.)
    """
    unit, constant = _sides(attacked, clean)
    with torch.autocast(attacked.device.type, enabled=False):
        # Of the difference, and not 2 - 2 cos, which loses all of a small distance to rounding.
        return batch_mean((unit - constant).square().sum(1), gather=False)


def clean_adversarial_info_nce(
    attacked: Tensor,
    clean: Tensor,
    *,
    temperature: float = 0.07,
    symmetric: bool = False,
    labels: Tensor | None = None,
    gather: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of finding each attacked sample's own clean embedding among those of the batch.

    Args:
        attacked: (B, D) in floating point, of any length: the head's output.
        clean: (B, D), of any length: the frozen encoder's embeddings of the clean inputs, constants.
        temperature: divides the cosines, above 0.
        symmetric: whether to take the mean with the other direction, clean embeddings among attacked ones.
        labels: (B,) integers; samples of one label are then no negatives of each other. A sample without negatives costs 0.
        gather: whether the batch is that of all processes, which must be equally large; the mean of the gradients over
            processes is then the exact one. Nothing changes without a process group.
        chunk_size: rows and columns of a tile (with labels: rows of a block), at least 1; None chooses. It changes memory,
            not the value.

    Returns:
        A scalar of at least 0 in nats; in float32, in float64 if `attacked` is. A sample's value depends on its batch.

    Raises:
        InputError: shapes, types, devices or labels that do not fit, a temperature that is not above 0, a chunk size below
            1, or unequal batches under `gather`.

    Example:
        Two of one class are no negatives, and nothing is left to tell apart:

        >>> clean_adversarial_info_nce(torch.eye(2), torch.eye(2), labels=torch.tensor([3, 3]))
        tensor(0.)
    """
    require_number("temperature", temperature, positive=True)
    unit, constant = _sides(attacked, clean)
    if labels is not None:
        return _info_nce_of_others(
            unit, constant, labels, scale=1 / temperature, symmetric=symmetric, gather=gather, chunk_size=chunk_size
        )
    sums = pairwise_logsumexp(
        unit, constant, scale=1 / temperature, columns=symmetric, gather=gather, chunk_size=chunk_size
    )
    return batch_mean((sums.rows + sums.columns) / 2 if symmetric else sums.rows, gather=gather)


def centre_divergence(
    attacked: Tensor,
    clean: Tensor,
    centres: Tensor,
    *,
    scale: float = 100.0,
    pool: Pool = "mean_centre",
    mask: Tensor | None = None,
    sharpness: float = 1000.0,
) -> Tensor:
    """KL divergence of an attacked sample's distribution over classes from its clean one's, averaged over the batch.

    Args:
        attacked: (B, D) in floating point, of any length: the head's output.
        clean: (B, D), of any length: the frozen encoder's embeddings of the clean inputs, constants.
        centres: as for `pooled_similarities`.
        scale: as for `centre_cross_entropy`.
        pool: as for `pooled_similarities`.
        mask: as for `pooled_similarities`.
        sharpness: as for `pooled_similarities`.

    Returns:
        A scalar of at least 0 in nats, KL( p(clean) || p(attacked) ); in float32, in float64 if `attacked` is.

    Raises:
        InputError: as `centre_cross_entropy`.

    Example:
        >>> centre_divergence(torch.eye(2), torch.eye(2), torch.eye(2))
        tensor(0.)
    """
    require_number("scale", scale, positive=False)
    _check_sides(attacked, clean)
    cosines = partial(pooled_similarities, centres=centres, pool=pool, mask=mask, sharpness=sharpness)
    with torch.autocast(attacked.device.type, enabled=False):
        found = (scale * cosines(attacked)).log_softmax(1)
        constant = clean.detach().to(found.dtype)
        wanted = (scale * cosines(constant)).log_softmax(1)
        values = F.kl_div(found, wanted.detach(), reduction="none", log_target=True).sum(1)
        return batch_mean(values, gather=False)


def calibration_consistency(
    attacked: Tensor,
    clean: Tensor,
    centres: Tensor,
    *,
    clean_head: Tensor | None = None,
    scale: float = 100.0,
    pool: Pool = "mean_centre",
    mask: Tensor | None = None,
    sharpness: float = 1000.0,
) -> Tensor:
    """Keep a modality where the others find it: R_id + R_kl, averaged over the batch.

    R_id is `clean_adversarial_l2(clean_head, clean)`: the head is to leave clean embeddings alone. R_kl is
    `centre_divergence(attacked, clean, centres)`: an attack is not to move a sample's distribution over classes.

    Args:
        attacked: (B, D) in floating point, of any length: the head's output on attacked inputs.
        clean: (B, D), of any length: the frozen encoder's embeddings of the clean inputs, constants.
        centres: as for `pooled_similarities`.
        clean_head: (B, D), of any length: the head's output on the clean inputs; R_id is left out without it, for
            training on attacked samples only.
        scale: as for `centre_cross_entropy`.
        pool: as for `pooled_similarities`.
        mask: as for `pooled_similarities`.
        sharpness: as for `pooled_similarities`.

    Returns:
        A scalar of at least 0; in float32, in float64 if `attacked` is.

    Raises:
        InputError: as `centre_divergence` and `clean_adversarial_l2`.

    Example:
        >>> calibration_consistency(torch.eye(2), torch.eye(2), torch.eye(2), clean_head=torch.eye(2).flip(0))
        tensor(2.)
    """
    divergence = centre_divergence(attacked, clean, centres, scale=scale, pool=pool, mask=mask, sharpness=sharpness)
    return divergence if clean_head is None else divergence + clean_adversarial_l2(clean_head, clean)


def _check_sides(attacked: Tensor, clean: Tensor) -> None:
    require_matrix("attacked", attacked)
    require_matrix("clean", clean)
    require_same_layout("clean", clean, "attacked", attacked)


def _sides(attacked: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of both sides in the working precision, the second without a graph."""
    _check_sides(attacked, clean)
    with torch.autocast(attacked.device.type, enabled=False):
        dtype = working_dtype(attacked)
        return unit_rows(attacked.to(dtype)), unit_rows(clean.detach().to(dtype))


def _info_nce_of_others(
    attacked: Tensor,
    clean: Tensor,
    labels: Tensor,
    *,
    scale: float,
    symmetric: bool,
    gather: bool,
    chunk_size: int | None,
) -> Tensor:
    """InfoNCE without the negatives that share a sample's label, in blocks of rows that the backward pass makes again."""
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (len(attacked),):
        raise InputError(
            f"labels must be one integer a sample, shape ({len(attacked)},), got shape {tuple(labels.shape)} of "
            f"{labels.dtype}"
        )
    block = tile_shape(chunk_size, attacked.device)[0]
    rank, size = rank_and_size(gather=gather)
    if size > 1:
        require_equal_batches(attacked, clean, labels)
    all_labels = gather_rows(labels) if size > 1 else labels
    own = torch.arange(len(labels), device=labels.device) + rank * len(labels)
    sides = [(attacked, clean), (clean, attacked)] if symmetric else [(attacked, clean)]
    values = []
    for queries, keys in sides:
        everyone = gather_rows(keys) if size > 1 else keys
        scaled = scale * queries
        parts = [
            checkpoint(
                _block_of_others, scaled[rows], everyone, labels[rows], all_labels, own[rows],
                use_reentrant=False, preserve_rng_state=False,
            )
            for rows in (slice(start, start + block) for start in range(0, len(queries), block))
        ]  # fmt: skip
        values.append(torch.cat(parts) if parts else scaled.sum(1))
    return batch_mean(torch.stack(values).mean(0), gather=gather)


def _block_of_others(queries: Tensor, keys: Tensor, labels: Tensor, all_labels: Tensor, own: Tensor) -> Tensor:
    """log(1 + sum_j exp(l_ij - l_ii)) of some rows, over the samples j of other labels."""
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries @ keys.t()
        positive = scores.gather(1, own.unsqueeze(1)).squeeze(1)
        # Lowest but finite: a row without negatives has the loss 0 and the gradient 0, and not NaN.
        others = scores.masked_fill(labels.unsqueeze(1) == all_labels, torch.finfo(scores.dtype).min).logsumexp(1)
        return F.softplus(others - positive, threshold=LINEAR_FROM)
