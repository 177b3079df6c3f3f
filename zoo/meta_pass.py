"""One pass of a network that costs neither time nor memory: shapes, and which module gives what, before any training."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.errors import InputError

__all__ = ["Call", "observe"]

_BATCH = 2


class Call(NamedTuple):
    """What one call of a module was given and what it returned.

    Attributes:
        name: the module's name.
        given: its first positional argument, if that is a tensor.
        returned: its output, of any type.
        given_version: how often ``given`` had been changed in place when the call began.
        returned_version: the same for ``returned`` when the call ended; None where it is no tensor.
    """

    name: str
    given: Tensor | None
    returned: Any
    given_version: int | None
    returned_version: int | None


def observe(network: nn.Module, names: Iterable[str] | None = None, *, example: Tensor | None = None) -> list[Call]:
    """Run a network once in eval mode, without gradients, and return the calls of its modules in the order they ended.

    Without an example, the pass is made on the meta device with two images: of the size that the network declares (timm,
    torchvision), else of 224 or of 32 pixels. Weights, buffers, modes and random numbers are left as they are.

    Args:
        network: any network of images.
        names: the modules to look at; all if omitted.
        example: an input to run with in earnest, where the meta device will not do.

    Returns:
        The calls. Tensors are on the meta device, or on the example's.

    Raises:
        InputError: the network has no convolution whose channels could be read, or fails on every size.

    Example:
        >>> [call] = observe(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ["1"])
        >>> call.name, call.returned.shape, call.returned.device.type
        ('1', torch.Size([2, 4, 222, 222]), 'meta')
    """
    wanted = dict(network.named_modules()) if names is None else {name: network.get_submodule(name) for name in names}
    modes = {module: module.training for module in network.modules()}
    # In inference mode, tensors do not count how often they were changed.
    with torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            network.eval()
            if example is not None:
                return _calls(network, wanted, {}, example)
            return _on_meta(network, wanted)
        finally:
            for module, mode in modes.items():
                module.training = mode


def _on_meta(network: nn.Module, wanted: dict[str, nn.Module]) -> list[Call]:
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if channels is None:
        raise InputError(
            f"{type(network).__name__} has no convolution that images could enter; give example=, an input"
        )
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    failures = []
    sizes = _sizes(network)
    for size in sizes:
        try:
            x = torch.empty(_BATCH, channels, *size, dtype=dtype, device="meta")
            return _calls(network, wanted, state, x)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            failures.append(error)
    tried = ", ".join(f"{height} x {width}" for height, width in sizes)
    raise InputError(
        f"{type(network).__name__} cannot be run with images of {tried} pixels on the meta device "
        f"({type(failures[0]).__name__}: {failures[0]}); give example=, an input"
    ) from failures[0]


def _sizes(network: nn.Module) -> list[tuple[int, int]]:
    """Return the sizes to try: what the network was built for, then those of ImageNet and CIFAR."""
    config = getattr(network, "pretrained_cfg", None)
    declared = [
        getattr(getattr(network, "patch_embed", None), "img_size", None),
        getattr(network, "image_size", None),
        config.get("input_size") if isinstance(config, dict) else None,
    ]
    pairs = [(value, value) if isinstance(value, int) else tuple(value)[-2:] for value in declared if value]
    return list(dict.fromkeys([*pairs, (224, 224), (32, 32)]))


def _calls(network: nn.Module, wanted: dict[str, nn.Module], state: dict[str, Tensor], x: Tensor) -> list[Call]:
    calls: list[Call] = []
    begun: list[tuple[Tensor | None, int | None]] = []
    handles = []
    try:
        for name, module in wanted.items():
            handles.append(module.register_forward_pre_hook(partial(_begin, begun)))
            handles.append(module.register_forward_hook(partial(_end, begun, calls, name)))
        functional_call(network, state, (x,))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _begin(begun: list[tuple[Tensor | None, int | None]], _module: nn.Module, args: tuple[Any, ...]) -> None:
    given = args[0] if args and isinstance(args[0], Tensor) else None
    begun.append((given, None if given is None else given._version))


def _end(
    begun: list[tuple[Tensor | None, int | None]],
    calls: list[Call],
    name: str,
    _module: nn.Module,
    _args: tuple[Any, ...],
    returned: Any,
) -> None:
    given, version = begun.pop()
    calls.append(Call(name, given, returned, version, returned._version if isinstance(returned, Tensor) else None))
