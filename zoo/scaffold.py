"""``zoo new``: the files of a new paper in a checkout of the zoo, from the templates in ``zoo/paper_templates``.

The code runs, is formatted and typed, and refuses to pretend: the formula raises ``NotImplementedError``, and the tests
fail with a message that says what to write. Whatever is left to write is marked ``FILL IN``.
"""

from __future__ import annotations

import argparse
import ast
import json
import keyword
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from zoo.errors import InputError, require_choice

__all__ = ["KINDS", "Paper", "command", "write_paper"]

KINDS = {
    "module": "a LightningModule and its loss",
    "loss-callback": "a callback that adds the paper's loss to the training of any LightningModule",
    "callback": "a callback of another kind, without a loss",
}
"""What can be written, and what it is."""

_WIDTH = 120
# Longer names would break lines of the templates that fit, and the code would no longer be formatted.
_LONGEST_KEY, _LONGEST_CLASS = 24, 32
_CHECKOUT = (
    "CHANGELOG.md", "callbacks", "cards", "lightning_modules", "tests/callbacks", "tests/lightning_modules", "tests/losses",
    "zoo/__init__.py", "zoo/losses/__init__.py", "zoo/recipes",
)  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """What a new paper is called.

    Attributes:
        key: the stem that its files share, such as ``"nd"``.
        cls: the public class.
        kind: one of `KINDS`.
        title: the paper's title; empty if it is to be filled in.
        arxiv: its arXiv number; empty if it has none.

    Raises:
        InputError: a name is no name, or too long.

    Example:
        >>> Paper("confidence_penalty", kind="loss-callback").cls
        'ConfidencePenalty'
    """

    key: str
    cls: str = ""
    kind: str = "module"
    title: str = ""
    arxiv: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", self.key) or keyword.iskeyword(self.key):
            raise InputError(
                f"the key must be a Python name in small letters, the stem of all files of the paper, such as nd or "
                f"confidence_penalty, got {self.key!r}"
            )
        object.__setattr__(self, "cls", self.cls or "".join(word.capitalize() for word in self.key.split("_")))
        if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", self.cls) or keyword.iskeyword(self.cls):
            raise InputError(f"--class must be a Python name in capitalised words, such as CM3, got {self.cls!r}")
        for name, value, longest in (("the key", self.key, _LONGEST_KEY), ("--class", self.cls, _LONGEST_CLASS)):
            if len(value) > longest:
                raise InputError(f"{name} must have at most {longest} letters, got {len(value)}: {value!r}")
        require_choice("--kind", self.kind, KINDS)
        if not self.title.isprintable() or "\\" in self.title or '"""' in self.title:
            raise InputError(f"--title must be one line of plain text without a backslash, got {self.title!r}")
        if self.arxiv and not re.fullmatch(r"\d{4}\.\d{4,5}", self.arxiv):
            raise InputError(f"--arxiv must be a number such as 2305.17007, got {self.arxiv!r}")

    @property
    def loss(self) -> str:
        """Name of the loss function, empty for a callback without one."""
        return "" if self.kind == "callback" else f"{self.key}_loss"

    @property
    def package(self) -> str:
        """The folder of the component, and the package in ``zoo``."""
        return "lightning_modules" if self.kind == "module" else "callbacks"


