"""Small encoders, data and trainers for the tests of AdversarialCalibration."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from zoo.lightning_modules.advcal import AdversarialCalibration

from tests.advcal_cases import BIAS, CENTRES, HEAD_BIAS, HEAD_WEIGHT, INPUTS, LABELS, WEIGHT


class Toy(nn.Module):
    """The frozen encoder of the project's notes, before unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)
        self.linear.weight.data, self.linear.bias.data = WEIGHT.clone(), BIAS.clone()
        self.output_dim = 5

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def toy(
    *, modalities: tuple[str, ...] = ("image",), given_head: bool = False, **options: Any
) -> AdversarialCalibration:
    """The toy of the notes in float64, with its centres."""
    encoders: dict[str, Any] = {name: Toy() for name in modalities}
    options = {"centres": CENTRES.tolist(), "scale": 10.0, "eval_steps": 4, "cache_attacks": False, **options}
    model = AdversarialCalibration(encoders, **options).double()
    assert model.centres is not None
    model.centres = F.normalize(CENTRES, dim=2).expand_as(model.centres).clone()  # given in float32
    if given_head:
        for name in modalities:
            head: Any = model.heads[name]
            head.weight.data, head.bias.data = HEAD_WEIGHT.clone(), HEAD_BIAS.clone()
    return model


def toy_data(samples: int = 12, batch_size: int = 6, key: str = "image") -> DataLoader[Any]:
    """The inputs of the notes, over and over."""
    rows = [{key: INPUTS[i % 6], "label": LABELS[i % 6]} for i in range(samples)]
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]


def quiet(**options: Any) -> pl.Trainer:
    """A silent trainer on the CPU that validates and writes nothing."""
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, **options,
    )  # fmt: skip
