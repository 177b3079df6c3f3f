"""Class means of a frozen tower's features over the training images of a run."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from zoo.data.loading import Draw
from zoo.errors import InputError
from zoo.metrics import ClassMeans
from zoo.towers import Tower

__all__ = ["compute_class_means"]


@torch.no_grad()
def compute_class_means(
    tower: Tower,
    trainer: Trainer,
    *,
    num_classes: int,
    views: int | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    dim: int | None = None,
    split_batch: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a frozen tower over the training images and average its features by class.

    Every image counts once a view and process, without the padding of a distributed sampler; sums and counts are added up
    over processes before they are divided. The random generators are as before afterwards. An iterable data set is taken
    as it comes, because it cannot be divided.

    Args:
        tower: the frozen tower.
        trainer: the trainer that is about to fit; its data module or loaders give the images.
        num_classes: number of classes K.
        views: passes over the images under the training transform; None takes one pass over
            ``trainer.datamodule.train_eval_dataloader()`` where there is one, and else one view.
        features: inputs -> features (B, dim), where they are others than ``tower.features``.
        dim: width of the features that ``features`` gives; needed with it.
        split_batch: batch -> (inputs, targets), where a batch is no such pair. Soft labels (B, K) count for their largest
            class.

    Returns:
        Means (K, D), float64 where the device has it, zero for classes without images, and counts (K,), int64.

    Raises:
        InputError: a label is out of range, or the tower's features are not finite.
    """
    assert (features is None) == (dim is None)
    features = features or tower.features
    metric = ClassMeans(num_classes, dim or tower.dim).to(next(tower.parameters()).device)
    data = getattr(trainer, "datamodule", None)
    clean = getattr(data, "train_eval_dataloader", None) if views is None else None
    loaders = [clean()] if clean is not None else [_one_view(trainer, view) for view in range(views or 1)]
    with (
        isolate_rng(),
        tqdm(
            total=_count(loaders),
            desc="class means",
            leave=False,
            disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
        ) as bar,
    ):
        for loader in loaders:
            for batch in loader:
                moved = trainer.strategy.batch_to_device(batch)
                x, targets = moved[:2] if split_batch is None else split_batch(moved)
                metric.update(features(x), targets.argmax(1) if targets.ndim == 2 else targets)
                bar.update()
    means: Tensor = metric.compute()
    return means, metric.counts


def _count(loaders: list[Any]) -> int | None:
    """Return the number of batches, or None where it is not known."""
    try:
        return sum(map(len, loaders))
    except TypeError:  # a loader over an iterable data set has a length only where that has one
        return None


def _one_view(trainer: Trainer, view: int) -> DataLoader[Any]:
    """Return a loader of this process's share of the training images, each once; as it comes for an iterable data set."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise InputError(
            f"class means need one training DataLoader, got {type(loader).__name__}: give the data module a method "
            "train_eval_dataloader() that returns one"
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return loader
    # A Draw is an index that tells the zoo's data sets which epoch's augmentation to use; to any other it is an integer.
    indices = [
        Draw(index, view) for index in range(trainer.global_rank, len(cast("Sized", dataset)), trainer.world_size)
    ]
    return DataLoader(
        Subset(dataset, indices),
        batch_size=loader.batch_size or getattr(loader.sampler, "batch_size", 256),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn if loader.batch_size else None,
        worker_init_fn=loader.worker_init_fn,
    )
