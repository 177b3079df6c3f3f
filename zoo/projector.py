"""The map from a student's features to the teacher's width, where the two differ."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Projector"]


class Projector(nn.Module):
    """Map student features to the teacher's width, in training only: batch norm, dropout, linear.

    A batch of one has no variance of its own: it is normalised with the running statistics and leaves them as they are.

    Args:
        in_dim: width of the student's features.
        out_dim: width of the teacher's features.
        dropout: share of features that are dropped, 0 … 1.
    """

    def __init__(self, in_dim: int, out_dim: int, *, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_dim)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_dim, out_dim)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_dim) to (B, out_dim)."""
        if len(x) == 1:
            norm = self.norm
            x = F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
            )
        else:
            x = self.norm(x)
        projected: Tensor = self.linear(self.dropout(x))
        return projected
