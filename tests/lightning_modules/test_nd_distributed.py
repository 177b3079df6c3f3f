"""NDDistillation in two processes: the same weights as in one, class means without the sampler's padding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from zoo.lightning_modules.nd import NDDistillation

from tests.processes import fit_in_two_processes
from tests.training import digits


def mlp(width: int) -> nn.Module:
    # No batch norm: its statistics are a process's own, and two processes would rightly differ from one.
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)).double()


# 75 images: an odd number, so that a padding sampler would count one of them twice in the class means.
OPTIONS: dict[str, Any] = {
    "precision": "64-true", "max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """DIST is the base that needs the other process: its relation between samples goes over the whole batch."""
    torch.manual_seed(0)
    one = NDDistillation(mlp(12), mlp(12), base="dist", warmup_epochs=0, nd_weight=2.0, lr=0.05).double()
    two = copy.deepcopy(one)
    pl.Trainer(accelerator="cpu", devices=1, **OPTIONS).fit(
        one, digits(train_samples=75, batch_size=32, drop_last=True)
    )
    images = digits(train_samples=75, batch_size=16, drop_last=True)
    fit_in_two_processes(two, images, folder=tmp_path, **OPTIONS)
    assert int(two.class_counts.sum()) == 75
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)
