"""How every data module of the zoo hands out its data.

Training: the order of an epoch, and with it every random crop and flip, is a pure function of (seed, epoch, index). A run
resumed from a checkpoint, also from one in the middle of an epoch, sees the batches that the uninterrupted run saw, with
any number of workers. The sampler is torch's ``DistributedSampler``, which Lightning leaves in place and tells the epoch;
in a loop of your own, call ``loader.sampler.set_epoch(epoch)`` before each epoch. The data set learns the epoch through
the indices (`Draw`).

Evaluation: every sample exactly once, also under DDP: process r of W takes samples r, r + W, r + 2W, … without padding, so
that sums over processes (accuracy, class means) are exact. Processes may differ by one batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from zoo.data.draws import random_words
from zoo.data.indexed import IndexedDataset
from zoo.errors import InputError

__all__ = ["Batch", "Draw", "EpochShuffle", "ResumableLoader", "SplitDataModule", "Splits", "StridedShard", "epoch_of"]

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B,)."""


class Draw(int):
    """The index of a sample that also says in which epoch it is drawn.

    Equal to the plain index in every other respect. A data set that augments at random derives its random numbers from
    ``(seed, draw.epoch, draw)``, wherever and whenever the sample is read; a plain index counts as epoch 0. So
    ``Subset(data, [Draw(i, v) for i in rows])`` is view v of some rows.

    Example:
        >>> draw = Draw(7, epoch=2)
        >>> draw == 7, draw.epoch
        (True, 2)
    """

    epoch: int

    def __new__(cls, index: int, epoch: int) -> Draw:
        """Make the index ``index`` of epoch ``epoch`` (counted from 0)."""
        draw = super().__new__(cls, index)
        draw.epoch = epoch
        return draw

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int]]:
        return Draw, (int(self), self.epoch)


def epoch_of(indices: list[int]) -> int:
    """Return the epoch in which these indices are drawn; 0 for plain integers and for an empty list."""
    return int(getattr(indices[0], "epoch", 0)) if indices else 0


