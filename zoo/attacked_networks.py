"""Somebody's network as attacks need it: a function from inputs before normalisation to logits, and to embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import InputError, nearest
from zoo.losses.contracts import require_matrix, unit_rows
from zoo.pixel_units import PixelUnits

__all__ = ["InputSpace", "callable_member", "class_centres", "member"]

Network = Callable[[Tensor], Tensor]

# As the attacks have it.
_SLACK = 0.01


@dataclass(frozen=True)
class InputSpace:
    """Where attacks move inputs.

    Attributes:
        units: how inputs were normalised; None takes them as they are.
        valid_range: lowest and highest value of an input before normalisation.
    """

    units: PixelUnits | None = None
    valid_range: tuple[float, float] = (0.0, 1.0)

    def enter(self, x: Tensor) -> Tensor:
        """Return inputs before normalisation, where the attacks are made.

        Args:
            x: inputs of the network, (B, …).

        Raises:
            InputError: they lie outside of the valid range, by more than 1 % of it.
        """
        inputs = x if self.units is None else self.units.pixels(x)
        low, high = self.valid_range
        slack = _SLACK * (high - low)
        smallest, largest = (float(bound) for bound in torch.aminmax(inputs))
        if not low - slack <= smallest <= largest <= high + slack:
            how = "as they are" if self.units is None else f"without mean {self.units.mean} and std {self.units.std}"
            raise InputError(
                f"inputs must lie in valid_range {low} … {high}, and {how} they run from {smallest:.4g} to {largest:.4g}: "
                "give the mean= and std= that they were normalised with, or their valid_range="
            )
        return inputs

    def classifier(
        self, outputs: Callable[[Tensor], Any], dtype: torch.dtype, centres: Tensor | None = None, scale: float = 1.0
    ) -> tuple[Network, Network | None]:
        """Return what gives logits, and unit embeddings if there are class centres, of inputs before normalisation.

        Args:
            outputs: the network: inputs -> logits (B, K), or embeddings (B, D) if there are class centres.
            dtype: in which it takes its inputs.
            centres: unit embeddings (K, D) of the classes.
            scale: of the cosines.
        """

        def call(points: Tensor) -> Any:
            return outputs((points if self.units is None else self.units.normalised(points)).to(dtype))

        if centres is None:
            return call, None

        def embedding(points: Tensor) -> Tensor:
            rows = call(points)
            if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != centres.shape[1]:
                told = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise InputError(
                    f"with class_centres a network must return embeddings (B, {centres.shape[1]}), got {told}: name another "
                    "forward= or surrogate="
                )
            return unit_rows(rows.to(centres.dtype))

        return lambda points: scale * embedding(points) @ centres.T, embedding


def class_centres(module: nn.Module, given: str | Tensor, dtype: torch.dtype) -> Tensor:
    """Return unit embeddings (K, D) of classes, on the device of what holds them, without a graph.

    Args:
        module: what has them, if a name is given.
        given: the embeddings, or name of an attribute or a method that has them.
        dtype: of the result.

    Raises:
        InputError: there is no such attribute, or no matrix.

    Example:
        >>> class_centres(nn.Identity(), torch.tensor([[0.0, 2.0]]), torch.float32)
        tensor([[0., 1.]])
    """
    rows: Any = member(module, given, "class_centres") if isinstance(given, str) else given
    rows = rows() if callable(rows) else rows
    if not isinstance(rows, Tensor):
        raise InputError(f"class_centres must be a tensor (K, D), got {type(rows).__name__}")
    require_matrix("class_centres", rows)
    # A clone: what inference mode made cannot take part in a graph.
    return unit_rows(rows.detach().clone().to(dtype))


def member(module: nn.Module, path: str, argument: str) -> Any:
    """Return an attribute of a module.

    Args:
        module: the module.
        path: its name, with dots for attributes of attributes.
        argument: the argument that names it, for the error message.

    Raises:
        InputError: there is none; the nearest names are shown.

    Example:
        >>> member(nn.Linear(1, 2), "weight.shape", "size")
        torch.Size([2, 1])
    """
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            known = [known for known in dir(value) if not known.startswith("_")]
            raise InputError(f"{type(module).__name__} has no {path!r} for {argument}.{nearest(name, known)}")
        value = getattr(value, name)
    return value


def callable_member(module: nn.Module, path: str, argument: str) -> Callable[[Tensor], Any]:
    """Return a method, or a module inside of a module.

    Args:
        module: the module.
        path: see `member`.
        argument: see `member`.

    Raises:
        InputError: there is none, or it cannot be called.

    Example:
        >>> callable_member(nn.Sequential(nn.ReLU()), "0", "surrogate")
        ReLU()
    """
    value = member(module, path, argument)
    if not callable(value):
        raise InputError(f"{argument} must name a method or a module, and {path!r} is {type(value).__name__}")
    return value  # type: ignore[no-any-return]
