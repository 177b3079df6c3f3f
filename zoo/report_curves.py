"""Curves of one or several runs, laid out for drawing as SVG: the same layout for the same numbers."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo import card_figures
from zoo.card_text import public
from zoo.errors import InputError

__all__ = ["Curve", "Curves", "History", "Line", "Mark", "Panel", "Tick", "lay_out", "read_history"]

_Points = list[tuple[float, float]]

WIDTH, HEIGHT = 360, 210  # user units of an SVG; letters are 11 of them high
_TOP, _RIGHT, _BOTTOM = 10.0, 10.0, 24.0
_LETTER = 6.4  # width of a digit
_MAX_CSV = 16 << 20  # bytes
_MAX_LOGS = 20
_MAX_SERIES = 400
_MAX_PANELS = 48
_MAX_POINTS = 1000
_SAID, _MARKED = 60, 12  # points of a line, at most, that say their value, and that are dots
_COLOURS = 8
_SPLITS = ("train", "val", "test")
_NOT_METRICS = ("epoch", "step", "")
_DIGITS = re.compile(r"([0-9]{1,18})")
_VERSION = re.compile(r"version_(\d{1,9})")


@dataclass(frozen=True)
class History:
    """Logged values of a run.

    Attributes:
        points: [(epoch, value), …] by logged name; NaN is a gap.
        source: where they come from, in words.
        problem: why there are none; "" if there are.
    """

    points: Mapping[str, _Points] = field(default_factory=dict)
    source: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: its place and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """One point of a line: its place, what it says when pointed at, and whether a dot is drawn there."""

    x: float
    y: float
    text: str
    drawn: bool


@dataclass(frozen=True)
class Line:
    """One curve of a panel.

    Attributes:
        series: number of its colour, which its series has in every panel.
        label: name of the series.
        path: SVG path of the line.
        marks: single points, where there are few.
    """

    series: int
    label: str
    path: str
    marks: list[Mark]


@dataclass(frozen=True)
class Panel:
    """One diagram: its title, what it says in a sentence, its axes and its lines."""

    title: str
    says: str
    left: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]


@dataclass(frozen=True)
class Curve:
    """The numbers behind a line, for the table beside the diagrams."""

    name: str
    run: str
    count: int
    first: float
    least: float
    most: float
    last: float


@dataclass(frozen=True)
class Curves:
    """All diagrams of a report.

    Attributes:
        panels: the diagrams.
        legend: (number of the colour, name) of the series.
        table: the numbers behind them.
        hidden: how many quantities are not drawn.
        width: of a diagram, in user units.
        height: likewise.
    """

    panels: list[Panel]
    legend: list[tuple[int, str]]
    table: list[Curve]
    hidden: int = 0
    width: int = WIDTH
    height: int = HEIGHT


# -- reading -------------------------------------------------------------------------------------------------------


def read_history(stored: Any, folder: Path) -> History:
    """Return the curves of a run: those that ``config.json`` records, or else those of its newest ``metrics.csv``.

    Args:
        stored: ``run.history`` of the configuration; None if it has none.
        folder: the folder of the run.

    Raises:
        InputError: the recorded history is no object of lists of pairs of numbers.
    """
    if stored is not None and not isinstance(stored, Mapping):
        raise InputError(f"run.history must be an object, got {type(stored).__name__}: store the model anew")
    recorded = stored or {}
    names = sorted(map(str, recorded))[:_MAX_SERIES]
    points = {public(name): card_figures._points(name, recorded[name]) for name in names}
    if any(map(_is_drawn, points.values())):
        return History(points, "recorded with the stored model")
    logs = _newest_first(folder)
    for path in logs[:_MAX_LOGS]:
        try:
            found = _read_csv(path)
        except (OSError, UnicodeDecodeError, csv.Error, InputError):
            continue
        if any(map(_is_drawn, found.values())):
            return History(found, f"read from {path.relative_to(folder).as_posix()}")
    problem = "No curves were recorded with this model, and "
    return History(problem=problem + ("its metrics.csv has none either." if logs else "there is no metrics.csv."))


def _is_drawn(points: _Points) -> bool:
    return any(math.isfinite(value) for _, value in points)


def _newest_first(folder: Path) -> list[Path]:
    """Return what Lightning's CSVLogger left, the highest version first."""
    places = ("metrics.csv", "*/metrics.csv", "*/version_*/metrics.csv")
    found = [path for place in places for path in folder.glob(place)]

    def order(path: Path) -> tuple[int, str]:
        version = _VERSION.fullmatch(path.parent.name)
        return (-int(version[1]) if version else 0, path.as_posix())

    return sorted(found, key=order)


