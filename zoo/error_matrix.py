"""The SoftREPA loss over all pairs of images and captions, each of which costs a pass of the denoiser, in bounded memory.

Value and gradient are those of `zoo.losses.softrepa.softrepa_loss` of the whole matrix of errors. What differs is how many
pairs have their activations kept at a time, and how often the denoiser runs:

    pairs        activations of                               passes of R x N pairs
    full         all pairs                                    R N forward, R N backward
    rows         an image and its captions (the default)      R N forward, R N backward
    two_pass     one call, down to a single pair              2 R N forward, R N backward

`rows` is exact because the loss is a sum over images: each image's pairs are differentiated, and their graph freed, before
the next one's are evaluated. `two_pass` first evaluates all pairs without a graph; from their errors the loss's gradient
follows in closed form (`softrepa_gradient`), and in the second pass each call is differentiated by itself. For this the
denoiser has to give the same errors twice: no dropout, and noise that is drawn before.

The gradient is taken at once, and comes back attached to the loss: to an optimiser, to accumulated batches, to DDP and to
a gradient scaler it is a loss as any other, whose backward pass costs nothing. Only first derivatives can be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_number, working_dtype
from zoo.losses.softrepa import softrepa_gradient, softrepa_loss

__all__ = ["Contrast", "PairErrors", "Pairs", "contrast"]

PairErrors = Callable[[Tensor, Tensor], Tensor]
Pairs = Literal["full", "rows", "two_pass"]
_PAIRS = ("full", "rows", "two_pass")

# Relative difference between the errors of both passes above which they are not the same computation. Rounding changes a
# mean of squares by far less, in half precision too; dropout or new noise by more, in at least one pair. Errors that are
# nothing beside any temperature may differ as they like.
_REPEATED, _NOTHING = 0.02, 1e-5


class Contrast(NamedTuple):
    """The loss of a matrix of pairs.

    Attributes:
        loss: a scalar in float32, in float64 if the errors are; attached to the parameters unless gradients are off.
        errors: (rows, columns) in the errors' own type, without a graph; NaN for pairs that were not evaluated, because
            they are masked or were not drawn as negatives.
    """

    loss: Tensor
    errors: Tensor


def contrast(
    errors_of: PairErrors,
    *,
    rows: int,
    columns: int,
    parameters: Sequence[Tensor],
    pairs: Pairs = "rows",
    micro_batch: int | None = None,
    negatives: int | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    scale: float = 4.0,
    diagonal_weight: float = 0.0,
    backward_scale: float = 1.0,
) -> Contrast:
    """Evaluate the errors of images under captions, and return their SoftREPA loss with its gradient.

    The value and the gradient are exact in all modes, unless `negatives` are drawn. Without gradients (`torch.no_grad`, or
    no parameter that requires them) the errors are evaluated once, call by call, and nothing is kept.

    Over processes, each has its own images and the captions of all, and `first_row` is its rank times the images of a
    process. The mean over ranks of losses and of gradients, which DDP takes, is then that of a single process, if all have
    the same timestep and noise and as many images; nothing is sent between ranks here.

    Args:
        errors_of: called with image numbers (P,) in 0 … rows - 1 and caption numbers (P,) in 0 … columns - 1, on the device
            of the parameters; returns the P mean squared errors in floating point. Each call has to make its graph anew
            down to `parameters`; what several calls share, as tokens that are made once a step, belongs in `parameters`.
        rows: the images R, at least 1.
        columns: the captions N; the own caption of image i is `first_row` + i.
        parameters: what the gradient is taken with respect to, leaves or not, at least one; all on one device. Those that
            require no gradient are left alone, and those that the errors do not depend on get zeros.
        pairs: `"full"`, `"rows"` or `"two_pass"`, see the module's docstring.
        micro_batch: pairs of one call of `errors_of`, at least 1. None for as many as are kept at a time: all in `full`, an
            image's in `rows` and `two_pass`. In `rows`, a higher number also puts as many whole images into a graph as
            it has room for, and a lower one bounds the call but not the graph, which has to hold an image's pairs.
        negatives: captions that each image is compared with besides its own, drawn anew each time from those that are not
            masked; all of them where there are no more. None for all. Fewer make another loss: not exact, and lower.
        generator: where negatives are drawn from; None for PyTorch's own on the CPU.
        first_row: the column of image 0's own caption.
        mask: (rows, columns) booleans, True where a caption is no negative of an image; such pairs are not evaluated.
        temperature: as for `softrepa_loss`, a constant.
        scale: as for `softrepa_loss`.
        diagonal_weight: as for `softrepa_loss`.
        backward_scale: factor of the loss while it is differentiated, positive, taken out of the gradient afterwards. With
            float16 in the denoiser, whose gradients a gradient scaler does not reach any more, the scaler's factor keeps
            them from vanishing; what overflows is infinite in the gradient, where the scaler finds it.

    Returns:
        The loss and the errors, see `Contrast`.

    Raises:
        InputError: a number is out of range, `parameters` is empty, a mask or temperature does not fit, there is no such
            mode, `errors_of` returns something other than one floating-point error for each pair, its errors depend on
            no parameter, or `two_pass` finds that the errors were others the second time.

    Example:
        One parameter that adds to all errors but the images' own:

        >>> gap = torch.tensor(0.1, requires_grad=True)
        >>> found = contrast(lambda image, text: (image != text) * gap, rows=2, columns=2, parameters=[gap])
        >>> found.errors
        tensor([[0.0000, 0.1000],
                [0.1000, 0.0000]])
        >>> found.loss.backward()
        >>> bool(gap.grad < 0)
        True
    """
    _check(
        rows,
        columns,
        first_row=first_row,
        parameters=parameters,
        pairs=pairs,
        micro_batch=micro_batch,
        negatives=negatives,
    )
    require_number("backward_scale", backward_scale, positive=True)
    device = parameters[0].device
    evaluated = _evaluated(rows, columns, first_row=first_row, mask=mask, negatives=negatives, generator=generator)
    most = int(evaluated.sum(1).max())
    image, text = evaluated.nonzero(as_tuple=True)
    grid = _Grid(
        errors_of=errors_of,
        image=image.to(device),
        text=text.to(device),
        ends=[0, *evaluated.sum(1).cumsum(0).tolist()],
        unused=~evaluated.to(device),
        call=micro_batch or (rows * columns if pairs == "full" else most),
        first_row=first_row,
        temperature=_spread(temperature, rows, columns),
        options={"scale": scale, "diagonal_weight": diagonal_weight},
    )
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        with torch.no_grad():
            matrix = grid.matrix(0, rows)
            return Contrast(softrepa_loss(matrix, **grid.loss_options(0, rows)), grid.marked(matrix))
    gradient = _Gradient(trained, backward_scale)
    if pairs == "two_pass":
        loss, matrix = _two_pass(grid, gradient)
    else:
        block = rows if pairs == "full" else max(1, (micro_batch or most) // most)
        loss, matrix = _by_rows(grid, gradient, block)
    return Contrast(_Attached.apply(loss, gradient.totals(), *trained), grid.marked(matrix))


@dataclass(frozen=True)
class _Grid:
    """The pairs that count, how they are evaluated, and what the loss makes of them."""

    errors_of: PairErrors
    image: Tensor  # (P,), the pairs' images, in order
    text: Tensor  # (P,), their captions
    ends: list[int]  # row i has the pairs ends[i] … ends[i + 1] - 1; on the host, so that a GPU is not waited for
    unused: Tensor  # (R, N), True for all other pairs
    call: int  # pairs of a call, at most
    first_row: int
    temperature: float | Tensor  # a tensor is (R, N)
    options: dict[str, float]

    def calls(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers of images and captions of the rows' pairs, call by call."""
        own = slice(self.ends[start], self.ends[stop])
        image, text = (torch.split(numbers[own], self.call) for numbers in (self.image, self.text))
        return zip(image, text, strict=True)

    def errors(self, image: Tensor, text: Tensor) -> Tensor:
        """One call, of which the result is checked."""
        found = self.errors_of(image, text)
        if found.shape != image.shape or not found.is_floating_point():
            raise InputError(
                f"errors_of must return one floating-point error for each pair, shape {tuple(image.shape)}, got shape "
                f"{tuple(found.shape)} of {found.dtype}"
            )
        return found

    def matrix(self, start: int, stop: int) -> Tensor:
        """The errors of some rows, differentiable where gradients are on; 0 where not evaluated."""
        found = torch.cat([self.errors(image, text) for image, text in self.calls(start, stop)])
        own = slice(self.ends[start], self.ends[stop])
        places = (self.image[own] - start, self.text[own])
        return found.new_zeros(stop - start, self.unused.shape[1]).index_put(places, found)

    def marked(self, matrix: Tensor) -> Tensor:
        return matrix.masked_fill(self.unused, torch.nan)

    def loss_options(self, start: int, stop: int) -> dict[str, Any]:
        """What the loss of some rows takes besides their errors."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[start:stop]
        own = {"temperature": temperature, "mask": self.unused[start:stop], "first_row": self.first_row + start}
        return {**self.options, **own}


class _Gradient:
    """The gradient with respect to the parameters, added up over parts of the loss."""

    def __init__(self, parameters: list[Tensor], backward_scale: float) -> None:
        self.parameters, self.scale = parameters, backward_scale
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, part: Tensor) -> None:
        """Differentiate a part of the loss, which frees its graph."""
        if not part.requires_grad:
            return
        found = torch.autograd.grad(part * self.scale, self.parameters, allow_unused=True)
        for index, one in enumerate(found):
            if one is not None:
                before = self.sums[index]
                # Of single precision at least. The sum is a copy; what autograd returns may be a view of something large.
                self.sums[index] = (0 if before is None else before) + one.to(working_dtype(one))

    def totals(self) -> list[Tensor]:
        """The sums without the factor; zeros for a parameter that had no part in it."""
        if all(one is None for one in self.sums):
            raise InputError(
                "errors_of must depend on one of parameters, and its errors do not; see that the soft tokens are attached "
                "to the denoiser, and that nothing on the way is detached or under torch.no_grad()"
            )
        totals = []
        for parameter, one in zip(self.parameters, self.sums, strict=True):
            totals.append(torch.zeros_like(parameter) if one is None else (one / self.scale).to(parameter.dtype))
        return totals


class _Attached(torch.autograd.Function):
    """A value whose gradient is known: p G - (p G).detach() without its rounding, and finite where G is not."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(outer[0].to(one.dtype) * one for one in ctx.saved_tensors)


