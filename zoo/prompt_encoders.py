"""Captions as the denoisers of Stable Diffusion 1.5, XL and 3 want them told, exactly as the pipelines of diffusers do it.

Every encoder reads a caption at the full length of its tokenizer, padding included, and without a mask (unless the
encoder's configuration asks for one). So the padding counts: what stands behind the caption's end differs from caption to
caption, and cannot be cut off or recomputed without the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError

__all__ = ["PromptEncoder", "SD3Prompts", "SDPrompts", "SDXLPrompts", "Text"]

Text = Tensor | Sequence[str]
"""Captions, or their tokens (B, L), int64, with CLIP's vocabulary, such as `zoo.data.text.OpenClipTokens` gives."""


class PromptEncoder(nn.Module):
    """Frozen text encoders with their tokenizers.

    Args:
        encoders: the text encoders, in the order of their outputs.
        tokenizers: the tokenizer of each.
    """

    blocks: dict[str, tuple[tuple[int, int], ...]]
    """Where a condition may be other than zero: for a tensor (B, L, D), rows and width of each block, from top to bottom. A
    tensor without blocks may be anything everywhere."""

    def __init__(self, encoders: Sequence[nn.Module], tokenizers: Sequence[Any]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.tokenizers = list(tokenizers)
        self.blocks = {}

    def forward(self, text: Text) -> dict[str, Tensor]:
        """Return the condition of each caption.

        Args:
            text: see `Text`.

        Raises:
            InputError: tokens that are not CLIP's.
        """
        raise NotImplementedError

    def null(self) -> dict[str, Tensor]:
        """Return the condition (1, …) of the other half of guidance: that of the empty caption."""
        empty: dict[str, Tensor] = self([""])
        return empty

    def _clip_ids(self, text: Text, which: int, length: int) -> tuple[Tensor, Tensor | None]:
        """Return tokens (B, length) on the encoder's device, and the mask if its configuration asks for one."""
        tokenizer, encoder = self.tokenizers[which], self.encoders[which]
        device = next(encoder.parameters()).device
        if isinstance(text, Tensor):
            ids, mask = _padded(text, tokenizer, length)
        else:
            found = tokenizer(list(text), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            ids, mask = found.input_ids, found.attention_mask
        asked = getattr(encoder.config, "use_attention_mask", False)
        return ids.to(device), mask.to(device) if asked else None


class SDPrompts(PromptEncoder):
    """Stable Diffusion 1 and 2: the last hidden states (B, 77, D) of one encoder, after its last normalisation.

    Args:
        encoders: one.
        tokenizers: one.
    """

    def forward(self, text: Text) -> dict[str, Tensor]:
        """Return "encoder_hidden_states" (B, L, D).

        Args:
            text: see `Text`.

        Raises:
            InputError: tokens that are not CLIP's.
        """
        encoder: Any = self.encoders[0]
        ids, mask = self._clip_ids(text, 0, self.tokenizers[0].model_max_length)
        hidden = encoder(ids, attention_mask=mask)[0]
        return {"encoder_hidden_states": hidden.to(encoder.dtype)}


class SDXLPrompts(PromptEncoder):
    """Stable Diffusion XL: the hidden states before the last layer of two encoders, side by side, and an embedding.

    Args:
        encoders: two.
        tokenizers: two.
        image_size: side of the images in pixels. The denoiser is told that they were of this size and were not cropped.
        zero_null: the condition without a caption is zero, not that of an empty one; the pipeline's configuration says so.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        tokenizers: Sequence[Any],
        *,
        image_size: int,
        zero_null: bool,
    ) -> None:
        super().__init__(encoders, tokenizers)
        self.zero_null = zero_null
        self.image_size = image_size

    def forward(self, text: Text) -> dict[str, Tensor]:
        """Return "encoder_hidden_states" (B, L, D), "text_embeds" (B, P) and "time_ids" (B, 6).

        Args:
            text: see `Text`.

        Raises:
            InputError: tokens that are not CLIP's.
        """
        hidden = []
        for which, encoder in enumerate(self.encoders):
            ids, _ = self._clip_ids(text, which, self.tokenizers[which].model_max_length)
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        embeds: Tensor = output[0]
        size = [float(self.image_size)] * 2
        return {
            "encoder_hidden_states": torch.cat(hidden, dim=-1),
            "text_embeds": embeds,
            "time_ids": torch.tensor([[*size, 0.0, 0.0, *size]], device=embeds.device).repeat(len(embeds), 1),
        }

    def null(self) -> dict[str, Tensor]:
        """Return the condition (1, …) of the other half of guidance."""
        empty = super().null()
        if not self.zero_null:
            return empty
        return {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in empty.items()}


class SD3Prompts(PromptEncoder):
    """Stable Diffusion 3: two CLIP encoders side by side and filled up with zeros, T5 below them, two embeddings joined.

    Args:
        encoders: two of CLIP, and T5 if it is there; zeros stand in its place otherwise.
        tokenizers: as many.
        width: width of the denoiser's text, that of T5.
        length: tokens of T5.
    """

    def __init__(self, encoders: Sequence[nn.Module], tokenizers: Sequence[Any], *, width: int, length: int) -> None:
        super().__init__(encoders, tokenizers)
        self.width = width
        self.length = length
        clip: list[Any] = list(self.encoders)[:2]
        top = (int(self.tokenizers[0].model_max_length), sum(int(encoder.config.hidden_size) for encoder in clip))
        # T5's width is the whole one; what stands beside CLIP's is zero, and all below it where there is no T5.
        self.blocks = {"encoder_hidden_states": (top, (length, width if len(self.encoders) == 3 else 0))}

    def forward(self, text: Text) -> dict[str, Tensor]:
        """Return "encoder_hidden_states" (B, 77 + length, width) and "pooled_projections" (B, P).

        Args:
            text: see `Text`. Tokens reach T5 as the text that CLIP's tokenizer makes of them, without capitals.

        Raises:
            InputError: tokens that are not CLIP's.
        """
        hidden, pooled = [], []
        clip: list[Any] = list(self.encoders)[:2]
        for which, encoder in enumerate(clip):
            ids, _ = self._clip_ids(text, which, self.tokenizers[0].model_max_length)
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2].to(clip[0].dtype))
            pooled.append(output[0])
        top = torch.cat(hidden, dim=-1)
        below = self._t5(text, top)
        padded = F.pad(top, (0, below.shape[-1] - top.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([padded, below], dim=-2),
            "pooled_projections": torch.cat(pooled, dim=-1),
        }

    def _t5(self, text: Text, like: Tensor) -> Tensor:
        if len(self.encoders) < 3:
            return like.new_zeros(len(like), self.length, self.width)
        encoder: Any = self.encoders[2]
        if isinstance(text, Tensor):
            tokens, _ = _padded(text, self.tokenizers[0], text.shape[1])
            text = self.tokenizers[0].batch_decode(tokens, skip_special_tokens=True)
        ids = self.tokenizers[2](
            list(text),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids
        hidden: Tensor = encoder(ids.to(next(encoder.parameters()).device))[0]
        return hidden.to(encoder.dtype)


def _padded(tokens: Tensor, tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    """Return tokens and mask (B, length) as a tokenizer gives them, where open_clip fills up with zeros."""
    tokens = tokens.cpu().long()
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    if tokens.ndim != 2 or not bool((tokens[:, 0] == first).all()) or not bool((tokens == last).any(1).all()):
        raise InputError(
            f"text must be captions, or tokens (B, L) of CLIP's vocabulary, from {first} to {last}, got shape "
            f"{tuple(tokens.shape)}: give the data module tokenizer='ViT-B-32', or cache the conditions"
        )
    end = (tokens == last).int().argmax(1, keepdim=True)
    tokens = F.pad(tokens, (0, max(0, length - tokens.shape[1])))[:, :length]
    place = torch.arange(length)
    # A caption that is too long ends all the same.
    tokens = tokens.masked_fill((place == length - 1) & (end >= length), last)
    return tokens.masked_fill(place > end, tokenizer.pad_token_id), (place <= end).long()
