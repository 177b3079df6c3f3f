"""``config.json`` of a stored model: read as data that may be hostile, and checked key by key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from zoo import golden, storage
from zoo.arguments import refuse_code
from zoo.errors import InputError, nearest

__all__ = ["FORMAT", "dump_config", "read_config"]

FORMAT = 1
_KINDS = {
    "zoo_format": int,
    "component": (str, type(None)),
    "versions": dict,
    "args": dict,
    "supplied": dict,
    "omitted": dict,
    "weights": dict,
    "golden": (dict, type(None)),
    "run": (dict, type(None)),
}
_MAX_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLASS_NAME = re.compile(r"[\w.<>]{1,200}")
_FACTS = {"name": (str, type(None)), "revision": (str, type(None)), "sha256": str, "training_only": bool}


def dump_config(config: dict[str, Any]) -> str:
    """Return the text of a configuration.

    Args:
        config: the configuration, JSON values.

    Raises:
        InputError: it is larger than one that can be read again.
    """
    ordered = {key: config[key] for key in _KINDS if key in config}
    text = json.dumps(ordered, indent=2, allow_nan=False) + "\n"
    if len(text) > _MAX_BYTES:
        raise InputError(
            f"the arguments of the model take {len(text)} bytes as JSON, at most {_MAX_BYTES} can be stored"
        )
    return text


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check the configuration of a stored model.

    Args:
        folder: its folder.

    Returns:
        The configuration, with all keys of the format.

    Raises:
        InputError: there is none, or it is not of this format.
    """
    path = storage.locate(folder, "config.json")
    if path is None:
        raise InputError(f"{folder} is no stored model: it has no config.json")
    config = _read_json(path)
    if not isinstance(config, dict) or "zoo_format" not in config:
        raise InputError(f"{path} is no configuration of the zoo: it has no zoo_format")
    if config["zoo_format"] != FORMAT:
        raise InputError(f"{path} has zoo_format {config['zoo_format']!r}, this version of the zoo reads {FORMAT}")
    for key in config:
        if key not in _KINDS:
            raise InputError(f"{path}: unknown key {key!r}.{nearest(key, _KINDS)}")
    _check_kinds(config, _KINDS, f"{path}: ")
    _check_facts(config, path)
    return config


def _check_facts(config: dict[str, Any], path: Path) -> None:
    for name, type_name in config["supplied"].items():
        if not isinstance(type_name, str) or not _CLASS_NAME.fullmatch(type_name):
            raise InputError(f"{path}: supplied.{name} must be the name of a class")
    for name, facts in config["omitted"].items():
        if not isinstance(facts, dict):
            raise InputError(f"{path}: omitted.{name} must be an object")
        _check_kinds(facts, _FACTS, f"{path}: omitted.{name}.")
        _check_sha256(facts["sha256"], f"{path}: omitted.{name}.sha256")
    _check_sha256(config["weights"].get("sha256"), f"{path}: weights.sha256")
    if config["golden"] is not None:
        golden.check(config["golden"], f"{path}: golden")


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path} is larger than {_MAX_BYTES} bytes: it is no configuration of the zoo")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_refuse_constant)
        refuse_code(config, "config")
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be a configuration of the zoo") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except ValueError as error:  # not JSON, not UTF-8, or an integer of thousands of digits
        raise InputError(f"{path} is not valid JSON: {error}") from error
    return config


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        _refuse_constant(text)
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise InputError(f"the number {text[:80]} is not finite")


def _check_kinds(values: dict[str, Any], kinds: dict[str, Any], where: str) -> None:
    for key, kind in kinds.items():
        if key not in values:
            raise InputError(f"{where}{key} is missing")
        if not isinstance(values[key], kind):
            wanted = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in wanted)
            raise InputError(f"{where}{key} must be {expected}, got {type(values[key]).__name__}")


def _check_sha256(value: Any, where: str) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise InputError(f"{where} must be 64 hexadecimal digits")
