"""A tower with a head into a common space."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from zoo import towers
from zoo.features import FeatureTap, OutputTap

__all__ = ["Encoder"]


class Encoder(nn.Module):
    """A tower and, where its width is another than that of the embedding, a linear head without bias.

    Args:
        tower: the tower.
        output_dim: width D of the embedding.

    Attributes:
        network: the plain network of the tower.
        tap: gives its features.
        projection: the head, or the identity.
        output_dim: see above.
        context_length: tokens per text, where the network reads text.
    """

    def __init__(self, tower: towers.Tower, output_dim: int) -> None:
        super().__init__()
        self.network = tower.network
        self.tap: FeatureTap | OutputTap = tower.tap
        for head in tower.tap.heads:
            # The classifier is not used here; DDP would wait for its gradient.
            tower.network.get_submodule(head).requires_grad_(requires_grad=False)
        self.output_dim = output_dim
        length = getattr(tower.network, "context_length", None)
        if length is not None:
            self.context_length = int(length)
            self.vocab_size = int(cast("int", getattr(tower.network, "vocab_size", 49408)))
        self.projection: nn.Module = nn.Identity()
        if tower.dim != output_dim:
            self.projection = nn.Linear(tower.dim, output_dim, bias=False)
            nn.init.normal_(self.projection.weight, std=tower.dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, …) to embeddings (B, output_dim), which are not normalised."""
        embeddings: Tensor = self.projection(self.tap(x)[0])
        return embeddings
