"""What the runs of `tests.push_runs` are put together from: a foreign module, scores that are given, places to stop at."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Plain", "Scores", "Stops", "stop_before"]


class Plain(pl.LightningModule):
    """A LightningModule of somebody else."""

    def __init__(self, network: nn.Module, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters({"rate": rate})
        self.network = network
        self.rate = rate

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate)


class Scores(pl.Callback):
    """Log ``val/score`` as given, and keep the weights of each epoch for the test to compare with."""

    def __init__(self, folder: str, scores: Sequence[float | None], nan_in: int | None) -> None:
        self.folder = folder
        self.scores = scores
        self.nan_in = nan_in

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = self.scores[trainer.current_epoch] if self.scores else float(trainer.current_epoch)
        if score is not None:
            pl_module.log("val/score", score)
        if trainer.is_global_zero and not trainer.sanity_checking:
            torch.save(pl_module.state_dict(), f"{self.folder}/state-{trainer.current_epoch}.pt")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Gathered from all processes when it is first read: reading it in one process alone would hang.
        pl_module.log("train/epoch", float(trainer.current_epoch), on_step=False, on_epoch=True, sync_dist=True)
        if trainer.current_epoch == self.nan_in:
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[0] = torch.nan


class Stops(pl.Callback):
    """Stop after some epochs until told to go on."""

    def __init__(self, epochs: Sequence[int], stop: Callable[[str], None]) -> None:
        self.epochs = epochs
        self.stop = stop

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.current_epoch in self.epochs:
            self.stop(f"epoch {trainer.current_epoch}")


def stop_before(module: str, name: str, nth: int, stop: Callable[[str], None]) -> None:
    """Stop before the nth call of a function."""
    holder = importlib.import_module(module)
    function = getattr(holder, name)
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            stop(name)
        return function(*arguments, **options)

    setattr(holder, name, counted)
