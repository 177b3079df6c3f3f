"""A recipe from the Hub is data: only names that the zoo and torch.optim know may stand in it.

LightningCLI imports and calls whatever a configuration names. A fetched recipe is therefore read as plain YAML first, and
refused if it names anything but registered components, the zoo's data modules, Lightning's own callbacks and file loggers,
and the optimizers and schedulers of torch; if a text in it could be taken for more configuration, or for something to
import; or if it writes outside the current folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import yaml

import zoo
from zoo import registry, storage
from zoo.errors import InputError

__all__ = ["check_recipe"]

_KEYS = frozenset(
    {
        "seed_everything",
        "trainer",
        "model",
        "data",
        "optimizer",
        "lr_scheduler",
        "requires",
        "ckpt_path",
        "weights_only",
    }
)
# Schedulers whose arguments are functions: a configuration gives them by import path.
_TAKES_FUNCTIONS = frozenset({"LambdaLR", "MultiplicativeLR"})
_CALLBACKS = frozenset(
    {
        "BackboneFinetuning", "DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler",
        "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "RichModelSummary", "RichProgressBar",
        "StochasticWeightAveraging", "TQDMProgressBar", "Timer",
    }
)  # fmt: skip
# A recipe of somebody else sends nothing.
_SENDS = "PushToHub"
_LOGGERS = frozenset({"CSVLogger", "TensorBoardLogger"})
_CLASS_KEYS = frozenset({"class_path", "init_args"})
_CODE_KEYS = _CLASS_KEYS | {"dict_kwargs", "_target_", "_class_path", "_instantiator"}
# jsonargparse imports what stands before the last dot before it looks at the rest, which may be anything.
_IMPORT_PATH = re.compile(r"\s*[^\W\d]\w*\s*\..*", re.DOTALL)
_DATA_FILES = (".parquet", ".csv", ".npy", ".tar", ".inter")
# Arguments of the zoo's data modules that are words and nothing else, such as "St. Bernard".
_WORDS = ("data.init_args.class_names[",)
# Arguments that name layers, "layer3.0" or "backbone.blocks.11:input": text and nothing else, in each class that has one.
_LAYER_ARGUMENT = re.compile(r"(model|trainer\.callbacks\[\d+\])\.init_args\.(\w+_)?layers?(\[\d+\])?")
_LAYER = re.compile(r"[\w.]+(:input)?")
_OPTION = re.compile(r"[^\s.+]+")
_OUTSIDE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|(?!hf://)\w+://")
_MAX_CHARACTERS = 1 << 16
# The widths, lengths and counts of any run are below; memory for more is asked for before anything can be compared.
_MAX_NUMBER = 1 << 32


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, f"the alias *{event.anchor} is refused")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def check_recipe(text: str, source: str) -> dict[str, Any]:
    """Read a fetched recipe and refuse what could run code.

    Args:
        text: YAML, at most 65536 characters, without aliases.
        source: where it comes from, for the error message.

    Returns:
        The configuration.

    Raises:
        InputError: it is no configuration, or names something that is not allowed; the message gives the key.
    """
    recipe = _read(text, source)
    unknown = sorted(map(str, recipe.keys() - _KEYS))
    if unknown:
        raise InputError(f"{source}: recipe.yaml has keys that no recipe has: {unknown[:8]}")
    if recipe.get("ckpt_path") is not None:
        raise InputError(f"{source}: recipe.yaml names a checkpoint (ckpt_path), which a fetched recipe may not")
    if recipe.get("weights_only") not in (None, True):
        raise InputError(f"{source}: weights_only {recipe['weights_only']!r} is refused: pickled files could run code")
    if not isinstance(recipe.get("seed_everything", True), int | None):
        raise InputError(f"{source}: seed_everything must be a number, true or false")
    _check_requires(recipe.get("requires", {}), source)
    _check_trainer(recipe.get("trainer", {}), source)
    _check_class(recipe.get("model"), "model", zoo._names_in("zoo.lightning_modules"), source)
    _check_class(recipe.get("data"), "data", zoo._names_in("zoo.data"), source)
    _check_torch(recipe.get("optimizer"), "optimizer", torch.optim.Optimizer, source)
    _check_torch(recipe.get("lr_scheduler"), "lr_scheduler", torch.optim.lr_scheduler.LRScheduler, source)
    return recipe


def _read(text: str, source: str) -> dict[Any, Any]:
    if len(text) > _MAX_CHARACTERS:
        raise InputError(f"{source}: recipe.yaml has {len(text)} characters, more than {_MAX_CHARACTERS}: refused")
    try:
        recipe = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a safe loader with less
    except RecursionError as error:
        raise InputError(f"{source}: recipe.yaml is nested too deeply to be a configuration") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # also numbers and dates that are none
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: recipe.yaml is no plain YAML: {said}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{source}: recipe.yaml is no configuration")
    return recipe


def _check_requires(requires: Any, source: str) -> None:
    if requires is None:
        return
    if not isinstance(requires, dict):
        raise InputError(f"{source}: requires must map folders to recipes")
    for folder, recipe in requires.items():
        if not isinstance(recipe, str) or recipe not in registry.recipes():
            raise InputError(f"{source}: requires.{folder} names {recipe!r}, which is no recipe of the zoo")
        if not isinstance(folder, str) or _is_outside(folder):
            raise InputError(f"{source}: requires.{folder} points outside the folder of the run")


def _check_trainer(trainer: Any, source: str) -> None:
    if trainer is None:
        return
    if not isinstance(trainer, dict):
        raise InputError(f"{source}: trainer must hold options")
    for key, value in trainer.items():
        if key == "callbacks":
            for index, callback in enumerate(value if isinstance(value, list) else [value]):
                _check_callback(callback, f"trainer.callbacks[{index}]", source)
        elif key == "logger":
            _check_logger(value, source)
        else:
            _check_key(key, "trainer", source)
            _check_value(value, f"trainer.{key}", source)


def _check_callback(value: Any, where: str, source: str) -> None:
    allowed = {
        **zoo._names_in("zoo.callbacks"),
        **dict.fromkeys(_CALLBACKS, "lightning.pytorch.callbacks"),
    }
    if allowed.pop(_SENDS, None) and str(_class_name(value)).rpartition(".")[2] == _SENDS:
        raise InputError(f"{source}: {where}.class_path {_SENDS} is refused: a fetched recipe may not send anything")
    _check_class(value, where, allowed, source)


def _check_logger(value: Any, source: str) -> None:
    for index, logger in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(logger, bool) and logger is not None:
            _check_class(
                logger, f"trainer.logger[{index}]", dict.fromkeys(_LOGGERS, "lightning.pytorch.loggers"), source
            )


def _check_class(value: Any, where: str, allowed: dict[str, str], source: str) -> None:
    """Check that a class is one of ``allowed`` (name -> module), by short name or by one of its own paths."""

    def is_allowed(package: str, short: str) -> bool:
        home = allowed.get(short)
        return home is not None and package in ("", "zoo", home, home.rpartition(".")[0], f"{home}.{_snake(short)}")

    _check_named(value, where, is_allowed, "a fetched recipe may not choose code", source)


def _check_torch(value: Any, where: str, base: type, source: str) -> None:
    """Check that a class is one that torch offers beside ``base``, and takes no functions."""
    package = "torch.optim" if base is torch.optim.Optimizer else "torch.optim.lr_scheduler"
    module = torch.optim if base is torch.optim.Optimizer else torch.optim.lr_scheduler

    def is_allowed(prefix: str, short: str) -> bool:
        cls = getattr(module, short, None)
        known = isinstance(cls, type) and issubclass(cls, base) and short not in _TAKES_FUNCTIONS
        lightning = prefix == "lightning.pytorch.cli" and short == "ReduceLROnPlateau"
        return known and (prefix in ("", package) or lightning)

    _check_named(value, where, is_allowed, f"only classes of {package} that take no functions may be named", source)


def _check_named(value: Any, where: str, is_allowed: Callable[[str, str], bool], rule: str, source: str) -> None:
    if value is None:
        return
    if isinstance(value, dict) and value.keys() - _CLASS_KEYS:
        extra = sorted(map(str, value.keys() - _CLASS_KEYS))
        raise InputError(f"{source}: {where} has keys besides class_path and init_args: {extra[:8]}")
    name = _class_name(value)
    if not isinstance(name, str):
        raise InputError(f"{source}: {where}.class_path names no class")
    package, _, short = name.rpartition(".")
    if not is_allowed(package, short):
        raise InputError(f"{source}: {where}.class_path {name[:200]!r} is refused: {rule}")
    arguments = value.get("init_args") if isinstance(value, dict) else None
    if not isinstance(arguments, dict | None):
        raise InputError(f"{source}: {where}.init_args must hold options")
    _check_value(arguments, f"{where}.init_args", source)


def _class_name(value: Any) -> Any:
    return value.get("class_path") if isinstance(value, dict) else value


def _check_key(key: Any, where: str, source: str) -> None:
    """Refuse keys that stand for more than an option: ``a.class_path`` sets a part of ``a``, ``a+`` adds to it."""
    if key in _CODE_KEYS:
        raise InputError(f"{source}: {where}.{key} is refused: a fetched recipe may not choose code")
    # Whole numbers are epochs, as GradientAccumulationScheduler takes them.
    if type(key) is not int and not (isinstance(key, str) and _OPTION.fullmatch(key)):
        raise InputError(f"{source}: {where} has the key {str(key)[:200]!r}, which is no option")


def _check_value(value: Any, where: str, source: str) -> None:
    """Refuse nested classes, what an argument of another type would import, and places outside the current folder."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_key(key, where, source)
            _check_value(item, f"{where}.{key}", source)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(item, f"{where}[{index}]", source)
    elif isinstance(value, str):
        _check_text(value, where, source)
    elif isinstance(value, int | float) and abs(value) > _MAX_NUMBER:
        raise InputError(f"{source}: {where} is larger than {_MAX_NUMBER}: refused")
    elif not isinstance(value, bool | int | float | None):
        raise InputError(f"{source}: {where} is a {type(value).__name__}, which no option takes")


