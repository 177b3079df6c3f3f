"""The code blocks of a Markdown page: read, run in the order of the page, or held against what there is without running.

``python`` blocks share one namespace. A block with a title (``title="mine.py"`` behind the language) is a file of that name.
The ``zoo`` lines of ``bash`` blocks run in this process, shortened to a step or two; every other command is only looked at.
Blocks of any other language, or of none, are for the eye.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any

import yaml

import zoo
from zoo import cli, registry

__all__ = ["Block", "check_block", "needs_hub", "read_blocks", "run_page", "zoo_words"]

ROOT = Path(__file__).parents[1]
# What the blocks may be written in. A misspelt language would not be run, and nobody would notice.
LANGUAGES = {"python", "bash", "yaml", "text", "console", "json", "toml", "markdown", "bibtex", ""}
# What runs a configuration.
TRAINING = ("fit", "validate", "test", "predict")
# Recipes that need no download have one of these in their names.
OFFLINE = ("digits", "synthetic")
# Commands that take minutes, or write into a checkout; they have tests of their own.
LOOKED_AT = ("demo", "new")
# The shell's own, and tools that are not ours.
OTHERS = ("export", "unset", "cd", "git", "hf", "pre-commit", "ruff", "mypy", "mkdocs")
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)(?P=fence)[ \t]*$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is (empty if none), its text, and the line of its fence, from 1."""

    language: str
    title: str
    text: str
    line: int


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in their order; one inside another is part of it."""
    source = page.read_text(encoding="utf-8")
    blocks = []
    for found in FENCE.finditer(source):
        language, _, rest = found["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        line = source.count("\n", 0, found.start()) + 1
        assert language in LANGUAGES, f"{page.name}:{line}: no language that is known: {language!r}"
        blocks.append(Block(language, title[1] if title else "", textwrap.dedent(found["text"]), line))
    return blocks


def needs_hub(page: Path) -> bool:
    """Tell whether a command of a page speaks to the Hub when it is run."""
    told = ("HF_ENDPOINT", "hf://", "zoo push", "zoo pull")
    return any(word in block.text for block in read_blocks(page) if block.language == "bash" for word in told)


def run_page(page: Path, *, commands: bool = True) -> dict[str, Any]:
    """Run a page in the working directory, an empty folder, and return the names that its Python blocks leave.

    Args:
        page: the file.
        commands: run the ``zoo`` lines too; otherwise they are held against what there is.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = read_blocks(page)
    written = {block.title for block in blocks if block.title}
    with _importable(Path.cwd()):
        for block in blocks:
            if block.title:
                Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                Path(block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                # The lines in front make the line of an error that of the page.
                exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
            elif block.language == "bash":
                for words in _commands(block):
                    _check(words, written, f"{page.name}:{block.line}")
                    if commands:
                        _run(words)
    return names


def check_block(block: Block, page: Path) -> None:
    """Hold each command of a ``bash`` block against what there is.

    Args:
        block: the block.
        page: its page, whose other blocks may write files that a command uses.

    Raises:
        AssertionError: a command, recipe, option, file, module or target does not exist.
    """
    written = {other.title for other in read_blocks(page) if other.title}
    for words in _commands(block):
        _check(words, written, f"{page.name}:{block.line}")


def zoo_words(words: list[str]) -> list[str] | None:
    """Return what stands behind ``zoo`` or ``python -m zoo``; None if that is not the command."""
    if words[:1] == ["zoo"]:
        return words[1:]
    return words[3:] if words[:3] == ["python", "-m", "zoo"] else None


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the page's files be imported, and forget them afterwards."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def _commands(block: Block) -> list[list[str]]:
    """Return the words of each command, without variables in front of it and the path of the environment's programs."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removesuffix("&"), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


# -- run ---------------------------------------------------------------------------------------------------------------


def _run(words: list[str]) -> None:
    ours = zoo_words(words)
    if ours is None or not ours or ours[0] in LOOKED_AT:
        return
    if ours[0] in TRAINING:
        if not _available(ours):
            return
        _train_required(ours)
        ours = [*ours, *_shorter(ours)]
    assert cli.main(ours) == 0, shlex.join(words)


def _available(words: list[str]) -> bool:
    """Tell whether the configurations are there and need no download."""
    for config in _configs(words):
        if config in registry.recipes():
            there = any(word in config for word in OFFLINE)
        else:
            there = config.startswith("hf://") or Path(config).exists()
        if not there:
            return False
    return True


def _train_required(words: list[str]) -> None:
    """Train what a recipe requires, shortened too; `zoo fit` itself would take its time."""
    if words[0] != "fit":
        return
    for config in _configs(words):
        for folder, recipe in _content(config).get("requires", {}).items():
            if not Path(folder, "config.json").exists():
                _run(["zoo", "fit", "--config", recipe, "--trainer.default_root_dir", folder])


def _shorter(words: list[str]) -> list[str]:
    few = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    few += ["--trainer.limit_test_batches=1"] if words[0] in ("fit", "test") else []
    few += ["--trainer.limit_val_batches=1"] if words[0] in ("fit", "validate") else []
    if words[0] == "fit":
        few += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.num_sanity_val_steps=0"]
        if "train_samples" in _arguments_of_data(words):
            few += ["--data.train_samples=64"]
    return few


# -- held against what there is ----------------------------------------------------------------------------------------


def _check(words: list[str], written: set[str], where: str) -> None:
    ours = zoo_words(words)
    if ours is not None:
        _check_zoo(ours, written, where)
    elif words[0] == "make":
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(f"\n{word}:" in targets for word in words[1:]), f"{where}: no such target: {shlex.join(words)}"
    elif words[0] == "python":
        _check_python(words[1:], written, where)
    elif words[0] == "pip":
        _check_installation(words, where)
    else:
        assert words[0] in OTHERS, f"{where}: not known here: {shlex.join(words)}"


def _check_zoo(words: list[str], written: set[str], where: str) -> None:
    line = f"{where}: zoo {shlex.join(words)}"
    if words[0] in ("--help", "--version"):
        return
    assert words[0] in cli._COMMANDS, line
    if words[0] in TRAINING:
        _check_training(words, written, line)
        return
    given = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    if given:
        told = _help(words[0])
        assert all(re.search(rf"{re.escape(option)}\b", told) for option in given), line
    if words[0] == "show" and "/" not in words[1] and not words[1].startswith("-"):
        registry.describe(words[1])


def _check_training(words: list[str], written: set[str], line: str) -> None:
    for config in _configs(words):
        known = config in registry.recipes() or config in written or config == "my.yaml"
        assert known or config.startswith(("runs/", "hf://")), f"{line}: no configuration {config!r}"
    model = _arguments_of_model(words)
    data = _arguments_of_data(words)
    for word in words:
        if not word.startswith("--"):
            continue
        group, _, rest = word[2:].partition("=")[0].partition(".")
        name = rest.partition(".")[0].removesuffix("+")
        if group == "model" and name and model:
            assert name in model, f"{line}: the model has no {name!r}"
        elif group == "data" and name and data:
            assert name in data, f"{line}: the data have no {name!r}"
        elif group == "trainer":
            assert name in _parameters("lightning.pytorch", "Trainer"), f"{line}: the trainer has no {name!r}"
        else:
            groups = (
                "config",
                "model",
                "data",
                "optimizer",
                "lr_scheduler",
                "seed_everything",
                "requires",
                "ckpt_path",
            )
            assert group in (*groups, "print_config", "help"), f"{line}: no option {word!r}"


def _configs(words: list[str]) -> list[str]:
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [value if word == "--config" else word[9:] for word, value in pairs if re.match(r"--config(=|$)", word)]


def _content(config: str) -> dict[str, Any]:
    """Return a recipe or a file of the page; nothing of one that is not there."""
    path = registry.recipe_path(config) if config in registry.recipes() else Path(config)
    if path.is_dir():
        path /= "recipe.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}


def _class_of(words: list[str], group: str) -> str:
    """Return the short name of the class of ``model`` or ``data``, of the last configuration that names one."""
    named = [word.partition("=")[2] for word in words if word.startswith(f"--{group}=")]
    named += [value for word, value in itertools.pairwise(words) if word == f"--{group}"]
    for config in _configs(words):
        content = _content(config).get(group, {})
        named += [content.get("class_path", "")] if isinstance(content, dict) else []
    return next((name.rpartition(".")[2] for name in reversed(named) if name), "")


def _arguments_of_model(words: list[str]) -> set[str]:
    name = _class_of(words, "model")
    if name not in registry.components():
        return set()
    return {option.name for option in registry.options(name)} | {"class_path", "init_args"}


def _arguments_of_data(words: list[str]) -> set[str]:
    name = _class_of(words, "data")
    return _parameters(zoo._LAZY[name], name) | {"class_path", "init_args"} if name in zoo._LAZY else set()


def _parameters(module: str, name: str) -> set[str]:
    return set(inspect.signature(getattr(import_module(module), name)).parameters)


def _help(command: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return shown.getvalue()


def _check_python(words: list[str], written: set[str], where: str) -> None:
    line = f"{where}: python {shlex.join(words)}"
    if words[0] == "-c":
        compile(words[1], line, "exec")
        return
    if words[0] in written:
        return
    if words[0] == "-m":
        assert util.find_spec(words[1]) is not None, line
        path, words = ROOT / words[1].replace(".", "/"), words[1:]
        if not (path.is_dir() or path.with_suffix(".py").is_file()):  # a module that is not ours
            return
    else:
        path = ROOT / words[0]
        assert path.is_file(), line
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert all(f'"{option}"' in _text(path) for option in options), line


def _text(path: Path) -> str:
    """Return the source of a script, or of all files of a package that is run."""
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def _check_installation(words: list[str], where: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        found = re.fullmatch(r"(?:lightning-zoo|\.)\[([\w,]+)\]", word)
        assert not found or set(found[1].split(",")) <= extras.keys(), f"{where}: no such extra: {shlex.join(words)}"
