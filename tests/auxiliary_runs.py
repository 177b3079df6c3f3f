"""Users' modules and losses for the tests of the callbacks that add one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.callbacks.auxiliary_loss import AuxiliaryLoss
from zoo.callbacks.nd_regularizer import NDRegularizer

from tests.training import digits, quick_trainer

__all__ = [
    "Held",
    "Plain",
    "SmallFeatures",
    "StopAt",
    "equal",
    "fit",
    "mlp",
    "regularizer",
    "seeded",
    "teacher_network",
    "weights",
]


def mlp(width: int = 12) -> nn.Sequential:
    """A network with a layer called ``hidden``."""
    net = nn.Sequential()
    for name, layer in (
        ("flat", nn.Flatten()),
        ("first", nn.Linear(64, width)),
        ("act", nn.Tanh()),
        ("drop", nn.Dropout(0.2)),
        ("hidden", nn.Linear(width, width)),
        ("head", nn.Linear(width, 10)),
    ):
        net.add_module(name, layer)
    return net


class Plain(pl.LightningModule):
    """What a user has: no class of the zoo. ``answer`` chooses what the step returns."""

    def __init__(self, answer: Any = "tensor", width: int = 12, *, draws: bool = True) -> None:
        super().__init__()
        self.model = mlp(width)
        self.answer = answer
        self.draws = draws
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.draw()
        if self.answer == "dict":
            return {"loss": loss, "mine": 3}
        if self.answer == "none":
            return None
        return loss if self.answer == "tensor" else self.answer

    def draw(self) -> None:
        """A user's own random numbers."""
        if self.draws:
            self.seen.append(float(torch.rand(())))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5), "interval": "step"}]


class SmallFeatures(AuxiliaryLoss):
    """Mean square of a layer, through a linear part with a dropout if asked."""

    log_name = "small"

    def __init__(self, layers: Any = ("model.hidden",), weight: float = 0.5, *, trained: bool = False, **options: Any):
        super().__init__(layers, weight, **options)
        self.trained = trained
        self.listened: list[list[str]] = []

    def build(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module | None:
        return nn.Sequential(nn.Linear(12, 5), nn.Dropout(0.3)) if self.trained else None

    def loss(self, features: dict[str, Tensor], batch: Any, pl_module: pl.LightningModule) -> Tensor:
        self.listened.append(list(features))
        value = features[self.layers[0]]
        if self.part is not None:
            value = self.part(value)
        return value.float().square().mean()


class Held(Plain):
    """The same loss, written by hand into the step."""

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        net = self.model
        hidden = net.hidden(net.drop(net.act(net.first(net.flat(x)))))
        loss = F.cross_entropy(net.head(hidden), y)
        self.draw()
        return loss + 0.5 * hidden.float().square().mean()


class StopAt(pl.Callback):
    """End a run after the epoch that makes so many steps, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def seeded(make: Callable[[], Any] = Plain, seed: int = 0) -> Any:
    """A module whose initial weights are always the same."""
    torch.manual_seed(seed)
    return make()


def teacher_network(width: int = 12) -> nn.Sequential:
    """A teacher, random and always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(77)
        return mlp(width)


def regularizer(width: int = 12, **options: Any) -> NDRegularizer:
    """An NDRegularizer of ``model.hidden``, 12 wide, by a teacher of a width."""
    return NDRegularizer(teacher_network(width), "model.hidden", **{"weight": 1.5, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the bit, names included."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fit(module: pl.LightningModule, *callbacks: pl.Callback, ckpt: str | None = None, **options: Any) -> pl.Trainer:
    """Two epochs of ten steps, seeded."""
    torch.manual_seed(11)
    trainer = quick_trainer(callbacks=list(callbacks), **{"max_epochs": 2, **options})
    data = digits(train_samples=160, batch_size=16)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer
