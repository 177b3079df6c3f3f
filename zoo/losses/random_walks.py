"""Random walks over a batch by the similarity of its rows, and how far two of them part: the engine of `structure_loss`.

From prepared features Z (N, d), one step of the walk goes from row i to row j with probability P_ij, the softmax over j
of <z_i, z_j> / temperature, and l steps with (P^l)_ij. Two batches of features of the same samples give walks A and X,
compared row by row:

    released   sum_j m_j (log m_j - (log a_j + log x_j) / 2)      a, x: the probabilities plus 1e-12, m = (a + x) / 2
    js         1/2 sum_j (a_j log(a_j / m_j) + x_j log(x_j / m_j))

A row of P needs all rows of Z but no other row of P, so that blocks of rows are exact, value and gradient alike:

- with one step, the gradient of a block is made along with its value, in the same four matrix products that the dense
  form needs in all, and never twice;
- with more steps, a block of rows of P^(l-1) is multiplied by P, of which a block of rows at a time is made again from
  Z; the gradient goes back in the same way. Memory is that of 2 levels + 4 blocks (block x N), 4 with one
  level, and each further level takes N^3 (4 + 5 d / block) multiplications, gradient included.

Choices:

- the bracket of `released` is evaluated as `log1p((a - x)^2 / (4 a x)) / 2`, which is the same, is never negative,
  keeps its relative precision where a and x nearly agree, and takes one logarithm instead of three;
- `js` has the smallest normal number in place of 1e-12: log(0) does not occur and no value of use is changed;
- the loops are one custom operator, opaque to `torch.compile`, which neither unrolls it nor breaks at it;
- a derivative of the gradient (`create_graph=True`) is supported and exact, but dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["DivergenceName", "row_divergence", "walk_divergence", "walk_spread"]

DivergenceName = Literal["released", "js"]

_RELEASED_EPSILON = 1e-12


def row_divergence(aligned: Tensor, frozen: Tensor, divergence: DivergenceName) -> Tensor:
    """Divergence of each row of probabilities from its partner, in operations that autograd follows.

    Args:
        aligned: probabilities (n, N), rows that sum to 1.
        frozen: probabilities (n, N).
        divergence: which one, see the module's docstring.

    Returns:
        Values (n,) in nats, at least 0: without a bound for `"released"`, which 1e-12 keeps below about 13.2 for walks
        of a common length, and at most log 2 for `"js"`.

    Example:
        >>> one_hot = torch.eye(2, dtype=torch.float64)
        >>> row_divergence(one_hot, one_hot.flip(0), "js") / torch.tensor(2.0).double().log()
        tensor([1., 1.], dtype=torch.float64)
    """
    epsilon = _epsilon(divergence, aligned)
    a, x = aligned + epsilon, frozen + epsilon
    middle = (a + x) / 2
    if divergence == "js":
        return (a * (a / middle).log() + x * (x / middle).log()).sum(1) / 2
    return (middle * torch.log1p((a - x).square() / (4 * a * x))).sum(1) / 2


@torch.library.custom_op(
    "zoo::walk_divergence",
    mutates_args=(),
    schema="(Tensor frozen, Tensor aligned, Tensor weights, *, SymInt start, SymInt rows, float temperature, "
    "str divergence, SymInt row_tile, bool learns) -> (Tensor, Tensor, Tensor)",
)
def walk_divergence(
    frozen: Tensor,
    aligned: Tensor,
    weights: Tensor,
    *,
    start: int,
    rows: int,
    temperature: float,
    divergence: DivergenceName,
    row_tile: int,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum over levels of the divergences of two walks, its parts, and its gradient.

    Args:
        frozen: (N, d) in the working precision.
        aligned: (N, d') in the working precision; only this one has a gradient.
        weights: (L,), of the walks with 1 … L steps.
        start: the first row that is compared; all N rows are columns.
        rows: how many rows are compared.
        temperature: divides the inner products.
        divergence: which one, see the module's docstring.
        row_tile: the most rows of a block.
        learns: whether the gradient is wanted; it is empty otherwise.

    Returns:
        The weighted sum (), which alone is differentiable; the sums over the rows of each level's divergence (L,); the
        gradient in `aligned` (N, d').
    """
    with torch.autocast(aligned.device.type, enabled=False):
        sums = torch.zeros_like(weights)
        gradient = aligned.new_zeros(aligned.shape if learns else (0,))
        work = _Workspace(aligned, levels=len(weights), rows=min(row_tile, rows), temperature=temperature)
        for own in _blocks(start, start + rows, work.rows):
            walks = work.powers(aligned, own, work.walks)
            slopes = work.powers(frozen, own, work.slopes)
            for level, (a, x) in enumerate(zip(walks, slopes, strict=True)):
                sums[level] += _compare(a, x, *work.spare_like(a), divergence, learns=learns)
                x.mul_(weights[level])
            if learns:
                work.add_gradient(gradient, aligned, own, walks, slopes)
        return (weights * sums).sum(), sums, gradient


