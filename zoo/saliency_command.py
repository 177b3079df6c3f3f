"""``zoo saliency``: from a stored classifier or a tower name and image files to overlays as PNG files.

`zoo.saliency` makes the maps, `zoo.overlays` lays them over, `zoo.saliency_inputs` prepares the images.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.combined_maps import Combine, combine_maps, normalize_map, resize_map
from zoo.data.transforms import naming_image
from zoo.errors import InputError
from zoo.overlays import overlay
from zoo.saliency import LayerMaps, layer_maps
from zoo.saliency_inputs import Preparation, find_subject
from zoo.stage_names import stage_names

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Explained", "explain"]

_PREDICTED = "predicted"
_BATCH = 16
# Overlays of smaller images are enlarged by a whole number, so that the pixels of a digit can be seen.
_SHOWN = 224


@dataclass(frozen=True)
class Explained:
    """One overlay.

    Attributes:
        image: the image's file.
        target: the class that is explained.
        score: its logit; after the meta step if there was one.
        probability: its share of the softmax.
        layers: where the map was taken.
        file: the overlay's file.
    """

    image: str
    target: int
    score: float
    probability: float
    layers: tuple[str, ...]
    file: str


def explain(
    source: str,
    images: Sequence[str | Path],
    *,
    out: str | Path,
    layers: Sequence[str] | None = None,
    method: str = "normgrad",
    classes: Sequence[str | int] = (_PREDICTED,),
    meta_lr: float | None = None,
    combine: Combine = "geomean",
    opacity: float = 0.8,
    device: str | None = None,
    preparation: Preparation | None = None,
    note: Callable[[str], object] | None = None,
) -> list[Explained]:
    """Draw where in images a classifier finds what speaks for a class.

    Args:
        source: the folder of a stored classifier, ``owner/name`` or ``hf://owner/name@revision`` on the Hub, or a tower
            name such as ``timm/resnet18.a1_in1k``. A folder by that name comes first.
        images: files, and folders, of which all images are taken, those of folders inside included.
        out: the folder for the overlays, created if needed: ``<image>-class<k>.png`` each, over what is there.
        layers: names of modules, combined if several; the last block of each stage if omitted.
        method: a name of `zoo.saliency.METHODS`.
        classes: what to explain in each image, one overlay each: ``"predicted"``, or the number of a class.
        meta_lr: see `zoo.saliency.saliency`.
        combine: see `zoo.combined_maps.combine_maps`.
        opacity: opacity of the most salient place, 0 … 1.
        device: such as ``cuda``; a GPU if there is one, else the CPU, if omitted.
        preparation: how images are prepared, where that is not recorded or not what is wanted; as recorded if omitted.
        note: is told what the user should know, such as that a map cannot depend on the class; standard error if omitted.

    Returns:
        The overlays, image by image.

    Raises:
        InputError: no such stored model, tower, layer, class, method or device, a file that is no image, or a network that
            gives no logits of classes.
    """
    tell = note or (lambda text: sys.stderr.write(f"note: {text}\n"))
    asked = _asked(classes)
    folder = Path(out)
    places = list(_places(images, folder))
    where = _device(device)
    subject = find_subject(source, preparation or Preparation(), tell)
    for target in asked:
        if target is not None and not 0 <= target < subject.num_classes:
            raise InputError(f"--classes must be 0 … {subject.num_classes - 1} or {_PREDICTED}, got {target}")
    subject.network.to(where).eval()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be a folder: {error.strerror}") from error
    results: list[Explained] = []
    names = layers
    with _warnings_as_notes(tell):
        for start in _progress(range(0, len(places), _BATCH)):
            some = places[start : start + _BATCH]
            x = torch.stack([subject.prepare(_read(image)) for image, _ in some]).to(where)
            names = names if names is not None else stage_names(subject.network, example=x[:1])
            drawn = []
            for target in asked:
                found = layer_maps(subject.network, x, target, layers=names, method=method, meta_lr=meta_lr)
                drawn.append(_draw(found, x, some, combine, opacity))
            results += [one for row in zip(*drawn, strict=True) for one in row]
    return results


def _asked(classes: Sequence[str | int]) -> list[int | None]:
    """Return numbers of classes, None for the predicted one."""
    found: list[int | None] = []
    for given in classes:
        if given != _PREDICTED and not str(given).isdecimal():
            raise InputError(f"--classes must be numbers of classes or {_PREDICTED!r}, got {given!r}")
        target = None if given == _PREDICTED else int(given)
        if target not in found:
            found.append(target)
    if not found:
        raise InputError(f"--classes must name at least one class, or {_PREDICTED!r}")
    return found


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise InputError(f"--device {name} cannot be used: {next(iter(str(error).splitlines()), '')}") from error
    return device


def _places(images: Sequence[str | Path], folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each image's file and that of its overlays without an ending, numbered where a name is taken."""
    from PIL.Image import registered_extensions

    endings = registered_extensions()
    taken: set[str] = set()
    for given in map(Path, images):
        if given.is_dir():
            inside = sorted(path for path in given.rglob("*") if path.suffix.lower() in endings and path.is_file())
            if not inside:
                raise InputError(f"{given}: the folder holds no image file")
            some = [(path, path.relative_to(given).with_suffix("").as_posix()) for path in inside]
        elif given.is_file():
            some = [(given, given.stem)]
        else:
            raise InputError(f"{given}: no such image file or folder")
        for path, stem in some:
            name, number = stem, 1
            while name in taken:
                number += 1
                name = f"{stem}-{number}"
            taken.add(name)
            yield path, folder / name


def _read(file: Path) -> Image:
    from PIL import Image

    with naming_image(lambda _: str(file), 0), Image.open(file) as image:
        image.load()
        if image.mode.startswith(("I", "F")):
            raise InputError(
                f"{file}: pixels of more than 8 bits have no agreed range: convert the file to 8 bits first"
            )
        return image.copy()


def _draw(
    found: LayerMaps, x: Tensor, places: Sequence[tuple[Path, Path]], combine: Combine, opacity: float
) -> list[Explained]:
    """Write the overlays of one batch and class."""
    from PIL import Image

    assert found.targets is not None and found.output is not None, "no score function was given"  # noqa: PT018
    size = (x.shape[2], x.shape[3])
    maps = list(found.maps.values())
    whole = resize_map(maps[0], size) if len(maps) == 1 else combine_maps(maps, mode=combine, size=size)
    shares = found.output.float().softmax(1)
    results = []
    for row, (image, place) in enumerate(places):
        target = int(found.targets[row])
        if not bool(normalize_map(whole[row : row + 1]).any()):
            warnings.warn(
                f"{image}: the map of class {target} is constant, nothing is laid over", UserWarning, stacklevel=2
            )
        pixels = overlay(x[row], whole[row], opacity=opacity)
        times = max(1, _SHOWN // max(pixels.shape[:2]))
        file = place.with_name(f"{place.name}-class{target}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.repeat(times, 0).repeat(times, 1)).save(file)
        score, share = float(found.scores[row]), float(shares[row, target])
        results.append(Explained(str(image), target, score, share, tuple(found.maps), str(file)))
    return results


@contextmanager
def _warnings_as_notes(tell: Callable[[str], object]) -> Iterator[None]:
    """Tell each warning about maps once and in one line; other libraries' warnings go their own way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning)
    for text in texts:
        tell(text)
    for one in caught:
        if one.category is not UserWarning:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _progress(batches: Sequence[int]) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import track

    if len(batches) < 2:
        return iter(batches)
    return iter(track(batches, description="images", console=Console(stderr=True), transient=True))
