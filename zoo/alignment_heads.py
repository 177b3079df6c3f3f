"""Heads from the features of a frozen encoder into a common space: the only thing that STRUCTURE trains.

With features of width d, embeddings of width D and a rank r:

====================  ===================================================  ==========================
name                  map                                                  parameters
====================  ===================================================  ==========================
``linear``            W x + b                                              d D + D
``low_rank``          P x + alpha W2 dropout(GELU(W1 x))                   d D + r (d + D) + 1
``low_rank_released`` the same with W2 = 0 and alpha = 0                   d D + r (d + D) + 1
``mlp``               W2 ReLU(W1 x + b1) + b2, as wide inside as outside   d D + D + D D + D
====================  ===================================================  ==========================

P starts orthogonal, without a bias. The paper's "MLP" is ``low_rank_released``, as the authors' code builds it: the gate
alpha is the sigmoid of minus infinity and W2 starts at 0. Each of the two is the factor of the other's gradient, so that
neither ever moves and the head is the linear map P. ``low_rank`` (ours) has an open gate, alpha = 0.1 at the start, and
learns.

Source: the authors' code, through the project's notes on it (section 3); the paper's text was not read. The places of the
dropout and the width inside ``mlp`` are ours.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.canonical_correlation import CanonicalHead
from zoo.errors import InputError, nearest

__all__ = ["HeadName", "LinearHead", "LowRankHead", "MLPHead", "build_head"]

HeadName = Literal["linear", "low_rank_released", "low_rank", "mlp"]

_RANK = 64
_DROPOUT = 0.1
_OPEN = 0.1
# Its sigmoid is exactly 0 in every floating-point type, as that of the release's minus infinity; a model with infinite
# values could not be stored.
_SHUT = -1000.0


class LinearHead(nn.Linear):
    """An affine map.

    Args:
        in_dim: width d of the features.
        output_dim: width D of the embeddings.
    """

    def __init__(self, in_dim: int, output_dim: int) -> None:
        super().__init__(in_dim, output_dim)
        self.in_dim = in_dim
        self.output_dim = output_dim


class LowRankHead(nn.Module):
    """An orthogonal map and a gated branch of low rank.

    Args:
        in_dim: width d of the features.
        output_dim: width D of the embeddings.
        live: start with an open gate; otherwise the branch stays 0 for ever, as in the release.
        rank: width r inside the branch.
        dropout: share of the branch's hidden values that are left out in training, in [0, 1).
    """

    def __init__(
        self, in_dim: int, output_dim: int, *, live: bool, rank: int = _RANK, dropout: float = _DROPOUT
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.output_dim = output_dim
        self.projection = nn.Linear(in_dim, output_dim, bias=False)
        nn.init.orthogonal_(self.projection.weight)
        self.down = nn.Linear(in_dim, rank, bias=False)
        self.up = nn.Linear(rank, output_dim, bias=False)
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.tensor(math.log(_OPEN / (1 - _OPEN)) if live else _SHUT))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, d) to embeddings (B, D), which are not normalised."""
        branch: Tensor = self.up(self.dropout(F.gelu(self.down(x))))
        embeddings: Tensor = self.projection(x) + self.gate.sigmoid() * branch
        return embeddings


class MLPHead(nn.Sequential):
    """Two affine maps with a ReLU between them.

    Args:
        in_dim: width d of the features.
        output_dim: width D of the embeddings, and inside.
    """

    def __init__(self, in_dim: int, output_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, output_dim), nn.ReLU(), nn.Linear(output_dim, output_dim))
        self.in_dim = in_dim
        self.output_dim = output_dim


def build_head(
    name: HeadName | Literal["canonical"], in_dim: int, output_dim: int
) -> LinearHead | LowRankHead | MLPHead | CanonicalHead:
    """Build a head with random weights.

    Args:
        name: see the table above; ``"canonical"`` is the linear head of `zoo.canonical_correlation`, which is no choice of
            its own: it comes with the objective.
        in_dim: width d of the features, at least 1.
        output_dim: width D of the embeddings, at least 1.

    Raises:
        InputError: there is no such head, or a width is not positive.

    Example:
        >>> head = build_head("linear", 768, 512)
        >>> sum(parameter.numel() for parameter in head.parameters()) == 768 * 512 + 512
        True
    """
    known = ("linear", "low_rank_released", "low_rank", "mlp")
    if name not in (*known, "canonical"):
        raise InputError(f"head must be one of {', '.join(known)}, got {name!r}.{nearest(name, known)}")
    for argument, width in (("in_dim", in_dim), ("embed_dim", output_dim)):
        if width < 1:
            raise InputError(f"{argument} must be positive, got {width}")
    if name == "canonical":
        return CanonicalHead(in_dim, output_dim)
    if name == "linear":
        return LinearHead(in_dim, output_dim)
    if name == "mlp":
        return MLPHead(in_dim, output_dim)
    return LowRankHead(in_dim, output_dim, live=name == "low_rank")
