"""Which modules are the stages of a network: the last ones before the map becomes smaller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import InputError, nearest
from zoo.meta_pass import Call, observe

__all__ = ["preactivations", "stage_names"]

# The papers compare four stages at most; what timm lists in front of them is the stem.
_STAGES = 4

_NO_STAGE = (
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity,
)  # fmt: skip


def stage_names(network: nn.Module, *, example: Tensor | None = None) -> tuple[str, ...]:
    """Return the names of the modules whose outputs are the network's stages, shallow to deep, at most four.

    - timm: the modules of its ``feature_info``, the last four; four evenly spread blocks, the last included, where all
      have one size (ViT, Mixer);
    - torchvision's Swin: its four stages;
    - anything else with maps (B, C, H, W) of several sizes: for each size the last module of that size, the outermost
      where several give the same output, no deeper in the tree than it takes to see the most sizes, at most four. Maps of
      one pixel do not count, and if tokens (B, N, D) come after the last one, none does;
    - anything else: four evenly spread modules of the outermost list or sequence whose outputs, maps or tokens, have
      equal shapes, the last included.

    The last two look at one pass on the meta device.

    Args:
        network: a network that returns logits.
        example: an input, for networks that do not run on the meta device.

    Returns:
        Names as in ``named_modules()``.

    Raises:
        InputError: nothing that looks like a stage was found, or the network cannot be run.

    Example:
        >>> from zoo import towers
        >>> stage_names(towers.create("zoo/resnet8").network)
        ('layer1', 'layer2', 'layer3')
    """
    from torchvision.models import SwinTransformer

    if isinstance(network, SwinTransformer):
        return tuple(f"features.{index}" for index in range(1, len(network.features), 2))
    listed = _listed_by_timm(network)
    if listed:
        return listed
    calls = _before_classifier(network, observe(network, example=example))
    names = _by_size(network, calls) or _by_siblings(network, calls)
    if not names:
        raise InputError(
            f"{type(network).__name__} shows no stages: neither maps (B, C, H, W) of several sizes nor one list of blocks "
            "of equal shape; name the layers"
        )
    return names


def preactivations(network: nn.Module, names: Sequence[str], *, example: Tensor | None = None) -> tuple[str, ...]:
    """Replace each stage that ends in a ReLU by the input of that ReLU, for `zoo.stages.StageTap`.

    A stage ends in a ReLU if its output is the very tensor that a ``nn.ReLU`` returned last, not changed since: residual
    stages of torchvision's, timm's and our ResNets, for example. Activations that are functions and no modules are not
    seen, and other activations (SiLU, Hardswish) are none.

    Args:
        network: the network of the stages.
        names: names of its modules.
        example: an input, for networks that do not run on the meta device.

    Returns:
        For each name ``"<the ReLU>:input"``, or the name itself.

    Raises:
        InputError: a name that the network does not have, or the network cannot be run.

    Example:
        >>> from zoo import towers
        >>> preactivations(towers.create("zoo/resnet8").network, ["conv1", "layer3"])
        ('conv1', 'layer3.0.relu2:input')
    """
    modules = dict(network.named_modules())
    for name in names:
        if name not in modules:
            raise InputError(f"{type(network).__name__} has no module {name!r}.{nearest(name, modules)}")
    last = {call.name: call for call in observe(network, example=example)}
    activations = [call for name, call in last.items() if isinstance(modules[name], nn.ReLU)]
    result = []
    for name in names:
        final = [call.name for call in activations if name in last and _is_output(call, last[name])]
        result.append(f"{final[-1]}:input" if final else name)
    return tuple(result)


def _is_output(activation: Call, stage: Call) -> bool:
    # One tensor at one time: a sum in place after an activation in place returns the same tensor with other values.
    same = isinstance(stage.returned, Tensor) and activation.returned is stage.returned
    return same and activation.returned_version == stage.returned_version


def _listed_by_timm(network: nn.Module) -> tuple[str, ...]:
    info = getattr(network, "feature_info", None)
    if not isinstance(info, list):
        return ()
    modules = dict(network.named_modules())
    names = [entry["module"] for entry in info]
    called = [name for name in names if name in modules and not isinstance(modules[name], nn.ModuleList)]
    if len(set(called)) < len(names):
        return ()
    one_size = len({entry["reduction"] for entry in info}) == 1
    return _spread(names) if one_size else tuple(names[-_STAGES:])


def _spread(names: Sequence[str]) -> tuple[str, ...]:
    count = min(_STAGES, len(names))
    return tuple(names[(index + 1) * len(names) // count - 1] for index in range(count))


def _before_classifier(network: nn.Module, calls: Sequence[Call]) -> Sequence[Call]:
    modules = dict(network.named_modules())
    layers = [index for index, call in enumerate(calls) if isinstance(modules[call.name], nn.Linear | nn.Conv2d)]
    return calls[: layers[-1]] if layers else calls


def _by_size(network: nn.Module, calls: Sequence[Call]) -> tuple[str, ...]:
    modules = dict(network.named_modules())
    maps = [
        (call.name, (call.returned.shape[2], call.returned.shape[3]))
        for call in calls
        if call.name and isinstance(call.returned, Tensor) and call.returned.ndim == 4
        if not isinstance(modules[call.name], _NO_STAGE)
    ]
    best: tuple[str, ...] = ()
    for depth in sorted({name.count(".") for name, _ in maps}):
        found = _last_of_each_size([(name, size) for name, size in maps if name.count(".") <= depth])[-_STAGES:]
        if len(found) > max(len(best), 1):
            best = found
    if best:
        # A transformer's maps are those of its patches, positions or keys.
        ends = max(index for index, call in enumerate(calls) if call.name == best[-1])
        if any(isinstance(call.returned, Tensor) and call.returned.ndim == 3 for call in calls[ends + 1 :]):
            return ()
    return best


def _last_of_each_size(maps: Sequence[tuple[str, tuple[int, int]]]) -> tuple[str, ...]:
    names: list[str] = []
    largest = 1
    for name, (height, width) in reversed(maps):
        if height * width > largest:
            largest = height * width
            names.append(name)
    return tuple(reversed(names))


def _by_siblings(network: nn.Module, calls: Sequence[Call]) -> tuple[str, ...]:
    families: dict[tuple[str, torch.Size], list[str]] = {}
    for name, output in {call.name: call.returned for call in calls if call.name}.items():
        parent = name.rpartition(".")[0]
        inside = isinstance(network.get_submodule(parent), nn.ModuleList | nn.Sequential)
        if inside and isinstance(output, Tensor) and output.ndim in (3, 4):
            families.setdefault((parent, output.shape), []).append(name)
    several = {parent: names for (parent, _), names in families.items() if len(names) > 1}
    outermost = min((parent.count(".") for parent in several), default=0)
    candidates = [names for parent, names in several.items() if parent.count(".") == outermost]
    # Several candidates are several stages, and which of them count is not to be guessed.
    return _spread(candidates[0]) if len(candidates) == 1 else ()
