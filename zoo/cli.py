"""The ``zoo`` command: a thin dispatcher, so that what needs no torch answers at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import zoo
from zoo import registry
from zoo.errors import InputError, nearest

__all__ = ["main"]

_COMMANDS = {
    "fit": "train from a recipe or a LightningCLI configuration: zoo fit --config nd-digits",
    "validate": "evaluate on the validation split: zoo validate --config nd-digits",
    "test": "evaluate on the test split: zoo test --config nd-digits",
    "predict": "write predictions for the data: zoo predict --config nd-digits",
    "list": "every component: paper, kind, recipes",
    "show": "one component with its options, or a stored model: zoo show NDDistillation",
    "demo": "distil a student on scikit-learn's digits, store it, load it back",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``zoo``; ``sys.argv`` if omitted.

    Returns:
        0, or 2 after bad input, of which one line on standard error tells.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        _print_help()
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"{zoo.__version__}\n")
        return 0
    command, rest = words[0], words[1:]
    try:
        _run(command, rest)
    except InputError as error:
        sys.stderr.write(f"zoo {command}: {error}\n")
        return 2
    return 0


def _run(command: str, words: list[str]) -> None:
    if command not in _COMMANDS:
        raise InputError(f"no such command.{nearest(command, _COMMANDS)} `zoo --help` shows all")
    plain: dict[str, Callable[[list[str]], None]] = {"list": _list, "show": _show}
    if command in plain:
        plain[command](words)
    elif command == "demo":
        from zoo.demo import main as demo

        demo(words)
    else:
        from zoo.training import run

        run(command, words)


def _print_help() -> None:
    width = max(map(len, _COMMANDS))
    lines = [
        "usage: zoo COMMAND …",
        "",
        "Papers as PyTorch Lightning components, from training to the Hugging Face Hub.",
        "",
        *(f"  {name:<{width}}  {text}" for name, text in _COMMANDS.items()),
        "",
        "`zoo COMMAND --help` shows the options of a command, `zoo list` what there is to train.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _list(words: list[str]) -> None:
    parser = _Parser(prog="zoo list", description="Every component: paper, kind, recipes.")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    as_json = parser.parse_args(words).json
    found = [registry.describe(name) for name in registry.components()]
    if as_json:
        rows = [{key: value for key, value in asdict(component).items() if key != "text"} for component in found]
        sys.stdout.write(json.dumps(rows, indent=2, default=str) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("component", "paper", "kind", "status", "recipes", box=None, header_style="bold")
    for component in found:
        sheet = component.sheet
        paper = sheet["title"] + (f" ({sheet['venue']}, arXiv {sheet['arxiv']})" if sheet.get("arxiv") else "")
        table.add_row(component.name, paper, component.kind, sheet["status"], "\n".join(component.recipes))
    Console().print(table)


def _show(words: list[str]) -> None:
    parser = _Parser(prog="zoo show", description="One component with its options, or a stored model.")
    parser.add_argument("name", help="a component such as NDDistillation, or the folder of a stored model")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    arguments = parser.parse_args(words)
    if Path(arguments.name).is_dir():
        _show_stored(Path(arguments.name))
        return
    component = registry.describe(arguments.name)
    options = registry.options(component.name)
    if arguments.json:
        content = {**asdict(component), "options": [asdict(option) for option in options]}
        sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")
        return
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    console = Console()
    sheet = component.sheet
    console.print(f"[bold]{component.name}[/bold] ({component.kind}, {component.module})", highlight=False)
    console.print(sheet["title"], highlight=False)
    if sheet.get("arxiv"):
        console.print(f"{sheet['authors']}. {sheet['venue']}, arXiv {sheet['arxiv']}", highlight=False)
    console.print(f"recipes: {', '.join(component.recipes) or 'none'}\n", highlight=False)
    table = Table("option", "type", "default", "meaning", box=None, header_style="bold")
    for option in options:
        table.add_row(option.name, option.annotation, option.default or "required", option.meaning)
    console.print(table)
    console.print(Markdown(component.text))


def _show_stored(folder: Path) -> None:
    from zoo import storage

    path = storage.locate(folder, "config.json")
    if path is None:
        raise InputError(f"{folder} is no stored model: it has no config.json")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    config.pop("golden", None)
    sys.stdout.write(json.dumps(config, indent=2) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{message}; `{self.prog} --help` shows the options")


if __name__ == "__main__":
    sys.exit(main())
