"""The results of `normgrad_table.py` as Markdown and figures for docs/results/normgrad.md."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nd_table_data import Batches
from normgrad_data import LAYERS, TEST_SEED, cifar, compose, trained
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.overlays import overlay_grid

NAMES = {
    "normgrad": "NormGrad", "selective": "selective NormGrad", "normgrad + meta": "NormGrad, meta",
    "selective + meta": "selective, meta", "gradcam": "Grad-CAM", "gradient": "gradient", "linear": "linear approximation",
    "centre": "centre", "random": "random map", "brightest": "brightest pixel",
}  # fmt: skip
COLUMNS = (*LAYERS, "combined")
COLOURS = {
    "normgrad": "#d55e00", "selective": "#e69f00", "gradcam": "#0072b2", "gradient": "#999999", "linear": "#009e73",
}  # fmt: skip
GRID, VALUES = Path("docs/results/normgrad.png"), Path("docs/results/normgrad-layers.png")


class Table(NamedTuple):
    """One table of the report: which value of which measurements."""

    title: str
    part: str
    weights: str
    value: str
    factor: float = 1.0
    decimals: int = 2


TABLES = (
    Table("Pointing game on canvases, right digit, %", "pointing", "trained", "right", 100, 1),
    Table("The same, on any digit, %", "pointing", "trained", "any", 100, 1),
    Table("Pointing game of the untrained network, right digit, %", "pointing", "untrained", "right", 100, 1),
    Table("Class sensitivity on CIFAR-10: rho between two classes", "sensitivity", "trained", "class_sensitivity"),
    Table("Class sensitivity of the untrained network", "sensitivity", "untrained", "class_sensitivity"),
    Table("Randomised head: rho with the trained network's map", "randomization", "trained", "fc"),
    Table("All randomised: rho with the trained network's map", "randomization", "trained", "conv1"),
    Table("Insertion: area under the probability, higher is better", "curves", "trained", "insertion", 1, 3),
    Table("Deletion: area under the probability, lower is better", "curves", "trained", "deletion", 1, 3),
)

Row = dict[str, Any]
Maps = Callable[[nn.Module, Tensor, Tensor, str], dict[str, Tensor]]


def read(out: Path) -> list[Row]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(row: Row) -> tuple[str, str, str, int]:
    return row["part"], row["weights"], row["arm"], row["seed"]


def values(rows: Iterable[Row], table: Table, arm: str, layer: str) -> list[float]:
    """Return one number a seed, without those that are not defined."""
    found = [
        row["values"][layer][table.value]
        for row in rows
        if (row["part"], row["weights"], row["arm"]) == (table.part, table.weights, arm) and layer in row["values"]
    ]
    return [table.factor * number for number in found if math.isfinite(number)]


def spread(numbers: list[float], decimals: int) -> str:
    if not numbers:
        return "-"
    shown = f"{statistics.mean(numbers):.{decimals}f}"
    return f"{shown} ± {statistics.stdev(numbers):.{decimals}f}" if len(numbers) > 1 else shown


def markdown(out: Path) -> str:
    rows = read(out)
    parts = [_classifiers(out)]
    for table in TABLES:
        lines = [f"| method | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for arm, name in NAMES.items():
            cells = [values(rows, table, arm, layer) for layer in COLUMNS]
            control = values(rows, table, arm, "-")
            if control:  # one map, which is of no layer
                cells = [control, [], [], []]
            if any(cells):
                lines.append(f"| {name} | {' | '.join(spread(cell, table.decimals) for cell in cells)} |")
        if len(lines) > 2:
            parts.append(f"### {table.title}\n\n" + "\n".join(lines))
    seeds = len({row["seed"] for row in rows})
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    parts.append(
        f"{seeds} seeds, {len(rows)} measurements, {minutes:.0f} minutes of one thread, torch {torch.__version__}"
    )
    return "\n\n".join(parts)


def _classifiers(out: Path) -> str:
    lines = ["| classifier | seed | measured on test images, % | CPU minutes |", "|---|---|---|---|"]
    for file in sorted(out.glob("*-*.pt")):
        facts = torch.load(file, weights_only=True)["facts"]
        kind, _, seed = file.stem.partition("-")
        minutes = facts.pop("cpu_seconds") / 60
        told = ", ".join(f"{name.replace('_', ' ')} {number:.1f}" for name, number in facts.items())
        lines.append(f"| {kind} | {seed} | {told} | {minutes:.1f} |")
    return "\n".join(lines)


def draw(options: argparse.Namespace, maps_of: Maps) -> None:
    """Draw methods x layers on a canvas and on two photographs, and the values by layer."""
    missing = [name for name in ("canvases-0.pt", "cifar-0.pt") if not Path(options.out, name).exists()]
    if missing:
        raise InputError(f"--out {options.out} has no {' and no '.join(missing)} yet: train first, without --report")
    GRID.parent.mkdir(parents=True, exist_ok=True)
    GRID.write_bytes(_grid(options, maps_of))
    _draw_values(read(options.out))
    print(f"\n{GRID}\n{VALUES}")


def _grid(options: argparse.Namespace, maps_of: Maps) -> bytes:
    # One canvas, two of its digits: what differs between them is the class that is explained. Both images are the first.
    canvases = compose(options.test_canvases, "test", TEST_SEED)
    digits = torch.nonzero(canvases.labels[0]).flatten()[:2]
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    data = cifar(options)
    photos, labels = next(iter(Batches(data, "test", 2)))
    # As colours in [0, 1]; the noise of a canvas goes beyond it and is cut off.
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    kinds = (
        ("canvases", canvases.images[:1].expand(2, -1, -1, -1), digits, [str(digit) for digit in digits.tolist()]),
        ("cifar", photos, labels, [names[label] for label in labels.tolist()]),
    )
    images, titles, rows = [], [], dict[str, list[Tensor]]()
    for kind, some, targets, named in kinds:
        colours = some * std + mean if kind == "cifar" else some
        model = trained(kind, options, 0)
        side = canvases.images.shape[2:]
        shown = F.interpolate(colours, tuple(side), mode="bilinear").expand(-1, 3, -1, -1)
        images.append(shown.repeat_interleave(len(COLUMNS), 0))
        titles += [f"{column}: {name}" for name in named for column in COLUMNS]
        for arm in COLOURS:
            found = maps_of(model, some, targets, arm)
            stacked = torch.stack([found[column] for column in COLUMNS], 1).flatten(0, 1)
            rows.setdefault(NAMES[arm], []).append(F.interpolate(stacked, tuple(side), mode="bilinear"))
    return overlay_grid(
        torch.cat(images),
        {name: torch.cat(parts) for name, parts in rows.items()},
        titles,
        columns=2 * len(COLUMNS),
        mean=[0.0],
        std=[1.0],
    )


def _draw_values(rows: list[Row]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [TABLES[index] for index in (0, 3, 5, 7, 8)]
    figure = Figure(figsize=(15.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, table in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for arm, colour in COLOURS.items():
            found = [(x, values(rows, table, arm, layer)) for x, layer in enumerate(COLUMNS)]
            points = [(x, statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for x, v in found if v]
            if points:
                axes.errorbar(
                    *zip(*points, strict=True), color=colour, marker="o", markersize=3, capsize=2, label=NAMES[arm]
                )
        axes.set_xticks(range(len(COLUMNS)), COLUMNS, fontsize=8)
        axes.set_title(table.title.partition(":")[0], fontsize=9)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(VALUES, dpi=120, facecolor="white", metadata={"Software": None})
