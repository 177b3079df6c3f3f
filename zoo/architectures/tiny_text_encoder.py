"""A text encoder that begins from nothing, for `zoo.architectures.tiny_mmdit`, and the parts that both share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.errors import InputError

__all__ = ["PAD", "TinyTextEncoder", "mlp", "require_positive"]

PAD = 0
"""The token that open_clip's tokenizers fill up with."""


class TinyTextEncoder(nn.Module):
    """Token embeddings with learned positions, and an MLP of their mean.

    Padding, token 0, becomes zeros and does not count in the mean: a text is the same whatever it is filled up to, and all
    padding is the empty text.

    Args:
        vocab_size: number of tokens.
        context_length: tokens of the longest text.
        width: width D of the embeddings and of their pooled form.

    Raises:
        InputError: a size is not positive.
    """

    def __init__(self, *, vocab_size: int = 49408, context_length: int = 16, width: int = 64) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size, context_length=context_length, width=width)
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(context_length, width))
        self.pool = mlp(width, 2 * width, width)
        nn.init.normal_(self.tokens.weight, std=0.1)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B, L, D) of tokens (B, L), int64, and the pooled text (B, D)."""
        real = (tokens != PAD)[..., None]
        embedded = (self.tokens(tokens) + self.positions[: tokens.shape[1]]) * real
        return embedded, self.pool(embedded.sum(1) / real.sum(1).clamp_min(1))


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """Return two linear layers around a GELU (its tanh form)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, outputs))


def require_positive(**sizes: int) -> None:
    """Refuse sizes below 1.

    Args:
        **sizes: by the name of the argument.

    Raises:
        InputError: one is not positive.
    """
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name} must be positive, got {value}")
