"""What a stored configuration says of a model and its run, read for a card: checked, and safe to show.

Every part may be missing. A part of a wrong type is an error that names it: the configuration may come from anywhere.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zoo.card_text import public
from zoo.errors import InputError

__all__ = ["Facts", "Origin", "Result", "read_facts"]

_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_DATA_SET = re.compile(rf"hf://datasets/({_REPO})(?:@[^/]*)?(?:/|\Z)", re.ASCII)
_FAMILY = re.compile(r"(?:timm|torchvision|open_clip|zoo)/.|hf://.")
# Arguments that hold a network, so that a path in them is the place of a stored model and not of data.
_NETWORKS = ("backbone", "encoder", "encoders", "frozen", "image", "network", "student", "teacher", "text", "trained")
_NOT_FINITE = frozenset({"nan", "inf", "+inf", "-inf", "infinity", "-infinity"})


@dataclass(frozen=True)
class Result:
    """One metric of one split; the value is None where it was not finite."""

    split: str
    name: str
    value: float | None
    samples: int | None


@dataclass(frozen=True)
class Origin:
    """A network that the model was made from.

    Attributes:
        part: the argument or attribute that holds it.
        name: its tower name; None for a module that was given ready.
        repo: the Hub repository of its weights, if they are of the Hub.
        see: where its licence is to be found; "" for random weights and for ready modules.
        random: whether it began from random weights.
        revision: of its weights, if recorded.
        sha256: of its weights; "" if they are part of the stored ones.
        training_only: whether only training needs it.
    """

    part: str
    name: str | None
    repo: str | None = None
    see: str = ""
    random: bool = False
    revision: str | None = None
    sha256: str = ""
    training_only: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known of a stored model; every string is fit to be shown once it is escaped.

    Attributes:
        component: its registry name; None for plain weights.
        args: constructor arguments.
        supplied: parts that were ready modules, with the names of their classes.
        origins: the networks it was made from.
        input_shape: shape of one input with its batch, () if not known.
        run: seed, epochs, steps, seconds, hardware, precision, monitor: those that are known.
        data: name of the data module; None if not known.
        data_args: its arguments.
        splits: number of samples by split.
        data_sets: the Hub's data sets among the arguments.
        results: the metrics.
        versions: of the packages.
        sha256: of the stored weights; "" if not known.
    """

    component: str | None
    args: dict[str, Any]
    supplied: dict[str, str]
    origins: list[Origin]
    input_shape: tuple[int, ...]
    run: dict[str, Any]
    data: str | None
    data_args: dict[str, Any]
    splits: dict[str, int]
    data_sets: list[str]
    results: list[Result]
    versions: dict[str, str]
    sha256: str


def read_facts(config: Mapping[str, Any]) -> Facts:
    """Read a configuration.

    Args:
        config: content of ``config.json``, with a key ``run``.

    Raises:
        InputError: a part has a wrong type.
    """
    run = _mapping(config, "run")
    data = _mapping(run, "data", "run.")
    args = _mapping(config, "args")
    splits = {
        str(name): size
        for name, size in _mapping(data, "splits", "run.data.").items()
        if _count(name, size) is not None
    }
    component = config.get("component")
    return Facts(
        component=None if component is None else public(str(component)),
        args=public(args),
        supplied=public(_mapping(config, "supplied")),
        origins=list(_origins(config, args)),
        input_shape=_input_shape(_mapping(config, "golden").get("input_shape")),
        run=public({name: run[name] for name in _RUN if run.get(name) is not None}),
        data=None if data.get("name") is None else public(str(data["name"])),
        data_args=public(_mapping(data, "args", "run.data.")),
        splits=public(splits),
        data_sets=sorted(set(_data_sets(data.get("args")))),
        results=list(_results(_mapping(run, "metrics", "run."), splits)),
        versions={name: str(version) for name, version in public(_mapping(config, "versions")).items()},
        sha256=public(str(_mapping(config, "weights").get("sha256", ""))),
    )


