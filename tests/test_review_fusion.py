"""The fusion of ReviewKD against a restatement with plain functions, and its edges."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo.review_fusion
from zoo.errors import InputError
from zoo.losses.review_kd import review_kd_loss
from zoo.review_fusion import ReviewFusion

STUDENT, TEACHER = (4, 6, 8), (5, 7, 9)


def maps(*sides: int | tuple[int, int], batch: int = 3, channels: Sequence[int] = STUDENT) -> list[Tensor]:
    sizes = [(side, side) if isinstance(side, int) else side for side in sides]
    return [torch.randn(batch, c, *size) for c, size in zip(channels, sizes, strict=True)]


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    """Pixel i of n comes from pixel floor(i m / n) of m."""
    rows = torch.arange(height) * x.shape[2] // height
    columns = torch.arange(width) * x.shape[3] // width
    return x[:, :, rows][:, :, :, columns]


def standardised(x: Tensor) -> Tensor:
    """Batch norm with weight 1 and bias 0."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def plain(fusion: ReviewFusion, students: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
    outputs: list[Tensor] = []
    passed: Tensor | None = None
    for index in (2, 1, 0):
        level: Any = fusion.levels[index]
        x = standardised(torch.einsum("oi,bihw->bohw", level.reduce.weight[:, :, 0, 0], students[index]))
        if passed is not None:
            up = nearest(passed, *x.shape[2:])
            logits = torch.einsum("oi,bihw->bohw", level.attention.weight[:, :, 0, 0], torch.cat([x, up], 1))
            own, deeper = torch.sigmoid(logits + level.attention.bias[:, None, None]).unbind(1)
            x = own[:, None] * x + deeper[:, None] * up
        passed = nearest(x, *sizes[index])
        outputs.insert(0, standardised(F.conv2d(passed, level.expand.weight, padding=1)))
    return outputs


