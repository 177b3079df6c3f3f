"""Names of components and recipes, and what is known of each without importing torch."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml

import zoo
from zoo.errors import InputError, nearest

__all__ = [
    "Component",
    "Option",
    "component_class",
    "component_name",
    "components",
    "describe",
    "recipe_path",
    "recipes",
    "register",
]

_Class = TypeVar("_Class", bound=type)
_KINDS = {"zoo.lightning_modules": "LightningModule", "zoo.callbacks": "Callback"}
_registered: dict[str, type] = {}


@dataclass(frozen=True)
class Option:
    """One constructor argument: its name, annotation, default (as source text, None if required) and meaning."""

    name: str
    annotation: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Component:
    """What ``zoo list`` and ``zoo show`` print of a component.

    Attributes:
        name: the public class name.
        kind: ``"LightningModule"`` or ``"Callback"``.
        module: the module that defines it.
        stem: the stem that its files share (``nd`` in ``lightning_modules/nd.py``, ``cards/nd.md``, ``nd-digits.yaml``).
        sheet: the front matter of its paper sheet (``title``, ``authors``, ``venue``, ``arxiv``, ``status`` and others).
        text: the body of the sheet, Markdown.
        recipes: names of the recipes that train it.
    """

    name: str
    kind: str
    module: str
    stem: str
    sheet: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    recipes: tuple[str, ...] = ()


@overload
def register(cls: _Class, /) -> _Class: ...
@overload
def register(*, name: str) -> Callable[[_Class], _Class]: ...
def register(cls: _Class | None = None, /, *, name: str | None = None) -> _Class | Callable[[_Class], _Class]:
    """Let a class of your own be stored and loaded: ``@zoo.register`` above a ``ZooModule`` subclass.

    A stored model names its component, and only registered names are ever looked up: nothing that is read from a
    repository chooses what is imported.

    Args:
        cls: the class.
        name: the name in stored models; the class name if omitted.

    Returns:
        The class, unchanged.

    Raises:
        InputError: the name belongs to another component already.
    """

    def add(target: _Class) -> _Class:
        key = name or target.__name__
        known = _registered.get(key)
        if key in _table() or (known is not None and known.__qualname__ != target.__qualname__):
            raise InputError(f"a component named {key!r} exists already; register yours as @zoo.register(name=…)")
        _registered[key] = target
        return target

    return add if cls is None else add(cls)


def components(*, registered: bool = False) -> list[str]:
    """Return the names of the zoo's components, sorted.

    Args:
        registered: add the classes that joined with `register` in this process.
    """
    return sorted({*_table(), *(_registered if registered else ())})


def component_class(name: str) -> type:
    """Return the class of a component by its registry name.

    Args:
        name: the registry name, never a dotted path.

    Raises:
        InputError: no such component; the nearest names are shown.
    """
    if name in _registered:
        return _registered[name]
    if name in _table():
        return getattr(import_module(_table()[name]), name)  # type: ignore[no-any-return]
    raise InputError(
        f"no component named {name!r}.{nearest(name, components(registered=True))} `zoo list` shows all; a class of your "
        "own joins with @zoo.register"
    )


def component_name(cls: type) -> str:
    """Return the registry name of a class.

    Args:
        cls: a component class.

    Raises:
        InputError: the class is not registered.
    """
    for key, known in _registered.items():
        if known is cls:
            return key
    if _table().get(cls.__name__) == cls.__module__:
        return cls.__name__
    raise InputError(f"{cls.__qualname__} is not registered; put @zoo.register above the class")


def describe(name: str) -> Component:
    """Return what is known of a component of the zoo, without importing torch.

    Args:
        name: the registry name of a component that comes with the zoo.

    Raises:
        InputError: no such component; the nearest names are shown.
    """
    table = _table()
    if name not in table:
        raise InputError(f"no component named {name!r}.{nearest(name, table)} `zoo list` shows all")
    module = table[name]
    package, _, stem = module.rpartition(".")
    sheet, text = _read_sheet(stem)
    return Component(
        name=name,
        kind=_KINDS[package],
        module=module,
        stem=stem,
        sheet=sheet,
        text=text,
        recipes=tuple(recipe for recipe in recipes() if recipe.startswith(f"{stem}-")),
    )


def options(name: str) -> list[Option]:
    """Return the constructor arguments of a component, read from its source without importing it.

    Args:
        name: the registry name of a component that comes with the zoo.
    """
    component = describe(name)
    package, _, stem = component.module.rpartition(".")
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    tree = ast.parse(Path(spec.submodule_search_locations[0], f"{stem}.py").read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    meanings = _argument_meanings(ast.get_docstring(cls) or "")
    positional = init.args.args[1:]
    padding: list[ast.expr | None] = [None] * (len(positional) - len(init.args.defaults))
    pairs = [
        *zip(positional, [*padding, *init.args.defaults], strict=True),
        *zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True),
    ]
    return [
        Option(
            name=argument.arg,
            annotation=ast.unparse(argument.annotation) if argument.annotation else "",
            default=ast.unparse(default) if default else None,
            meaning=meanings.get(argument.arg, ""),
        )
        for argument, default in pairs
    ]


def recipes() -> list[str]:
    """Return the names of the recipes that come with the zoo, sorted."""
    folder = resources.files("zoo.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of a named recipe.

    Args:
        name: the recipe, such as ``"nd-digits"``.

    Raises:
        InputError: no such recipe; the nearest names are shown.
    """
    if name not in recipes():
        raise InputError(
            f"no recipe named {name!r} and no such file.{nearest(name, recipes())} `zoo list` shows the recipes"
        )
    return Path(str(resources.files("zoo.recipes") / f"{name}.yaml"))


def _table() -> dict[str, str]:
    found = {name: module for package in _KINDS for name, module in zoo._names_in(package).items()}
    return {name: module for name, module in found.items() if name not in zoo._BASES}


def _read_sheet(stem: str) -> tuple[dict[str, Any], str]:
    source = (resources.files("zoo.cards") / f"{stem}.md").read_text(encoding="utf-8")
    _, front, text = source.split("---\n", 2)
    return yaml.safe_load(front), text.strip()


def _argument_meanings(docstring: str) -> dict[str, str]:
    """Read the ``Args:`` section of a Google docstring: argument -> its text on one line."""
    meanings: dict[str, str] = {}
    current = ""
    for line in docstring.partition("\nArgs:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        stripped = line.strip()
        if line.startswith("    ") and not line.startswith("     ") and ":" in stripped:
            current, _, rest = stripped.partition(":")
            meanings[current] = rest.strip()
        elif stripped and current:
            meanings[current] += f" {stripped}"
    return meanings
