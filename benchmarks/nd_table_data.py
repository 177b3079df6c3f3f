"""The images of `nd_table.py`: all of them as uint8 on the device, cropped, flipped and normalised there by the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.data import DigitsDataModule, ParquetImagesDataModule
from zoo.data.splits import stratified_subset
from zoo.errors import InputError

_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class Images:
    """A data set: images (N, H, W, C), uint8, and labels, by split; the crops' padding in pixels, and whether to flip."""

    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    margin: int
    flip: bool
    num_classes: int

    @property
    def channels(self) -> int:
        return self.images["train"].shape[-1]


class Batches:
    """Batches of a split: in order, or shuffled and augmented as a function of (seed, epoch) alone.

    Training batches are all full: what is left over at the end of an epoch, other images each time, is left out.
    """

    def __init__(self, data: Images, split: str, batch: int, *, training: bool = False, seed: int = 0) -> None:
        self.labels = data.labels[split]
        self.device = self.labels.device
        self.samples = len(self.labels)
        self.batch = batch
        self.training = training
        self.seed = seed
        self.epoch = 0
        self.flip = data.flip
        self.margin = data.margin if training else 0
        sides = (0, 0, self.margin, self.margin, self.margin, self.margin)
        self.images = F.pad(data.images[split], sides)
        std = torch.tensor(data.std, device=self.device)
        self.scale = 1 / (255 * std)
        self.offset = -torch.tensor(data.mean, device=self.device) / std
        self.side = data.images[split].shape[1]

    def __len__(self) -> int:
        return self.samples // self.batch if self.training else -(-self.samples // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.training:
            for start in range(0, self.samples, self.batch):
                rows = slice(start, start + self.batch)
                yield self._floats(self.images[rows]), self.labels[rows]
            return
        draw = torch.Generator(self.device).manual_seed(1_000_003 * self.seed + self.epoch)
        self.epoch += 1
        order = torch.randperm(self.samples, generator=draw, device=self.device)
        places, far = (self.samples,), 2 * self.margin + 1
        down = torch.randint(far, places, generator=draw, device=self.device)
        right = torch.randint(far, places, generator=draw, device=self.device)
        flipped = torch.rand(places, generator=draw, device=self.device) < (0.5 if self.flip else 0.0)
        along = torch.arange(self.side, device=self.device)
        for start in range(0, len(self) * self.batch, self.batch):
            rows = order[start : start + self.batch]
            lines = down[rows, None] + along
            columns = right[rows, None] + torch.where(flipped[rows, None], self.side - 1 - along, along)
            windows = self.images[rows[:, None, None], lines[:, :, None], columns[:, None, :]]
            yield self._floats(windows), self.labels[rows]

    def _floats(self, images: Tensor) -> Tensor:
        # (B, C, H, W) with the channels last in memory, as the convolutions like it.
        return images.float().mul_(self.scale).add_(self.offset).permute(0, 3, 1, 2)


class Splits(pl.LightningDataModule):
    """The loaders that a fit asks for; class means come from the clean training images."""

    def __init__(self, data: Images, batch: int, *, seed: int) -> None:
        super().__init__()
        self.data = data
        self.batch = batch
        self.seed = seed

    def batches(self, split: str) -> Batches:
        return Batches(self.data, split, 500)

    def train_dataloader(self) -> Batches:
        return Batches(self.data, "train", self.batch, training=True, seed=self.seed)

    def train_eval_dataloader(self) -> Batches:
        return self.batches("train")


def load(name: str, path: str, train_samples: int | None, test_samples: int | None, *, device: str) -> Images:
    """Read a data set, take stratified subsets of it where asked, and put it on the device."""
    if name == "digits":
        digits = DigitsDataModule(val_share=0.0)
        mean, std, margin = digits.mean, digits.std, 1
        splits, classes = digits.splits, digits.num_classes
    else:
        files = [Path(path, f"cifar10-{split}.parquet") for split in ("train", "test")]
        missing = [str(file) for file in files if not file.exists()]
        if missing:
            raise InputError(f"--path: {' and '.join(missing)} not found; see the help of --path")
        cifar = ParquetImagesDataModule(str(files[0]), test=str(files[1]), val_share=0.0, cache="decoded")
        (mean, std), margin = _CIFAR10, 4
        splits, classes = cifar.splits, cifar.num_classes
    images, labels = {}, {}
    for split, samples in (("train", train_samples), ("test", test_samples)):
        part = getattr(splits, split)
        rows = part.indices.numpy()
        if samples is not None:
            rows = rows[stratified_subset(part.labels[rows].numpy(), samples, seed=0)]
        chosen = part.images[torch.from_numpy(np.asarray(rows))]
        if chosen.is_floating_point():
            chosen = (255 * chosen).round().to(torch.uint8)
        images[split] = chosen.permute(0, 2, 3, 1).contiguous().to(device)
        labels[split] = part.labels[rows].to(device)
    return Images(images, labels, mean, std, margin, flip=name != "digits", num_classes=classes)