_RUN = ("seed", "epochs", "steps", "seconds", "hardware", "precision", "monitor")


def _mapping(parent: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}{key} must be an object, got {type(value).__name__}")
    return {str(name): item for name, item in value.items()}


def _count(name: str, size: Any) -> int | None:
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise InputError(f"run.data.splits.{name} must be a number of samples, got {str(size)[:80]!r}")
    return size


def _input_shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, list | tuple) and all(type(size) is int and 0 < size < 1 << 20 for size in shape):
        return tuple(shape)
    return ()


def _results(metrics: dict[str, Any], splits: dict[str, int]) -> Iterator[Result]:
    for split in metrics:
        for name, value in _mapping(metrics, split, "run.metrics.").items():
            number = _finite(value, f"run.metrics.{split}.{name}")
            yield Result(public(split), public(name), number, splits.get(split))


def _finite(value: Any, where: str) -> float | None:
    """Return a float, or None for what JSON cannot hold: NaN and infinities as numbers, as words, or as null."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _NOT_FINITE):
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{where} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _data_sets(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        found = _DATA_SET.match(value)
        if found:
            yield found[1]
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _data_sets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _data_sets(item)


def _origins(config: Mapping[str, Any], args: dict[str, Any]) -> Iterator[Origin]:
    omitted = _mapping(config, "omitted")
    supplied = _mapping(config, "supplied")
    for part in omitted:
        tower = _mapping(omitted, part, "omitted.")
        yield _origin(
            part,
            tower.get("name"),
            revision=None if tower.get("revision") is None else public(str(tower["revision"])),
            sha256=public(str(tower.get("sha256", ""))),
            training_only=tower.get("training_only") is True,
        )
    for part in supplied.keys() - omitted.keys():
        yield Origin(public(part), None)
    inside = {
        f"{part}.{key}": item
        for part, value in args.items()
        if isinstance(value, Mapping) and "component" not in value
        for key, item in value.items()
    }
    for part, name in {**args, **inside}.items():
        if part not in omitted and isinstance(name, str) and _is_network(part, name, args):
            yield _origin(part, name)
        if isinstance(name, Mapping) and {"component", "source", "sha256"} <= name.keys():
            # The network of another stored model, whose weights are part of this one.
            source = str(name["source"])
            repo = _hub_repository(source)
            see = f"https://huggingface.co/{repo}" if repo else "the card of that model"
            label = f"{name['component']} {source}"
            yield Origin(public(part), public(label), repo=repo, see=see, sha256=public(str(name["sha256"])))


def _is_network(part: str, name: str, args: dict[str, Any]) -> bool:
    path = name.startswith((".", "/", "~"))
    known = part.partition(".")[0] in _NETWORKS or f"{part}_options" in args
    return bool(_FAMILY.match(name)) or (path and known)


def _origin(part: str, name: Any, **known: Any) -> Origin:
    if name is None:
        return Origin(public(part), None, **known)
    name = str(name)
    repo = _hub_repository(name)
    see = ""
    if repo is not None:
        see = f"https://huggingface.co/{repo}"
    elif name.startswith("torchvision/") and name.count("/") > 1:
        see = "https://pytorch.org/vision/stable/models.html"
    elif name.startswith("open_clip/") and name.count("/") > 1:
        see = "https://github.com/mlfoundations/open_clip"
    elif name.startswith((".", "/", "~", "hf://", "timm/hf-hub:")):
        see = "the card of that model"
    return Origin(public(part), public(name), repo=repo, see=see, random=not see, **known)


def _hub_repository(name: str) -> str | None:
    """Return the repository of a tower's weights: of ``timm/arch.tag``, ``timm/hf-hub:org/name`` and ``hf://org/name``."""
    found = re.fullmatch(rf"(?:hf://|timm/hf-hub:)({_REPO})(?:@.*)?", name, re.ASCII)
    if found:
        return found[1]
    return name if re.fullmatch(r"timm/[A-Za-z0-9]\w*\.[\w.-]+", name, re.ASCII) else None
