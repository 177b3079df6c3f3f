"""Images with captions by position, read by the batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.draws import random_words
from zoo.data.loading import Draw, epoch_of
from zoo.data.splits import Indices
from zoo.data.text import PairBatch
from zoo.data.transforms import TransformedImages
from zoo.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CaptionSource", "ImageTextPairs"]

_CAPTIONS = 6  # the stream of random numbers that chooses captions
_TRIES = 100  # a run that cannot read so many samples one after the other should stop


class CaptionSource(Protocol):
    """Images with captions by position; picklable, so that worker processes can have it."""

    def __len__(self) -> int: ...

    def image(self, row: int) -> Image:
        """Decode an image, mode RGB."""

    def captions(self, row: int) -> list[str]:
        """Return the captions of an image, at least one."""

    def caption_counts(self, rows: Indices) -> Indices:
        """Return how many captions images have."""

    def label(self, row: int) -> int | None:
        """Return the class of an image, None if there are no classes."""

    def place(self, row: int) -> str:
        """Say where an image is."""


class _Skipped:
    """Counts the samples that could not be read, and says so at the 1st, 10th, 100th, … of a process."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, error: InputError) -> None:
        self.count += 1
        if str(self.count).rstrip("0") == "1":
            warnings.warn(
                f"samples that could not be read and were skipped in this process: {self.count}; the last: {error}",
                stacklevel=2,
            )


class ImageTextPairs(Dataset[Any]):
    """Some images of a source with their captions.

    With a seed, for training: one item an image, with one of its captions, another each epoch; the caption and the view of
    the image depend on (seed, epoch, index) alone. Without one, for evaluation: one item a caption, in order.

    Args:
        source: all images.
        rows: the images of this data set (N,), as positions in the source.
        transform: from an RGB image to a tensor.
        tokens: from B captions to tokens (B, L).
        seed: number of the augmentations and the choice of captions; None for evaluation.
        every_caption: in evaluation, an item for every caption; otherwise only for the first of each image.
        skip: take the next sample that can be read in place of one that cannot (in evaluation: leave it out) instead of
            raising.

    Raises:
        InputError: when a batch is read: an image or a caption cannot be; with ``skip``, 100 samples on end, or none of a
            batch in evaluation.
    """

    def __init__(
        self,
        source: CaptionSource,
        rows: Indices,
        transform: Callable[[Image], Tensor],
        tokens: Callable[[Sequence[str]], Tensor],
        *,
        seed: int | None = None,
        every_caption: bool = True,
        skip: bool = False,
    ) -> None:
        self.source = source
        self.rows = rows
        self.tokens = tokens
        self.seed = seed
        self._transform = transform
        self._expand = seed is None and every_caption
        self._skipped = _Skipped() if skip else None

    @cached_property
    def _items(self) -> tuple[Indices, Indices, TransformedImages]:
        """The image and the caption of each item, and the views; not before it is asked for, as it may read captions."""
        rows, which = self.rows, np.zeros(len(self.rows), dtype=np.int64)
        if self._expand:
            counts = self.source.caption_counts(self.rows)
            rows = np.repeat(self.rows, counts)
            which = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        unlabelled = np.zeros(len(self.source), dtype=np.int64)
        return rows, which, TransformedImages(self.source, unlabelled, rows, self._transform, seed=self.seed)

    def __len__(self) -> int:
        return len(self._items[0])

    def __getitem__(self, index: int) -> PairBatch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> PairBatch:
        epoch, views = epoch_of(indices), dict[int, Tensor]()  # an image with five captions is decoded once a batch
        found = [self._sample(int(index), epoch, views) for index in indices]
        samples = [sample for sample in found if sample is not None]
        if not samples:
            raise InputError(
                f"no sample of a batch can be read, among them {self.source.place(int(self._items[0][indices[0]]))}"
            )
        images, texts, labels, rows = zip(*samples, strict=True)
        batch = {"image": torch.stack(images), "text": self.tokens(texts), "id": torch.tensor(rows)}
        if None not in labels:
            batch["label"] = torch.tensor(labels)
        return batch

    def _sample(self, index: int, epoch: int, views: dict[int, Tensor]) -> tuple[Tensor, str, int | None, int] | None:
        """Read a sample, or by the rule for those that cannot be read another one or none."""
        if self._skipped is None:
            return self._read(index, epoch, views)
        for step in range(1 if self.seed is None else _TRIES):
            try:
                return self._read((index + step) % len(self), epoch, views)
            except InputError as error:
                self._skipped.note(error)
                last = error
        if self.seed is None:
            return None
        raise InputError(f"{_TRIES} samples on end cannot be read; the last: {last}")

    def _read(self, index: int, epoch: int, views: dict[int, Tensor]) -> tuple[Tensor, str, int | None, int]:
        every_row, every_which, images = self._items
        row, which = int(every_row[index]), int(every_which[index])
        captions = self.source.captions(row)
        if self.seed is not None:
            which = int(random_words((_CAPTIONS, self.seed, epoch), [index])[0]) % len(captions)
        if row not in views:
            views[row] = images.__getitems__([Draw(index, epoch)])[0][0]
        return views[row], captions[which], self.source.label(row), row