def _check_text(value: str, where: str, source: str) -> None:
    if where.startswith(_WORDS):
        return
    shown = repr(value[:200])
    is_file = where.startswith("data.") and value.endswith(_DATA_FILES)
    is_layer = _LAYER_ARGUMENT.fullmatch(where) and _LAYER.fullmatch(value)
    if _IMPORT_PATH.fullmatch(value) and not (is_file or is_layer):
        raise InputError(f"{source}: {where} {shown} is refused: it could be the path of something to import")
    if _is_outside(value.removeprefix("diffusers/")):
        raise InputError(f"{source}: {where} {shown} points outside the current folder")
    # Where a class is asked for, jsonargparse reads a text as configuration, or as the name of a file with one.
    if value.rpartition("/")[2].lower().endswith((".yaml", ".yml", ".json")) or _is_stored_file(value):
        raise InputError(f"{source}: {where} {shown} is refused: it could be a file with more configuration")
    _check_nested(value, where, source)


def _check_nested(text: str, where: str, source: str) -> None:
    """Refuse a text that is itself configuration which chooses code."""
    try:
        nested = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a safe loader with less
    except (yaml.constructor.ConstructorError, RecursionError) as error:
        raise InputError(f"{source}: {where} {text[:200]!r} is refused: it could be more configuration") from error
    except (yaml.YAMLError, ValueError, OverflowError):
        nested = None
    if isinstance(nested, dict | list):
        _check_value(nested, where, source)
    for key in _CODE_KEYS:
        if key in text:
            raise InputError(
                f"{source}: {where} {text[:200]!r} is refused: a fetched recipe may not choose code ({key})"
            )


def _is_outside(path: str) -> bool:
    return _OUTSIDE.match(path.strip()) is not None or ".." in re.split(r"[/\\]", path)


def _is_stored_file(path: str) -> bool:
    return path.rpartition("/")[2] in {name.rpartition("/")[2] for name in storage.FILES}


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
