"""A frozen encoder and the head that was trained behind it, as one network that stands alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.frozen_layers import layer_features
from zoo.pair_evaluation import unit
from zoo.towers import Tower

__all__ = ["AlignedEncoder"]


class AlignedEncoder(nn.Module):
    """One side as a network that stands alone: inputs -> unit embeddings, by the frozen tower, its layer and the head.

    Args:
        tower: the frozen tower.
        layer: the layer that feeds the head.
        head: the head.
        pad_id: of the text tower, as for `zoo.frozen_layers.layer_features`.

    Attributes:
        output_dim: width D of the embeddings.
    """

    def __init__(self, tower: Tower, layer: str, head: Any, *, pad_id: int | None) -> None:
        super().__init__()
        self.tower = tower
        self.head = head
        self.layer = layer
        self.pad_id = pad_id
        self.output_dim = int(head.output_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, …) to unit embeddings (B, D), float32."""
        features = layer_features(self.tower, x, self.layer, pad_id=self.pad_id)
        return unit(self.head(features.to(next(self.head.parameters()).dtype)))
