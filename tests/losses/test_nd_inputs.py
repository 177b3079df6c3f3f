"""What zoo.losses.nd makes of types, precisions, compilation, and arguments that cannot be used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError
from zoo.losses import nd_loss, nd_statistics


def random_case(
    *, batch: int = 6, width: int = 5, classes: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student = torch.randn(batch, width, dtype=dtype).requires_grad_()
    scale = torch.linspace(0.3, 3, batch, dtype=dtype).unsqueeze(1)
    centres = torch.randn(classes, width, dtype=dtype)
    return student, torch.randn(batch, width, dtype=dtype) * scale, centres, torch.arange(batch) % classes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["student", "teacher", "centres"])
@pytest.mark.parametrize("reduction", ["mean", "class"])
def test_bad_features_stay_visible(value: float, where: str, reduction: Any) -> None:
    student, teacher, centres, labels = (tensor.detach() for tensor in random_case())
    {"student": student, "teacher": teacher, "centres": centres}[where][1, 2] = value
    assert nd_loss(student, teacher, centres, labels, reduction=reduction).isnan()
    if where != "centres":  # the sample's class has no mean: the sample is left out, its NaN is not
        centres[1] = 0
        assert nd_loss(student, teacher, centres, labels, reduction=reduction).isnan()


@pytest.mark.parametrize("where", [["student"], ["teacher"], ["centres"], ["student", "teacher", "centres"]])
@pytest.mark.parametrize("length", [1e20, 1e30])
def test_extreme_lengths(where: list[str], length: float) -> None:
    """The square of such a length is beyond float32; the loss and its gradient are those of float64."""
    student, teacher, centres, labels = (tensor.detach() for tensor in random_case())
    features = {"student": student.float(), "teacher": teacher.float(), "centres": centres.float()}
    for name in where:
        features[name][0] *= length
    features["student"].requires_grad_()
    exact = {name: value.detach().double() for name, value in features.items()}
    exact["student"].requires_grad_()
    loss, wanted = (nd_loss(**case, targets=labels, reduction="none") for case in (features, exact))
    torch.testing.assert_close(loss, wanted.float(), rtol=1e-5, atol=1e-5)
    loss[0].backward()
    wanted[0].backward()
    of_loss, of_wanted = (case["student"].grad for case in (features, exact))
    assert of_loss is not None
    assert of_wanted is not None
    torch.testing.assert_close(of_loss, of_wanted.float(), rtol=1e-4, atol=1e-5 * float(of_wanted.abs().max()))
    found, expected = (nd_statistics(**case, targets=labels) for case in (features, exact))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    student, teacher, centres, labels = random_case(batch=8, width=256)
    student, teacher = (
        300 * tensor.detach().clamp(-2, 2) for tensor in (student, teacher)
    )  # the sum of squares overflows fp16
    half = student.to(dtype).requires_grad_()
    exact = nd_loss(half.detach().double(), teacher.to(dtype).double(), centres, labels)
    loss = nd_loss(half, teacher.to(dtype), centres.float(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_mixed(teacher_dtype: torch.dtype) -> None:
    """A teacher and class means in other types than the student's, which alone decides the precision."""
    student, teacher, centres, labels = random_case(dtype=torch.float32)
    loss = nd_loss(student, teacher.to(teacher_dtype), centres.double(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nd_loss(student, teacher, centres, labels), rtol=1e-2, atol=1e-2)
    assert nd_loss(student.double(), teacher.to(teacher_dtype), centres, labels).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
def test_half_precision_autocast(dtype: torch.dtype, soft: bool) -> None:
    student, teacher, centres, labels = random_case(dtype=torch.float32)
    targets = F.one_hot(labels, 4) * 0.7 + 0.1 if soft else labels
    expected = nd_loss(student, teacher, centres, targets)
    with torch.autocast("cpu", dtype=dtype):
        inside = nd_loss(student, teacher, centres, targets)
        projected = F.linear(student, torch.eye(5))
        assert projected.dtype == dtype
        nd_loss(projected, teacher, centres, targets).backward()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected), "autocast must not reach into the loss"
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none", "class"])
def test_compile_fullgraph(reduction: Any) -> None:
    student, teacher, centres, labels = random_case(dtype=torch.float32)
    compiled = torch.compile(nd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(student, teacher, centres, labels, reduction=reduction),
        nd_loss(student, teacher, centres, labels, reduction=reduction),
    )
    (ours,) = torch.autograd.grad(compiled(student, teacher, centres, labels), student)
    (eager,) = torch.autograd.grad(nd_loss(student, teacher, centres, labels), student)
    torch.testing.assert_close(ours, eager)


