"""The small network of NormGrad's golden values, and those values.

Source: ``golden/normgrad.json`` of the project's notes, copied to ``tests/normgrad_golden.json``. It was made by inserting
identity layers and taking gradients of their weights, with the gradient of the output masked to one place at a time; ten
digits are kept.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = ("relu1", "conv2", "relu2")


@cache
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(__file__).with_name("normgrad_golden.json").read_text())
    return content


def expected(*keys: str) -> Tensor:
    """Golden values in double precision; maps as (B, 1, H, W)."""
    found: Any = golden()["expected"]
    for key in keys:
        found = found[key]
    values = torch.tensor(found, dtype=torch.float64)
    return values.unsqueeze(1) if values.ndim == 3 else values


def images() -> Tensor:
    return torch.tensor(golden()["inputs"]["x"], dtype=torch.float64)


def targets() -> Tensor:
    return torch.tensor(golden()["targets"])


class GoldenNetwork(nn.Module):
    """conv 3x3, ReLU, average pooling, conv 3x3, ReLU, and a linear classifier behind all places or behind their mean."""

    def __init__(self, *, gap: bool = False, inplace: bool = False) -> None:
        super().__init__()
        given = {name: torch.tensor(value, dtype=torch.float64) for name, value in golden()["inputs"].items()}
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.relu1 = nn.ReLU(inplace)
        self.pool = nn.AvgPool2d(2)
        self.conv2 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu2 = nn.ReLU(inplace)
        self.last = nn.AvgPool2d(3) if gap else nn.Identity()
        self.fc = nn.Linear(4 if gap else 36, 3)
        weights = {
            "conv1.weight": given["W1"],
            "conv1.bias": given["b1"],
            "conv2.weight": given["W2"],
            "conv2.bias": given["b2"],
            "fc.weight": given["Wg" if gap else "Wf"],
            "fc.bias": given["bf"],
        }
        self.double()
        self.load_state_dict(weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.last(self.relu2(self.conv2(x)))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def activation_and_gradient(layer: str, *, gap: bool = False) -> tuple[Tensor, Tensor]:
    """What a layer gives for the golden images, and the gradient of their classes' logits, by plain autograd."""
    network = GoldenNetwork(gap=gap)
    kept = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    network.get_submodule(layer).register_forward_hook(keep)
    network(images()).gather(1, targets().unsqueeze(1)).sum().backward()
    assert kept[0].grad is not None
    return kept[0].detach(), kept[0].grad
