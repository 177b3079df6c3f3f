"""Encoders that return embeddings: a text transformer, a log-mel encoder of speech, and precomputed features.

Each has ``output_dim``, the width of what it returns; the text encoder also ``context_length`` and ``vocab_size``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError

__all__ = ["Features", "LogMelEncoder", "mel_filters", "text_transformer"]


def text_transformer(
    *,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    output_dim: int = 64,
    context_length: int = 16,
    vocab_size: int = 49408,
) -> nn.Module:
    """Build open_clip's text transformer at a size of your choice; causal, and read at the end-of-text token.

    Args:
        width: width of the tokens; a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        output_dim: width of the embedding.
        context_length: tokens per text, with those for start and end.
        vocab_size: number of tokens; that of open_clip's own tokenizer by default.

    Returns:
        A module that maps token numbers (B, context_length), int64, to embeddings (B, output_dim).

    Raises:
        InputError: open_clip is not installed, or a size is out of range.
    """
    sizes = {"width": width, "depth": depth, "heads": heads, "output_dim": output_dim, "vocab_size": vocab_size}
    _require_positive(sizes)
    if width % heads:
        raise InputError(f"width must be a multiple of heads, got {width} and {heads}")
    if context_length < 3:
        raise InputError(f"context_length must be at least 3 (start, one token, end), got {context_length}")
    try:
        from open_clip.transformer import TextTransformer
    except ImportError as error:
        raise InputError(
            "zoo/text_transformer needs the package open_clip_torch: pip install open_clip_torch"
        ) from error
    network: nn.Module = TextTransformer(
        context_length=context_length,
        vocab_size=vocab_size,
        width=width,
        heads=heads,
        layers=depth,
        output_dim=output_dim,
    )
    return network


class Features(nn.Module):
    """Precomputed features (B, dim) as they are: the place of an encoder whose outputs lie on disk.

    Args:
        dim: their width D.

    Raises:
        InputError: ``dim`` is not positive.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        _require_positive({"dim": dim})
        self.output_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class LogMelEncoder(nn.Module):
    """A transformer over log-mel frames of speech, in the manner of Whisper's encoder, mean-pooled.

    Frames of 25 ms every 10 ms, two convolutions that halve the rate, sinusoidal positions, pre-norm blocks. The mel
    spectrum is floored 8 decades below its maximum in each clip and scaled to about -1 … 1, as Whisper does (Radford et al.:
    Robust Speech Recognition via Large-Scale Weak Supervision, 2022, section 2.2 and its released code).

    Clips of one batch have one length: pad or cut them. Silence that was padded is pooled with the rest.

    Args:
        width: width of the frames; a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        output_dim: width of the embedding.
        mels: number of mel bands.
        sample_rate: samples per second, in Hz.

    Raises:
        InputError: a size is out of range.
    """

    mel: Tensor
    window: Tensor

    def __init__(
        self,
        *,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        output_dim: int = 256,
        mels: int = 80,
        sample_rate: int = 16000,
    ) -> None:
        super().__init__()
        _require_positive({"width": width, "depth": depth, "heads": heads, "output_dim": output_dim, "mels": mels})
        if width % (2 * heads):
            raise InputError(f"width must be a multiple of 2 * heads, got {width} and {heads} heads")
        if sample_rate < 4000:
            raise InputError(f"sample_rate must be at least 4000 Hz, got {sample_rate}")
        self.output_dim = output_dim
        self.width = width
        self.frame = sample_rate // 40
        self.hop = sample_rate // 100
        self.register_buffer("window", torch.hann_window(self.frame), persistent=False)
        self.register_buffer("mel", mel_filters(mels, self.frame, sample_rate), persistent=False)
        self.conv1 = nn.Conv1d(mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, output_dim)

    def log_mel(self, waveforms: Tensor) -> Tensor:
        """Return the scaled log-mel spectrum, float32.

        Args:
            waveforms: (B, samples), floating point in -1 … 1, at least one frame of 25 ms long.

        Returns:
            (B, mels, frames), one frame every 10 ms.

        Raises:
            InputError: the shape or type is another, or the clip is shorter than one frame.
        """
        if waveforms.ndim != 2 or not waveforms.is_floating_point():
            raise InputError(
                f"waveforms must be floating point (B, samples), got {waveforms.dtype} {tuple(waveforms.shape)}"
            )
        if waveforms.shape[1] < self.frame:
            raise InputError(f"waveforms must have at least {self.frame} samples (25 ms), got {waveforms.shape[1]}")
        with torch.autocast(waveforms.device.type, enabled=False):
            spectrum = torch.stft(
                waveforms.float(), self.frame, self.hop, window=self.window.float(), center=True, return_complex=True
            )
            power = self.mel.float() @ spectrum.abs().square()
            decades = power.clamp_min(1e-10).log10()
            floor = decades.amax((1, 2), keepdim=True) - 8.0
            return (torch.maximum(decades, floor) + 4.0) / 4.0

    def forward(self, waveforms: Tensor) -> Tensor:
        """Map waveforms (B, samples) to embeddings (B, output_dim)."""
        frames = self.log_mel(waveforms).to(self.conv1.weight.dtype)
        frames = F.gelu(self.conv2(F.gelu(self.conv1(frames)))).transpose(1, 2)
        frames = frames + _positions(frames.shape[1], self.width).to(frames)
        for block in self.blocks:
            frames = block(frames)
        embedding: Tensor = self.projection(self.norm(frames).mean(1))
        return embedding


def mel_filters(mels: int, frame: int, sample_rate: int) -> Tensor:
    """Return triangular filters over the bins of a Fourier transform, each of area one over Hz (Slaney's convention).

    The scale is linear below 1 kHz (15 bands) and logarithmic above, 27 bands to a factor of 6.4.

    Args:
        mels: number of filters.
        frame: samples of the transform.
        sample_rate: samples per second, in Hz.

    Returns:
        (mels, frame // 2 + 1), float32; from 0 Hz to half the sample rate.

    Example:
        >>> filters = mel_filters(40, 400, 16000)
        >>> filters.shape, bool((filters.sum(1) > 0).all())
        (torch.Size([40, 201]), True)
    """
    step = math.log(6.4) / 27
    top = 15.0 + math.log(max(sample_rate / 2, 1000.0) / 1000.0) / step
    marks = torch.linspace(0.0, top, mels + 2, dtype=torch.float64)
    hertz = torch.where(marks < 15.0, marks * 200.0 / 3.0, 1000.0 * torch.exp(step * (marks - 15.0)))
    bins = torch.linspace(0.0, sample_rate / 2, frame // 2 + 1, dtype=torch.float64)
    low, peak, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    triangles = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp_min(0.0)
    return (triangles * 2.0 / (high - low)).float()


def _positions(length: int, width: int) -> Tensor:
    rates = torch.exp(-math.log(10000.0) * torch.arange(width // 2) / max(width // 2 - 1, 1))
    angles = torch.arange(length)[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


def _require_positive(sizes: dict[str, Any]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name} must be positive, got {value}")