def _by_rows(grid: _Grid, gradient: _Gradient, block: int) -> tuple[Tensor, Tensor]:
    rows = len(grid.unused)

    def part(start: int) -> tuple[Tensor, Tensor]:
        """Value and errors of some rows. A function, so that nothing of their graph outlives them."""
        stop = min(start + block, rows)
        matrix = grid.matrix(start, stop)
        value = softrepa_loss(matrix, **grid.loss_options(start, stop), reduction="none").sum() / rows
        gradient.add(value)
        return value.detach(), matrix.detach()

    values, matrices = zip(*map(part, range(0, rows, block)), strict=True)
    return torch.stack(values).sum(), torch.cat(matrices)


def _two_pass(grid: _Grid, gradient: _Gradient) -> tuple[Tensor, Tensor]:
    rows = len(grid.unused)
    with torch.no_grad():
        matrix = grid.matrix(0, rows)
        options = grid.loss_options(0, rows)
        loss, weights = softrepa_loss(matrix, **options), softrepa_gradient(matrix, **options)
    # Under autocast, copies of parameters that were made without a graph would be used again in the second pass.
    torch.clear_autocast_cache()

    def part(image: Tensor, text: Tensor) -> Tensor:
        """Differentiate one call; how far its errors are from those of the first pass, relatively."""
        found, before = grid.errors(image, text), matrix[image, text]
        gradient.add((found.to(weights.dtype) * weights[image, text]).sum())
        return torch.isclose(found.detach(), before, rtol=_REPEATED, atol=_NOTHING, equal_nan=True).all()

    if not torch.stack([part(image, text) for image, text in grid.calls(0, rows)]).all():
        raise InputError(
            "pairs='two_pass' needs errors_of to return the same errors twice, and it did not; put the denoiser into eval() "
            "mode and draw timesteps and noise before, or use pairs='rows'"
        )
    return loss, matrix


