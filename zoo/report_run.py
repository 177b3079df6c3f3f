"""What lies in the folder of a run, read for a report: checked, bounded, and nothing of it trusted. No torch."""

from __future__ import annotations

import base64
import hashlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from zoo import registry, storage
from zoo.card_facts import Facts, read_facts
from zoo.card_text import load_yaml, public, to_yaml
from zoo.errors import InputError
from zoo.publish import read_config, read_text
from zoo.report_curves import History, read_history

__all__ = ["Figure", "File", "StoredRun", "read_run"]

_MAX_TEXT = 1 << 17  # bytes of a recipe or a card
_MAX_FIGURE = 4 << 20  # bytes
_MAX_PIXELS = 50_000_000
_MAX_FIGURES = 24
_FIGURE = re.compile(r"[\w-][\w.-]*\.png", re.ASCII)
# Curves are drawn from the numbers; these files of them are shown in the card only.
_CURVES = ("figures/loss.png", "figures/metrics.png")
_SAID = {
    "layers": "How alike the layers of the two encoders are",
    "robustness": "Accuracy under attack",
    "saliency": "Where the network looks",
    "samples": "Samples of the model",
}


@dataclass(frozen=True)
class File:
    """One file of the stored format: its name in the folder, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: its file, such as ``"figures/saliency.png"``.
        title: what it shows, in words.
        uri: the image as a ``data:`` URI; "" if it cannot be shown.
        width: in pixels.
        height: in pixels.
        problem: why it is not shown; "" if it is.
    """

    name: str
    title: str
    uri: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""

    @property
    def is_curve(self) -> bool:
        """Whether it draws the curves, which a report draws from the numbers."""
        return self.name in _CURVES


@dataclass(frozen=True)
class StoredRun:
    """A stored model and its run.

    Attributes:
        name: of the folder; unique among the runs of a report.
        facts: what ``config.json`` says.
        component: the sheet of its component; None for a class of somebody's own and for plain weights.
        recipe: the configuration of the run, as it may be shown; {} if there is none that can be read.
        recipe_problem: why the recipe is not shown; "" if it is.
        history: the curves.
        figures: the figures, the curves' files among them.
        card: text of README.md; None if there is none.
        card_problem: why the card is not shown; "" if it is.
        files: the files of the stored format.
    """

    name: str
    facts: Facts
    component: registry.Component | None
    recipe: dict[str, Any]
    recipe_problem: str
    history: History
    figures: list[Figure]
    card: str | None
    card_problem: str
    files: list[File] = field(default_factory=list)

    @property
    def control(self) -> dict[str, Any]:
        """The arguments that switch the method off, as the sheet of the component names them."""
        found = self.component.sheet.get("control") if self.component else None
        return dict(found or {})

    @property
    def is_control(self) -> bool:
        """Whether this run is the control of its component."""
        args = self.facts.args
        return bool(self.control) and all(name in args and args[name] == value for name, value in self.control.items())

    @property
    def recipe_text(self) -> str:
        """The configuration of the run as YAML; "" if there is none to show."""
        return to_yaml(self.recipe) if self.recipe else ""

    @property
    def has_weights(self) -> bool:
        """Whether the weights are there."""
        return any(file.name == "model.safetensors" for file in self.files)


def read_run(folder: Path, name: str) -> StoredRun:
    """Read a stored model and what is known of its run.

    Args:
        folder: the folder, such as ``zoo fit`` leaves in ``trainer.default_root_dir``.
        name: what the report calls it.

    Raises:
        InputError: nothing is stored there, or its ``config.json`` is damaged.
    """
    config = read_config(folder)
    facts = read_facts(config)
    known = config.get("component") in registry.components()
    recipe, recipe_problem = _read_recipe(folder)
    card, card_problem = _bounded_text(folder, "README.md")
    return StoredRun(
        name=name,
        facts=facts,
        component=registry.describe(str(config["component"])) if known else None,
        recipe=recipe,
        recipe_problem=recipe_problem,
        history=read_history((config.get("run") or {}).get("history"), folder),
        figures=[_read_figure(name, path) for name, path in _figure_files(folder)][:_MAX_FIGURES],
        card=card,
        card_problem=card_problem,
        files=list(_files(folder)),
    )


def _bounded_text(folder: Path, name: str) -> tuple[str | None, str]:
    """Return a text file, or None and why it cannot be shown; a missing one has no reason."""
    path = storage.locate(folder, name)
    if path is None:
        return None, ""
    if path.stat().st_size > _MAX_TEXT:
        return None, f"{name} has {path.stat().st_size:,} bytes, of at most {_MAX_TEXT:,} that a report shows."
    try:
        return read_text(folder, name), ""
    except InputError:
        return None, f"{name} is no UTF-8 text."


def _read_recipe(folder: Path) -> tuple[dict[str, Any], str]:
    text, problem = _bounded_text(folder, "recipe.yaml")
    if text is None:
        return {}, problem or "No recipe was stored with these weights."
    try:
        content = load_yaml(text)
    except (yaml.YAMLError, RecursionError):
        return {}, "recipe.yaml is no plain YAML."
    if not isinstance(content, dict):
        return {}, "recipe.yaml holds no configuration."
    shown: dict[str, Any] = public(content)
    return shown, ""


def _files(folder: Path) -> Iterator[File]:
    for name in storage.names(folder):
        path = storage.locate(folder, name)
        assert path is not None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        yield File(name, path.stat().st_size, digest)


def _figure_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the figures of the format in its order, then what else lies beside them under a plain name."""
    for name in storage.FILES:
        path = storage.locate(folder, name) if name.startswith("figures/") else None
        if path is not None:
            yield name, path
    for path in sorted((folder / "figures").glob("*.png")):
        name = f"figures/{path.name}"
        if name not in storage.FILES and _FIGURE.fullmatch(path.name) and path.is_file():
            yield name, path


def _read_figure(name: str, path: Path) -> Figure:
    stem = Path(name).stem
    what, _, number = stem.partition("_")
    title = f"{_SAID[what]}{f' ({number})' if number else ''}" if what in _SAID else stem
    if path.stat().st_size > _MAX_FIGURE:
        return Figure(name, title, problem=f"it has {path.stat().st_size:,} bytes, of at most {_MAX_FIGURE:,}")
    content = path.read_bytes()
    size = _png_size(content)
    if size is None:
        return Figure(name, title, problem="it is no PNG image that can be read")
    if size[0] * size[1] > _MAX_PIXELS:
        return Figure(name, title, problem=f"it has {size[0]} x {size[1]} pixels, of at most {_MAX_PIXELS:,}")
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Figure(name, title, uri, *size)


def _png_size(content: bytes) -> tuple[int, int] | None:
    """Return width and height of a PNG file whose chunks are whole, or None."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is looked at below
            with Image.open(BytesIO(content), formats=("PNG",)) as image:
                image.verify()
                return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
