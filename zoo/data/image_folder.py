"""Image classification from folders, or from torchvision's data sets by name, under timm's transforms."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from zoo.data.loading import SplitDataModule, Splits
from zoo.data.splits import Indices, stratified_split
from zoo.data.transforms import IMAGENET_MEAN, IMAGENET_STD, TransformedImages, naming_image, timm_transform
from zoo.errors import InputError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFolderDataModule"]

_Arguments = Mapping[str, Any]
_FLAG: tuple[_Arguments, ...] = ({"train": True}, {}, {"train": False})


def _split(train: str = "train", val: str = "", test: str = "test") -> tuple[_Arguments, ...]:
    return tuple({"split": name} if name else {} for name in (train, val, test))


# Arguments of torchvision's constructors for the training, validation and test split; {} where there is none.
_NAMED: dict[str, tuple[_Arguments, ...]] = {
    "CIFAR10": _FLAG,
    "CIFAR100": _FLAG,
    "Country211": _split(val="valid"),
    "DTD": _split(val="val"),
    "EuroSAT": ({}, {}, {}),
    "FGVCAircraft": _split(val="val"),
    "FashionMNIST": _FLAG,
    "Flowers102": _split(val="val"),
    "Food101": _split(),
    "GTSRB": _split(),
    "ImageNet": _split(val="val", test=""),
    "Imagenette": _split(val="val", test=""),
    "KMNIST": _FLAG,
    "MNIST": _FLAG,
    "OxfordIIITPet": _split(train="trainval"),
    "STL10": _split(),
    "SVHN": _split(),
}
_VAL_FOLDERS = ("val", "validation", "valid")
_LAYOUT = (
    "expected root/train/<class>/*.png with root/val and root/test beside it (both optional), or root/<class>/*.png"
)


class _Images:
    """The images of a torchvision data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def image(self, row: int) -> Image:
        with naming_image(self._place, row):
            return cast("Image", self.dataset[row][0].convert("RGB"))

    def _place(self, row: int) -> str:
        samples = getattr(self.dataset, "samples", None)
        return str(samples[row][0]) if samples else f"image {row} of {type(self.dataset).__name__}"


def _labels_of(dataset: Any) -> Indices:
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name), dtype=np.int64)
    return np.asarray([label for _, label in dataset._samples], dtype=np.int64)


def _class_names_of(dataset: Any) -> list[str]:
    if not hasattr(dataset, "classes"):
        return [str(label) for label in range(int(_labels_of(dataset).max()) + 1)]
    return [name if isinstance(name, str) else ", ".join(name) for name in dataset.classes]


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir())


