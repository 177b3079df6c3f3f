"""The public API, frozen: a name that goes is taken out of api_surface.json in the same change, with a CHANGELOG line."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import zoo
from tests.package_modules import MODULES

INVENTORY = Path(__file__).with_name("api_surface.json")


def surface() -> dict[str, list[str]]:
    """``__all__`` of every module of the package."""
    found = {"zoo": sorted(zoo.__all__)}
    for name in MODULES:
        found[name] = sorted(getattr(importlib.import_module(name), "__all__", []))
    return found


def test_public_api_is_the_inventory() -> None:
    """`python -m tests.test_api_surface` writes the inventory anew."""
    assert surface() == json.loads(INVENTORY.read_text(encoding="utf-8"))


def test_every_public_name_exists_and_is_documented() -> None:
    for module_name, names in surface().items():
        module = importlib.import_module(module_name)
        for name in names:
            value = getattr(module, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                assert value.__doc__, f"{module_name}.{name}"


if __name__ == "__main__":
    INVENTORY.write_text(json.dumps(surface(), indent=2) + "\n", encoding="utf-8")
