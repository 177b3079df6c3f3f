"""Batches of interactions: blocks of training rows with negatives, and users with the items to find."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.loading import EpochShuffle, ResumableLoader
from zoo.data.negatives import NegativeSampler
from zoo.data.splits import Indices
from zoo.interaction_graph import pair_lists

__all__ = ["BlockLoader", "BlockShuffle", "HeldOutUsers", "InteractionRows", "TrainingBlocks"]

Block = tuple[int, Indices]
"""The epoch, and rows of the training split (B,)."""


class InteractionRows(Dataset[Any]):
    """The interactions of one split: user (B,) and item (B,)."""

    def __init__(self, pairs: Tensor) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return self.pairs.shape[1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"user": self.pairs[0, index], "item": self.pairs[1, index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        users, items = self.pairs[:, torch.tensor(indices, dtype=torch.int64)]
        return {"user": users, "item": items}


class TrainingBlocks(Dataset[Any]):
    """Blocks of training interactions, each with an item that its user has not interacted with.

    An index is a `Block` of `BlockShuffle`, or the number of a block of rows in order, as of epoch 0.

    Args:
        pairs: user and item of each interaction (2, N).
        block: rows in a block.
        seed: number of the negatives.

    Raises:
        InputError: a user has interacted with every item.
    """

    def __init__(self, pairs: Tensor, block: int, *, seed: int) -> None:
        self.users, self.items = (row.numpy() for row in pairs)
        self.block = block
        self.negatives = NegativeSampler(self.users, self.items, seed=seed)

    def __len__(self) -> int:
        return ceil(len(self.users) / self.block)

    def __getitem__(self, index: int | Block) -> dict[str, Tensor]:
        if isinstance(index, tuple):
            epoch, rows = index
        else:
            first = index * self.block
            epoch, rows = 0, np.arange(first, min(first + self.block, len(self.users)))
        users = self.users[rows]
        drawn = self.negatives.draw(users, rows, epoch=epoch)
        parts = {"user": users, "positive": self.items[rows], "negative": drawn}
        return {name: torch.from_numpy(part) for name, part in parts.items()}


class BlockShuffle(EpochShuffle):
    """The order of `EpochShuffle`, handed out in blocks.

    A last block of one row is left out, because losses over pairs of rows have no value there.

    Args:
        rows: anything with the length of the training split.
        block: rows in a block, at least 2.
        drop_last: leave out a last block that is not full.
        num_replicas: number of processes.
        rank: this process, from 0.
        seed: number of the order.

    Example:
        >>> sampler = BlockShuffle(range(5), 2)
        >>> [len(rows) for epoch, rows in sampler], len(sampler)
        ([2, 2], 2)
    """

    def __init__(
        self,
        rows: Sized,
        block: int,
        *,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(rows, num_replicas=num_replicas, rank=rank, seed=seed)
        self.rows = len(rows)
        self.block = block
        rest = self.num_samples % block
        self.left_out = rest if rest == 1 or drop_last else 0

    def __len__(self) -> int:
        return ceil((self.num_samples - self.left_out) / self.block)

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator).numpy()
        # np.resize repeats the order: what torch's sampler pads with.
        mine = np.resize(order, self.total_size)[self.rank :: self.num_replicas]
        for start in range(skip * self.block, self.num_samples - self.left_out, self.block):
            yield self.epoch, mine[start : min(start + self.block, self.num_samples)]


class BlockLoader(ResumableLoader):
    """A `ResumableLoader` whose samples are whole batches."""

    def _layout(self) -> dict[str, int]:
        block = self.sampler.block if isinstance(self.sampler, BlockShuffle) else 1
        return {**super()._layout(), "batch_size": block}


class HeldOutUsers(Dataset[Any]):
    """The users of a split, each with the items to find.

    Args:
        pairs: user and item of each interaction (2, N).
        num_users: how many users there are.
        num_items: how many items there are.
    """

    def __init__(self, pairs: Tensor, *, num_users: int, num_items: int) -> None:
        lists = pair_lists(pairs[0], pairs[1], num_rows=num_users, num_columns=num_items)
        self.users = lists.lengths().nonzero().flatten()
        self.lists = lists.select(self.users)

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        rows = torch.tensor(indices, dtype=torch.int64)
        return {"user": self.users[rows], "held_out": self.lists.select(rows)}
