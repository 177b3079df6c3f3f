"""A small text-to-image network, SoftREPA on it, batches, and one step of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.architectures.tiny_mmdit import TinyTextToImage

WORDS = 20


def backbone(seed: int = 0) -> TinyTextToImage:
    """A random backbone whose output depends on the text, in float64 where it matters."""
    torch.manual_seed(seed)
    network = TinyTextToImage(vocab_size=WORDS, width=16, text_width=16, depth=3, heads=2, context_length=5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network


def softrepa(**options: Any) -> Any:
    torch.manual_seed(1)
    # Errors of this random network are far from the paper's temperature.
    given = {"tokens": 2, "blocks": [0, 1], "buckets": 10, "temperature": 5.0, **options}
    return zoo.SoftREPA(given.pop("backbone", None) or backbone(), **given)


def batch(rows: int = 4, seed: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, WORDS, (rows, 5), generator=generator)
    image = torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return {"image": image, "text": text, "label": torch.arange(rows) % 3}


def step(model: Any, given: dict[str, Tensor], seed: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradient of one training step at a drawn time and noise."""
    model.log_dict = lambda *_, **__: None
    model.zero_grad()
    torch.manual_seed(seed)
    with model.attach(model.backbone.network.denoiser):
        loss = model.training_step(given, 0)
        loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.bank.parameters()]
