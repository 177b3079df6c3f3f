"""Activations inside a network and the gradients of a score with respect to them, from one pass there and one back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError, nearest
from zoo.losses.contracts import working_dtype
from zoo.stages import as_map, layout_of

__all__ = ["Capture", "LayerTaps", "convolution_input", "find_layers", "undisturbed"]

_INPUT = ":input"
# Gradients of half precision vanish below 6e-8: the score is scaled on the way back, by a power of two, and they after it.
_HALF_SCALE = 256.0


class Capture(NamedTuple):
    """What one layer gave and how the scores depend on it, both without a graph.

    Attributes:
        activation: (B, K, H, W), in the type of the network; of a convolution that is tapped on both sides, what enters it.
        gradient: (B, K', H', W') of each image's score with respect to what leaves the layer, in float32 or float64.
    """

    activation: Tensor
    gradient: Tensor


class LayerTaps:
    """Hooks on layers of a network, as a context; they are gone when it is left, for whatever reason.

    Each hook hands a copy of the layer's output on, which is the identity layer of NormGrad in the literal sense: what the
    network does to the copy in place does not reach the original. An output without a graph becomes a leaf of a new one, so
    that neither parameters nor the input need gradients, and nothing in front of the first layer is recorded. Of several
    calls in one pass, the last counts. Of a tuple, the first tensor is tapped.

    Args:
        model: the network.
        layers: names as the user gives them, and as `find_layers` finds them.
        convolutions: take the input of each layer, which must be an `nn.Conv2d`, for its activation.
        prefix_tokens: tokens in front of the image's; the network's own number if omitted.
        channels_last: whether outputs of four dimensions are (B, H, W, K); seen from the layer and the network if omitted.

    Raises:
        InputError: a layer is no convolution where it has to be.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, str],
        *,
        convolutions: bool = False,
        prefix_tokens: int | None = None,
        channels_last: bool | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.convolutions = convolutions
        self.prefix_tokens = prefix_tokens
        self.channels_last = channels_last
        for name, path in layers.items():
            if convolutions and (path.endswith(_INPUT) or not isinstance(self.module(name), nn.Conv2d)):
                raise InputError(
                    f"extract='conv' takes the weights of a convolution: {name!r} must be the name of an nn.Conv2d, got "
                    f"{type(self.module(name)).__name__}"
                )
        self._nodes: dict[str, Tensor] = {}
        self._given: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def module(self, name: str) -> nn.Module:
        """Return the module that a name stands for.

        Args:
            name: a key of `layers`.
        """
        return self.model.get_submodule(self.layers[name].removesuffix(_INPUT))

    def __enter__(self) -> LayerTaps:
        try:
            for name, path in self.layers.items():
                module = self.module(name)
                if path.endswith(_INPUT):
                    self._handles.append(module.register_forward_pre_hook(_Before(name, self._nodes)))
                else:
                    given = self._given if self.convolutions else None
                    self._handles.append(module.register_forward_hook(_After(name, self._nodes, given)))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._nodes.clear()
        self._given.clear()

    def captures(self, scores: Tensor) -> dict[str, Capture]:
        """Return activation and gradient of each layer, from one backward pass that ends at the layers.

        Args:
            scores: one score an image (B,), of a pass that was made inside this context.

        Raises:
            InputError: a layer was not called, does not influence the scores, or gave no map or tokens of the images.
        """
        for name in self.layers:
            if name not in self._nodes:
                raise InputError(
                    f"{name!r} was not called in the forward pass of {type(self.model).__name__}; name another layer"
                )
        nodes = [self._nodes[name] for name in self.layers]
        scale = _HALF_SCALE if any(node.dtype == torch.float16 for node in nodes) else 1.0
        gradients: Sequence[Tensor | None] = [None] * len(nodes)
        if scores.requires_grad:
            gradients = torch.autograd.grad(scores.sum() * scale, nodes, allow_unused=True)
        found = {}
        for name, node, gradient in zip(self.layers, nodes, gradients, strict=True):
            if gradient is None:
                raise InputError(
                    f"the score does not depend on what {name!r} gave in its last call, or the path between them is "
                    "detached (checkpointing needs use_reentrant=False); name another layer"
                )
            slope = self._map(name, gradient.detach(), len(scores)).to(working_dtype(gradient)) / scale
            activation = self._given[name] if self.convolutions else self._map(name, node.detach(), len(scores))
            found[name] = Capture(activation, slope)
        return found

    def _map(self, name: str, value: Tensor, rows: int) -> Tensor:
        if value.ndim not in (3, 4) or len(value) != rows:
            raise InputError(
                f"{name!r} gives shape {tuple(value.shape)} for {rows} images, expected maps (B, K, H, W) or tokens "
                "(B, N, K); name another layer"
            )
        path = self.layers[name]
        if path == _INPUT:
            return value
        network, inner = _owner(self.model, path)
        if value.ndim == 4:
            last = self.channels_last if self.channels_last is not None else _channels_last(self.module(name))
            last = layout_of(network, inner, value, None).channels_last if last is None else last
            return as_map(value, channels_last=last)
        grid: Any = getattr(network, "grid_size", None)
        if self.prefix_tokens is None and hasattr(network, "class_embedding") and isinstance(grid, tuple):
            # open_clip's vision transformer; its grid is that of the images it was built for.
            fits = value.shape[1] == grid[0] * grid[1] + 1
            return as_map(value, prefix_tokens=1, grid=(grid[0], grid[1]) if fits else None)
        layout = layout_of(network, inner, value, self.prefix_tokens)
        return as_map(value, prefix_tokens=layout.prefix_tokens, grid=layout.grid)


