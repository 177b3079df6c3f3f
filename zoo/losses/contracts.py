"""What every loss asks of its arguments, with one wording for the same mistake.

All checks look at shapes, types and devices only. The one that needs a tensor's contents, the range of labels, is made
on the CPU alone and not while a graph is being traced: on a GPU it would make the host wait, and there the indexing
itself asserts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.errors import InputError

__all__ = [
    "lengths_may_overflow",
    "require_labels",
    "require_matrix",
    "require_number",
    "require_same_layout",
    "shrinking_factor",
    "unit_rows",
    "working_dtype",
]

# Below this length the direction of a vector is noise, and dividing by it would give gradients of 1/length.
_NEGLIGIBLE_NORM = 1e-6
# A length that can be squared, and a power of two that makes one of all longer ones, none of them negligible; by type.
_SHRINKING = {torch.float32: (2.0**60, 2.0**-75), torch.float64: (2.0**505, 2.0**-520)}


def require_matrix(name: str, value: Tensor) -> None:
    """Refuse anything but a two-dimensional floating-point tensor.

    Args:
        name: the argument's name, for the message.
        value: the tensor.

    Raises:
        InputError: `value` has another number of dimensions, or holds integers, booleans or complex numbers.

    Example:
        >>> require_matrix("student", torch.zeros(2, 3))
    """
    if value.ndim != 2:
        raise InputError(
            f"{name} must have two dimensions (batch, width), got shape {tuple(value.shape)}; "
            "flatten or pool the other dimensions first"
        )
    if not value.is_floating_point():
        raise InputError(f"{name} must be floating point, got {value.dtype}; convert it with .float()")


def require_same_layout(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """Refuse two tensors that differ in shape or live on different devices.

    Args:
        name: the name of the argument under test.
        value: the tensor under test.
        reference_name: the name of the argument that it has to match.
        reference: the tensor that it has to match.

    Raises:
        InputError: the shapes or the devices differ.

    Example:
        >>> require_same_layout("teacher", torch.zeros(2, 3), "student", torch.ones(2, 3))
    """
    if value.shape != reference.shape:
        raise InputError(
            f"{name} must have the shape of {reference_name}, got {tuple(value.shape)} and {tuple(reference.shape)}"
        )
    if value.device != reference.device:
        raise InputError(
            f"{name} must be on the device of {reference_name}, got {value.device} and {reference.device}; "
            f"move it with .to({str(reference.device)!r})"
        )


def require_labels(name: str, value: Tensor, *, rows: int, classes: int) -> None:
    """Refuse anything but one integer label in `0 … classes - 1` for each row.

    The range is looked at on the CPU only, and not under `torch.compile`.

    Args:
        name: the argument's name, for the message.
        value: the labels.
        rows: how many there have to be.
        classes: how many classes there are.

    Raises:
        InputError: the type is not an integer one, the shape is not `(rows,)`, or a label is out of range.

    Example:
        >>> require_labels("targets", torch.tensor([0, 2]), rows=2, classes=3)
    """
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise InputError(f"{name} must be integer labels, got {value.dtype}")
    if value.shape != (rows,):
        raise InputError(f"{name} must be one label per sample, shape ({rows},), got shape {tuple(value.shape)}")
    if value.device.type == "cpu" and rows and not torch.compiler.is_compiling():
        lowest, highest = (int(bound) for bound in torch.aminmax(value))
        if lowest < 0 or highest >= classes:
            raise InputError(
                f"{name} must be labels in 0 … {classes - 1} ({classes} classes), "
                f"found {lowest if lowest < 0 else highest}"
            )


def require_number(name: str, value: float, *, positive: bool) -> None:
    """Refuse a number that is not finite, negative, or (on demand) zero.

    Args:
        name: the argument's name, for the message.
        value: the number.
        positive: whether zero is refused as well.

    Raises:
        InputError: `value` is out of range.

    Example:
        >>> require_number("temperature", 4.0, positive=True)
    """
    # Comparisons, and not math.isfinite, because torch.compile can trace them when the number becomes symbolic.
    if not (0 < value < math.inf or (value == 0 and not positive)):
        rule = "positive and finite" if positive else "finite and not negative"
        raise InputError(f"{name} must be {rule}, got {value}")


def unit_rows(rows: Tensor) -> Tensor:
    """Scale rows to length 1.

    Args:
        rows: (N, d), in float32 or float64.

    Returns:
        (N, d); zeros, with gradient 0, where a length is at most 1e-6; NaN for NaN and infinity.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if lengths_may_overflow(norm):
        rows = rows * shrinking_factor(norm)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    negligible = norm <= _NEGLIGIBLE_NORM
    # x / inf is 0, and what is infinite would pass for a vector of zeros; 0 * inf makes it NaN.
    inverse: Tensor = torch.where(negligible, 0, 1 / torch.where(negligible, 1, norm)) + 0 * norm
    return rows * inverse


def lengths_may_overflow(*lengths: Tensor) -> bool:
    """Whether some rows may be so long that they have to be shrunk first.

    Lengths are squared and multiplied on the way: from 1e19 on, float32 does not hold the result. On the CPU they are looked
    at; on a GPU, which would make the host wait, and while a graph is traced, they always may. That costs time, and changes
    no value.

    Args:
        lengths: of rows, in float32 or float64, infinite if they have overflowed.

    Returns:
        Whether to shrink the rows by `shrinking_factor`.

    Example:
        >>> lengths_may_overflow(torch.tensor([1.0, 2.0])), lengths_may_overflow(torch.tensor([1.0, torch.inf]))
        (False, True)
    """
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" for x in lengths):
        return True
    return any(bool((x > _SHRINKING[x.dtype][0]).any()) for x in lengths)


def shrinking_factor(lengths: Tensor) -> Tensor:
    """A power of two for each row that makes its length one that can be squared; 1 for rows of usual length.

    The product with it is exact. It is a constant without gradient.

    Args:
        lengths: of the rows, in float32 or float64, infinite if they have overflowed.

    Returns:
        A tensor of the same shape.

    Example:
        >>> shrinking_factor(torch.tensor([5.0, 1e18, torch.inf])).log2()
        tensor([  0.,   0., -75.])
    """
    highest, factor = _SHRINKING[lengths.dtype]
    return torch.where(lengths.detach() > highest, torch.full_like(lengths, factor), torch.ones_like(lengths))


def working_dtype(student: Tensor) -> torch.dtype:
    """Return the precision that a loss computes in: float64 for a float64 student, float32 for any other.

    The student alone decides, so that class means kept in float64 do not slow a float32 training down.

    Args:
        student: the tensor that carries the gradient.

    Returns:
        `torch.float64` or `torch.float32`.

    Example:
        >>> working_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float64 if student.dtype == torch.float64 else torch.float32
