"""A network with all that a pass could disturb, and calls without warnings, for the tests of saliency."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from zoo.saliency import saliency


class Counted(nn.Module):
    """A network with all that a pass could disturb: batch norm, dropout, an in-place ReLU, noise that eval mode keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.fc = nn.Linear(8 * 16, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.drop(self.relu(self.bn(self.conv1(x))))
        x = self.conv2(x)
        x = x.add_(0.0 * torch.rand_like(x)).relu_()
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def counted() -> Counted:
    network = Counted()
    network.bn.eval()  # as users freeze it
    network.conv1.requires_grad_(requires_grad=False)
    return network


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())


def quiet(*args: Any, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return saliency(*args, **options)
