"""Small models and random pairs for the tests of StructureAlignment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo.lightning_modules.structure import StructureAlignment

WIDTHS = {"image": 6, "text": 5}
SMALL_TEXT = {"width": 16, "depth": 2, "heads": 2}


def build(**options: Any) -> StructureAlignment:
    """Towers that are features already, so that a step can be written down."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "image": "zoo/features", "image_options": {"dim": WIDTHS["image"]}, "text": "zoo/features",
        "text_options": {"dim": WIDTHS["text"]}, "embed_dim": 4, "k": (1,), "warmup_steps": 4, "schedule": "cosine",
        **options,
    }  # fmt: skip
    return StructureAlignment(given.pop("image"), given.pop("text"), **given)


def rows(samples: int = 32, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(samples, WIDTHS["image"], generator=g, dtype=dtype)
    text = image[:, : WIDTHS["text"]] + 0.1 * torch.randn(samples, WIDTHS["text"], generator=g, dtype=dtype)
    return {"image": image, "text": text, "id": torch.arange(samples)}


def pairs(samples: int = 32, batch_size: int = 16, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    table = rows(samples, dtype)
    return DataLoader([{k: v[i] for k, v in table.items()} for i in range(samples)], batch_size=batch_size)  # type: ignore[arg-type]


def at_step(model: StructureAlignment, step: int) -> dict[str, Any]:
    """Let a bare module believe that it trains; return what it logs."""
    logged: dict[str, Any] = {}
    trainer = type("T", (), {"training": True, "world_size": 1, "global_step": step, "log_every_n_steps": 10**9})()
    changed: Any = model
    changed._trainer = trainer
    changed.log_dict = lambda values, **_: logged.update(values)
    return logged


class Encoder(nn.Module):
    """A tower with weights of its own."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, 7)
        self.output_dim = 7

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)
