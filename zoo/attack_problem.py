"""What an attack has to do with: a loss, samples, the ball around each, the valid range, and where runs begin.

The attacks themselves, and what every argument means, are in `zoo.attacks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import working_dtype

__all__ = [
    "Begin",
    "Bound",
    "Loss",
    "Norm",
    "Problem",
    "Settings",
    "beside",
    "make_problem",
    "micro_batches",
    "recording",
]

Norm = Literal["linf", "l2"]
Bound = float | Tensor
Loss = Callable[..., Tensor]

_NORMS = ("linf", "l2")
# Clean values may leave the valid range by this share of it: rounding to half precision, resizing.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Settings:
    """What bounds the steps; the attributes are arguments of `zoo.attacks.pgd`."""

    eps: Bound
    step_size: Bound
    steps: int
    norm: Norm
    valid_range: tuple[Bound, Bound]
    micro_batch: int | None

    def check(self) -> None:
        """Refuse what can be told without the samples.

        Raises:
            InputError: an unknown norm, a number of steps or samples out of range.
        """
        require_choice("norm", self.norm, _NORMS)
        if self.steps < 0:
            raise InputError(f"steps must be at least 0, got {self.steps}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError(f"micro_batch must be at least 1, or None for the whole batch, got {self.micro_batch}")


@dataclass(frozen=True)
class Begin:
    """Where runs begin; the attributes are arguments of `zoo.attacks.pgd`."""

    random_start: bool
    start: Tensor | None
    restarts: int
    generator: torch.Generator | None

    def check(self, x: Tensor) -> None:
        """Refuse a start that does not fit the samples, and restarts that would all be alike.

        Raises:
            InputError: as it says.
        """
        if self.restarts < 1 or (self.restarts > 1 and not self.random_start):
            raise InputError(
                f"restarts must be at least 1, and 1 with random_start=False, since all would be alike, got {self.restarts}"
            )
        if self.start is not None and self.start.shape != x.shape:
            raise InputError(f"start must have the shape of x, got {tuple(self.start.shape)} and {tuple(x.shape)}")

    def point(self, problem: Problem, run: int) -> Tensor:
        """Where run number `run`, from 0, begins, for all samples."""
        if run == 0 and self.start is not None:
            return problem.project(self.start.detach().clone().to(problem.x))
        if not self.random_start:
            return problem.x
        x, generator = problem.x, self.generator
        device = x.device if generator is None else generator.device
        if problem.norm == "linf":
            uniform = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
            return problem.project(x + problem.eps * (2 * uniform - 1))
        # A uniformly random direction, and a length whose power of the dimension is uniform: a uniform point of the ball.
        direction = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        uniform = torch.rand(len(x), generator=generator, device=device, dtype=x.dtype).to(x.device)
        direction = torch.where(problem.eps > 0, direction, 0)
        dimensions = (problem.eps > 0).flatten(1).sum(1).clamp(min=1)
        length = beside(uniform ** (1 / dimensions), x)
        return problem.project(x + problem.eps * length * direction / lengths(direction).clamp(min=1e-12))


@dataclass(frozen=True)
class Problem:
    """A loss to raise around some samples; every tensor has their shape, but for the targets."""

    loss: Loss
    targets: Tensor | None
    x: Tensor
    eps: Tensor
    step_size: Tensor
    lower: Tensor  # of the valid range
    upper: Tensor
    norm: Norm

    def rows(self, chosen: slice) -> Problem:
        """Return the same for some of the samples."""
        targets = None if self.targets is None else self.targets[chosen]
        eps, step_size = self.eps[chosen], self.step_size[chosen]
        return Problem(
            self.loss, targets, self.x[chosen], eps, step_size, self.lower[chosen], self.upper[chosen], self.norm
        )

    def project(self, point: Tensor) -> Tensor:
        """Return the nearest point of the ball, clipped to the valid range; `x` is in both, so the result is too."""
        if self.norm == "linf":
            low = torch.maximum(self.x - self.eps, self.lower)
            return point.clamp(low, torch.minimum(self.x + self.eps, self.upper))
        move = torch.where(self.eps > 0, point - self.x, 0)
        outside = lengths(move / torch.where(self.eps > 0, self.eps, 1)).clamp(min=1)
        return (self.x + move / outside).clamp(self.lower, self.upper)

    def direction(self, gradient: Tensor, size: Tensor) -> Tensor:
        """Return the step of this size that raises the loss most to first order; 0 where the gradient is 0 or NaN."""
        gradient = gradient.nan_to_num(0)
        if self.norm == "linf":
            return size * gradient.sign()
        scaled = size * gradient
        # Divided by the largest entry first: squares of small gradients underflow, those of large ones overflow.
        peak = scaled.abs().flatten(1).amax(1)
        scaled = scaled / beside(torch.where(peak > 0, peak, 1), scaled)
        length = lengths(scaled)
        return size * scaled / torch.where(length > 0, length, 1)

    def climb(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value of each sample and the gradient at its point.

        Raises:
            InputError: the loss does not return one value a sample, or has no gradient.
        """
        leaf = point.detach().requires_grad_()
        values = self._call(leaf.clone())  # a network may change its input in place
        gradient = None
        if values.requires_grad:
            # The sum and not the mean: the gradient of a sample must not depend on how many there are.
            (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise InputError(
                "loss must depend on x by operations that have a gradient, and this one does not; look for detach, no_grad, "
                "inference_mode, argmax or NumPy inside it"
            )
        return values.detach(), gradient

    @torch.no_grad()
    def values(self, point: Tensor) -> Tensor:
        """Return the value of each sample at its point.

        Raises:
            InputError: the loss does not return one value a sample.
        """
        return self._call(point.clone())

    def _call(self, point: Tensor) -> Tensor:
        values = self.loss(point) if self.targets is None else self.loss(point, self.targets)
        if not isinstance(values, Tensor) or values.shape != (len(point),):
            told = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"loss must return one value a sample, shape ({len(point)},), got {told}; use reduction='none'"
            )
        return values.to(self.x.dtype)