def _spread(temperature: float | Tensor, rows: int, columns: int) -> float | Tensor:
    """A temperature of each pair, if it is a tensor: rows can then be taken of it."""
    if not isinstance(temperature, Tensor):
        return temperature
    try:
        return temperature.detach().expand(rows, columns)
    except RuntimeError as error:
        raise InputError(
            f"temperature must broadcast to a row for each image and a column for each caption, {(rows, columns)}, got "
            f"{tuple(temperature.shape)}; a temperature for each image has the shape ({rows}, 1)"
        ) from error


def _evaluated(
    rows: int,
    columns: int,
    *,
    first_row: int,
    mask: Tensor | None,
    negatives: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Which pairs count, on the CPU or where the mask is: each image's own caption and its negatives."""
    own = torch.zeros(rows, columns, dtype=torch.bool).diagonal_scatter(torch.ones(rows, dtype=torch.bool), first_row)
    others = ~own
    if mask is not None:
        if mask.shape != (rows, columns) or mask.dtype != torch.bool:
            raise InputError(
                f"mask must be boolean with a row for each image and a column for each caption, shape {(rows, columns)}, "
                f"got shape {tuple(mask.shape)} of {mask.dtype}"
            )
        others &= ~mask.cpu()
    if negatives is not None and negatives < columns - 1:
        device = torch.device("cpu") if generator is None else generator.device
        order = torch.rand(rows, columns, generator=generator, device=device).cpu()
        chosen = order.masked_fill(~others, -1).topk(negatives, dim=1).indices
        others &= torch.zeros_like(others).scatter(1, chosen, value=True)
    return own | others


def _check(
    rows: int,
    columns: int,
    *,
    first_row: int,
    parameters: Sequence[Tensor],
    pairs: str,
    micro_batch: int | None,
    negatives: int | None,
) -> None:
    if rows < 1:
        raise InputError(f"rows must be at least 1, the images of the batch, got {rows}")
    if not 0 <= first_row <= columns - rows:
        raise InputError(
            f"columns must hold the own caption of each image, from first_row on; got {rows} images, {columns} captions and "
            f"first_row={first_row}"
        )
    if not parameters:
        raise InputError("parameters must not be empty: they are what the gradient is taken with respect to")
    require_choice("pairs", pairs, _PAIRS)
    for name, value in (("micro_batch", micro_batch), ("negatives", negatives)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, or None, got {value}")
