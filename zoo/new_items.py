"""Items that come after training: their features, checked, and their nearest items among those of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zoo.errors import InputError, nearest
from zoo.item_graph import ItemGraph, item_neighbours
from zoo.metrics.top_items import largest_entries

__all__ = ["known_rows", "nearest_known", "new_rows"]

_EPSILON = 1e-7  # of `zoo.item_graph`


def new_rows(
    features: Mapping[str, Tensor], widths: Mapping[str, int], *, items: int, like: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Check the features of new items.

    Args:
        features: modality -> (n, D_m); a modality may be left out. A row of zeros is an item that lacks it.
        widths: modality -> D_m.
        items: n.
        like: a tensor of the device and dtype that are wanted.

    Returns:
        Features of all modalities, zeros where they are missing; and (n, M), bool, which item has which modality, in the
        order of the modalities' names.

    Raises:
        InputError: an unknown modality, none at all, or rows that do not fit.
    """
    for name in features:
        if name not in widths:
            raise InputError(
                f"features[{name!r}]: the model has the modalities {', '.join(widths)}.{nearest(name, widths)}"
            )
    if not features:
        raise InputError(f"features must have at least one of the modalities {', '.join(widths)}, got none")
    found = {}
    for name in sorted(widths):
        rows = features[name] if name in features else like.new_zeros(items, widths[name])
        if tuple(rows.shape) != (items, widths[name]) or not bool(rows.isfinite().all()):
            raise InputError(
                f"features[{name!r}] must be finite and of shape {(items, widths[name])}, got {tuple(rows.shape)}"
            )
        found[name] = rows.to(like)
    return found, torch.stack([largest_entries(rows) != 0 for rows in found.values()], 1)


def known_rows(
    given: Mapping[str, Tensor] | None, stored: Tensor | None, widths: Mapping[str, int], *, items: int
) -> dict[str, Tensor]:
    """Return the features of the items of training, from what is given or else from what is stored.

    Args:
        given: modality -> (I, D_m), or None.
        stored: (I, sum of D_m), modalities in the order of their names, or None.
        widths: modality -> D_m.
        items: I.

    Raises:
        InputError: neither is there, or their shape is another.
    """
    names = sorted(widths)
    if given is None:
        if stored is None:
            raise InputError(
                "new items need their neighbours among the items of training, whose features are not stored: train with "
                "keep_features=True, or give known_features"
            )
        if tuple(stored.shape) != (items, sum(widths.values())):
            raise InputError("the stored features are not whole: store or pull the model anew")
        return dict(zip(names, stored.float().split_with_sizes([widths[name] for name in names], 1), strict=True))
    for name in names:
        if name not in given or tuple(given[name].shape) != (items, widths[name]):
            raise InputError(
                f"known_features[{name!r}] must have shape {(items, widths[name])}, one row an item of training"
            )
    return {name: given[name].float() for name in names}


def nearest_known(
    features: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
    present: Tensor,
    *,
    k: int,
    modality_weights: Sequence[float],
) -> ItemGraph:
    """Find the neighbours of new items, of which each is itself the first.

    Args:
        features: modality -> (n, D_m), of the new items, modalities in the order of their names.
        known: modality -> (I, D_m), of the items of training.
        present: (n, M), bool, which new item has which modality.
        k: neighbours, itself included.
        modality_weights: what a modality counts, here divided by the sum over those that an item has.

    Returns:
        Neighbours (n, M, k - 1), the item itself left out, and weights (n, M), 0 where it lacks a modality.

    Example:
        >>> known = {"image": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
        >>> new = {"image": torch.tensor([[0.1, 1.0]])}
        >>> nearest_known(new, known, torch.tensor([[True]]), k=2, modality_weights=[1.0])
        ItemGraph(neighbours=tensor([[[1]]]), weights=tensor([[0.5000]]))
    """
    tables = []
    for name, rows in features.items():
        others = known[name].to(rows.device)
        found = (
            item_neighbours(rows.float(), others, k - 1) if k > 1 else rows.new_zeros(len(rows), 0, dtype=torch.int64)
        )
        tables.append(found.clamp_min(0))
    weights = present * torch.tensor(modality_weights, dtype=torch.float64).to(present.device)
    total = weights.sum(1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1) / (k + _EPSILON)
    return ItemGraph(torch.stack(tables, 1), weights.float())
