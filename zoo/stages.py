"""Maps out of the inside of a network that was not written to give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from zoo.errors import InputError, nearest
from zoo.features import KeptHooks
from zoo.meta_pass import Call, observe

__all__ = ["Layout", "StageTap", "as_map", "layout_of"]

_Result = TypeVar("_Result")

_INPUT = ":input"


class Layout(NamedTuple):
    """How the output of a stage lies in memory."""

    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    channels_last: bool = False


class StageTap(KeptHooks):
    """The outputs of named modules, captured as maps (B, C, H, W) while the network runs.

    It goes with whatever runs the network, a `zoo.features.FeatureTap` for example, so that one pass gives logits,
    features and maps::

        stages = StageTap(network, stage_names(network))
        (features, logits), maps = stages.collect(tap, x)

    Tokens and maps whose channels come last are brought into the form (B, C, H, W), vectors (B, C) stay. A name that
    ends in ``:input`` stands for what goes into the module: ``layer3.8.relu2:input`` is the map in front of the ReLU. Of
    several calls in one pass, the last counts. What the network changes in place later on is copied; this, the layouts
    and the channels are found with one pass on the meta device when the tap is made.

    Args:
        network: the network, which is not changed.
        names: names of its modules, for example from `zoo.stage_names.stage_names` and ``preactivations``.
        prefix_tokens: tokens in front of the image's; the network's own number if omitted (timm, torchvision).
        example: an input, for networks that do not run on the meta device.

    Attributes:
        network: see above.
        names: see above.
        channels: the channels C of each map.

    Raises:
        InputError: no name, no such module, one that the pass does not call or that gives no map, tokens or vector, or
            a network that cannot be run.

    Example:
        >>> from zoo import towers
        >>> network = towers.create("zoo/resnet8").network
        >>> stages = StageTap(network, ["layer1", "layer3.0.relu2:input"])
        >>> logits, maps = stages.collect(network, torch.zeros(2, 3, 32, 32))
        >>> stages.channels, [tuple(m.shape) for m in maps]
        ((16, 64), [(2, 16, 32, 32), (2, 64, 8, 8)])
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        *,
        prefix_tokens: int | None = None,
        example: Tensor | None = None,
    ) -> None:
        super().__init__(network)
        self.names = tuple(names)
        if not self.names or isinstance(names, str):
            raise InputError(f"names must be a list of module names, at least one, got {names!r}")
        modules = dict(network.named_modules())
        self._modules = [name.removesuffix(_INPUT) for name in self.names]
        for name in self._modules:
            if name not in modules or not name:
                raise InputError(f"{type(network).__name__} has no module {name!r}.{nearest(name, modules)}")
        calls = {call.name: call for call in observe(network, dict.fromkeys(self._modules), example=example)}
        self._layouts: list[Layout] = []
        self._copied: list[bool] = []
        channels = []
        for name, module in zip(self.names, self._modules, strict=True):
            value, changed = _of_call(calls.get(module), name, network)
            layout = layout_of(network, name, value, prefix_tokens)
            self._layouts.append(layout)
            self._copied.append(changed or (name.endswith(_INPUT) and getattr(modules[module], "inplace", False)))
            channels.append(_map(value, layout, name).shape[1])
        self.channels = tuple(channels)
        self._outputs: dict[int, Tensor] = {}
        self._listening = False

    def collect(self, run: Callable[..., _Result], *args: Any) -> tuple[_Result, list[Tensor]]:
        """Call something that runs the network, and capture the maps; without `install` a compiled network runs eagerly.

        Args:
            run: the network itself, a `FeatureTap` of it, or a function that calls either.
            *args: passed to ``run``.

        Returns:
            What ``run`` returned, and one map (B, C, H, W), or vector (B, C), for each name, with their graphs.

        Raises:
            InputError: a module was not called, or gave no map, tokens of a square, or vector.
        """
        result: tuple[_Result, list[Tensor]] = (self._run if self._installed else self._run_once)(run, args)
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_once(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._register()
        try:
            with torch.compiler.set_stance("force_eager"):
                return self._run(run, args)
        finally:
            self.remove()

    def _register(self) -> None:
        self._handles = []
        for index, (name, module) in enumerate(zip(self.names, self._modules, strict=True)):
            target = self.network.get_submodule(module)
            if name.endswith(_INPUT):
                self._handles.append(target.register_forward_pre_hook(partial(self._capture_input, index)))
            else:
                self._handles.append(target.register_forward_hook(partial(self._capture, index)))
        self._installed = True

    def _run(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._listening = True
        try:
            result = run(*args)
            outputs = self._outputs
        finally:
            self._outputs = {}
            self._listening = False
        maps = []
        for index, name in enumerate(self.names):
            if index not in outputs:
                raise InputError(_not_called(name, self.network))
            maps.append(_map(outputs[index], self._layouts[index], name))
        return result, maps

    def _capture_input(self, index: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._listening and args:
            self._outputs[index] = args[0].clone() if self._copied[index] else args[0]

    def _capture(self, index: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if self._listening:
            self._outputs[index] = output.clone() if self._copied[index] else output


def as_map(
    tensor: Tensor,
    *,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Bring tokens or a map into the form (B, C, H, W); a view, not a copy.

    Args:
        tensor: a map (B, C, H, W) or (B, H, W, C), or tokens (B, N, C), the image's row by row.
        prefix_tokens: tokens in front of the image's, such as the class token, that are left out.
        grid: rows and columns of the image's tokens; a square if omitted.
        channels_last: whether a tensor of four dimensions is (B, H, W, C).

    Returns:
        The map (B, C, H, W).

    Raises:
        InputError: neither map nor tokens, or a number of tokens that does not fill the grid.

    Example:
        >>> as_map(torch.zeros(2, 1 + 16, 192), prefix_tokens=1).shape
        torch.Size([2, 192, 4, 4])
    """
    if tensor.ndim == 4:
        return tensor.permute(0, 3, 1, 2) if channels_last else tensor
    if tensor.ndim != 3:
        raise InputError(f"expected a map of four dimensions or tokens (B, N, C), got shape {tuple(tensor.shape)}")
    count = tensor.shape[1] - prefix_tokens
    side = math.isqrt(max(count, 0))
    height, width = grid or (side, side)
    if count < 1 or height * width != count:
        shape = f"a grid of {height} x {width}" if grid else "a square"
        raise InputError(
            f"{count} tokens after {prefix_tokens} prefix tokens are not {shape}; give the number of prefix_tokens, or "
            "name another layer"
        )
    return tensor[:, prefix_tokens:].transpose(1, 2).reshape(tensor.shape[0], tensor.shape[2], height, width)


def _of_call(call: Call | None, name: str, network: nn.Module) -> tuple[Tensor, bool]:
    """Return what the tap of this name would capture, and whether the network changed it in place afterwards."""
    if call is None:
        raise InputError(_not_called(name, network))
    if name.endswith(_INPUT):
        value, version = call.given, call.given_version
    else:
        value, version = call.returned, call.returned_version
    if not isinstance(value, Tensor) or value.ndim not in (2, 3, 4):
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"{name!r} of {type(network).__name__} gives {found}, expected a map (B, C, H, W), tokens (B, N, C) or a "
            "vector (B, C); name another layer"
        )
    return value, value._version != version


def layout_of(network: nn.Module, name: str, value: Tensor, prefix_tokens: int | None) -> Layout:
    """Return how the output of a stage lies in memory.

    Args:
        network: the network.
        name: the stage.
        value: an output of it.
        prefix_tokens: tokens in front of the image's; the network's own number if omitted.

    Raises:
        InputError: tokens that fill no grid.
    """
    if value.ndim == 3:
        return _token_layout(network, name, value.shape[1], prefix_tokens)
    if value.ndim == 2:
        return Layout()
    from torchvision.models import SwinTransformer

    if isinstance(network, SwinTransformer):
        # Its last two steps, ``permute`` and ``avgpool``, have brought the channels to the front.
        return Layout(channels_last=name.startswith(("features", "norm")))
    # Where timm knows the channels of the stage, the axis that has so many is theirs: VOLO does not declare its layout.
    listed = getattr(network, "feature_info", None)
    known = {entry["module"]: entry["num_chs"] for entry in listed} if isinstance(listed, list) else {}
    channels = known.get(name)
    if channels is not None and (value.shape[1] == channels) != (value.shape[3] == channels):
        return Layout(channels_last=value.shape[3] == channels)
    return Layout(channels_last=getattr(network, "output_fmt", None) == "NHWC")


def _token_layout(network: nn.Module, name: str, count: int, prefix_tokens: int | None) -> Layout:
    from torchvision.models import VisionTransformer

    if hasattr(network, "unroll"):
        raise InputError(f"{name!r}: {type(network).__name__} does not keep its tokens row by row; use another network")
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    own = 1 if isinstance(network, VisionTransformer) else getattr(network, "num_prefix_tokens", 0)
    # Networks that add the class token late (XCiT, CaiT) have none in their first blocks.
    for prefix in (own, 0) if prefix_tokens is None else (prefix_tokens,):
        if grid and math.prod(grid) == count - prefix:
            return Layout(prefix_tokens=prefix, grid=tuple(grid))
        if count > prefix and math.isqrt(count - prefix) ** 2 == count - prefix:
            return Layout(prefix_tokens=prefix)
    raise InputError(
        f"{name!r} of {type(network).__name__} gives {count} tokens, which are no square after {own} prefix tokens; give "
        "prefix_tokens=, or name another layer"
    )


def _map(value: Any, layout: Layout, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"{name!r} gave {type(value).__name__}, expected a tensor; name another layer")
    if value.ndim == 2:
        return value
    grid = layout.grid
    if grid and value.ndim == 3 and math.prod(grid) != value.shape[1] - layout.prefix_tokens:
        # An image of another size than the network was built for.
        grid = None
    return as_map(value, prefix_tokens=layout.prefix_tokens, grid=grid, channels_last=layout.channels_last)


def _not_called(name: str, network: nn.Module) -> str:
    return f"{name!r} was not called in the forward pass of {type(network).__name__}; name another layer"
