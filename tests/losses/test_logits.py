"""zoo.losses.logits against the numbers of the released code and plain restatements of the formulas."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoo.losses.logits
from zoo.errors import InputError
from zoo.losses import dist_loss, dkd_loss, kd_loss

# Section 6 of the project's notes on arXiv 2305.17007; there computed with the released classes in float64.
STUDENT = [[1, 0.5, -0.5, 0], [0.25, 2, -1, 0.5], [0, -0.5, 1.5, 1]]
TEACHER = [[3, 1, -1, 0.5], [-0.5, 4, 0, 1], [0.5, -1, 2, 2.5]]
LABELS = [0, 1, 2]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def golden() -> tuple[Tensor, Tensor, Tensor]:
    return double(STUDENT).requires_grad_(), double(TEACHER), torch.tensor(LABELS)


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


def plain_divergence(teacher: list[float], student: list[float]) -> float:
    return sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True))


def plain_softmax(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def plain_correlation(first: list[float], second: list[float]) -> float:
    first = [value - sum(first) / len(first) for value in first]
    second = [value - sum(second) / len(second) for value in second]
    product = math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))
    return sum(a * b for a, b in zip(first, second, strict=True)) / (product + 1e-8)


@pytest.mark.parametrize(
    ("temperature", "kd", "label_part", "others_part", "dkd", "inter", "intra", "both"),
    [
        (4.0, 0.3842591925, 0.2466558966, 0.2207327987, 2.0125182858, 1.1921573061, 0.7358052678, 1.9279625739),
        (1.0, 0.2012969525, 0.1627002748, 0.1203085923, 1.1251690132, 0.1254102382, 0.0107921821, 0.1362024202),
    ],
)
def test_golden(
    temperature: float,
    kd: float,
    label_part: float,
    others_part: float,
    dkd: float,
    inter: float,
    intra: float,
    both: float,
) -> None:
    student, teacher, labels = golden()
    measured = [
        kd_loss(student, teacher, temperature=temperature),
        dkd_loss(student, teacher, labels, alpha=1, beta=0, temperature=temperature),
        dkd_loss(student, teacher, labels, alpha=0, beta=1, temperature=temperature),
        dkd_loss(student, teacher, labels, alpha=1, beta=8, temperature=temperature),
        dist_loss(student, teacher, beta=1, gamma=0, temperature=temperature),
        dist_loss(student, teacher, beta=0, gamma=1, temperature=temperature),
        dist_loss(student, teacher, beta=1, gamma=1, temperature=temperature),
    ]
    expected = double([kd, label_part, others_part, dkd, inter, intra, both])
    torch.testing.assert_close(torch.stack(measured), expected, rtol=0, atol=1e-9)


def test_golden_defaults() -> None:
    """The defaults are those of the CIFAR recipes: temperature 4, alpha 1, beta 8; beta and gamma 1."""
    values = all_losses(*golden())
    expected = {"kd": 0.3842591925, "dkd": 2.0125182858, "dist": 1.9279625739}
    for name, value in values.items():
        torch.testing.assert_close(value, double(expected[name]), rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_identity_plain_formulas(temperature: float) -> None:
    student, teacher, _ = random_case()
    rows = [[plain_softmax(row, temperature) for row in logits.tolist()] for logits in (student, teacher)]
    kd = [plain_divergence(t, s) for s, t in zip(*rows, strict=True)]
    square = temperature**2
    torch.testing.assert_close(kd_loss(student, teacher, temperature=temperature), double(square * sum(kd) / 6))
    inter = [plain_correlation(s, t) for s, t in zip(*rows, strict=True)]
    columns = [list(map(list, zip(*matrix, strict=True))) for matrix in rows]
    intra = [plain_correlation(s, t) for s, t in zip(*columns, strict=True)]
    expected = square * (2 * (1 - sum(inter) / 6) + 3 * (1 - sum(intra) / 5))
    torch.testing.assert_close(dist_loss(student, teacher, beta=2, gamma=3, temperature=temperature), double(expected))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_identity_decoupling(temperature: float) -> None:
    """Sample by sample KL(p_t || p_s) = TCKD + (1 - p_t[y]) NCKD."""
    student, teacher, labels = random_case()
    for i in range(6):
        row = (student[i : i + 1], teacher[i : i + 1])
        label_part = dkd_loss(*row, labels[i : i + 1], alpha=1, beta=0, temperature=temperature)
        others_part = dkd_loss(*row, labels[i : i + 1], alpha=0, beta=1, temperature=temperature)
        probability = (teacher[i] / temperature).softmax(0)[labels[i]]
        whole = kd_loss(*row, temperature=temperature)
        torch.testing.assert_close(label_part + (1 - probability) * others_part, whole, rtol=0, atol=1e-14)


def test_identity_two_classes() -> None:
    """With two classes the label's part is all there is."""
    student, teacher, labels = random_case(classes=2)
    torch.testing.assert_close(dkd_loss(student, teacher, labels, alpha=1, beta=0), kd_loss(student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradcheck(temperature: float) -> None:
    student, teacher, labels = random_case()
    for loss in (
        lambda logits: kd_loss(logits, teacher, temperature=temperature),
        lambda logits: dkd_loss(logits, teacher, labels, alpha=0.7, beta=2, temperature=temperature),
        lambda logits: dist_loss(logits, teacher, beta=0.7, gamma=2, temperature=temperature),
    ):
        assert torch.autograd.gradcheck(loss, student)
        assert torch.autograd.gradgradcheck(loss, student)


def test_stop_gradient_teacher() -> None:
    student, teacher, labels = random_case()
    teacher.requires_grad_()
    torch.stack(list(all_losses(student, teacher, labels).values())).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@settings(deadline=None, max_examples=40)
@given(
    scale=st.sampled_from([0.0, 1e-6, 1.0, 200.0, 400.0, 1e6]),
    other_scale=st.sampled_from([0.0, 1e-6, 1.0, 200.0, 400.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    temperature=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_properties(scale: float, other_scale: float, dtype: torch.dtype, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(4, 6, generator=generator, dtype=dtype)).requires_grad_()
    teacher = other_scale * torch.randn(4, 6, generator=generator, dtype=dtype)
    labels = torch.randint(6, (4,), generator=generator)
    losses = (
        kd_loss(student, teacher, temperature=temperature),
        dkd_loss(student, teacher, labels, temperature=temperature),
        dist_loss(student, teacher, temperature=temperature),
    )
    for loss in losses:
        assert loss.isfinite()
        assert loss >= -1e-4 * temperature**2
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.isfinite().all()
    assert losses[2] <= 4 * temperature**2 * (1 + 1e-4)


def test_properties_invariances() -> None:
    student, teacher, labels = random_case()
    losses = all_losses(student, teacher, labels)
    order = torch.randperm(6)
    shifted = all_losses(student[order] + 3, teacher[order] - torch.arange(6).unsqueeze(1), labels[order])
    torch.testing.assert_close(shifted, losses)
    itself = all_losses(teacher, teacher, labels)
    assert itself["kd"] == itself["dkd"] == 0
    # DIST's 1e-8 keeps the correlation of a prediction with itself below 1: here its squares sum to more than 1e-4.
    assert 0 < itself["dist"] < 2 * 16 * 1e-4
    # Tempting and false: a sample's intra term does depend on the other samples.
    halves = (dist_loss(student[:3], teacher[:3]) + dist_loss(student[3:], teacher[3:])) / 2
    assert (halves - losses["dist"]).abs() > 1e-3


@pytest.mark.parametrize("scale", [200.0, 400.0, 1e6])
def test_extreme_logits_value(scale: float) -> None:
    """Where one logit leads by a wide margin, KL is the difference of logits; logarithms of probabilities give inf."""
    student = torch.tensor([[0.0, 0.0, 1.0]]) * scale
    teacher = torch.tensor([[1.0, 0.0, 0.0]]) * scale
    torch.testing.assert_close(kd_loss(student, teacher, temperature=1.0), torch.tensor(scale))
    label_part = dkd_loss(student, teacher, torch.tensor([0]), alpha=1, beta=0, temperature=1.0)
    torch.testing.assert_close(label_part, torch.tensor(scale))
    # The others' teacher is undecided between logits that the student separates by `scale`.
    others_part = dkd_loss(student, teacher, torch.tensor([0]), alpha=0, beta=1, temperature=1.0)
    torch.testing.assert_close(others_part, torch.tensor(scale / 2 - math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_zero_variance(classes: int, dtype: torch.dtype) -> None:
    """A student that predicts the same for all classes and samples: correlation 0 with gradient 0, no 1 / epsilon."""
    teacher = torch.randn(8, classes, dtype=dtype)
    for level in (0.0, 0.3):
        student = torch.full((8, classes), level, dtype=dtype, requires_grad=True)
        loss = dist_loss(student, teacher, temperature=1.0)
        assert loss == 2
        (gradient,) = torch.autograd.grad(loss, student)
        assert (gradient == 0).all()
    # The same prediction for all samples: only the term over the batch has nothing to compare.
    student = teacher[:1].repeat(8, 1).requires_grad_()
    assert dist_loss(student, teacher, beta=0, temperature=1.0) == 1
    assert dist_loss(student, teacher, gamma=0, temperature=1.0) != 1
    (gradient,) = torch.autograd.grad(dist_loss(student, teacher, temperature=1.0), student)
    assert gradient.abs().max() < 10


def test_batch_of_one() -> None:
    student, teacher, labels = random_case(batch=1)
    rows = [plain_softmax(logits[0].tolist(), 4.0) for logits in (student.detach(), teacher)]
    torch.testing.assert_close(kd_loss(student, teacher), double(16 * plain_divergence(rows[1], rows[0])))
    inter = 16 * (1 - plain_correlation(*rows))
    torch.testing.assert_close(dist_loss(student, teacher), double(inter + 16))
    assert dkd_loss(student, teacher, labels).isfinite()


def test_empty_batch() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    for loss in all_losses(student, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).values():
        assert loss == 0
        loss.backward()
    assert student.grad is not None


def _shared_case() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    return torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 5


def _loss_and_gradient(name: str, rows: slice) -> tuple[Tensor, Tensor]:
    inputs, teacher, labels = (tensor[rows] for tensor in _shared_case())
    weight = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5).requires_grad_()
    student = inputs @ weight
    if name == "dist":
        loss = dist_loss(student, teacher, temperature=1.0, gather=True)
    elif name == "compiled dist":
        compiled = torch.compile(dist_loss, fullgraph=True, backend="aot_eager")
        loss = compiled(student, teacher, temperature=1.0, gather=True)
    else:
        loss = kd_loss(student, teacher) + dkd_loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.detach(), gradient


def _on_rank(rank: int, world_size: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    loss, gradient = _loss_and_gradient(name, slice(rank * 4, (rank + 1) * 4))
    mean_loss = loss.clone()
    dist.all_reduce(mean_loss)
    dist.all_reduce(gradient)  # DDP's mean over processes
    return loss, mean_loss / world_size, gradient / world_size


@pytest.mark.parametrize("name", ["dist", "compiled dist", "others"])
def test_two_processes_equal_one(name: str, two_processes: Callable[..., list[Any]]) -> None:
    expected_loss, expected_gradient = _loss_and_gradient(name.removeprefix("compiled "), slice(0, 8))
    for own_loss, mean_loss, gradient in two_processes(_on_rank, name):
        torch.testing.assert_close(mean_loss, expected_loss, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)
        if name != "others":  # each process returns the global loss
            torch.testing.assert_close(own_loss, expected_loss, rtol=0, atol=1e-10)


def _unequal_on_rank(rank: int, world_size: int) -> str:
    rows = torch.randn(2 + rank, 5)
    try:
        dist_loss(rows, rows, gather=True)
    except InputError as error:
        return str(error)
    return ""


def test_bad_unequal_batches(two_processes: Callable[..., list[Any]]) -> None:
    for message in two_processes(_unequal_on_rank):
        assert "gather=True needs equally large batches in all processes, got [2, 3] by rank" in message


def test_examples() -> None:
    result = doctest.testmod(zoo.losses.logits)
    assert result.attempted > 0
    assert result.failed == 0
