"""The modules of the package, the two mapped folders included."""

from __future__ import annotations

import importlib
import pkgutil

__all__ = ["MODULES"]

# In a checkout the last two lie outside of zoo/, where zoo.__path__ does not lead to them.
_PACKAGES = ("zoo", "zoo.callbacks", "zoo.lightning_modules")
MODULES = sorted(
    {
        module.name
        for package in _PACKAGES
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        if not module.name.endswith("__main__")
    }
)
