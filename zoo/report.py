"""``zoo report``: one HTML page about a stored model and its run, or about several side by side.

The page loads nothing and runs nothing: images are part of it, it has no script, and a policy in it forbids both. Whatever
comes from the folder is data and is escaped. The same folder gives the same bytes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from zoo.errors import InputError

if TYPE_CHECKING:
    from zoo.report_run import StoredRun

__all__ = ["command", "render", "write"]

_MAX_RUNS = 8  # colours that can be told apart
_NAME = "report.html"
_ENDINGS = (".html", ".htm")
_RUN = (
    ("seed", "Seed"),
    ("epochs", "Epochs"),
    ("steps", "Optimizer steps"),
    ("seconds", "Time"),
    ("hardware", "Hardware"),
    ("precision", "Precision"),
    ("monitor", "Weights chosen by"),
)


def command(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Run ``zoo report``.

    Args:
        parser: an empty parser with the name of the command.
        words: its options.

    Raises:
        InputError: see `write`.
    """
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of stored models: runs/nd-digits")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default: {_NAME} in the first RUN)")
    options = parser.parse_args(words)
    sys.stdout.write(f"{write(options.runs, options.out)}\n")


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page.

    Args:
        folders: of stored models; several are compared with the first.
        out: the file, replaced if it is there; ``report.html`` in the first folder if omitted.

    Returns:
        The file.

    Raises:
        InputError: a folder holds no stored model, there are too many of them, or the file cannot be written.
    """
    path = folders[0] / _NAME if out is None else out
    if path.suffix.lower() not in _ENDINGS:
        raise InputError(f"--out must be a file that ends in .html, got {str(path)!r}")
    page = render(folders)
    staged = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(page, encoding="utf-8", newline="\n")
        staged.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): name another place with --out") from error
    finally:
        if staged.exists():
            staged.unlink()
    return path


def render(folders: Sequence[Path]) -> str:
    """Return the page.

    Args:
        folders: of stored models.

    Raises:
        InputError: a folder holds no stored model, or there are too many of them.
    """
    from zoo.report_compare import differences, results, verdict
    from zoo.report_curves import lay_out
    from zoo.report_run import read_run

    _check(folders)
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    found = differences(runs)
    level = 2 if len(runs) == 1 else 3  # of the heading above the texts of a run
    page: str = _template().render(
        runs=[_view(run, number, level) for number, run in enumerate(runs, start=1)],
        title=" against ".join([runs[0].name, ", ".join(run.name for run in runs[1:])] if runs[1:] else [runs[0].name]),
        results=results(runs),
        optimistic=_optimistic(runs),
        curves=lay_out([(run.name, run.history) for run in runs]),
        differences=found,
        verdict=verdict(runs, found),
        version=zoo.__version__,
    )
    return page


def _check(folders: Sequence[Path]) -> None:
    if len(folders) > _MAX_RUNS:
        raise InputError(f"at most {_MAX_RUNS} runs can be compared on a page, got {len(folders)}")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{folder} is given twice: name each run once")


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each folder, with a number where several have the same."""
    from zoo.card_text import public

    names = [str(public(folder.resolve().name)) or "run" for folder in folders]
    often = Counter(names)
    return [
        f"{name} ({names[: index + 1].count(name)})" if often[name] > 1 else name for index, name in enumerate(names)
    ]


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((resources.files("zoo.cards") / _NAME).read_text(encoding="utf-8"))


def _view(run: StoredRun, number: int, level: int) -> dict[str, Any]:
    """Return what the page shows of one run beside results and curves."""
    facts, sheet = run.facts, run.component.sheet if run.component else {}
    known = {**facts.run}
    if "seconds" in known:
        from zoo.model_card import _duration

        known["seconds"] = _duration(known["seconds"])
    place = shlex.quote(f"path/to/{run.name}")
    fit = f"zoo fit --config {place}" if run.recipe else ""
    switched_off = "".join(f" --model.{name} {value}" for name, value in run.control.items())
    return {
        "number": number,
        "name": run.name,
        "run": run,
        "facts": facts,
        "sheet": sheet,
        "known": [(label, known[name]) for name, label in _RUN if name in known],
        "unknown": ", ".join(label.lower() for name, label in _RUN if name not in known),
        "fit": fit,
        "requires": list(run.recipe["requires"]) if isinstance(run.recipe.get("requires"), dict) else [],
        "control": f"{fit}{switched_off} --trainer.default_root_dir runs/control" if fit and switched_off else "",
        "compare": f"zoo report {place} runs/control",
        "switched_off": ", ".join(f"{name}: {value}" for name, value in run.control.items()),
        **_prose(run, number, level),
    }


def _optimistic(runs: Sequence[StoredRun]) -> list[dict[str, str]]:
    """Return the metrics that chose weights, where the split is one of the results: which, of which runs, on which split."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        monitor = str(run.facts.run.get("monitor", ""))
        split = monitor.partition("/")[0]
        if any(result.split == split for result in run.facts.results):
            found.setdefault((monitor, split), []).append(run.name)
    return [{"monitor": monitor, "split": split, "runs": ", ".join(names)} for (monitor, split), names in found.items()]


def _prose(run: StoredRun, number: int, level: int) -> dict[str, Any]:
    """Return arguments, sheet and card as the page shows them."""
    from zoo.card_text import to_yaml
    from zoo.report_card import to_html

    # What the page shows already is pointed at, the rest of the card's figures are shown in it.
    images = {
        figure.name: figure.uri if figure.is_curve else f"#figure-{number}-{place}"
        for place, figure in enumerate(run.figures, start=1)
        if figure.uri
    }
    idea = run.component.text.partition("\n## ")[0].strip() if run.component else ""
    return {
        "arguments": to_yaml(run.facts.args) if run.facts.args else "",
        "data_arguments": to_yaml(run.facts.data_args) if run.facts.data_args else "",
        "idea": to_html(idea, level=level) if idea else "",
        "card": to_html(run.card, level=level, images=images) if run.card else "",
    }
