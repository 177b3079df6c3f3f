"""The item-item graph of CM3 as index tables: each item's nearest items by what its modalities say.

From "Calibrating Multimodal Recommendation" (arXiv 2508.01226), which has it from FREEDOM. For each modality m, an item's
neighbours are itself and the k - 1 other items with the largest cosine of the raw features; a directed graph, weights
thrown away. The release normalises by out-degrees, which are all k, so that every kept value is 1 / (k + 1e-7), and

    S h = sum_m w_m / (k + 1e-7) sum_{j in N_m(i)} h_j               sum_m w_m = 1, released: image 0.1, text 0.9

a weighted mean over neighbours. Two tables are the whole graph; it is built once and no sparse matrix is needed.

Ours: any number of modalities. An item that lacks one (by its mask, or because its row is all zeros, which in the
release makes it the first neighbour of every item) has no neighbours in it and is nobody's; the weights of the
modalities that it has then sum to 1. An item that has none has S h = 0. The item itself is its neighbour even where k
others have the same features. Equally near items come in the order of their numbers, and the tables are the same on
any device (`zoo.metrics.top_items`).

Time is quadratic in the items, with half of the products that all pairs have; memory is that of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.contracts import require_matrix, require_number, working_dtype
from zoo.metrics.embeddings import require_embeddings
from zoo.metrics.top_items import DEFAULT_MEMORY, largest_entries, nearest_items, topk_items

__all__ = ["ItemGraph", "item_graph", "item_neighbours", "propagate_items"]

_EPSILON = 1e-7


class ItemGraph(NamedTuple):
    """Neighbours of each item in each modality, and what a modality counts for it.

    Made by `item_graph`; both tensors can be stored and put together again by position.
    """

    neighbours: Tensor  # (items, modalities, k) int64; the item's own number where it lacks a modality
    weights: Tensor  # (items, modalities): what each of the k neighbours counts, 0 where the item lacks the modality

    def to(self, device: torch.device | str) -> ItemGraph:
        """The same graph on a device."""
        return ItemGraph(self.neighbours.to(device), self.weights.to(device))


def item_graph(
    features: Sequence[Tensor],
    *,
    k: int = 10,
    modality_weights: Sequence[float] | None = None,
    present: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    memory: int = DEFAULT_MEMORY,
) -> ItemGraph:
    """Find every item's neighbours in every modality.

    Source: section 1.2 of the project's notes on CM3; see the module's docstring for what is ours.

    Args:
        features: one tensor (items, d_m) a modality, raw.
        k: neighbours of each item, itself included, at least 1 and at most the number of items that have the modality.
        modality_weights: w_m, one a modality, not negative and not all 0, here divided by their sum; None for equal ones.
        present: (items, modalities), bool, which item has which modality; None for all. A row of zeros counts as missing
            in any case.
        dtype: of the weights.
        memory: bytes that a block may take.

    Returns:
        The graph, on the device of the features.

    Raises:
        InputError: no modality, no matrices of equally many rows, features that are there and not finite, or an option
            out of range.

    Example:
        >>> image, text = torch.tensor([[1.0, 0], [0, 1], [1, 0.1]]), torch.tensor([[1.0, 0], [1, 0.1], [0, 0]])
        >>> graph = item_graph([image, text], k=2, modality_weights=[1, 3])
        >>> graph.neighbours.tolist()
        [[[0, 2], [0, 1]], [[1, 2], [1, 0]], [[2, 0], [2, 2]]]
        >>> graph.weights
        tensor([[0.1250, 0.3750],
                [0.1250, 0.3750],
                [0.5000, 0.0000]])
    """
    features = list(features)
    shares = _check(features, k, modality_weights, present)
    has = torch.stack([largest_entries(rows) != 0 for rows in features], 1)
    if present is not None:
        has &= present.to(has.device)
    tables = []
    for index, rows in enumerate(features):
        members = has[:, index].nonzero().squeeze(1)
        if len(members) < k:
            raise InputError(
                f"k must be at most the number of items that have a modality, got {k} and {len(members)} with "
                f"features[{index}]"
            )
        table = torch.arange(len(rows), device=rows.device).unsqueeze(1).repeat(1, k)
        part = rows if len(members) == len(rows) else rows[members]
        broken = largest_entries(part).isfinite().logical_not()
        if bool(broken.any()):
            worst = int(members[broken.nonzero()[0, 0]])
            raise InputError(f"features[{index}] must be finite, row {worst} is not; mark it as missing with present")
        table[members, 1:] = members[nearest_items(part, k - 1, memory=memory)]
        tables.append(table)
    weights = has * torch.tensor(shares, dtype=torch.float64, device=has.device)
    total = weights.sum(1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1) / (k + _EPSILON)
    return ItemGraph(torch.stack(tables, 1), weights.to(dtype))


def item_neighbours(queries: Tensor, features: Tensor, k: int, *, memory: int = DEFAULT_MEMORY) -> Tensor:
    """Find the k nearest items of new ones by cosine, for items that come after the graph was built.

    Args:
        queries: raw features (Q, d) of the new items.
        features: raw features (items, d) of those in the graph. Rows of zeros, and those that are not finite, are never
            found.
        k: neighbours, at least 1.
        memory: bytes that a block may take.

    Returns:
        Items (Q, k), int64, the nearest first. A query that is not finite finds nothing, as do places that no item is
        left for: -1.

    Raises:
        InputError: no matrices, or of different width or device, or an option out of range.

    Example:
        >>> item_neighbours(torch.tensor([[1.0, 0.2]]), torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), 2)
        tensor([[2, 0]])
    """
    require_embeddings("features", features)
    zeros = largest_entries(features) == 0
    usable = zeros.logical_not().nonzero().squeeze(1) if bool(zeros.any()) else None
    found = topk_items(queries, features, k, score="cosine", candidates=usable, memory=memory).items
    return F.pad(found, (0, k - found.shape[1]), value=-1)


def propagate_items(graph: ItemGraph, embeddings: Tensor, rows: Tensor | None = None) -> Tensor:
    """The weighted mean S h over neighbours, of all items or of some.

    Differentiable in the embeddings. A loss that needs the items of a batch alone asks for their rows.

    Source: section 1.2 of the project's notes on CM3.

    Args:
        graph: on the device of the embeddings.
        embeddings: h (items, d), of all items.
        rows: whole numbers (R,), the items whose mean is wanted; None for all.

    Returns:
        (items, d) or (R, d) in float32, in float64 if the embeddings are.

    Raises:
        InputError: no matrix in floating point, or rows that are not the graph's items.

    Example:
        >>> graph = ItemGraph(torch.tensor([[[0, 1]], [[1, 0]]]), torch.tensor([[0.5], [0.0]]))
        >>> propagate_items(graph, torch.tensor([[2.0], [4.0]]))
        tensor([[3.],
                [0.]])
    """
    require_matrix("embeddings", embeddings)
    neighbours, weights = graph
    if embeddings.shape[0] != neighbours.shape[0] or embeddings.device != neighbours.device:
        raise InputError(
            f"embeddings must have a row for each of the graph's {neighbours.shape[0]} items on {neighbours.device}, "
            f"got {embeddings.shape[0]} rows on {embeddings.device}"
        )
    if rows is not None:
        neighbours, weights = neighbours[rows], weights[rows]
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = embeddings.to(working_dtype(embeddings))
        each = weights.to(embeddings.dtype).unsqueeze(2).expand(neighbours.shape)
        return F.embedding_bag(neighbours.flatten(1), embeddings, mode="sum", per_sample_weights=each.flatten(1))


def _check(
    features: list[Tensor], k: int, modality_weights: Sequence[float] | None, present: Tensor | None
) -> list[float]:
    if not features:
        raise InputError("features must be one tensor (items, d) a modality, at least one, got none")
    for index, rows in enumerate(features):
        require_embeddings(f"features[{index}]", rows)
        if rows.shape[0] != features[0].shape[0] or rows.device != features[0].device:
            raise InputError(
                f"features[{index}] must have the rows and device of features[0], got {rows.shape[0]} on {rows.device} "
                f"and {features[0].shape[0]} on {features[0].device}"
            )
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    shape = features[0].shape[0], len(features)
    if present is not None and (present.dtype != torch.bool or tuple(present.shape) != shape):
        raise InputError(
            f"present must be bool of shape {shape} (items, modalities), got {present.dtype} of shape "
            f"{tuple(present.shape)}"
        )
    if modality_weights is None:
        return [1 / len(features)] * len(features)
    if len(modality_weights) != len(features):
        raise InputError(f"modality_weights must be {len(features)}, one a modality, got {len(modality_weights)}")
    for weight in modality_weights:
        require_number("modality_weights", weight, positive=False)
    total = float(sum(modality_weights))
    if total == 0:
        raise InputError("modality_weights must not all be 0")
    return [weight / total for weight in modality_weights]
