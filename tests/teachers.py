"""A small frozen teacher and data whose transform is not random, for the tests of the teacher cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from zoo import towers
from zoo.data import DigitsDataModule
from zoo.teacher_cache import TeacherCache
from zoo.towers import Tower

__all__ = ["SAMPLES", "build", "loader", "teacher"]

SAMPLES = 150


def teacher(seed: int = 0) -> Tower:
    """ResNet-8 for the digits, with random weights."""
    torch.manual_seed(seed)
    return towers.create("zoo/resnet8", num_classes=10, in_chans=1, frozen=True)


def loader(**options: Any) -> DataLoader[Any]:
    """150 digits in batches of 40, shuffled, with their index."""
    options = {"train_samples": SAMPLES, "batch_size": 40, "with_index": True, **options}
    return DigitsDataModule(**options).train_dataloader()


def build(path: Path, **options: Any) -> TeacherCache:
    """The cache of `teacher` over `loader`."""
    return TeacherCache.build(path, teacher(), loader(), progress=False, **options)
