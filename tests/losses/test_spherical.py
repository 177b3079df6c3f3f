"""zoo.losses.spherical against the numbers of the notes and the textbook formula in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.spherical import slerp, spherical_bezier

# Inputs and numbers: sections 7.1 and 7.2 of the project's notes on CM3 (shared/papers/cm3.md); those of two modalities
# were compared there with the official code.
TEXT = [[1, 2, -1, 0.5], [0, -1, 1, 2], [0.3, 0.3, 0.3, -0.9]]
IMAGE = [[0.5, -1, 2, 1], [1, 1, 0, 1], [-0.2, 0.8, 0.4, 0.1]]
AUDIO = [[2, 0, 1, -1], [-1, 0.5, 0.5, 1], [0.6, -0.1, 0.2, 0.7]]
SLERP = [
    [0.4536582598, -0.0044699713, 0.6860748538, 0.5687490639],
    [0.3672547776, 0.1075664339, 0.2596883437, 0.8866314650],
    [0.2474019783, 0.3970043562, 0.3371634051, -0.8170071239],
]
DE_CASTELJAU = [
    [0.7146964203, -0.0883998468, 0.6906995809, 0.0657919663],
    [0.2311502549, 0.2582015022, 0.2623663372, 0.9005917216],
    [0.1766096893, 0.6492252846, 0.4619303487, -0.5778718720],
]
FOLD = [
    [0.6874989385, 0.0615911790, 0.6536762738, 0.3102564509],
    [-0.2891218000, 0.2164089104, 0.3588260902, 0.8607087808],
    [0.7752149578, 0.0949788192, 0.3900801025, 0.4877071935],
]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-10}


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def points() -> list[Tensor]:
    return [double(side) for side in (TEXT, IMAGE, AUDIO)]


def plain(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """The sine ratio of one pair of rows."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    theta = np.arccos(np.clip(a @ b, -1, 1))
    return (np.sin(t * theta) * a + np.sin((1 - t) * theta) * b) / np.sin(theta)


def test_golden() -> None:
    text, image, audio = points()
    torch.testing.assert_close(slerp(text, image, double([0.25, 0.5, 0.9])), double(SLERP), **CLOSE)
    curve = spherical_bezier([text, image, audio], double([0.3, 0.6, 0.8]))
    torch.testing.assert_close(curve, double(DE_CASTELJAU), **CLOSE)
    weights = double([[0.3, 0.6, 0.8], [0.7, 0.4, 0.2]])
    torch.testing.assert_close(spherical_bezier([text, image, audio], weights, mode="fold"), double(FOLD), **CLOSE)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), t=st.floats(0, 1), scale=st.sampled_from([1e-2, 1.0, 1e6]))
def test_properties(seed: int, t: float, scale: float) -> None:
    a, b = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    point = slerp(scale * a, b, t)
    expected = np.stack([plain(first, second, t) for first, second in zip(a.numpy(), b.numpy(), strict=True)])
    np.testing.assert_allclose(point.numpy(), expected, atol=1e-12)
    torch.testing.assert_close(point.norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(slerp(b, a, 1 - t), point)
    torch.testing.assert_close(spherical_bezier([a, b], t), point)
    torch.testing.assert_close(spherical_bezier(torch.stack([a, b]), t, mode="fold"), point)
    torch.testing.assert_close(slerp(a, scale * a, t), F.normalize(a))


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_identity_ends(t: float) -> None:
    text, image, audio = points()
    torch.testing.assert_close(slerp(text, image, t), F.normalize(text if t else image))
    for mode in ("de_casteljau", "fold"):
        end = spherical_bezier([text, image, audio], t, mode=mode)
        torch.testing.assert_close(end, F.normalize(text if t else audio))


@pytest.mark.parametrize("step", [0.0, 1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 0.1, 1.0])
def test_float32_at_every_angle(step: float) -> None:
    """Value and gradient are those of float64 however small the angle is."""
    torch.manual_seed(0)
    a, noise, probe = torch.randn(3, 200, 8)
    b = a + step * noise
    t = torch.rand(200)
    results = []
    for dtype in (torch.float32, torch.float64):
        sides = [side.to(dtype).requires_grad_() for side in (a, b)]
        point = slerp(*sides, t.to(dtype))
        results.append([point, *torch.autograd.grad((point * probe.to(dtype)).sum(), sides)])
    for single, exact in zip(*results, strict=True):
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=2e-6)
    # The derivative itself: at equal directions the arc is a + (1 - t) (b - a), with the part along a taken off.
    if step == 0:
        unit, length = F.normalize(a.double()), a.double().norm(dim=1, keepdim=True)
        tangent = probe - (probe * unit).sum(1, keepdim=True) * unit
        torch.testing.assert_close(results[1][1], t.double().unsqueeze(1) * tangent / length, rtol=1e-6, atol=1e-9)


