"""Recommenders without features, the controls of multimodal ones: LightGCN and popularity.

He et al.: LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation, SIGIR 2020, arXiv 2002.02126.
With E the embeddings of users and items, R their mean over layers of propagation (`zoo.interaction_graph`), and for user u,
an item i of theirs and a sampled item j::

    L = mean -log sigmoid(<R_u, R_i> - <R_u, R_j>) + weight_decay mean (|E_u|^2 + |E_i|^2 + |E_j|^2) / 2

Popularity is the number of an item's interactions in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import InputError, require_choice
from zoo.interaction_graph import propagate_interactions
from zoo.losses.contracts import working_dtype
from zoo.recommender import RecommenderModule

__all__ = ["RecommenderBaseline"]

_SCALE = 0.1  # standard deviation of LightGCN's start


class RecommenderBaseline(RecommenderModule):
    """Recommend by interactions alone.

    It takes the same data as `CM3`, evaluates, stores and serves in the same way, and reads no features.

    Logged: ``train/loss`` and ``val/recall@20`` and so on, as `CM3` does.

    Args:
        kind: ``"lightgcn"`` or ``"popularity"``.
        num_users: number of users; taken from the data, as is the next.
        num_items: number of items.
        dim: width of the embeddings.
        hops: hops over the interactions.
        score: ``"dot"`` or ``"cosine"``; popularity needs ``"dot"``.
        k: lengths of the lists in evaluation.
        mask_validation: whether the test leaves out the items of validation as well.
        lr: learning rate of the default optimizer, Adam.
        weight_decay: weight of the squared lengths in the loss.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> RecommenderBaseline(num_users=3, num_items=5, dim=2).recommender.embeddings.shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        *,
        kind: Literal["lightgcn", "popularity"] = "lightgcn",
        num_users: int | None = None,
        num_items: int | None = None,
        dim: int = 64,
        hops: int = 3,
        score: Literal["dot", "cosine"] = "dot",
        k: Sequence[int] = (5, 10, 20, 50),
        mask_validation: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        require_choice("kind", kind, ("lightgcn", "popularity"))
        if kind == "popularity" and score != "dot":
            raise InputError(f"kind='popularity' has one number an item: score must be 'dot', got {score!r}")
        super().__init__(
            num_users=num_users,
            num_items=num_items,
            score=score,
            k=k,
            mask_validation=mask_validation,
        )
        for name, value, lowest in (("dim", dim, 1), ("hops", hops, 0), ("weight_decay", weight_decay, 0)):
            if not lowest <= value < float("inf"):
                raise InputError(f"{name} must be finite and at least {lowest}, got {value}")
        if not 0 < lr < float("inf"):
            raise InputError(f"lr must be positive, got {lr}")
        self.kind = kind
        self.dim = dim
        self.hops = hops
        self.lr = lr
        self.weight_decay = weight_decay
        if None not in (num_users, num_items):
            self.recommender = self.build()

    def build(self) -> nn.Module:
        """Return the parameters for the sizes that are known."""
        assert self.num_users is not None
        assert self.num_items is not None
        if self.kind == "popularity":
            return _Table(torch.zeros(self.num_items, 1), learned=False)
        return _Table(_SCALE * torch.randn(self.num_users + self.num_items, self.dim), learned=True)

    def fill(self) -> None:
        """Count the interactions of the items."""
        if self.kind == "popularity":
            counts = torch.bincount(self.seen().columns, minlength=self.num_items or 0)
            with torch.no_grad():
                self._rows.copy_(counts.unsqueeze(1))

    @property
    def _rows(self) -> Tensor:
        if self.recommender is None:
            raise InputError("the model has no parameters yet: fit it, or load a stored one")
        return cast("_Table", self.recommender).embeddings

    def embed(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings (users, d) and (items, d)."""
        rows = self._rows.to(working_dtype(self._rows))
        if self.kind == "popularity":
            return rows.new_ones(self.num_users or 0, 1), rows
        rows = propagate_interactions(self.graph(), rows, hops=self.hops, readout="mean")
        users, items = rows.tensor_split([self.num_users or 0])
        return users, items

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch; 0 for popularity, which learns nothing."""
        loss = self.loss(batch) if self.kind == "lightgcn" else torch.zeros((), device=self.device, requires_grad=True)
        self.log("train/loss", loss, batch_size=len(batch["user"]))
        return loss

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of LightGCN.

        Args:
            batch: ``user``, ``positive`` and ``negative``, (B,) each.
        """
        users, items = self.embed()
        user, positive, negative = users[batch["user"]], items[batch["positive"]], items[batch["negative"]]
        ranking = F.softplus((user * (negative - positive)).sum(1)).mean()
        first = self.num_users or 0
        own = torch.stack([batch["user"], batch["positive"] + first, batch["negative"] + first])
        squares: Tensor = self._rows[own].square().sum((0, 2)).mean() / 2
        return ranking + self.weight_decay * squares

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Return Adam, or None for popularity."""
        return torch.optim.Adam(self.parameters(), lr=self.lr) if self.kind == "lightgcn" else None


class _Table(nn.Module):
    """Embeddings, learned or counted."""

    def __init__(self, embeddings: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings, requires_grad=learned)
