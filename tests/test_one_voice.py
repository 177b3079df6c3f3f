"""One voice: an option means one thing, and has one type and default, wherever it stands; names are British, files short."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("zoo", "lightning_modules", "callbacks")
_NAMES = r"(str \| )?(Sequence|list|Mapping|dict)\[.*str\]( \| None)?"

# Option, as a regular expression: type and default that it has everywhere, likewise.
OPTIONS = {
    "chunk_size": (
        r"int \| None",
        "None|-",
    ),  # rows (and columns) at a time of something quadratic; the value is the same
    "gather": ("bool", "False|-"),  # whether a loss spans the batches of all processes
    "reduction": (r"Reduction|Literal\['mean'.*\]", "'mean'|-"),  # over samples
    "layers": (_NAMES, ".*"),  # names of modules
    "class_names": (_NAMES, ".*"),  # in the order of the labels; `classes` are what is explained
    "k": (
        r"int|int \| None|Sequence\[int\]|int \| Sequence\[int\]|int \| NeighbourRule",
        ".*",
    ),  # how many are looked at
    "temperature": (r"float( \| Tensor)?", ".*"),  # divides scores or logits
    "scale": (r"float( \| Tensor)?", ".*"),  # multiplies them
    "weight|.*_weight": (r"float( \| Tensor)?", ".*"),  # factor of a term of a loss, or of the first of two
    "seed|.*_seed": (r"int( \| None)?", "0|42|None|-"),
    "(.*_)?batch_size": ("int", ".*"),  # how many at a time
    "micro_batch": (r"int \| None", "None|-"),  # parts of a given batch; the value is the same
    "every_n_epochs": ("int", "1"),  # counted from 1
    "image_size": (r"int( \| None)?", ".*"),  # side in pixels
    ".*_share": (r"float( \| None)?", ".*"),  # 0 … 1
    "lr": ("float", ".*"),
    "(.*_)?(steps|epochs)|depth|(item_)?hops": (r"int( \| None)?", ".*"),
    "max_samples|eval_samples": (r"int( \| None)?", ".*"),  # at most; None for all
    "num_.*": (r"int( \| None)?", ".*"),  # None: taken from the network or the data
    "eps": (r"float|Bound|Sequence\[float\]|float \| dict\[str, float\]", ".*"),  # radius of an attack; CKA's guard
    "device": (r"(str \| )?torch.device( \| str)?( \| None)?|str \| None", ".*"),
}
# Names that other libraries fix.
_THEIRS = r"colormap|optimizer|tokenizers?|centering"


@cache
def parameters() -> list[tuple[str, str, str, str]]:
    """Place, name, annotation and default (``-`` if none) of what public functions and constructors take."""
    found = []
    for path in (path for folder in LIBRARY for path in sorted((ROOT / folder).rglob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]:
            for node in scope.body:
                if isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name == "__init__"):
                    given, either = node.args, [*node.args.posonlyargs, *node.args.args]
                    defaults = [None] * (len(either) - len(given.defaults)) + given.defaults + given.kw_defaults
                    for one, default in zip([*either, *given.kwonlyargs], defaults, strict=True):
                        place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}({one.arg})"
                        annotation = ast.unparse(one.annotation) if one.annotation else ""
                        found.append((place, one.arg, annotation, ast.unparse(default) if default else "-"))
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_has_one_type(option: str) -> None:
    kind, default = OPTIONS[option]
    found = [row for row in parameters() if re.fullmatch(option, row[1]) and row[2] not in ("", "Tensor")]
    assert found
    wrong = [row for row in found if not (re.fullmatch(kind, row[2]) and re.fullmatch(default, row[3]))]
    assert not wrong, "\n".join(map(str, wrong))


def test_options_are_british_words() -> None:
    """One letter is for what has no other name: inputs x and y, points a and b, the k of a metric, the papers' t."""
    american = re.compile(r"center|color|behavior|neighbor|iz(e|er|ing|ation)s?$")
    wrong = [
        place
        for place, name, *_ in parameters()
        if (american.search(name) and not re.search(rf"{_THEIRS}|size", name))
        or (len(name) == 1 and name not in "xyabkt")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", [*LIBRARY, "tests", "benchmarks", "docs"])
def test_files_are_short(folder: str) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    too_long = [f"{path.relative_to(ROOT)}: {length}" for path, length in lengths.items() if length > 400]
    assert not too_long, "\n".join(too_long)
