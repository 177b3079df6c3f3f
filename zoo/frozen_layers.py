"""A layer of a frozen tower as an encoder of its own, and the choice of a pair of layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from zoo.errors import InputError
from zoo.layer_features import pool_layer
from zoo.layer_selection import LayerScores, block_names, extract_layers, select_layers
from zoo.metrics.mutual_knn import NeighbourRule
from zoo.towers import Tower

__all__ = ["FEATURES", "choose_layers", "layer_features", "layer_width"]

FEATURES = "features"
"""The name that stands for a tower's own features instead of one of its layers: the input of its classifier, its
embedding, or precomputed features."""


class _Features(nn.Module):
    """A tower whose only layer is its features."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(self.tower.features(x))
        return features


def layer_features(tower: Tower, x: Tensor, layer: str, *, pad_id: int | None = None) -> Tensor:
    """Return what a layer of a frozen tower says, one vector an input; with a graph only where the inputs have one.

    Args:
        tower: the tower.
        x: its inputs (B, …).
        layer: name of the layer, pooled as `zoo.layer_selection.extract_layers` does, or `FEATURES`.
        pad_id: the token number of padding; the network's own if omitted.

    Returns:
        Features (B, D), on the device of the tower.

    Raises:
        InputError: there is no such layer, or its output cannot be pooled.
    """
    if layer == FEATURES:
        return tower.features(x)
    return pool_layer(tower, x, layer, pad_id=_padding(tower, pad_id))  # type: ignore[no-any-return]


def layer_width(tower: Tower, loader: Iterable[Any], layer: str, *, modality: str, pad_id: int | None = None) -> int:
    """Return the width of a layer, from one sample.

    Args:
        tower: the tower.
        loader: batches with the modality.
        layer: as for `layer_features`.
        modality: "image" or "text", a key of the batches.
        pad_id: as for `layer_features`.

    Raises:
        InputError: as for `layer_features`, or there are no samples.
    """
    if layer == FEATURES:
        return tower.dim
    return _extract(tower, loader, layer, modality=modality, pad_id=pad_id, max_samples=1)[layer].shape[1]


def choose_layers(
    image: Tower,
    text: Tower,
    loader: Iterable[Any],
    *,
    layer_choice: Literal["select", "last"],
    image_layer: str | None = None,
    text_layer: str | None = None,
    k: int | NeighbourRule = "rice",
    max_samples: int = 5000,
    pad_id: int | None = None,
) -> tuple[tuple[str, str], LayerScores | None]:
    """Choose the layers of two towers at which their neighbourhoods are most alike, or the last ones.

    The candidates are the blocks, and what goes into the first block of a text tower. A tower without blocks has one
    candidate, `FEATURES`. See `zoo.layer_selection` for the score.

    Args:
        image: the image tower.
        text: the text tower.
        loader: pairs, under the evaluation transform.
        layer_choice: "select" scores all pairs of candidates, "last" takes the last block of each tower.
        image_layer: the only candidate of its tower, if given.
        text_layer: the same.
        k: number of neighbours, or its rule.
        max_samples: number of pairs that the scores come from, at most.
        pad_id: the token number of padding; the network's own if omitted.

    Returns:
        The names of the two layers, and the scores of all pairs, or None with "last".

    Raises:
        InputError: see `extract_layers` and `select_layers`.
    """
    if layer_choice == "last" or (image_layer is not None and text_layer is not None):
        return (image_layer or _blocks(image)[-1], text_layer or _blocks(text)[-1]), None
    candidates = [
        _extract(tower, loader, layer, modality=modality, pad_id=pad_id, max_samples=max_samples)
        for tower, layer, modality in ((image, image_layer, "image"), (text, text_layer, "text"))
    ]
    scores = select_layers(*candidates, k=k)
    return scores.best, scores


def _extract(
    tower: Tower, loader: Iterable[Any], layer: str | None, *, modality: str, pad_id: int | None, max_samples: int
) -> dict[str, Tensor]:
    if layer == FEATURES or (layer is None and _blocks(tower) == (FEATURES,)):
        return extract_layers(
            _Features(tower), loader, [FEATURES], modality=modality, pad_id=-1, max_samples=max_samples
        )
    wanted = None if layer is None else [layer]
    return extract_layers(
        tower, loader, wanted, modality=modality, pad_id=_padding(tower, pad_id), max_samples=max_samples
    )


def _blocks(tower: Tower) -> tuple[str, ...]:
    try:
        return block_names(tower.network)
    except InputError:
        return (FEATURES,)


def _padding(tower: Tower, pad_id: int | None) -> int | None:
    """The number that was given, or that a module inside a wrapper (a stored model's encoder) knows."""
    if pad_id is not None:
        return pad_id
    known = (getattr(module, "pad_id", None) for module in tower.network.modules())
    return next((number for number in known if isinstance(number, int)), None)
