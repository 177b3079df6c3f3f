"""A batch of images and captions for a text-to-image backbone, and what the errors of all pairs of them say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.backbones import CONDITIONS
from zoo.errors import InputError
from zoo.losses.ranks import gather_rows, rank_and_size, require_equal_batches
from zoo.losses.softrepa import equal_captions

__all__ = ["CaptionedBatch", "MaskEqual", "error_statistics", "own_errors", "read_captioned"]

MaskEqual = Literal["none", "captions", "labels"]
_LIVE = 1e-3  # a pair with exp(-E / temperature) below this adds nothing to the gradient


@dataclass(frozen=True)
class CaptionedBatch:
    """The images of this process, and the captions of all processes that take part.

    Attributes:
        clean: latents (B, c, h, w).
        condition: what the denoiser is told about N captions, by the names of its arguments, N rows each.
        mask: (B, N), True where another caption is no negative; None if all are.
        first_row: the row of `condition` that belongs to the first image.
    """

    clean: Tensor
    condition: dict[str, Tensor]
    mask: Tensor | None
    first_row: int

    @property
    def captions(self) -> int:
        """The number N of captions."""
        return len(next(iter(self.condition.values())))


@torch.no_grad()
def read_captioned(
    batch: Any,
    backbone: Any,
    *,
    mask_equal: MaskEqual,
    gather: bool = False,
    generator: torch.Generator | None = None,
) -> CaptionedBatch:
    """Encode a batch, unless it is encoded already.

    Args:
        batch: a dict with "image" (B, C, H, W) and "text", tokens (B, L) or B captions; or with "latents" (B, c, h, w) and
            conditions by the names of the denoiser's arguments. "caption_id" (B,) or "label" (B,) say what is equal.
        backbone: see `zoo.denoisers.Backbone`.
        mask_equal: which other captions are no negatives: ``"none"``, ``"captions"`` that are the same, or those of the
            same ``"labels"``.
        gather: take the captions of all processes.
        generator: of the latents.

    Raises:
        InputError: the batch lacks something, or with `gather`, processes have batches of different sizes.
    """
    if not isinstance(batch, Mapping) or not ({"image", "text"} <= batch.keys() or "latents" in batch):
        told = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(f'a batch must be a dict with "image" and "text", or with "latents", got {told}')
    if "latents" in batch:
        clean, condition = batch["latents"], {name: batch[name] for name in CONDITIONS if name in batch}
    else:
        clean, condition = backbone.latents(batch["image"], generator), backbone.condition(batch["text"])
    numbers = _caption_numbers(batch, mask_equal, clean.device)
    rank, size = rank_and_size(gather=gather)
    first = rank * len(clean)
    if size > 1:
        require_equal_batches(clean)
        condition = {name: gather_rows(value) for name, value in condition.items()}
        numbers = None if numbers is None else gather_rows(numbers)
    mask = None if numbers is None else equal_captions(numbers)[first : first + len(clean)]
    return CaptionedBatch(clean, condition, mask, first)


def _caption_numbers(batch: Mapping[str, Any], mask_equal: MaskEqual, device: torch.device) -> Tensor | None:
    """Return what equal captions have in common, (B, …)."""
    if mask_equal == "none":
        return None
    if mask_equal == "labels":
        if "label" not in batch:
            raise InputError("mask_equal='labels' needs a \"label\" in each batch; or take mask_equal='captions'")
        label: Tensor = batch["label"]
        return label
    given = batch.get("caption_id", batch.get("text"))
    if given is None or isinstance(given, Tensor):
        return given
    digests = [sha256(text.encode()).digest()[:7] for text in given]
    return torch.tensor([int.from_bytes(digest, "big") for digest in digests], device=device)


def own_errors(errors: Tensor, first_row: int) -> Tensor:
    """Return the errors (B,) of images under their own captions, out of (B, N)."""
    return errors.diagonal(offset=first_row)[: len(errors)]


def error_statistics(errors: Tensor, *, first_row: int, temperature: float) -> dict[str, Tensor]:
    """Say how well images tell captions apart.

    Args:
        errors: (B, N), NaN where a pair was not evaluated.
        first_row: the column of the first image's own caption.
        temperature: of the scores.

    Returns:
        ``positive_error``, the mean of the own captions; ``live_pairs``, the share of evaluated pairs that are not too far
        off for this temperature; and where an image was compared with another caption ``margin``, how much larger those
        errors are in the mean, and ``rank1``, the share of images whose own caption has the smallest error.

    Example:
        >>> found = error_statistics(torch.tensor([[0.1, 0.4], [0.3, 0.2]]), first_row=0, temperature=0.07)
        >>> {name: round(float(value), 3) for name, value in found.items()}
        {'positive_error': 0.15, 'live_pairs': 1.0, 'margin': 0.2, 'rank1': 1.0}
    """
    own, known = own_errors(errors, first_row), ~errors.isnan()
    rows = torch.arange(len(errors), device=errors.device)
    others = errors.index_put((rows, rows + first_row), errors.new_tensor(torch.nan))
    live = torch.exp(-errors / temperature) > _LIVE
    found = {"positive_error": own.mean(), "live_pairs": (live & known).sum() / known.sum()}
    if bool((~others.isnan()).any()):
        found["margin"] = (others - own[:, None]).nanmean()
        found["rank1"] = (own[:, None] < others.nan_to_num(torch.inf)).all(1).float().mean()
    return found
