"""Maps of several layers as one, and every map in [0, 1].

The second half of NormGrad (arXiv 2004.02866; `zoo.contributions` is the first). Read: the authors' released codes, as the
project's notes describe them. Deliberate differences from them:

- a constant map becomes zeros; the release divides 0 by 0;
- a layer whose map is constant is left out for that image; the release gets NaN or an empty product;
- the range of a map is that of its own image; one release takes the whole batch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_number, working_dtype

__all__ = ["Combine", "combine_maps", "normalize_map", "resize_map"]

Combine = Literal["geomean", "product", "sum"]
# Bilinear resizing leaves so many rounding errors on a constant map; stretched to [0, 1] they would look like a map.
_ROUNDING = 16


def normalize_map(saliency_map: Tensor) -> Tensor:
    """Stretch the map of each image to [0, 1].

    A constant map, up to 16 rounding errors of its type, becomes zeros. NaN anywhere makes a map NaN, and so does minus
    infinity; infinity makes it NaN where it is infinite and 0 elsewhere.

    Args:
        saliency_map: (B, 1, H, W).

    Returns:
        (B, 1, H, W) without a unit, in float32 (float64 for float64).

    Raises:
        InputError: no map of one channel in floating point.

    Example:
        >>> normalize_map(torch.tensor([[[[2.0, 3.0, 6.0]]], [[[5.0, 5.0, 5.0]]]])).flatten(1)
        tensor([[0.0000, 0.2500, 1.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    _check_map("saliency_map", saliency_map)
    values = saliency_map.to(working_dtype(saliency_map))
    low = values.amin((1, 2, 3), keepdim=True)
    # A constant map becomes zeros exactly, without its rounding errors.
    values = torch.where(_is_constant(values), torch.zeros_like(values), values - low)
    highest = values.amax((1, 2, 3), keepdim=True)
    return values / torch.where(highest == 0, 1, highest)


def combine_maps(
    maps: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    mode: Combine = "geomean",
    *,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Make one map of the maps of several layers: resize (bilinear), stretch each to [0, 1], combine.

    Where the map of one layer is constant it says nothing about the image, and would make a product 0: that layer is left
    out for that image. An image with nothing but constant maps gets zeros.

    Args:
        maps: one map (B, 1, H_l, W_l) a layer.
        weights: one weight w_l a layer, at least 0, not all 0; equal if omitted. A layer of weight 0 is left out.
        mode: ``"geomean"`` (prod m_l^w_l) or ``"sum"`` (sum w_l m_l), both with weights that are divided by their sum, as
            TorchRay's branch has them; ``"product"`` (prod m_l^w_l with the weights as they are, 1 if omitted), as the
            released scripts have it. For equal weights, geomean and product rank places alike.
        size: rows and columns of the result; those of the largest map if omitted.

    Returns:
        (B, 1, H, W) in [0, 1] without a unit; with ``mode="sum"`` and ``"geomean"`` the most salient place need not be 1.

    Raises:
        InputError: no maps, maps that do not fit each other, weights that do not fit, or an unknown mode.

    Example:
        >>> first, second = torch.tensor([[[[0.0, 4.0, 4.0]]]]), torch.tensor([[[[0.0, 1.0, 4.0]]]])
        >>> combine_maps([first, second]).flatten()
        tensor([0.0000, 0.5000, 1.0000])
    """
    require_choice("mode", mode, get_args(Combine))
    if not isinstance(maps, Sequence) or not maps:
        raise InputError("maps must be a list of maps (B, 1, H, W), at least one")
    for index, one in enumerate(maps):
        _check_map(f"maps[{index}]", one)
        if len(one) != len(maps[0]) or one.device != maps[0].device:
            raise InputError(f"maps must be of the same images on one device, maps[{index}] is not as maps[0] is")
    given = _check_weights(weights, len(maps))
    if size is None:
        size = (maps[0].shape[2], maps[0].shape[3])
        for one in maps:  # a loop, because torch 2.11 cannot trace max with a key
            if one.shape[2] * one.shape[3] > size[0] * size[1]:
                size = (one.shape[2], one.shape[3])
    stretched = torch.stack([normalize_map(resize_map(one, size)) for one in maps])
    share = stretched.new_tensor(given).view(-1, 1, 1, 1, 1)
    # A constant map is zeros by now, any other has a 1.
    share = share * (stretched != 0).flatten(2).any(2).view(len(maps), -1, 1, 1, 1)
    total = share.sum(0)
    if mode != "product":
        share = share / torch.where(total == 0, 1, total)
    combined = (share * stretched).sum(0) if mode == "sum" else (stretched**share).prod(0)
    return torch.where(total == 0, torch.zeros_like(combined), combined)


def resize_map(saliency_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map, bilinear, corners not aligned, as the releases do.

    Args:
        saliency_map: (B, 1, H_l, W_l).
        size: rows H and columns W of the result.

    Returns:
        (B, 1, H, W), in float32 (float64 for float64).

    Example:
        >>> resize_map(torch.tensor([[[[0.0, 4.0]]]]), (1, 4)).flatten()
        tensor([0., 1., 3., 4.])
    """
    values = saliency_map.to(working_dtype(saliency_map))
    if values.shape[2:] == size:
        return values
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)


def _is_constant(values: Tensor) -> Tensor:
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    bound = _ROUNDING * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    return (high - low <= bound) & torch.isfinite(bound)


def _check_map(name: str, value: Tensor) -> None:
    if value.ndim != 4 or value.shape[1] != 1 or not value.is_floating_point():
        raise InputError(
            f"{name} must be a map (B, 1, H, W) in floating point, got shape {tuple(value.shape)} of {value.dtype}"
        )


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise InputError(f"weights must be one number a map, {count}, got {len(given)}")
    for index, weight in enumerate(given):
        require_number(f"weights[{index}]", weight, positive=False)
    if not any(given):
        raise InputError("weights must not all be 0: nothing would be left")
    return given
