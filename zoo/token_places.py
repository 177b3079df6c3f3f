"""Where a text-to-image network takes its text, so that soft tokens can be put there.

Nothing is imported from diffusers: a network is known by its blocks and by what they are called with.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from zoo.errors import InputError, nearest

__all__ = ["TextBlocks", "network_of", "parameters_of", "text_blocks", "token_places", "token_width"]

_JOINT_CALL = {"hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs"}
_ROTARY = ("rotary", "rope", "freqs")
# The paper's choice for Stable Diffusion 3: the first 5 of 24 blocks.
_FIRST_JOINT_BLOCKS = 5


class TextBlocks(NamedTuple):
    """The blocks of a network that are given the text.

    Attributes:
        names: their module names, in the order in which they are called.
        usual: those that the paper puts tokens into.
        width: how wide a token of the text is there.
        extras: the argument of the network, a dict, that is handed on to each of them.
        joint: whether a block gives back the text it was given.
    """

    names: list[str]
    usual: list[str]
    width: int
    extras: str
    joint: bool


def network_of(denoiser: Any) -> nn.Module:
    """Return the network itself: the ``transformer`` or ``unet`` of a diffusers pipeline, what is inside a wrapper.

    Args:
        denoiser: a network, what `torch.compile` or DistributedDataParallel made of one, or a diffusers pipeline.

    Raises:
        InputError: it is neither.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> network_of(network) is network
        True
    """
    if not isinstance(denoiser, nn.Module):
        parts = (getattr(denoiser, name, None) for name in ("transformer", "unet"))
        found = next((part for part in parts if isinstance(part, nn.Module)), None)
        if found is None:
            raise InputError(
                "denoiser must be a network, or a diffusers pipeline with a transformer or a unet, got "
                f"{type(denoiser).__name__}"
            )
        denoiser = found
    network: nn.Module = denoiser
    while isinstance(network, nn.parallel.DistributedDataParallel) or hasattr(network, "_orig_mod"):
        network = network.get_submodule("_orig_mod" if hasattr(network, "_orig_mod") else "module")
    return network


def parameters_of(module: nn.Module) -> list[str]:
    """Return the names of what a module's ``forward`` takes, in order.

    Args:
        module: a module. Its class is looked at, because other libraries put wrappers of no signature on an instance.

    Example:
        >>> parameters_of(nn.Linear(1, 1))
        ['input']
    """
    return list(inspect.signature(type(module).forward).parameters)[1:]


def text_blocks(network: nn.Module) -> TextBlocks:
    """Return what is known of a network's way with text.

    Args:
        network: a network without a wrapper (`network_of`).

    Raises:
        InputError: the architecture cannot take soft tokens, or is not known.
    """
    names = parameters_of(network)
    blocks = getattr(network, "transformer_blocks", None)
    if isinstance(blocks, nn.ModuleList) and len(blocks) and "timestep" in names:
        called_with = {name for block in blocks for name in parameters_of(block)}
        rotary = next((name for name in sorted(called_with) if any(part in name for part in _ROTARY)), None)
        if rotary is not None:
            raise InputError(
                f"{type(network).__name__} cannot take soft tokens: its blocks give the tokens of the text rotary positions "
                f"({rotary}), and soft tokens have none; use a Stable Diffusion 1, 2, XL or 3 network"
            )
        if called_with >= _JOINT_CALL and "joint_attention_kwargs" in names:
            places = [f"transformer_blocks.{index}" for index in range(len(blocks))]
            width = _joint_width(network)
            return TextBlocks(places, places[:_FIRST_JOINT_BLOCKS], width, "joint_attention_kwargs", joint=True)
    places = [name for name, module in _unet_blocks(network) if getattr(module, "has_cross_attention", False)]
    if places and "timestep" in names and "cross_attention_kwargs" in names:
        # The paper has the middle block of Stable Diffusion XL, which alone is told sizes as text, among them.
        middle = _configured(network, "addition_embed_type") == "text_time"
        usual = [name for name in places if name.startswith("down_blocks.") or (middle and name == "mid_block")]
        return TextBlocks(places, usual or places, _unet_width(network), "cross_attention_kwargs", joint=False)
    raise InputError(
        f"{type(network).__name__} is no network that soft tokens know: expected an SD3Transformer2DModel or another whose "
        "transformer_blocks take hidden_states, encoder_hidden_states, temb and joint_attention_kwargs, or a "
        "UNet2DConditionModel with cross-attention"
    )


def token_places(denoiser: Any, blocks: str | Sequence[int | str] | None = None) -> list[str]:
    """Return the module names of the blocks that soft tokens go into.

    Args:
        denoiser: a network or a diffusers pipeline.
        blocks: numbers, which count the blocks that take the text from 0, or module names; the name of a list, such as
            ``"down_blocks"``, stands for all in it that take the text. The paper's choice if omitted: the first 5 blocks of
            a Stable Diffusion 3, the blocks on the way down of a U-Net, and of Stable Diffusion XL the middle one too.

    Raises:
        InputError: the architecture cannot take soft tokens, or `blocks` is empty, names no such block, or one twice.
    """
    network = network_of(denoiser)
    found = text_blocks(network)
    if blocks is None:
        return found.usual
    asked = [blocks] if isinstance(blocks, str) else list(blocks)
    places = [place for block in asked for place in _places(network, found.names, block)]
    if not places or len(set(places)) < len(places):
        raise InputError(f"blocks must name at least one block, and each once, got {blocks!r}")
    return places


def token_width(denoiser: Any) -> int:
    """Return how wide a soft token of a denoiser has to be.

    Args:
        denoiser: a network or a diffusers pipeline.

    Raises:
        InputError: the architecture cannot take soft tokens.
    """
    return text_blocks(network_of(denoiser)).width


def _places(network: nn.Module, names: list[str], block: int | str) -> list[str]:
    if isinstance(block, int):
        if not 0 <= block < len(names):
            raise InputError(
                f"blocks must be numbers in 0 … {len(names) - 1} or names, {type(network).__name__} has {len(names)} blocks "
                f"that take the text; got {block}"
            )
        return [names[block]]
    found = [name for name in names if name == block or name.startswith(f"{block}.")]
    if not found:
        raise InputError(
            f"{type(network).__name__} has no block {block!r} that takes the text; there are {', '.join(names)}."
            f"{nearest(block, names)}"
        )
    return found


def _unet_blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    blocks = []
    for part in ("down_blocks", "mid_block", "up_blocks"):
        module = getattr(network, part, None)
        if isinstance(module, nn.ModuleList):
            blocks += [(f"{part}.{index}", block) for index, block in enumerate(module)]
        elif isinstance(module, nn.Module):
            blocks.append((part, module))
    return blocks


def _configured(network: nn.Module, name: str) -> Any:
    config = getattr(network, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _joint_width(network: nn.Module) -> int:
    width = _configured(network, "caption_projection_dim")
    if width is None:
        width = getattr(getattr(network, "context_embedder", None), "out_features", None)
    if not isinstance(width, int):
        raise InputError(
            f"{type(network).__name__} does not say how wide its text is: expected caption_projection_dim in its config, "
            "or a linear layer context_embedder"
        )
    return width


def _unet_width(network: nn.Module) -> int:
    given = _configured(network, "cross_attention_dim")
    widths = set(given) if isinstance(given, list | tuple) else {given}
    width = widths.pop()
    if widths or not isinstance(width, int):
        raise InputError(
            f"{type(network).__name__} must take text of one width in all its blocks, its config has "
            f"cross_attention_dim={given!r}"
        )
    return width
