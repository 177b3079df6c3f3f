"""HCL, the hierarchical context loss of ReviewKD: feature maps compared at full size and after pooling.

Chen, Liu, Zhao, Jia: "Distilling Knowledge via Knowledge Review" (CVPR 2021, arXiv 2104.09044). Against plain feature
regression, each level is compared several times: as it is, and averaged to 4 x 4, 2 x 2 and 1 x 1 cells, so that large
errors in the mean of a region weigh more than the same error in one cell. For student maps F_s and teacher maps F_t of
one level with sides H x W:

    HCL = [ MSE(F_s, F_t) + sum_l w_l MSE(pool_l F_s, pool_l F_t) ] / (1 + sum_l w_l),    l in (4, 2, 1), l < min(H, W)

with w = 1/2, 1/4, 1/8 in the order of the sizes that are used: a size that is left out does not halve the weight of the
next one. Levels are summed. The maps have to have the same shape; `zoo.review_fusion.ReviewFusion` makes them so.

Read: the project's notes on the authors' release and its golden values, not the text of the paper. Differences:

- float32 (or float64) in a region without autocast;
- pooling is linear, so the difference of the maps is pooled, once in place of twice;
- maps that are not square are pooled to l x l cells if l is below their shorter side; the release looks at H alone;
- a vector (B, C), which the release passes as a map of one pixel, is compared as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.losses.contracts import require_same_layout, working_dtype

__all__ = ["review_kd_loss"]


def review_kd_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, pool_sizes: Sequence[int] = (4, 2, 1)
) -> Tensor:
    """Hierarchical context loss of feature maps, averaged over samples and channels and summed over levels.

    Maps come in raw: nothing has to be normalised or detached by the caller. The teacher's are constants, detached here.
    The value of a level is the mean of its samples' values. An empty batch gives 0, still connected to every student map,
    so that DDP finds its graph. NaN or infinity in a map gives NaN or infinity, and so do differences above 1e19, whose
    squares float32 does not hold. Under DDP the mean of the ranks' values is the global one if all ranks have equally many
    samples.

    On a GPU the gradient is not bit-reproducible where a side is no multiple of a pool size (PyTorch's adaptive pooling).

    Args:
        student: one map (B, C, H, W) or vector (B, C) for each level, after the fusion. The order of levels is free.
        teacher: the teacher's maps, of the same shapes, in any floating-point type.
        pool_sizes: cells l along each side, in order of their weights 1/2, 1/4, …; those not below min(H, W) are
            skipped. Empty for plain mean squared errors.

    Returns:
        The loss without a unit, a scalar in float32; in float64 if the first student map is float64.

    Raises:
        InputError: no level, different numbers of levels, a tensor that is neither map nor vector or not floating point,
            shapes or devices that differ, or a pool size below 1.

    Example:
        A constant difference of 2 survives every pooling, so its square is the loss; vectors are compared as they are:

        >>> review_kd_loss([torch.ones(1, 3, 8, 8)], [-torch.ones(1, 3, 8, 8)])
        tensor(4.)
        >>> review_kd_loss([torch.ones(1, 3)], [torch.zeros(1, 3)])
        tensor(1.)
    """
    _check(student, teacher, pool_sizes)
    with torch.autocast(student[0].device.type, enabled=False):
        dtype = working_dtype(student[0])
        levels = [_level(s.to(dtype) - t.detach().to(dtype), pool_sizes) for s, t in zip(student, teacher, strict=True)]
        return torch.stack(levels).sum()


def _level(difference: Tensor, pool_sizes: Sequence[int]) -> Tensor:
    if difference.numel() == 0:
        return difference.sum()
    value = difference.square().mean()
    if difference.ndim == 2:
        return value
    weight, total = 1.0, 1.0
    for size in pool_sizes:
        if size < min(difference.shape[2:]):
            weight /= 2
            total += weight
            value = value + weight * _pool(difference, size).square().mean()
    return value / total


def _pool(x: Tensor, size: int) -> Tensor:
    height, width = x.shape[2:]
    if height % size == 0 and width % size == 0:
        # The same cells; unlike the adaptive form, its gradient on a GPU is reproducible.
        return F.avg_pool2d(x, (height // size, width // size))
    return F.adaptive_avg_pool2d(x, size)


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor], pool_sizes: Sequence[int]) -> None:
    if not student or len(student) != len(teacher):
        raise InputError(
            f"student and teacher must have equally many levels, at least one, got {len(student)} and {len(teacher)}; "
            "leave out the shallowest of the longer one"
        )
    for level, (own, other) in enumerate(zip(student, teacher, strict=True)):
        if own.ndim not in (2, 4):
            raise InputError(
                f"student[{level}] must be a map (B, C, H, W) or a vector (B, C), got shape {tuple(own.shape)}; "
                "tokens become a map by zoo.stages.as_map"
            )
        for name, value in ((f"student[{level}]", own), (f"teacher[{level}]", other)):
            if not value.is_floating_point():
                raise InputError(f"{name} must be floating point, got {value.dtype}; convert it with .float()")
        require_same_layout(f"teacher[{level}]", other, f"student[{level}]", own)
    for size in pool_sizes:
        if size < 1:
            raise InputError(f"pool_sizes must be positive, got {size}; () compares the maps without pooling")
