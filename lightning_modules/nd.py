"""Distillation with norm and direction: KD++, DKD++, DIST++, ReviewKD++.

Wang, Cheng, Duan, Wang, Feng, Kong: Improving Knowledge Distillation via Regularizing Feature Direction and Norm, ECCV
2024, arXiv 2305.17007. A base objective on the logits (or on the stages' maps), plus ``nd_weight`` times the ND loss on
the penultimate features (`zoo.losses.nd_loss`), whose directions are the frozen teacher's class means::

    L = ce_weight * CE + ramp * kd_weight * base + nd_ramp * nd_weight * ND

Ours against the authors' code, where they differ: class means are computed in the same process, over the un-augmented
training images unless ``class_mean_views`` asks for views under the training transform (theirs: a script of its own, one
augmented view, rounded to four decimals); the projector initialises only itself (theirs re-initialises the student's
classifier as well); the stages of ReviewKD are found in any network, and the teacher's are taken in front of their last
ReLU (theirs: a table of networks with edited forward passes). Epochs of the ramps count from 0, as theirs do, so the base
term is 0 in the first epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import hub, towers
from zoo.class_means import compute_class_means
from zoo.errors import InputError, require_choice
from zoo.evaluation import ClassificationModule, check_batch
from zoo.features import FeatureTap, OutputTap
from zoo.losses import dist_loss, dkd_loss, kd_loss, nd_loss, nd_statistics, review_kd_loss
from zoo.projector import Projector
from zoo.review_fusion import ReviewFusion
from zoo.stage_names import preactivations, stage_names
from zoo.stages import StageTap
from zoo.teacher_cache import TeacherCache

__all__ = ["NDDistillation"]

Maps = tuple[list[Tensor], list[Tensor]]
_BASES = ("kd", "dkd", "dist", "review_kd")


class NDDistillation(ClassificationModule):
    """Distil a student from a frozen teacher with a base objective and the ND loss.

    ``student`` is the plain deployable network; teacher, projector and the fusion of ReviewKD exist for training only and
    are neither stored nor built when a stored model is loaded for inference. Class means are computed once, before the
    first step, and belong to the stored model and to checkpoints. With ``nd_weight=0`` nothing of ND is built or computed:
    that is the control.

    A batch is ``(x, targets)`` with labels (B,) or soft labels (B, K), as mixup and cutmix give them. DKD sets one class
    apart: of soft labels that with the largest weight.

    With ``teacher_cache`` the teacher runs once over the training images, and what it says comes from the disk from then on:
    the same loss, no teacher in memory. It needs a training transform without randomness and batches ``(x, targets,
    index)``: ``with_index=True`` of the zoo's data modules, or `zoo.data.IndexedDataset`.

    Logged per step: ``train/loss`` and the unweighted terms ``train/ce``, ``train/{base}``, ``train/nd``; per epoch the
    ramp, and which branch of the ND loss is active: ``nd/reward`` (mean r), ``nd/cosine``, ``nd/norm_ratio`` (mean of
    student norm / teacher norm), ``nd/longer_share`` (share of samples whose student is longer than the teacher).

    Args:
        student: the network that is trained: a tower name or a module that returns logits (B, K).
        teacher: the frozen network: a tower name, a module, or None for inference.
        num_classes: number of classes K; the student's own if omitted.
        base: ``"kd"`` (KD++), ``"dkd"`` (DKD++), ``"dist"`` (DIST++) on the logits, or ``"review_kd"`` (ReviewKD++) on
            the maps of the stages and the features.
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
        student_layers: for ``review_kd``: names of the student's modules whose outputs are compared, shallow to deep, or
            ``"name:input"`` for what goes into one; its stages if omitted.
        teacher_layers: the same of the teacher, equally many; its stages in front of their last ReLU if omitted.
        teacher_cache: file for the teacher's features and logits; written if there is none.
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
        >>> any(name.startswith("teacher") for name, _ in model.named_parameters())
        False
    """

    deployable = "student"
    training_only = ("teacher", "projector", "fusion")
    sized_by_file = ("class_means", "class_counts")

    class_means: Tensor | None
    class_counts: Tensor | None

    def __init__(
        self,
        student: str | dict[str, Any] | nn.Module,
        teacher: str | nn.Module | None = None,
        num_classes: int | None = None,
        *,
        base: Literal["kd", "dkd", "dist", "review_kd"] = "kd",
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
        student_layers: list[str] | None = None,
        teacher_layers: list[str] | None = None,
        teacher_cache: str | None = None,
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
            class_mean_views=class_mean_views, num_classes=self.num_classes, teacher_cache=teacher_cache,
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
        self.fusion: ReviewFusion | None = None
        self.register_buffer("class_means", None)
        self.register_buffer("class_counts", None)
        self._cache: TeacherCache | None = None
        self._cache_path = teacher_cache
        # Where a cache lies on this machine is no part of the model.
        self._arguments.pop("teacher_cache", None)
        if teacher is None:
            return
        head = {} if teacher_head is None else {"head": teacher_head}
        self._teacher_options = {**towers.tower_options("teacher_options", teacher_options), **head}
        if isinstance(teacher, str) and teacher_cache is not None and Path(teacher_cache).exists():
            self._open_cache(teacher, teacher_cache)
        else:
            self._attach_teacher(teacher)
        if base == "review_kd":
            self._attach_fusion(student_tower, student_layers, teacher_layers)
        if nd_weight > 0:
            self._attach_projection(student_tower.dim, projector_dropout)

    def _attach_teacher(self, teacher: str | nn.Module) -> None:
        # A bare architecture takes the student's number of classes; weights keep their own, which then has to agree.
        bare = isinstance(teacher, str) and not towers.has_weights(teacher)
        classes = self.num_classes if bare else None
        with isolate_rng(include_cuda=False):  # a teacher that comes from the disk draws no random numbers either
            tower = towers.create(teacher, frozen=True, num_classes=classes, **self._teacher_options)
        self._require_classes(tower.num_classes)
        self.attach_frozen("teacher", tower)

    def _open_cache(self, teacher: str, path: str) -> None:
        self._cache = TeacherCache.open(path)
        self._cache.check_teacher(teacher, self._teacher_options)
        self._require_classes(self._cache.num_classes)
        self._unbuilt_towers["teacher"] = {**self._cache.tower_facts, "training_only": True}

    def _require_classes(self, found: int) -> None:
        if found != self.num_classes:
            raise InputError(
                f"the teacher has {found} classes and the student {self.num_classes}, and distillation compares their "
                "logits: give a teacher that was trained on the student's classes"
            )

    def _attach_fusion(self, student: towers.Tower, layers: list[str] | None, teacher_layers: list[str] | None) -> None:
        network = self.teacher.network
        names = layers or stage_names(student.network)
        teacher_names = teacher_layers or preactivations(network, stage_names(network))
        if layers is None or teacher_layers is None:
            # Stages that were found are paired from the deepest on.
            levels = min(len(names), len(teacher_names))
            names, teacher_names = names[-levels:], teacher_names[-levels:]
        counts = len(names), len(teacher_names)
        if counts[0] != counts[1]:
            raise InputError(f"student_layers and teacher_layers must be equally many, got {counts[0]} and {counts[1]}")
        self.student_stages = StageTap(student.network, names)
        self.teacher_stages = StageTap(network, teacher_names)
        self.fusion = ReviewFusion(
            [*self.student_stages.channels, student.dim], [*self.teacher_stages.channels, self.teacher.dim]
        )

    def _attach_projection(self, student_dim: int, dropout: float) -> None:
        dim = self.teacher.dim if self._cache is None else self._cache.dim
        self.class_means = torch.zeros(self.num_classes, dim)
        self.class_counts = torch.zeros(self.num_classes, dtype=torch.int64)
        if dim != student_dim:
            self.projector = Projector(student_dim, dim, dropout=dropout)

    # -- fit -------------------------------------------------------------------------------------------------------

    @property
    def _taps(self) -> list[FeatureTap | OutputTap | StageTap]:
        taps: list[FeatureTap | OutputTap | StageTap] = [self.student_tap]
        taps += [tower.tap for tower in self.frozen_towers.values()]
        return taps if self.fusion is None else [*taps, self.student_stages, self.teacher_stages]

    def setup(self, stage: str) -> None:
        """Keep the feature hooks for the whole fit, so that a compiled training step need not register them.

        Raises:
            InputError: there is no teacher to fit with.
        """
        if stage == "fit":
            if "teacher" not in self.frozen_towers and self._cache is None:
                raise InputError(
                    "training needs a teacher: give teacher=…, or load the stored model with for_training=True"
                )
            for tap in self._taps:
                tap.install()

    def teardown(self, stage: str) -> None:
        """Take the feature hooks away."""
        for tap in self._taps:
            tap.remove()

    def on_train_start(self) -> None:
        """Fill or check the teacher's cache, and compute the class means unless a checkpoint or a stored model brought them.

        Raises:
            InputError: the cache is of other data, or the training transform is random.
        """
        if self._cache_path is not None:
            self._prepare_cache(self._cache_path)
        if self.class_counts is not None and not bool(self.class_counts.any()):
            assert self.class_means is not None
            means, counts = self._class_means() if self._cache is None else self._cache.class_means()
            self.class_means.copy_(means)
            self.class_counts.copy_(counts)
            rank_zero_info(f"class means of the teacher over {int(counts.sum())} images")
            absent = (counts == 0).nonzero().flatten().tolist()
            if absent:
                rank_zero_warn(f"classes {absent} have no training image: their samples do not count in the ND loss")
        super().on_train_start()

    def _class_means(self) -> tuple[Tensor, Tensor]:
        return compute_class_means(
            self.teacher, self.trainer, num_classes=self.num_classes, views=self.class_mean_views,
            split_batch=lambda batch: (batch[0], batch[1]),
        )  # fmt: skip

    def _prepare_cache(self, path: str) -> None:
        # One answer for all processes: another run may be writing the file.
        if self._cache is None and self.trainer.strategy.broadcast(Path(path).exists()):
            self._cache = TeacherCache.open(path)
            self._cache.check_teacher(self.teacher, self._teacher_options)
        if self._cache is None:
            with self.trainer.precision_plugin.forward_context():
                self._cache = TeacherCache.build(path, self.teacher, self.trainer, options=self._teacher_options)
        self._cache.check_data(self.trainer)
        if "teacher" in self.frozen_towers:
            self.teacher.tap.remove()
            self._unbuilt_towers["teacher"] = hub.tower_facts(self)["teacher"]
            del self._frozen_towers["teacher"]

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        # Lightning's own, and not the public hook of that name: a data module that has the hook would take its place.
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if self._cache is None or not self.trainer.training or not isinstance(batch, list | tuple) or len(batch) != 3:
            return batch
        x, targets, index = batch
        return x, targets, *self._cache.lookup(index, targets, pin_memory=self.device.type == "cuda")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the objective of the class docstring for one batch ``(x, targets)``, or ``(x, targets, index)``."""
        x, targets = check_batch(batch[:2] if isinstance(batch, list | tuple) else batch, self.num_classes)
        maps: Maps = ([], [])
        if self._cache is not None:
            teacher_features, teacher_logits = self._cached(batch)
            features, logits = self.student_tap(x)
        elif self.fusion is None:
            with torch.no_grad():
                teacher_features, teacher_logits = self.teacher.features_and_logits(x)
            features, logits = self.student_tap(x)
        else:
            with torch.no_grad():
                collected = self.teacher_stages.collect(self.teacher.features_and_logits, x)
                (teacher_features, teacher_logits), teacher_maps = collected
            (features, logits), student_maps = self.student_stages.collect(self.student_tap, x)
            maps = ([*student_maps, features], [*teacher_maps, teacher_features])

        ce = F.cross_entropy(logits.float(), targets)
        base = self._base_loss(logits, teacher_logits, targets, maps)
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

    def _cached(self, batch: Any) -> tuple[Tensor, Tensor]:
        if len(batch) != 4:
            raise InputError(
                f"teacher_cache needs batches (x, targets, index), which nothing mixes, got {len(batch)} parts: give "
                "with_index=True to a data module of the zoo, or wrap your data set in zoo.data.IndexedDataset"
            )
        return batch[2], batch[3]

    def on_train_epoch_start(self) -> None:
        """Log the ramp of the base term."""
        self.log("train/ramp", self._ramp(self.warmup_epochs), sync_dist=True)

    def _base_loss(self, logits: Tensor, teacher_logits: Tensor, targets: Tensor, maps: Maps) -> Tensor:
        if self.fusion is not None:
            student_maps, teacher_maps = maps
            return review_kd_loss(self.fusion(student_maps, [m.shape[2:] for m in teacher_maps]), teacher_maps)
        if self.base == "dkd":
            hard = targets if targets.ndim == 1 else targets.argmax(1)
            weights = {"alpha": self.dkd_alpha, "beta": self.dkd_beta}
            return dkd_loss(logits, teacher_logits, hard, temperature=self.temperature, **weights)
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
        if self.global_step % max(1, getattr(self.trainer, "log_every_n_steps", 50)):
            return
        assert self.class_means is not None
        statistics = nd_statistics(features, teacher_features, self.class_means, targets)
        self.log_dict({f"nd/{name}": value for name, value in statistics.items()}, batch_size=len(features))


def _check_options(**options: Any) -> None:
    for name, allowed in {"base": _BASES, "nd_reduction": ("mean", "class")}.items():
        require_choice(name, options[name], allowed)
    if options["temperature"] <= 0:
        raise InputError(f"temperature must be positive, got {options['temperature']}")
    for name in ("nd_weight", "kd_weight", "ce_weight", "warmup_epochs", "nd_warmup_epochs"):
        if options[name] < 0:
            raise InputError(f"{name} must not be negative, got {options[name]}")
    if options["class_mean_views"] is not None and options["class_mean_views"] < 1:
        raise InputError(f"class_mean_views must be at least 1 or None, got {options['class_mean_views']}")
    if options["base"] == "review_kd" and options["teacher_cache"] is not None:
        raise InputError(
            "teacher_cache holds features and logits, and base='review_kd' compares maps: leave teacher_cache out"
        )
    if options["base"] == "dkd" and options["num_classes"] < 3:
        raise InputError(
            f"base='dkd' compares the non-target classes: it needs 3 or more, got {options['num_classes']}"
        )