def test_gradcheck() -> None:
    text, image, audio = (side.requires_grad_() for side in points())
    t = double([0.3, 0.6, 0.8]).requires_grad_()
    assert torch.autograd.gradcheck(slerp, (text, image, t))
    assert torch.autograd.gradcheck(lambda *sides: spherical_bezier(sides[:3], sides[3]), (text, image, audio, t))
    assert torch.autograd.gradgradcheck(slerp, (text, image, t))


def test_degenerate() -> None:
    """Opposite directions, vectors of zeros, no rows: defined, and with finite gradients."""
    a = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    b = torch.tensor([[-1.0, -2.0], [-3.0, -6.0], [0.0, 3.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    point = slerp(a, b, torch.tensor([0.5, 0.49, 1.0, 0.0, 0.3]))
    end = math.sqrt(0.2)
    expected = torch.tensor([[end, 2 * end], [-end, -2 * end], [0, 1], [1, 0], [0, 0]])
    torch.testing.assert_close(point, expected)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(point.sum(), (a, b)))
    assert slerp(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0)).shape == (0, 2)
    assert spherical_bezier([torch.tensor([[3.0, 4.0]])], 0.5).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    assert slerp(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 2), 0.5).isnan().all()


@pytest.mark.parametrize("mode", ["de_casteljau", "fold"])
def test_missing_modalities(mode: Any) -> None:
    """A row's curve is that of the modalities it has, whatever stands in the others."""
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 5, dtype=torch.float64)
    masks = torch.tensor([[bool(row >> bit & 1) for bit in range(3)] for row in range(8)])
    t = torch.rand(8, dtype=torch.float64)
    broken = torch.where(masks.t().unsqueeze(2), stack, 1e6).requires_grad_()
    result = spherical_bezier(broken, t, mode=mode, present=masks)
    assert not result[0].any()
    for row in range(1, 8):
        kept = [stack[place, row : row + 1] for place in range(3) if masks[row, place]]
        torch.testing.assert_close(result[row : row + 1], spherical_bezier(kept, t[row : row + 1], mode=mode))
    (gradient,) = torch.autograd.grad(result.sum(), broken)
    assert gradient.isfinite().all()
    assert not gradient[~masks.t()].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    text, image, _ = (side.to(dtype) for side in points())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        point = slerp(text, image, 0.3)
    assert point.dtype == torch.float32
    torch.testing.assert_close(point, slerp(text.float(), image.float(), 0.3), rtol=0, atol=0)


def test_compile() -> None:
    compiled = torch.compile(spherical_bezier, fullgraph=True, backend="aot_eager")
    masks = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])
    t = double([0.3, 0.6, 0.8])
    sides = [side.requires_grad_() for side in points()]
    expected = spherical_bezier(sides, t, present=masks)
    result = compiled(sides, t, present=masks)
    torch.testing.assert_close(result, expected)
    for mine, other in zip(
        torch.autograd.grad(result.sum(), sides), torch.autograd.grad(expected.sum(), sides), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([torch.ones(2, 3)], 1.5), {}, r"t must be in 0 … 1, got 1\.5"),
        (([torch.ones(2, 3)] * 2, torch.tensor([0.5, -1.0])), {}, r"t must be in 0 … 1, found -1\.0"),
        (([torch.ones(2, 3)] * 3, torch.ones(2, 2)), {}, r"t must be floating point of shape \(\) or \(2,\), got"),
        (([torch.ones(2, 3)] * 3, torch.ones(3, 2)), {"mode": "fold"}, r"or \(2,\) or \(2, 2\), got"),
        (([], 0.5), {}, "points must be one tensor"),
        (([torch.ones(2, 3), torch.ones(2, 4)], 0.5), {}, r"points\[1\] must have the shape of points\[0\]"),
        (([torch.ones(2, 3)], 0.5), {"mode": "casteljau"}, "mode must be one of de_casteljau, fold, got 'casteljau'"),
        (([torch.ones(2, 3)], 0.5), {"present": torch.ones(2, 1)}, r"present must be bool of shape \(2, 1\)"),
    ],
)
def test_bad_input(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spherical_bezier(*arguments, **options)


def test_bad_slerp() -> None:
    with pytest.raises(InputError, match="b must have the shape of a"):
        slerp(torch.ones(2, 3), torch.ones(3, 3), 0.5)
    with pytest.raises(InputError, match="a must be floating point"):
        slerp(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), 0.5)
