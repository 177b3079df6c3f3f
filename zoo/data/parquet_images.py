"""Image classification from parquet files with a column of encoded images and one of labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.loading import Batch, SplitDataModule, Splits
from zoo.data.parquet_table import ParquetTable, parquet_files
from zoo.data.splits import Indices, stratified_split
from zoo.data.tensors import ImageTensors
from zoo.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TransformedImages,
    check_normalisation,
    check_options,
    timm_transform,
)
from zoo.errors import InputError, nearest

__all__ = ["ParquetImagesDataModule"]

_SIZE = 224
_CACHED_OPTIONS: Mapping[str, Any] = {"crop_padding": 4, "hflip": 0.5}


def _encode(table: ParquetTable, labels: Sequence[int | str], names: list[str], *, textual: bool) -> Indices:
    """Turn the labels of a table into integers, refusing those that are no class."""
    if isinstance(labels[0], str) != textual:
        kinds = ("strings", "integers") if textual else ("integers", "strings")
        raise InputError(f"{table.place(0)}: labels are {kinds[1]}, in the training data they are {kinds[0]}")
    if not textual:
        codes = np.asarray(labels)
        wrong = np.flatnonzero((codes < 0) | (codes >= len(names)))
        if len(wrong):
            raise InputError(
                f"{table.place(int(wrong[0]))}: label {codes[wrong[0]]} is outside 0 … {len(names) - 1}, the {len(names)} "
                "classes"
            )
        return codes.astype(np.int64)
    known = {name: code for code, name in enumerate(names)}
    for row, label in enumerate(labels):
        if label not in known:
            raise InputError(f"{table.place(row)}: label {label!r} is no class.{nearest(str(label), names)}")
    return np.asarray([known[str(label)] for label in labels], dtype=np.int64)


def _names_from(labels: Sequence[int | str], declared: list[str] | None, argument: str) -> list[str]:
    """Name the classes: as declared, else the strings in sorted order, else the numbers 0 … K-1, none left out."""
    if declared is not None:
        return declared
    classes: list[Any] = sorted(set(labels))
    if isinstance(classes[0], int) and classes != list(range(len(classes))):
        absent = sorted(set(range(max(classes[-1], 0) + 1)) - set(classes))[:5]
        raise InputError(
            f"{argument}: integer labels must be 0 … K-1 with every class present, got {classes[0]} … {classes[-1]}"
            + (f" without {', '.join(map(str, absent))}" if absent else "")
            + "; renumber them, store strings, or name all classes with class_names"
        )
    return [str(name) for name in classes]


class ParquetImagesDataModule(SplitDataModule):
    """Image classification from parquet files, in the layout that Hugging Face `datasets` writes.

    The image column holds encoded images (PNG, JPEG, …), binary or as struct(bytes, path); the label column holds integers
    0 … K-1, or strings, which are numbered in sorted order. Class names that the files declare are used.

    Without a cache, the encoded images stay in memory and are decoded when they are needed, in worker processes if there
    are any, and go through timm's transforms as in `ImageFolderDataModule`. With ``cache="decoded"``, all images are decoded
    once and kept as uint8; training batches then get a random crop after zero padding and a flip, computed for the batch
    at once, and evaluation batches nothing but the normalisation. That suits small images of equal size (CIFAR-10 takes
    180 MB, and 0 workers are the fastest).

    Args:
        train: file, pattern with ``*``, ``hf://datasets/owner/name/path.parquet[@revision]``, or a list of those.
        test: the same for the test split; None if there is none.
        val: the same for the validation split; None takes a stratified part of the training images.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        class_names: name of each class in the order of the labels (for string labels, the strings); None takes those that
            the files declare or, failing that, the labels themselves.
        image_size: side of the images in pixels that the model sees. None is the images' own size with a cache, else 224.
            With a cache, images of another size are resized once (bilinear, without keeping their proportions).
        cache: "decoded" to decode once, None to decode when needed.
        batch_size: samples in a batch and process, at least 1.
        num_workers: processes that read the data; 0 reads in the training process.
        val_share: share of the training images for validation, in [0, 1), if ``val`` is None.
        split_seed: number of the split.
        seed: number of the training order and of the augmentations.
        mean: mean of each channel in [0, 1]; ImageNet's by default.
        std: standard deviation of each channel; ImageNet's by default.
        train_transform: with a cache, ``crop_padding`` (pixels, 4) and ``hflip`` (probability, 0.5); otherwise options of
            timm's training transform.
        eval_transform: options of timm's evaluation transform; none with a cache.
        drop_last: leave out a last training batch that is not full.
        pin_memory: copy batches to page-locked memory, for a GPU.
        with_index: training batches are ``(images, labels, index)``, with the position of each sample in the training
            split; all other batches stay pairs.

    Raises:
        InputError: an argument is out of its range or an option unknown. When the data are read: a file or column is
            missing, a label is null or no class, or (with a cache) an image cannot be decoded or has another size; without
            a cache, the batch of an image that cannot be decoded raises it.

    Example:
        >>> import io, tempfile
        >>> import pyarrow as pa, pyarrow.parquet as pq
        >>> from PIL import Image
        >>> file, png = tempfile.mkdtemp() + "/train.parquet", io.BytesIO()
        >>> Image.new("RGB", (32, 32), "white").save(png, "PNG")
        >>> pq.write_table(pa.table({"img": [png.getvalue()] * 20, "label": ["cat", "dog"] * 10}), file)
        >>> data = ParquetImagesDataModule(file, cache="decoded", mean=[0.5] * 3, std=[0.5] * 3)
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> images.shape, images.mean().item(), labels.tolist(), data.class_names
        (torch.Size([2, 3, 32, 32]), 1.0, [0, 1], ['cat', 'dog'])
    """

    def __init__(
        self,
        train: str | list[str],
        *,
        test: str | list[str] | None = None,
        val: str | list[str] | None = None,
        image_column: str = "img",
        label_column: str = "label",
        class_names: list[str] | None = None,
        image_size: int | None = None,
        cache: Literal["decoded"] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        val_share: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        train_transform: dict[str, Any] | None = None,
        eval_transform: dict[str, Any] | None = None,
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
        if cache not in {None, "decoded"}:
            raise InputError(f"cache must be 'decoded' or None, got {cache!r}")
        self.train = train
        self.test = test
        self.val = val
        self.image_column = image_column
        self.label_column = label_column
        self.image_size = image_size
        self.cache = cache
        self.val_share = val_share
        self.split_seed = split_seed
        self.mean = list(mean)
        self.std = list(std)
        if cache:
            self._check_cached(train_transform or {}, eval_transform or {})
        else:
            size = _SIZE if image_size is None else image_size
            self._train_transform = timm_transform(size, train=True, mean=mean, std=std, options=train_transform)
            self._eval_transform = timm_transform(size, train=False, mean=mean, std=std, options=eval_transform)
        self._augmentation = {**_CACHED_OPTIONS, **(train_transform or {})}
        self._declared = class_names
        self._labelled: tuple[ParquetTable, Indices, list[str], bool] | None = None

    def _check_cached(self, train_transform: dict[str, Any], eval_transform: dict[str, Any]) -> None:
        check_options("train_transform with cache='decoded'", train_transform, list(_CACHED_OPTIONS))
        check_options("eval_transform with cache='decoded'", eval_transform, [])
        check_normalisation(self.mean, self.std)
        padding, flip = ({**_CACHED_OPTIONS, **train_transform}[name] for name in _CACHED_OPTIONS)
        if not isinstance(padding, int) or not 0 <= padding <= 1000:
            raise InputError(f"crop_padding must be an integer from 0 to 1000, got {padding!r}")
        if not isinstance(flip, int | float) or not 0 <= flip <= 1:
            raise InputError(f"hflip must be a probability, got {flip!r}")
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"image_size must be at least 1, got {self.image_size}")

    @property
    def class_names(self) -> list[str]:
        """Name of each class, in the order of the labels; reads the training labels, but no image."""
        return list(self._training()[2])

    def prepare_data(self) -> None:
        """Download the files named by ``hf://``; Lightning calls this in one process only."""
        for argument in ("train", "val", "test"):
            names = getattr(self, argument)
            if names is not None:
                parquet_files(argument, names)

    def _training(self) -> tuple[ParquetTable, Indices, list[str], bool]:
        if self._labelled is None:
            table = self._table("train", self.train)
            labels = table.labels()
            declared = self._declared if self._declared is not None else table.declared_names()
            names, textual = _names_from(labels, declared, "train"), isinstance(labels[0], str)
            self._labelled = table, _encode(table, labels, names, textual=textual), names, textual
        return self._labelled

    def _table(self, argument: str, names: str | list[str]) -> ParquetTable:
        return ParquetTable(parquet_files(argument, names), self.image_column, self.label_column)

    def _load(self) -> Splits:
        table, labels, names, textual = self._training()
        rest, parts = np.arange(len(labels)), np.arange(0)
        if self.val is None:
            parts, rest = stratified_split(labels, {"val_share": self.val_share}, seed=self.split_seed)
        make = self._maker(table, labels)

        def own(argument: str, files: str | list[str] | None) -> Dataset[Batch] | None:
            if files is None:
                return None
            other = self._table(argument, files)
            codes = _encode(other, other.labels(), names, textual=textual)
            return self._maker(other, codes)(np.arange(len(codes)), False)

        return Splits(
            train=make(rest, True),
            train_eval=make(rest, False),
            val=make(parts, False) if len(parts) else own("val", self.val),
            test=own("test", self.test),
        )

    def _maker(self, table: ParquetTable, labels: Indices) -> Callable[[Indices, bool], Dataset[Batch]]:
        """Return a function of rows and ``training`` that makes a data set of these rows of the table."""
        if self.cache is None:
            table.read()

            def lazy(rows: Indices, training: bool) -> Dataset[Batch]:
                if training:
                    return TransformedImages(table, labels, rows, self._train_transform, seed=self.seed)
                return TransformedImages(table, labels, rows, self._eval_transform)

            return lazy
        images, target = self._decode(table), torch.from_numpy(labels)

        def cached(rows: Indices, training: bool) -> Dataset[Batch]:
            padding, flip = (self._augmentation[name] if training else 0 for name in _CACHED_OPTIONS)
            return ImageTensors(
                images, target, rows, mean=self.mean, std=self.std, margin=padding, flip=flip, seed=self.seed
            )

        return cached

    def _decode(self, table: ParquetTable) -> Tensor:
        from PIL import Image

        size = (self.image_size, self.image_size) if self.image_size is not None else table.image(0).size
        pixels = np.empty((len(table), 3, size[1], size[0]), dtype=np.uint8)
        for row in range(len(table)):
            image = table.image(row)
            if image.size != size:
                if self.image_size is None:
                    raise InputError(
                        f"{table.place(row)}: the image has {image.size[0]}x{image.size[1]} pixels, the first one "
                        f"{size[0]}x{size[1]}; set image_size, or leave out cache='decoded'"
                    )
                image = image.resize(size, Image.Resampling.BILINEAR)
            pixels[row] = np.asarray(image).transpose(2, 0, 1)
        return torch.from_numpy(pixels)
