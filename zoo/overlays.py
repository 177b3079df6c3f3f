"""Saliency maps laid over their images, and figures of them as PNG files with the same bytes for the same input.

Pure drawing: what makes the maps is in `zoo.saliency`. Below its map an image is shown in grey, and darkened, so that colour
and brightness mean saliency; the map's colour covers it the more, the more salient a place is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoo.combined_maps import normalize_map, resize_map
from zoo.errors import InputError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["displayed", "overlay", "overlay_grid"]

_LUMINANCE = (0.299, 0.587, 0.114)
_DARKENED = 0.75
_INK = "#222222"
_DPI = 128  # a power of two: pixels divided by it and multiplied again are what they were
# Pixels of the figure.
_PANEL = 160
_GAP = 6
_LINE = 14
_MAX_TITLE = 24


def displayed(
    image: Tensor, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> NDArray[Any]:
    """Return an image as colours that can be shown.

    Args:
        image: (C, H, W) of any type. Three channels are red, green and blue; of any other number the mean is shown in grey.
        mean: what was subtracted from each channel when the image was normalised to [0, 1] before, one number each or one
            for all.
        std: what it was divided by. Without `mean` and `std`, integers are shown as 0 … 255, and anything else is stretched
            from its lowest to its highest value, all channels alike.

    Returns:
        (H, W, 3) of uint8. Values outside the range are cut off, values that are not finite are black, and a constant image
        is black where it is stretched.

    Raises:
        InputError: no image, or one of mean and std without the other or of another length.

    Example:
        >>> displayed(torch.tensor([[[-1.0, 0.0, 1.0]]]))[:, :, 0].tolist()
        [[0, 128, 255]]
    """
    return _bytes(_colours(image, mean, std))


def overlay(
    image: Tensor,
    saliency_map: Tensor,
    *,
    colormap: str = "inferno",
    opacity: float = 0.8,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> NDArray[Any]:
    """Lay one map over one image.

    Args:
        image: (C, H, W); see `displayed`.
        saliency_map: (1, h, w) or (h, w) in floating point, of any size and range. It is resized to the image (bilinear)
            and stretched to [0, 1] (`zoo.combined_maps.normalize_map`); a constant map, or one with NaN in it, covers
            nothing.
        colormap: name of a colour map of matplotlib.
        opacity: opacity of the most salient place, 0 … 1; elsewhere it shrinks with the map.
        mean: as for `displayed`.
        std: as for `displayed`.

    Returns:
        (H, W, 3) of uint8.

    Raises:
        InputError: image, map, colour map, opacity, mean or std cannot be used.

    Example:
        The most salient place has the last colour of the map, the least salient one is the image, darkened:

        >>> overlay(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1.0, 0.0]]), opacity=1.0).tolist()
        [[[252, 255, 164], [191, 191, 191]]]
    """
    colours = _lookup(colormap)
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity must be in 0 … 1, got {opacity}")
    base = _DARKENED * _colours(image, mean, std) @ np.array(_LUMINANCE)
    height, width = base.shape
    share = _share(saliency_map, (height, width))
    weight = (opacity * share)[:, :, None]
    return _bytes(base[:, :, None] * (1 - weight) + colours(share)[:, :, :3] * weight)


def overlay_grid(
    images: Tensor,
    maps: Tensor | Mapping[str, Tensor],
    titles: Sequence[str] | None = None,
    *,
    caption: str | None = None,
    columns: int = 8,
    show_images: bool = True,
    colormap: str = "inferno",
    opacity: float = 0.8,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> bytes:
    r"""Draw images and their maps: a column an image, a row a map, under the images themselves.

    More images than `columns` go on below. Images are enlarged by whole numbers, without smoothing, or shrunk to at most 160
    pixels a side. For a figure of methods × layers of one image, give the image once a layer (``image.expand(layers, -1, -1,
    -1)``), the layers as titles, and one entry of `maps` a method.

    Args:
        images: (B, C, H, W), at least one; see `displayed`.
        maps: (B, 1, h, w), or several of them by the name of their row; see `overlay`.
        titles: what stands above each image, one an image; lines are cut to 24 characters, and signs other than ASCII
            become ``?``.
        caption: what stands above all.
        columns: images side by side, at least 1.
        show_images: draw the row of the images.
        colormap: as for `overlay`.
        opacity: as for `overlay`.
        mean: as for `displayed`.
        std: as for `displayed`.

    Returns:
        A PNG file, the same bytes for the same input and versions of matplotlib and Pillow.

    Raises:
        InputError: images, maps, titles or an option cannot be used or do not fit each other.

    Example:
        >>> png = overlay_grid(torch.rand(3, 1, 8, 8), {"layer3": torch.rand(3, 1, 2, 2)}, ["a", "b", "c"])
        >>> png[:4]
        b'\x89PNG'
    """
    rows = {"": maps} if isinstance(maps, Tensor) else dict(maps)
    _check_grid(images, rows, titles, columns)
    base = {"mean": mean, "std": std}
    drawn: list[tuple[str, list[NDArray[Any]]]] = []
    if show_images:
        drawn.append(("", [displayed(image, **base) for image in images]))
    for name, some in rows.items():
        both = zip(images, some, strict=True)
        drawn.append((name, [overlay(image, one, colormap=colormap, opacity=opacity, **base) for image, one in both]))
    return _figure(drawn, titles, caption, columns)


def _colours(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> NDArray[Any]:
    """Return (H, W, 3) in 0 … 1."""
    if image.ndim != 3 or not image.numel():
        raise InputError(f"an image must be (C, H, W), not empty, got shape {tuple(image.shape)}")
    if (mean is None) != (std is None):
        raise InputError("mean and std must be given together")
    values = image.detach().cpu().double()
    if mean is not None and std is not None:
        values = values * _per_channel("std", std, len(image)) + _per_channel("mean", mean, len(image))
    elif not image.is_floating_point():
        values = values / 255
    else:
        finite = values[values.isfinite()]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
        values = (values - low) / (high - low) if high > low else torch.zeros_like(values)
    values = values.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    if len(image) != 3:
        values = values.mean(0, keepdim=True).expand(3, -1, -1)
    array: NDArray[Any] = values.permute(1, 2, 0).numpy()
    return array


def _per_channel(name: str, values: Sequence[float], channels: int) -> Tensor:
    given = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(given) not in (1, channels):
        raise InputError(f"{name} must be one number, or one a channel, {channels}, got {len(given)}")
    return given.view(-1, 1, 1)


def _bytes(colours: NDArray[Any]) -> NDArray[Any]:
    rounded: NDArray[Any] = np.rint(colours * 255)
    return rounded.astype(np.uint8)


def _share(saliency_map: Tensor, size: tuple[int, int]) -> NDArray[Any]:
    """Return the map in 0 … 1, as large as the image."""
    if saliency_map.ndim not in (2, 3) or saliency_map.shape[:-2].numel() != 1 or not saliency_map.is_floating_point():
        raise InputError(
            f"a map must be (1, H, W) or (H, W) in floating point, got shape {tuple(saliency_map.shape)} of "
            f"{saliency_map.dtype}"
        )
    one = saliency_map.detach().cpu()[None, None] if saliency_map.ndim == 2 else saliency_map.detach().cpu()[None]
    share: NDArray[Any] = normalize_map(resize_map(one, size))[0, 0].nan_to_num(0.0).double().numpy()
    return share


def _lookup(name: str) -> Any:
    import matplotlib

    if name not in matplotlib.colormaps:
        raise InputError(
            f"colormap must be a colour map of matplotlib, got {name!r}.{nearest(name, matplotlib.colormaps)}"
        )
    return matplotlib.colormaps[name]


def _check_grid(images: Tensor, rows: dict[str, Tensor], titles: Sequence[str] | None, columns: int) -> None:
    if images.ndim != 4 or not len(images):
        raise InputError(f"images must be (B, C, H, W), at least one, got shape {tuple(images.shape)}")
    if not rows:
        raise InputError("maps must be maps (B, 1, H, W) or a dictionary of them, at least one")
    for name, maps in rows.items():
        if maps.ndim != 4 or len(maps) != len(images):
            raise InputError(
                f"maps must be (B, 1, H, W), one an image, {len(images)}, got shape {tuple(maps.shape)}"
                + (f" for {name!r}" if name else "")
            )
    if titles is not None and len(titles) != len(images):
        raise InputError(f"titles must be one an image, {len(images)}, got {len(titles)}")
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")


def _figure(
    rows: list[tuple[str, list[NDArray[Any]]]], titles: Sequence[str] | None, caption: str | None, columns: int
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(name, [_fitted(panel) for panel in row]) for name, row in rows]
    count = len(panels[0][1])
    height, width = panels[0][1][0].shape[:2]
    columns = min(columns, count)
    left = _GAP + (_LINE if any(name for name, _ in rows) else 0)
    above = _LINE * max((len(title.splitlines()) for title in titles or ()), default=0)
    top = _GAP + (_LINE + _GAP if caption else 0)
    band = above + len(rows) * (height + _GAP)
    size = (left + columns * (width + _GAP), top + -(-count // columns) * band)
    figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)
    placed: list[tuple[int, int, NDArray[Any]]] = []
    for line, (name, row) in enumerate(panels):
        for index, panel in enumerate(row):
            x = left + index % columns * (width + _GAP)
            y = top + index // columns * band + above + line * (height + _GAP)
            placed.append((x, y, panel))
            if line == 0 and titles is not None:
                lines = "\n".join(_plain(part)[:_MAX_TITLE] for part in titles[index].splitlines())
                _write(figure, x + width / 2, y - 3, lines, va="bottom")
            if index % columns == 0:
                _write(
                    figure, left - 3, y + height / 2, _plain(name)[:_MAX_TITLE], rotation=90, ha="right", va="center"
                )
    if caption:
        _write(figure, _GAP, _GAP, _plain(caption), ha="left", va="top")
    canvas.draw()
    pixels = np.array(canvas.buffer_rgba())[:, :, :3]
    for x, y, panel in placed:
        pixels[y : y + height, x : x + width] = panel
    return _png(pixels)


def _png(pixels: NDArray[Any]) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="png")
    return file.getvalue()


def _fitted(panel: NDArray[Any]) -> NDArray[Any]:
    """Return a panel of at most `_PANEL` pixels a side, enlarged by a whole number so that pixels stay squares."""
    from PIL import Image

    longest = max(panel.shape[:2])
    if longest <= _PANEL:
        times = _PANEL // longest
        return panel.repeat(times, 0).repeat(times, 1)
    height, width = (max(1, round(side * _PANEL / longest)) for side in panel.shape[:2])
    return np.asarray(Image.fromarray(panel).resize((width, height), Image.Resampling.BOX))


def _write(figure: Figure, x: float, y: float, text: str, *, ha: str = "center", va: str, rotation: float = 0) -> None:
    width, height = figure.get_size_inches() * _DPI
    # Colour and font are given: the user's own style may be white on black.
    figure.text(
        x / width, 1 - y / height, text, ha=ha, va=va, rotation=rotation, fontsize=6, color=_INK, parse_math=False,
        fontfamily="DejaVu Sans",
    )  # fmt: skip


def _plain(text: str) -> str:
    # The font that comes with matplotlib lacks many signs.
    return "".join(character if " " <= character <= "~" else "?" for character in text)
