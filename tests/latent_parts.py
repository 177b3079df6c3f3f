"""A backbone without weights to speak of, and images with captions, for the tests of cached latents."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = 7
TEXTS = [
    ["a cat", "one cat", "the cat"],
    ["a dog", "one dog"],
    ["a cat"],
    [" a hen ", "one hen", "a hen"],
    ["a fox", "one cat"],
    ["an owl"],
    ["a dog"],
]
# In the order of their first appearance, without spaces around them.
DISTINCT = ["a cat", "one cat", "the cat", "a dog", "one dog", "a hen", "one hen", "a fox", "an owl"]


class Encoders(nn.Module):
    """Latents by pooling, conditions by hashing; says how many images and captions it has encoded."""

    def __init__(self, *, revision: str = "r1", factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.identity = {"name": "encoders", "revision": revision, "options": {"length": 9}}
        self.text_blocks = {"encoder_hidden_states": ((2, 30), (3, 40), (4, 0))}
        self.factor = factor
        self.images: list[int] = []
        self.texts: list[str] = []

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.images.append(len(images))
        mean = F.avg_pool2d(images, 2) * self.factor
        return mean, 0.1 + mean.abs() / 10

    def condition(self, text: Any) -> dict[str, Tensor]:
        self.texts += text
        hidden = torch.zeros(len(text), 9, 40)
        hidden[:, :2, :30] = numbers(text, 60).view(-1, 2, 30)
        hidden[:, 2:5] = numbers(text, 120).view(-1, 3, 40)
        return {
            "encoder_hidden_states": hidden * self.factor,
            "pooled_projections": numbers(text, 5),
            "encoder_attention_mask": torch.arange(9) < torch.tensor([[len(each)] for each in text]),
        }


def numbers(texts: list[str], count: int) -> Tensor:
    """Normal numbers that depend on the text."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) for text in texts]
    return torch.stack([torch.randn(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def pairs(texts: list[list[str]] = TEXTS) -> list[tuple[Tensor, list[str]]]:
    """An image for each list of captions."""
    generator = torch.Generator().manual_seed(5)
    return [(torch.rand(3, 8, 8, generator=generator) * 2 - 1, captions) for captions in texts]
