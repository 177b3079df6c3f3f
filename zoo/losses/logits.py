"""Distillation from logits: KD, DKD and DIST, the base objectives that feature losses such as ND are added to.

Sources, none of which was read in full for this file; formulas and defaults follow the released code of mdistiller
(KD, DKD) and of the ND authors (DIST), as recorded line by line in this project's notes on arXiv 2305.17007:

- KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531;
- DKD: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679;
- DIST: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.

With p = softmax(z / T), teacher t, student s, label y:

    KD    T^2 mean_i KL(p_t || p_s)
    DKD   alpha T^2 mean_i KL(b_t || b_s) + beta T^2 mean_i KL(q_t || q_s)
          where b = (p_y, 1 - p_y), and q = softmax over the K - 1 classes other than y
    DIST  beta T^2 (1 - mean_i corr(p_s[i, :], p_t[i, :])) + gamma T^2 (1 - mean_k corr(p_s[:, k], p_t[:, k]))

For one sample KL(p_t || p_s) = KL(b_t || b_s) + (1 - p_t[y]) KL(q_t || q_s).

Deliberate differences from the released code: KD and DKD stay in log space (the release takes the logarithm of sums of
probabilities, infinite as soon as one underflows) and DKD removes the label's column (the release subtracts 1000 from
it); predictions that do not vary have the correlation 0 with gradient 0 in DIST (the released formula has
gradients of the order of 1e7 there); the term of DIST over the batch can be made global under DDP.

In all of them the teacher's logits are constants, detached here; the caller detaches nothing. NaN in the logits gives
NaN, and so may logits that, divided by the temperature, are beyond 1e38. An empty batch, or one without classes, gives 0,
still connected to the student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.contracts import require_labels, require_matrix, require_number, require_same_layout, working_dtype
from zoo.losses.ranks import gather_rows, rank_and_size, require_equal_batches

__all__ = ["dist_loss", "dkd_loss", "kd_loss"]

# Added to the product of norms by the released DIST; the golden numbers of that code need it.
_DIST_EPSILON = 1e-8
_HIGHEST_TEMPERATURE = 1e15


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Mean divergence of the student's softened prediction from the teacher's, times `temperature**2`.

    `T^2 mean_i KL(p_t || p_s)` (see the module's docstring). A sample's value does not depend on the rest of the
    batch, so that the mean of equally large ranks is the global loss. Finite for logits up to 1e6 and beyond.

    Args:
        student_logits: logits (B, K) of the student.
        teacher_logits: logits (B, K) of the teacher, constants; any floating-point type.
        temperature: divides the logits, above 0; 4 for CIFAR, 1 for ImageNet in the released code.

    Returns:
        A scalar of at least 0, in nats times `temperature**2`, in float32; in float64 if `student_logits` is float64.

    Raises:
        InputError: shapes or devices differ, a tensor is not (B, K) in floating point, or the temperature is not
            positive or above 1e15.

    Example:
        >>> kd_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 6.0]]))
        tensor(0.)
    """
    _check(student_logits, teacher_logits, temperature)
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = _soften(student_logits, teacher_logits, temperature)
        divergence = _divergence(F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1))
        return temperature**2 * _mean(divergence)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """KD split into "how sure of the label" and "what else", averaged over samples and weighted apart.

    `alpha * TCKD + beta * NCKD` (see the module's docstring), each with the factor `temperature**2`. `alpha=1, beta=0`
    gives TCKD alone, `alpha=0, beta=1` gives NCKD alone. A sample's value does not depend on the rest of the batch.
    Finite for logits up to 1e6 and beyond.

    Args:
        student_logits: logits (B, K) of the student.
        teacher_logits: logits (B, K) of the teacher, constants; any floating-point type.
        targets: labels (B,) in 0 … K - 1. Soft labels have no class to take apart and are refused.
        alpha: weight of the label's part (TCKD), at least 0.
        beta: weight of the other classes' part (NCKD), at least 0; 2, 6 or 8 for CIFAR pairs in the released code.
        temperature: divides the logits, above 0; 4 for CIFAR, 1 for ImageNet in the released code.

    Returns:
        A scalar of at least 0, in nats times `temperature**2`, in float32; in float64 if `student_logits` is float64.

    Raises:
        InputError: shapes or devices differ, a tensor is not (B, K) in floating point, soft labels, a label out of
            range (looked at on the CPU only), fewer than two classes, two classes with `beta` other than 0 (one class
            remains beside the label, and its distribution is always 1), a weight below 0, or a temperature that is not
            positive or above 1e15.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> dkd_loss(logits, logits + 3, torch.tensor([0]))
        tensor(0.)
    """
    _check(student_logits, teacher_logits, temperature)
    require_number("alpha", alpha, positive=False)
    require_number("beta", beta, positive=False)
    _check_dkd_targets(student_logits, targets, beta)
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = _soften(student_logits, teacher_logits, temperature)
        student_label, student_others = _split(student, targets)
        teacher_label, teacher_others = _split(teacher, targets)
        # log p_y - log(1 - p_y): with it the two-class distribution needs no sum of probabilities.
        student_margin = student_label - student_others.logsumexp(1)
        teacher_margin = teacher_label - teacher_others.logsumexp(1)
        label_part = _divergence(_two_classes(teacher_margin), _two_classes(student_margin))
        others_part = _divergence(F.log_softmax(teacher_others, dim=1), F.log_softmax(student_others, dim=1))
        return temperature**2 * _mean(alpha * label_part + beta * others_part)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
    gather: bool = False,
) -> Tensor:
    """One minus the correlation of the two predictions, within samples (inter) and within classes (intra).

    `beta * inter + gamma * intra` (see the module's docstring), each with the factor `temperature**2` and the
    release's 1e-8 added to the product of norms. The intra term correlates a class's probabilities over the batch, so
    a sample's value depends on its batch: a batch of one has the constant intra term `gamma * temperature**2`. A
    prediction that does not vary beyond rounding (constant logits, say) has the correlation 0 with gradient 0.

    With `gather=True` and a process group, the batches of all processes are put together first: every process returns
    the loss of the global batch, and the mean of the gradients over processes, which is what DDP takes, is the exact
    gradient of it. All processes must then have equally large batches. Without a process group `gather` changes
    nothing.

    Args:
        student_logits: logits (B, K) of the student.
        teacher_logits: logits (B, K) of the teacher, constants; any floating-point type.
        beta: weight of the term over classes within a sample (inter), at least 0.
        gamma: weight of the term over samples within a class (intra), at least 0.
        temperature: divides the logits, above 0; 4 in the ND authors' code.
        gather: whether the batch is that of all processes instead of this one's.

    Returns:
        A scalar in [0, 2 (beta + gamma) temperature**2], in float32; in float64 if `student_logits` is float64.

    Raises:
        InputError: shapes or devices differ, a tensor is not (B, K) in floating point, a weight below 0, a temperature
            that is not positive, or processes with unequal batches under `gather` (with tensors on a GPU this is a
            device-side assertion, which does not make the host wait).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
        >>> round(float(dist_loss(logits, logits + 3)), 3)
        0.0
    """
    _check(student_logits, teacher_logits, temperature)
    require_number("beta", beta, positive=False)
    require_number("gamma", gamma, positive=False)
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = _soften(student_logits, teacher_logits, temperature)
        if rank_and_size(gather=gather)[1] > 1:
            require_equal_batches(student)
            # The logits and not the terms: every process then computes the global loss itself, value and gradient.
            student, teacher = gather_rows(student), gather_rows(teacher)
        if student.numel() == 0:
            return student.sum()
        student, teacher = student.softmax(dim=1), teacher.softmax(dim=1)
        inter = 1 - _correlation(student, teacher, dim=1).mean()
        intra = 1 - _correlation(student, teacher, dim=0).mean()
        return temperature**2 * (beta * inter + gamma * intra)


