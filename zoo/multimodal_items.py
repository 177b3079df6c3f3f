"""Items as points on the sphere: one part a modality, and one that fuses them.

The item side of CM3 ("Calibrating Multimodal Recommendation", arXiv 2508.01226, sections 1.1 to 1.4 of the project's notes
on its release). For each modality m, with raw features F_m:

    x_m = W2 LeakyReLU(W1 F_m + b1)          p_m = V F_m + c          fused = a point of the curve that the p_m span

W1 and V read the same matrix, which is the bulk of the work of a step: they are one layer here, the rows of V behind those
of W1. An item without a modality has zeros for x_m, and its curve leaves p_m out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.losses.contracts import unit_rows
from zoo.losses.spherical import BezierMode, spherical_bezier

__all__ = ["ItemEncoders", "ItemParts"]

ItemParts = tuple[Tensor, Tensor]
_EXPANSION = 4


class _ModalityEncoder(nn.Module):
    """x_m and p_m of one modality; the raw features are read once."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.reader = nn.Linear(width, (_EXPANSION + 1) * dim)
        self.out = nn.Linear(_EXPANSION * dim, dim, bias=False)
        with torch.no_grad():
            nn.init.xavier_normal_(self.reader.weight[_EXPANSION * dim :])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden, point = self.reader(features).split([_EXPANSION * self.dim, self.dim], dim=1)
        return self.out(F.leaky_relu(hidden)), point


class ItemEncoders(nn.Module):
    """Encoders of all modalities of the items, in the order of their names.

    Args:
        widths: modality -> width D_m of its raw features.
        dim: d, width of a part.
        mode: how three and more modalities are fused, see `zoo.losses.spherical_bezier`.

    Example:
        >>> encoders = ItemEncoders({"image": 5, "text": 3}, 2)
        >>> features = {"image": torch.randn(4, 5), "text": torch.randn(4, 3)}
        >>> parts, fused = encoders(features, torch.ones(4, 2, dtype=torch.bool), 0.5)
        >>> parts.shape, fused.shape
        (torch.Size([4, 6]), torch.Size([4, 2]))
    """

    def __init__(self, widths: Mapping[str, int], dim: int, *, mode: BezierMode = "de_casteljau") -> None:
        super().__init__()
        self.mode = mode
        self.names = sorted(widths)
        self.encoders = nn.ModuleList(_ModalityEncoder(widths[name], dim) for name in self.names)

    def forward(self, features: Mapping[str, Tensor], present: Tensor, weight: float | Tensor) -> ItemParts:
        """Encode items.

        Args:
            features: modality -> raw features (I, D_m), finite; the rows of items that lack it do not count.
            present: (I, M), bool, modalities in the order of their names.
            weight: lambda, weight of the first of each pair of modalities: one for all or (I,).

        Returns:
            The unit parts of all modalities and of the fused features, (I, (M + 1) d), where a modality that an item lacks
            has zeros; and the fused unit features alone, (I, d). Both float32, float64 for such features.
        """
        parts, points = [], []
        for column, (name, encoder) in enumerate(zip(self.names, self.encoders, strict=True)):
            part, point = cast("_ModalityEncoder", encoder)(features[name])
            part = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
            parts.append(torch.where(present[:, column, None], unit_rows(part), 0))
            points.append(point)
        fused = spherical_bezier(points, weight, mode=self.mode, present=present)
        return torch.cat([*parts, fused], 1), fused
