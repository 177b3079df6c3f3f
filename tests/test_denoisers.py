"""Diffusion and flow matching, against their formulas written out for each sample."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.architectures.tiny_mmdit import TinyMMDiT
from zoo.denoisers import Epsilon, Flow, Process, denoising_errors
from zoo.errors import InputError

TABLE = torch.linspace(0.999, 0.001, 1000, dtype=torch.float64)
PROCESSES: list[Process] = [Flow(), Epsilon(TABLE), Epsilon(TABLE, "v")]


class Joint(nn.Module):
    """Answers with its input times a weight, and keeps what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.quantised = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        return_dict: bool = True,
        **rest: Any,
    ) -> tuple[Tensor]:
        assert not return_dict
        self.seen = {"image": hidden_states, "text": encoder_hidden_states, "timestep": timestep, **rest}
        return (hidden_states * self.weight,)


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True, **rest: Any
    ) -> tuple[Tensor]:
        self.seen = rest
        return (sample * self.weight,)


def sample_by_sample(process: Process, clean: Tensor, noise: Tensor, times: list[float]) -> tuple[Tensor, Tensor]:
    noisy, target = [], []
    for x, e, t in zip(clean, noise, times, strict=True):
        if isinstance(process, Flow):
            noisy.append((1 - t / 1000) * x + t / 1000 * e)
            target.append(e - x)
            continue
        a = float(TABLE[min(int(t), 999)])
        noisy.append(math.sqrt(a) * x + math.sqrt(1 - a) * e)
        target.append(e if process.prediction == "epsilon" else math.sqrt(a) * e - math.sqrt(1 - a) * x)
    return torch.stack(noisy), torch.stack(target)


@pytest.mark.parametrize("process", PROCESSES)
def test_formulas(process: Process) -> None:
    clean, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    times = [0.0, 400.7, 999.0, 1000.0]
    noisy, target = sample_by_sample(process, clean, noise, times)
    torch.testing.assert_close(process.add_noise(clean, noise, torch.tensor(times)), noisy)
    torch.testing.assert_close(process.target(clean, noise, torch.tensor(times)), target)
    # One noise for all, as the pairs of SoftREPA have it.
    noisy, target = sample_by_sample(process, clean, noise[:1].expand(4, -1, -1, -1), times)
    torch.testing.assert_close(process.add_noise(clean, noise[:1], torch.tensor(times)), noisy)
    torch.testing.assert_close(process.target(clean, noise[:1], torch.tensor(times)), target)


@pytest.mark.parametrize("process", PROCESSES)
def test_identity_the_prediction_and_the_noisy_image_give_the_clean_one(process: Process) -> None:
    clean, noise = torch.randn(2, 3, 2, dtype=torch.float64)
    noisy, target = process.add_noise(clean, noise, 300), process.target(clean, noise, 300)
    a = TABLE[300]
    if isinstance(process, Flow):
        found = noisy - 0.3 * target
    elif process.prediction == "epsilon":
        found = (noisy - (1 - a).sqrt() * target) / a.sqrt()
    else:
        found = a.sqrt() * noisy - (1 - a).sqrt() * target
    torch.testing.assert_close(found, clean)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500.0]), torch.full((2,), 500)])
def test_one_time_serves_the_batch(process: Process, timestep: Any) -> None:
    clean, noise = torch.randn(2, 2, 3)
    expected = process.add_noise(clean, noise, torch.tensor([500.0, 500.0]))
    torch.testing.assert_close(process.add_noise(clean, noise, timestep), expected, rtol=0, atol=0)