def make_problem(loss: Loss, x: Tensor, targets: Tensor | None, settings: Settings) -> Problem:
    """Check samples and bounds against each other, and copy them into the precision that the attack computes in.

    Raises:
        InputError: samples, targets, radius, step or range that do not fit each other.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise InputError(
            f"x must be (B, …) in floating point, got shape {tuple(x.shape)} of {x.dtype}; scale integers to the range of a "
            "float first"
        )
    if targets is not None and (targets.ndim == 0 or len(targets) != len(x)):
        raise InputError(f"targets must have one row a sample, {len(x)}, got shape {tuple(targets.shape)}")
    # Clones: what inference mode made cannot be recorded.
    clean = x.detach().clone().to(working_dtype(x))
    rows = None if targets is None else targets.detach().clone()
    eps, step_size = (_size(name, getattr(settings, name), clean) for name in ("eps", "step_size"))
    low, high = (_spread("valid_range", bound, clean) for bound in settings.valid_range)
    _check_range(clean, low, high)
    # The clean value counts as valid, so that clipping never moves it.
    lower, upper = torch.minimum(low, clean), torch.maximum(high, clean)
    return Problem(loss, rows, clean, eps, step_size, lower, upper, settings.norm)


def _size(name: str, value: Bound, x: Tensor) -> Tensor:
    size = _spread(name, value, x)
    if not bool(((size >= 0) & size.isfinite()).all()):
        raise InputError(f"{name} must be finite and not negative, got {value}")
    return size


def _spread(name: str, value: Bound, x: Tensor) -> Tensor:
    bound = torch.as_tensor(value, dtype=x.dtype, device=x.device).detach().clone()
    try:
        return bound.expand(x.shape)
    except RuntimeError as error:
        raise InputError(
            f"{name} must be a number or a tensor that broadcasts to x, {tuple(x.shape)}, got shape {tuple(bound.shape)}; "
            "one value a channel of images has the shape (C, 1, 1)"
        ) from error


def _check_range(x: Tensor, low: Tensor, high: Tensor) -> None:
    if not bool((low < high).all()):
        raise InputError("valid_range must be a lower and a higher bound, and one is not lower than the other")
    slack = _TOLERANCE * (high - low)
    if bool(((x < low - slack) | (x > high + slack)).any()):
        raise InputError(
            f"x must lie in valid_range, {float(low.min()):.4g} … {float(high.max()):.4g}, got values from "
            f"{float(x.min()):.4g} to {float(x.max()):.4g}; give the range of this modality, for each channel if it is "
            "normalised, or attack what comes before normalisation"
        )


@contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """Record gradients inside, whatever mode the caller is in, and without autocast.

    Args:
        device: where the loss is computed.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def micro_batches(rows: int, size: int | None) -> list[slice]:
    """Return the slices that samples are taken in.

    Args:
        rows: how many samples there are.
        size: the most of a slice, all if omitted.

    Returns:
        The slices, in order.

    Example:
        >>> micro_batches(5, 3)
        [slice(0, 3, None), slice(3, 5, None)]
    """
    step = size or max(rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def beside(values: Tensor, x: Tensor) -> Tensor:
    """Return one value a sample (B,) in a shape that broadcasts to samples (B, …).

    Args:
        values: (B,).
        x: samples, of which only the number of dimensions counts.

    Returns:
        (B, 1, …).

    Example:
        >>> beside(torch.zeros(2), torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 1, 1, 1])
    """
    return values.view(-1, *[1] * (x.ndim - 1))


def lengths(moves: Tensor) -> Tensor:
    """Return the Euclidean length of each sample's move, in a shape that broadcasts to it.

    Args:
        moves: (B, …).

    Returns:
        (B, 1, …).

    Example:
        >>> lengths(torch.tensor([[3.0, 4.0]]))
        tensor([[5.]])
    """
    return beside(torch.linalg.vector_norm(moves.flatten(1), dim=1), moves)
