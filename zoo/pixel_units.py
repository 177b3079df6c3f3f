"""Inputs that were normalised, in the units they had before: where attacks and their radii are defined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.contracts import working_dtype
from zoo.towers import Tower, has_weights

__all__ = ["PixelUnits", "find_normalisation"]


class PixelUnits:
    """Undoes ``(x - mean) / std`` of each channel, and does it again.

    Args:
        mean: mean of each channel, the second dimension of the inputs; one number for all.
        std: standard deviation of each channel, positive.

    Raises:
        InputError: mean and std do not fit each other, or a std is not positive.

    Example:
        >>> units = PixelUnits([0.5], [0.25])
        >>> x = torch.tensor([[[-2.0, 0.0, 2.0]]])
        >>> units.pixels(x), bool((units.normalised(units.pixels(x)) == x).all())
        (tensor([[[0.0000, 0.5000, 1.0000]]]), True)
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if not len(mean) or len(mean) != len(std) or not all(0 < value < float("inf") for value in std):
            raise InputError(
                f"mean and std must have one number a channel, std positive, got {list(mean)} and {list(std)}"
            )
        self.mean = [float(value) for value in mean]
        self.std = [float(value) for value in std]

    def pixels(self, x: Tensor) -> Tensor:
        """Return inputs before normalisation, (B, C, …), in float32 (float64 stays).

        Args:
            x: normalised inputs (B, C, …).

        Raises:
            InputError: another number of channels.
        """
        wide = x.to(working_dtype(x))
        mean, std = self._by_channel(wide)
        return wide * std + mean

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return normalised inputs, in the type of the pixels.

        Args:
            pixels: inputs (B, C, …).

        Raises:
            InputError: another number of channels.
        """
        mean, std = self._by_channel(pixels)
        return (pixels - mean) / std

    def _by_channel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels = len(self.mean)
        if x.ndim < 2 or channels not in (1, x.shape[1]):
            raise InputError(
                f"mean and std have {channels} channels, and inputs are {tuple(x.shape)} with channels second: give the "
                "mean and std that belong to them, or [0.0] and [1.0] if they are not normalised"
            )
        shape = (channels, *[1] * (x.ndim - 2))
        mean, std = (torch.tensor(value, dtype=x.dtype, device=x.device).view(shape) for value in (self.mean, self.std))
        return mean, std


def find_normalisation(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[PixelUnits, str] | None:
    """Return how the inputs of a run were normalised, as far as somebody says so, and who does.

    Args:
        trainer: its data module is asked first, for ``mean`` and ``std``.
        pl_module: then the towers with weights inside of the module, whose transform tells; if these differ, nobody knows.
    """
    data = getattr(trainer, "datamodule", None)
    found = _read(data)
    if found is not None:
        return found, type(data).__name__
    inner: list[Tower] = [module for module in pl_module.modules() if isinstance(module, Tower)]
    for tower in (*inner, *getattr(pl_module, "frozen_towers", {}).values()):
        told = _of_tower(tower)
        if told is None:
            continue
        if found is not None and (found.mean, found.std) != (told.mean, told.std):
            return None
        found = told
    return None if found is None else (found, "the transform of a tower")


def _of_tower(tower: Tower) -> PixelUnits | None:
    if not has_weights(tower.name):
        return None  # of random weights nothing says what they expect
    try:
        return _of_transform(tower.transform)
    except InputError:  # text towers and stored models record none
        return None


def _of_transform(transform: Any) -> PixelUnits | None:
    """Return the normalisation in a transform of torchvision, timm or open_clip."""
    own = _read(transform)
    if own is not None:
        return own
    steps = getattr(transform, "transforms", None)
    parts = [_of_transform(step) for step in steps] if isinstance(steps, Iterable) else []
    return next((part for part in parts if part is not None), None)


def _read(holder: Any) -> PixelUnits | None:
    mean, std = (getattr(holder, name, None) for name in ("mean", "std"))
    if not isinstance(mean, list | tuple | Tensor) or not isinstance(std, list | tuple | Tensor):
        return None
    return PixelUnits(*(value.flatten().tolist() if isinstance(value, Tensor) else value for value in (mean, std)))
