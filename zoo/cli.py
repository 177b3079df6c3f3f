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
    "show": "one component with its options, or a stored model: zoo show NDDistillation, zoo show me/x",
    "push": "send a stored model to the Hub: zoo push runs/nd-digits me/nd-digits",
    "pull": "copy a stored model from the Hub: zoo pull me/nd-digits FOLDER",
    "card": "render the model card of a stored model: zoo card runs/nd-digits",
    "report": "write one HTML page about a stored model, or about several: zoo report runs/nd-digits",
    "saliency": "draw where a classifier looks: zoo saliency me/nd-digits IMAGE… --layers layer3 --out out",
    "demo": "distil a student on scikit-learn's digits, store it, load it back",
    "new": "start a paper in a checkout, with tests that say what to write: zoo new KEY --kind loss-callback",
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
    plain: dict[str, Callable[[list[str]], None]] = {
        "list": _list,
        "show": _show,
        "push": _push,
        "pull": _pull,
        "card": _card,
        "report": _report,
        "saliency": _saliency,
        "new": _new,
    }
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

    table = Table("component", "paper", "kind", "status", box=None, header_style="bold")
    table.add_column("recipes", overflow="fold")
    for component in found:
        sheet = component.sheet
        paper = sheet["title"] + (f" ({sheet['venue']}, arXiv {sheet['arxiv']})" if sheet.get("arxiv") else "")
        table.add_row(component.name, paper, component.kind, sheet["status"], _few(component))
    Console().print(table)


def _few(component: registry.Component) -> str:
    """Return the recipes that need no download, or all if they are few, and how many there are beside."""
    shown = [name for name in component.recipes if "digits" in name or len(component.recipes) < 4]
    rest = len(component.recipes) - len(shown)
    return "\n".join([*shown, *([f"{rest} more: zoo show {component.name}"] if rest else [])])


