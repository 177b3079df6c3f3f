"""Classifiers by name or place, and how an image file becomes their input.

What is recorded is followed: timm's or torchvision's own transform for towers with one, and for stored models the data
module of their run (`zoo.run_facts`) and the shape of their inputs. Where nothing is recorded, the user says it or is told
what was assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from zoo import hub, towers
from zoo.data import DigitsDataModule
from zoo.data.transforms import timm_transform
from zoo.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preparation", "Subject", "find_subject"]

_FAMILIES = ("timm", "torchvision", "zoo", "open_clip")

Prepare = Callable[["Image"], Tensor]


@dataclass(frozen=True)
class Preparation:
    """How the user wants images to be prepared; what is None is looked up.

    Attributes:
        image_size: side of the network's input in pixels.
        mean: what is subtracted from each channel, in [0, 1].
        std: what each channel is divided by then, positive.
    """

    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


@dataclass(frozen=True)
class Subject:
    """A classifier, and how its images are prepared.

    Attributes:
        network: returns logits (B, K).
        num_classes: K.
        prepare: from an image to the network's input (C, H, W).
    """

    network: nn.Module
    num_classes: int
    prepare: Prepare


def find_subject(source: str, preparation: Preparation, tell: Callable[[str], object]) -> Subject:
    """Load a classifier, and find out how its images are prepared.

    Args:
        source: see `zoo.saliency_command.explain`.
        preparation: what the user says of the images.
        tell: is told what was assumed.

    Raises:
        InputError: there is no such classifier, or it cannot be fed with image files.
    """
    family = source.partition("/")[0]
    if Path(source).is_dir() or source.startswith("hf://") or family not in _FAMILIES:
        if not Path(source).is_dir() and "/" not in source:
            raise InputError(
                f"{source!r} is no folder with a stored model. A model on the Hub is owner/name, a tower begins with "
                f"{', '.join(f'{name}/' for name in _FAMILIES[:3])}"
            )
        return _stored(source, preparation, tell)
    if family == "open_clip":
        raise InputError(
            f"{source!r} gives embeddings and no classes: zoo.saliency.saliency(…, targets=<a text's embedding>) explains "
            "those in Python"
        )
    tower = towers.create(source, frozen=True)
    if not towers.has_weights(source):
        tell(f"{source!r} is a bare architecture: its weights are random, and so is what they find")
    if preparation != Preparation():
        prepare = _plain(_first_channels(tower.network), preparation.image_size, preparation, tell, source)
    else:
        prepare = _recorded(tower)
    return Subject(tower.network, tower.num_classes, prepare)


def _recorded(tower: towers.Tower) -> Prepare:
    try:
        transform = tower.transform
    except InputError as error:
        raise InputError(f"{error}: give --image-size, --mean and --std") from error
    return lambda image: transform(image.convert("RGB"))


def _stored(source: str, preparation: Preparation, tell: Callable[[str], object]) -> Subject:
    model = hub.from_pretrained(source)
    num_classes = getattr(model, "num_classes", None)
    if not isinstance(num_classes, int):
        raise InputError(f"{source} holds a {type(model).__name__}, which gives no classes: it has no num_classes")
    shape = model.example_shape
    if shape is not None and len(shape) != 3:
        raise InputError(f"{source} takes inputs of shape {shape}, no images (C, H, W)")
    channels = shape[0] if shape is not None else _first_channels(model.network)
    if preparation != Preparation() or shape is None:
        recorded = shape[1:] if shape is not None else None
        size = preparation.image_size if preparation.image_size is not None else recorded
        prepare = _plain(channels, size, preparation, tell, source)
    else:
        prepare = _as_trained(model.run_facts or {}, (shape[0], shape[1], shape[2]), tell, source)
    return Subject(model.network, num_classes, prepare)


def _as_trained(
    facts: Mapping[str, Any], shape: tuple[int, int, int], tell: Callable[[str], object], source: str
) -> Prepare:
    """Return the evaluation transform of the run that made a model, as far as its configuration, which is data, says it."""
    channels, height, width = shape
    data = facts.get("data")
    data = data if isinstance(data, dict) else {}
    args = data.get("args")
    args = args if isinstance(args, dict) else {}
    if data.get("name") == DigitsDataModule.__name__:
        digits = DigitsDataModule(channels=channels)
        return _plain(channels, (height, width), Preparation(mean=digits.mean, std=digits.std), tell, source)
    mean, std = args.get("mean"), args.get("std")
    if not _numbers(mean, channels) or not _numbers(std, channels) or min(std) <= 0:
        return _plain(channels, (height, width), Preparation(), tell, source)
    # Parquet images in a cache are resized as they are; other files go through timm's transform.
    options = args.get("eval_transform") or {}
    if not isinstance(options, dict) or not _moderate(options, height):
        raise InputError(f"{source}: run.data.args.eval_transform in config.json cannot be used: give --mean and --std")
    lazy = data.get("name") in ("ImageFolderDataModule", "ParquetImagesDataModule") and args.get("cache") is None
    if lazy and channels == 3 and height == width:
        transform = timm_transform(height, train=False, mean=mean, std=std, options=options)
        return lambda image: transform(image.convert("RGB"))
    return _plain(channels, (height, width), Preparation(mean=mean, std=std), tell, source)


def _moderate(options: Mapping[str, Any], side: int) -> bool:
    """Whether an image stays of a moderate size in between: the configuration may come from anywhere."""
    share, border = options.get("crop_pct") or 1.0, options.get("crop_border_pixels") or 0
    numbers = type(share) in (int, float) and type(border) is int
    return numbers and 0.1 <= share <= 1 and 0 <= border <= side


def _numbers(value: object, count: int) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == count and all(type(one) in (int, float) for one in value)


def _first_channels(network: nn.Module) -> int:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise InputError(f"{type(network).__name__} has no convolution that images could enter")
    return first.in_channels


def _plain(
    channels: int,
    size: int | Sequence[int] | None,
    preparation: Preparation,
    tell: Callable[[str], object],
    source: str,
) -> Prepare:
    """Return what cuts the middle of an image in the shape of the input, resizes it (bilinear), and normalises it."""
    if size is None:
        raise InputError(f"nothing records the size of the inputs of {source}: give --image-size")
    height, width = (size, size) if isinstance(size, int) else size
    if channels not in (1, 3):
        raise InputError(f"{source} takes images of {channels} channels, which no image file has")
    if min(height, width) < 1:
        raise InputError(f"--image-size must be at least 1, got {height}")
    if (preparation.mean is None) != (preparation.std is None):
        raise InputError("--mean and --std must be given together")
    if preparation.mean is None or preparation.std is None:
        tell(f"nothing records how the inputs of {source} are normalised: pixels go in as 0 … 1; see --mean and --std")
    mean = _per_channel("--mean", preparation.mean or (0.0,), channels)
    std = _per_channel("--std", preparation.std or (1.0,), channels)
    if float(std.min()) <= 0:
        raise InputError(f"--std must be positive, got {list(preparation.std or ())}")

    def prepare(image: Image) -> Tensor:
        from PIL import Image, ImageOps

        converted = image.convert("L" if channels == 1 else "RGB")
        if converted.size != (width, height):
            converted = ImageOps.fit(converted, (width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(converted)).view(height, width, channels).permute(2, 0, 1)
        return (pixels.float() / 255 - mean) / std

    return prepare


def _per_channel(option: str, values: Sequence[float], channels: int) -> Tensor:
    given = torch.tensor(list(values), dtype=torch.float32)
    if len(given) not in (1, channels) or not bool(given.isfinite().all()):
        raise InputError(f"{option} must be one number, or one a channel, {channels}, got {list(values)}")
    return given.expand(channels).view(-1, 1, 1)
