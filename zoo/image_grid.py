"""Images side by side with a line of text above each, as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from torch import Tensor

from zoo.errors import InputError
from zoo.overlays import displayed

__all__ = ["image_grid", "write_png"]

_INK = "#222222"
_DPI = 128
_PANEL = 0.8  # inches


def image_grid(
    images: Tensor,
    titles: Sequence[str],
    *,
    columns: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> bytes:
    r"""Draw images in rows.

    Args:
        images: (B, C, H, W), at least one; see `zoo.overlays.displayed`.
        titles: what stands above each, B of them.
        columns: images side by side, at least 1.
        mean: as for `zoo.overlays.displayed`.
        std: as for `zoo.overlays.displayed`.

    Returns:
        A PNG file.

    Raises:
        InputError: images, titles or columns cannot be used or do not fit each other.

    Example:
        >>> import torch
        >>> image_grid(torch.rand(3, 1, 8, 8), ["0", "1", "2"])[:4]
        b'\x89PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if images.ndim != 4 or not len(images) or len(titles) != len(images) or columns < 1:
        raise InputError(
            f"images must be (B, C, H, W) with a title each, in 1 or more columns, got {tuple(images.shape)}, "
            f"{len(titles)} titles and {columns} columns"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * _PANEL, rows * _PANEL * 1.25), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for index, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(displayed(image, mean=mean, std=std), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=7, color=_INK, fontfamily="DejaVu Sans", parse_math=False, pad=2)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.9, wspace=0.08, hspace=0.35)
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def write_png(path: str | Path, png: bytes) -> None:
    """Write a picture to a file.

    Args:
        path: the file, whose folder is made where it is missing.
        png: the picture, a PNG file.

    Raises:
        InputError: the path does not end in ``.png``.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise InputError(f"path must end in .png, got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)