def _show(words: list[str]) -> None:
    parser = _Parser(prog="zoo show", description="One component with its options, or a stored model.")
    parser.add_argument(
        "name", help="a component such as NDDistillation, a stored model's folder, or owner/name on the Hub"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    arguments = parser.parse_args(words)
    if Path(arguments.name).is_dir() or "/" in arguments.name:
        _show_stored(arguments.name)
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


def _show_stored(source: str) -> None:
    """Print the configuration of a stored model; of a repository, only that one file is fetched."""
    from zoo import storage, transport

    parsed = transport.parse_source(source)
    if isinstance(parsed, Path):
        path = storage.locate(parsed, "config.json")
        if path is None:
            raise InputError(f"{source} is no stored model: it has no config.json")
    else:
        folder, commit = transport.fetch(parsed, ("config.json",))
        path = folder / "config.json"
        sys.stderr.write(f"{parsed.repo_id} at commit {commit}\n")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    config.pop("golden", None)
    sys.stdout.write(json.dumps(config, indent=2) + "\n")


def _push(words: list[str]) -> None:
    parser = _Parser(prog="zoo push", description="Send a stored model to the Hub, in one commit, with its card.")
    parser.add_argument("run", type=Path, help="the folder of the stored model, such as runs/nd-digits")
    parser.add_argument("repo", help="owner/name; created if needed")
    parser.add_argument("--branch", help="branch, created if needed (default: the default branch)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", default="Store the model", help="first line of the commit")
    parser.add_argument("--tag", help="tag the commit, such as v1.0")
    parser.add_argument("--dry-run", action="store_true", help="send nothing, list what would be sent")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options = parser.parse_args(words)
    from zoo import publish

    pushed = publish.push_folder(
        options.run,
        options.repo,
        branch=options.branch,
        private=options.private or None,
        create_pr=options.create_pr,
        message=options.message,
        tag=options.tag,
        dry_run=options.dry_run,
    )
    if options.json:
        sys.stdout.write(json.dumps(asdict(pushed), indent=2) + "\n")
        return
    for name, size in pushed.files.items():
        sys.stdout.write(f"{size:>14,} bytes  {name}\n")
    total = f"{sum(pushed.files.values()):,} bytes"
    if options.dry_run:
        sys.stdout.write(f"{total} would be sent to {pushed.repo_id}\n")
    elif pushed.changed:
        sys.stdout.write(f"{total}: {pushed.repo_id} at commit {pushed.commit}\n{pushed.url}\n")
    else:
        sys.stdout.write(f"{pushed.repo_id} has all of it already, at commit {pushed.commit}\n")


def _pull(words: list[str]) -> None:
    parser = _Parser(prog="zoo pull", description="Copy a stored model from the Hub into a folder.")
    parser.add_argument("repo", help="owner/name or hf://owner/name@revision")
    parser.add_argument("folder", type=Path, help="the folder; a stored model in it is replaced")
    parser.add_argument("--revision", help="branch, tag or commit (default: the head)")
    options = parser.parse_args(words)
    from zoo import transport

    commit = transport.pull(options.repo, options.folder, revision=options.revision)
    sys.stdout.write(f"{options.folder}: {options.repo} at commit {commit}\n")


def _card(words: list[str]) -> None:
    parser = _Parser(prog="zoo card", description="Render the model card of a stored model into its README.md.")
    parser.add_argument("run", type=Path, help="the folder of the stored model")
    options = parser.parse_args(words)
    from zoo import publish, storage

    if storage.locate(options.run, "config.json") is None:
        raise InputError(f"{options.run} is no stored model: it has no config.json")
    publish.write_card(options.run, existing=publish.read_text(options.run, "README.md"))
    sys.stdout.write(f"{options.run / 'README.md'}\n")


def _saliency(words: list[str]) -> None:
    parser = _Parser(
        prog="zoo saliency",
        description="Draw where in images a classifier finds what speaks for a class (NormGrad and its relatives).",
    )
    parser.add_argument(
        "source", help="a stored classifier's folder, owner/name on the Hub, or a tower such as timm/resnet18.a1_in1k"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--out", required=True, help="folder for the overlays, <image>-class<k>.png")
    parser.add_argument(
        "--layers",
        type=_words,
        help="modules, separated by commas, combined if several (default: each stage's last block)",
    )
    parser.add_argument(
        "--method",
        default="normgrad",
        help="normgrad (default), selective, gradcam, layercam, hirescam, linear, gradient or gradient_sum",
    )
    parser.add_argument(
        "--classes",
        type=_words,
        default=["predicted"],
        help="what to explain: predicted (default), numbers of classes, or both, separated by commas",
    )
    parser.add_argument("--meta-lr", type=float, help="make a step of this size on each image first, such as 0.0025")
    parser.add_argument(
        "--combine", choices=("geomean", "product", "sum"), default="geomean", help="how several layers become one"
    )
    parser.add_argument("--opacity", type=float, default=0.8, help="opacity of the most salient place (default: 0.8)")
    parser.add_argument("--device", help="such as cuda (default: a GPU if there is one, else cpu)")
    parser.add_argument("--image-size", type=int, help="side of the input in pixels, where none is recorded")
    parser.add_argument("--mean", type=_numbers, help="means of the channels, separated by commas, likewise")
    parser.add_argument("--std", type=_numbers, help="their standard deviations, likewise")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options = vars(parser.parse_args(words))
    as_json = options.pop("json")
    given = {name: options.pop(name) for name in ("image_size", "mean", "std")}
    from zoo.saliency_command import explain
    from zoo.saliency_inputs import Preparation

    found = explain(**options, preparation=Preparation(**given))
    if as_json:
        rows = [{"class" if key == "target" else key: value for key, value in asdict(one).items()} for one in found]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    for one in found:
        explained = f"class {one.target}, score {one.score:.3f} ({one.probability:.1%})"
        sys.stdout.write(f"{one.image}: {explained}, layers {', '.join(one.layers)}: {one.file}\n")


def _report(words: list[str]) -> None:
    from zoo import report

    parser = _Parser(prog="zoo report", description="Write one HTML page about stored models.")
    report.command(parser, words)


def _new(words: list[str]) -> None:
    from zoo import scaffold

    parser = _Parser(prog="zoo new", description="Write the files of a new paper into a checkout of the zoo.")
    scaffold.command(parser, words)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{message}; `{self.prog} --help` shows the options")


if __name__ == "__main__":
    sys.exit(main())
