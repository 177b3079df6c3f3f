"""The samples of a training loader in the order of their data set, proven to be the same at every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from zoo.data.loading import Draw
from zoo.errors import InputError

__all__ = ["Share", "TrainingSamples", "check_indexed"]

_PROBES = 64


class TrainingSamples:
    """The samples of a training loader in the order of the data set, by the batch.

    Args:
        source: the training loader, or the trainer that is about to fit.
        device: where the images go; a trainer moves them by its own rules.

    Raises:
        InputError: the samples have no positions, or there are none.

    Attributes:
        samples: their number N.
        batch_size: samples in a batch of the loader.
    """

    def __init__(self, source: Trainer | DataLoader[Any], device: torch.device | None) -> None:
        self.trainer = source if isinstance(source, Trainer) else None
        loader = source.train_dataloader if isinstance(source, Trainer) else source
        if not isinstance(loader, DataLoader):
            raise InputError(f"a teacher cache needs one training DataLoader, got {type(loader).__name__}")
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
            raise InputError(
                f"{type(loader.dataset).__name__} has no positions by which a teacher cache could be read: give a data set "
                "with __getitem__ and __len__, or leave teacher_cache out"
            )
        if loader.batch_sampler is None:
            raise InputError("a teacher cache needs a DataLoader that makes the batches: give it a batch_size")
        self.loader = loader
        self.device = device
        self.samples = len(loader.dataset)
        self._probed: list[Any] = []
        own = getattr(loader.batch_sampler, "batch_size", 256)
        self.batch_size: int = own if loader.batch_size is None else loader.batch_size
        if self.samples == 0:
            raise InputError("the training data set is empty: there is nothing to cache")

    @property
    def shows_progress(self) -> bool:
        """Whether the run shows progress bars."""
        return self.trainer is None or self.trainer.progress_bar_callback is not None

    def read(self, batches: Sampler[list[int]] | list[list[int]], *, workers: bool) -> Iterator[Any]:
        """Yield the batches of these positions.

        Args:
            batches: positions by the batch.
            workers: read in as many processes as the loader does, else in this one.
        """
        count = self.loader.num_workers if workers else 0
        return iter(
            DataLoader(
                self.loader.dataset,
                batch_sampler=batches,
                num_workers=count,
                collate_fn=self.loader.collate_fn,
                worker_init_fn=self.loader.worker_init_fn,
                multiprocessing_context=self.loader.multiprocessing_context if count else None,
            )
        )

    def moved(self, batch: Any) -> Tensor:
        """Return the images of a batch as the training step would get them.

        Args:
            batch: what the loader gave.
        """
        if self.trainer is not None:
            # The two calls that Lightning's loop makes; the hooks of the data module and the module act in them.
            batch = self.trainer.lightning_module._on_before_batch_transfer(batch)
            batch = self.trainer.strategy.batch_to_device(batch)
        x: Tensor = batch[0]
        return x if self.device is None or self.trainer is not None else x.to(self.device)

    def probes(self, *, with_index: bool = False) -> list[list[Any]]:
        """Return position, label and digest of the image of samples all over the data set.

        Args:
            with_index: refuse batches that do not say their positions.

        Raises:
            InputError: the images are not the same each time, or a batch is not what it must be.
        """
        rows = np.unique(np.linspace(0, self.samples - 1, min(self.samples, _PROBES)).round().astype(int)).tolist()
        first, *others = self.read([[Draw(row, epoch) for row in rows] for epoch in range(3)], workers=False)
        for batch in (first, *others):
            check_indexed(batch, rows, required=with_index)
        self._probed = [first, *others]
        self._require_equal([batch[0] for batch in self._probed])
        return [
            [row, label, _digest(image)] for row, label, image in zip(rows, first[1].tolist(), first[0], strict=True)
        ]

    def check_moved(self) -> None:
        """Move what `probes` read to the device, where hooks of the data module or the module may change it.

        Raises:
            InputError: the images are not the same each time.
        """
        self._require_equal([self.moved(batch) for batch in self._probed])

    def _require_equal(self, views: list[Tensor]) -> None:
        first, count = views[0], len(views[0])
        changed = torch.zeros(count, dtype=torch.bool, device=first.device)
        for view in views[1:]:
            changed |= (view != first).reshape(count, -1).any(1) if view.shape == first.shape else True
        if changed.any():
            raise InputError(
                f"the training transform is random ({int(changed.sum())} of {count} images differ between epochs): a cached "
                "teacher would see other images than the student; set data.augment=false, or in train_transform the "
                "options for crop and flip, or leave teacher_cache out"
            )


class Share(Sampler[list[int]]):
    """Batches r, r + W, r + 2W, … of all samples in order, which are made when they are asked for.

    Args:
        samples: number of samples N.
        batch_size: samples in a batch.
        rank: this process r, from 0.
        world: number of processes W.

    Example:
        >>> list(Share(7, 2, rank=1, world=2))
        [[2, 3], [6]]
    """

    def __init__(self, samples: int, batch_size: int, *, rank: int, world: int) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.starts = range(rank * batch_size, samples, world * batch_size)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield [Draw(row, 0) for row in range(start, min(start + self.batch_size, self.samples))]


def check_indexed(batch: Any, rows: list[int], *, required: bool) -> None:
    """Refuse a batch that is neither ``(x, targets)`` nor ``(x, targets, index)`` with these positions as the index.

    Args:
        batch: the batch.
        rows: the positions that were read.
        required: the index must be there.

    Raises:
        InputError: it is not.
    """
    size = len(batch) if isinstance(batch, list | tuple) else 0
    if size not in {2, 3} or not all(isinstance(part, Tensor) and part.shape[:1] == (len(rows),) for part in batch):
        raise InputError("a teacher cache needs batches (x, targets, index) of tensors with one row for each sample")
    if batch[1].ndim != 1 or batch[1].is_floating_point():
        raise InputError(f"a teacher cache needs integer labels (B,), got {batch[1].dtype} {tuple(batch[1].shape)}")
    if size == 2 and required:
        raise InputError(
            "the training batches do not say which samples they hold: set data.with_index=true, or wrap your data set in "
            "zoo.data.indexed.IndexedDataset"
        )
    if size == 3 and batch[2].tolist() != rows:
        raise InputError(
            "the index of a sample must be its position in the training data set: IndexedDataset must be the outermost "
            "wrapper"
        )


def _digest(image: Tensor) -> str:
    values = image.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype}\0{tuple(values.shape)}\0".encode())
    digest.update(np.asarray(values.reshape(-1).view(torch.uint8)).data)
    return digest.hexdigest()[:16]
