"""scikit-learn's handwritten digits: 1,797 real 8x8 images that need no download, the zoo's smallest real data set.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (its test part).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from zoo.data.loading import SplitDataModule, Splits
from zoo.data.splits import Indices, stratified_split, stratified_subset
from zoo.data.tensors import ImageTensors
from zoo.errors import InputError

__all__ = ["DigitsDataModule"]

_SIDE = 8
_MEAN, _STD = 0.3054, 0.3759


class DigitsDataModule(SplitDataModule):
    """Handwritten digits, 10 classes, in memory.

    Pixels 0 … 16 are divided by 16 and normalised with mean 0.3054 and standard deviation 0.3759, those of the training
    split with default arguments. With default arguments there are 1,259 training, 179 validation and 359 test images.
    Which image belongs to which split depends on ``split_seed`` and the shares alone.

    Args:
        batch_size: samples in a batch and process, at least 1.
        image_size: side of the images in pixels, at least 8; larger ones are upsampled (bilinear), once.
        channels: 1, or 3 for networks that expect colour (the channel is repeated).
        augment: shift each training image by -1, 0 or 1 of its original pixels in both directions.
        train_samples: keep so many training images, of each class in proportion and at least one; None keeps all.
            A smaller set is contained in a larger one. Validation and test stay whole.
        val_share: share of all images for validation, in [0, 1).
        test_share: share of all images for the test, in [0, 1).
        split_seed: number of the split and of the choice for ``train_samples``.
        seed: number of the training order and of the augmentation.
        num_workers: processes that read the data; 0 is fastest, the data are in memory.
        drop_last: leave out a last training batch that is not full.
        pin_memory: copy batches to page-locked memory, for a GPU.
        with_index: training batches are ``(images, labels, index)``, with the position of each sample in the training
            split; all other batches stay pairs.

    Raises:
        InputError: an argument is out of its range (``train_samples`` and the shares are checked when the data are read).

    Example:
        >>> data = DigitsDataModule(batch_size=100, image_size=32, channels=3)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, data.num_classes
        (torch.Size([100, 3, 32, 32]), 10)
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        image_size: int = 8,
        channels: int = 1,
        augment: bool = False,
        train_samples: int | None = None,
        val_share: float = 0.1,
        test_share: float = 0.2,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
        with_index: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
            pin_memory=pin_memory,
            with_index=with_index,
        )
        if image_size < _SIDE:
            raise InputError(f"image_size must be at least {_SIDE}, the side of the original images, got {image_size}")
        if channels not in {1, 3}:
            raise InputError(f"channels must be 1 or 3, got {channels}")
        self.image_size = image_size
        self.channels = channels
        self.augment = augment
        self.train_samples = train_samples
        self.val_share = val_share
        self.test_share = test_share
        self.split_seed = split_seed
        self.mean = [_MEAN] * channels
        self.std = [_STD] * channels

    @property
    def class_names(self) -> list[str]:
        """The digits "0" … "9"."""
        return [str(digit) for digit in range(10)]

    def _load(self) -> Splits:
        from sklearn.datasets import load_digits

        pixels, target = load_digits(return_X_y=True)
        shares = {"val_share": self.val_share, "test_share": self.test_share}
        val, test, train = stratified_split(target, shares, seed=self.split_seed)
        if self.train_samples is not None:
            train = train[stratified_subset(target[train], self.train_samples, seed=self.split_seed)]
        images = torch.from_numpy(pixels.astype(np.float32) / 16.0).view(-1, 1, _SIDE, _SIDE)
        if self.image_size != _SIDE:
            images = F.interpolate(
                images, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False
            )
        images = images.repeat(1, self.channels, 1, 1)
        labels = torch.from_numpy(target.astype(np.int64))

        def subset(indices: Indices | Sequence[int], *, margin: int = 0) -> ImageTensors:
            return ImageTensors(
                images,
                labels,
                indices,
                mean=self.mean,
                std=self.std,
                margin=margin,
                step=max(margin, 1),
                seed=self.seed,
            )

        return Splits(
            train=subset(train, margin=round(self.image_size / _SIDE) if self.augment else 0),
            train_eval=subset(train),
            val=subset(val) if len(val) else None,
            test=subset(test) if len(test) else None,
        )
