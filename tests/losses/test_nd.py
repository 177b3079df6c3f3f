"""zoo.losses.nd against the numbers of the released code and a per-sample restatement of the formula."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoo.losses.contracts
import zoo.losses.nd
from zoo.losses import kd_loss, nd_loss, nd_statistics

# Inputs and numbers: section 6 of the project's notes on arXiv 2305.17007, computed there with the released classes in
# float64. The centres are the class means of the bank; class 3 has no sample.
BANK = [[2, 0, 1, 0.5], [1, 0.5, 0, 0.5], [0, 3, 0.5, 0], [0.5, 2, 0, 1], [1, 2.25, 0.25, 0.5]]
BANK += [[0, 0.5, 1.5, 2], [0.5, 0, 2.5, 1]]
BANK_LABELS = [0, 0, 1, 1, 1, 2, 2]
STUDENT = [[0.5, 0.25, 0.5, 0], [3, 0.5, 1, 2], [-0.5, 0.25, 1, -0.25], [0.25, -1.5, 0.5, 0], [1, 0, 0.5, 0.25]]
TEACHER = [[2, 0.5, 1, 0.5], [1, 0.5, 0.5, 0.5], [0, 0.5, 2, 1.5], [0.5, 2.5, 0, 0.5], [1.5, 0, 0.5, 1]]
LABELS = [0, 0, 2, 1, 0]
TERMS = [0.7298522664, 0.0324968330, 0.7572701133, 1.5133784995, 0.4023856953]
LOGITS_STUDENT = [[1, 0.5, -0.5, 0], [0.25, 2, -1, 0.5], [0, -0.5, 1.5, 1]]
LOGITS_TEACHER = [[3, 1, -1, 0.5], [-0.5, 4, 0, 1], [0.5, -1, 2, 2.5]]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def golden() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bank, labels = double(BANK), torch.tensor(BANK_LABELS)
    centres = torch.stack([bank[labels == k].mean(0) for k in range(3)] + [torch.zeros(4, dtype=torch.float64)])
    return double(STUDENT).requires_grad_(), double(TEACHER), centres, torch.tensor(LABELS)


def random_case(
    *, batch: int = 6, width: int = 5, classes: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student = torch.randn(batch, width, dtype=dtype).requires_grad_()
    scale = torch.linspace(0.3, 3, batch, dtype=dtype).unsqueeze(1)
    centres = torch.randn(classes, width, dtype=dtype)
    return student, torch.randn(batch, width, dtype=dtype) * scale, centres, torch.arange(batch) % classes


def plain_terms(student: Tensor, teacher: Tensor, centres: Tensor, labels: Tensor) -> list[Tensor]:
    """1 - <s, e_y> / max(|s|, |t|) for one sample after another; the built-in max gives a tie to the student."""
    terms = []
    for s, t, label in zip(student, teacher, labels.tolist(), strict=True):
        direction = centres[label] / centres[label].norm()
        terms.append(1 - torch.dot(s, direction) / max(s.norm(), t.norm()))
    return terms


def test_golden() -> None:
    student, teacher, centres, labels = golden()
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(nd_loss(student, teacher, centres, labels, reduction="none"), double(TERMS), **close)
    loss = nd_loss(student, teacher, centres, labels)
    torch.testing.assert_close(loss, double(0.6870766815), **close)
    torch.testing.assert_close(2 * loss, double(1.3741533630), **close)
    by_class = nd_loss(student, teacher, centres, labels, reduction="class")
    torch.testing.assert_close(by_class, double(0.8862978481), **close)
    torch.testing.assert_close(by_class - 1, double(-0.1137021519), **close)


def test_golden_gradient() -> None:
    student, teacher, centres, labels = golden()
    (gradient,) = torch.autograd.grad(nd_loss(student, teacher, centres, labels), student)
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(gradient.norm(), double(0.1759560877), **close)
    torch.testing.assert_close(
        gradient[1], double([-0.0066509348, -0.0011084891, -0.0022169783, 0.0113620136]), **close
    )
    along = double([-0.0540295467, 0, -0.0485459773, 0.1026756999, -0.1195228609])
    torch.testing.assert_close((gradient * student).sum(1), along, **close)


def test_golden_tie() -> None:
    """|s| = |t| = 5: the student's norm is differentiated whole, not by half as torch.maximum would."""
    student = double([[3, 4, 0, 0]]).requires_grad_()
    loss = nd_loss(student, double([[0, 0, 5, 0]]), golden()[2], torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, double(0.3440867266), rtol=0, atol=1e-9)
    expected = double([[-0.1001758454, 0.0751318840, -0.0596284794, -0.0596284794]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_golden_rounded_centres() -> None:
    """The release stores the class means with four decimals."""
    student, teacher, centres, labels = golden()
    loss = nd_loss(student, teacher, centres.mul(1e4).round() / 1e4, labels)
    torch.testing.assert_close(loss, double(0.6870769108), rtol=0, atol=1e-9)


def test_golden_statistics() -> None:
    student, teacher, centres, labels = golden()
    statistics = nd_statistics(student, teacher, centres, labels)
    ratios = [math.dist(s, [0] * 4) / math.dist(t, [0] * 4) for s, t in zip(STUDENT, TEACHER, strict=True)]
    expected = {"reward": 1 - 0.6870766815, "cosine": 1 - 0.5034651204, "norm_ratio": sum(ratios) / 5}
    expected["longer_share"] = sum(ratio > 1 for ratio in ratios) / 5
    assert list(statistics) == ["reward", "cosine", "norm_ratio", "longer_share"]
    for name, value in statistics.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, double(expected[name]), rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(("ramp", "expected"), [(1.0, 2.0080413117), (5 / 20, 1.7198469174)])
def test_golden_kd_plus_plus(ramp: float, expected: float) -> None:
    """CE + ramp * KD + 2 * ND on the first three rows."""
    student, teacher, centres, _ = golden()
    entropy = F.cross_entropy(double(LOGITS_STUDENT), torch.tensor([0, 1, 2]))
    distilled = kd_loss(double(LOGITS_STUDENT), double(LOGITS_TEACHER), temperature=4.0)
    labels = torch.tensor([LABELS[0], LABELS[1], LABELS[2]])
    total = entropy + ramp * distilled + 2 * nd_loss(student[:3], teacher[:3], centres, labels)
    torch.testing.assert_close(total, double(expected), rtol=0, atol=1e-9)


def test_identity_per_sample_formula() -> None:
    student, teacher, centres, labels = random_case(batch=16)
    terms = torch.stack(plain_terms(student, teacher, centres, labels))
    torch.testing.assert_close(nd_loss(student, teacher, centres, labels, reduction="none"), terms, rtol=0, atol=1e-14)
    (ours,) = torch.autograd.grad(nd_loss(student, teacher, centres, labels), student)
    (plain,) = torch.autograd.grad(terms.mean(), student)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-14)


def test_identity_class_reduction() -> None:
    """The mean over present classes of each class's mean, and the sample mean if the classes are equally frequent."""
    student, teacher, centres, _ = random_case(batch=6, classes=5)
    labels = torch.tensor([0, 0, 0, 4, 4, 1])
    terms = torch.stack(plain_terms(student, teacher, centres, labels))
    expected = (terms[:3].mean() + terms[3:5].mean() + terms[5]) / 3
    torch.testing.assert_close(nd_loss(student, teacher, centres, labels, reduction="class"), expected)
    balanced = torch.tensor([0, 1, 4, 4, 1, 0])
    torch.testing.assert_close(
        nd_loss(student, teacher, centres, balanced, reduction="class"), nd_loss(student, teacher, centres, balanced)
    )


def test_identity_soft_labels() -> None:
    """One-hot rows are labels; a mixture points along the mixture of the class means, whatever it sums to."""
    student, teacher, centres, labels = random_case()
    hard = nd_loss(student, teacher, centres, labels)
    one_hot = F.one_hot(labels, 4).double()
    torch.testing.assert_close(nd_loss(student, teacher, centres, one_hot), hard)
    torch.testing.assert_close(nd_loss(student, teacher, centres, 3 * one_hot), hard)
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    mixtures = torch.stack([0.3 * centres[a] + 0.7 * centres[b] for a, b in zip(labels, labels.flip(0), strict=True)])
    torch.testing.assert_close(
        nd_loss(student, teacher, centres, mixed), nd_loss(student, teacher, mixtures, torch.arange(6))
    )
    # Mass on a class without a mean adds nothing; all of the mass there leaves the sample out.
    centres[3] = 0
    half_missing = double([[0.5, 0, 0, 0.5], [0, 0, 0, 1]])
    values = nd_loss(student[:2], teacher[:2], centres, half_missing, reduction="none")
    torch.testing.assert_close(values[0], plain_terms(student[:1], teacher[:1], centres, torch.tensor([0]))[0])
    assert values[1] == 0


@pytest.mark.parametrize("reduction", ["mean", "none", "class"])
def test_gradcheck(reduction: Any) -> None:
    student, teacher, centres, labels = random_case()
    centres[2] = 0  # a class without a mean
    longer = student.norm(dim=1) > teacher.norm(dim=1)
    assert longer.any()
    assert not longer.all()

    def loss(features: Tensor) -> Tensor:
        return nd_loss(features, teacher, centres, labels, reduction=reduction)

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


def test_gradcheck_soft_labels() -> None:
    student, teacher, centres, _ = random_case()
    weights = torch.rand(6, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda features: nd_loss(features, teacher, centres, weights), student)


def test_stop_gradient_teacher_and_centres() -> None:
    student, teacher, centres, labels = (value.requires_grad_(value.is_floating_point()) for value in random_case())
    weights = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    (nd_loss(student, teacher, centres, labels) + nd_loss(student, teacher, centres, weights)).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert centres.grad is None
    assert weights.grad is None


def test_stop_gradient_no_push_along_a_long_student() -> None:
    """A student longer than the teacher feels no force along its own length; one that is shorter does."""
    student, teacher, centres, labels = random_case(batch=12)
    (gradient,) = torch.autograd.grad(nd_loss(student, teacher, centres, labels, reduction="none").sum(), student)
    longer = student.norm(dim=1) > teacher.norm(dim=1)
    along = (gradient * student).sum(1)
    assert along[longer].abs().max() < 1e-12
    assert along[~longer].abs().min() > 1e-3


@settings(deadline=None, max_examples=40)
@given(exponent=st.floats(-4, 15), centre_exponent=st.floats(-12, 12), seed=st.integers(0, 2**16))
def test_properties(exponent: float, centre_exponent: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher, centres = (torch.randn(n, 8, generator=generator) for n in (5, 5, 3))
    labels = torch.randint(3, (5,), generator=generator)
    plain = nd_loss(student, teacher, centres, labels, reduction="none")
    assert plain.min() >= -1e-6
    assert plain.max() <= 2 + 1e-6
    # The lengths of student and teacher count only by their ratio, the length of a class mean not at all.
    scaled = (student * 10**exponent).requires_grad_()
    same = nd_loss(scaled, teacher * 10**exponent, centres * 10**centre_exponent, labels, reduction="none")
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(same.sum(), scaled)
    assert gradient.isfinite().all()
    # The direction of the teacher's own embedding does not count.
    turned = teacher.flip(1) * torch.tensor([1.0, -1.0] * 4)
    torch.testing.assert_close(nd_loss(student, turned, centres, labels, reduction="none"), plain)
    # Tempting and false: the student's length alone does count, as long as the teacher is longer.
    long_teacher = 10 * student.norm(dim=1, keepdim=True) * F.normalize(teacher)
    short = nd_loss(student, long_teacher, centres, labels, reduction="none")
    shorter = nd_loss(student / 2, long_teacher, centres, labels, reduction="none")
    torch.testing.assert_close(1 - shorter, (1 - short) / 2, rtol=1e-4, atol=1e-6)


def test_properties_sample_independence() -> None:
    student, teacher, centres, labels = random_case()
    alone = [nd_loss(student[i : i + 1], teacher[i : i + 1], centres, labels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(nd_loss(student, teacher, centres, labels, reduction="none"), torch.stack(alone))


def test_zero_vectors() -> None:
    """Both zero: value 1, gradient 0. Zero student alone: value 1, gradient -e / |t|. Zero teacher: the cosine."""
    centres = double([[0, 2.0]])
    student = double([[0, 0], [0, 0], [3, 4]]).requires_grad_()
    teacher = double([[0, 0], [0, 5.0], [0, 0]])
    values = nd_loss(student, teacher, centres, torch.zeros(3, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(values, double([1, 1, 0.2]))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    # d/ds (1 - s_2 / |s|) = s s_2 / |s|^3 - (0, 1) / |s|
    torch.testing.assert_close(gradient, double([[0, 0], [0, -0.2], [12 / 125, 16 / 125 - 1 / 5]]))
    tiny = torch.full((1, 2), 1e-8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(nd_loss(tiny, tiny / 2, centres, torch.tensor([0])), tiny)
    assert (gradient == 0).all(), "no gradient of 1 / epsilon"


def test_zero_vectors_statistics() -> None:
    student, teacher = double([[0, 0], [0, 3.0]]), double([[0, 0], [0, 2.0]])
    statistics = nd_statistics(student, teacher, double([[0, 1.0]]), torch.tensor([0, 0]))
    assert {name: float(value) for name, value in statistics.items()} == {
        "reward": 0.5,
        "cosine": 0.5,
        "norm_ratio": 1.5,
        "longer_share": 0.5,
    }


def test_missing_classes() -> None:
    student, teacher, centres, labels = random_case()
    centres[1] = 0
    kept = labels != 1
    expected = torch.stack(plain_terms(student[kept], teacher[kept], centres, labels[kept]))
    loss = nd_loss(student, teacher, centres, labels)
    torch.testing.assert_close(loss, expected.mean())
    values = nd_loss(student, teacher, centres, labels, reduction="none")
    assert (values[~kept] == 0).all()
    torch.testing.assert_close(values[kept], expected)
    by_class = [expected[labels[kept] == label].mean() for label in (0, 2, 3)]
    torch.testing.assert_close(
        nd_loss(student, teacher, centres, labels, reduction="class"), torch.stack(by_class).mean()
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).any()
    assert nd_statistics(student, teacher, centres, labels)["reward"] == pytest.approx(1 - float(loss.detach()))


@pytest.mark.parametrize("reduction", ["mean", "class"])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_nothing_valid(batch: int, reduction: Any) -> None:
    """No sample with a class mean, or no sample: 0 with a graph, so that DDP finds its gradients."""
    student = torch.randn(batch, 3, requires_grad=True)
    labels = torch.zeros(batch, dtype=torch.int64)
    loss = nd_loss(student, torch.randn(batch, 3), torch.zeros(2, 3), labels, reduction=reduction)
    assert loss == 0
    loss.backward()
    assert student.grad is not None
    assert (student.grad == 0).all()
    statistics = nd_statistics(student, torch.randn(batch, 3), torch.zeros(2, 3), labels)
    assert all(statistics[name] == 0 for name in ("reward", "cosine", "norm_ratio", "longer_share"))


def _nd_on_rank(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    student, teacher, centres, labels = (tensor.detach() for tensor in _shared_case())
    weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
    rows = slice(rank * 3, (rank + 1) * 3)
    loss = nd_loss(student[rows] @ weight, teacher[rows], centres, labels[rows])
    (gradient,) = torch.autograd.grad(loss, weight)
    for value in (mean_loss := loss.detach().clone(), gradient):
        dist.all_reduce(value)
    return mean_loss / world_size, gradient / world_size


def _shared_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    return random_case()


def test_two_processes_equal_one(two_processes: Callable[..., list[Any]]) -> None:
    """The mean over equally large ranks, which is what DDP takes, is the loss of the global batch."""
    student, teacher, centres, labels = (tensor.detach() for tensor in _shared_case())
    weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
    loss = nd_loss(student @ weight, teacher, centres, labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    for rank_loss, rank_gradient in two_processes(_nd_on_rank):
        torch.testing.assert_close(rank_loss, loss.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(rank_gradient, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("module", [zoo.losses.nd, zoo.losses.contracts])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0
