"""Encoders that return embeddings."""

from __future__ import annotations

import math

import pytest
import torch

from zoo import towers
from zoo.architectures.encoders import LogMelEncoder, mel_filters, text_transformer
from zoo.errors import InputError


def test_text_transformer_reads_at_the_end_of_the_text_and_nothing_behind_it() -> None:
    torch.manual_seed(0)
    tower = towers.create("zoo/text_transformer", embedding=True, width=32, depth=1, output_dim=8)
    tokens = tower.tokenizer(["the digit three", "3"])
    assert tokens.shape == (2, 16)
    assert tower.dim == 8
    embeddings = tower.features(tokens)
    behind = tokens.clone()
    behind[0, 8:] = 17  # after the end, which stands at position 4
    torch.testing.assert_close(tower.features(behind), embeddings)
    before = tokens.clone()
    before[0, 2] = 17
    assert not torch.allclose(tower.features(before)[0], embeddings[0])


def test_golden_mel_filters() -> None:
    """Slaney's scale has 200/3 Hz a band below 1 kHz; the first of 80 filters over 201 bins peaks as in Whisper's table."""
    filters = mel_filters(80, 400, 16000)
    assert filters.shape == (80, 201)
    assert filters[0, 1].item() == pytest.approx(0.0248626, abs=1e-6)
    # The area of a triangle over Hz is one: the bins are 40 Hz apart, so wide filters sum up to 1/40.
    assert filters[-10:].sum(1) == pytest.approx(torch.full((10,), 1 / 40), rel=1e-2)


def test_log_mel_finds_the_pitch() -> None:
    encoder = LogMelEncoder(width=16, depth=1, heads=2, output_dim=4, mels=40)
    time = torch.arange(16000) / 16000
    spectra = encoder.log_mel(torch.stack([torch.sin(2 * math.pi * f * time) for f in (300.0, 1000.0, 4000.0)]))
    assert spectra.shape == (3, 40, 101)
    loudest = spectra[:, :, 50].argmax(1)
    peaks = encoder.mel.argmax(1) * 40.0
    assert peaks[loudest].tolist() == pytest.approx([300.0, 1000.0, 4000.0], rel=0.15)
    assert float(spectra.amax()) < 2.0
    # The scale of the clip shifts everything alike, so the floor keeps its distance to the maximum.
    assert float(spectra[0].amax() - spectra[0].amin()) <= 2.0 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_mel_encoder_in_half_and_double_precision(dtype: torch.dtype) -> None:
    encoder = LogMelEncoder(width=16, depth=1, heads=2, output_dim=4, mels=20).to(dtype)
    embeddings = encoder(torch.randn(2, 4000))
    assert (embeddings.dtype, embeddings.shape) == (dtype, (2, 4))
    embeddings.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_silence_is_finite() -> None:
    assert bool(torch.isfinite(LogMelEncoder(width=16, depth=1, heads=2, mels=20)(torch.zeros(1, 400))).all())


def test_features_are_themselves() -> None:
    x = torch.randn(3, 5)
    assert torch.equal(towers.create("zoo/features", embedding=True, dim=5).features(x), x)


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="width must be a multiple of heads, got 30 and 4"):
        text_transformer(width=30)
    with pytest.raises(InputError, match="context_length must be at least 3"):
        text_transformer(context_length=2)
    with pytest.raises(InputError, match="depth must be positive, got 0"):
        LogMelEncoder(depth=0)
    with pytest.raises(InputError, match="at least 400 samples"):
        LogMelEncoder(width=16, heads=2, depth=1)(torch.zeros(1, 399))
    with pytest.raises(InputError, match="floating point"):
        LogMelEncoder(width=16, heads=2, depth=1)(torch.zeros(1, 4000, dtype=torch.int64))
    with pytest.raises(InputError, match="expected embeddings"):
        towers.create("zoo/features", embedding=True, dim=4).features(torch.zeros(2, 5))
