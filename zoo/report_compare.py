"""Runs side by side: their results, and what was different in how they were configured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.card_facts import Result
from zoo.report_run import StoredRun

__all__ = ["Cell", "Difference", "Table", "differences", "results", "verdict"]

_MAX_ROWS = 300
_MAX_TEXT = 160
_UNSET = "not set"
# Where a run was stored says nothing about it.
_NOT_COMPARED = ("trainer.default_root_dir",)
_GROUPS = ("trainer", "optimizer", "lr_scheduler", "requires")


@dataclass(frozen=True)
class Cell:
    """One value of a table of results.

    Attributes:
        text: as it is shown.
        exact: all digits; "" where there is no finite number.
        change: difference to the first run; "" for the first, and where one is missing.
    """

    text: str
    exact: str = ""
    change: str = ""


@dataclass(frozen=True)
class Table:
    """Results: of one run, a column for each split; of several, a column for each run and a group of rows for each split.

    Attributes:
        columns: their headings, each with a note such as the number of samples.
        groups: heading, note, and rows: a metric and its cells.
    """

    columns: list[tuple[str, str]]
    groups: list[tuple[str, str, list[tuple[str, list[Cell]]]]]


@dataclass(frozen=True)
class Difference:
    """One option that is not the same in all runs.

    Attributes:
        name: such as ``"model.nd_weight"``.
        values: one for each run.
        chosen: whether somebody chose it; False for what came of it, the machine and the versions.
    """

    name: str
    values: list[str]
    chosen: bool


def results(runs: Sequence[StoredRun]) -> Table:
    """Return the results of all runs.

    Args:
        runs: the runs; several are compared with the first.
    """
    found: dict[str, dict[str, list[Result | None]]] = {}
    for number, run in enumerate(runs):
        for result in run.facts.results:
            row = found.setdefault(result.split, {}).setdefault(result.name, [None] * len(runs))
            row[number] = result
    if len(runs) > 1:
        groups = [
            (split, _samples(rows), [(name, _cells(row)) for name, row in rows.items()])
            for split, rows in found.items()
        ]
        return Table([(run.name, "") for run in runs], groups)
    names = dict.fromkeys(name for rows in found.values() for name in rows)
    rows = [(name, [_cells(split.get(name, [None]))[0] for split in found.values()]) for name in names]
    return Table([(split, _samples(rows)) for split, rows in found.items()], [("", "", rows)] if rows else [])


def _samples(rows: Mapping[str, Sequence[Result | None]]) -> str:
    counts = {result.samples for row in rows.values() for result in row if result is not None}
    known = sorted(count for count in counts if count is not None)
    return " / ".join(f"{count:,}" for count in known) + " samples" if known else "samples not recorded"


def _cells(row: Sequence[Result | None]) -> list[Cell]:
    cells = []
    base = row[0].value if row[0] is not None else None
    for number, result in enumerate(row):
        if result is None:
            cells.append(Cell("not measured"))
        elif result.value is None:
            cells.append(Cell("not finite"))
        else:
            change = f"{result.value - base:+.4g}" if number and base is not None else ""
            cells.append(Cell(f"{result.value:.4g}", repr(result.value), change))
    return cells


def differences(runs: Sequence[StoredRun]) -> list[Difference]:
    """Return the options in which runs differ: what was chosen first, then what came of it, machine and versions.

    Args:
        runs: the runs; one alone differs in nothing.
    """
    found = []
    comparable = all(run.recipe for run in runs)
    for chosen in (True, False):
        options = [dict(_chosen(run, with_recipe=comparable) if chosen else _surroundings(run)) for run in runs]
        for name in dict.fromkeys(name for option in options for name in option):
            values = [option.get(name, _UNSET) for option in options]
            if len(set(values)) > 1 and name not in _NOT_COMPARED:
                found.append(Difference(name, [_short(value) for value in values], chosen))
    return found[:_MAX_ROWS]


def verdict(runs: Sequence[StoredRun], found: Sequence[Difference]) -> str:
    """Return in a sentence or two what a comparison of these runs can say.

    Args:
        runs: the runs.
        found: what `differences` returned for them.
    """
    chosen = [difference.name for difference in found if difference.chosen and difference.name != "seed"]
    seeds = "" if all(difference.name != "seed" for difference in found) else " and the seed"
    without = [run.name for run in runs if not run.recipe]
    caveat = f" Options of the trainer were not compared: {', '.join(without)} has no recipe." if without else ""
    if not chosen:
        what = "The runs were configured alike" + (", but for the seed." if seeds else ".")
    elif len(chosen) == 1:
        what = (
            f"One option differs: {chosen[0]}{seeds}. What differs in the results is due to it or to chance; single runs do "
            "not tell which."
        )
    else:
        what = f"{len(chosen)} options differ{seeds}, so no difference in the results can be put down to one of them."
    return what + caveat


def _chosen(run: StoredRun, *, with_recipe: bool) -> Iterator[tuple[str, str]]:
    facts = run.facts
    yield "component", facts.component or "plain weights"
    yield from _flat(facts.args, "model")
    yield from _flat(facts.supplied, "model")
    yield "data", facts.data or "not recorded"
    yield from _flat(facts.data_args, "data")
    yield from _flat(facts.splits, "samples")
    for name in _GROUPS:
        if with_recipe and run.recipe.get(name) is not None:
            yield from _flat(run.recipe[name], name)
    if "seed" in facts.run:
        yield "seed", _text(facts.run["seed"])


def _surroundings(run: StoredRun) -> Iterator[tuple[str, str]]:
    # Options of the trainer lead to the first four, and are compared above where there is a recipe.
    for name in ("epochs", "steps", "monitor", "precision", "hardware"):
        if name in run.facts.run:
            yield name, _text(run.facts.run[name])
    for name, version in run.facts.versions.items():
        yield f"version of {name}", version


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield every option by its path; a list is one option unless it holds objects."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}")
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}[{index}]")
    else:
        yield name, _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
