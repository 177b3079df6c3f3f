"""What the tables of results share: their files of runs, means and spreads, and differences paired by seed."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zoo.demo import paired_difference


def open_runs(out: Path) -> list[dict[str, Any]]:
    """Return the runs that are finished, a line of ``<out>/results.jsonl`` each, and make the folder for more."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def add_run(out: Path, row: Mapping[str, Any]) -> None:
    """Add a finished run: one write of one line, so that parts of a table may run side by side."""
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def prepare_torch() -> None:
    """One thread, so that results do not depend on the machine's cores, and no warnings between the lines."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def require_runs(*recipes: str) -> None:
    """Train the recipes whose stored models in ``runs/`` are missing."""
    from zoo.cli import main as zoo_command

    for recipe in recipes:
        if not Path("runs", recipe, "config.json").exists() and zoo_command(["fit", "--config", recipe]) != 0:
            raise SystemExit(f"{recipe} could not be trained")


def spread(values: Collection[float], decimals: int) -> str:
    """Return mean ± standard deviation, or the one value."""
    if len(values) < 2:
        return f"{next(iter(values)):.{decimals}f}" if values else "-"
    return f"{statistics.mean(values):.{decimals}f} ± {statistics.stdev(values):.{decimals}f}"


def difference(ours: Mapping[int, float], control: Mapping[int, float], decimals: int) -> str:
    """Return the mean difference paired by seed, with its 95 % interval (t distribution)."""
    seeds = sorted(ours.keys() & control.keys())
    if len(seeds) < 2:
        return "-"
    mean, _, low, high = paired_difference([control[seed] for seed in seeds], [ours[seed] for seed in seeds])
    return f"{mean:+.{decimals}f} ({low:+.{decimals}f} … {high:+.{decimals}f})"
