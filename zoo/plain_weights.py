"""The weights of any module as plain tensors, for LightningModules that are no component of the zoo."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from zoo.arguments import encode, refuse_code
from zoo.errors import InputError
from zoo.stored_tensors import is_finite, on_cpu

__all__ = ["put", "take"]


def take(model: pl.LightningModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of a LightningModule; hyper-parameters without a JSON form are left out.

    Args:
        model: the module.

    Raises:
        InputError: its state holds something that is no tensor.
    """
    args = {}
    for name, value in model.hparams.items():
        try:
            args[str(name)] = encode(str(name), value)
            refuse_code(args[str(name)], str(name))
        except InputError:
            args.pop(str(name), None)
    cls = type(model)
    config = {
        "component": None,
        "args": args,
        "supplied": {"module": f"{cls.__module__}.{cls.__qualname__}"},
        "omitted": {},
        "golden": None,
        "run": None,
    }
    return config, tensors_of(model)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state on the CPU, no two tensors with the same memory; of tied ones only the first name."""
    state = _state(module)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is no tensor but {type(tensor).__name__}: safetensors cannot hold it")
        _require_plain(name, tensor)
    return on_cpu(state)


def put(module: nn.Module, file: Any, *, strict: bool) -> None:
    """Check all tensors of an open safetensors file against a module, then copy them into it.

    Args:
        module: the module.
        file: the open file.
        strict: refuse missing and unexpected names.

    Raises:
        InputError: a name, shape, dtype or value does not fit; nothing was copied then.
    """
    wanted = {name: tensor for name, tensor in _state(module).items() if isinstance(tensor, Tensor)}
    names = set(file.keys())
    filled = {id(wanted[name]) for name in names & wanted.keys()}
    missing = sorted(name for name, tensor in wanted.items() if id(tensor) not in filled)
    unexpected = sorted(names - wanted.keys())
    if strict and (missing or unexpected):
        raise InputError(
            f"model.safetensors does not fit {type(module).__name__}: missing {missing[:8]}, unexpected {unexpected[:8]}"
        )
    first: dict[int, str] = {}
    for name in sorted(names & wanted.keys()):
        _check(name, wanted[name], file)
        tied = first.setdefault(id(wanted[name]), name)
        if tied != name and not torch.equal(file.get_tensor(tied), file.get_tensor(name)):
            raise InputError(f"model.safetensors: {tied} and {name} differ, and are one tensor in the module")
    with torch.no_grad():
        for name in sorted(names & wanted.keys()):
            wanted[name].copy_(file.get_tensor(name))


def _check(name: str, wanted: Tensor, file: Any) -> None:
    _require_plain(name, wanted)
    shape = tuple(file.get_slice(name).get_shape())
    if shape != tuple(wanted.shape):
        raise InputError(f"model.safetensors: {name} has shape {shape}, expected {tuple(wanted.shape)}")
    tensor = file.get_tensor(name)
    if tensor.dtype != wanted.dtype and not (tensor.is_floating_point() and wanted.is_floating_point()):
        raise InputError(f"model.safetensors: {name} has dtype {tensor.dtype}, expected {wanted.dtype}")
    if not is_finite(tensor):
        raise InputError(f"model.safetensors: {name} holds non-finite values")
    if tensor.dtype != wanted.dtype and not is_finite(tensor.to(wanted.dtype)):
        raise InputError(f"model.safetensors: {name} holds values beyond the range of {wanted.dtype}")


def _state(module: nn.Module) -> dict[str, Any]:
    """Return the state without the names of torch.compile's wrapper, which is no part of a model."""
    return {name.replace("_orig_mod.", ""): value for name, value in module.state_dict(keep_vars=True).items()}


def _require_plain(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        raise InputError(f"{name} has no values of its own yet, or is sparse: safetensors cannot hold it")
