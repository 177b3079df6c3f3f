"""Curves of a run as PNG files, the same bytes for the same history and version of matplotlib."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_figures"]

_Series = dict[str, list[tuple[float, float]]]

_FOLDER = "figures"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")  # Okabe and Ito
_INK = "#222222"
_COLUMNS = 3
_MAX_PANELS = 12
_MAX_LINES = len(_COLOURS)
_MARKED = 30
_DPI = 120
_PANEL = (4.0, 3.0)  # inches, like the margins around each panel's axes
_LEFT, _RIGHT, _BOTTOM, _TOP, _FOOTER = 0.62, 0.16, 0.48, 0.34, 0.25


def write_figures(history: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw the curves of a run into ``figures/`` of a stored model.

    ``loss.png`` has every quantity whose name ends with ``loss``; ``metrics.png`` has a panel for each other one, in which
    the splits lie on each other. Values that are not finite are gaps. Files of an older run are replaced, or deleted where
    nothing is to be drawn.

    Args:
        history: values by logged name, ``{"val/acc": [[epoch, value], …]}``.
        folder: folder of the stored model.

    Returns:
        Names of the written files relative to ``folder``, such as ``"figures/loss.png"``; none if there is no finite value.

    Raises:
        InputError: the history is no list of pairs of numbers.

    Example:
        >>> import tempfile
        >>> write_figures({"val/acc": [[0, 0.5], [1, 0.9]]}, Path(tempfile.mkdtemp()))
        ['figures/metrics.png']
    """
    # What was measured on held-out data comes first.
    names = sorted(history, key=lambda name: (name.startswith("train/"), name))
    series = {name: _points(name, history[name]) for name in names}
    series = {name: points for name, points in series.items() if any(math.isfinite(value) for _, value in points)}
    losses = {name: points for name, points in series.items() if _quantity(name).endswith("loss")}
    panels: dict[str, _Series] = {}
    for name, points in series.items():
        if name not in losses:
            panels.setdefault(_quantity(name), {})[name] = points
    written = []
    for stem, content in (("loss", {"loss": losses} if losses else {}), ("metrics", panels)):
        path = folder / _FOLDER / f"{stem}.png"
        if content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_draw(content))
            written.append(f"{_FOLDER}/{path.name}")
        else:
            path.unlink(missing_ok=True)
    return written


def _points(name: str, points: Any) -> list[tuple[float, float]]:
    if not isinstance(points, list | tuple):
        raise InputError(f"history[{name!r}] must be a list of [epoch, value], got {type(points).__name__}")
    read = []
    for point in points:
        pair = isinstance(point, list | tuple) and len(point) == 2
        if not pair or not all(isinstance(item, numbers.Real | None) for item in point):
            raise InputError(f"history[{name!r}] must be a list of [epoch, value], got the item {str(point)[:80]}")
        read.append((_finite(point[0]), _finite(point[1])))
    return [(epoch, value) for epoch, value in read if math.isfinite(epoch)]


def _finite(value: Any) -> float:
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:
        return math.nan
    # Far beyond any loss; matplotlib's own arithmetic overflows near the end of float64.
    return number if abs(number) < 1e100 else math.nan


def _quantity(name: str) -> str:
    return name.rpartition("/")[2]


def _draw(panels: dict[str, _Series]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = dict(list(panels.items())[:_MAX_PANELS])
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    footer = _FOOTER if len(shown) < len(panels) else 0.0
    width, height = _PANEL[0] * columns, _PANEL[1] * rows + footer
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # Margins that are given: a layout that is computed draws everything twice.
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - _RIGHT / width,
        bottom=(_BOTTOM + footer) / height,
        top=1 - _TOP / height,
        wspace=(_LEFT + _RIGHT) / (_PANEL[0] - _LEFT - _RIGHT),
        hspace=(_TOP + _BOTTOM) / (_PANEL[1] - _TOP - _BOTTOM),
    )
    for place, (title, series) in enumerate(shown.items(), start=1):
        _draw_panel(figure.add_subplot(rows, columns, place), title, series)
    if footer:
        figure.supxlabel(f"{len(shown)} of {len(panels)} quantities", fontsize=9, color=_INK, y=0.1 / height)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _draw_panel(axes: Axes, title: str, series: _Series) -> None:
    from matplotlib.ticker import MaxNLocator

    lines = []
    for colour, points in zip(_COLOURS, series.values(), strict=False):
        marker = "o" if len(points) <= _MARKED else ""
        epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
        lines += axes.plot(epochs, values, color=colour, marker=marker, markersize=3.5, linewidth=1.5)
    axes.set_facecolor("white")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    # Every colour is given: the user's own style may be white on black.
    axes.spines[["bottom", "left"]].set_color(_INK)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))  # labels of at most six characters fit the margin
    axes.yaxis.get_offset_text().set(fontsize=8, color=_INK)
    axes.set_xlabel("epoch", fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    rest = len(series) - _MAX_LINES
    axes.set_title(
        _label(title) + (f" ({rest} more not drawn)" if rest > 0 else ""), fontsize=10, color=_INK, parse_math=False
    )
    names = [_label(name) for name in series][:_MAX_LINES]
    legend = axes.legend(lines, names, fontsize=8, frameon=False, labelcolor=_INK)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _label(name: str) -> str:
    # The font that comes with matplotlib lacks many signs, and older legends leave out names with a leading underscore.
    text = "".join(character if " " <= character <= "~" else "?" for character in name).lstrip("_ ")
    return text[:40] or "?"