def _soften(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(student_logits)
    return student_logits.to(dtype) / temperature, teacher_logits.detach().to(dtype) / temperature


def _divergence(teacher_log: Tensor, student_log: Tensor) -> Tensor:
    """KL(teacher || student) of each row of log-probabilities."""
    return (teacher_log.exp() * (teacher_log - student_log)).sum(1)


def _mean(values: Tensor) -> Tensor:
    """The mean, and 0 for no values at all."""
    return values.sum() / max(values.shape[0], 1)


def _split(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The label's logit (B,) and the others (B, K - 1), in their order."""
    label = targets.long().unsqueeze(1)
    position = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, label).squeeze(1), logits.gather(1, position + (position >= label))


def _two_classes(margin: Tensor) -> Tensor:
    """Log-probabilities (B, 2) of a class that leads the other by `margin` logits."""
    return torch.stack((F.logsigmoid(margin), F.logsigmoid(-margin)), dim=1)


def _correlation(first: Tensor, second: Tensor, *, dim: int) -> Tensor:
    """Pearson correlation of probabilities along `dim`, as the released DIST damps it."""
    first_deviation, first_norm, first_varies = _deviation(first, dim)
    second_deviation, second_norm, second_varies = _deviation(second, dim)
    correlation = (first_deviation * second_deviation).sum(dim) / (first_norm * second_norm + _DIST_EPSILON)
    return torch.where(first_varies & second_varies, correlation, 0)


def _deviation(values: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = values.mean(dim, keepdim=True)
    deviation = values - mean
    norm = torch.linalg.vector_norm(deviation, dim=dim)
    # Equal values leave a deviation of a few roundings behind. Dividing by it would turn noise into a correlation of
    # any size, with a gradient of 1 / epsilon. The comparison is negated so that NaN counts as varying and stays
    # visible.
    rounding = 8 * torch.finfo(values.dtype).eps * values.shape[dim] ** 0.5
    return deviation, norm, ~(norm <= rounding * mean.squeeze(dim))


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    require_matrix("student_logits", student_logits)
    require_matrix("teacher_logits", teacher_logits)
    if teacher_logits.ndim == student_logits.ndim and teacher_logits.shape[1] != student_logits.shape[1]:
        raise InputError(
            f"teacher_logits must have as many classes as student_logits, got {teacher_logits.shape[1]} and "
            f"{student_logits.shape[1]}; both must be trained on the same classes"
        )
    require_same_layout("teacher_logits", teacher_logits, "student_logits", student_logits)
    require_number("temperature", temperature, positive=True)
    if temperature > _HIGHEST_TEMPERATURE:
        raise InputError(
            f"temperature must be at most {_HIGHEST_TEMPERATURE:g}, got {temperature}: its square is a factor of the loss, "
            "which float32 has to hold"
        )


def _check_dkd_targets(student_logits: Tensor, targets: Tensor, beta: float) -> None:
    rows, classes = student_logits.shape
    if targets.is_floating_point():
        raise InputError(
            f"targets must be integer labels, got {targets.dtype}: dkd_loss sets the label's class apart, which soft "
            "labels do not have; use kd_loss or pass targets.argmax(1)"
        )
    if classes < 2 or (classes == 2 and beta != 0):
        raise InputError(
            f"dkd_loss needs at least 3 classes, got {classes}: beside the label no distribution is left to compare; "
            "with 2 classes pass beta=0, which leaves the label's part"
        )
    require_labels("targets", targets, rows=rows, classes=classes)
    if targets.device != student_logits.device:
        raise InputError(
            f"targets must be on the device of student_logits, got {targets.device} and {student_logits.device}"
        )
