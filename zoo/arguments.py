"""Constructor arguments as JSON and back: what a stored model may say about how it is built, and nothing more.

A stored configuration is data. It names no class and imports nothing: keys are those of the constructor, values are JSON
whose types are checked against the annotations, and the keys by which other libraries choose code are refused wherever
they stand.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import nn

from zoo.errors import InputError, nearest

__all__ = ["Supplied", "capture", "check_json", "decode", "encode", "parameter_names", "refuse_code"]

_CODE_KEYS = frozenset({"class_path", "init_args", "dict_kwargs", "_target_", "_class_path", "_instantiator"})


@dataclasses.dataclass(frozen=True)
class Supplied:
    """Stands for an argument that was a ready module and has to be supplied again.

    Attributes:
        type_name: qualified name of its class, for the error message only.
    """

    type_name: str


def capture(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor call by name, defaults included, modules replaced by `Supplied`.

    Args:
        cls: the class that is constructed.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The arguments, or an empty dict where the call does not fit the signature (the constructor itself will say so).
    """
    signature = inspect.signature(getattr(cls, "__init__"))  # noqa: B009 - mypy: unsound access
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    arguments = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and not arguments[name]:
            del arguments[name]
    return {
        name: Supplied(f"{type(value).__module__}.{type(value).__qualname__}")
        if isinstance(value, nn.Module)
        else value
        for name, value in arguments.items()
    }


def encode(name: str, value: Any) -> Any:
    """Turn an argument into JSON values.

    Args:
        name: the argument, for the error message.
        value: None, bool, int, a finite float, a NumPy scalar, str, a list, a tuple, a dict with string keys, or a dataclass
            of those.

    Returns:
        The same as JSON values; tuples become lists and dataclasses dicts.

    Raises:
        InputError: the value has no JSON form.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"argument {name!r} is {value}, and JSON has no such number: give a finite one")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(f"{name}.{field.name}", getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"argument {name!r} has the key {key!r}: keys must be strings to be stored")
        return {key: encode(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(f"{name}[{index}]", item) for index, item in enumerate(value)]
    raise InputError(
        f"argument {name!r} cannot be stored: {type(value).__module__}.{type(value).__qualname__} has no JSON form. Give "
        "a JSON value, a tower name, a dataclass of those, or an nn.Module that is supplied again at load"
    )


def refuse_code(value: Any, where: str) -> None:
    """Refuse the keys by which configurations choose code, anywhere in a JSON tree.

    Args:
        value: JSON values.
        where: the path of ``value``, for the error message.

    Raises:
        InputError: such a key stands somewhere; the message gives its path.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _CODE_KEYS:
                raise InputError(f"{where}.{key} is refused: a stored model may not choose code")
            refuse_code(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            refuse_code(item, f"{where}[{index}]")


def decode(cls: type, stored: dict[str, Any], where: str = "args") -> dict[str, Any]:
    """Check stored arguments against a constructor and turn them into what it takes.

    Args:
        cls: the component class.
        stored: JSON values by argument name.
        where: the path of ``stored``, for the error message.

    Returns:
        Keyword arguments, with lists as tuples and dicts as dataclasses where the annotation says so.

    Raises:
        InputError: an argument that the constructor does not have, a value of another type, or a key that chooses code.
    """
    refuse_code(stored, where)
    annotations = _annotations(cls)
    for name in stored:
        if name not in annotations:
            raise InputError(f"{where}.{name}: {cls.__name__} takes no such argument.{nearest(name, annotations)}")
    return {name: check_json(value, annotations[name], f"{where}.{name}") for name, value in stored.items()}


def parameter_names(cls: type) -> list[str]:
    """Return the names of the arguments that a class takes."""
    return list(_annotations(cls))


def _annotations(cls: type) -> dict[str, Any]:
    """Return argument -> annotation of the constructor and, where it passes ``**kwargs`` on, of those that it extends."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        try:
            hints = get_type_hints(init)
        except (NameError, AttributeError) as error:
            raise InputError(
                f"the annotations of {base.__qualname__}.__init__ cannot be resolved ({error}): import or define at module "
                "level what they name"
            ) from error
        kinds = {name: parameter.kind for name, parameter in list(inspect.signature(init).parameters.items())[1:]}
        for name, kind in kinds.items():
            if kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                found.setdefault(name, hints.get(name, Any))
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            break
    return found


def check_json(value: Any, annotation: Any, where: str) -> Any:  # noqa: PLR0911 - a case a kind of annotation
    """Check a JSON value against an annotation.

    Args:
        value: a JSON value.
        annotation: a resolved annotation: JSON types, unions, literals, lists, tuples, dicts, dataclasses.
        where: the path of the value, for the error message.

    Returns:
        The value; a list as tuple, a dict as dataclass, an int as float where the annotation says so.

    Raises:
        InputError: the value does not fit.
    """
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _check_union(value, annotation, where)
    if origin is Literal and any(type(value) is type(member) and value == member for member in get_args(annotation)):
        return value
    if (origin in (list, tuple, Sequence) or annotation is tuple) and isinstance(value, list):
        return _check_sequence(value, annotation, where)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return _check_mapping(value, annotation, where)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type) and isinstance(value, dict):
        return _check_dataclass(value, annotation, where)
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _check_float(value, where)
    if annotation is type(value):
        return value
    expected = getattr(annotation, "__name__", str(annotation)) if origin is None else str(annotation)
    raise InputError(f"{where} must be {expected}, got {json.dumps(value)[:80]}")


def _check_float(value: float, where: str) -> float:
    try:
        converted = float(value)
    except OverflowError as error:
        raise InputError(f"{where} must be a finite number, got an integer that no float can hold") from error
    if not math.isfinite(converted):
        raise InputError(f"{where} must be a finite number, got {value}")
    return converted


def _check_dataclass(value: dict[str, Any], annotation: type, where: str) -> Any:
    arguments = decode(annotation, value, where)
    try:
        return annotation(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} cannot be a {annotation.__name__}: {error}") from error


def _check_union(value: Any, annotation: Any, where: str) -> Any:
    # A ready module is no JSON value; its place in the union says that the argument may be supplied.
    members = [m for m in get_args(annotation) if not (isinstance(m, type) and issubclass(m, nn.Module))]
    containers = [member for member in members if member is not type(None)]
    if isinstance(value, dict | list) and len(containers) == 1:
        return check_json(value, containers[0], where)
    # An exact type comes first, so that 3 stays an int where float | int is asked for.
    for member in sorted(members, key=lambda member: member is not type(value)):
        try:
            return check_json(value, member, where)
        except InputError:
            continue
    expected = " or ".join("None" if m is type(None) else getattr(m, "__name__", str(m)) for m in members)
    raise InputError(f"{where} must be {expected}, got {json.dumps(value)[:80]}")


def _check_mapping(value: dict[str, Any], annotation: Any, where: str) -> dict[str, Any]:
    key_type, item_type = get_args(annotation) or (Any, Any)
    return {
        check_json(key, key_type, f"{where} key"): check_json(item, item_type, f"{where}.{key}")
        for key, item in value.items()
    }


def _check_sequence(value: list[Any], annotation: Any, where: str) -> Any:
    inner = get_args(annotation) or (Any, ...)
    if get_origin(annotation) is tuple or annotation is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            inner = inner[:1] * len(value)
        if len(inner) != len(value):
            raise InputError(f"{where} must have {len(inner)} items, got {len(value)}")
        return tuple(
            check_json(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, inner, strict=True))
        )
    return [check_json(item, inner[0], f"{where}[{index}]") for index, item in enumerate(value)]