@pytest.mark.parametrize("sizes", [[(8, 8), (4, 4), (2, 2)], [(14, 14)] * 3, [(9, 5), (4, 3), (2, 1)]])
def test_identity_plain_formula(sizes: list[tuple[int, int]]) -> None:
    fusion = ReviewFusion(STUDENT, TEACHER)
    students = maps(8, 4, 2)
    outputs = fusion(students, sizes)
    assert [tuple(output.shape) for output in outputs] == [
        (3, channels, *size) for channels, size in zip(TEACHER, sizes, strict=True)
    ]
    for output, expected in zip(outputs, plain(fusion, students, sizes), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_sizes_default_to_the_students() -> None:
    students = maps(8, 4, (3, 2))
    outputs = ReviewFusion(STUDENT, TEACHER).eval()(students)
    assert [output.shape[2:] for output in outputs] == [x.shape[2:] for x in students]


def test_deeper_maps_reach_shallower_outputs_and_not_the_other_way() -> None:
    fusion = ReviewFusion(STUDENT, TEACHER).eval()
    students = [x.requires_grad_() for x in maps(8, 4, 2)]
    outputs = fusion(students)
    for index, output in enumerate(outputs):
        gradients = torch.autograd.grad(output.sum(), students, retain_graph=True, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [level >= index for level in range(3)]


def test_every_parameter_is_used() -> None:
    fusion = ReviewFusion(STUDENT, TEACHER)
    targets = maps(8, 4, 2, channels=TEACHER)
    review_kd_loss(fusion(maps(8, 4, 2)), targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fusion.parameters())
    assert getattr(fusion.levels[2], "attention", "absent") is None, "the deepest level has nothing to fuse"


@pytest.mark.parametrize(("deepest", "given", "expected"), [(8, None, 8), (600, None, 512), (8, 3, 3)])
def test_mid_channels(deepest: int, given: int | None, expected: int) -> None:
    fusion = ReviewFusion([4, deepest], [5, 6], mid_channels=given)
    assert [level.reduce.out_channels for level in fusion.levels] == [expected] * 2  # type: ignore[union-attr]


def test_vector_as_last_level() -> None:
    students = [*maps(8, 4, channels=STUDENT[:2]), torch.randn(3, 8)]
    fusion = ReviewFusion(STUDENT, TEACHER)
    outputs = fusion(students, [(8, 8), (7, 7), ()])
    assert [tuple(output.shape) for output in outputs] == [(3, 5, 8, 8), (3, 7, 7, 7), (3, 9)]
    assert [output.ndim for output in fusion(students)] == [4, 4, 2]
    pixel = [*students[:2], students[2][:, :, None, None]]
    fusion.eval()
    for output, other in zip(fusion(students), fusion(pixel), strict=True):
        torch.testing.assert_close(output, other.reshape(output.shape))


def test_batch_of_one_has_no_variance() -> None:
    """One value a channel: the running statistics normalise and stay; the maps of several pixels train as ever."""
    fusion = ReviewFusion(STUDENT, TEACHER).train()
    students = [x.requires_grad_() for x in [*maps(4, 2, batch=1, channels=STUDENT[:2]), torch.randn(1, 8)]]
    before = {name: buffer.clone() for name, buffer in fusion.named_buffers()}
    outputs = fusion(students, [(4, 4), (2, 2), ()])
    assert all(output.isfinite().all() for output in outputs)
    moved = {name for name, buffer in fusion.named_buffers() if not torch.equal(buffer, before[name])}
    assert not any(name.startswith("levels.2.") for name in moved)
    assert {"levels.0.reduce_norm.running_mean", "levels.1.expand_norm.running_mean"} <= moved
    deepest: Any = fusion.levels[2]
    reduced = deepest.reduce_norm.eval()(deepest.reduce(students[2][:, :, None, None]))
    expected = deepest.expand_norm.eval()(deepest.expand(reduced))
    torch.testing.assert_close(outputs[2], expected.flatten(1))
    sum(output.sum() for output in outputs).backward()


def test_empty_batch() -> None:
    fusion = ReviewFusion(STUDENT, TEACHER)
    outputs = fusion(maps(8, 4, 2, batch=0), [(8, 8), (7, 7), (2, 2)])
    assert [len(output) for output in outputs] == [0, 0, 0]
    assert all(buffer.isfinite().all() for buffer in fusion.buffers())


def test_initialisation() -> None:
    """Kaiming, uniform, a = 1: bounds of sqrt(6 / (2 fan_in)); nothing outside is touched."""
    torch.manual_seed(0)
    fusion = ReviewFusion([64, 64], [128, 128])
    for level in fusion.levels:
        for convolution in (level.reduce, level.expand):
            assert isinstance(convolution, nn.Conv2d)
            bound = (3 / (convolution.in_channels * convolution.kernel_size[0] ** 2)) ** 0.5
            assert bound * 0.95 < convolution.weight.abs().max() <= bound
            assert convolution.bias is None


def test_half_precision_autocast() -> None:
    fusion = ReviewFusion(STUDENT, TEACHER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = fusion(maps(8, 4, 2), [(7, 7)] * 3)
        loss = review_kd_loss(outputs, maps(7, 7, 7, channels=TEACHER))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fusion.parameters())


def test_sync_batchnorm_takes_the_place() -> None:
    """What Lightning's sync_batchnorm=True does to the module."""
    fusion = nn.SyncBatchNorm.convert_sync_batchnorm(ReviewFusion(STUDENT, TEACHER)).eval()
    assert [len(output) for output in fusion(maps(8, 4, 2))] == [3, 3, 3]


def test_compile_fullgraph() -> None:
    fusion = ReviewFusion(STUDENT, TEACHER).eval()
    students = [*maps(8, 4, channels=STUDENT[:2]), torch.randn(3, 8)]
    sizes: list[tuple[int, ...]] = [(14, 14), (7, 7), ()]
    compiled = torch.compile(fusion, fullgraph=True, backend="eager")
    for output, expected in zip(compiled(students, sizes), fusion(students, sizes), strict=True):
        torch.testing.assert_close(output, expected)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ([], [], {}, "must be equally many, at least one, got 0 and 0"),
        ([4], [4, 8], {}, "got 1 and 2; leave out the shallowest of the longer one"),
        ([4, 0], [4, 8], {"mid_channels": 3}, "student_channels must be positive, got 0"),
        ([4], [-1], {}, "teacher_channels must be positive, got -1"),
        ([4], [4], {"mid_channels": 0}, "mid_channels must be positive, got 0"),
    ],
)
def test_bad_channels(student: list[int], teacher: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReviewFusion(student, teacher, **options)


@pytest.mark.parametrize(
    ("students", "sizes", "message"),
    [
        (maps(8, 4, channels=STUDENT[:2]), None, "maps and sizes must be 3, one a level, got 2 and 2"),
        (maps(8, 4, 2), [(8, 8)], "got 3 and 1"),
        (maps(8, 4, 2, channels=(4, 4, 8)), None, r"maps\[1\] must be \(B, 6, H, W\) or \(B, 6\), got shape \(3, 4,"),
        (
            [*maps(8, 4, channels=STUDENT[:2]), torch.zeros(3, 4, 8)],
            None,
            r"maps\[2\] must be .* got shape \(3, 4, 8\)",
        ),
        (maps(8, 4, 2), [(8, 8), (4,), (2, 2)], r"sizes\[1\] must be \(H, W\), or \(\) for a vector, got \(4,\)"),
        (
            maps(8, 4, 2),
            [(8, 8), (4, 4), ()],
            r"maps\[2\] has 2 x 2 pixels and the teacher a vector; give the student's",
        ),
    ],
)
def test_bad_maps(students: list[Tensor], sizes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReviewFusion(STUDENT, TEACHER)(students, sizes)


def test_examples() -> None:
    results = doctest.testmod(zoo.review_fusion)
    assert results.attempted > 0
    assert results.failed == 0
