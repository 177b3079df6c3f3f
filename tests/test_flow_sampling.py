"""Euler steps along a velocity that is known."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo.architectures.tiny_mmdit import TinyTextToImage
from zoo.denoisers import Epsilon, Flow
from zoo.errors import InputError
from zoo.flow_sampling import flow_times, sample


class Known(nn.Module):
    """v = slope x + condition; keeps what it was asked."""

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = slope
        self.asked: list[tuple[int, float]] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, wish: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        self.asked.append((len(hidden_states), float(timestep[0])))
        return (self.slope * hidden_states + wish[:, None, None, None],)


class Backbone:
    latent_shape = (1, 2, 2)

    def __init__(self, slope: float = 0.0, process: Any = None) -> None:
        self.denoiser = Known(slope)
        self.process = Flow() if process is None else process

    def null_condition(self, count: int) -> dict[str, Tensor]:
        return {"wish": torch.full((count,), -1.0)}


def wishes(*values: float) -> Mapping[str, Tensor]:
    return {"wish": torch.tensor(values)}


def test_a_straight_line_takes_one_step() -> None:
    noise = torch.randn(2, 1, 2, 2)
    for steps in (1, 7):
        got = sample(Backbone(), wishes(0.5, -2.0), noise=noise, steps=steps)
        torch.testing.assert_close(got, noise - torch.tensor([0.5, -2.0])[:, None, None, None])


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_steps_and_guidance_restated(guidance: float) -> None:
    noise = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    got = sample(Backbone(0.5), wishes(2.0), noise=noise, steps=4, guidance=guidance, shift=3.0)
    x = noise.numpy().copy()
    shares = [3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25, 0.0)]
    for now, then in pairwise(shares):
        with_text, without = 0.5 * x + 2.0, 0.5 * x - 1.0
        x = x - (now - then) * (without + guidance * (with_text - without))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.from_numpy(x))


def test_the_denoiser_is_asked_once_a_step() -> None:
    backbone = Backbone()
    sample(backbone, wishes(0.0, 0.0, 0.0), steps=4)
    assert backbone.denoiser.asked == [(3, 1000.0), (3, 750.0), (3, 500.0), (3, 250.0)]
    backbone = Backbone()
    sample(backbone, wishes(0.0, 0.0, 0.0), steps=2, guidance=2.0)
    assert backbone.denoiser.asked == [(6, 1000.0), (6, 500.0)]


def test_another_null_condition_may_be_given() -> None:
    noise = torch.zeros(1, 1, 2, 2)
    got = sample(Backbone(), wishes(1.0), null=wishes(0.0), noise=noise, steps=1, guidance=4.0)
    torch.testing.assert_close(got, noise - 4.0)


def test_noise_is_the_generators() -> None:
    def drawn(seed: int) -> Tensor:
        return sample(Backbone(), wishes(0.0, 0.0), generator=torch.Generator().manual_seed(seed), steps=1)

    expected = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn(3), expected)
    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_a_network_in_half_precision_keeps_the_latents_wide() -> None:
    backbone = TinyTextToImage(vocab_size=20, width=16, depth=1, heads=2)
    text, noise = torch.tensor([[3, 4]]), torch.randn(1, 1, 8, 8)
    expected = sample(backbone, backbone.condition(text), noise=noise, steps=3, guidance=2.0)
    backbone.bfloat16()
    got = sample(backbone, backbone.condition(text), noise=noise, steps=3, guidance=2.0)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert (got - expected).abs().max() < 0.05


@given(st.integers(1, 50), st.floats(0.1, 20.0))
def test_times_fall_from_one_to_zero(steps: int, shift: float) -> None:
    times = flow_times(steps, shift)
    assert len(times) == steps + 1
    assert times[0] == 1
    assert times[-1] == 0
    assert bool((times.diff() < 0).all())


def test_a_shift_spends_steps_at_high_noise() -> None:
    shares = [0.25, 0.5, 0.75]
    assert flow_times(4, 3.0)[1:-1].tolist() == pytest.approx([3 * s / (1 + 2 * s) for s in reversed(shares)])


def test_refusals() -> None:
    with pytest.raises(InputError, match="process is Epsilon"):
        sample(Backbone(process=Epsilon(torch.tensor([0.5]))), wishes(1.0))
    with pytest.raises(InputError, match="guidance must be finite and not negative, got -1"):
        sample(Backbone(), wishes(1.0), guidance=-1.0)
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        sample(Backbone(), wishes(1.0), steps=0)
    with pytest.raises(InputError, match="shift must be positive"):
        flow_times(2, 0.0)
    with pytest.raises(InputError, match="a row for each of the 1 texts"):
        sample(Backbone(), wishes(1.0), noise=torch.zeros(2, 1, 2, 2))
