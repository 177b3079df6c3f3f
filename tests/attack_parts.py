"""Both attacks with common arguments, a network that they could disturb, and images for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.attacks import apgd, pgd

__all__ = ["ATTACKS", "Network", "images"]

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "pgd": lambda loss, x, targets=None, *, eps, **options: pgd(
        loss, x, targets, eps=eps, **({"step_size": 0.3 * eps, "steps": 5} | options)
    ),
    "apgd": lambda loss, x, targets=None, **options: apgd(loss, x, targets, **({"steps": 5} | options)),
}


class Network(nn.Module):
    """Convolution, batch norm, a part that changes its input in place, and a curved way to three logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.last = nn.Linear(16, 3)
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        out: Tensor = self.last(torch.tanh(self.bn(self.conv(self.first(x)))).flatten(1))
        return out


def images(count: int = 5) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 2, 4, 4), torch.arange(count) % 3
