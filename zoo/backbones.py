"""Text-to-image backbones by name: those of this zoo, stored ones, and diffusers' (`zoo.denoisers.Backbone`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo import towers
from zoo.errors import InputError

__all__ = ["CONDITIONS", "frozen_backbone", "require_backbone"]

CONDITIONS = (
    "encoder_hidden_states", "pooled_projections", "encoder_attention_mask", "text_embeds", "time_ids",
)  # fmt: skip
"""What a denoiser may be told, by the names of its arguments; batches of cached conditions have them by these names."""

_MEMBERS = ("denoiser", "process", "latents", "images", "condition", "null_condition")
_DIFFUSERS = "diffusers/"


def require_backbone(network: nn.Module, *further: str) -> None:
    """Refuse a module that lacks a member of `zoo.denoisers.Backbone`.

    Args:
        network: the module.
        *further: members that it must have besides.

    Raises:
        InputError: it lacks one.
    """
    missing = [member for member in (*_MEMBERS, *further) if not hasattr(network, member)]
    if missing:
        raise InputError(
            f"backbone must be a text-to-image backbone, such as 'zoo/tiny_text_to_image' or a stored FlowMatching: "
            f"{type(network).__name__} has no {', '.join(missing)}"
        )


def frozen_backbone(name: str | dict[str, Any] | nn.Module, options: dict[str, Any] | None = None) -> towers.Tower:
    """Return a frozen backbone.

    Args:
        name: a tower name (a stored model's network among them), ``diffusers/…`` (`zoo.diffusers_backbone`), or a module.
        options: options for its builder.

    Raises:
        InputError: it cannot be built, or is no backbone.

    Example:
        >>> frozen_backbone("zoo/tiny_text_to_image", {"vocab_size": 10}).network.latent_shape
        (1, 8, 8)
    """
    given = towers.tower_options("backbone_options", options)
    if isinstance(name, str) and name.startswith(_DIFFUSERS):
        from zoo.diffusers_backbone import load_backbone

        network = load_backbone(name, **given)
        return towers.Tower(network, name=name, frozen=True, revision=name.rpartition("@")[2] if "@" in name else None)
    if isinstance(name, nn.Module):
        require_backbone(name)
    tower = towers.create(name, frozen=True, **given)
    require_backbone(tower.network)
    return tower
