"""Inputs and labels of the batches of other people's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from zoo.errors import InputError

__all__ = ["labelled_batch"]


def labelled_batch(
    batch: Any, to_input: Callable[[Any], Tensor] | None = None, to_target: Callable[[Any], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a batch.

    Args:
        batch: a tuple or list ``(x, y, …)``, or anything that the two functions understand.
        to_input: batch -> inputs; the first item if omitted.
        to_target: batch -> labels or soft labels; the second item if omitted.

    Raises:
        InputError: no such tuple and a function is missing, or something else than tensors.

    Example:
        >>> labelled_batch({"image": torch.zeros(1), "label": torch.ones(1)}, lambda b: b["image"], lambda b: b["label"])
        (tensor([0.]), tensor([1.]))
    """
    pair = isinstance(batch, list | tuple) and len(batch) >= 2
    if not pair and (to_input is None or to_target is None):
        raise InputError(
            f"a batch must be a tuple (x, y, …), got {type(batch).__name__}: give batch_to_input=… and batch_to_target=…, "
            "functions of a batch"
        )
    x = batch[0] if to_input is None else to_input(batch)
    targets = batch[1] if to_target is None else to_target(batch)
    for name, value in (("inputs", x), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise InputError(f"the {name} of a batch must be a tensor, got {type(value).__name__}")
    return x, targets
