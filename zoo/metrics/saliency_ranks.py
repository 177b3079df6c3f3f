"""How alike two saliency maps rank the places of an image, and whether maps of different classes differ."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.combined_maps import normalize_map
from zoo.errors import InputError
from zoo.losses.contracts import require_same_layout
from zoo.metrics.embeddings import RowsMetric

__all__ = ["ClassSensitivity", "constant_maps", "map_correlation", "require_maps", "spearman"]


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of each row of one tensor with the same row of another; equal values share their mean rank.

    Pearson's correlation of the ranks, all rows at once. Ranks and their sums are whole numbers in float64, exact up to
    300 000 values a row. (`torchmetrics.functional.spearman_corrcoef` adds 1e-6 to the denominator, gives 0 for constant
    rows, and its int32 sums overflow where 65 536 values are equal, as in the background of a map.)

    Source: Spearman 1904; `scipy.stats.spearmanr` gives the same.

    Args:
        first: (B, …) in floating point, at least one value a row.
        second: of the same shape, on the same device.

    Returns:
        (B,) in -1 … 1, float64: the device has to know it. NaN where a row is constant or holds NaN; infinity is the
        highest rank.

    Raises:
        InputError: other shapes, types or devices, or rows without values.

    Example:
        >>> spearman(torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 2.0]]), torch.tensor([[0.1, 0.5, 0.9], [3.0, 3.0, 0.0]]))
        tensor([ 1., -1.], dtype=torch.float64)
    """
    require_same_layout("second", second, "first", first)
    for name, value in (("first", first), ("second", second)):
        if value.ndim < 2 or not value.is_floating_point() or value[:1].numel() == 0 < len(value):
            raise InputError(
                f"{name} must be (B, …) in floating point, at least one value a row, got shape {tuple(value.shape)} of "
                f"{value.dtype}"
            )
    if len(first) == 0:
        return torch.zeros(0, dtype=torch.float64, device=first.device)
    sides = [value.detach().flatten(1) for value in (first, second)]
    ranks, others = (_centred_ranks(rows) for rows in sides)
    # The root of a product, not a product of roots: identical rows then give 1 exactly.
    rho = (ranks * others).sum(1) / (ranks.square().sum(1) * others.square().sum(1)).sqrt()
    broken = sides[0].isnan().any(1) | sides[1].isnan().any(1)
    return rho.clamp(-1, 1).masked_fill(broken, torch.nan)


