"""The output of a stored model for one seeded input: after loading it must come out as it did at storing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.named_networks import BUILD_ERRORS, reason

if TYPE_CHECKING:
    from zoo.module import ZooModule

__all__ = ["check", "compare", "record"]

_SEED = 0
_MAX_OUTPUTS = 64
# Values of one input: 3 x 1182 x 1182. What a stored file names is computed by whoever loads it, so it stays small.
_MAX_INPUTS = 1 << 22
_KEYS = ("seed", "input_shape", "output_shape", "output")


def record(model: ZooModule) -> dict[str, Any] | None:
    """Return seed, shapes and the first values of the output, float32.

    Args:
        model: the model; its mode is as before afterwards.

    Returns:
        JSON values, or None if the shape of the inputs is not known or an input has more than 2**22 values.

    Raises:
        InputError: the output is not finite.
    """
    inputs = model.example_input(torch.Generator().manual_seed(_SEED))
    if inputs is None or inputs.numel() > _MAX_INPUTS:
        return None
    output = _run(model, inputs)
    if not bool(torch.isfinite(output).all()):
        raise InputError(
            "the model's output for a seeded input is not finite: it is not stored, and what was stored stays"
        )
    return {
        "seed": _SEED,
        "input_shape": list(inputs.shape),
        "output_shape": list(output.shape),
        "output": output.flatten()[:_MAX_OUTPUTS].tolist(),
    }


def check(golden: dict[str, Any], where: str) -> None:
    """Check what a stored configuration says about the output, before anything is computed from it.

    Args:
        golden: JSON values.
        where: their path, for the error message.

    Raises:
        InputError: a key or a value that `record` does not write.
    """
    if sorted(golden) != sorted(_KEYS):
        raise InputError(f"{where} must have the keys {', '.join(_KEYS)}, got {sorted(golden)[:8]}")
    if type(golden["seed"]) is not int or not 0 <= golden["seed"] < 1 << 63:
        raise InputError(f"{where}.seed must be an integer of 0 … 2**63 - 1")
    for key, limit in (("input_shape", _MAX_INPUTS), ("output_shape", _MAX_INPUTS)):
        shape = golden[key]
        whole = isinstance(shape, list) and 0 < len(shape) <= 8 and all(type(n) is int and n > 0 for n in shape)
        if not whole or math.prod(shape) > limit:
            raise InputError(f"{where}.{key} is an impossible shape: {str(shape)[:80]}")
    output = golden["output"]
    expected = min(_MAX_OUTPUTS, math.prod(golden["output_shape"]))
    if not isinstance(output, list) or len(output) != expected or any(type(v) not in (int, float) for v in output):
        raise InputError(f"{where}.output must be {expected} numbers")


def compare(model: ZooModule, golden: dict[str, Any], where: str) -> None:
    """Compare the output with the one at storing.

    Args:
        model: a loaded model.
        golden: what `record` returned, checked.
        where: the stored model, for the error message.

    Raises:
        InputError: the model does not take the input, or the output differs by more than 1e-3 (5e-2 in half precision) of
            the largest value or of 1.
    """
    inputs = model.example_input(torch.Generator().manual_seed(golden["seed"]))
    if inputs is None or list(inputs.shape) != golden["input_shape"]:
        raise InputError(f"{where}: golden.input_shape is {golden['input_shape']}, which this model does not take")
    try:
        output = _run(model, inputs)
    except BUILD_ERRORS as error:
        raise InputError(
            f"{where}: the model does not take an input of golden.input_shape {golden['input_shape']}: {reason(error)}"
        ) from error
    dtype = next(model.parameters()).dtype
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    stored = torch.tensor(golden["output"], dtype=torch.float64)
    got = output.double().flatten()[:_MAX_OUTPUTS]
    if list(output.shape) != golden["output_shape"]:
        difference = f"the shape {tuple(output.shape)}"
    else:
        worst = (got - stored).abs().max()
        if bool(worst <= tolerance * stored.abs().max().clamp_min(1.0)):
            return
        difference = f"up to {worst:.3g}"
    raise InputError(
        f"{where}: the model's output for the seeded input differs from the one at storing by {difference}: a version, an "
        "option or a module that was supplied is not the same. Pass verify=False to load it all the same"
    )


@torch.no_grad()
def _run(model: ZooModule, inputs: Tensor) -> Tensor:
    training = [module for module in model.modules() if module.training]
    parameter = next(model.parameters())
    model.eval()
    try:
        with torch.autocast(parameter.device.type, enabled=False), _exact_float32():
            given = inputs.to(parameter.device)
            output: Tensor = model(given.to(parameter.dtype) if given.is_floating_point() else given)
    finally:
        for module in training:
            module.training = True
    return output.detach().to("cpu", torch.float32)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Keep a GPU from rounding to TF32: the model may be loaded on a machine that does not."""
    switches: tuple[Any, Any] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
