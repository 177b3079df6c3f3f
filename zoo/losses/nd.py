"""ND loss: feature norm and direction, pulled along the teacher's class means.

Wang, Cheng, Duan, Wang, Feng, Kong: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm" (ECCV
2024, DOI 10.1007/978-3-031-72691-0_2; arXiv 2305.17007, titled "… Feature Norm and Direction").

Against plain feature regression, the teacher gives two things only: the direction of its *class mean* c_k (not of its
embedding of the sample), and the length of its embedding t_i of the sample. With student embedding s_i and label y_i:

    r_i = <s_i, c_{y_i} / |c_{y_i}|> / max(|s_i|, |t_i|)            L_nd = mean_i (1 - r_i)

A student shorter than the teacher has a reward linear in s: it is pulled along the class direction, in angle and in
length. A longer one is rewarded by its cosine alone and feels no force along its own length, so the teacher's length is
where the encouragement stops, not a target. While <s, c> < 0, a shorter student *shrinks*; with post-ReLU features this
cannot happen, behind a projector or a layer norm it can.

Read: the authors' released code. Not read: the full text of the paper, so its equation numbers are not given here, and
the class-balanced form (`reduction="class"`) is reconstructed. Deliberate differences from the release:

- whole-batch tensor operations; the release loops over samples and waits for the GPU several times in each;
- float32 (or float64) in a region without autocast; the release raises on mixed precision;
- two zero vectors give the term 1 with gradient 0; the release gives NaN;
- a teacher embedding with NaN or infinity gives a NaN loss; the release hides a NaN length behind the student's;
- a class without a mean (a row of zeros) leaves its samples out; the release divides by zero;
- soft labels mix the class means themselves; the release spreads label smoothing over the samples of the batch.

As in the release, the maximum is not detached, and where |s| = |t| the student's length is the one that is
differentiated.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import (
    lengths_may_overflow,
    require_labels,
    require_matrix,
    require_same_layout,
    shrinking_factor,
    working_dtype,
)

__all__ = ["nd_loss", "nd_statistics"]

# Below this length the direction of a vector is noise, and dividing by it would give gradients of 1/length.
_NEGLIGIBLE_NORM = 1e-6


class _Alignment(NamedTuple):
    """Per-sample pieces of the loss, all of shape (B,); only `reward` carries a graph."""

    reward: Tensor  # r_i; 0 where both embeddings are negligible or the class has no mean
    student_norm: Tensor
    teacher_norm: Tensor
    weight: Tensor  # 1, or 0 where the class has no mean


def nd_loss(
    student: Tensor,
    teacher: Tensor,
    centres: Tensor,
    targets: Tensor,
    *,
    reduction: Literal["mean", "none", "class"] = "mean",
) -> Tensor:
    """Distance of student features from the teacher's class directions at its length, averaged over the batch.

    The value of a sample is `1 - r` (see the module's docstring), in [0, 2], and does not depend on the rest of the
    batch. Features come in raw: nothing has to be normalised or detached by the caller. `teacher`, `centres` and
    `targets` are constants, detached here; the gradient flows to `student` alone.

    Defined cases:

    - both embeddings shorter than 1e-6: value 1, gradient 0;
    - a class whose mean is a row of zeros: its samples are left out of every mean and have the value 0 under
      `reduction="none"` (an included sample has 0 only if it is perfectly aligned and at least as long as the teacher);
    - no sample left, or an empty batch: 0, still connected to `student`, so that DDP finds its graph;
    - NaN or infinity in any feature, teacher's and left-out samples' included: NaN.

    Under DDP the mean of the ranks' `"mean"` values is the global one if all ranks have equally many counted samples;
    `"class"` has no such property.

    Args:
        student: features (B, D) of the student, those that enter its classifier, projected to the teacher's width if
            the widths differ.
        teacher: features (B, D) of the teacher for the same samples, in any floating-point type.
        centres: mean teacher feature (K, D) of each class, not normalised; zeros for a class without samples.
        targets: labels (B,) in 0 … K - 1, or non-negative weights (B, K) over classes (mixup, label smoothing), which
            need not sum to 1; the sample's centre is then `targets @ centres`. Classes without a mean add nothing.
        reduction: `"mean"` over samples (the released code); `"none"` for the values (B,); `"class"` for the mean of
            the class means of the value, over the classes present in the batch (the paper's form plus the constant 1,
            reconstructed), which needs integer labels.

    Returns:
        The loss without a unit, a scalar or (B,), in float32; in float64 if `student` is float64.

    Raises:
        InputError: wrong dimensions, shapes that do not match, tensors on different devices, features that are not
            floating point, labels out of range or weights below 0 (both are looked at on the CPU only), an unknown
            reduction, or `reduction="class"` with soft labels.

    Example:
        A student along the class direction and as long as the teacher has loss 0, an orthogonal one has loss 1:

        >>> centres = torch.tensor([[2.0, 0.0]])
        >>> student = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> nd_loss(student, student, centres, torch.tensor([0, 0]), reduction="none")
        tensor([0., 1.])
    """
    _check(student, teacher, centres, targets)
    require_choice("reduction", reduction, ("mean", "none", "class"))
    if reduction == "class" and targets.ndim == 2:
        raise InputError(
            "reduction='class' needs integer labels (B,), got soft labels (B, K): a mixed sample has no one class; "
            "pass targets.argmax(1) or use reduction='mean'"
        )
    with torch.autocast(student.device.type, enabled=False):
        parts = _align(student, teacher, centres, targets)
        # A sample that is left out has weight 0 and reward 0, unless it holds NaN, which stays visible.
        terms = parts.weight - parts.reward
        if reduction == "none":
            return terms
        if reduction == "mean":
            return terms.sum() / parts.weight.sum().clamp_min(1)
        per_class = parts.weight.new_zeros(centres.shape[0]).index_add_(0, targets.long(), parts.weight)
        classes_present = (per_class > 0).sum().clamp_min(1)
        return (terms / per_class.clamp_min(1)[targets.long()]).sum() / classes_present


@torch.no_grad()
def nd_statistics(student: Tensor, teacher: Tensor, centres: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Which branch of the loss is at work: mean reward, cosine and length ratio, and the share of longer students.

    Computed without a graph. Samples whose class has no mean are left out; with no sample left every value is 0. NaN
    in the features gives NaN in the means made from them, and counts as "not longer". Each value is a mean over the
    given batch only (this process's, under DDP).

    Args:
        student: features (B, D) of the student, as for `nd_loss`.
        teacher: features (B, D) of the teacher, as for `nd_loss`.
        centres: mean teacher feature (K, D) of each class, as for `nd_loss`.
        targets: labels (B,) or weights (B, K), as for `nd_loss`.

    Returns:
        Scalars in float32 (float64 if `student` is float64) without a unit: `reward`, the mean of r in [-1, 1];
        `cosine`, the mean cosine of student and class direction in [-1, 1], 0 for a student shorter than 1e-6;
        `norm_ratio`, the mean of |s| / |t| over the samples with |t| above 1e-6; `longer_share`, the share of
        samples with |s| > |t|.

    Raises:
        InputError: as for `nd_loss`.

    Example:
        >>> features, labels = torch.tensor([[3.0, 0.0]]), torch.tensor([0])
        >>> statistics = nd_statistics(2 * features, features, torch.tensor([[1.0, 0.0]]), labels)
        >>> {name: float(value) for name, value in statistics.items()}
        {'reward': 1.0, 'cosine': 1.0, 'norm_ratio': 2.0, 'longer_share': 1.0}
    """
    _check(student, teacher, centres, targets)
    with torch.autocast(student.device.type, enabled=False):
        parts = _align(student, teacher, centres, targets)
        included = parts.weight.sum().clamp_min(1)
        has_length = parts.weight * ~(parts.teacher_norm <= _NEGLIGIBLE_NORM)
        projection = parts.reward * torch.maximum(parts.student_norm, parts.teacher_norm)
        cosine = _ratio(projection, parts.student_norm)
        norm_ratio = _ratio(parts.student_norm, parts.teacher_norm)
        return {
            "reward": (parts.reward * parts.weight).sum() / included,
            "cosine": (cosine * parts.weight).sum() / included,
            "norm_ratio": (norm_ratio * has_length).sum() / has_length.sum().clamp_min(1),
            "longer_share": ((parts.student_norm > parts.teacher_norm) * parts.weight).sum() / included,
        }


def _align(student: Tensor, teacher: Tensor, centres: Tensor, targets: Tensor) -> _Alignment:
    dtype = working_dtype(student)
    if targets.ndim == 2:
        centre = targets.detach().to(dtype) @ centres.detach().to(dtype)
    else:
        centre = centres.detach().index_select(0, targets.long()).to(dtype)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    norms = [torch.linalg.vector_norm(rows, dim=1) for rows in (teacher, centre)]
    # The student's is part of what follows.
    if not lengths_may_overflow(*norms):
        reward, student_norm = _Reward.apply(student, centre, _inverse(norms[1]), norms[0])
        if not lengths_may_overflow(student_norm):
            return _Alignment(reward, student_norm.detach(), norms[0], (norms[1] != 0).to(dtype))
    # The reward is one of directions and of a ratio of lengths: a power of two for both embeddings does not change it.
    norms.append(torch.linalg.vector_norm(student.detach(), dim=1))
    of_teacher, of_centre, of_student = (shrinking_factor(norm) for norm in norms)
    both = torch.minimum(of_student, of_teacher).unsqueeze(1)
    centre = centre * of_centre.unsqueeze(1)
    centre_norm, shrunk = (torch.linalg.vector_norm(rows, dim=1) for rows in (centre, teacher * both))
    reward, _ = _Reward.apply(student * both, centre, _inverse(centre_norm), shrunk)
    student_norm, teacher_norm = (
        torch.linalg.vector_norm(rows * factor.unsqueeze(1), dim=1) / factor
        for rows, factor in ((student.detach(), of_student), (teacher, of_teacher))
    )
    return _Alignment(reward, student_norm, teacher_norm, (centre_norm != 0).to(dtype))


def _inverse(centre_norm: Tensor) -> Tensor:
    """What the inner product with a class mean is multiplied by; 0 for a class without one."""
    usable = centre_norm.clamp_min(torch.finfo(centre_norm.dtype).tiny)
    # x / inf is 0, and what is infinite would pass for orthogonal; 0 * inf makes it NaN.
    return (centre_norm != 0).to(centre_norm.dtype) / usable + 0 * centre_norm


class _Reward(torch.autograd.Function):
    """The reward `<s, c> inverse / max(|s|, |t|)` and the length `|s|` of each sample, differentiable in `s`.

    The gradient of the reward is written out:

        dr/ds = c inverse / max(|s|, |t|)  -  (|s| >= |t|) r s / |s|^2

    Operation by operation, the gradient passes over memory twice as often, which on a CPU is most of the time of the
    loss. It is made of the saved tensors, outputs included, by operations that autograd follows, so higher orders are
    exact too.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, centre: Tensor, inverse: Tensor, teacher_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        student_norm = torch.linalg.vector_norm(student, dim=1)
        # The floor keeps the division finite; where it is reached, `scale` is 0, and with it the reward and its
        # gradient.
        floor = teacher_norm.clamp_min(_NEGLIGIBLE_NORM)
        # `>=` gives a tie to the student, as the release does (torch.maximum would split it).
        longer = student_norm >= floor
        bound = torch.where(longer, student_norm, floor)
        scale = inverse * (bound > _NEGLIGIBLE_NORM) + 0 * bound
        reward = (student * centre).sum(1) * scale / bound
        ctx.save_for_backward(student, centre, scale, floor, longer, student_norm, reward)
        return reward, student_norm

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        student, centre, scale, floor, longer, student_norm, reward = ctx.saved_tensors
        of_reward, of_norm = gradients
        result: Tensor | None = None
        if of_reward is not None:
            bound = torch.where(longer, student_norm, floor)
            share = of_reward / bound
            along = share * reward * longer / bound
            result = (centre * (share * scale).unsqueeze(1)).addcmul_(student, along.unsqueeze(1), value=-1)
        if of_norm is not None:  # in second derivatives only
            unit = student / torch.where(student_norm == 0, 1, student_norm).unsqueeze(1)
            through_norm = unit * of_norm.unsqueeze(1)
            result = through_norm if result is None else result + through_norm
        return result, None, None, None


def _ratio(numerator: Tensor, length: Tensor) -> Tensor:
    """`numerator / length`, and 0 where the length is negligible; NaN stays NaN."""
    return torch.where(length <= _NEGLIGIBLE_NORM, 0, numerator / length.clamp_min(_NEGLIGIBLE_NORM))


def _check(student: Tensor, teacher: Tensor, centres: Tensor, targets: Tensor) -> None:
    require_matrix("student", student)
    require_matrix("teacher", teacher)
    require_same_layout("teacher", teacher, "student", student)
    require_matrix("centres", centres)
    if centres.shape[1] != student.shape[1]:
        raise InputError(
            f"centres must have the width of student, got {centres.shape[1]} and {student.shape[1]}; were the class "
            "means made with another teacher?"
        )
    for name, value in (("centres", centres), ("targets", targets)):
        if value.device != student.device:
            raise InputError(f"{name} must be on the device of student, got {value.device} and {student.device}")
    rows, classes = student.shape[0], centres.shape[0]
    if targets.is_floating_point():
        _check_soft_labels(targets, rows=rows, classes=classes)
    else:
        require_labels("targets", targets, rows=rows, classes=classes)


def _check_soft_labels(targets: Tensor, *, rows: int, classes: int) -> None:
    if targets.shape != (rows, classes):
        raise InputError(
            f"targets in floating point must be soft labels, one row of {classes} weights per sample, shape "
            f"({rows}, {classes}), got shape {tuple(targets.shape)}; labels have an integer type"
        )
    if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
        lowest = float(targets.detach().min())
        if lowest < 0:
            raise InputError(f"targets must not be negative, found {lowest}; soft labels are weights over classes")
