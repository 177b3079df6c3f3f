"""Adversarial inputs: projected gradient ascent on a loss of each sample, with fixed steps (PGD) and adaptive ones (APGD).

Sources; formulas as they are commonly stated:

- PGD: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks",
  arXiv 1706.06083;
- APGD: Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
  arXiv 2003.01690.

With J the loss of a sample and P the projection into the ball of radius eps around the clean x and then into the valid
range, PGD repeats, from a random point of the ball or a given one,

    x' <- P( x' + step_size * sign(grad J(x')) )               norm "linf"
    x' <- P( x' + step_size * grad J(x') / ||grad J(x')||_2 )  norm "l2"

APGD begins with steps of 2 eps, has momentum, keeps the best point it has seen, and at checkpoints halves the step of each
sample that does not get on and sends it back to its best point.

True of both:

- the loss belongs to the caller and returns one value a sample, which is raised; to reach a target, hand over its negative;
- the mode of a network is the caller's: put it in eval mode, or batch norm and dropout make the attack on one sample depend
  on the others;
- a clean input is never moved by anything but the attack: where eps is 0 the result is the input bit for bit, and an input
  outside `valid_range` is refused, not clipped into it;
- everything is computed in float32 (float64 stays), outside autocast, and gradients are recorded whether or not the caller
  does, in `torch.inference_mode` too. In half precision small gradients become 0, their sign too, and a pixel stands still,
  which looks like robustness;
- no parameter's ``.grad`` changes. A gradient that is not a number moves nothing;
- a value depends on its own sample only, as far as the loss's does, and random starts are drawn for the whole batch:
  `micro_batch` changes memory, not results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zoo.attack_library import library_attack
from zoo.attack_losses import attack_loss
from zoo.attack_problem import (
    Begin,
    Bound,
    Loss,
    Norm,
    Problem,
    Settings,
    beside,
    make_problem,
    micro_batches,
    recording,
)
from zoo.errors import InputError

__all__ = ["Bound", "Loss", "Norm", "apgd", "attack_loss", "library_attack", "pgd"]

_MOMENTUM = 0.75  # the share of the new step, alpha in the paper


@torch.compiler.disable  # type: ignore[untyped-decorator]
def pgd(
    loss: Loss,
    x: Tensor,
    targets: Tensor | None = None,
    *,
    eps: Bound,
    step_size: Bound,
    steps: int,
    random_start: bool = True,
    start: Tensor | None = None,
    norm: Norm = "linf",
    valid_range: tuple[Bound, Bound] = (0.0, 1.0),
    restarts: int = 1,
    generator: torch.Generator | None = None,
    micro_batch: int | None = None,
) -> Tensor:
    """Raise a loss within a ball around each input, by steps of one size; the last point counts.

    Costs `steps` forward and backward passes, and one forward pass more if there are several restarts.

    Args:
        loss: called as `loss(x)` without targets, as `loss(x, targets)` with the rows of `targets` that belong to `x`;
            returns one value a sample (B,), to be raised.
        x: clean inputs (B, …) in floating point, inside `valid_range`.
        targets: labels, embeddings or whatever else the loss needs, one row a sample.
        eps: radius of the ball, at least 0, in the units of `x`: a number or a tensor that broadcasts to `x`, such as
            (C, 1, 1) for channels and (B, 1, 1, 1) for samples. In the norm "l2" a tensor makes the ball
            ||(x' - x) / eps||_2 <= 1, so that eps / sigma on normalised inputs is the ball of eps before normalisation.
        step_size: length of a step, like `eps`.
        steps: how many, at least 0; none leaves random noise in the ball.
        random_start: whether to begin at a uniformly random point of the ball, else at `x`.
        start: an input (B, …) to begin the first run from, projected into the ball; comes before `random_start`.
        norm: `"linf"` or `"l2"`.
        valid_range: lowest and highest value that an input can have, numbers or tensors that broadcast to `x`; infinite
            ones do not clip.
        restarts: runs from different random starts, at least 1, of which each sample keeps the one with the highest loss.
        generator: draws the random starts, on its own device; PyTorch's global one for the device of `x` if omitted.
        micro_batch: samples that pass through the loss at a time, at least 1; all if omitted.

    Returns:
        Attacked inputs (B, …) in the dtype and on the device of `x`, without a graph. The conversion back to half
        precision rounds, by which a value may leave the ball.

    Raises:
        InputError: an argument out of its range, of another shape, or a loss that does not return one value a sample or
            does not depend on its input.

    Example:
        The ball is a box, and the loss grows to the right:

        >>> x = torch.tensor([[0.5, 0.95]])
        >>> pgd(lambda x: x.sum(1), x, eps=0.1, step_size=0.05, steps=3, random_start=False)
        tensor([[0.6000, 1.0000]])
    """

    def run(problem: Problem, point: Tensor, *, valued: bool) -> tuple[Tensor, Tensor | None]:
        for _ in range(steps):
            _, gradient = problem.climb(point)
            point = problem.project(point + problem.direction(gradient, problem.step_size))
        return point, problem.values(point) if valued else None

    begin = Begin(random_start, start, restarts, generator)
    settings = Settings(eps, step_size, steps, norm, valid_range, micro_batch)
    return _attack(run, loss, x, targets, begin=begin, settings=settings)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def apgd(
    loss: Loss,
    x: Tensor,
    targets: Tensor | None = None,
    *,
    eps: Bound,
    steps: int,
    random_start: bool = True,
    start: Tensor | None = None,
    norm: Norm = "linf",
    valid_range: tuple[Bound, Bound] = (0.0, 1.0),
    restarts: int = 1,
    generator: torch.Generator | None = None,
    micro_batch: int | None = None,
    rho: float = 0.75,
) -> Tensor:
    """Raise a loss within a ball around each input, by steps that adapt to each sample; the best point counts.

    Costs `steps` forward and backward passes and one forward pass. Ours against the authors' release: a sample that goes
    back to its best point is compared with that point at its next step, as in the paper, and starts are uniform in the
    ball.

    Args:
        loss: as for `pgd`.
        x: as for `pgd`.
        targets: as for `pgd`.
        eps: as for `pgd`.
        steps: how many, at least 0; 100 in the paper.
        random_start: as for `pgd`.
        start: as for `pgd`.
        norm: as for `pgd`.
        valid_range: as for `pgd`.
        restarts: as for `pgd`.
        generator: as for `pgd`.
        micro_batch: as for `pgd`.
        rho: a sample whose loss rose in less than this share of the steps since the last checkpoint gets half the step,
            in 0 … 1.

    Returns:
        As `pgd`.

    Raises:
        InputError: as `pgd`, or `rho` out of range.

    Example:
        >>> x = torch.tensor([[0.5, 0.95]])
        >>> apgd(lambda x: x.sum(1), x, eps=0.1, steps=3, random_start=False)
        tensor([[0.6000, 1.0000]])
    """
    if not 0 <= rho <= 1:
        raise InputError(f"rho must be in 0 … 1, got {rho}")
    marks = _checkpoints(steps)

    def run(problem: Problem, point: Tensor, *, valued: bool) -> tuple[Tensor, Tensor | None]:  # noqa: ARG001
        return _adaptive(problem, point, steps, marks, rho)

    begin = Begin(random_start, start, restarts, generator)
    settings = Settings(eps, eps, steps, norm, valid_range, micro_batch)
    return _attack(run, loss, x, targets, begin=begin, settings=settings)


def _checkpoints(steps: int) -> list[int]:
    """Return after which steps APGD looks back: 22 % of them, then intervals that shrink by 3 % to no less than 6 %."""
    found, at, interval = [], 0, 22
    while at + interval <= 100:
        at += interval
        found.append(-(-at * steps // 100))
        interval = max(interval - 3, 6)
    return sorted(set(found))


@dataclass
class _Seen:
    """The best point of each sample so far."""

    point: Tensor
    value: Tensor
    gradient: Tensor

    def take(self, point: Tensor, value: Tensor, gradient: Tensor) -> None:
        better = (value > self.value) | self.value.isnan()
        self.value = torch.where(better, value, self.value)
        rows = beside(better, point)
        self.point = torch.where(rows, point, self.point)
        self.gradient = torch.where(rows, gradient, self.gradient)


def _adaptive(problem: Problem, point: Tensor, steps: int, marks: list[int], rho: float) -> tuple[Tensor, Tensor]:
    value, gradient = problem.climb(point)
    best = _Seen(point, value, gradient)
    previous = point
    size = torch.full_like(value, 2)  # in units of eps
    rose, last_mark = torch.zeros_like(value), 0
    best_at_mark, halved = value, torch.zeros_like(value, dtype=torch.bool)
    for step in range(1, steps + 1):
        share = _MOMENTUM if step > 1 else 1.0
        aim = problem.project(point + problem.direction(gradient, beside(size, point) * problem.eps))
        moved = problem.project(point + share * (aim - point) + (1 - share) * (point - previous))
        previous, point, before = point, moved, value
        if step < steps:
            value, gradient = problem.climb(point)
        else:
            value = problem.values(point)
        rose = rose + (value > before)
        best.take(point, value, gradient)
        if step in marks:
            stuck = (rose < rho * (step - last_mark)) | (~halved & (best.value <= best_at_mark))
            size = torch.where(stuck, size / 2, size)
            value = torch.where(stuck, best.value, value)
            rows = beside(stuck, point)
            point, gradient = torch.where(rows, best.point, point), torch.where(rows, best.gradient, gradient)
            rose, last_mark = torch.zeros_like(rose), step
            best_at_mark, halved = best.value, stuck
    return best.point, best.value


class _Run(Protocol):
    def __call__(self, problem: Problem, point: Tensor, *, valued: bool) -> tuple[Tensor, Tensor | None]: ...


def _attack(run: _Run, loss: Loss, x: Tensor, targets: Tensor | None, *, begin: Begin, settings: Settings) -> Tensor:
    """Run from each start, micro-batch by micro-batch, and keep for each sample the run that raised its loss most."""
    settings.check()
    begin.check(x)
    with recording(x.device):
        problem = make_problem(loss, x, targets, settings)
        movable = problem.eps > 0
        if not bool(movable.any()):
            return x.detach().clone()
        result, values = _one_run(run, problem, begin, settings.micro_batch, 0)
        for index in range(1, begin.restarts):
            points, found = _one_run(run, problem, begin, settings.micro_batch, index)
            better = (found > values) | values.isnan()
            values = torch.where(better, found, values)
            result = torch.where(beside(better, points), points, result)
        # Adding 0 to -0 gives 0: where nothing may move, take what was there, bit for bit.
        return torch.where(movable, result, problem.x).to(x.dtype)


def _one_run(run: _Run, problem: Problem, begin: Begin, micro_batch: int | None, index: int) -> tuple[Tensor, Tensor]:
    """Points and, if they are to be compared, their values; without a value it is -inf."""
    starts = begin.point(problem, index)
    points, values = [], []
    for rows in micro_batches(len(problem.x), micro_batch):
        point, value = run(problem.rows(rows), starts[rows], valued=begin.restarts > 1)
        points.append(point)
        values.append(point.new_full((len(point),), -torch.inf) if value is None else value)
    return torch.cat(points), torch.cat(values)
