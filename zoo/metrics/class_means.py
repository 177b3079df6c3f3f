"""Mean feature of each class, accumulated over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.errors import InputError
from zoo.losses.contracts import require_labels, require_matrix

__all__ = ["ClassMeans"]

# Devices that hold no float64 tensor.
_WITHOUT_FLOAT64 = frozenset({"mps"})


class ClassMeans(Metric):
    """Arithmetic mean of the features of each class: `c_k = sum_{i: y_i = k} x_i / n_k`.

    Kept are sums and counts, not means, so that batches of any size and processes with shards of any size give the mean
    over all samples: sums and counts are added over processes before the division. A sampler that pads a shard by
    repeating samples makes those samples count twice; use one that does not.

    Sums are float64 whatever the type of the features, and stay so when a module that holds this metric is converted to
    another type. On a device without float64 (MPS) they are float32.

    A class without samples has a row of zeros, which `zoo.losses.nd_loss` understands as "no mean". `counts` tells it
    from a class whose features cancel.

    Source: the class means of "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
    (arXiv 2305.17007). The authors' script sums in one process and rounds to four decimals; nothing is rounded here.

    Args:
        num_classes: how many classes there are, at least 1.
        dim: width of the features, at least 1.

    Raises:
        InputError: `num_classes` or `dim` is below 1.

    Example:
        >>> means = ClassMeans(num_classes=3, dim=2)
        >>> means.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 2]))
        >>> means.compute()
        tensor([[2., 0.],
                [0., 0.],
                [0., 5.]], dtype=torch.float64)
        >>> means.counts
        tensor([2, 0, 1])
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    class_sums: Tensor
    class_counts: Tensor

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("dim", dim)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.num_classes = num_classes
        self.dim = dim
        self._counts_of_means: Tensor | None = None
        self.add_state("class_sums", torch.zeros(num_classes, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("class_counts", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add a batch; an empty one adds nothing. A batch that is refused leaves the sums as they were.

        Args:
            features: features (B, dim) in any floating-point type; detached here.
            targets: labels (B,) in 0 … num_classes - 1.

        Raises:
            InputError: wrong shapes or types, labels out of range, or features that are NaN or infinite. The contents
                are looked at on every device, which makes the host wait for a GPU.
        """
        self._check(features, targets)
        targets = targets.to(self.class_sums.device, torch.int64)
        rows = features.detach().to(self.class_sums.device, self.class_sums.dtype)
        self._check_finite(rows)
        self._leave_inference()
        self.class_sums.index_add_(0, targets, rows)
        self.class_counts.index_add_(0, targets, torch.ones_like(targets))

    def compute(self) -> Tensor:
        """Divide the sums by the counts, over all processes.

        Returns:
            Means (num_classes, dim) in the type of the sums; zeros for a class without samples. A single number (one
            class of width one) comes as a scalar, as from any torchmetrics metric.
        """
        # Inside compute torchmetrics has put the sums of all processes in place of this one's.
        self._counts_of_means = self.class_counts.clone()
        return self.class_sums / self.class_counts.clamp_min(1).unsqueeze(1)

    @property
    def counts(self) -> Tensor:
        """Samples of each class (num_classes,), int64.

        After `compute()` those behind its result, of all processes; after a later `update` or `reset`, and before the
        first `compute()`, those that this process has seen.
        """
        # torchmetrics forgets its result at each update and reset, and so do we; it annotates the attribute as None.
        computed = cast("Tensor | None", self._computed)
        return self.class_counts if computed is None or self._counts_of_means is None else self._counts_of_means

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        target = fn(torch.empty(0, device=self.class_counts.device)).device
        if target.type in _WITHOUT_FLOAT64:
            self.class_sums = self.class_sums.float()
            self._defaults["class_sums"] = cast(Tensor, self._defaults["class_sums"]).float()

        def keep_type(tensor: Tensor) -> Tensor:
            # `module.to(torch.bfloat16)` would otherwise round the sums.
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(target)

        if self._counts_of_means is not None:
            self._counts_of_means = keep_type(self._counts_of_means)
        return super()._apply(keep_type, exclude_state)

    def _leave_inference(self) -> None:
        # A reset inside inference_mode leaves tensors that cannot be changed in place outside of it.
        if self.class_sums.is_inference() and not torch.is_inference_mode_enabled():
            self.class_sums, self.class_counts = self.class_sums.clone(), self.class_counts.clone()

    def _check(self, features: Tensor, targets: Tensor) -> None:
        require_matrix("features", features)
        if features.shape[1] != self.dim:
            raise InputError(f"features must have the width dim={self.dim}, got shape {tuple(features.shape)}")
        # On the CPU, where the range of the labels is looked at.
        require_labels("targets", targets.cpu(), rows=features.shape[0], classes=self.num_classes)

    @staticmethod
    def _check_finite(rows: Tensor) -> None:
        # One cheap pass: a sum is finite only if every term is. The rows are looked at when it is not.
        if not rows.sum().isfinite():
            broken = rows.isfinite().all(1).logical_not().nonzero().flatten().tolist()
            if broken:
                raise InputError(
                    f"features must be finite, {len(broken)} of {rows.shape[0]} samples hold NaN or infinity, "
                    f"the first at position {broken[0]}"
                )