@pytest.mark.parametrize("process", PROCESSES)
def test_errors_are_means_of_squares_for_each_image(process: Process) -> None:
    clean, noise, text = torch.randn(3, 2, 4, 4), torch.randn(1, 2, 4, 4), torch.randn(3, 5, 7)
    times = [10.0, 500.0, 900.0]
    denoiser = Joint()
    found = denoising_errors(process, denoiser, clean, noise, torch.tensor(times), {"encoder_hidden_states": text})
    noisy, target = sample_by_sample(process, clean, noise.expand(3, -1, -1, -1), times)
    expected = torch.stack([((0.5 * x - y) ** 2).mean() for x, y in zip(noisy, target, strict=True)])
    torch.testing.assert_close(found, expected.detach())
    found.sum().backward()
    assert denoiser.weight.grad.abs() > 0
    alone = denoising_errors(process, denoiser, clean[1:2], noise, times[1], {"encoder_hidden_states": text[1:2]})
    torch.testing.assert_close(alone, found[1:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    clean, noise, text = (torch.randn(2, 3, 4, 4).to(dtype), torch.randn(2, 3, 4, 4), torch.randn(2, 5, 7))
    tokens = torch.ones(2, 5, dtype=torch.long)
    denoiser = Joint(dtype)
    condition = {"encoder_hidden_states": text, "ids": tokens}
    found = denoising_errors(Flow(), denoiser, clean, noise, 501, condition)
    assert found.dtype == torch.float32
    assert Flow().add_noise(clean, noise, 501).dtype == torch.float32
    # The times keep their digits: 501 is 500 in bfloat16.
    kinds = {name: value.dtype for name, value in denoiser.seen.items()}
    assert kinds == {"image": dtype, "text": dtype, "timestep": torch.float32, "ids": torch.long}
    assert denoiser.seen["timestep"].tolist() == [501.0, 501.0]
    exact = denoising_errors(Flow(), Joint(), clean, noise, 501, condition)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)


def test_a_unet_is_called_as_diffusers_calls_it() -> None:
    unet, x = Crossed(), torch.randn(2, 3, 4, 4)
    condition = {
        "encoder_hidden_states": torch.zeros(2, 5, 7),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        "text_embeds": torch.zeros(2, 6),
        "time_ids": torch.zeros(2, 6),
    }
    torch.testing.assert_close(Epsilon(TABLE).predict(unet, x, 5, condition), 0.5 * x)
    assert unet.seen["encoder_attention_mask"].dtype == torch.bool
    assert set(unet.seen["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    assert len(condition) == 4
    Epsilon(TABLE).predict(unet, x, 5, {"encoder_hidden_states": torch.zeros(2, 5, 7)})
    assert not unet.seen


def test_our_network() -> None:
    network = TinyMMDiT(width=16, depth=2, heads=2, joint_attention_dim=12, pooled_projection_dim=6)
    condition = {"encoder_hidden_states": torch.randn(2, 5, 12), "pooled_projections": torch.randn(2, 6)}
    noisy = torch.randn(2, 1, 8, 8)
    expected = network(
        noisy, condition["encoder_hidden_states"], condition["pooled_projections"], torch.tensor([7.0, 7.0])
    )
    assert torch.equal(Flow().predict(network, noisy, 7, condition), expected[0])


def test_a_network_without_parameters_keeps_the_images_type() -> None:
    class Plain(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (hidden_states,)

    assert Flow().predict(Plain(), torch.zeros(1, 2, dtype=torch.bfloat16), 5, {}).dtype == torch.bfloat16


def test_pickle() -> None:
    assert pickle.loads(pickle.dumps(Flow())) == Flow()
    twin = pickle.loads(pickle.dumps(Epsilon(TABLE, "v")))
    assert twin.prediction == "v"
    assert torch.equal(twin.alphas_cumprod, TABLE)


def test_bad_input() -> None:
    clean = torch.zeros(2, 3)
    with pytest.raises(InputError, match="timestep must be one time, or one for each of the 2 images, got 3"):
        Flow().add_noise(clean, clean, torch.zeros(3))
    with pytest.raises(InputError, match=r"alphas_cumprod must be one number for each step.*got shape \(1, 1000\)"):
        Epsilon(TABLE[None])
    with pytest.raises(InputError, match="prediction must be one of epsilon, v, got 'sample'"):
        Epsilon(TABLE, "sample")

    class Pooling(Joint):
        def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (hidden_states.mean((2, 3)),)

    with pytest.raises(InputError, match="denoiser must predict a tensor of the shape of its input"):
        denoising_errors(Flow(), Pooling(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), 5, {})
