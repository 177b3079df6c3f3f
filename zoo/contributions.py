"""Spatial contributions to the weight gradient of a layer that is not there, in closed form.

Rebuffi, Fong, Ji, Vedaldi: "There and Back Again: Revisiting Backpropagation Saliency Methods" (CVPR 2020; arXiv
2004.02866), NormGrad. Put a layer that changes nothing behind a layer of the network: the identity. The gradient of its
weights is a sum over places; one summand C_u is what place u contributes. *Extract* chooses the layer and with it C_u,
*aggregate* makes one number of C_u. With the activation x_u and the gradient of the score g_u at place u, both of K
channels, and X_u the zero-padded N x N patch around x_u:

    extract      identity layer                                   C_u                       entries
    bias         b = 0                                            g_u                       K
    scaling      s = 1                                            x_u * g_u                 K
    conv1x1      W = identity matrix                              g_u x_u^T                 K^2
    convNxN      W = identity matrix in the centre                g_u X_u^T                 N^2 K^2
    depthwise    1 in the centre of one filter a channel          g_ku X_ku for each k      N^2 K
    conv         none: a convolution of the network               g_u (X_u of its input)^T  K_out K_in N^2 / groups

C_u is never made: behind one convolution it has rank one within each group of channels, so norms, sums, maxima and the
norm of the positive part are products of the same reductions of x and g. Per image that costs as much memory as a map,
where the outer products of a stage of ResNet-50 at 224 pixels are 784 MiB (1x1) and 7 GiB (3x3).

Read: the opening of the paper and the authors' two released codes, as the project's notes describe them
(srebuffi/revisiting_saliency, and TorchRay's branch ``normgrad``); not read: the rest of the paper, so its equation numbers
are not given. The closed forms, groups included, are derived here. Deliberate differences from the releases:

- one release builds C_u, for one image at a time; ours are products of reductions, for a batch;
- the other multiplies norms and over-estimates a grouped convolution; ours takes groups apart;
- everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import working_dtype

__all__ = ["Aggregate", "Extract", "contribution_map"]

Extract = Literal["bias", "scaling", "conv1x1", "convNxN", "depthwise", "conv"]
Aggregate = Literal["norm", "selective", "sum", "max", "absmax", "positive"]
_Reduce = Callable[[Tensor, int], Tensor]
# Numbers in one piece of a batch: 4 MiB.
_PIECE = 2**20


class _Window(NamedTuple):
    """The patches of a convolution, each value a pair (rows, columns)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return how many patches there are in rows and columns."""
        first, second = (
            (side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, pad, dilation in zip((height, width), *self, strict=True)
        )
        return first, second

    def reduce(self, values: Tensor, reduce: _Reduce) -> Tensor:
        """Reduce each patch of (B, G, H, W), zeros outside included, to one number: rows first, then columns."""
        if self == _Window():
            return values
        values = F.pad(values, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        for dim, kernel, stride, dilation in zip((2, 3), self.kernel, self.stride, self.dilation, strict=True):
            patches = values.unfold(dim, dilation * (kernel - 1) + 1, stride)
            values = reduce(patches[..., ::dilation], -1)
        return values


def contribution_map(
    activation: Tensor,
    gradient: Tensor,
    *,
    extract: Extract = "conv1x1",
    aggregate: Aggregate = "norm",
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | None = None,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """How much each place contributes to the weight gradient of the identity layer; see the module's docstring.

    NormGrad is ``conv1x1`` with ``norm``: |x_u| |g_u|. Selective NormGrad is ``scaling`` with ``selective``. The value of an
    image does not depend on the rest of the batch. Computed in float32 (float64 stays float64) without autocast, and
    differentiable in both arguments. Norms are made of squares: in float32, lengths of activations, gradients and
    contributions above 1e19 become infinite, below 1e-19 they lose digits and vanish. NaN and infinity stay visible.

    Args:
        activation: x, (B, K, H, W), what leaves the layer. For ``extract="conv"`` what enters the convolution,
            (B, K_in, H_in, W_in).
        gradient: g, the gradient of each image's score with respect to the activation, of the same shape. For
            ``extract="conv"`` that with respect to what leaves the convolution, (B, K_out, H_out, W_out).
        extract: the identity layer, one of the table.
        aggregate: ``"norm"`` (L2), ``"selective"`` (L2 of the positive part; F+N in the paper), ``"sum"``, ``"max"``,
            ``"absmax"`` (of absolute values), or ``"positive"`` (sum of the positive part), over the entries of C_u.
        kernel_size: N of ``convNxN`` and ``depthwise``, odd; the kernel of ``conv``. The others have none.
        stride: of ``conv`` alone.
        padding: zeros on each side, of ``conv`` alone; half of the dilated kernel if omitted.
        dilation: of ``conv`` alone.
        groups: of ``conv`` alone; ``depthwise`` has one a channel.

    Returns:
        (B, 1, H, W), in units of the score. ``"norm"``, ``"selective"``, ``"absmax"`` and ``"positive"`` are at least 0.

    Raises:
        InputError: an unknown name, arguments that are no maps of floating-point numbers, shapes or devices that do not
            fit each other, or a kernel, stride, padding, dilation or groups that do not fit the shapes or the extract.

    Example:
        >>> x, g = torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 0.0])
        >>> contribution_map(x.view(1, 2, 1, 1), g.view(1, 2, 1, 1))
        tensor([[[[5.]]]])
        >>> contribution_map(x.view(1, 2, 1, 1), g.view(1, 2, 1, 1), extract="scaling", aggregate="selective")
        tensor([[[[0.]]]])
    """
    require_choice("extract", extract, get_args(Extract))
    require_choice("aggregate", aggregate, get_args(Aggregate))
    _check_maps(activation, gradient, same_shape=extract != "conv")
    if extract != "conv" and (padding is not None or groups != 1 or {_pair(stride), _pair(dilation)} != {(1, 1)}):
        raise InputError(f"stride, padding, dilation and groups belong to extract='conv', got extract={extract!r}")
    with torch.autocast(activation.device.type, enabled=False):
        window: _Window | None = None
        if extract not in ("bias", "scaling"):
            window = _Window() if extract == "conv1x1" else _window(extract, kernel_size, stride, padding, dilation)
            groups = activation.shape[1] if extract == "depthwise" else groups
            _check_convolution(activation, gradient, window, groups)
        dtype = working_dtype(activation)
        size = _piece(activation)
        maps = []
        for piece, slopes in zip(torch.split(activation, size), torch.split(gradient, size), strict=True):
            x, g = piece.to(dtype), slopes.to(dtype)
            if window is None:
                maps.append(_of_entries(g if extract == "bias" else x * g, aggregate))
            else:
                maps.append(_of_outer_products(_grouped(x, groups), _grouped(g, groups), aggregate, window))
        return torch.cat(maps).unsqueeze(1)


def _piece(values: Tensor) -> int:
    """Return how many images to take at a time: on a CPU, temporaries that stay in its cache; on a GPU, all."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or values.numel() == 0:
        return max(len(values), 1)
    return max(_PIECE * len(values) // values.numel(), 1)


def _norm(values: Tensor, dim: int) -> Tensor:
    # torch.linalg.vector_norm takes 8 times as long over the channels of maps, on a CPU. The gradient at 0 is 0, where that
    # of sqrt is infinite.
    squares = values.square().sum(dim)
    return torch.where(squares == 0, 1, squares).sqrt() * (squares != 0)


def _sum(values: Tensor, dim: int) -> Tensor:
    return values.sum(dim)


def _of_entries(entries: Tensor, aggregate: Aggregate) -> Tensor:
    """Aggregate contributions (B, entries, H, W) that are there."""
    if aggregate == "norm":
        return _norm(entries, 1)
    if aggregate == "selective":
        return _norm(entries.clamp_min(0), 1)
    if aggregate == "sum":
        return _sum(entries, 1)
    if aggregate == "positive":
        return _sum(entries.clamp_min(0), 1)
    return entries.amax(1) if aggregate == "max" else entries.abs().amax(1)


def _grouped(values: Tensor, groups: int) -> Tensor:
    return values.reshape(len(values), groups, values.shape[1] // groups, *values.shape[2:])


def _of_outer_products(x: Tensor, g: Tensor, aggregate: Aggregate, window: _Window) -> Tensor:
    """Aggregate the outer products of g and the patches of x, both (B, groups, channels, H, W), without making them."""
    if aggregate == "norm":
        norms = _product(x, g, _norm, window)
        return norms.squeeze(1) if norms.shape[1] == 1 else _norm(norms, 1)
    if aggregate == "sum":
        return _sum(_product(x, g, _sum, window), 1)
    if aggregate == "absmax":
        return _product(x.abs(), g.abs(), torch.amax, window).amax(1)
    if aggregate == "max":
        # The largest product of two numbers from two ranges lies at the ends of the ranges.
        ends = [window.reduce(reduce(x, 2), reduce) for reduce in (torch.amax, torch.amin)]
        return torch.cat([end * reduce(g, 2) for end in ends for reduce in (torch.amax, torch.amin)], 1).amax(1)
    reduce = _norm if aggregate == "selective" else _sum
    # A product is positive where both factors are, or neither is.
    same = [_product((sign * x).clamp_min(0), (sign * g).clamp_min(0), reduce, window) for sign in (1, -1)]
    return reduce(torch.cat(same, 1), 1)


def _product(x: Tensor, g: Tensor, reduce: _Reduce, window: _Window) -> Tensor:
    """Reduce all products of an entry of the patch and an entry of g, (B, groups, H, W): the product of the reductions."""
    return window.reduce(reduce(x, 2), reduce) * reduce(g, 2)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _window(
    extract: Extract,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | None,
    dilation: int | tuple[int, int],
) -> _Window:
    kernel, steps, apart = _pair(kernel_size), _pair(stride), _pair(dilation)
    for name, value in (("kernel_size", kernel), ("stride", steps), ("dilation", apart)):
        if min(value) < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if extract != "conv" and not all(size % 2 for size in kernel):
        raise InputError(f"kernel_size must be odd for extract={extract!r}: the identity has a centre, got {kernel}")
    half = (apart[0] * (kernel[0] - 1) // 2, apart[1] * (kernel[1] - 1) // 2)
    pads = half if padding is None else _pair(padding)
    if min(pads) < 0:
        raise InputError(f"padding must not be negative, got {pads}")
    return _Window(kernel, steps, pads, apart)


def _check_maps(activation: Tensor, gradient: Tensor, *, same_shape: bool) -> None:
    for name, value in (("activation", activation), ("gradient", gradient)):
        if value.ndim != 4 or not value.is_floating_point():
            raise InputError(
                f"{name} must be a map (B, K, H, W) in floating point, got {_told(value)}; zoo.stages.as_map makes maps "
                "of tokens"
            )
    fits = activation.shape == gradient.shape if same_shape else len(activation) == len(gradient)
    if not fits or activation.device != gradient.device:
        rule = "the shape" if same_shape else "the batch size"
        raise InputError(
            f"gradient must have {rule} of activation and its device, got {tuple(gradient.shape)} on {gradient.device} and "
            f"{tuple(activation.shape)} on {activation.device}"
        )


def _check_convolution(x: Tensor, g: Tensor, window: _Window, groups: int) -> None:
    if groups < 1 or x.shape[1] % groups or g.shape[1] % groups:
        raise InputError(f"groups must divide the channels, {x.shape[1]} and {g.shape[1]}, got {groups}")
    expected = window.size(x.shape[2], x.shape[3])
    if g.shape[2:] != expected:
        raise InputError(
            f"gradient must have the {expected[0]} x {expected[1]} places that the convolution leaves of "
            f"{x.shape[2]} x {x.shape[3]}, got {g.shape[2]} x {g.shape[3]}; give its kernel_size, stride, padding, dilation"
        )


def _told(value: Tensor) -> str:
    return f"shape {tuple(value.shape)} of {value.dtype}"
