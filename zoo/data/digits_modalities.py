"""The handwritten digits seen in two ways: as images, and as the shadows they cast from several sides.

A shadow is what a scanner measures behind an object: the sum of the pixels along parallel lines. Eight sides give an array
of 8 x 8 numbers (a small sinogram) in which rows and columns of the image are two of the rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.digits import DigitsDataModule
from zoo.data.loading import Splits
from zoo.data.tensors import ImageTensors
from zoo.data.text import PairBatch
from zoo.errors import InputError

__all__ = ["DigitsModalitiesDataModule", "ProfiledDigits", "shadows"]


def shadows(images: Tensor, angles: int) -> Tensor:
    """Sum images along parallel lines, from several sides.

    Each pixel counts for the two bins that its projected centre lies between, in proportion; what falls outside of the
    middle S bins is lost (of the corners, at slanting angles).

    Args:
        images: square images (N, 1, S, S) in [0, 1].
        angles: number of directions A, at least 1, evenly over half a turn; the first sums each column.

    Returns:
        (N, 1, A, S) in [0, 1], the sums divided by S.

    Example:
        >>> image = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
        >>> shadows(image, 2)
        tensor([[[[1.0000, 0.0000],
                  [0.5000, 0.5000]]]])
    """
    side = images.shape[-1]
    places = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    turns = torch.arange(angles, dtype=torch.float64) * torch.pi / angles
    # Position of each pixel's centre on the axis of each direction, in bins: (A, S, S).
    at = turns.cos()[:, None, None] * places + turns.sin()[:, None, None] * places[:, None] + (side - 1) / 2
    weights = (1 - (at[..., None] - torch.arange(side)).abs()).clamp_min(0.0)
    sums = torch.einsum("ncij,aijb->ncab", images.double(), weights) / side
    return sums.clamp(0.0, 1.0).float()


class ProfiledDigits(Dataset[Any]):
    """A split of the digits with the shadows of each image, read by the batch.

    Args:
        images: the images and labels.
        profiles: the shadows of all images (N, 1, A, S).
    """

    def __init__(self, images: ImageTensors, profiles: Tensor) -> None:
        self.images = images
        self.profiles = profiles

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> PairBatch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> PairBatch:
        images, labels = self.images.__getitems__(indices)
        rows = self.images.indices[torch.from_numpy(np.array(indices, dtype=np.int64))]
        return {"image": images, "profile": self.profiles[rows], "label": labels, "id": rows}


class DigitsModalitiesDataModule(DigitsDataModule):
    """Handwritten digits as images and as shadows, 10 classes, in memory.

    The images and splits are those of `DigitsDataModule`, unaugmented. A batch is a dict: "image" (B, 1, 8, 8), normalised
    as there, "profile" (B, 1, A, 8) in [0, 1], the shadows from A sides (`shadows`), "label" (B,) and "id" (B,), the number
    of the image among all 1,797.

    Args:
        angles: number of sides A, at least 1.
        batch_size: samples in a batch and process, at least 1.
        train_samples: keep so many training images, of each class in proportion and at least one; None keeps all.
        val_share: share of all images for validation, in [0, 1).
        test_share: share of all images for the test, in [0, 1).
        split_seed: number of the split and of the choice for ``train_samples``.
        seed: number of the training order.
        num_workers: processes that read the data; 0 is fastest, the data are in memory.
        drop_last: leave out a last training batch that is not full.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> data = DigitsModalitiesDataModule(batch_size=100)
        >>> batch = next(iter(data.train_dataloader()))
        >>> {name: tuple(value.shape) for name, value in batch.items()}
        {'image': (100, 1, 8, 8), 'profile': (100, 1, 8, 8), 'label': (100,), 'id': (100,)}
        >>> data.valid_range["profile"]
        (0.0, 1.0)
    """

    def __init__(
        self,
        *,
        angles: int = 8,
        batch_size: int = 64,
        train_samples: int | None = None,
        val_share: float = 0.1,
        test_share: float = 0.2,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            train_samples=train_samples,
            val_share=val_share,
            test_share=test_share,
            split_seed=split_seed,
            seed=seed,
            num_workers=num_workers,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )
        if angles < 1:
            raise InputError(f"angles must be at least 1, got {angles}")
        self.angles = angles

    @property
    def valid_range(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value that an input of each modality can have."""
        (mean,), (std,) = self.mean, self.std
        return {"image": ((0.0 - mean) / std, (1.0 - mean) / std), "profile": (0.0, 1.0)}

    def _load(self) -> Splits:
        found = super()._load()
        train: Any = found.train
        profiles = shadows(train.images, self.angles)

        def profiled(split: Any) -> Any:
            return None if split is None else ProfiledDigits(split, profiles)

        return replace(
            found, train=profiled(found.train), train_eval=profiled(found.train_eval), val=profiled(found.val),
            test=profiled(found.test),
        )  # fmt: skip