class _After:
    """A forward hook that makes the output of a layer a node of the graph and hands a copy of it on."""

    def __init__(self, name: str, nodes: dict[str, Tensor], given: dict[str, Tensor] | None) -> None:
        self.name = name
        self.nodes = nodes
        self.given = given

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.given is not None and args:
            self.given[self.name] = args[0].detach().clone()
        return _handed_on(self.name, self.nodes, output)


class _Before:
    """The same for what goes into a layer."""

    def __init__(self, name: str, nodes: dict[str, Tensor]) -> None:
        self.name = name
        self.nodes = nodes

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            raise InputError(f"the layer of {self.name!r} takes its input by keyword; name the layer in front of it")
        handed: tuple[Any, ...] = _handed_on(self.name, self.nodes, args)
        return handed


def _handed_on(name: str, nodes: dict[str, Tensor], value: Any) -> Any:
    tensor = value[0] if type(value) in (tuple, list) and value else value
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise InputError(f"{name!r} gave {type(tensor).__name__}, expected a tensor of numbers; name another layer")
    node = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
    nodes[name] = node
    return node.clone() if tensor is value else type(value)((node.clone(), *value[1:]))


def find_layers(model: nn.Module, layers: str | Sequence[str]) -> dict[str, str]:
    """Return the names that the user gave, and the module that each stands for.

    A name may leave out what stands in front of it, such as the ``model.`` of a LightningModule around a network, where
    only one module ends so, and the ``_orig_mod`` of torch.compile. A name that ends in ``:input`` stands for what goes into
    the module, and "" for the images.

    Args:
        model: the network.
        layers: one name or several.

    Raises:
        InputError: no name, a name twice, or one that stands for no module or several.

    Example:
        >>> network = nn.ModuleDict({"model": nn.Sequential(nn.ReLU(), nn.Flatten())})
        >>> find_layers(network, ["0", "model.1:input", ""])
        {'0': 'model.0', 'model.1:input': 'model.1:input', '': ':input'}
    """
    asked = [layers] if isinstance(layers, str) else list(layers)
    if not asked or not all(isinstance(name, str) for name in asked):
        raise InputError(f"layers must be a module name or a list of them, at least one, got {layers!r}")
    named = {
        ".".join(part for part in path.split(".") if part != "_orig_mod"): path
        for path, _ in model.named_modules(remove_duplicate=False)
    }
    found: dict[str, str] = {}
    for name in asked:
        suffix = _INPUT if name.endswith(_INPUT) or not name else ""
        path = f"{_find(model, named, name.removesuffix(_INPUT))}{suffix}"
        if path in found.values():
            raise InputError(f"layers must name each layer once, {name!r} is there twice")
        found[name] = path
    return found


def _find(model: nn.Module, named: dict[str, str], name: str) -> str:
    if not name:
        return ""
    if name in named:
        return named[name]
    ends = [full for full in named if full.endswith(f".{name}")]
    if len(ends) > 1:
        raise InputError(f"{name!r} may stand for {', '.join(ends[:3])} of {type(model).__name__}; give the whole name")
    if not ends:
        raise InputError(f"{type(model).__name__} has no layer {name!r}.{nearest(name, named)}")
    return named[ends[0]]


def convolution_input(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Return what enters a convolution with its padding around it, so that it needs none.

    Args:
        convolution: the layer.
        x: its input (B, K_in, H, W).

    Example:
        >>> convolution_input(nn.Conv2d(1, 1, 3, padding="same"), torch.zeros(1, 1, 4, 4)).shape
        torch.Size([1, 1, 6, 6])
    """
    pads: list[int] = []
    for axis in (1, 0):  # as F.pad has it: the last dimension first
        if isinstance(convolution.padding, str):
            total = convolution.dilation[axis] * (convolution.kernel_size[axis] - 1)
            total = total if convolution.padding == "same" else 0
            pads += [total // 2, total - total // 2]
        else:
            pads += [convolution.padding[axis]] * 2
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    return F.pad(x, pads, mode=mode)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Make passes with gradients possible, and leave no trace of them in the network.

    Inside: gradients are recorded, in `torch.inference_mode` too; no autocast; the network is in eval mode and runs
    eagerly. Afterwards: the mode of every module and the random numbers are as they were. Tensors from outside must be
    cloned inside, because those that inference mode made cannot be recorded.

    Args:
        model: the network.
        device: where it runs.
    """
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the network around a layer that knows its own layout, and the name of the layer in there."""
    from torchvision.models import SwinTransformer, VisionTransformer

    parts = path.split(".")
    for depth in range(len(parts)):
        outer = model.get_submodule(".".join(parts[:depth]))
        told = ("output_fmt", "num_prefix_tokens", "feature_info", "class_embedding")
        if isinstance(outer, SwinTransformer | VisionTransformer) or any(hasattr(outer, name) for name in told):
            return outer, ".".join(parts[depth:])
    return model, path


def _channels_last(module: nn.Module) -> bool | None:
    """Whether a module's own kind says that its channels come last; ConvNeXt turns its maps around inside its blocks."""
    if isinstance(module, nn.Linear):
        return True
    if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm | nn.MaxPool2d):
        return False
    if isinstance(module, nn.LayerNorm):
        # timm and torchvision have a LayerNorm2d that is one by inheritance only.
        return not type(module).__name__.endswith("2d")
    return None
