"""Random cases of CWCL, and its formula written densely, with the matrix of weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dense_directions", "dense_weights", "double", "random_case"]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_case(count: int = 11, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    trained, frozen = (torch.randn(count, 5, dtype=dtype).requires_grad_() for _ in range(2))
    return trained, frozen, torch.randn(count, 4, dtype=dtype)


def dense_weights(features: Tensor, kernel: str, options: dict[str, Any]) -> Tensor:
    cosines = (F.normalize(features, dim=1) @ F.normalize(features, dim=1).t()).clamp(-1, 1)
    weights = ((1 + cosines) / 2) ** options.get("exponent", 1.0)
    if kernel == "exp":
        weights = ((cosines - 1) / options["kernel_temperature"]).exp()
    if kernel == "topk":
        lowest = cosines.topk(options["neighbours"], dim=1).values[:, -1:]
        weights = weights * (cosines >= lowest - 1e-6)
    return weights / weights.sum(1, keepdim=True)


def dense_directions(
    trained: Tensor, frozen: Tensor, weights: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted from the trained side, plain from the frozen side, weighted from the frozen side."""
    scores = scale * F.normalize(trained, dim=1) @ F.normalize(frozen, dim=1).t()
    weighted = -(weights * scores.log_softmax(1)).sum(1).mean()
    reverse = -(weights * scores.t().log_softmax(1)).sum(1).mean()
    return weighted, F.cross_entropy(scores.t(), torch.arange(len(trained))), reverse
