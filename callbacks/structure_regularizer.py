"""STRUCTURE's regulariser for any LightningModule: aligned features that keep the neighbourhoods of the frozen ones."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.losses import structure_loss, structure_statistics

from .auxiliary_loss import AuxiliaryLoss  # noqa: TID251 - a sibling

__all__ = ["StructureRegularizer"]


class StructureRegularizer(AuxiliaryLoss):
    """Add ``weight * R_S`` to a training step: how far a head has moved the neighbourhoods of the features that feed it.

    Gröger, Wen, Le, Brbić: With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You, NeurIPS 2025, arXiv
    2506.16895. One callback regularises one modality; give two for two, with half of the paper's weight each, because the
    paper takes the mean over its modalities. See `zoo.losses.structure_loss` for the formula, and `AuxiliaryLoss` for what a
    callback that adds a loss does to the module. Under several processes the neighbours are those of all batches.

    Logged: ``train/structure``, unweighted; every ``log_every_n_steps`` steps ``structure/diagonal_mass`` and
    ``structure/effective_neighbours``, the mean probability that a random step stays and the mean number of neighbours that
    count: a temperature at which all steps stay measures nothing.

    Args:
        frozen_layer: name of the module that gives the frozen features, (B, D) or maps and tokens, which are averaged.
        aligned_layer: name of the module that gives the aligned features.
        weight: weight of the loss after the ramp.
        warmup_steps: the weight grows linearly from 0 over so many optimizer steps.
        temperature: of the similarities; that of the contrastive loss in the paper.
        levels: longest random walk, at least 1.
        level_weights: ``"none"`` or ``"inverse"``.
        divergence: ``"released"`` (the authors' code) or ``"js"`` (the paper's words).
        centering: ``"mean"``, ``"none"``, ``"standard"`` or ``"before"``.
        margin: divergence in nats that costs nothing.
        chunk_size: rows of a block of the loss.

    Raises:
        InputError: a value is out of range; at the start of fit and in a step, what `AuxiliaryLoss` refuses.

    Example:
        >>> callback = StructureRegularizer("encoder", "head", warmup_steps=100)
        >>> callback.weight_at(step=50, epoch=0)
        5.0
    """

    log_name = "structure"

    def __init__(
        self,
        frozen_layer: str,
        aligned_layer: str,
        weight: float = 10.0,
        *,
        warmup_steps: int = 1000,
        temperature: float = 0.05,
        levels: int = 1,
        level_weights: Literal["none", "inverse"] = "none",
        divergence: Literal["released", "js"] = "released",
        centering: Literal["mean", "none", "standard", "before"] = "mean",
        margin: float = 0.0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__([frozen_layer, aligned_layer], weight, warmup_steps=warmup_steps)
        if frozen_layer == aligned_layer:
            raise InputError(f"frozen_layer and aligned_layer must be two layers, got {frozen_layer!r} twice")
        self.frozen_layer = frozen_layer
        self.aligned_layer = aligned_layer
        self.options: dict[str, Any] = {
            "temperature": temperature, "levels": levels, "level_weights": level_weights, "divergence": divergence,
            "centering": centering, "margin": margin, "chunk_size": chunk_size,
        }  # fmt: skip
        one = torch.zeros(1, 1)
        structure_loss(one, one, **self.options)  # refuses an option here and not in the first step

    def loss(self, features: dict[str, Tensor], batch: Any, pl_module: pl.LightningModule) -> Tensor:
        """Return R_S of one batch."""
        frozen = _vectors(features[self.frozen_layer], self.frozen_layer).detach()
        aligned = _vectors(features[self.aligned_layer], self.aligned_layer)
        trainer = pl_module.trainer
        every = getattr(trainer, "log_every_n_steps", 50)
        if every and trainer.global_step % every == 0:
            statistics = structure_statistics(frozen, temperature=self.options["temperature"])
            pl_module.log_dict(
                {f"{self.label}/{name}": value for name, value in statistics.items()}, batch_size=len(frozen)
            )
        return structure_loss(frozen, aligned, gather=trainer.world_size > 1, **self.options)


def _vectors(features: Tensor, layer: str) -> Tensor:
    """Return one vector a sample: the mean over tokens (B, N, D) or over the places of maps (B, C, H, W)."""
    if features.ndim == 2:
        return features
    if features.ndim == 3:
        return features.mean(1)
    if features.ndim == 4:
        return features.mean((2, 3))
    raise InputError(f"layer {layer!r} gives shape {tuple(features.shape)}, expected (B, D), (B, N, D) or (B, C, H, W)")
