"""What the Hub checks in the metadata of a card, as ``/api/validate-yaml`` answers it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from tests.hub_server.front_matter import CardError, front_matter

__all__ = ["problems"]

# fmt: off
_LICENSES = frozenset([
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "h-research",
    "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "open-mdw",
    "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
])
# fmt: on


def problems(content: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings that the Hub has for a card.

    The model-index is checked as the Hub documents it: names, a task type, type and name of the data set, type and value of
    each metric. Beyond the Hub, a value that is not finite is an error: it cannot be sent as JSON.
    """
    try:
        data = front_matter(content.removeprefix("\ufeff"))
    except CardError as error:
        return [f"Invalid YAML: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [f'"{path}" is not finite' for path, value in _leaves(data, "") if _is_not_finite(value)]
    licenses = data.get("license", [])
    errors += [
        f'"license" must be one of the identifiers of the Hub, or other, not {name!r}'
        for name in (licenses if isinstance(licenses, list) else [licenses])
        if not isinstance(name, str) or name not in _LICENSES
    ]
    errors += [
        f'"{name}" must be {wanted}' for name, (wanted, fits) in _KINDS.items() if name in data and not fits(data[name])
    ]
    return errors + _index_problems(data.get("model-index", [])), []


def _index_problems(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        errors += _missing(model, f"model-index[{i}]", {"name": str, "results": list})
        for j, result in enumerate(_get(model, "results", [])):
            where = f"model-index[{i}].results[{j}]"
            errors += _missing(result, where, {"task": dict, "dataset": dict, "metrics": list})
            errors += _missing(_get(result, "task", {}), f"{where}.task", {"type": str})
            errors += _missing(_get(result, "dataset", {}), f"{where}.dataset", {"type": str, "name": str})
            for k, metric in enumerate(_get(result, "metrics", [])):
                errors += _missing(metric, f"{where}.metrics[{k}]", {"type": str, "value": object})
    return errors


def _missing(value: Any, where: str, members: dict[str, type]) -> list[str]:
    if not isinstance(value, dict):
        return [f'"{where}" must be an object']
    return [
        f'"{where}.{name}" is required' if value.get(name) is None else f'"{where}.{name}" must be a {kind.__name__}'
        for name, kind in members.items()
        if value.get(name) is None or not isinstance(value[name], kind)
    ]


def _get(value: Any, name: str, default: Any) -> Any:
    """Return a member of the type of ``default``, or ``default``; what is wrong has its own message."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, type(default)) else default


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, value


_STRING = ("a string", lambda value: isinstance(value, str))
_ARRAY = ("an array of strings", _strings)
_EITHER = ("a string or an array of strings", lambda value: isinstance(value, str) or _strings(value))
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "tags": _ARRAY,
    "datasets": _ARRAY,
    "metrics": _ARRAY,
    "language": _EITHER,
    "base_model": _EITHER,
    "library_name": _STRING,
    "pipeline_tag": _STRING,
}
