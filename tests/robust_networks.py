"""Networks whose accuracy under attack is known: linear ones with two classes, far from the ends of the valid range.

With w = w_1 - w_0 and b = b_1 - b_0, a sample of class 1 has the margin w x + b, one of class 0 the negative of it. The
worst that a change of at most r in each entry can do to the margin is r ||w||_1, and one of length r takes r ||w||_2. An
attack along the gradient of another network, of weights u, goes by r sign(u) and takes r w sign(u).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Linear", "margins", "samples"]

SIDE = 4


def samples(count: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs (B, 1, 4, 4) in 0.35 … 0.65, and labels of which some are wrong for each network."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.35 + 0.3 * torch.rand(count, 1, SIDE, SIDE, generator=generator)
    return x, (Linear(0)(x).argmax(1) + (torch.rand(count, generator=generator) < 0.1)) % 2


class Linear(nn.Module):
    """Two classes from 16 entries, a boundary through the middle of the samples."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(SIDE**2, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(2, SIDE**2, generator=generator))
            self.linear.bias.copy_(-0.5 * self.linear.weight.sum(1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def margins(network: Linear, x: Tensor, labels: Tensor, drop: Tensor | float = 0.0) -> Tensor:
    """The margin of each sample (B,), less what an attack takes; positive where the network is right."""
    weight = (network.linear.weight[1] - network.linear.weight[0]).detach()
    bias = (network.linear.bias[1] - network.linear.bias[0]).detach()
    return (x.flatten(1) @ weight + bias) * (2 * labels - 1) - drop


def direction(network: Linear) -> Tensor:
    """w, (16,)."""
    return (network.linear.weight[1] - network.linear.weight[0]).detach()