class EpochShuffle(DistributedSampler[Draw]):
    """torch's shuffling, sharding and padding ``DistributedSampler``, seeded so that seeds do not overlap.

    torch seeds epoch e of seed s with s + e, so that seed 1 sees in epoch 0 what seed 0 sees in epoch 1, and runs over
    several seeds are not independent. Here the seed is hashed first.

    Args:
        dataset: anything with a length.
        num_replicas: number of processes.
        rank: this process, from 0.
        seed: number of the order.
    """

    def __init__(self, dataset: Sized, *, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        hashed = int(random_words((seed,), [0])[0]) >> 2  # room for adding the epoch below 2**63
        super().__init__(cast("Dataset[Any]", dataset), num_replicas=num_replicas, rank=rank, shuffle=True, seed=hashed)
        self.skip = 0
        """How many samples the next iteration, and only that, leaves out at its beginning."""

    def __iter__(self) -> Iterator[Draw]:
        skip, self.skip = self.skip, 0
        return iter([Draw(index, self.epoch) for index in islice(super().__iter__(), skip, None)])


class StridedShard(DistributedSampler[int]):
    """The samples r, r + W, r + 2W, … of process r among W, in order and without padding.

    Args:
        dataset: anything with a length.
        num_replicas: number of processes.
        rank: this process, from 0.

    Example:
        >>> [list(StridedShard(range(5), num_replicas=2, rank=rank)) for rank in (0, 1)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, dataset: Sized, *, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(cast("Dataset[Any]", dataset), num_replicas=num_replicas, rank=rank, shuffle=False)
        self.total_size = len(dataset)
        self.num_samples = len(range(rank, self.total_size, num_replicas))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class ResumableLoader(DataLoader[Batch]):
    """A ``DataLoader`` over an `EpochShuffle` that goes on in the middle of an epoch.

    Lightning stores ``state_dict()`` with each checkpoint and loads it on resume. Without it, a checkpoint from the middle
    of an epoch would be followed by the epoch's first batches again instead of the remaining ones. The batches that were
    already seen are not read again. With another sampler (``Trainer(overfit_batches=…)`` puts one in) every iteration
    starts at the beginning.
    """

    _epoch = -1
    _given = 0
    _restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator, so that workers start and the order is drawn at the first batch: Lightning calls iter() on the first
        # loader before it sets the epoch.
        state, self._restored = self._restored, None
        self._epoch, self._given = -1, 0
        if isinstance(self.sampler, EpochShuffle):
            self._epoch = self.sampler.epoch
            self._given = self._batches_to_skip(state)
            self.sampler.skip = self._given * (self.batch_size or 1)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def _layout(self) -> dict[str, int]:
        return {"batch_size": self.batch_size or 1, "processes": getattr(self.sampler, "num_replicas", 1)}

    def _batches_to_skip(self, state: dict[str, int] | None) -> int:
        if state is None or state["epoch"] != self._epoch:
            return 0
        for name, value in self._layout().items():
            if state[name] != value:
                raise InputError(
                    f"a checkpoint from the middle of an epoch can only be resumed with the same {name}: it was written "
                    f"with {state[name]}, now it is {value}"
                )
        return state["batches"]

    def state_dict(self) -> dict[str, int]:
        """Return how far the current epoch has come: epoch (from 0; -1 if unknown), batches handed out, and the layout."""
        if self._restored is not None:  # loaded, but no batch has been asked for since
            return dict(self._restored)
        return {"epoch": self._epoch, "batches": self._given, **self._layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on behind the batches in ``state``, if it is in the same epoch.

        Args:
            state: what `state_dict` returned.
        """
        self._restored = dict(state)


@dataclass(frozen=True)
class Splits:
    """The data sets of a data module; each has ``__len__`` and ``__getitems__(indices) -> Batch``.

    Attributes:
        train: training split under the training transform.
        train_eval: the same samples under the evaluation transform.
        val: validation split, or None.
        test: test split, or None.
    """

    train: Dataset[Batch]
    train_eval: Dataset[Batch]
    val: Dataset[Batch] | None
    test: Dataset[Batch] | None


def _as_is(batch: Any) -> Any:
    return batch


class SplitDataModule(LightningDataModule, ABC):
    """What the zoo's data modules share: loaders over `Splits`, by the rules at the top of this file.

    A subclass implements `_load`, which reads the data, and `class_names`.

    Args:
        batch_size: samples in a batch and process, at least 1.
        num_workers: processes that read the data; 0 reads in the training process.
        seed: number of the training order and of the augmentations.
        drop_last: leave out a last training batch that is not full.
        pin_memory: copy batches to page-locked memory, for a GPU.
        with_index: training batches are ``(images, labels, index)``, with the position of each sample in the training
            split; all other batches stay pairs.

    Raises:
        InputError: a number is out of its range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
        with_index: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.with_index = with_index
        self._splits: Splits | None = None

    @abstractmethod
    def _load(self) -> Splits:
        """Read the data."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Name of each class, in the order of the labels."""

    @property
    def num_classes(self) -> int:
        """Number of classes K; labels are 0 … K-1."""
        return len(self.class_names)

    @property
    def splits(self) -> Splits:
        """The data sets, read at the first use."""
        if self._splits is None:
            self._splits = self._load()
        return self._splits

    def setup(self, stage: str | None = None) -> None:
        """Read the data unless they are there already.

        Args:
            stage: ignored; all splits are read at once.
        """
        _ = self.splits

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training split, shuffled, under the training transform; with the index of each sample if asked for.

        Raises:
            InputError: ``drop_last`` leaves no batch.
        """
        data = IndexedDataset(self.splits.train) if self.with_index else self.splits.train
        loader = self._loader(
            ResumableLoader, data, EpochShuffle(cast("Sized", data), **self._process(), seed=self.seed)
        )
        if len(loader) == 0:
            raise InputError(
                f"drop_last leaves no training batch: batch_size is {self.batch_size}, but a process has "
                f"{len(cast('Sized', loader.sampler))} training samples"
            )
        return loader

    def train_eval_dataloader(self) -> DataLoader[Batch]:
        """Return the training split in order, under the evaluation transform (for class means and the like)."""
        return self._eval_loader(self.splits.train_eval, "training")

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the validation split in order; during fit, a module without one returns an empty list.

        Raises:
            InputError: there is no validation split, outside fit.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if self.splits.val is None and fitting:
            return []
        return self._eval_loader(self.splits.val, "validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test split in order.

        Raises:
            InputError: there is none.
        """
        return self._eval_loader(self.splits.test, "test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test split in order, as `test_dataloader` does."""
        return self.test_dataloader()

    def _process(self) -> dict[str, int]:
        if self.trainer is None:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}

    def _eval_loader(self, data: Dataset[Batch] | None, split: str) -> DataLoader[Batch]:
        if data is None or len(cast("Sized", data)) == 0:
            raise InputError(f"{type(self).__name__} has no {split} split: name one, or set a share for it above 0")
        sampler = StridedShard(cast("Sized", data), **self._process())
        if sampler.total_size < sampler.num_replicas:
            raise InputError(
                f"the {split} split has {sampler.total_size} samples for {sampler.num_replicas} processes: each needs one"
            )
        return self._loader(DataLoader, data, sampler)

    def _loader(
        self, kind: type[DataLoader[Batch]], data: Dataset[Batch], sampler: EpochShuffle | StridedShard
    ) -> DataLoader[Batch]:
        training = isinstance(sampler, EpochShuffle)
        return kind(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=self.pin_memory,
            drop_last=self.drop_last and training,
            # Its own generator: a loader neither reads nor advances the global random state, and seeds its workers alike.
            generator=torch.Generator().manual_seed(self.seed),
            persistent_workers=self.num_workers > 0,
        )