def map_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of two saliency maps of each image, by `spearman`; nothing where a map is constant.

    Args:
        first: maps (B, 1, H, W).
        second: other maps of the same images.

    Returns:
        (B,) in -1 … 1, float64; NaN where a map is constant, up to 16 rounding errors of its type, or is not finite.

    Raises:
        InputError: no maps, or of different shape.

    Example:
        >>> maps = torch.tensor([[[[0.0, 1.0, 3.0]]], [[[2.0, 2.0, 2.0]]]])
        >>> map_correlation(maps, maps.flip(3))
        tensor([-1., nan], dtype=torch.float64)
    """
    require_maps("first", first)
    require_maps("second", second)
    rho = spearman(first, second)
    undefined = constant_maps(first) | constant_maps(second) | ~(_finite(first) & _finite(second))
    return rho.masked_fill(undefined, torch.nan)


def constant_maps(maps: Tensor) -> Tensor:
    """Tell which maps are the same everywhere, up to 16 rounding errors of their type, such as resizing leaves.

    Args:
        maps: (B, 1, H, W).

    Returns:
        (B,) of truth values.

    Example:
        >>> constant_maps(torch.tensor([[[[0.3, 0.3]]], [[[0.3, 0.4]]]]))
        tensor([ True, False])
    """
    return (normalize_map(maps.detach()) == 0).flatten(1).all(1)


def require_maps(name: str, value: Tensor) -> None:
    """Refuse anything but maps of one channel, as `zoo.saliency.saliency` returns them.

    Args:
        name: the argument's name, for the message.
        value: the tensor.

    Raises:
        InputError: another shape or type, or maps without places.

    Example:
        >>> require_maps("maps", torch.zeros(2, 1, 4, 4))
    """
    if value.ndim != 4 or value.shape[1] != 1 or not value.is_floating_point() or 0 in value.shape[2:]:
        raise InputError(
            f"{name} must be maps (B, 1, H, W) in floating point, got shape {tuple(value.shape)} of {value.dtype}"
        )


class ClassSensitivity(RowsMetric):
    """Rank correlation between the maps of the most and the least likely class of each image: lower is more sensitive.

    A method whose map does not depend on the class gets 1. Images with a constant map have no correlation; they are
    counted apart and do not take part in mean and standard deviation, and so are images with maps that are not finite.

    Kept is one number an image. A sampler that pads a shard by repeating samples makes those count twice.

    Source: section 1.8 of the project's notes on "There and Back Again" (arXiv 2004.02866), for the released code:
    signed, over all pixels, maps resized to the input. Difference: the release adds 1e-6 to a map before ranking, which
    merges small values of float32.

    Example:
        >>> metric = ClassSensitivity()
        >>> most = torch.tensor([[[[0.0, 1.0, 2.0]]], [[[0.0, 1.0, 2.0]]]])
        >>> metric.update(most, torch.stack([most[0], -most[1]]))
        >>> found = metric.compute()
        >>> found["class_sensitivity"], found["class_sensitivity_std"]
        (tensor(0.), tensor(1.))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    constant: Tensor
    not_finite: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._add("values", torch.float64)
        for name in ("constant", "not_finite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps_most: Tensor, maps_least: Tensor) -> None:
        """Compare the maps of a batch; an empty one adds nothing.

        Args:
            maps_most: maps (B, 1, H, W) of the most likely class of each image, such as
                `saliency(model, images, logits.argmax(1), layers=…)`.
            maps_least: those of the least likely, of the same shape.

        Raises:
            InputError: no maps, or of different shape.
        """
        require_maps("maps_most", maps_most)
        require_maps("maps_least", maps_least)
        require_same_layout("maps_least", maps_least, "maps_most", maps_most)
        if len(maps_most) == 0:
            return
        broken = ~(_finite(maps_most) & _finite(maps_least))
        constant = (constant_maps(maps_most) | constant_maps(maps_least)) & ~broken
        self.keep("values", spearman(maps_most, maps_least)[~(broken | constant)])
        # Not in place: a reset inside inference_mode leaves tensors that cannot be changed outside of it.
        self.constant = self.constant + constant.sum().to(self.device)
        self.not_finite = self.not_finite + broken.sum().to(self.device)

    def compute(self) -> dict[str, Tensor]:
        """Return mean and standard deviation over the images of all processes.

        Returns:
            Scalars: ``class_sensitivity`` and ``class_sensitivity_std`` (of the images at hand, divided by their number),
            float32, NaN without an image; ``images`` behind them; ``constant`` and ``not_finite``, images left out.
        """
        values = self.numbers("values")
        return {
            "class_sensitivity": values.mean().float(),
            "class_sensitivity_std": spread(values).float(),
            "images": torch.tensor(len(values), device=self.device),
            "constant": self.constant,
            "not_finite": self.not_finite,
        }


def spread(values: Tensor) -> Tensor:
    """Standard deviation of the values at hand, divided by their number; NaN without values.

    Args:
        values: (n,).

    Example:
        >>> spread(torch.tensor([1.0, 3.0]))
        tensor(1.)
    """
    return (values - values.mean()).square().mean().sqrt()


def _finite(maps: Tensor) -> Tensor:
    return maps.detach().isfinite().flatten(1).all(1)


def _centred_ranks(rows: Tensor) -> Tensor:
    """Twice the distance of each rank from the mean rank, a whole number in float64."""
    count = rows.shape[1]
    ordered, order = rows.sort(1)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ends = torch.ones_like(begins)
    ends[:, :-1] = begins[:, 1:]
    places = torch.arange(count, device=rows.device)
    first = torch.where(begins, places, 0).cummax(1).values
    last = torch.where(ends, places, count - 1).flip(1).cummin(1).values.flip(1)
    doubled = (first + last + 1 - count).double()
    return torch.zeros_like(doubled).scatter_(1, order, doubled)
