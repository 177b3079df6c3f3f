"""Distillation with norm and direction: KD++, DKD++, DIST++.

Wang, Cheng, Duan, Wang, Feng, Kong: Improving Knowledge Distillation via Regularizing Feature Direction and Norm, ECCV
2024, arXiv 2305.17007. A base objective on the logits, plus ``nd_weight`` times the ND loss on the penultimate features
(`zoo.losses.nd_loss`), whose directions are the frozen teacher's class means::

    L = ce_weight * CE + ramp * kd_weight * base + nd_ramp * nd_weight * ND

Ours against the authors' code, where they differ: class means are computed in the same process, over the un-augmented
training images unless ``class_mean_views`` asks for views under the training transform (theirs: a script of its own, one
augmented view, rounded to four decimals); the projector initialises only itself (theirs re-initialises the student's
classifier as well). Epochs of the ramps count from 0, as theirs do, so the base term is 0 in the first epoch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import towers
from zoo.class_means import compute_class_means
from zoo.errors import InputError
from zoo.evaluation import ClassificationModule, check_batch
from zoo.losses import dist_loss, dkd_loss, kd_loss, nd_loss, nd_statistics

__all__ = ["NDDistillation", "Projector"]


class Projector(nn.Module):
    """Map student features to the teacher's width, in training only: batch norm, dropout, linear.

    A batch of one has no variance of its own: it is normalised with the running statistics and leaves them as they are.

    Args:
        in_dim: width of the student's features.
        out_dim: width of the teacher's features.
        dropout: share of features that are dropped, 0 … 1.
    """

    def __init__(self, in_dim: int, out_dim: int, *, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_dim)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_dim, out_dim)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_dim) to (B, out_dim)."""
        if len(x) == 1:
            norm = self.norm
            x = F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
            )
        else:
            x = self.norm(x)
        projected: Tensor = self.linear(self.dropout(x))
        return projected