def _read_csv(path: Path) -> dict[str, _Points]:
    """Read the last value of each epoch by column; a word in place of a number is a gap."""
    if path.stat().st_size > _MAX_CSV:
        return {}
    epochs: dict[str, dict[float, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            x = _number(row.get("epoch") or row.get("step"))
            for name, text in row.items():
                if math.isfinite(x) and isinstance(text, str) and text and name not in _NOT_METRICS:
                    epochs.setdefault(name, {})[x] = _number(text)
    names = sorted(epochs)[:_MAX_SERIES]
    # The same bounds as for a recorded history.
    return {public(name): card_figures._points(name, list(epochs[name].items())) for name in names}


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


# -- layout --------------------------------------------------------------------------------------------------------


def lay_out(histories: Sequence[tuple[str, History]]) -> Curves:
    """Lay out the curves of one run by quantity, its splits on each other; those of several by name, the runs on each other.

    Args:
        histories: name and curves of each run.
    """
    several = len(histories) > 1
    series = [name for name, _ in histories][:_COLOURS] if several else [*_SPLITS, "no split"]
    panels: dict[str, list[tuple[int, _Points]]] = {}
    table = []
    for number, (run, history) in enumerate(histories):
        for name, points in history.points.items():
            if not _is_drawn(points):
                continue
            quantity, split = _quantity(name)
            key, colour = (name, number) if several else (quantity, split)
            if colour < _COLOURS:
                panels.setdefault(key, []).append((colour, points))
            table.append(_numbers(name, run, points))
    shown = sorted(panels, key=_order(panels, several=several))
    drawn = [_panel(title, panels[title], series) for title in shown[:_MAX_PANELS]]
    used = sorted({line.series for panel in drawn for line in panel.lines})
    return Curves(
        panels=drawn,
        legend=[(number, series[number]) for number in used],
        table=sorted(table, key=lambda curve: curve.name),
        hidden=len(shown) - len(drawn),
    )


def _quantity(name: str) -> tuple[str, int]:
    """Return what is measured, and the number of the split on which.

    Example:
        >>> _quantity("val/retrieval/r1"), _quantity("lr")
        (('retrieval/r1', 1), ('lr', 3))
    """
    split, slash, rest = name.partition("/")
    return (rest, _SPLITS.index(split)) if slash and rest and split in _SPLITS else (name, len(_SPLITS))


def _order(
    panels: Mapping[str, list[tuple[int, _Points]]], *, several: bool
) -> Callable[[str], tuple[bool, bool, list[tuple[bool, Any]]]]:
    """Losses first, then what was measured on held-out data, then the rest."""

    def key(title: str) -> tuple[bool, bool, list[tuple[bool, Any]]]:
        held_out = (
            title.startswith(("val/", "test/")) if several else any(split in (1, 2) for split, _ in panels[title])
        )
        numbers = [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in _DIGITS.split(title)]
        return (title.rpartition("/")[2] != "loss", not held_out, numbers)

    return key


def _numbers(name: str, run: str, points: _Points) -> Curve:
    values = [value for _, value in points if math.isfinite(value)]
    return Curve(name, run, len(values), values[0], min(values), max(values), values[-1])


def _panel(title: str, curves: Iterable[tuple[int, _Points]], series: Sequence[str]) -> Panel:
    thinned = [(number, _thin(points)) for number, points in sorted(curves, key=lambda curve: curve[0])]
    values = [point for _, points in thinned for point in points if math.isfinite(point[1])]
    x_ticks, (x_low, x_high) = _axis([x for x, _ in values], count=6, integer=True)
    y_ticks, (y_low, y_high) = _axis([y for _, y in values], count=5, integer=False)
    texts = _texts(y_ticks)
    left = 10 + _LETTER * max(map(len, texts))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return left + across * (WIDTH - _RIGHT - left), HEIGHT - _BOTTOM - up * (HEIGHT - _BOTTOM - _TOP)

    lines = [_line(number, series[number], points, place) for number, points in thinned]
    says = "; ".join(_sentence(series[number], points) for number, points in thinned)
    return Panel(
        title=title,
        says=f"{title} by epoch. {says}.",
        left=round(left, 1),
        x_ticks=[Tick(round(place(x, y_low)[0], 1), text) for x, text in zip(x_ticks, _texts(x_ticks), strict=True)],
        y_ticks=[Tick(round(place(x_low, y)[1], 1), text) for y, text in zip(y_ticks, texts, strict=True)],
        lines=lines,
    )


def _thin(points: _Points) -> _Points:
    """Return at most so many points as can be told apart, the last one among them."""
    points = sorted(points, key=lambda point: point[0])
    step = -(-len(points) // _MAX_POINTS)
    return points[::-step][::-1] if step > 1 else points


def _axis(values: Sequence[float], *, count: int, integer: bool) -> tuple[list[float], tuple[float, float]]:
    """Return round marks, and the range that an axis covers."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.5 if integer else abs(low) * 0.1 or 1.0
    else:
        margin = 0.0 if integer else 0.04 * (high - low)
    low, high = low - margin, high + margin
    ticks = MaxNLocator(nbins=count, integer=integer).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high], (low, high)


def _texts(ticks: Sequence[float]) -> list[str]:
    """Return the texts of marks, rounded to their distance."""
    step = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=0.0)
    digits = 3 - math.floor(math.log10(step)) if step else 6
    return [f"{round(tick, digits) + 0.0:.10g}" for tick in ticks]


def _line(number: int, label: str, points: _Points, place: Callable[[float, float], tuple[float, float]]) -> Line:
    path, marks, drawing = [], [], False
    finite = sum(math.isfinite(value) for _, value in points)
    for index, (x, y) in enumerate(points):
        if not math.isfinite(y):
            drawing = False
            continue
        at, up = place(x, y)
        path.append(f"{'L' if drawing else 'M'}{at:.1f} {up:.1f}")
        alone = not (drawing or (index + 1 < len(points) and math.isfinite(points[index + 1][1])))
        if finite <= _SAID or alone:
            said = f"{label}, epoch {x:g}: {y:.6g}"
            marks.append(Mark(round(at, 1), round(up, 1), said, alone or finite <= _MARKED))
        drawing = True
    return Line(number, label, "".join(path), marks)


def _sentence(label: str, points: _Points) -> str:
    finite = [point for point in points if math.isfinite(point[1])]
    (x, y), (last_x, last_y) = finite[0], finite[-1]
    return f"{label}: {y:.4g} at {x:g}, {last_y:.4g} at {last_x:g}"
