"""Heads that move the unit embeddings of a frozen encoder within their own space, and start as the identity.

With z the unit embedding of width d, the output is of unit length:

================  =====================  ================================
name              map, before its length  parameters
================  =====================  ================================
``linear``        A z + b                d d + d, A = I and b = 0 at start
``residual_mlp``  z + W2 GELU(W1 z)      2 d h, W2 = 0 at start
================  =====================  ================================

W1 starts at random: were both 0, each would be the factor of the other's gradient and neither would ever move. Heads compute
outside autocast, in the precision of their weights.

Source: the project's notes on arXiv 2505.11895 (section 1); the paper's own head is not known.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError, require_choice
from zoo.pair_evaluation import unit

__all__ = ["CalibratedEncoder", "CalibrationHead", "LinearCalibration", "ResidualCalibration", "build_calibration_head"]

CalibrationHead = Literal["linear", "residual_mlp"]


class LinearCalibration(nn.Linear):
    """An affine map that starts as the identity, and unit length.

    Args:
        dim: width d of the embeddings.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map unit embeddings (B, d) to unit embeddings (B, d)."""
        with torch.autocast(x.device.type, enabled=False):
            return unit(super().forward(x.to(self.weight.dtype)))


class ResidualCalibration(nn.Module):
    """An embedding and what a small network adds to it, nothing at the start, and unit length.

    Args:
        dim: width d of the embeddings.
        width: width h inside.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(width, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map unit embeddings (B, d) to unit embeddings (B, d)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.up.weight.dtype)
            return unit(x + self.up(F.gelu(self.down(x))))


class CalibratedEncoder(nn.Module):
    """A frozen encoder and its head: inputs -> unit embeddings.

    Args:
        encoder: the tower.
        head: the head.

    Attributes:
        output_dim: width D of the embeddings.
    """

    def __init__(self, encoder: Any, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.output_dim = int(encoder.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, …) to unit embeddings (B, D), float32."""
        embeddings: Tensor = self.head(unit(self.encoder.features(x)))
        return embeddings


def build_calibration_head(
    name: CalibrationHead, dim: int, width: int | None = None
) -> LinearCalibration | ResidualCalibration:
    """Build a head that is the identity on unit embeddings.

    Args:
        name: see the table above.
        dim: width d of the embeddings, at least 1.
        width: width h inside ``residual_mlp``, at least 1; d if omitted.

    Raises:
        InputError: there is no such head, or a width is not positive.

    Example:
        >>> head = build_calibration_head("linear", 2)
        >>> torch.equal(head(torch.eye(2)), torch.eye(2))
        True
    """
    require_choice("head", name, get_args(CalibrationHead))
    for argument, value in (("dim", dim), ("head_width", width)):
        if value is not None and value < 1:
            raise InputError(f"{argument} must be positive, got {value}")
    return LinearCalibration(dim) if name == "linear" else ResidualCalibration(dim, width or dim)