def command(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Run ``zoo new``.

    Args:
        parser: an empty parser, whose errors are those of the command line.
        words: the options.

    Raises:
        InputError: a name is taken or no name, or the folder is no checkout; nothing is written then.
    """
    kinds = "; ".join(f"{name}: {meaning}" for name, meaning in KINDS.items())
    parser.add_argument("key", help="stem of all files of the paper, such as confidence_penalty")
    parser.add_argument("--kind", default="module", help=f"{kinds} (default: module)")
    parser.add_argument("--class", dest="cls", default="", help="the public class (default: the key, capitalised)")
    parser.add_argument("--title", default="", help="the paper's title")
    parser.add_argument("--arxiv", default="", help="its arXiv number, such as 1701.06548")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: this folder)")
    options = vars(parser.parse_args(words))
    root = options.pop("root")
    paper = Paper(**options)
    written, changed = write_paper(paper, root)
    tests = " ".join(str(path) for path in written if path.parts[0] == "tests")
    lines = [
        "written:", *(f"  {path}" for path in written), "changed:", *(f"  {path}" for path in changed),
        "next, in the checkout:",
        f"  python -m pytest {tests}   # each failure says what to fill in",
        '  git ls-files -mo --exclude-standard | xargs grep -n "FILL IN"   # what is left',
        "  python -m tests.test_api_surface   # once the public names stand",
        "  make table   # the table of components in README.md",
        "  make check",
        "docs/tutorials/new-component.md goes through it with an example",
    ]  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")


def write_paper(paper: Paper, root: Path) -> tuple[list[Path], list[Path]]:
    """Write the files of a new paper and its lines in the shared ones, all of them or none.

    Args:
        paper: what it is called.
        root: a checkout of the zoo.

    Returns:
        The new files and the changed ones, relative to ``root``.

    Raises:
        InputError: ``root`` is no checkout, or cannot be written to, or a name is taken.
    """
    missing = [name for name in _CHECKOUT if not (root / name).exists()]
    if missing:
        raise InputError(
            f"{root.resolve()} is no checkout of the zoo, it has no {', '.join(missing)}: name one by --root"
        )
    destinations = _destinations(paper)
    taken = [str(path) for path in destinations.values() if (root / path).exists()]
    if taken:
        raise InputError(f"{paper.key!r} is taken, there is {', '.join(taken)}: choose another key")
    values = _values(paper)
    new = {path: _template(name).substitute(values) for name, path in destinations.items()}
    changed = _changes(paper, root)
    _write(root, new | changed)
    return list(new), list(changed)


def _destinations(paper: Paper) -> dict[str, Path]:
    """Return template -> file."""
    key, kind = paper.key, paper.kind
    loss = {"loss.py": f"zoo/losses/{key}.py", "test_loss.py": f"tests/losses/test_{key}.py"} if paper.loss else {}
    files = loss | {
        f"{kind}.py": f"{paper.package}/{key}.py",
        f"test_{kind}.py": f"tests/{paper.package}/test_{key}.py",
        f"{kind}.yaml": f"zoo/recipes/{key}-digits.yaml",
        "sheet.md": f"cards/{key}.md",
        f"{kind}.md": f"docs/components/{key}.md",
    }
    return {template: Path(path) for template, path in files.items()}


def _template(name: str) -> Template:
    return Template((resources.files("zoo.paper_templates") / f"{name}.txt").read_text(encoding="utf-8"))


def _values(paper: Paper) -> dict[str, str]:
    """Return what the templates name by ``$``."""
    title = paper.title or "FILL IN the title"
    number = f"arXiv {paper.arxiv}" if paper.arxiv else ""
    reference = ", ".join(filter(None, (title, number))) + "."
    link = f"[{number}](https://arxiv.org/abs/{paper.arxiv})" if number else ""
    return {
        "key": paper.key,
        "cls": paper.cls,
        "loss": paper.loss,
        "quoted_title": json.dumps(title, ensure_ascii=False),
        "reference": textwrap.fill(reference, _WIDTH),
        "reference_in_class": textwrap.fill(reference, _WIDTH - 4).replace("\n", "\n    "),
        "paper": ", ".join(filter(None, (f"*{title}*", link))) + ".",
        "source_in_brackets": f" ({number})" if number else "",
        "arxiv_line": f'arxiv: "{paper.arxiv}"\n' if number else "",
        "control_line": "control: {weight: 0}\n" if paper.loss else "",
    }


def _changes(paper: Paper, root: Path) -> dict[Path, str]:
    """Return shared file -> its new text."""
    changed = {}

    def read(name: str) -> str:
        return (root / name).read_text(encoding="utf-8")

    text = read("zoo/__init__.py")
    line = f'    "{paper.cls}": "zoo.{paper.package}.{paper.key}",'
    changed[Path("zoo/__init__.py")] = _insert(text, "zoo/__init__.py", "_LAZY", paper.cls, line)
    if paper.loss:
        name = "zoo/losses/__init__.py"
        text = _insert(read(name), name, "__all__", paper.loss, f'    "{paper.loss}",')
        changed[Path(name)] = _import(text, name, paper)
    changed[Path("CHANGELOG.md")] = _note(read("CHANGELOG.md"), paper)
    if (root / "mkdocs.yml").exists():
        changed[Path("mkdocs.yml")] = _navigate(read("mkdocs.yml"), paper)
    return changed


def _insert(text: str, file: str, table: str, name: str, line: str) -> str:
    """Put a line into a sorted dict or list of names that has one a line."""
    found = [
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == table
    ]
    if not found or not isinstance(found[0], ast.Dict | ast.List):
        raise InputError(f"{file} has no table {table}: is this a checkout of the zoo?")
    nodes = found[0].keys if isinstance(found[0], ast.Dict) else found[0].elts
    known = [(str(node.value), node.lineno) for node in nodes if isinstance(node, ast.Constant)]
    if name in dict(known):
        raise InputError(f"{name} is taken, {file} has it in {table}: choose another name")
    return _line_before(text, known, name, line)


def _import(text: str, file: str, paper: Paper) -> str:
    """Put the import of the loss in its place by module."""
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    if not nodes:
        raise InputError(f"{file} imports no loss: is this a checkout of the zoo?")
    module = f"zoo.losses.{paper.key}"
    known = [(str(node.module), node.lineno) for node in nodes]
    end = (nodes[-1].end_lineno or 0) + 1
    return _line_before(text, [*known, ("~", end)], module, f"from {module} import {paper.loss}")


def _line_before(text: str, known: list[tuple[str, int]], name: str, line: str) -> str:
    """Put a line in front of the first known name that is greater, or behind the last one."""
    lines = text.splitlines()
    place = next((number for other, number in known if other > name), known[-1][1] + 1)
    lines.insert(place - 1, line)
    return "\n".join(lines) + "\n"


def _note(text: str, paper: Paper) -> str:
    """Put a line on top of what the next version adds."""
    found = re.search(r"^## Unreleased\n+### Added\n+", text, flags=re.MULTILINE)
    if not found:
        raise InputError("CHANGELOG.md has no part 'Added' under 'Unreleased' to put the paper into: write one")
    values = _values(paper)
    title = paper.title or "FILL IN the title"
    line = f"- `{paper.cls}`{values['source_in_brackets']}: {title}; recipe `{paper.key}-digits`."
    return text[: found.end()] + textwrap.fill(line, _WIDTH, subsequent_indent="  ") + "\n" + text[found.end() :]


def _navigate(text: str, paper: Paper) -> str:
    """Put the page of the paper behind those of the other components."""
    found = list(re.finditer(r"^( *)- .*components/\w+\.md\n", text, flags=re.MULTILINE))
    if not found:
        raise InputError("mkdocs.yml has no page of a component in its navigation, beside which to put the new one")
    last = found[-1]
    return text[: last.end()] + f"{last[1]}- {paper.cls}: components/{paper.key}.md\n" + text[last.end() :]


def _write(root: Path, contents: dict[Path, str]) -> None:
    """Write all files, or leave everything as it was."""
    before = {path: (root / path).read_text(encoding="utf-8") if (root / path).exists() else None for path in contents}
    parents = {root / parent for path in contents for parent in path.parents}
    folders = sorted((folder for folder in parents if not folder.exists()), reverse=True)
    try:
        for path, text in contents.items():
            (root / path.parent).mkdir(parents=True, exist_ok=True)
            _replace(root / path, text)
    except BaseException as error:
        for path, old in before.items():
            if old is None:
                (root / path).unlink(missing_ok=True)
            elif (root / path).read_text(encoding="utf-8") != old:
                _replace(root / path, old)
        for folder in folders:
            if folder.exists():
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"nothing is written: {error.strerror}: {error.filename}") from error
        raise


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    written = path.with_name(f"{path.name}.new")
    try:
        written.write_text(text, encoding="utf-8")
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
