"""The tensors of a stored model: what is written, and what a file must be before anything of it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.errors import InputError

if TYPE_CHECKING:
    from zoo.module import ZooModule

__all__ = [
    "check_values",
    "compare_shapes",
    "each_tensor",
    "fill_tensors",
    "is_finite",
    "on_cpu",
    "open_tensors",
    "require_memory",
    "stored_tensors",
]

# So much of a file is mapped at once.
_MAPPED_BYTES = 1 << 21
_PIECE = 1 << 20
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def stored_tensors(model: ZooModule) -> dict[str, Tensor]:
    """Return the tensors to store, on the CPU, each with memory of its own; of tied ones only the first name."""
    return on_cpu(_own_tensors(model))


def on_cpu(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU, contiguous, no two with the same memory; of tied ones only the first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    memory: set[int] = set()
    for name, tensor in named.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        own = tensor.detach().to("cpu").contiguous()
        if own.untyped_storage().data_ptr() in memory:
            own = own.clone()
        memory.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def _own_tensors(model: ZooModule) -> dict[str, Tensor]:
    """Return the parameters and buffers that a stored file holds; tied ones under each of their names."""
    own: dict[str, Tensor] = {}
    prefixes = tuple(f"{name}." for name in model.training_only)
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = key.replace("_orig_mod.", "")  # torch.compile wraps modules, and the wrapper is no part of a model
        if name.startswith(prefixes) or name in model.training_only:
            continue
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is no tensor but {type(tensor).__name__}: safetensors cannot hold it")
        own[name] = tensor
    return own


def open_tensors(path: Path) -> Any:
    """Open a safetensors file; its header is checked against its length.

    Args:
        path: the file.

    Raises:
        InputError: it is no safetensors file, or not whole.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no whole safetensors file ({error}); store or pull the model anew") from error


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file one by one, each valid until the next one is asked for.

    The file is mapped anew every few MiB: what was read does not stay in memory, so that a load needs hardly more than the
    model itself.

    Args:
        path: a safetensors file.

    Raises:
        InputError: it is no whole safetensors file, or was replaced while it was read.
    """
    inode = path.stat().st_ino
    names: list[str] | None = None
    position = 0
    while names is None or position < len(names):
        with open_tensors(path) as file:
            if path.stat().st_ino != inode:
                raise InputError(f"{path} was replaced while it was read: load it again")
            names = list(file.keys()) if names is None else names
            mapped = 0
            while position < len(names) and mapped < _MAPPED_BYTES:
                tensor = file.get_tensor(names[position])
                mapped += tensor.nbytes
                yield names[position], tensor
                position += 1
                del tensor


def compare_shapes(model: ZooModule, found: Mapping[str, tuple[int, ...]], source: str, *, strict: bool = True) -> None:
    """Compare the names and shapes of stored tensors with those of a model, which may be on the meta device.

    Args:
        model: the model that its arguments build.
        found: name -> shape.
        source: what ``found`` was read from, for the error message.
        strict: refuse missing and unexpected names; shapes are compared in any case.

    Raises:
        InputError: names or shapes differ; the message lists them.
    """
    wanted = _own_tensors(model)
    filled = {id(wanted[name]) for name in found if name in wanted}
    sized = {name for name in model.sized_by_file if getattr(model, name) is None}
    missing = sorted(
        name for name, tensor in wanted.items() if id(tensor) not in filled and name not in model.sized_by_file
    )
    unexpected = sorted(found.keys() - wanted.keys() - sized)
    if strict and (missing or unexpected):
        raise InputError(
            f"{source} does not fit {type(model).__name__}: missing {missing[:8]}, unexpected {unexpected[:8]}"
        )
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != tuple(wanted[name].shape):
            raise InputError(
                f"{source}: {name} has shape {found[name]}, but the arguments in config.json ask for "
                f"{tuple(wanted[name].shape)}"
            )


def require_memory(shell: ZooModule) -> None:
    """Refuse what this machine cannot hold: towers and buffers that are not stored have no header to compare with."""
    modules = [shell, *(tower.network for tower in shell.frozen_towers.values())]
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_meta)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > physical:
        raise InputError(
            f"the arguments in config.json ask for {needed / 2**30:.3g} GiB, and this machine has {physical / 2**30:.3g}"
        )


def check_values(shell: ZooModule, path: Path) -> None:
    """Look at all values before the first is used: a module that was supplied stays as it is if one is wrong."""
    wanted = _own_tensors(shell)
    for name, tensor in each_tensor(path):
        expected = wanted[name].dtype if name in wanted else tensor.dtype
        if tensor.dtype != expected and not (tensor.dtype in _FLOATS and expected in _FLOATS):
            raise InputError(f"model.safetensors: {name} has dtype {tensor.dtype}, expected {expected}")
        if not is_finite(tensor):
            raise InputError(f"model.safetensors: {name} holds non-finite values")


def fill_tensors(model: ZooModule, path: Path) -> None:
    """Copy the values of a checked file into a model, which takes the stored dtypes.

    Args:
        model: the model.
        path: the file.
    """
    wanted = _own_tensors(model)
    dtypes = set()
    for name, tensor in each_tensor(path):
        sized = name in model.sized_by_file and getattr(model, name) is None
        if name not in wanted and not sized:
            continue
        if sized:
            setattr(model, name, tensor.clone())
        elif wanted[name].dtype == tensor.dtype:
            with torch.no_grad():
                wanted[name].copy_(tensor)
        else:
            # In the layout that the network gave it, such as channels last.
            wanted[name].data = torch.empty_like(wanted[name], dtype=tensor.dtype).copy_(tensor)
        dtypes |= {tensor.dtype} & set(_FLOATS)
    if len(dtypes) == 1:
        _cast_unstored(model, wanted, dtypes.pop())


def _cast_unstored(model: ZooModule, stored: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give buffers that are not stored (tables of positions) the dtype that the whole model had."""
    known = {id(tensor) for tensor in stored.values()}
    for buffer in model.buffers():
        if id(buffer) not in known and buffer.dtype in _FLOATS and buffer.dtype != dtype:
            buffer.data = buffer.to(dtype)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; integers never do."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # Piece by piece, because the test makes several copies of what it looks at. 8-bit floats have no test of their own.
    pieces = torch.split(tensor.reshape(-1), _PIECE)
    return all(bool(torch.isfinite(piece if tensor.element_size() > 1 else piece.float()).all()) for piece in pieces)
