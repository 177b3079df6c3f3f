"""Means of values under weights that grow with the cosine of two samples, without the matrix of weights.

For unit vectors r_i, the weight of candidate j for anchor i is w_ij = k(<r_i, r_j>), and what a loss needs of it is

    t_i = sum_j w_ij v_j / sum_j w_ij

- `affine`, k(c) = (1 + c) / 2: with r' = (r, 1), w_ij = <r'_i, r'_j> / 2, so t = r' (r'^T v) / (r' sum_j r'_j), exact
  and linear in the batch;
- `power`, ((1 + c) / 2)**exponent; `exp`, exp((c - 1) / temperature); `topk`, the affine weight of the `neighbours`
  candidates with the highest cosine, 0 for others: in tiles, as the scores in `zoo.losses.pairwise`.

Weights are divided by the weight of the anchor for itself, which changes no mean: the sum is then at least 1 and no
exponent or temperature makes it vanish. A cosine that rounding has lifted above 1 counts as 1. Equal cosines are equally
near: `topk` keeps all candidates that tie with the last one, beyond `neighbours` of them, so that the result does not
depend on the order of the batch. A vector of zeros has the cosine 0 with every vector, itself included: all candidates
weigh the same for it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_number
from zoo.losses.ranks import gather_rows, rank_and_size, sum_over_ranks
from zoo.losses.tiles import Workspace, tiles

__all__ = ["Kernel", "KernelName", "weighted_means", "weights_entropy"]

KernelName = Literal["affine", "power", "exp", "topk"]
_KERNELS = ("affine", "power", "exp", "topk")

_ROUNDING = 32  # in units of the last place of 1: how far apart the cosines of equal pairs may come out


class Kernel(NamedTuple):
    """A weight as a function of the cosine: its name, and the one number that it may have."""

    name: KernelName
    parameter: float

    @classmethod
    def checked(cls, name: KernelName, *, exponent: float, kernel_temperature: float, neighbours: int) -> Kernel:
        """Choose the number that belongs to a kernel, and refuse what is out of range.

        Args:
            name: the kernel.
            exponent: of `power`, above 0.
            kernel_temperature: of `exp`, above 0.
            neighbours: of `topk`, at least 1.

        Returns:
            The kernel.

        Raises:
            InputError: an unknown name, or the kernel's own number is out of range.

        Example:
            >>> Kernel.checked("affine", exponent=2.0, kernel_temperature=0.1, neighbours=8)
            Kernel(name='power', parameter=1.0)
        """
        require_choice("kernel", name, _KERNELS)
        if name == "affine":
            return cls("power", 1.0)
        if name == "power":
            require_number("exponent", exponent, positive=True)
            return cls(name, exponent)
        if name == "exp":
            require_number("kernel_temperature", kernel_temperature, positive=True)
            return cls(name, kernel_temperature)
        if neighbours < 1:
            raise InputError(
                f"neighbours must be at least 1 (each sample is its own first neighbour), got {neighbours}"
            )
        return cls(name, float(neighbours))


def weighted_means(
    features: Tensor, values: Tensor, kernel: Kernel, *, tile: tuple[int, int], gather: bool = False
) -> Tensor:
    """Mean of `values` for each anchor, weighted by the kernel of the features' cosines.

    The gradient flows to `values` alone.

    Args:
        features: (n, r), rows of unit length or zeros, in the working precision.
        values: (n, d), of the same samples and type.
        kernel: from `Kernel.checked`.
        tile: rows and columns of a tile.
        gather: whether the candidates are the samples of all processes, whose batches must be equally large.

    Returns:
        (n, d).

    Example:
        Opposite features weigh nothing:

        >>> kernel = Kernel.checked("affine", exponent=2.0, kernel_temperature=0.1, neighbours=8)
        >>> weighted_means(torch.tensor([[1.0], [-1.0]]), torch.eye(2), kernel, tile=(8, 8))
        tensor([[1., 0.],
                [0., 1.]])
    """
    _, size = rank_and_size(gather=gather)
    features = features.detach()
    if kernel.name == "power" and kernel.parameter == 1:  # compared part by part, which every version of Dynamo can
        extended = torch.cat((features, features.new_ones(len(features), 1)), dim=1)
        products, sums = extended.t() @ values, extended.sum(0)
        if size > 1:
            products, sums = sum_over_ranks(products), sum_over_ranks(sums)
        return (extended @ products) / (extended @ sums).unsqueeze(1)
    candidates = features
    if size > 1:
        candidates, values = gather_rows(features), gather_rows(values)
    means: Tensor = _means(
        features,
        candidates,
        values,
        rule=kernel.name,
        parameter=kernel.parameter,
        row_tile=tile[0],
        column_tile=tile[1],
    )[0]
    return means


def weights_entropy(features: Tensor, kernel: Kernel, *, tile: tuple[int, int], gather: bool = False) -> Tensor:
    """Entropy of each anchor's weights, divided by their sum, over the candidates; a constant without gradient.

    Args:
        features: (n, r), rows of unit length or zeros, in the working precision.
        kernel: from `Kernel.checked`.
        tile: rows and columns of a tile.
        gather: whether the candidates are the samples of all processes, whose batches must be equally large.

    Returns:
        (n,), in nats, from 0 to the logarithm of the number of candidates.

    Example:
        >>> kernel = Kernel.checked("affine", exponent=2.0, kernel_temperature=0.1, neighbours=8)
        >>> weights_entropy(torch.ones(3, 1), kernel, tile=(8, 8)).exp().round()
        tensor([3., 3., 3.])
    """
    _, size = rank_and_size(gather=gather)
    features = features.detach()
    candidates = gather_rows(features) if size > 1 else features
    entropy: Tensor = _entropy(
        features, candidates, rule=kernel.name, parameter=kernel.parameter, row_tile=tile[0], column_tile=tile[1]
    )
    return entropy


def _weigh(cosines: Tensor, own: Tensor, threshold: Tensor, kernel: str, parameter: float) -> Tensor:
    """Turn a tile of cosines into weights in place, relative to those of the anchors for themselves (B, 1)."""
    # What differs from the anchor itself by rounding alone weighs as much, whatever it is divided or raised by.
    rounding = _ROUNDING * torch.finfo(cosines.dtype).eps
    if kernel == "exp":
        cosines.sub_(own)
        return cosines.masked_fill_(cosines > -rounding, 0).div_(parameter).exp_()
    kept = cosines >= threshold if kernel == "topk" else None
    cosines.add_(1).clamp_min_(0).div_(1 + own).clamp_max_(1)
    if kept is not None:
        return cosines.mul_(kept)
    return cosines if parameter == 1 else cosines.masked_fill_(cosines > 1 - rounding, 1).pow_(parameter)


def _anchors(
    anchors: Tensor, candidates: Tensor, work: Workspace, blocks: list[slice], kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """The cosine of each anchor with itself (1, or 0 for zeros) and the lowest that counts as near."""
    own = (anchors * anchors).sum(1, keepdim=True)
    if kernel.name != "topk":
        return own, own
    count = min(int(kernel.parameter), candidates.shape[0])
    best = anchors.new_full((anchors.shape[0], count), -torch.inf)
    for block in blocks:
        tile, _ = work.scores(anchors, candidates[block])
        # NaN counts as the highest in topk, and stays visible as a threshold that nothing reaches.
        best = torch.cat((best, tile), dim=1).topk(count, dim=1).values
    return own, best[:, -1:] - _ROUNDING * torch.finfo(best.dtype).eps


@torch.library.custom_op(
    "zoo::kernel_means",
    mutates_args=(),
    schema="(Tensor anchors, Tensor candidates, Tensor values, *, str rule, float parameter, int row_tile, "
    "int column_tile) -> (Tensor, Tensor)",
)
def _means(
    anchors: Tensor,
    candidates: Tensor,
    values: Tensor,
    *,
    rule: KernelName,
    parameter: float,
    row_tile: int,
    column_tile: int,
) -> tuple[Tensor, Tensor]:
    """Weighted means of the values (n, d), and the sums of the weights (n, 1)."""
    with torch.autocast(anchors.device.type, enabled=False):
        work = Workspace(anchors, candidates, row_tile=row_tile, column_tile=column_tile)
        means = values.new_zeros(anchors.shape[0], values.shape[1])
        totals = values.new_zeros(anchors.shape[0], 1)
        for rows, blocks in tiles(len(anchors), len(candidates), row_tile=row_tile, column_tile=column_tile):
            own, threshold = _anchors(anchors[rows], candidates, work, blocks, Kernel(rule, parameter))
            for block in blocks:
                tile, _ = work.scores(anchors[rows], candidates[block])
                _weigh(tile, own, threshold, rule, parameter)
                totals[rows] += tile.sum(1, keepdim=True)
                work.add_product(means[rows], tile, values[block])
        return means.div_(totals), totals


@_means.register_fake
def _(anchors: Tensor, _: Tensor, values: Tensor, **__: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(anchors.shape[0], values.shape[1]), values.new_empty(anchors.shape[0], 1)


@torch.library.custom_op(
    "zoo::kernel_means_backward",
    mutates_args=(),
    schema="(Tensor anchors, Tensor candidates, Tensor gradient, *, str rule, float parameter, int row_tile, "
    "int column_tile) -> Tensor",
)
def _means_backward(
    anchors: Tensor,
    candidates: Tensor,
    gradient: Tensor,
    *,
    rule: KernelName,
    parameter: float,
    row_tile: int,
    column_tile: int,
) -> Tensor:
    """Transposed weights times a gradient that has been divided by the sums of the weights."""
    with torch.autocast(anchors.device.type, enabled=False):
        work = Workspace(anchors, candidates, row_tile=row_tile, column_tile=column_tile)
        result = gradient.new_zeros(candidates.shape[0], gradient.shape[1])
        for rows, blocks in tiles(len(anchors), len(candidates), row_tile=row_tile, column_tile=column_tile):
            own, threshold = _anchors(anchors[rows], candidates, work, blocks, Kernel(rule, parameter))
            for block in blocks:
                tile, _ = work.scores(anchors[rows], candidates[block])
                _weigh(tile, own, threshold, rule, parameter)
                work.add_product(result[block], tile.t(), gradient[rows])
        return result


@_means_backward.register_fake
def _(_: Tensor, candidates: Tensor, gradient: Tensor, **__: Any) -> Tensor:
    return gradient.new_empty(candidates.shape[0], gradient.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.options = keyword_only_inputs


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
    anchors, candidates, totals = ctx.saved_tensors
    share = gradients[0] / totals
    if torch.is_grad_enabled():  # create_graph=True: linear in the gradient, with the weights as a matrix
        eye = torch.eye(len(candidates), dtype=share.dtype, device=share.device)
        weights = _means(anchors, candidates, eye, **ctx.options)[0] * totals
        return None, None, weights.t() @ share
    return None, None, _means_backward(anchors, candidates, share, **ctx.options)


_means.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op(
    "zoo::kernel_entropy",
    mutates_args=(),
    schema="(Tensor anchors, Tensor candidates, *, str rule, float parameter, int row_tile, int column_tile) -> Tensor",
)
def _entropy(
    anchors: Tensor, candidates: Tensor, *, rule: KernelName, parameter: float, row_tile: int, column_tile: int
) -> Tensor:
    """Entropies (n,): the logarithm of the sum of the weights, less their mean logarithm under themselves."""
    with torch.autocast(anchors.device.type, enabled=False):
        work = Workspace(anchors, candidates, row_tile=row_tile, column_tile=column_tile)
        totals = anchors.new_zeros(anchors.shape[0])
        products = torch.zeros_like(totals)
        for rows, blocks in tiles(len(anchors), len(candidates), row_tile=row_tile, column_tile=column_tile):
            own, threshold = _anchors(anchors[rows], candidates, work, blocks, Kernel(rule, parameter))
            for block in blocks:
                tile, scratch = work.scores(anchors[rows], candidates[block])
                _weigh(tile, own, threshold, rule, parameter)
                totals[rows] += tile.sum(1)
                torch.xlogy(tile, tile, out=scratch)
                products[rows] += scratch.sum(1)
        return totals.log() - products / totals


@_entropy.register_fake
def _(anchors: Tensor, _: Tensor, **__: Any) -> Tensor:
    return anchors.new_empty(anchors.shape[0])
