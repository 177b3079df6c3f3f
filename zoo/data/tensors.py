"""Images that all fit into memory: a data set that is indexed, augmented and normalised by the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.draws import random_words
from zoo.data.loading import Batch, epoch_of
from zoo.data.splits import Indices

__all__ = ["ImageTensors", "cut_windows"]


def cut_windows(images: Tensor, rows: Tensor, down: Tensor, right: Tensor, *, margin: int) -> Tensor:
    """Cut a window of the images' own size out of chosen images after padding all with ``margin`` zeros on every side.

    Args:
        images: images (N, C, H, W).
        rows: which image each window is cut from (B,), from 0 to N - 1.
        down: first row of each window in the padded image (B,), from 0 to 2 · margin; ``margin`` leaves the image in place.
        right: first column of each window (B,), likewise.
        margin: width of the padding in pixels, at least 0.

    Returns:
        Windows (B, C, H, W).

    Example:
        >>> zero, one, two = (torch.tensor([number]) for number in range(3))
        >>> cut_windows(torch.ones(1, 1, 2, 2), zero, two, one, margin=1)
        tensor([[[[1., 1.],
                  [0., 0.]]]])
    """
    channels, height, width = images.shape[1:]
    padded = F.pad(images, (margin, margin, margin, margin)).contiguous()
    tall, wide = padded.shape[-2:]
    # Every run of W pixels in memory is a row of this view, so that index_select copies rows and not pixels: 4 times as
    # fast as indexing by pixel or by window.
    runs = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
    planes = rows[:, None] * channels + torch.arange(channels)  # (B, C)
    lines = down[:, None] + torch.arange(height)  # (B, H)
    starts = (planes[:, :, None] * tall + lines[:, None, :]) * wide + right[:, None, None]  # (B, C, H)
    return runs.index_select(0, starts.flatten()).view(len(rows), channels, height, width)


class ImageTensors(Dataset[Batch]):
    """A subset of images held in one tensor, read by the batch.

    Several data sets may share one tensor. The shift and the flip of a sample depend on (seed, epoch, index) alone.

    Args:
        images: all images (N, C, H, W), float in [0, 1] or uint8.
        labels: all labels (N,), int64.
        indices: the samples of this data set, as positions in ``images``.
        mean: mean of each channel in [0, 1], subtracted.
        std: standard deviation of each channel, divided by.
        margin: random shifts go up to so many pixels in both directions; the border is filled with zeros (black).
        step: shifts are multiples of so many pixels; divides ``margin``.
        flip: probability of a horizontal flip.
        seed: number of the augmentations.

    Example:
        >>> data = ImageTensors(torch.ones(2, 1, 1, 1), torch.tensor([4, 7]), [1], mean=[0.5], std=[0.25])
        >>> data[0]
        (tensor([[[2.]]]), tensor(7))
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Indices | Sequence[int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        margin: int = 0,
        step: int = 1,
        flip: float = 0.0,
        seed: int = 0,
    ) -> None:
        assert margin % step == 0
        self.images = images
        self.labels = labels
        self.indices = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        self.margin = margin
        self.step = step
        self.flip = flip
        self.seed = seed
        deviation = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        top = 1.0 if images.is_floating_point() else 255.0
        self._scale = 1.0 / (top * deviation)
        self._offset = -torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) / deviation

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = self.indices[torch.from_numpy(np.array(indices, dtype=np.int64))]
        images = self.images.index_select(0, rows)
        if self.margin or self.flip:
            images = self._augment(images, indices)
        return images.float().mul_(self._scale).add_(self._offset), self.labels[rows]

    def _augment(self, images: Tensor, indices: list[int]) -> Tensor:
        words = random_words((self.seed, epoch_of(indices)), indices)
        rows = torch.arange(len(images))
        if self.flip:
            flipped = (words >> np.uint64(32)) < np.uint64(round(self.flip * 2**32))
            rows += len(images) * torch.from_numpy(flipped)
            images = torch.cat((images, images.flip(-1)))
        if self.margin == 0:
            return images.index_select(0, rows)
        # 16 bits for each direction, 32 for the flip: for 9 places a probability is off by at most 1 in 7000.
        places = np.uint64(2 * self.margin // self.step + 1)
        down, right = (
            torch.from_numpy(((words >> bits & np.uint64(0xFFFF)) % places).astype(np.int64)) * self.step
            for bits in (np.uint64(0), np.uint64(16))
        )
        return cut_windows(images, rows, down, right, margin=self.margin)
