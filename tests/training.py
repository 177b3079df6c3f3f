"""Small models, data and trainers that many tests share."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn
from zoo.lightning_modules.nd import NDDistillation

from zoo import towers
from zoo.data import DigitsDataModule

__all__ = ["IN_CHANS", "digits", "quick_trainer", "small_distillation", "small_network"]

IN_CHANS = 1


def digits(**options: Any) -> DigitsDataModule:
    """The real digits, 8x8."""
    return DigitsDataModule(**options)


def small_network(name: str = "zoo/resnet8", num_classes: int = 10) -> nn.Module:
    """A network for 8x8 digits."""
    return towers.create(name, num_classes=num_classes, in_chans=IN_CHANS).network


def small_distillation(**options: Any) -> NDDistillation:
    """ResNet-8 from ResNet-8, on one channel; any argument can be changed."""
    options = {"student": "zoo/resnet8", "teacher": "zoo/resnet8", "num_classes": 10, **options}
    for name in ("student", "teacher"):
        if isinstance(options[name], str):
            options[f"{name}_options"] = {"in_chans": IN_CHANS}
    return NDDistillation(**options)


def quick_trainer(**options: Any) -> pl.Trainer:
    """A silent trainer on the CPU that writes nothing."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
        **options,
    )
