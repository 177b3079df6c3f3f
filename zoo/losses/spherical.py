"""Points between directions: spherical interpolation, and Bézier curves on the sphere after de Casteljau.

The fusion of CM3 ("Calibrating Multimodal Recommendation", arXiv 2508.01226): the features of an item's modalities are
unit vectors, and a random point of the curve that they span stands for the item. For unit vectors a and b at an angle
theta, with lambda the weight of the *first*:

    slerp(a, b; lambda) = (sin(lambda theta) a + sin((1 - lambda) theta) b) / sin(theta)

which the release computes from theta = arccos <a, b>. In float32 that gives NaN, value and gradient, where a and b
nearly agree. Here it is written with the orthogonal vectors a + b and a - b, of lengths 2 cos(theta / 2) and
2 sin(theta / 2):

    slerp(a, b; lambda) = cos(mu) (a + b) / |a + b| + sin(mu) (a - b) / |a - b|,   mu = (lambda - 1/2) theta

the same point, and accurate at every angle.

The paper's rule for three and more modalities was not read; the release has two, for which both modes are `slerp`:

- `"de_casteljau"`: neighbours in a row of points are joined, and their joints in turn, until one point is left;
- `"fold"`: the first two points are joined, the result with the third, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_matrix, require_same_layout, unit_rows, working_dtype

__all__ = ["BezierMode", "slerp", "spherical_bezier"]

BezierMode = Literal["de_casteljau", "fold"]

_MODES = ("de_casteljau", "fold")
# Sums of unit vectors shorter than this are float32's rounding and have no direction.
_OPPOSITE = 1e-6
_TINY = 1e-12


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Point of the arc between the directions of two vectors.

    Lengths do not matter. The gradient flows to `a`, `b` and `t`.

    Defined cases: equal directions stay put; for opposite ones (unit vectors whose sum is shorter than 1e-6), between
    which there is no one arc, it is the direction of `a` for `t` of at least 1/2 and that of `b` below; a vector
    shorter than 1e-6 has no direction, and the result is that of the other one, or zeros for two of them. NaN gives NaN.

    Source: equation of the fusion in section 1.4 of the project's notes on CM3; the form is ours.

    Args:
        a: vectors (N, d).
        b: vectors (N, d).
        t: weight of `a` in 0 … 1: one for all rows, or (N,).

    Returns:
        Unit vectors (N, d) in float32, in float64 if `a` is.

    Raises:
        InputError: no matrices in floating point, different shapes or devices, or a weight out of range (looked at on the
            CPU only) or of another shape.

    Example:
        >>> slerp(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]), 0.5)
        tensor([[0.7071, 0.7071]])
    """
    require_matrix("a", a)
    require_matrix("b", b)
    require_same_layout("b", b, "a", a)
    with torch.autocast(a.device.type, enabled=False):
        dtype = working_dtype(a)
        (weight,) = _weights(t, a, steps=1)
        return _arc(unit_rows(a.to(dtype)), unit_rows(b.to(dtype)), weight)


def spherical_bezier(
    points: Sequence[Tensor] | Tensor,
    t: float | Tensor,
    *,
    mode: BezierMode = "de_casteljau",
    present: Tensor | None = None,
) -> Tensor:
    """Point of the spherical Bézier curve that vectors of several modalities span, one curve a row.

    A modality that a row lacks is left out of its curve, as if the row had never had it. With one point left, the result
    is its direction; with none, zeros. Further defined cases are those of `slerp`.

    Source: section 1.4 of the project's notes on CM3. Missing modalities are ours.

    Args:
        points: one tensor (N, d) a modality, at least one; or (M, N, d).
        t: weight in 0 … 1 of the first of each pair of points: one for all, or (N,), or, with `"fold"` alone,
            (M - 1, N), the weight of what was joined so far at each step (a row that lacks modalities uses the first
            ones).
        mode: `"de_casteljau"` or `"fold"`, see the module's docstring; the same for two modalities.
        present: (N, M), bool, which row has which modality; None for all. What stands in a missing row does not count,
            but must be finite for finite gradients in what made it.

    Returns:
        Unit vectors (N, d) in float32, in float64 if the first modality is.

    Raises:
        InputError: no points, an option without such a name, or as `slerp`; a mask of another shape or type.

    Example:
        >>> spherical_bezier([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])], 0.5)
        tensor([[0.7071, 0.7071]])
    """
    points = list(points)
    _check(points, mode, present)
    steps = len(points) - 1
    with torch.autocast(points[0].device.type, enabled=False):
        dtype = working_dtype(points[0])
        fold = mode == "fold"
        weights = _weights(t, points[0], steps=steps) if fold else _weights(t, points[0], steps=1) * steps
        units = [unit_rows(point.to(dtype)) for point in points]
        count = None
        if present is not None:
            units, count = _first_come_those_present(units, present), present.sum(1, keepdim=True)
        result, level = units[0], units
        for step in range(steps):
            if fold:
                joined = _arc(result, units[step + 1], weights[step])
            else:
                level = [_arc(first, second, weights[step]) for first, second in pairwise(level)]
                joined = level[0]
            # The first joint of a level depends on the first points only: a row with fewer points was done before.
            result = joined if count is None else torch.where(count > step + 1, joined, result)
        return result