def test_compile_fullgraph_soft_labels_and_statistics() -> None:
    student, teacher, centres, _ = random_case(dtype=torch.float32)
    weights = torch.rand(6, 4)
    compiled = torch.compile(nd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(student, teacher, centres, weights), nd_loss(student, teacher, centres, weights)
    )
    statistics = torch.compile(nd_statistics, fullgraph=True, backend="aot_eager")
    expected = nd_statistics(student, teacher, centres, weights)
    for name, value in statistics(student, teacher, centres, weights).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("bad", [-1, 4, 100])
def test_bad_label(bad: int) -> None:
    student, teacher, centres, labels = random_case()
    labels[2] = bad
    for function in (nd_loss, nd_statistics):
        with pytest.raises(InputError, match=rf"targets must be labels in 0 … 3 \(4 classes\), found {bad}"):
            function(student, teacher, centres, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(6)}, r"student must have two dimensions .* got shape \(6,\)"),
        ({"student": torch.zeros(6, 5, 1, 1)}, r"student must have two dimensions .* flatten or pool"),
        ({"student": torch.zeros(6, 5, dtype=torch.int64)}, r"student must be floating point, got torch.int64"),
        ({"teacher": torch.zeros(6, 5, dtype=torch.complex64)}, r"teacher must be floating point, got torch.complex64"),
        ({"teacher": torch.zeros(6, 7)}, r"teacher must have the shape of student, got \(6, 7\) and \(6, 5\)"),
        ({"teacher": torch.zeros(5, 5)}, r"teacher must have the shape of student, got \(5, 5\) and \(6, 5\)"),
        ({"teacher": torch.zeros(6, 5, device="meta")}, r"teacher must be on the device of student, got meta and cpu"),
        ({"centres": torch.zeros(4, 7)}, r"centres must have the width of student, got 7 and 5"),
        ({"centres": torch.zeros(4)}, r"centres must have two dimensions"),
        ({"centres": torch.zeros(4, 5, device="meta")}, r"centres must be on the device of student"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets must be one label per sample, shape \(6,\), got"),
        ({"targets": torch.zeros(6, 4, dtype=torch.int64)}, r"targets must be one label per sample"),
        ({"targets": torch.zeros(6, dtype=torch.bool)}, r"targets must be integer labels, got torch.bool"),
        (
            {"targets": torch.zeros(6)},
            r"soft labels, one row of 4 weights per sample, shape \(6, 4\), got shape \(6,\)",
        ),
        ({"targets": torch.zeros(6, 5)}, r"shape \(6, 4\), got shape \(6, 5\)"),
        ({"targets": torch.full((6, 4), -0.5)}, r"targets must not be negative, found -0.5"),
        ({"reduction": "sum"}, r"reduction must be one of mean, none, class, got 'sum'"),
        ({"reduction": "class", "targets": torch.ones(6, 4)}, r"reduction='class' needs integer labels"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    student, teacher, centres, targets = random_case(dtype=torch.float32)
    arguments = {"student": student, "teacher": teacher, "centres": centres, "targets": targets}
    with pytest.raises(InputError, match=message):
        nd_loss(**{**arguments, **change})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_other_integer_labels(dtype: torch.dtype) -> None:
    student, teacher, centres, labels = random_case()
    for reduction in ("mean", "class"):
        expected = nd_loss(student, teacher, centres, labels, reduction=reduction)
        assert torch.equal(nd_loss(student, teacher, centres, labels.to(dtype), reduction=reduction), expected)
