"""How data modules of interactions hand them out: blocks of training rows with negatives, and users with what is held out.

The rules are those of `zoo.data.loading`. An epoch is cut into blocks of rows, each one array from the sampler to the
batch: nothing is done row by row.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.draws import random_words
from zoo.data.interaction_batches import BlockLoader, BlockShuffle, HeldOutUsers, InteractionRows, TrainingBlocks
from zoo.data.interaction_tables import SPLITS
from zoo.data.loading import SplitDataModule, Splits, StridedShard
from zoo.data.splits import Indices
from zoo.errors import InputError

__all__ = ["Interactions", "InteractionsDataModule", "UntrainedRule", "split_pairs"]

UntrainedRule = Literal["drop", "error"]

_CHOICE = 7  # the stream of random numbers that chooses training interactions


@dataclass(frozen=True)
class Interactions:
    """A data set for recommendation: who has interacted with what, and what is known of the items.

    Attributes:
        pairs: user and item of each interaction (2, N), int64, by the names in `SPLITS`.
        features: features of the items (I, D) by modality, float32.
        present: which items have the modality (I,), bool.
        user_ids: id of each user.
        item_ids: id of each item.
    """

    pairs: dict[str, Tensor]
    features: dict[str, Tensor]
    present: dict[str, Tensor]
    user_ids: list[str]
    item_ids: list[str]


def split_pairs(
    users: Indices,
    items: Indices,
    labels: Indices,
    *,
    train_samples: int | None = None,
    split_seed: int = 0,
    untrained: UntrainedRule = "drop",
) -> tuple[dict[str, Tensor], int]:
    """Sort interactions by their split, without users who are held out but do not train.

    Args:
        users: (N,).
        items: (N,).
        labels: number of the split in `SPLITS` (N,).
        train_samples: keep so many training interactions; a smaller choice is contained in a larger one. None keeps all.
        split_seed: number of that choice.
        untrained: what to do with users who have interactions in validation or test and none in training.

    Returns:
        (2, rows) of each split, int64, in the order of the rows; and how many users were left out of validation and test.

    Raises:
        InputError: nothing is left to train on, ``train_samples`` is out of its range, or a user does not train and must.
    """
    pairs = np.stack([users, items]).astype(np.int64)
    rows = {name: np.flatnonzero(labels == number) for number, name in enumerate(SPLITS)}
    if len(rows["train"]) == 0:
        raise InputError("no interaction is for training")
    if train_samples is not None:
        if not 2 <= train_samples <= len(rows["train"]):
            raise InputError(
                f"train_samples must lie between 2 and the {len(rows['train'])} training interactions, got {train_samples}"
            )
        words = random_words((_CHOICE, split_seed), rows["train"])
        rows["train"] = np.sort(rows["train"][np.argsort(words)[:train_samples]])
    trained = np.zeros(int(users.max()) + 1, dtype=bool)
    trained[users[rows["train"]]] = True
    lacking = np.unique(users[~trained[users]])
    if len(lacking) and untrained == "error" and train_samples is None:
        raise InputError(
            f"{len(lacking)} users have interactions in validation or test, but none in training, the first is number "
            f"{lacking[0]}; untrained='drop' leaves them out of the evaluation"
        )
    for name in ("val", "test"):
        rows[name] = rows[name][trained[users[rows[name]]]]
    return {name: torch.from_numpy(pairs[:, chosen]) for name, chosen in rows.items()}, len(lacking)


def _as_is(batch: Any) -> Any:
    return batch


class InteractionsDataModule(SplitDataModule):
    """What the data modules of interactions share, and what a recommender may rely on.

    After ``setup()`` (in fact at the first use):

    - ``num_users``, ``num_items``: U and I. Users and items are numbers below them.
    - ``user_ids``, ``item_ids``: the ids that the user of the zoo knows, a text for each number.
    - ``features``: ``{modality: (I, D)}`` in float32; ``present``: ``{modality: (I,)}``, bool, which items have it. The
      order of the modalities is that in which they were given. Where an item lacks one, its features are zero.
    - ``interactions``: ``{"train", "val", "test"}``, each (2, N) int64: users and items. N may be 0.
    - ``splits``: the same as data sets with a length, None where there is none.

    A training batch is a dict of ``user``, ``positive`` and ``negative``, each (B,) int64, with B at least 2. Rows come in
    an order of (seed, epoch), negatives are drawn anew in each epoch, see `NegativeSampler`. Processes have batches of one
    size. A batch of evaluation is a dict of ``user`` (B,) int64 and ``held_out``, a `zoo.interaction_graph.PairLists` of B
    rows with the items to find, as `zoo.metrics.FullRanking` takes it. Each user with such items comes once, over all
    processes together.

    A subclass implements `_read`.

    Args:
        batch_size: interactions in a training batch and process, at least 2.
        eval_batch_size: users in a batch of evaluation and process, at least 1.
        seed: number of the training order and of the negatives.
        num_workers: processes that read the data; 0 is fastest, the data are in memory.
        drop_last: leave out a last training batch that is not full; one of a single row is always left out.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Raises:
        InputError: a number is out of its range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 2048,
        eval_batch_size: int = 4096,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last, pin_memory=pin_memory
        )
        for name, value, least in (("batch_size", batch_size, 2), ("eval_batch_size", eval_batch_size, 1)):
            if value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        self.eval_batch_size = eval_batch_size
        self._data: Interactions | None = None

    @abstractmethod
    def _read(self) -> Interactions:
        """Read the data."""

    @property
    def data(self) -> Interactions:
        """The whole data set, read at the first use."""
        if self._data is None:
            self._data = self._read()
        return self._data

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.data.user_ids)

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self.data.item_ids)

    @property
    def user_ids(self) -> list[str]:
        """Id of each user."""
        return self.data.user_ids

    @property
    def item_ids(self) -> list[str]:
        """Id of each item."""
        return self.data.item_ids

    @property
    def features(self) -> dict[str, Tensor]:
        """Features of the items (I, D) by modality, float32."""
        return self.data.features

    @property
    def present(self) -> dict[str, Tensor]:
        """Which items have the modality (I,), bool."""
        return self.data.present

    @property
    def interactions(self) -> dict[str, Tensor]:
        """User and item of each interaction (2, N) of "train", "val" and "test", int64."""
        return self.data.pairs

    @property
    def class_names(self) -> list[str]:
        """No classes: interactions have no labels."""
        return []

    def _load(self) -> Splits:
        parts = {name: InteractionRows(pairs) if pairs.shape[1] else None for name, pairs in self.interactions.items()}
        train = cast("InteractionRows", parts["train"])
        return Splits(train=train, train_eval=train, val=parts["val"], test=parts["test"])

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training interactions in blocks, shuffled, with negatives.

        Raises:
            InputError: there is no batch of at least two rows, or a user has interacted with every item.
        """
        blocks = TrainingBlocks(self.interactions["train"], self.batch_size, seed=self.seed)
        sampler = BlockShuffle(
            range(len(blocks.users)), self.batch_size, drop_last=self.drop_last, **self._process(), seed=self.seed
        )
        if len(sampler) == 0:
            raise InputError(
                f"there is no training batch: a process has {sampler.num_samples} interactions, batch_size is "
                f"{self.batch_size}, drop_last is {self.drop_last}, and a batch needs at least 2"
            )
        return self._made(BlockLoader, blocks, sampler, None)

    def _eval_loader(self, data: Dataset[Any] | None, split: str) -> DataLoader[Any]:
        if data is None:
            raise InputError(f"{type(self).__name__} has no {split} split: no user with training interactions is in it")
        assert isinstance(data, InteractionRows)
        users = HeldOutUsers(data.pairs, num_users=self.num_users, num_items=self.num_items)
        sampler = StridedShard(users, **self._process())
        if sampler.total_size < sampler.num_replicas:
            raise InputError(
                f"the {split} split has {sampler.total_size} users for {sampler.num_replicas} processes: each needs one"
            )
        return self._made(DataLoader, users, sampler, self.eval_batch_size)

    def _made(
        self, kind: type[DataLoader[Any]], data: Dataset[Any], sampler: Any, batch_size: int | None
    ) -> DataLoader[Any]:
        return kind(
            data,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.seed),
            persistent_workers=self.num_workers > 0,
        )
