"""The ND loss beside the loss of any LightningModule.

Wang, Cheng, Duan, Wang, Feng, Kong: Improving Knowledge Distillation via Regularizing Feature Direction and Norm, ECCV
2024, arXiv 2305.17007. `NDDistillation` is the paper's training; this is its regulariser alone, for a module that has an
objective of its own::

    L = L_user + ramp * weight * ND(s, t, y)

with s the output of a layer of the user's module, t the features of a frozen teacher for the same inputs, and the teacher's
class means over the training images as directions (`zoo.losses.nd_loss`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from zoo import towers
from zoo.class_means import compute_class_means
from zoo.errors import InputError, require_choice
from zoo.labelled_batch import labelled_batch
from zoo.layer_outputs import example_batch, layer_output
from zoo.losses import nd_loss, nd_statistics
from zoo.projector import Projector

from .auxiliary_loss import AuxiliaryLoss  # noqa: TID251 - a sibling, not the bare name

__all__ = ["NDRegularizer"]


class NDRegularizer(AuxiliaryLoss):
    """Pull the features of a layer along a frozen teacher's class means, up to the length of the teacher's features.

    The teacher stays outside the module: no gradient, no optimizer, no checkpoint, always in eval mode, on the module's
    device, and as a copy in the module's type under a true precision such as ``bf16-true``. It sees the inputs of the
    batch, so an augmentation inside ``training_step`` is one that it does not see. A projector is trained only where the
    widths differ; how, and where it is kept, see `AuxiliaryLoss`. Class means are computed once, when training starts, and
    are part of the callback's state in a checkpoint. Vectors (B, D) are taken as they are, of maps (B, C, H, W) or
    (B, C, T, H, W) the mean over all places.

    Logged per step: ``train/nd``, unweighted, and every ``log_every_n_steps``: ``nd/reward`` (mean r), ``nd/cosine``,
    ``nd/norm_ratio`` (mean of student norm / teacher norm), ``nd/longer_share`` (share of samples whose student is longer
    than the teacher). A second NDRegularizer logs as ``nd_2``.

    Args:
        teacher: the frozen network: a tower name or a module that returns logits.
        student_layer: the layer whose output is regularised, as in ``named_modules()`` of the LightningModule; the input of
            the classifier in the paper, such as ``model.avgpool`` in a ResNet of torchvision.
        weight: weight of the ND loss after the ramp; the paper's pairs use 0.5 … 4. With 0 the run is, to the bit, one
            without the callback.
        teacher_layer: the layer of the teacher whose output is compared; the input of its classifier if omitted.
        warmup_epochs: the weight grows linearly from 0 over so many epochs, counted from 0.
        reduction: ``"mean"`` over samples (the released code) or ``"class"``, the mean over classes of class means, for
            integer labels.
        num_classes: number of classes K of the labels; the teacher's own if omitted.
        student_dim: width of the layer's output; observed on one example if omitted.
        projector_dropout: dropout of the projector, which exists only where the widths differ.
        class_mean_views: passes over the training images for the class means under the training transform; None takes one
            pass under the evaluation transform, where the data module has ``train_eval_dataloader()``, and else one view.
        batch_to_input: batch -> inputs of the teacher; the first item of a batch ``(x, y)`` if omitted.
        batch_to_target: batch -> labels (B,) or soft labels (B, K); the second item if omitted.
        teacher_options: options for the builder of a named teacher, such as ``{in_chans: 1}``.
        teacher_head: name of the teacher's classifier module, found if omitted.

    Raises:
        InputError: a value is out of range; at the start of fit: the teacher cannot be built or differs from that of the
            checkpoint, there is no such layer, its width cannot be observed; in a step: a batch without input and target, or
            what `zoo.losses.nd_loss` refuses.

    Example:
        >>> callback = NDRegularizer("zoo/resnet20", "model.avgpool", weight=2.0, warmup_epochs=4)
        >>> [callback.weight_at(step=0, epoch=epoch) for epoch in (0, 1, 4, 100)]
        [0.0, 0.5, 2.0, 2.0]
    """

    log_name = "nd"

    def __init__(
        self,
        teacher: str | nn.Module,
        student_layer: str,
        weight: float = 1.0,
        *,
        teacher_layer: str | None = None,
        warmup_epochs: int = 0,
        reduction: Literal["mean", "class"] = "mean",
        num_classes: int | None = None,
        student_dim: int | None = None,
        projector_dropout: float = 0.5,
        class_mean_views: int | None = None,
        batch_to_input: Callable[[Any], Tensor] | None = None,
        batch_to_target: Callable[[Any], Tensor] | None = None,
        teacher_options: dict[str, Any] | None = None,
        teacher_head: str | None = None,
    ) -> None:
        super().__init__([student_layer], weight)
        if not isinstance(teacher, str | nn.Module):
            raise InputError(f"teacher must be a tower name or an nn.Module, got {type(teacher).__name__}")
        require_choice("reduction", reduction, ("mean", "class"))
        if warmup_epochs < 0:
            raise InputError(f"warmup_epochs must not be negative, got {warmup_epochs}")
        if not 0 <= projector_dropout <= 1:
            raise InputError(f"projector_dropout must be in 0 … 1, got {projector_dropout}")
        for name, value in (
            ("num_classes", num_classes),
            ("student_dim", student_dim),
            ("class_mean_views", class_mean_views),
        ):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1 or None, got {value}")
        self.teacher = teacher
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer
        self.warmup_epochs = warmup_epochs
        self.reduction = reduction
        self.num_classes = num_classes
        self.student_dim = student_dim
        self.projector_dropout = projector_dropout
        self.class_mean_views = class_mean_views
        self.batch_to_input = batch_to_input
        self.batch_to_target = batch_to_target
        self.teacher_options = towers.tower_options("teacher_options", teacher_options)
        self.teacher_head = teacher_head
        self.class_means: Tensor | None = None
        self.class_counts: Tensor | None = None
        self._tower: towers.Tower | None = None
        self._teacher_dim = 0
        self._warned = False

    # -- state -----------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Two NDRegularizers may stand side by side if they differ in a layer or in the teacher's name or class."""
        teacher = self.teacher if isinstance(self.teacher, str) else type(self.teacher).__qualname__
        return self._generate_state_key(
            teacher=teacher, student_layer=self.student_layer, teacher_layer=self.teacher_layer
        )

    def state_dict(self) -> dict[str, Any]:
        """Return class means, projector, and the fingerprint of the teacher that they belong to; empty with ``weight=0``."""
        if self.weight == 0:
            return {}
        return {
            **super().state_dict(),
            "teacher": None if self._tower is None else self._tower.fingerprint,
            "class_means": self.class_means,
            "class_counts": self.class_counts,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            InputError: the teacher or the projector is not the one of the checkpoint.
        """
        if self._tower is not None and state_dict["teacher"] != self._tower.fingerprint:
            remedy = "a teacher whose weights have a public name, or the same module"
            raise InputError(f"the teacher of {self.state_key} is not the one of the checkpoint: give {remedy}")
        super().load_state_dict(state_dict)
        self.class_means = state_dict["class_means"]
        self.class_counts = state_dict["class_counts"]

    # -- fit -------------------------------------------------------------------------------------------------------

    def build(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module | None:
        """Build the teacher; return a projector where the widths differ.

        Raises:
            InputError: the teacher cannot be built or is part of the module, or a width cannot be observed.
        """
        self.class_means = self.class_counts = None
        self._tower = self._build_teacher(trainer, pl_module)
        student_dim, self._teacher_dim = self.student_dim, self._tower.dim
        if student_dim is None or self.teacher_layer is not None:
            remedy = "student_dim=…" if self.teacher_layer is None else "teacher_layer=None and student_dim=…"
            x = self._split(example_batch(trainer, remedy))[0]
            if self.teacher_layer is not None:
                self._teacher_dim = self._teacher_features(x).shape[1]
            if student_dim is None:
                seen = layer_output(pl_module, self.student_layer, x, remedy)
                student_dim = _pool(seen, self.student_layer).shape[1]
        if student_dim == self._teacher_dim:
            return None
        return Projector(student_dim, self._teacher_dim, dropout=self.projector_dropout)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the teacher to the module, and see that all processes have the same."""
        super().on_fit_start(trainer, pl_module)
        if self._tower is None:
            return
        if trainer.world_size > 1:
            same = trainer.strategy.broadcast(self._tower.fingerprint) == self._tower.fingerprint
            if not trainer.strategy.reduce_boolean_decision(same, all=True):
                raise InputError(
                    f"the processes have different teachers ({self.state_key}): give one with weights, or call "
                    "seed_everything"
                )
        if pl_module.dtype != torch.float32:
            # A cast loses digits: of a teacher that is the user's, it is done to a copy.
            tower = copy.deepcopy(self._tower) if isinstance(self.teacher, nn.Module) else self._tower
            self._tower = tower.to(pl_module.dtype)
        self._tower.to(pl_module.device)
        if self.teacher_layer is None:
            self._tower.tap.install()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the class means, unless a checkpoint brought them."""
        if self._tower is None:
            return
        if self.class_means is None or self.class_counts is None:
            means, self.class_counts = compute_class_means(
                self._tower,
                trainer,
                num_classes=self._classes,
                views=self.class_mean_views,
                features=self._teacher_features,
                dim=self._teacher_dim,
                split_batch=self._split,
            )
            # The type in which the loss computes.
            self.class_means = means.to(torch.float64 if pl_module.dtype == torch.float64 else torch.float32)
            rank_zero_info(f"class means of the teacher over {int(self.class_counts.sum())} images")
            absent = (self.class_counts == 0).nonzero().flatten().tolist()
            if absent:
                rank_zero_warn(f"classes {absent} have no training image: their samples do not count in the ND loss")
        self.class_means = self.class_means.to(pl_module.device)

    def detach(self, pl_module: pl.LightningModule) -> None:
        """Leave the user's module, and the teacher, as they were."""
        super().detach(pl_module)
        if self._tower is not None:
            self._tower.tap.remove()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the user's module as it was, and the accelerator without the teacher."""
        super().teardown(trainer, pl_module, stage)
        if self._tower is not None:
            self._tower.to("cpu")

    # -- steps -----------------------------------------------------------------------------------------------------

    def weight_at(self, step: int, epoch: int) -> float:
        """Return the weight of the loss in an epoch, counted from 0."""
        return self.weight * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else self.weight

    def loss(self, features: dict[str, Tensor], batch: Any, pl_module: pl.LightningModule) -> Tensor:
        """Return the ND loss of a batch."""
        assert self.class_means is not None
        x, targets = self._split(batch)
        with torch.no_grad():
            teacher = self._teacher_features(x)
        student = _pool(features[self.student_layer], self.student_layer)
        if not student.requires_grad and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"layer {self.student_layer!r} gives features without a gradient: it is frozen, or runs under no_grad or "
                "reentrant checkpointing, and the ND loss does not train it"
            )
        if self.part is not None:
            student = self.part(student)
        self._log_statistics(pl_module, student, teacher, targets)
        return nd_loss(student, teacher, self.class_means, targets, reduction=self.reduction)

    @property
    def _classes(self) -> int:
        assert self._tower is not None
        return self.num_classes or self._tower.num_classes

    def _build_teacher(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> towers.Tower:
        own = {id(parameter) for parameter in pl_module.parameters()}
        if isinstance(self.teacher, nn.Module) and any(id(parameter) in own for parameter in self.teacher.parameters()):
            raise InputError(
                "the teacher shares parameters with the module that is trained, and would freeze them: give a copy "
                "(copy.deepcopy)"
            )
        # A bare architecture takes the number of classes; weights keep their own.
        bare = isinstance(self.teacher, str) and not towers.has_weights(self.teacher)
        return towers.create(
            self.teacher,
            frozen=True,
            head=self.teacher_head,
            num_classes=self.num_classes if bare else None,
            **self.teacher_options,
        )

    def _split(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a batch."""
        return labelled_batch(batch, self.batch_to_input, self.batch_to_target)

    def _teacher_features(self, x: Tensor) -> Tensor:
        assert self._tower is not None
        if self.teacher_layer is None:
            return self._tower.features(x)
        return _pool(self._tower.layers(x, [self.teacher_layer])[self.teacher_layer], self.teacher_layer)

    def _log_statistics(self, pl_module: pl.LightningModule, student: Tensor, teacher: Tensor, targets: Tensor) -> None:
        every = getattr(pl_module.trainer, "log_every_n_steps", 50)
        if every == 0 or pl_module.trainer.global_step % every:
            return
        assert self.class_means is not None
        statistics = nd_statistics(student, teacher, self.class_means, targets)
        pl_module.log_dict(
            {f"{self.label}/{name}": value for name, value in statistics.items()}, batch_size=len(student)
        )


def _pool(features: Tensor, layer: str) -> Tensor:
    """Return vectors (B, D): those of a layer, or the mean of its maps over all places."""
    if features.ndim == 2:
        return features
    if features.ndim < 4:
        raise InputError(
            f"layer {layer!r} gives shape {tuple(features.shape)}, expected vectors (B, D) or maps (B, C, H, W): name a "
            "layer that gives one vector a sample"
        )
    return features.mean(tuple(range(2, features.ndim)))
