"""The pointing game: whether the most salient place lies on the object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import require_number
from zoo.metrics.embeddings import RowsMetric, require_ids, settings_digest
from zoo.metrics.saliency_ranks import constant_maps, require_maps

__all__ = ["PointingGame", "pointing_hits"]

Average = Literal["macro", "micro", "none"]


def pointing_hits(
    maps: Tensor, objects: Tensor | Sequence[Tensor], *, tolerance: float = 15.0, strict: bool = False
) -> Tensor:
    """Tell for each map whether a pixel of the object lies within a distance of the map's greatest value.

    Of several greatest values the first counts, row by row from the top. A map that is constant, or not finite, points
    nowhere and misses.

    Source: section 1.10 of the project's notes on "There and Back Again" (arXiv 2004.02866), for TorchRay. Difference: a
    constant map points at the first pixel there.

    Args:
        maps: (B, 1, H, W), one a pair of image and class, resized to the image that the objects belong to.
        objects: where the class is. Masks (B, H, W) or (B, 1, H, W) of truth values, one pixel each at least; or boxes x0,
            y0, x1, y1 in pixels, both ends inside: (B, 4), or a list of (n, 4), n at least 1.
        tolerance: the distance in pixels, Euclidean.
        strict: the distance must be smaller than `tolerance`, as in the released code; its documentation has "at most".

    Returns:
        (B,) of truth values.

    Raises:
        InputError: maps and objects that do not fit, a pair without an object, or a tolerance out of range. The contents
            are looked at on every device.

    Example:
        >>> maps = torch.zeros(1, 1, 40, 40)
        >>> maps[0, 0, 10, 5] = 1.0  # row 10, column 5: 15 pixels left of the box
        >>> box = torch.tensor([[20, 0, 39, 39]])
        >>> pointing_hits(maps, box), pointing_hits(maps, box, strict=True)
        (tensor([True]), tensor([False]))
    """
    require_number("tolerance", tolerance, positive=strict)
    require_maps("maps", maps)
    if len(maps) == 0:
        return torch.zeros(0, dtype=torch.bool, device=maps.device)
    place = maps.detach().flatten(1).argmax(1)
    row, column = place // maps.shape[3], place % maps.shape[3]
    if isinstance(objects, Tensor) and objects.dtype == torch.bool:
        squared = _mask_distances(_masks(objects, maps), row, column)
    else:
        squared = _box_distances(_boxes(objects, maps), row, column)
    pointing = ~constant_maps(maps) & maps.detach().isfinite().flatten(1).all(1)
    return pointing & (squared < tolerance**2 if strict else squared <= tolerance**2)


class PointingGame(RowsMetric):
    """Share of maps whose greatest value lies on an object of their class, or within a few pixels: mean over classes.

    See `pointing_hits`. A pair of image and class is one sample; an image with several classes has several maps. Pairs that
    one does not want to count, such as those with "difficult" boxes only, are left out by the caller. Released numbers are
    of maps resized (bilinear) to the original image, and of `strict=True`.

    Kept are two whole numbers a pair. A sampler that pads a shard by repeating samples makes those count twice.

    Source: as for `pointing_hits`; accuracy a class, then the mean over classes.

    Args:
        tolerance: pixels between the greatest value and the object, 15 in the literature.
        strict: fewer pixels than `tolerance`, as in the released code, instead of at most as many.
        average: `"macro"` is the mean over classes that have pairs, `"micro"` weighs pairs alike, `"none"` gives one
            number a class.
        num_classes: length of the result for `"none"`, and a bound for labels; the greatest label + 1 if omitted.

    Raises:
        InputError: an option out of range.

    Example:
        >>> game = PointingGame(tolerance=0)
        >>> maps = torch.eye(3).view(3, 1, 1, 3)  # point at columns 0, 1 and 2
        >>> game.update(maps, torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]), torch.tensor([0, 1, 1]))
        >>> game.compute()
        tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    settings: Tensor

    def __init__(
        self,
        tolerance: float = 15.0,
        *,
        strict: bool = False,
        average: Average = "macro",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        require_number("tolerance", tolerance, positive=strict)
        require_choice("average", average, ("macro", "micro", "none"))
        if num_classes is not None and num_classes < 1:
            raise InputError(f"num_classes must be at least 1, got {num_classes}")
        self.tolerance = tolerance
        self.strict = strict
        self.average = average
        self.num_classes = num_classes
        self.add_numbers("labels")
        self.add_numbers("hits")
        self.add_state("settings", settings_digest(float(tolerance), strict), dist_reduce_fx="max")

    def update(self, maps: Tensor, objects: Tensor | Sequence[Tensor], labels: Tensor) -> None:
        """Play a batch; an empty one adds nothing.

        Args:
            maps: (B, 1, H, W), one a pair of image and class.
            objects: masks or boxes of the class, as for `pointing_hits`.
            labels: the class (B,) of each pair, at least 0.

        Raises:
            InputError: as for `pointing_hits`, or labels that do not fit.
        """
        require_maps("maps", maps)
        require_ids("labels", labels, len(maps))
        if self.num_classes is not None and len(labels) and int(labels.max()) >= self.num_classes:
            raise InputError(
                f"labels must be in 0 … num_classes - 1 = {self.num_classes - 1}, found {int(labels.max())}"
            )
        hits = pointing_hits(maps, objects, tolerance=self.tolerance, strict=self.strict)
        self.keep("labels", labels)
        self.keep("hits", hits)

    def compute(self) -> Tensor:
        """Divide hits by pairs, over all processes.

        Returns:
            Scalar in 0 … 1, float32, or (K,) for `average="none"` with NaN for classes without pairs. NaN without a pair.
        """
        labels, hits = self.numbers("labels"), self.numbers("hits")
        if self.average == "micro":
            return hits.float().mean()
        classes = self.num_classes or (int(labels.max()) + 1 if len(labels) else 0)
        found, pairs = (torch.bincount(rows, minlength=classes) for rows in (labels[hits > 0], labels))
        shares = found / pairs
        return shares if self.average == "none" else shares.nanmean()


def _masks(objects: Tensor, maps: Tensor) -> Tensor:
    masks = objects.squeeze(1) if objects.ndim == 4 and objects.shape[1] == 1 else objects
    if masks.shape != maps[:, 0].shape:
        raise InputError(
            f"objects must be masks of the size of maps, {tuple(maps[:, 0].shape)}, got {tuple(objects.shape)}; resize the "
            "maps to the image"
        )
    _require_objects(masks.flatten(1).any(1))
    return masks.to(maps.device)


def _boxes(objects: Tensor | Sequence[Tensor], maps: Tensor) -> Tensor:
    """Return boxes (B, n, 4) in float64, filled up with boxes infinitely far away."""
    if isinstance(objects, Tensor) and objects.ndim == 2:
        objects = objects.unsqueeze(1)
    if isinstance(objects, Tensor) and objects.ndim == 0:
        raise InputError("objects must be one entry a map, got a single number")
    given = [torch.as_tensor(boxes) for boxes in objects]
    if any(boxes.is_complex() for boxes in given):
        raise InputError("objects must be boxes of real numbers, got complex ones")
    rows = [boxes.to(maps.device, torch.float64) for boxes in given]
    if len(rows) != len(maps):
        raise InputError(f"objects must be one entry a map, {len(maps)}, got {len(rows)}")
    for index, boxes in enumerate(rows):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise InputError(
                f"objects must be masks of truth values or boxes x0, y0, x1, y1, (n, 4) a map; objects[{index}] has shape "
                f"{tuple(boxes.shape)}"
            )
    _require_objects(torch.tensor([len(boxes) > 0 for boxes in rows]))
    padded = pad_sequence(rows, batch_first=True, padding_value=torch.inf)
    if not bool(((padded[..., 2:] >= padded[..., :2]) & ~padded[..., :2].isnan()).all()):
        raise InputError("objects must be boxes x0, y0, x1, y1 with x0 <= x1 and y0 <= y1; convert x, y, width, height")
    return padded


def _require_objects(there: Tensor) -> None:
    missing = there.logical_not().nonzero().flatten().tolist()
    if missing:
        raise InputError(
            f"objects must hold an object of the class for each map, {len(missing)} have none, the first at position "
            f"{missing[0]}; leave those pairs out"
        )


def _mask_distances(masks: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Squared distance (B,) of a point from the nearest pixel of a mask (B, H, W)."""
    height, width = masks.shape[1:]
    down = (torch.arange(height, device=masks.device) - row.unsqueeze(1)).square().unsqueeze(2)
    across = (torch.arange(width, device=masks.device) - column.unsqueeze(1)).square().unsqueeze(1)
    return (down + across).double().masked_fill(~masks, torch.inf).flatten(1).amin(1)


def _box_distances(boxes: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Squared distance (B,) of a point from the nearest of some boxes (B, n, 4)."""
    points = torch.stack([column, row], 1).unsqueeze(1).double()
    beyond = torch.maximum(boxes[..., :2] - points, points - boxes[..., 2:]).clamp_min(0)
    return beyond.square().sum(2).amin(1)
