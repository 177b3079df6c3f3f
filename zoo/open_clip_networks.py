"""The two sides of open_clip's models as plain networks that return embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from zoo.errors import InputError, nearest

__all__ = ["build_side", "build_tokenizer", "build_transform", "parse"]

# Options that choose files, devices or another kind of model; the names of files may not come from a configuration.
_OPTIONS = frozenset({"context_length", "image_size", "quick_gelu"})
_ARGUMENTS = {
    "context_length": "force_context_length",
    "image_size": "force_image_size",
    "quick_gelu": "force_quick_gelu",
}


def parse(name: str) -> tuple[str, str]:
    """Return architecture and tag of ``open_clip/ARCHITECTURE`` or ``open_clip/ARCHITECTURE/TAG``.

    Args:
        name: the tower name.

    Raises:
        InputError: open_clip is not installed, or has no such architecture or weights; the nearest names are shown.
    """
    open_clip = _import()
    architecture, _, tag = name.removeprefix("open_clip/").partition("/")
    if architecture not in open_clip.list_models():
        raise InputError(
            f"open_clip has no architecture {architecture!r}.{nearest(architecture, open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise InputError(f"open_clip has no weights {tag!r} for {architecture!r}.{nearest(tag, tags)}")
    return architecture, tag


def build_side(name: str, modality: str | None, options: Mapping[str, Any], *, weights: bool) -> nn.Module:
    """Build the image or the text side of a model; `output_dim` is the width of its embedding.

    Args:
        name: the tower name.
        modality: ``"image"`` or ``"text"``.
        options: ``context_length``, ``image_size``, ``quick_gelu``.
        weights: fetch the weights that the name stands for; otherwise random ones in the same architecture.

    Raises:
        InputError: an unknown name, side or option.
    """
    open_clip = _import()
    architecture, tag = parse(name)
    if modality not in ("image", "text"):
        raise InputError(f"{name!r} has an image and a text side: say which with modality, got {modality!r}")
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise InputError(f"{name!r} takes no option {unknown[0]!r}.{nearest(unknown[0], sorted(_OPTIONS))}")
    forced = {_ARGUMENTS[key]: value for key, value in options.items()}
    with _quiet():
        model = open_clip.create_model(
            architecture,
            pretrained=tag if tag and weights else None,
            # The sides of the older class share one namespace; this one has a module each.
            force_custom_text=True,
            pretrained_text=False,
            device=torch.get_default_device(),
            **forced,
        )
    side: nn.Module = model.visual if modality == "image" else model.text
    # open_clip's wrapper of timm models does not say how wide its output is.
    side.output_dim = open_clip.get_model_config(architecture)["embed_dim"]
    return side


@lru_cache(maxsize=8)  # each reads its vocabulary of 49,408 entries
def build_tokenizer(name: str | None, context_length: int | None) -> Callable[[list[str]], torch.Tensor]:
    """Return open_clip's tokenizer: texts -> token numbers (B, context_length), int64. It is shared, so do not change it.

    Args:
        name: a tower name of open_clip, or None for the tokenizer of the original CLIP.
        context_length: tokens per text, with the one for start and end; the model's own if omitted.
    """
    open_clip = _import()
    if name is None:
        return open_clip.SimpleTokenizer(context_length=context_length or 77)  # type: ignore[no-any-return]
    return open_clip.get_tokenizer(parse(name)[0], context_length=context_length)  # type: ignore[no-any-return]


def build_transform(visual: nn.Module) -> Callable[[Any], torch.Tensor]:
    """Return the evaluation transform of an image side: PIL image -> (3, H, W)."""
    _import()
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config: Any = visual.preprocess_cfg
    return image_transform_v2(PreprocessCfg(**config), is_train=False)  # type: ignore[no-any-return]


def _import() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise InputError(
            "towers and tokenizers of open_clip need the package open_clip_torch: pip install open_clip_torch"
        ) from error
    return open_clip


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning that an architecture without a tag gets random weights: that is what the name says."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
