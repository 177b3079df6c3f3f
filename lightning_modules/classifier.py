"""The supervised baseline: cross-entropy alone. It trains teachers, and it is the control "student alone"."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zoo import towers
from zoo.evaluation import ClassificationModule, check_batch

__all__ = ["Classifier"]


class Classifier(ClassificationModule):
    """Train one network with cross-entropy.

    Args:
        student: the network: a tower name or a module that returns logits (B, K).
        num_classes: number of classes K; the network's own if omitted.
        student_options: options for the builder of a named network, such as ``{in_chans: 1}``.
        label_smoothing: share of the target spread over all classes, 0 … 1.
        lr: learning rate of the default optimizer.
        momentum: momentum of the default optimizer.
        weight_decay: weight decay of the default optimizer.

    Raises:
        InputError: the network cannot be built, or has another number of classes.

    Example:
        >>> model = Classifier("zoo/resnet8", num_classes=10)
        >>> model.student.fc.out_features
        10
    """

    deployable = "student"

    def __init__(
        self,
        student: str | dict[str, Any] | nn.Module,
        num_classes: int | None = None,
        *,
        student_options: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        options = towers.tower_options("student_options", student_options)
        tower = towers.create(student, num_classes=num_classes, **options)
        super().__init__(num_classes=tower.num_classes, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.student = tower.network
        self.label_smoothing = label_smoothing

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy and log it as ``train/loss``."""
        x, targets = check_batch(batch, self.num_classes)
        loss = F.cross_entropy(self(x).float(), targets, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, batch_size=len(x))
        return loss
