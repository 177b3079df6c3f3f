"""Training batches that say which samples they hold: ``(x, targets, index)``."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

import torch
from torch.utils.data import Dataset, IterableDataset

from zoo.errors import InputError

__all__ = ["IndexedDataset"]


class IndexedDataset(Dataset[Any]):
    """A data set of pairs ``(x, y)`` as one of triples ``(x, y, index)``.

    The index is the position in the wrapped data set, whatever the order in which a sampler asks for it: what a table of
    one row for each sample (`zoo.teacher_cache`) is read by. It must be the outermost wrapper: the index from inside a
    ``Subset`` is not a position in that subset.

    A data set that is read by the batch stays so: a list of pairs from its ``__getitems__`` (torch's convention) becomes a
    list of triples, and a batch ``(x, y)`` of tensors (the zoo's) gets the positions as a third tensor.

    Args:
        dataset: any data set with a length whose items are pairs.

    Raises:
        InputError: it is iterable and has no positions. When it is read: an item is no pair.

    Example:
        >>> data = IndexedDataset([("a", 0), ("b", 1)])
        >>> data[1], len(data)
        (('b', 1, 1), 2)
    """

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(
                f"{type(dataset).__name__} has no positions: IndexedDataset needs a data set with __getitem__ and __len__"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast("Sized", self.dataset))

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        return *self._pair(self.dataset[index]), int(index)

    def __getitems__(self, indices: list[int]) -> Any:
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if callable(fetch) else [self.dataset[index] for index in indices]
        if isinstance(items, list):
            return [(*self._pair(item), int(index)) for item, index in zip(items, indices, strict=True)]
        return *self._pair(items), torch.tensor([int(index) for index in indices], dtype=torch.int64)

    def _pair(self, item: Any) -> tuple[Any, Any]:
        if not isinstance(item, tuple | list) or len(item) != 2:
            size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
            raise InputError(
                f"an item of {type(self.dataset).__name__} must be a pair (x, y), got {type(item).__name__}{size}"
            )
        return item[0], item[1]
