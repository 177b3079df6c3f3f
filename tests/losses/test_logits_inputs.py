"""What zoo.losses.logits makes of types, precisions, compilation, and arguments that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.losses import dist_loss, dkd_loss, kd_loss


def random_case(
    *, batch: int = 6, classes: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    student = torch.randn(batch, classes, dtype=dtype).requires_grad_()
    return student, 2 * torch.randn(batch, classes, dtype=dtype), torch.arange(batch) % classes


def all_losses(student: Tensor, teacher: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {
        "kd": kd_loss(student, teacher),
        "dkd": dkd_loss(student, teacher, targets),
        "dist": dist_loss(student, teacher),
    }


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_bad_logits_stay_visible(where: str) -> None:
    student, teacher, labels = (tensor.detach() for tensor in random_case())
    {"student": student, "teacher": teacher}[where][2, 1] = math.nan
    for name, loss in all_losses(student, teacher, labels).items():
        assert loss.isnan(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    student, teacher, labels = random_case(classes=100)
    half, half_teacher = (logits.detach().to(dtype) for logits in (student, teacher))
    exact = all_losses(half.double(), half_teacher.double(), labels)
    half.requires_grad_()
    mixed = all_losses(half.float(), half_teacher, labels)
    for name, loss in all_losses(half, half_teacher, labels).items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name].float(), rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(loss, mixed[name], msg=name)
        (gradient,) = torch.autograd.grad(loss, half)
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_autocast(dtype: torch.dtype) -> None:
    student, teacher, labels = random_case(dtype=torch.float32)
    expected = all_losses(student, teacher, labels)
    with torch.autocast("cpu", dtype=dtype):
        inside = all_losses(student, teacher, labels)
    for name, value in expected.items():
        assert torch.equal(inside[name], value), name


def test_compile_fullgraph() -> None:
    student, teacher, labels = random_case(dtype=torch.float32)
    for function, arguments in (
        (kd_loss, (student, teacher)),
        (dkd_loss, (student, teacher, labels)),
        (dist_loss, (student, teacher)),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for temperature in (4.0, 2.5):  # the second makes the number symbolic
            expected = function(*arguments, temperature=temperature)
            loss = compiled(*arguments, temperature=temperature)
            torch.testing.assert_close(loss, expected)
            (ours,), (eager,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    "function", [kd_loss, dist_loss, lambda s, t: dkd_loss(s, t, torch.zeros(6, dtype=torch.int64))]
)
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            torch.zeros(6, 5),
            torch.zeros(6, 4),
            r"teacher_logits must have as many classes as student_logits, got 4 and 5",
        ),
        (torch.zeros(6, 5), torch.zeros(5, 5), r"teacher_logits must have the shape of student_logits"),
        (
            torch.zeros(6, 5),
            torch.zeros(6, 5, device="meta"),
            r"teacher_logits must be on the device of student_logits",
        ),
        (torch.zeros(6), torch.zeros(6), r"student_logits must have two dimensions"),
        (torch.zeros(6, 5), torch.zeros(6), r"teacher_logits must have two dimensions"),
        (torch.zeros(6, 5, dtype=torch.int32), torch.zeros(6, 5), r"student_logits must be floating point"),
        (torch.zeros(6, 5), torch.zeros(6, 5, dtype=torch.int32), r"teacher_logits must be floating point"),
    ],
)
def test_bad_logits(function: Callable[..., Tensor], student: Tensor, teacher: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(student, teacher)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature(value: float) -> None:
    student, teacher, labels = random_case()
    for loss in (kd_loss, dist_loss, lambda s, t, **options: dkd_loss(s, t, labels, **options)):
        with pytest.raises(InputError, match=f"temperature must be positive and finite, got {value}"):
            loss(student, teacher, temperature=value)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_bad_weights(value: float) -> None:
    student, teacher, labels = random_case()
    for name in ("alpha", "beta"):
        with pytest.raises(InputError, match=f"{name} must be finite and not negative, got {value}"):
            dkd_loss(student, teacher, labels, **{name: value})
    for name in ("beta", "gamma"):
        with pytest.raises(InputError, match=f"{name} must be finite and not negative, got {value}"):
            dist_loss(student, teacher, **{name: value})


def test_bad_dkd_targets() -> None:
    student, teacher, labels = random_case()
    with pytest.raises(InputError, match=r"targets must be integer labels, got torch.float64: dkd_loss sets .*argmax"):
        dkd_loss(student, teacher, student.softmax(1))
    with pytest.raises(InputError, match=r"targets must be labels in 0 … 4 \(5 classes\), found 5"):
        dkd_loss(student, teacher, labels + 1)
    with pytest.raises(InputError, match=r"targets must be one label per sample, shape \(6,\), got shape \(5,\)"):
        dkd_loss(student, teacher, labels[:5])
    with pytest.raises(InputError, match=r"targets must be on the device of student_logits, got meta and cpu"):
        dkd_loss(student, teacher, labels.to("meta"))


@pytest.mark.parametrize("classes", [1, 2])
def test_bad_dkd_class_count(classes: int) -> None:
    logits = torch.zeros(3, classes)
    with pytest.raises(InputError, match=rf"dkd_loss needs at least 3 classes, got {classes}.*beta=0"):
        dkd_loss(logits, logits, torch.zeros(3, dtype=torch.int64))
    if classes == 1:
        with pytest.raises(InputError, match="dkd_loss needs at least 3 classes, got 1"):
            dkd_loss(logits, logits, torch.zeros(3, dtype=torch.int64), beta=0)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_classes(rows: int) -> None:
    student = torch.zeros(rows, 0, requires_grad=True)
    for loss in (kd_loss(student, student), dist_loss(student, student)):
        assert loss == 0
        loss.backward()


@pytest.mark.parametrize("loss", [kd_loss, dist_loss])
def test_bad_temperature_without_a_square(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(InputError, match=r"temperature must be at most 1e\+15, got 1e\+30"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=1e30)
