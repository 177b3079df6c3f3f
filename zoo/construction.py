"""Constructing a component from arguments that may come from a stored configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from zoo.errors import InputError
from zoo.named_networks import BUILD_ERRORS, reason
from zoo.towers import without_weights

if TYPE_CHECKING:
    from zoo.module import ZooModule

__all__ = ["construct"]

# Far above any network; a stored configuration may not ask for a depth whose modules alone fill the memory.
_MAX_MODULES = 1 << 16


def construct(cls: type[ZooModule], arguments: dict[str, Any], *, meta: bool) -> ZooModule:
    """Construct a component without touching the global random state; trained networks get no weights by their names.

    Args:
        cls: the class.
        arguments: its arguments.
        meta: on the meta device, where no memory is taken and frozen networks get no weights either.

    Raises:
        InputError: the arguments do not build it, or ask for more modules than any network has.
    """
    device = torch.device("meta") if meta else nullcontext()
    try:
        with isolate_rng(include_cuda=False), without_weights("all" if meta else "trained"), _bounded(), device:
            return cls(**arguments)
    except InputError:
        raise
    except BUILD_ERRORS as error:
        shown = {name: value for name, value in arguments.items() if not isinstance(value, nn.Module)}
        raise InputError(f"{cls.__name__} cannot be built from args {str(shown)[:500]}: {reason(error)}") from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop a construction that makes more modules than any network has."""
    count = 0

    def count_module(_module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise InputError(f"the arguments in config.json ask for more than {_MAX_MODULES} modules")

    handle = register_module_module_registration_hook(count_module)
    try:
        yield
    finally:
        handle.remove()
