"""Images that are decoded one by one and go through timm's transforms."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.draws import random_words
from zoo.data.loading import Batch, epoch_of
from zoo.data.splits import Indices
from zoo.errors import InputError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageSource",
    "TransformedImages",
    "check_normalisation",
    "check_options",
    "naming_image",
    "timm_transform",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Transform = Callable[["Image"], Tensor]

# What timm.data.create_transform heeds in each of its modes; it takes every option in both and says nothing.
_TRAIN_OPTIONS = (
    "no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob",
    "grayscale_prob", "gaussian_blur_prob", "auto_augment", "interpolation", "re_prob", "re_mode", "re_count",
    "re_num_splits",
)  # fmt: skip
_EVAL_OPTIONS = ("interpolation", "crop_pct", "crop_mode", "crop_border_pixels")


def check_options(name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse options that would have no effect.

    Args:
        name: the argument that holds the options.
        options: the options by name.
        allowed: the names that exist.

    Raises:
        InputError: an option is not among ``allowed``.
    """
    for key in options:
        if key not in allowed:
            raise InputError(f"{name} has no option {key!r}.{nearest(key, allowed)} It has: {', '.join(allowed)}")


def timm_transform(
    image_size: int,
    *,
    train: bool,
    mean: Sequence[float],
    std: Sequence[float],
    options: Mapping[str, Any] | None = None,
) -> Transform:
    """Build timm's transform from an RGB image to a normalised tensor.

    Args:
        image_size: side of the result in pixels, at least 1.
        train: the random transform of training; otherwise the fixed one.
        mean: mean of each of three channels in [0, 1].
        std: standard deviation of each of three channels, positive.
        options: further arguments of ``timm.data.create_transform``, those that have an effect in this mode.

    Returns:
        A function of a PIL image that returns a float32 tensor (3, image_size, image_size).

    Raises:
        InputError: an argument is out of its range, or timm refuses an option.
    """
    from timm.data.transforms_factory import create_transform

    name = "train_transform" if train else "eval_transform"
    check_options(name, options or {}, _TRAIN_OPTIONS if train else _EVAL_OPTIONS)
    check_normalisation(mean, std)
    if image_size < 1:
        raise InputError(f"image_size must be at least 1, got {image_size}")
    try:
        transform: Transform = create_transform(
            image_size, is_training=train, mean=tuple(mean), std=tuple(std), **(options or {})
        )
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        # What timm 1.0 raises, depending on the option, for a value that it cannot use.
        raise InputError(f"{name}={dict(options or {})} is refused by timm.data.create_transform: {error!r}") from error
    return transform


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse a mean and standard deviation that cannot normalise colour images.

    Args:
        mean: should have three numbers.
        std: should have three positive numbers.

    Raises:
        InputError: they have not.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"mean and std must have three numbers each, std positive, got {list(mean)} and {list(std)}")


@contextmanager
def naming_image(place: Callable[[int], str], row: int) -> Iterator[None]:
    """Turn what PIL raises for a file that is missing, truncated or no image into an error that names the image.

    Args:
        place: says where the image of a row is.
        row: the image that is decoded inside.

    Raises:
        InputError: the image cannot be decoded.
    """
    from PIL.Image import DecompressionBombError

    try:
        yield
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        raise InputError(f"{place(row)}: the image cannot be decoded: {error}") from error


class ImageSource(Protocol):
    """Decoded images by position; picklable, so that worker processes can have it."""

    def image(self, row: int) -> Image:
        """Decode the image at a position.

        Args:
            row: position, from 0.

        Returns:
            The image, mode RGB.

        Raises:
            InputError: it cannot be decoded; the message says which.
        """


@contextmanager
def _restored_random_state() -> Iterator[None]:
    """Put the three random states that timm's transforms draw from back as they were."""
    ours, torchs, numpys = random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(ours)
        torch.set_rng_state(torchs)
        np.random.set_state(numpys)  # noqa: NPY002


class TransformedImages(Dataset[Batch]):
    """A subset of an image source under a transform.

    With a seed, the random states of Python, numpy and torch are set before each image from (seed, epoch, index) and put
    back after the batch, so that the view of a sample does not depend on who reads it and when.

    Args:
        source: all images.
        labels: label of each image of the source (N,).
        indices: the samples of this data set, as positions in the source.
        transform: from an RGB image to a tensor; the shapes of a batch agree.
        seed: number of the augmentations; None for a transform that draws nothing.
    """

    def __init__(
        self, source: ImageSource, labels: Indices, indices: Indices, transform: Transform, *, seed: int | None = None
    ) -> None:
        self.source = source
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))
        self.indices = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = self.indices[torch.from_numpy(np.array(indices, dtype=np.int64))]
        if self.seed is None:
            views = [self.transform(self.source.image(row)) for row in rows.tolist()]
        else:
            words = random_words((self.seed, epoch_of(indices)), indices)
            with _restored_random_state():
                views = [self._view(row, int(word)) for row, word in zip(rows.tolist(), words, strict=True)]
        return torch.stack(views), self.labels[rows]

    def _view(self, row: int, word: int) -> Tensor:
        image = self.source.image(row)
        random.seed(word)
        torch.default_generator.manual_seed(word >> 1)  # torch.manual_seed would also reseed the GPUs
        np.random.seed(word & 0xFFFFFFFF)  # noqa: NPY002
        return self.transform(image)