def _arc(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """`slerp` of unit vectors or zeros."""
    total, difference = a + b, a - b
    along = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    across = torch.linalg.vector_norm(difference, dim=1, keepdim=True).clamp_min(_TINY)
    opposite = along <= _OPPOSITE
    along = along.clamp_min(_OPPOSITE)
    turn = (2 * weight - 1) * torch.atan2(across, along)
    point = unit_rows(total * (turn.cos() / along) + difference * (turn.sin() / across))
    point = torch.where(opposite, torch.where(weight >= 0.5, a, b), point)
    lacks_a, lacks_b = ((side == 0).all(1, keepdim=True) for side in (a, b))
    return torch.where(lacks_a, b, torch.where(lacks_b, a, point))


def _first_come_those_present(units: list[Tensor], present: Tensor) -> list[Tensor]:
    stacked = torch.where(present.unsqueeze(2), torch.stack(units, 1), 0)
    order = present.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    return list(stacked.gather(1, order.unsqueeze(2).expand_as(stacked)).unbind(1))


def _weights(t: float | Tensor, points: Tensor, *, steps: int) -> list[Tensor]:
    """One weight () or (N, 1) for each step."""
    rows = points.shape[0]
    dtype = working_dtype(points)
    if not isinstance(t, Tensor):
        if not 0 <= t <= 1:
            raise InputError(f"t must be in 0 … 1, got {t}")
        return [torch.full((), t, dtype=dtype, device=points.device)] * steps
    shapes = [(), (rows,)] + ([(steps, rows)] if steps > 1 else [])
    if tuple(t.shape) not in shapes or not t.is_floating_point():
        raise InputError(
            f"t must be floating point of shape {' or '.join(map(str, shapes))}, got {t.dtype} of "
            f"shape {tuple(t.shape)}"
        )
    if t.device != points.device:
        raise InputError(f"t must be on the device of the points, got {t.device} and {points.device}")
    if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
        lowest, highest = (float(bound) for bound in torch.aminmax(t.detach()))
        if lowest < 0 or highest > 1:
            raise InputError(f"t must be in 0 … 1, found {lowest if lowest < 0 else highest}")
    t = t.to(dtype)
    if t.ndim == 2:
        return list(t.unsqueeze(2).unbind())
    return [t if t.ndim == 0 else t.unsqueeze(1)] * steps


def _check(points: list[Tensor], mode: str, present: Tensor | None) -> None:
    if not points:
        raise InputError("points must be one tensor (N, d) a modality, at least one, got none")
    require_choice("mode", mode, _MODES)
    for index, point in enumerate(points):
        require_matrix(f"points[{index}]", point)
        require_same_layout(f"points[{index}]", point, "points[0]", points[0])
    shape = (points[0].shape[0], len(points))
    if present is not None and (present.dtype != torch.bool or tuple(present.shape) != shape):
        raise InputError(
            f"present must be bool of shape {shape} (rows, modalities), got {present.dtype} of shape "
            f"{tuple(present.shape)}"
        )
