"""PGD and APGD against the project's notes on arXiv 2505.11895, closed forms, and APGD written for one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.advcal_cases import ALPHA, EPS, INPUTS, LABELS, START, STEPS, encode, head, logits
from tests.attack_parts import ATTACKS, Network, images
from zoo.attacks import apgd, attack_loss, pgd

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-9}
PGD: dict[str, Any] = {"eps": EPS, "step_size": ALPHA, "steps": STEPS}


def mean_ce(x: Tensor) -> Tensor:
    return F.cross_entropy(logits(x), LABELS)


def test_golden_ce() -> None:
    found = pgd(attack_loss("ce", logits), INPUTS, LABELS, random_start=False, **PGD)
    expected = [
        0.6634463778404738, 1.0, 0.635310939116795, 0.07989838830300983,
        0.13154356270500012, 0.7313704010595001, 0.9692586309127391, 0.5280739872364828,
    ]  # fmt: skip
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(mean_ce(INPUTS).item(), 7.565450431089247, **CLOSE)
    torch.testing.assert_close(mean_ce(found).item(), 7.939558397944228, **CLOSE)
    torch.testing.assert_close((found - INPUTS).abs().max().item(), EPS, **CLOSE)


def test_golden_one_step() -> None:
    """The second pixel is clipped to 1."""
    found = pgd(attack_loss("ce", logits), INPUTS, LABELS, random_start=False, eps=EPS, step_size=ALPHA, steps=1)
    expected = ALPHA * torch.tensor([1, 0.00021319847924750057 / ALPHA, 1, 1, -1, -1, -1, 1], dtype=torch.float64)
    torch.testing.assert_close((found - INPUTS)[0], expected, **CLOSE)


def test_golden_l2() -> None:
    """From a start that is not the clean input; from that one, where the gradient is 0, the attack cannot leave."""
    clean = encode(INPUTS)
    found = pgd(attack_loss("l2", encode), INPUTS, clean, start=START, **PGD)
    distance = (encode(found) - clean).square().sum(1).mean()
    torch.testing.assert_close(distance.item(), 0.007154349932355535, **CLOSE)
    expected = [
        0.6634463778404738, 0.9841005270109486, 0.6039383900971873, 0.048525839283401984,
        0.16291611172460796, 0.7627429500791081, 1.0, 0.496701438216875,
    ]  # fmt: skip
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), **CLOSE)
    stuck = pgd(attack_loss("l2", encode), INPUTS, clean, random_start=False, **PGD)
    assert torch.equal(stuck, INPUTS)


def test_golden_adaptive() -> None:
    """A head that has learned to undo an attack falls to one that goes through it."""
    clean = encode(INPUTS)
    cached = encode(pgd(attack_loss("l2", encode), INPUTS, clean, start=START, **PGD))
    weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        (head(cached, weight, bias) - clean).square().sum(1).mean().backward()
        optimizer.step()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    row = [1.0205210779934164, -0.06318571194901224, -0.05567458412601413, -0.03835641259285082, -0.0003686026202232949]
    torch.testing.assert_close(weight[0], torch.tensor(row, dtype=torch.float64), **CLOSE)

    def through(x: Tensor) -> Tensor:
        return head(encode(x), weight, bias)

    adaptive = pgd(attack_loss("l2", through), INPUTS, clean, start=START, **PGD)
    torch.testing.assert_close(
        (head(cached, weight, bias) - clean).square().sum(1).mean().item(), 0.0004397922882410862, **CLOSE
    )
    torch.testing.assert_close((through(adaptive) - clean).square().sum(1).mean().item(), 0.025327707716200337, **CLOSE)


def test_golden_predictions() -> None:
    """The notes attack what was predicted, with a quarter of the radius a step; 3 of 6 stand, and against both attacks."""
    predicted, eps = logits(INPUTS).argmax(1), 24 / 255
    assert predicted.tolist() == [0, 0, 0, 2, 1, 1]
    options: dict[str, Any] = {"eps": eps, "step_size": eps / 4, "steps": STEPS}
    by_ce = logits(pgd(attack_loss("ce", logits), INPUTS, predicted, random_start=False, **options)).argmax(1)
    by_l2 = logits(pgd(attack_loss("l2", encode), INPUTS, encode(INPUTS), start=START, **options)).argmax(1)
    assert by_ce.tolist() == [0, 0, 2, 0, 2, 1]
    assert ((by_ce == predicted) & (by_l2 == predicted)).double().mean() == 0.5


@pytest.fixture
def network() -> Network:
    return Network().eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_identity_normalised(norm: Any, network: Network) -> None:
    """Radius, step and range over the deviation of each channel: the same attack behind the normalisation (golden c7)."""
    network = network.double()
    x, labels = torch.rand(4, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    mean, deviation = (torch.tensor(v, dtype=torch.float64).view(2, 1, 1) for v in ([0.48, 0.41], [0.27, 0.26]))
    eps = 0.2 if norm == "l2" else EPS
    pixels = pgd(
        attack_loss("ce", lambda x: network((x - mean) / deviation)), x, labels,
        eps=eps, step_size=eps / 3, steps=4, norm=norm, random_start=False,
    )  # fmt: skip
    normalised = pgd(
        attack_loss("ce", network), (x - mean) / deviation, labels,
        eps=eps / deviation, step_size=eps / 3 / deviation, steps=4, norm=norm, random_start=False,
        valid_range=(-mean / deviation, (1 - mean) / deviation),
    )  # fmt: skip
    torch.testing.assert_close(normalised * deviation + mean, pixels)
    assert (pixels - x).abs().max() > 0.1 * eps


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_identity_radius_zero(attack: str, norm: Any, dtype: torch.dtype, network: Network) -> None:
    """Bit for bit, also of one channel, of values just outside the range, of -0."""
    x, labels = images()
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[2, 0, 0, 0] = -0.0, 1.001, -0.004
    x = x.to(dtype)
    whole = ATTACKS[attack](attack_loss("ce", network), x, labels, eps=0.0, norm=norm)
    eps = torch.tensor([0.0, 0.1]).view(2, 1, 1)
    part = ATTACKS[attack](attack_loss("ce", network.float()), x, labels, eps=eps, norm=norm)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(whole.view(bits), x.view(bits))
    assert torch.equal(part[:, 0].contiguous().view(bits), x[:, 0].contiguous().view(bits))
    assert not torch.equal(part[:, 1], x[:, 1])
    assert part.dtype == whole.dtype == dtype


@pytest.mark.parametrize("attack", ATTACKS)
def test_identity_linear(attack: str) -> None:
    """A linear loss has its maximum over box, ball and ellipsoid where the formulas say."""
    weight = torch.randn(6, dtype=torch.float64)
    weight[3] = 0
    x = torch.zeros(3, 6, dtype=torch.float64)
    options: dict[str, Any] = {"valid_range": (-math.inf, math.inf), "random_start": False, "steps": 25}
    box = ATTACKS[attack](lambda x: x @ weight, x, eps=0.5, **options)
    torch.testing.assert_close(box, (0.5 * weight.sign()).expand(3, 6))
    ball = ATTACKS[attack](lambda x: x @ weight, x, eps=0.5, norm="l2", **options)
    torch.testing.assert_close(ball, (0.5 * F.normalize(weight, dim=0)).expand(3, 6))
    axes = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0, 0.6], dtype=torch.float64)
    ellipsoid = ATTACKS[attack](lambda x: x @ weight, x, eps=axes, norm="l2", **options)
    torch.testing.assert_close(ellipsoid, (axes * F.normalize(axes * weight, dim=0)).expand(3, 6))
    tiny = ATTACKS[attack](lambda x: 1e-300 * x @ weight, x, eps=0.5, norm="l2", **options)
    torch.testing.assert_close(tiny, ball)


def one_apgd(loss: Callable[[Tensor], Tensor], x: Tensor, eps: float, steps: int) -> Tensor:
    """Croce & Hein's algorithm for one sample as the paper states it, in the maximum norm, from the clean input."""

    def inside(point: Tensor) -> Tensor:
        return torch.min(torch.max(point, x - eps), x + eps).clamp(0, 1)

    def gradient(point: Tensor) -> Tensor:
        leaf = point.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf.unsqueeze(0)).sum(), leaf)[0]

    fractions = [0.0, 0.22]
    while fractions[-1] < 1:
        fractions.append(round(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06), 10))
    marks = [math.ceil(round(f * steps, 8)) for f in fractions if f <= 1]
    points, size = [x, inside(x + 2 * eps * gradient(x).sign())], 2 * eps
    values = [float(loss(p.unsqueeze(0))) for p in points]
    best = max(range(2), key=lambda i: values[i])
    best_point, best_value = points[best], values[best]
    sizes_at, bests_at, risen = [size], [values[0]], [values[1] > values[0]]
    for k in range(1, steps + 1):
        if k > 1:
            aim = inside(points[-1] + size * gradient(points[-1]).sign())
            new = inside(points[-1] + 0.75 * (aim - points[-1]) + 0.25 * (points[-1] - points[-2]))
            points.append(new)
            values.append(float(loss(new.unsqueeze(0))))
            risen.append(values[-1] > values[-2])
            if values[-1] > best_value:
                best_point, best_value = new, values[-1]
        if k in marks[1:]:
            interval = k - marks[marks.index(k) - 1]
            used = size
            few = sum(risen[-interval:]) < 0.75 * interval
            same = sizes_at[-1] == used and bests_at[-1] == best_value
            if few or same:
                size = used / 2
                points[-1], values[-1] = best_point, best_value
            sizes_at.append(size)
            bests_at.append(best_value)
    return best_point


def test_identity_apgd() -> None:
    """All samples together are what each is alone."""
    loss = attack_loss("ce", lambda x: 10 * torch.sin(4 * logits(x)))
    found = apgd(loss, INPUTS, LABELS, eps=0.1, steps=40, random_start=False)
    for row in range(len(INPUTS)):
        alone = one_apgd(lambda x, row=row: loss(x, LABELS[row : row + 1]), INPUTS[row], 0.1, 40)
        torch.testing.assert_close(found[row], alone, **CLOSE)
