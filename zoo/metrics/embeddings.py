"""What the metrics of embeddings share: unit rows, scores, ties, and rows kept over batches and processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zoo.errors import InputError
from zoo.losses.contracts import require_matrix

__all__ = [
    "TIE",
    "RowsMetric",
    "cosines",
    "first_of_each",
    "require_embeddings",
    "require_ids",
    "require_ks",
    "settings_digest",
    "unit_rows",
]

# Cosines of float32 unit vectors carry rounding errors of about 1e-7, which depend on the place in the matrix product. Two
# that differ by less than this are the same number.
TIE = 1e-6


def require_embeddings(name: str, value: Tensor) -> None:
    """Refuse anything but a floating-point matrix that has at least one column.

    Args:
        name: the argument's name, for the message.
        value: the tensor.

    Raises:
        InputError: another number of dimensions, another kind of numbers, or no column.

    Example:
        >>> require_embeddings("embeddings", torch.zeros(0, 3))
    """
    require_matrix(name, value)
    if value.shape[1] == 0:
        raise InputError(f"{name} must have at least one column, got shape {tuple(value.shape)}")


def require_ids(name: str, value: Tensor, rows: int) -> None:
    """Refuse anything but one whole number of at least 0 for each row; the contents are looked at on every device.

    Args:
        name: the argument's name, for the message.
        value: the numbers.
        rows: how many there have to be.

    Raises:
        InputError: another type or shape, or a negative number.

    Example:
        >>> require_ids("image_ids", torch.tensor([7, 0, 7]), rows=3)
    """
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise InputError(f"{name} must be whole numbers, got {value.dtype}")
    if value.shape != (rows,):
        raise InputError(f"{name} must be one number a row, shape ({rows},), got shape {tuple(value.shape)}")
    if rows and int(value.min()) < 0:
        raise InputError(f"{name} must be at least 0, found {int(value.min())}; number the samples from 0")


def require_ks(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """Refuse anything but one positive whole number or several different ones.

    Args:
        name: the argument's name, for the message.
        value: what was given.

    Returns:
        The numbers in the order given.

    Raises:
        InputError: none, one below 1, one twice, or one that is no whole number.

    Example:
        >>> require_ks("k", 5)
        (5,)
    """
    ks = tuple(value) if isinstance(value, Sequence) else (value,)
    if not ks or len(set(ks)) < len(ks) or not all(type(k) is int and k >= 1 for k in ks):
        raise InputError(f"{name} must be one whole number of at least 1 or several different ones, got {value!r}")
    return ks


def unit_rows(embeddings: Tensor) -> Tensor:
    """Divide each row by its length, without overflow or underflow on the way.

    Args:
        embeddings: rows (B, D) in any floating-point type; detached here.

    Returns:
        Unit rows (B, D), float64 for float64 input and else float32. A row of zeros stays so; a row with NaN or
        infinity holds NaN.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000],
                [1.0000, 0.0000]])
    """
    rows = embeddings.detach()
    rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    largest = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest == 0, 1, largest)
    # The largest entry is 1 now: a length below 1 is that of a row of zeros.
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_min(1)


def cosines(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosines of unit rows, in the precision of the rows under autocast too.

    Args:
        queries: unit rows (Q, D).
        gallery: unit rows (G, D).

    Returns:
        Cosines (Q, G).

    Example:
        >>> cosines(torch.eye(2), torch.eye(2)[:1])
        tensor([[1.],
                [0.]])
    """
    with torch.autocast(queries.device.type, enabled=False):
        return torch.mm(queries, gallery.T)


def first_of_each(ids: Tensor) -> Tensor:
    """Position of the first occurrence of each number, by ascending number.

    Args:
        ids: whole numbers (N,).

    Returns:
        Positions, int64, as many as there are different numbers.

    Example:
        >>> first_of_each(torch.tensor([5, 2, 5, 2, 9]))
        tensor([1, 0, 4])
    """
    unique, inverse = torch.unique(ids, return_inverse=True)
    positions = torch.arange(len(ids), device=ids.device)
    return torch.full_like(unique, len(ids)).scatter_reduce_(0, inverse, positions, "amin")


def settings_digest(*settings: object) -> Tensor:
    """Eight numbers in 0 … 255 that tell settings apart.

    A `MetricCollection` takes two metrics for one if their states agree after the first batch. This belongs into the
    state of a metric whose later states depend on its settings.

    Args:
        *settings: tensors, or anything with a faithful `repr`.

    Returns:
        Numbers (8,), int64.

    Example:
        >>> bool((settings_digest(1, 5) == settings_digest(1, 6)).all())
        False
    """
    digest = hashlib.sha256()
    for setting in settings:
        digest.update(np.asarray(setting.cpu()).tobytes() if isinstance(setting, Tensor) else f"{setting!r}\0".encode())
    return torch.tensor(list(digest.digest()[:8]))


class RowsMetric(Metric):
    """A metric that keeps rows of all batches and gathers them as they are.

    Each process may hold another number of rows, or none: torchmetrics fills in for such a process a float vector,
    which fits neither a matrix nor whole numbers. So rows are kept flat, and an empty state of the right type takes its
    place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._row_types: dict[str, torch.dtype] = {}

    def add_rows(self, name: str) -> None:
        """Add a state of float32 rows, and `<name>_width` for their widths."""
        self._add(name, torch.float32)
        self._add(f"{name}_width", torch.int64)

    def add_numbers(self, name: str) -> None:
        """Add a state of whole numbers."""
        self._add(name, torch.int64)

    def keep(self, name: str, value: Tensor) -> None:
        """Append rows (B, D) or numbers (B,) to a state."""
        getattr(self, name).append(value.detach().to(self.device, self._row_types[name]).reshape(-1))
        if value.ndim == 2:
            self.keep(f"{name}_width", torch.tensor([value.shape[1]]))

    def numbers(self, name: str) -> Tensor:
        """Return all numbers of a state, flat."""
        state = getattr(self, name)
        empty = torch.zeros(0, dtype=self._row_types[name], device=self.device)
        # To the type once more: `.to(torch.bfloat16)` in the middle of an epoch converts what is kept.
        return empty if isinstance(state, list) and not state else dim_zero_cat(state).to(empty.dtype)

    def matrix(self, name: str) -> Tensor:
        """Return all rows of a state as a matrix.

        Raises:
            InputError: batches or processes gave rows of different width.
        """
        widths = torch.unique(self.numbers(f"{name}_width")).tolist()
        if len(widths) > 1:
            raise InputError(f"{name} must have one width, got {', '.join(map(str, widths))}; reset() the metric first")
        return self.numbers(name).view(-1, *widths) if widths else self.numbers(name).view(0, 1)

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> None:
        """Gather the states of all processes, as torchmetrics does, from those without rows too."""
        for name in self._row_types:
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                setattr(self, name, [self.numbers(name)])
        super().sync(
            dist_sync_fn=dist_sync_fn,
            process_group=process_group,
            should_sync=should_sync,
            distributed_available=distributed_available,
        )

    def _add(self, name: str, dtype: torch.dtype) -> None:
        self._row_types[name] = dtype
        self.add_state(name, [], dist_reduce_fx="cat")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def keep_type(tensor: Tensor) -> Tensor:
            # `set_dtype` would turn whole numbers into fractions.
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_type, exclude_state)
