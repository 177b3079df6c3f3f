"""Callbacks, one file a callback; the names come from the lazy table of ``zoo/__init__.py``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import zoo

_MODULES = zoo._names_in(__name__)

__all__ = sorted(_MODULES)  # noqa: PLE0605 - computed: the lazy table is the one list of public names


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