@walk_divergence.register_fake
def _(
    _: Tensor, aligned: Tensor, weights: Tensor, *, learns: bool, **__: int | float | str
) -> tuple[Tensor, Tensor, Tensor]:
    return weights.new_empty(()), torch.empty_like(weights), aligned.new_empty(aligned.shape if learns else (0,))


def _keep_gradient(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.options = keyword_only_inputs


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
    frozen, aligned, weights, found = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated in its turn
        total = _dense(frozen, aligned, weights, **ctx.options)
        (found,) = torch.autograd.grad(total, aligned, create_graph=True)
    return None, gradients[0] * found, None


walk_divergence.register_autograd(_differentiate, setup_context=_keep_gradient)


@torch.library.custom_op(
    "zoo::walk_spread",
    mutates_args=(),
    schema="(Tensor features, *, SymInt start, SymInt rows, float temperature, SymInt row_tile) -> Tensor",
)
def walk_spread(features: Tensor, *, start: int, rows: int, temperature: float, row_tile: int) -> Tensor:
    """How the first step of a walk spreads: sums over rows of the probability to stay and of exp(entropy).

    Args:
        features: (N, d) in the working precision; there is no gradient.
        start: the first row that counts.
        rows: how many rows count.
        temperature: divides the inner products.
        row_tile: the most rows of a block.

    Returns:
        The two sums (2,).
    """
    with torch.autocast(features.device.type, enabled=False):
        sums = features.new_zeros(2)
        work = _Workspace(features, levels=1, rows=min(row_tile, rows), temperature=temperature)
        for own in _blocks(start, start + rows, work.rows):
            (step,) = work.powers(features, own, work.walks)
            sums[0] += step[:, own].diagonal().sum()
            sums[1] += torch.special.entr(step, out=step).sum(1).exp_().sum()
        return sums


@walk_spread.register_fake
def _(features: Tensor, **_: int | float) -> Tensor:
    return features.new_empty(2)


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _epsilon(divergence: DivergenceName, like: Tensor) -> float:
    return _RELEASED_EPSILON if divergence == "released" else torch.finfo(like.dtype).tiny


class _Workspace:
    """The blocks that are held, all at once: a heap that got and gave them one by one would keep twice as much."""

    def __init__(self, features: Tensor, *, levels: int, rows: int, temperature: float) -> None:
        self.rows = rows
        self.temperature = temperature
        blocks = 2 * levels + (2 if levels == 1 else 4)
        memory = features.new_empty(blocks, rows, len(features)).unbind()
        self.walks, self.slopes, self.spare = memory[:levels], memory[levels : 2 * levels], memory[2 * levels :]

    def spare_like(self, block: Tensor) -> tuple[Tensor, Tensor]:
        return self.spare[0][: len(block)], self.spare[1][: len(block)]

    def step(self, features: Tensor, own: slice, out: Tensor) -> Tensor:
        """Rows of P."""
        count = own.stop - own.start
        scores = torch.mm(features[own], features.t(), out=self.spare[0][:count]).div_(self.temperature)
        return torch.softmax(scores, 1, out=out[:count])

    def powers(self, features: Tensor, own: slice, out: Sequence[Tensor]) -> list[Tensor]:
        """Rows of P, P^2, … as many as there are places for."""
        walks = [self.step(features, own, out[0])]
        for place in out[1:]:
            following = place[: len(walks[0])].zero_()
            for middle in _blocks(0, len(features), self.rows):
                following.addmm_(walks[-1][:, middle], self.step(features, middle, self.spare[1]))
            walks.append(following)
        return walks

    def add_gradient(
        self, gradient: Tensor, features: Tensor, own: slice, walks: list[Tensor], slopes: list[Tensor]
    ) -> None:
        """Add what `slopes`, the derivatives in the powers of P, are worth in the features. All blocks are used up."""
        for level in range(len(walks) - 1, 0, -1):  # P^(level + 1) = P^level P
            for middle in _blocks(0, len(features), self.rows):
                step = self.step(features, middle, self.spare[1])
                slopes[level - 1][:, middle].addmm_(slopes[level], step.t())
                of_step = torch.mm(walks[level - 1][:, middle].t(), slopes[level], out=self.spare[2][: len(step)])
                self._add_through_softmax(gradient, features, middle, step, of_step)
        self._add_through_softmax(gradient, features, own, walks[0], slopes[0])

    def _add_through_softmax(
        self, gradient: Tensor, features: Tensor, own: slice, step: Tensor, of_step: Tensor
    ) -> None:
        of_scores = of_step.mul_(step)
        of_scores.sub_(step.mul_(of_scores.sum(1, keepdim=True)))
        gradient[own].addmm_(of_scores, features, alpha=1 / self.temperature)
        gradient.addmm_(of_scores.t(), features[own], alpha=1 / self.temperature)


def _compare(a: Tensor, x: Tensor, spare: Tensor, other: Tensor, divergence: DivergenceName, *, learns: bool) -> Tensor:
    """The sum of all rows' divergences; what was in `x` becomes the derivative of the sum in `a`, if that is wanted."""
    epsilon = _epsilon(divergence, a)
    if divergence == "js":
        middle = torch.add(x.add_(epsilon), a, out=other).add_(epsilon).mul_(0.5)
        of_x = _inner(x, torch.div(x, middle, out=spare).log_())
        smooth = torch.add(a, epsilon, out=spare)
        log_a = torch.div(smooth, middle, out=other).log_()
        total = (of_x + _inner(smooth, log_a)).clamp_min_(0) / 2  # rounding alone takes it below 0
        if learns:
            torch.mul(log_a, 0.5, out=x)
        return total
    smooth = torch.add(a, epsilon, out=spare)
    difference = torch.sub(a, x, out=other)
    x.add_(epsilon).mul_(smooth)
    torch.div(difference, x, out=x).mul_(difference).mul_(0.25)
    bracket = x.log1p_()  # twice the bracket
    total = (_inner(smooth, bracket) - _inner(difference, bracket) / 2) / 2  # m = a - (a - x) / 2
    if learns:
        x.mul_(0.25).add_(difference.div_(smooth), alpha=0.25)
    return total


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("ij,ij->i", first, second).sum()


def _dense(
    frozen: Tensor,
    aligned: Tensor,
    weights: Tensor,
    *,
    start: int,
    rows: int,
    temperature: float,
    divergence: DivergenceName,
    **_: int,
) -> Tensor:
    step_x, step_a = (torch.softmax(z @ z.t() / temperature, 1) for z in (frozen, aligned))
    x, a = step_x[start : start + rows], step_a[start : start + rows]
    total = torch.zeros_like(weights[0])
    for level in range(len(weights)):
        if level:
            x, a = x @ step_x, a @ step_a
        total = total + weights[level] * row_divergence(a, x, divergence).sum()
    return total