class NDDistillation(ClassificationModule):
    """Distil a student from a frozen teacher with a base objective and the ND loss.

    ``student`` is the plain deployable network; teacher and projector exist for training only and are neither stored nor
    built when a stored model is loaded for inference. Class means are computed once, before the first step, and belong to
    the stored model and to checkpoints. With ``nd_weight=0`` nothing of ND is built or computed: that is the control.

    Logged per step: ``train/loss`` and the unweighted terms ``train/ce``, ``train/{base}``, ``train/nd``; per epoch the
    ramp, and which branch of the ND loss is active: ``nd/reward`` (mean r), ``nd/cosine``, ``nd/norm_ratio`` (mean of
    student norm / teacher norm), ``nd/longer_share`` (share of samples whose student is longer than the teacher).

    Args:
        student: the network that is trained: a tower name or a module that returns logits (B, K).
        teacher: the frozen network: a tower name, a module, or None for inference.
        num_classes: number of classes K; the student's own if omitted.
        base: objective on the logits: ``"kd"`` (KD++), ``"dkd"`` (DKD++), ``"dist"`` (DIST++).
        nd_weight: weight of the ND loss; the paper's pairs use 0.5 … 4.
        kd_weight: weight of the base objective after the ramp (for ``dkd`` on top of its own two weights).
        ce_weight: weight of the cross-entropy.
        temperature: temperature of the base objective; 4 for CIFAR, 1 for ImageNet in the paper.
        dkd_alpha: weight of the target-class part of DKD.
        dkd_beta: weight of the non-target part of DKD.
        dist_beta: weight of DIST's relation between classes of a sample.
        dist_gamma: weight of DIST's relation between samples of a class.
        warmup_epochs: the base term grows linearly from 0 over so many epochs; 20 for CIFAR, 5 for ImageNet in the paper.
        nd_warmup_epochs: the same for the ND term; 0 except for the paper's ImageNet DKD++.
        nd_reduction: ``"mean"`` over samples (the released code) or ``"class"``, the mean over classes of class means.
        projector_dropout: dropout of the projector, which exists only where the widths differ.
        class_mean_views: passes over the training images for the class means under the training transform; None takes
            one pass under the evaluation transform, where the data module has ``train_eval_dataloader()``.
        student_options: options for the builder of a named student, such as ``{in_chans: 1}``.
        teacher_options: options for the builder of a named teacher.
        student_head: name of the student's classifier module, found if omitted.
        teacher_head: name of the teacher's classifier module, found if omitted.
        lr: learning rate of the default optimizer.
        momentum: momentum of the default optimizer.
        weight_decay: weight decay of the default optimizer.

    Raises:
        InputError: a network cannot be built, the numbers of classes differ, or a value is out of range.

    Example:
        >>> model = NDDistillation("zoo/resnet8", "zoo/resnet20", num_classes=10, nd_weight=2.0)
        >>> sum(parameter.numel() for parameter in model.parameters()) == sum(
        ...     parameter.numel() for parameter in model.student.parameters()
        ... )
        True
    """

    deployable = "student"
    training_only = ("teacher", "projector")
    sized_by_file = ("class_means", "class_counts")

    class_means: Tensor | None
    class_counts: Tensor | None

    def __init__(
        self,
        student: str | dict[str, Any] | nn.Module,
        teacher: str | nn.Module | None = None,
        num_classes: int | None = None,
        *,
        base: Literal["kd", "dkd", "dist"] = "kd",
        nd_weight: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 1.0,
        temperature: float = 4.0,
        dkd_alpha: float = 1.0,
        dkd_beta: float = 8.0,
        dist_beta: float = 1.0,
        dist_gamma: float = 1.0,
        warmup_epochs: int = 20,
        nd_warmup_epochs: int = 0,
        nd_reduction: Literal["mean", "class"] = "mean",
        projector_dropout: float = 0.5,
        class_mean_views: int | None = None,
        student_options: dict[str, Any] | None = None,
        teacher_options: dict[str, Any] | None = None,
        student_head: str | None = None,
        teacher_head: str | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        options = towers.tower_options("student_options", student_options)
        student_tower = towers.create(student, num_classes=num_classes, head=student_head, **options)
        super().__init__(num_classes=student_tower.num_classes, lr=lr, momentum=momentum, weight_decay=weight_decay)
        _check_options(
            base=base, nd_reduction=nd_reduction, temperature=temperature, nd_weight=nd_weight, kd_weight=kd_weight,
            ce_weight=ce_weight, warmup_epochs=warmup_epochs, nd_warmup_epochs=nd_warmup_epochs,
            class_mean_views=class_mean_views, num_classes=self.num_classes,
        )  # fmt: skip
        self.base = base
        self.nd_weight = nd_weight
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.temperature = temperature
        self.dkd_alpha = dkd_alpha
        self.dkd_beta = dkd_beta
        self.dist_beta = dist_beta
        self.dist_gamma = dist_gamma
        self.warmup_epochs = warmup_epochs
        self.nd_warmup_epochs = nd_warmup_epochs
        self.nd_reduction = nd_reduction
        self.class_mean_views = class_mean_views

        self.student = student_tower.network
        self.student_tap = student_tower.tap
        self.projector: Projector | None = None
        self.register_buffer("class_means", None)
        self.register_buffer("class_counts", None)
        if teacher is not None:
            options = towers.tower_options("teacher_options", teacher_options)
            self._attach_teacher(teacher, teacher_head, options, student_tower.dim, projector_dropout)

    def _attach_teacher(
        self, teacher: str | nn.Module, head: str | None, options: dict[str, Any], student_dim: int, dropout: float
    ) -> None:
        # A bare architecture takes the student's number of classes; weights keep their own, which then has to agree.
        bare = isinstance(teacher, str) and not towers.has_weights(teacher)
        tower = towers.create(
            teacher, frozen=True, head=head, num_classes=self.num_classes if bare else None, **options
        )
        if tower.num_classes != self.num_classes:
            raise InputError(
                f"the teacher has {tower.num_classes} classes and the student {self.num_classes}: distillation compares "
                "their logits, so give a teacher that was trained on the student's classes"
            )
        self.attach_frozen("teacher", tower)
        if self.nd_weight == 0:
            return
        self.class_means = torch.zeros(self.num_classes, tower.dim)
        self.class_counts = torch.zeros(self.num_classes, dtype=torch.int64)
        if tower.dim != student_dim:
            self.projector = Projector(student_dim, tower.dim, dropout=dropout)

    # -- fit -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Keep the feature hooks for the whole fit, so that a compiled training step need not register them.

        Raises:
            InputError: there is no teacher to fit with.
        """
        if stage == "fit":
            if "teacher" not in self.frozen_towers:
                raise InputError(
                    "training needs a teacher: give teacher=…, or load the stored model with for_training=True"
                )
            self.student_tap.install()
            self.teacher.tap.install()

    def teardown(self, stage: str) -> None:
        """Take the feature hooks away."""
        self.student_tap.remove()
        for tower in self.frozen_towers.values():
            tower.tap.remove()

    def on_train_start(self) -> None:
        """Compute the class means, unless a checkpoint or a stored model brought them."""
        if self.class_counts is not None and not bool(self.class_counts.any()):
            assert self.class_means is not None
            means, counts = compute_class_means(
                self.teacher, self.trainer, num_classes=self.num_classes, views=self.class_mean_views
            )
            self.class_means.copy_(means)
            self.class_counts.copy_(counts)
            rank_zero_info(f"class means of the teacher over {int(counts.sum())} images")
            absent = (counts == 0).nonzero().flatten().tolist()
            if absent:
                rank_zero_warn(f"classes {absent} have no training image: their samples do not count in the ND loss")
        super().on_train_start()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the objective of the class docstring for one batch ``(x, targets)``."""
        x, targets = check_batch(batch, self.num_classes)
        with torch.no_grad():
            teacher_features, teacher_logits = self.teacher.features_and_logits(x)
        features, logits = self.student_tap(x)

        ce = F.cross_entropy(logits.float(), targets)
        base = self._base_loss(logits, teacher_logits, targets)
        loss = self.ce_weight * ce + self._ramp(self.warmup_epochs) * self.kd_weight * base
        terms = {"train/ce": ce, f"train/{self.base}": base}
        if self.class_means is not None:
            projected = features if self.projector is None else self.projector(features)
            nd = nd_loss(projected, teacher_features, self.class_means, targets, reduction=self.nd_reduction)
            loss = loss + self._ramp(self.nd_warmup_epochs) * self.nd_weight * nd
            terms["train/nd"] = nd
            self._log_statistics(projected, teacher_features, targets)
        self.log_dict({"train/loss": loss, **terms}, batch_size=len(x))
        return loss

    def on_train_epoch_start(self) -> None:
        """Log the ramp of the base term."""
        self.log("train/ramp", self._ramp(self.warmup_epochs), sync_dist=True)

    def _base_loss(self, logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        if self.base == "dkd":
            return dkd_loss(
                logits,
                teacher_logits,
                targets,
                alpha=self.dkd_alpha,
                beta=self.dkd_beta,
                temperature=self.temperature,
            )
        if self.base == "dist":
            return dist_loss(
                logits,
                teacher_logits,
                beta=self.dist_beta,
                gamma=self.dist_gamma,
                temperature=self.temperature,
                gather=self.trainer.world_size > 1,
            )
        return kd_loss(logits, teacher_logits, temperature=self.temperature)

    def _ramp(self, epochs: int) -> float:
        return min(1.0, self.current_epoch / epochs) if epochs else 1.0

    def _log_statistics(self, features: Tensor, teacher_features: Tensor, targets: Tensor) -> None:
        if self.global_step % getattr(self.trainer, "log_every_n_steps", 50):
            return
        assert self.class_means is not None
        statistics = nd_statistics(features, teacher_features, self.class_means, targets)
        self.log_dict({f"nd/{name}": value for name, value in statistics.items()}, batch_size=len(features))


def _check_options(**options: Any) -> None:
    for name, allowed in {"base": ("kd", "dkd", "dist"), "nd_reduction": ("mean", "class")}.items():
        if options[name] not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {options[name]!r}")
    if options["temperature"] <= 0:
        raise InputError(f"temperature must be positive, got {options['temperature']}")
    for name in ("nd_weight", "kd_weight", "ce_weight", "warmup_epochs", "nd_warmup_epochs"):
        if options[name] < 0:
            raise InputError(f"{name} must not be negative, got {options[name]}")
    if options["class_mean_views"] is not None and options["class_mean_views"] < 1:
        raise InputError(f"class_mean_views must be at least 1 or None, got {options['class_mean_views']}")
    if options["base"] == "dkd" and options["num_classes"] < 3:
        raise InputError(
            f"base='dkd' compares the non-target classes: it needs 3 or more, got {options['num_classes']}"
        )
