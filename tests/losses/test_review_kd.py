"""zoo.losses.review_kd against the project's golden values and a plain restatement of the formula."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoo.losses.review_kd
from zoo.errors import InputError
from zoo.losses.review_kd import review_kd_loss

# Section 6 of the project's notes on arXiv 2305.17007: computed with the released function in float64, one level each.
GOLDEN = {8: 0.1003485934, 4: 0.0963454842, 1: 0.1193212382}
TOTAL = 0.3160153157


def golden(side: int) -> tuple[Tensor, Tensor]:
    k = torch.arange(2 * side * side, dtype=torch.float64)
    shape = (1, 2, side, side)
    return ((7 * k + 3) % 11 / 11).reshape(shape), ((5 * k + 1) % 13 / 13).reshape(shape)


def cells(length: int, count: int) -> list[slice]:
    """Adaptive pooling: cell i covers floor(i n / l) … ceil((i + 1) n / l) - 1."""
    return [slice(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]


def plain_level(student: Tensor, teacher: Tensor, sizes: tuple[int, ...] = (4, 2, 1)) -> Tensor:
    """Each map pooled by itself, cell by cell; weights halved only for sizes that are used."""
    value, weight, total = ((student - teacher) ** 2).mean(), 1.0, 1.0
    height, width = student.shape[2:]
    for size in sizes:
        if size >= min(height, width):
            continue
        weight /= 2
        total += weight
        squares = [
            (student[:, :, rows, columns].mean((2, 3)) - teacher[:, :, rows, columns].mean((2, 3))) ** 2
            for rows in cells(height, size)
            for columns in cells(width, size)
        ]
        value = value + weight * torch.stack(squares).mean()
    return value / total


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype).requires_grad_(), torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("side", GOLDEN)
def test_golden(side: int) -> None:
    student, teacher = golden(side)
    assert review_kd_loss([student], [teacher]).item() == pytest.approx(GOLDEN[side], abs=6e-11)


def test_golden_total() -> None:
    students, teachers = zip(*(golden(side) for side in GOLDEN), strict=True)
    assert review_kd_loss(students, teachers).item() == pytest.approx(TOTAL, abs=6e-11)


@pytest.mark.parametrize("shape", [(3, 2, 7, 7), (2, 3, 8, 4), (2, 1, 5, 9), (1, 2, 3, 3), (2, 2, 2, 2), (2, 3, 1, 6)])
@pytest.mark.parametrize("sizes", [(4, 2, 1), (1, 2), (3,), ()])
def test_identity_plain_formula(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    student, teacher = pair(*shape)
    torch.testing.assert_close(
        review_kd_loss([student], [teacher], pool_sizes=sizes), plain_level(student, teacher, sizes)
    )


def test_identity_vector_is_a_map_of_one_pixel() -> None:
    student, teacher = pair(4, 6)
    loss = review_kd_loss([student], [teacher])
    torch.testing.assert_close(loss, ((student - teacher) ** 2).mean())
    assert loss == review_kd_loss([student[:, :, None, None]], [teacher[:, :, None, None]])


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 2, 7, 5), (3, 4)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    student, teacher = pair(*shape)
    assert torch.autograd.gradcheck(lambda x: review_kd_loss([x], [teacher]), student)


def test_stop_gradient_teacher() -> None:
    student, teacher = pair(2, 3, 4, 4)
    teacher.requires_grad_()
    review_kd_loss([student], [teacher]).backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    scale=st.floats(1e-6, 1e6),
)
def test_properties(seed: int, height: int, width: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, 2, height, width, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = review_kd_loss([student], [teacher])
    # Pooling only takes away: between the error of the means and that of the pixels.
    assert 0 <= loss <= ((student - teacher) ** 2).mean() * (1 + 1e-9)
    torch.testing.assert_close(review_kd_loss([teacher], [student]), loss)
    torch.testing.assert_close(review_kd_loss([scale * student], [scale * teacher]), scale**2 * loss)
    turned = review_kd_loss([student.mT], [teacher.mT])
    torch.testing.assert_close(turned, loss)
    alone = [review_kd_loss([student[i : i + 1]], [teacher[i : i + 1]]) for i in range(3)]
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    # Tempting and false: pixels may not change places, unless there is nothing to pool.
    if min(height, width) > 4:
        shuffled = torch.randperm(height * width, generator=generator)
        moved = [x.flatten(2)[:, :, shuffled].reshape(x.shape) for x in (student, teacher)]
        assert review_kd_loss(moved[:1], moved[1:]) != loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    student = (300 * torch.randn(2, 3, 8, 8)).to(dtype).requires_grad_()
    teacher = (300 * torch.randn(2, 3, 8, 8)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = review_kd_loss([student], [teacher])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain_level(student.float(), teacher.float()))
    assert loss > torch.finfo(torch.float16).max, "in half precision the square is infinite"
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    mixed = review_kd_loss([student.double()], [teacher])
    assert mixed.dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (0, 3)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    student, teacher = pair(*shape)
    loss = review_kd_loss([student], [teacher])
    assert loss == 0
    loss.backward()
    assert student.grad is not None


def test_nan_stays_visible() -> None:
    student, teacher = pair(2, 3, 4, 4)
    teacher[0, 0, 0, 0] = torch.nan
    assert review_kd_loss([student], [teacher]).isnan()


def test_compile_fullgraph() -> None:
    students, teachers = zip(pair(2, 3, 8, 8), pair(2, 3, 7, 7), pair(2, 5), strict=True)
    compiled = torch.compile(review_kd_loss, fullgraph=True, backend="eager")
    loss = compiled(students, teachers)
    torch.testing.assert_close(loss, review_kd_loss(students, teachers))
    loss.backward()
    assert all(student.grad is not None for student in students)
    torch.compiler.reset()


MAP = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([], [], "equally many levels, at least one, got 0 and 0"),
        ([MAP], [MAP, MAP], "got 1 and 2; leave out the shallowest of the longer one"),
        ([MAP, MAP[0]], [MAP, MAP[0]], r"student\[1\] must be a map .* got shape \(3, 4, 4\); tokens become a map by"),
        (
            [MAP],
            [MAP[:, :2]],
            r"teacher\[0\] must have the shape of student\[0\], got \(2, 2, 4, 4\) and \(2, 3, 4, 4\)",
        ),
        ([MAP.int()], [MAP], r"student\[0\] must be floating point, got torch.int32"),
        ([MAP], [MAP.long()], r"teacher\[0\] must be floating point, got torch.int64"),
        ([MAP], [MAP.to("meta")], r"teacher\[0\] must be on the device of student\[0\], got meta and cpu"),
    ],
)
def test_bad_maps(student: list[Tensor], teacher: list[Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        review_kd_loss(student, teacher)


def test_bad_pool_size() -> None:
    with pytest.raises(InputError, match="pool_sizes must be positive, got 0"):
        review_kd_loss([MAP], [MAP], pool_sizes=(4, 0))


def test_examples() -> None:
    results = doctest.testmod(zoo.losses.review_kd)
    assert results.attempted > 0
    assert results.failed == 0
