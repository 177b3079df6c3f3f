"""What every image classifier of the zoo does outside its training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from zoo.errors import InputError
from zoo.module import ZooModule

__all__ = ["ClassificationModule", "check_batch"]


class ClassificationModule(ZooModule):
    """A `ZooModule` whose network gives logits: forward, validation, test, prediction, and the papers' usual SGD.

    Args:
        num_classes: number of classes K.
        lr: learning rate of the default optimizer.
        momentum: momentum of the default optimizer.
        weight_decay: weight decay of the default optimizer.
    """

    def __init__(self, *, num_classes: int, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) of the deployable network."""
        logits: Tensor = self.network(x)
        return logits

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Record the shape of the inputs, once, for the golden output of the stored model."""
        if batch_idx == 0 and self.example_shape is None:
            self.example_shape = tuple(batch[0].shape[1:])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/acc``."""
        x, targets = check_batch(batch, self.num_classes)
        logits = self(x).float()
        self.val_accuracy.update(logits, targets)
        self.log("val/loss", F.cross_entropy(logits, targets), sync_dist=True, batch_size=len(x))
        self.log("val/acc", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/acc``."""
        x, targets = check_batch(batch, self.num_classes)
        logits = self(x).float()
        self.test_accuracy.update(logits, targets)
        self.log("test/loss", F.cross_entropy(logits, targets), sync_dist=True, batch_size=len(x))
        self.log("test/acc", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return ``logits`` (B, K), float32, and ``prediction`` (B,), int64; labels in the batch are ignored."""
        logits = self(batch[0] if isinstance(batch, list | tuple) else batch).float()
        return {"logits": logits, "prediction": logits.argmax(1)}

    def configure_optimizers(self) -> Any:
        """Return SGD with Nesterov momentum, divided by 10 at 62.5, 75 and 87.5 % of the epochs.

        This is the schedule of the distillation papers (150, 180 and 210 of 240 epochs). LightningCLI's ``optimizer`` and
        ``lr_scheduler`` take its place when given.
        """
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )
        epochs = self.trainer.max_epochs or 240
        milestones = [round(epochs * share) for share in (0.625, 0.75, 0.875)]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)]


def check_batch(batch: Any, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return images and labels of a batch.

    Label values are looked at on the CPU only: on a GPU that would wait for it, and the loss asserts there.

    Args:
        batch: ``(x, targets)`` with labels (B,) or soft labels (B, K).
        num_classes: K.

    Raises:
        InputError: the batch is no such pair, or a label is not in 0 … K - 1.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise InputError(f"a batch must be a pair (x, targets), got {type(batch).__name__}")
    x, targets = batch
    if targets.ndim == 2 and targets.shape[1] != num_classes:
        raise InputError(f"soft labels have {targets.shape[1]} classes, expected num_classes={num_classes}")
    on_cpu = targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if targets.ndim == 1 and on_cpu and len(targets):
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= num_classes:
            raise InputError(f"labels must be in 0 … {num_classes - 1} (num_classes={num_classes}), got {low} … {high}")
    return x, targets
