"""A text-to-image model of a few hundred thousand parameters, called as Stable Diffusion 3's transformer is.

Esser et al.: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, ICML 2024, arXiv 2403.03206, figure 2
and section 4: image and text are two streams with weights of their own that meet in one attention, modulated by time and
pooled text. Peebles, Xie: Scalable Diffusion Models with Transformers, ICCV 2023, arXiv 2212.09748: the modulation begins at
zero, so that each block begins as the identity. Here: no normalisation of queries and keys, positions that are computed
and not learned, pixels in the place of latents.

`TinyMMDiT` takes the arguments of diffusers' ``SD3Transformer2DModel`` under its names, has its ``transformer_blocks``, and
calls them as it does. What is attached to those blocks fits both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.architectures.tiny_text_encoder import PAD, TinyTextEncoder, mlp, require_positive
from zoo.denoisers import Flow
from zoo.errors import InputError

__all__ = ["JointBlock", "TinyMMDiT", "TinyTextToImage", "sincos_positions"]

_LONGEST_PERIOD = 10000.0
_MLP_RATIO = 4


class _Stream(nn.Module):
    """The weights of one stream in a joint block; a stream without output only answers the other's queries."""

    def __init__(self, width: int, *, output: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, (6 if output else 2) * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.projections = nn.Linear(width, (3 if output else 2) * width)
        if output:
            self.out = nn.Linear(width, width)
            self.mlp = mlp(width, _MLP_RATIO * width, width)

    def modulated(self, tokens: Tensor, temb: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return key, value and query (B, N, W) each, the query where there is one, and what modulates the rest."""
        shift, scale, *rest = self.modulation(F.silu(temb))[:, None].chunk(
            self.modulation.out_features // temb.shape[1], 2
        )
        projected = self.projections(_normed(tokens) * (1 + scale) + shift)
        return list(projected.split(tokens.shape[2], 2)), rest

    def close(self, tokens: Tensor, attended: Tensor, rest: Sequence[Tensor]) -> Tensor:
        """Return the tokens after attention and MLP, each through its gate."""
        gate, shift, scale, mlp_gate = rest
        tokens = tokens + gate * self.out(attended)
        return tokens + cast("Tensor", mlp_gate * self.mlp(_normed(tokens) * (1 + scale) + shift))


class JointBlock(nn.Module):
    """One block of two streams that meet in one attention.

    Args:
        width: width of the tokens of both streams.
        heads: attention heads, a divisor of the width.
        context_pre_only: whether the text ends here: its tokens are looked at and not computed further.
    """

    def __init__(self, width: int, heads: int, *, context_pre_only: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.context_pre_only = context_pre_only
        self.image = _Stream(width, output=True)
        self.text = _Stream(width, output=not context_pre_only)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Return the streams after the block.

        Args:
            hidden_states: image tokens (B, N, W).
            encoder_hidden_states: text tokens (B, L, W); L may differ from block to block.
            temb: what modulates both, (B, W).
            joint_attention_kwargs: of diffusers' call; nothing in it is used here.

        Returns:
            Text tokens (B, L, W), or None where the text ends, and image tokens (B, N, W).
        """
        image, image_rest = self.image.modulated(hidden_states, temb)
        text, text_rest = self.text.modulated(encoder_hidden_states, temb)
        key, value, query = (torch.cat(both, 1) for both in zip(image, [*text, text[0][:, :0]][:3], strict=True))
        attended = _attention(query, key, value, self.heads)
        length = hidden_states.shape[1]
        hidden_states = self.image.close(hidden_states, attended[:, :length], image_rest)
        if self.context_pre_only:
            return None, hidden_states
        return self.text.close(encoder_hidden_states, attended[:, length:], text_rest), hidden_states


class TinyMMDiT(nn.Module):
    """A small MMDiT: noisy images, a time and an embedded text in, an image of the same shape out.

    The call and the attributes ``transformer_blocks``, ``context_embedder``, ``inner_dim`` and ``gradient_checkpointing``
    are those of diffusers' ``SD3Transformer2DModel``.

    Args:
        in_channels: channels C of the images.
        patch_size: side of the patches in pixels; a divisor of the images' sides.
        width: width of the tokens, a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        joint_attention_dim: width D of the text tokens that come in.
        pooled_projection_dim: width P of the pooled text that comes in.

    Raises:
        InputError: a size is not positive, or they do not fit each other.

    Example:
        >>> denoiser = TinyMMDiT(in_channels=1)
        >>> text = {"encoder_hidden_states": torch.zeros(2, 7, 64), "pooled_projections": torch.zeros(2, 64)}
        >>> denoiser(hidden_states=torch.zeros(2, 1, 8, 8), timestep=torch.tensor([0.0, 1000.0]), **text)[0].shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        patch_size: int = 2,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        joint_attention_dim: int = 64,
        pooled_projection_dim: int = 64,
    ) -> None:
        super().__init__()
        require_positive(
            in_channels=in_channels, patch_size=patch_size, width=width, depth=depth, heads=heads,
            joint_attention_dim=joint_attention_dim, pooled_projection_dim=pooled_projection_dim,
        )  # fmt: skip
        if width % 4 or width % heads:
            raise InputError(f"width must be a multiple of 4 and of heads, got {width} and {heads} heads")
        self.inner_dim = width
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.patch_embedder = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.time_embedder = mlp(width, width, width)
        self.pooled_embedder = mlp(pooled_projection_dim, width, width)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, heads, context_pre_only=index == depth - 1) for index in range(depth)
        )
        self.modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.proj_out = nn.Linear(width, in_channels * patch_size**2)
        self.gradient_checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        """Compute the blocks again in the backward pass, for less memory."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep what the blocks computed for the backward pass."""
        self.gradient_checkpointing = False

    def forward(  # noqa: PLR0917 - the call of diffusers
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the network's output, the velocity of a rectified flow.

        Args:
            hidden_states: noisy images (B, C, H, W).
            encoder_hidden_states: text tokens (B, L, D).
            pooled_projections: pooled text (B, P).
            timestep: 0 … 1000, (B,), (1,) or 0-d, of any type; 1000 is noise alone.
            joint_attention_kwargs: handed to each block.
            return_dict: must be False; diffusers' models return an object otherwise.

        Returns:
            A tuple of one tensor (B, C, H, W).

        Raises:
            InputError: the sides of the images are no multiples of the patch size, or ``return_dict`` is True.
        """
        if return_dict:
            raise InputError("TinyMMDiT returns a tuple: call it with return_dict=False")
        height, width = hidden_states.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"the sides of the images must be multiples of patch_size {self.patch_size}, got {height} x {width}"
            )
        rows, columns = height // self.patch_size, width // self.patch_size
        image = self.patch_embedder(hidden_states).flatten(2).transpose(1, 2)
        image = image + sincos_positions(rows, columns, self.inner_dim, device=image.device).to(image.dtype)
        times = timestep.reshape(-1).expand(len(image))
        temb = self.time_embedder(_frequencies(times, self.inner_dim).to(image.dtype))
        temb = temb + self.pooled_embedder(pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                text, image = checkpoint(block, image, text, temb, joint_attention_kwargs, use_reentrant=False)
            else:
                text, image = block(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    temb=temb,
                    joint_attention_kwargs=joint_attention_kwargs,
                )
        shift, scale = self.modulation(F.silu(temb))[:, None].chunk(2, 2)
        patches = self.proj_out(_normed(image) * (1 + scale) + shift).transpose(1, 2)
        return (F.fold(patches, (height, width), self.patch_size, stride=self.patch_size),)


class TinyTextToImage(nn.Module):
    """A backbone of text-to-image generation that trains on a CPU: text encoder, denoiser and what is needed around them.

    It has the members of `zoo.denoisers.Backbone`. Its latents are the images as they come.

    Args:
        sample_size: side of the images in pixels.
        channels: channels of the images.
        patch_size: side of the patches in pixels, a divisor of ``sample_size``.
        width: width of the tokens, a multiple of 4 and of ``heads``.
        depth: number of joint blocks.
        heads: attention heads.
        vocab_size: number of tokens of the tokenizer.
        context_length: tokens of the longest text.
        text_width: width of the text's tokens before the denoiser.
        tokenizer: a model of open_clip, whose tokenizer reads texts that are given as strings.

    Attributes:
        denoiser: the network that predicts the velocity.
        text_encoder: the network of the texts.
        latent_shape: (C, H, W) of what is denoised.

    Raises:
        InputError: sizes are out of range or do not fit each other.

    Example:
        >>> backbone = TinyTextToImage(sample_size=32, channels=3, patch_size=4)
        >>> text = backbone.condition(["a photo of the digit three"])
        >>> {name: tuple(value.shape) for name, value in text.items()}
        {'encoder_hidden_states': (1, 16, 64), 'pooled_projections': (1, 64)}
        >>> noise = torch.zeros(1, 3, 32, 32)
        >>> backbone.process.predict(backbone.denoiser, noise, torch.tensor(1000.0), text).shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(
        self,
        *,
        sample_size: int = 8,
        channels: int = 1,
        patch_size: int = 2,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        vocab_size: int = 49408,
        context_length: int = 16,
        text_width: int = 64,
        tokenizer: str = "ViT-B-32",
    ) -> None:
        super().__init__()
        require_positive(sample_size=sample_size, patch_size=patch_size)
        if sample_size % patch_size:
            raise InputError(f"patch_size must divide sample_size, got {patch_size} and {sample_size}")
        self.denoiser = TinyMMDiT(
            in_channels=channels, patch_size=patch_size, width=width, depth=depth, heads=heads,
            joint_attention_dim=text_width, pooled_projection_dim=text_width,
        )  # fmt: skip
        self.text_encoder = TinyTextEncoder(vocab_size=vocab_size, context_length=context_length, width=text_width)
        self.latent_shape = (channels, sample_size, sample_size)
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.tokenizer = tokenizer

    @property
    def process(self) -> Flow:
        """The rectified flow."""
        return Flow()

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return what is denoised: the images (B, C, H, W) themselves.

        Args:
            images: in the units of the data module.
            generator: of backbones that draw their latents.

        Raises:
            InputError: images of another shape.
        """
        if tuple(images.shape[1:]) != self.latent_shape:
            raise InputError(
                f"images must be (B, {', '.join(map(str, self.latent_shape))}), got {tuple(images.shape)}: build the model "
                "with the channels and the sample_size of the data"
            )
        return images

    def images(self, latents: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of latents: the latents themselves."""
        return latents

    def condition(self, text: Tensor | Sequence[str]) -> dict[str, Tensor]:
        """Return what the denoiser is told of texts.

        Args:
            text: token numbers (B, L), int64, filled up with 0 to any length; or B texts.

        Returns:
            ``encoder_hidden_states`` (B, context_length, D) and ``pooled_projections`` (B, D).

        Raises:
            InputError: no token numbers (B, L), or more tokens than ``context_length``.
        """
        tokens = self._tokens(text)
        embedded, pooled = self.text_encoder(F.pad(tokens, (0, self.context_length - tokens.shape[1]), value=PAD))
        return {"encoder_hidden_states": embedded, "pooled_projections": pooled}

    def null_condition(self, count: int) -> dict[str, Tensor]:
        """Return the condition of ``count`` empty texts, for classifier-free guidance."""
        device = self.text_encoder.positions.device
        return self.condition(torch.full((count, self.context_length), PAD, device=device))

    def forward(self, noisy: Tensor, timestep: Tensor, text: Tensor | Sequence[str]) -> Tensor:
        """Return the velocity (B, C, H, W) at noisy images (B, C, H, W), times 0 … 1000 and texts; see `condition`."""
        return cast("Tensor", self.denoiser(noisy, timestep=timestep, **self.condition(text))[0])

    def _tokens(self, text: Tensor | Sequence[str]) -> Tensor:
        if not isinstance(text, Tensor):
            from zoo.data.text import OpenClipTokens

            # Tokens beyond the context are cut here, as open_clip does.
            read = OpenClipTokens(self.tokenizer, self.context_length)([*text])
            return read.to(self.text_encoder.positions.device)
        if text.ndim != 2 or text.is_floating_point():
            raise InputError(f"text must be token numbers (B, L), got {text.dtype} {tuple(text.shape)}")
        if bool((text[:, self.context_length :] != PAD).any()):
            raise InputError(
                f"a text has more tokens than context_length {self.context_length}, which the model was built with: shorten "
                "it"
            )
        return text[:, : self.context_length]


def sincos_positions(rows: int, columns: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return fixed positions on a grid: half of the width for the row, half for the column.

    Args:
        rows: rows of the grid.
        columns: columns of the grid.
        width: width of a position, a multiple of 4.
        device: where they are needed.

    Returns:
        (rows * columns, width), float32, row by row; of each half a half is sines, the other cosines.

    Example:
        >>> sincos_positions(1, 2, 4)
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.0000, 1.0000, 0.8415, 0.5403]])
    """
    rates = _LONGEST_PERIOD ** (-torch.arange(width // 4, device=device) / (width // 4))
    across, down = (torch.arange(count, device=device)[:, None] * rates for count in (columns, rows))
    across, down = (torch.cat([angles.sin(), angles.cos()], 1) for angles in (across, down))
    return torch.cat([down.repeat_interleave(columns, 0), across.repeat(rows, 1)], 1)


def _frequencies(times: Tensor, width: int) -> Tensor:
    """Return sines and cosines (B, width) of times (B,), float32."""
    rates = _LONGEST_PERIOD ** (-torch.arange(width // 2, device=times.device) / (width // 2))
    angles = times.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    query, key, value = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _normed(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