class ImageFolderDataModule(SplitDataModule):
    """Image classification from a folder, or from one of torchvision's data sets by name.

    Folders are ``root/train/<class>/*.png`` with, optionally, ``root/val`` (or ``validation``, ``valid``) and
    ``root/test``, or ``root/<class>/*.png`` without splits. Classes are the folder names in sorted order, equal in all
    splits. Where the data bring no validation or test split, a fixed stratified part of the training images takes its
    place (``val_share``, ``test_share``). Images are decoded when they are needed, to RGB.

    Training images go through ``timm.data.create_transform(is_training=True)``: by default a random resized crop, a
    horizontal flip and colour jitter; evaluation images are resized and cropped in the centre.

    Args:
        root: folder of the images, or where torchvision keeps the data set.
        dataset: name of a torchvision data set: CIFAR10, CIFAR100, Country211, DTD, EuroSAT, FGVCAircraft, FashionMNIST,
            Flowers102, Food101, GTSRB, ImageNet, Imagenette, KMNIST, MNIST, OxfordIIITPet, STL10 or SVHN.
        download: let torchvision download the named data set if it is not there.
        image_size: side of the images in pixels that the model sees.
        batch_size: samples in a batch and process, at least 1.
        num_workers: processes that decode the images; 0 decodes in the training process.
        val_share: share of the training images for validation, in [0, 1), if the data bring no validation split.
        test_share: the same for the test.
        split_seed: number of the split.
        seed: number of the training order and of the augmentations.
        mean: mean of each channel in [0, 1]; ImageNet's by default.
        std: standard deviation of each channel; ImageNet's by default.
        train_transform: options of timm's training transform: no_aug, train_crop_mode, scale, ratio, hflip, vflip,
            color_jitter, color_jitter_prob, grayscale_prob, gaussian_blur_prob, auto_augment, interpolation, re_prob,
            re_mode, re_count, re_num_splits.
        eval_transform: options of timm's evaluation transform: interpolation, crop_pct, crop_mode, crop_border_pixels.
        drop_last: leave out a last training batch that is not full.
        pin_memory: copy batches to page-locked memory, for a GPU.
        with_index: training batches are ``(images, labels, index)``, with the position of each sample in the training
            split; all other batches stay pairs.

    Raises:
        InputError: an argument is out of its range, or the name of a data set or an option is unknown. When the data are
            read: they are missing, empty or laid out otherwise, or the splits have different classes.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog"):
        ...     (root / name).mkdir()
        ...     for index in range(10):
        ...         Image.new("RGB", (40, 30)).save(root / name / f"{index}.png")
        >>> data = ImageFolderDataModule(str(root), image_size=32, batch_size=4)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, data.class_names
        (torch.Size([4, 3, 32, 32]), ['cat', 'dog'])
    """

    def __init__(
        self,
        root: str,
        *,
        dataset: str | None = None,
        download: bool = False,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        val_share: float = 0.1,
        test_share: float = 0.0,
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
        if dataset is not None and dataset not in _NAMED:
            raise InputError(
                f"dataset {dataset!r} is unknown.{nearest(dataset, _NAMED)} Known are {', '.join(_NAMED)}; leave it out to "
                "read folders"
            )
        if download and dataset in {None, "ImageNet"}:
            raise InputError("download needs the name of a data set that torchvision can download (all but ImageNet)")
        self.root = root
        self.dataset = dataset
        self.download = download
        self.image_size = image_size
        self.val_share = val_share
        self.test_share = test_share
        self.split_seed = split_seed
        self.mean = list(mean)
        self.std = list(std)
        self._train_transform = timm_transform(image_size, train=True, mean=mean, std=std, options=train_transform)
        self._eval_transform = timm_transform(image_size, train=False, mean=mean, std=std, options=eval_transform)
        self._class_names: list[str] = []

    @property
    def class_names(self) -> list[str]:
        """Name of each class, in the order of the labels."""
        _ = self.splits
        return list(self._class_names)

    def prepare_data(self) -> None:
        """Download the named data set, if ``download`` asks for it; Lightning calls this in one process only."""
        if self.download:
            self._named_sets(download=True)

    def _load(self) -> Splits:
        if self.download and self.trainer is None:
            self.prepare_data()
        train, val, test = self._folder_sets() if self.dataset is None else self._named_sets(download=False)
        labels, images = _labels_of(train), _Images(train)
        shares = {"val_share": self.val_share} if val is None else {}
        shares |= {"test_share": self.test_share} if test is None else {}
        *parts, rest = stratified_split(labels, shares, seed=self.split_seed)
        held_out = dict(zip(shares, parts, strict=True))

        def evaluation(own: Any, name: str) -> TransformedImages | None:
            if own is not None:
                return TransformedImages(_Images(own), _labels_of(own), np.arange(len(own)), self._eval_transform)
            part = held_out[name]
            return TransformedImages(images, labels, part, self._eval_transform) if len(part) else None

        self._class_names = _class_names_of(train)
        return Splits(
            train=TransformedImages(images, labels, rest, self._train_transform, seed=self.seed),
            train_eval=TransformedImages(images, labels, rest, self._eval_transform),
            val=evaluation(val, "val_share"),
            test=evaluation(test, "test_share"),
        )

    def _named_sets(self, *, download: bool) -> tuple[Any, Any, Any]:
        from torchvision import datasets

        assert self.dataset is not None
        kind = getattr(datasets, self.dataset)
        extra = {"download": download} if "download" in inspect.signature(kind).parameters else {}
        train, val, test = _NAMED[self.dataset]
        try:
            return (
                kind(self.root, **train, **extra),
                kind(self.root, **val, **extra) if val else None,
                kind(self.root, **test, **extra) if test else None,
            )
        except (RuntimeError, FileNotFoundError) as error:  # torchvision's for data that are not there or are damaged
            remedy = "" if download or self.dataset == "ImageNet" else " Set download=true, or correct root."
            raise InputError(f"{self.dataset} cannot be read from root={self.root!r}: {error}.{remedy}") from error

    def _folder_sets(self) -> tuple[Any, Any, Any]:
        root = Path(self.root)
        if not root.is_dir():
            raise InputError(f"root={self.root!r} is no folder: {_LAYOUT}")
        if not _folders(root):
            raise InputError(f"root={self.root!r} has no class folders: {_LAYOUT}")
        train = root / "train"
        if not train.is_dir() or not _folders(train):  # a class may be called train: then it holds images, not folders
            held_out = [name for name in (*_VAL_FOLDERS, "test") if (root / name).is_dir() and _folders(root / name)]
            if held_out:
                raise InputError(f"root={self.root!r} has {held_out[0]}/, but no train/ with class folders: {_LAYOUT}")
            return self._folder_set(root), None, None
        first = self._folder_set(train)
        val = next((self._folder_set(root / name, first) for name in _VAL_FOLDERS if (root / name).is_dir()), None)
        test = self._folder_set(root / "test", first) if (root / "test").is_dir() else None
        return first, val, test

    def _folder_set(self, path: Path, train: Any = None) -> Any:
        from torchvision.datasets import ImageFolder

        if train is not None:
            ours, theirs = [folder.name for folder in _folders(path)], train.classes
            if ours != theirs:
                raise InputError(
                    f"{path} has other class folders than the training split: missing {sorted(set(theirs) - set(ours))}, "
                    f"unknown {sorted(set(ours) - set(theirs))}"
                )
        try:
            return ImageFolder(str(path))
        except FileNotFoundError as error:  # a class folder without images
            raise InputError(f"{path}: {error}") from error
