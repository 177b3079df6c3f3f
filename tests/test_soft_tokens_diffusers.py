"""Soft tokens on unmodified networks and pipelines of diffusers, against loops over their blocks written out here.

One file, so that one process pays for importing diffusers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.soft_token_networks import (
    BATCH,
    CROSSED,
    CROSSED_FIRST,
    JOINT,
    KINDS,
    LENGTH,
    MAKERS,
    UNET,
    WIDTH,
    condition_of,
    noisy_of,
    sd3_by_hand,
    tokens_by_hand,
    unet_by_hand,
)
from zoo.denoisers import Epsilon, Flow, denoising_errors
from zoo.errors import InputError
from zoo.soft_tokens import SoftTokens, attach, detach, token_places, token_width

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        FlowMatchEulerDiscreteScheduler,
        FluxTransformer2DModel,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning:diffusers.*", "ignore:.*:FutureWarning:transformers.*")


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {kind: maker().double().requires_grad_(False).eval() for kind, maker in MAKERS.items()}
    for network in made.values():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(autouse=True)
def _nothing_left(networks: dict[str, nn.Module]) -> Iterator[None]:
    yield
    for network in networks.values():
        detach(network)
        network.disable_gradient_checkpointing()
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def run(network: nn.Module, kind: str, timestep: Any, seed: int = 0) -> Tensor:
    # The call of both families is that of Flow.predict and Epsilon.predict, which is the same.
    return Flow().predict(network, noisy_of(seed), timestep, condition_of(kind, seed))


def by_hand(model: nn.Module, kind: str, bank: SoftTokens, places: Any, times: list[float]) -> Tensor:
    loop = sd3_by_hand if kind in JOINT else unet_by_hand
    return loop(model, noisy_of(), times, condition_of(kind), places, tokens_by_hand(bank, times))


CASES = [
    ("sd3", [0], 1),
    ("sd3", [0, 1, 2], 3),
    ("sd3", [2], 1),
    ("sd3.5", [0, 1], 2),
    ("sd3.5", [0, 1, 2], 3),
    ("sd1", ["down_blocks.0"], 1),
    ("sd1", ["down_blocks.0", "mid_block", "up_blocks.1"], 1),
    ("sdxl", ["down_blocks.1", "mid_block"], 1),
    ("sdxl", ["up_blocks.0"], 1),
]


@pytest.mark.parametrize(("kind", "places", "layers"), CASES)
def test_equals_the_blocks_by_hand(networks: dict[str, nn.Module], kind: str, places: Any, layers: int) -> None:
    network, times = networks[kind], [1000.0, 37.0]
    bank = SoftTokens(layers, 4, token_width(network), init_std=0.5)
    expected = by_hand(network, kind, bank, places, times)
    wanted = torch.autograd.grad(expected.square().sum(), list(bank.parameters()))
    with attach(network, bank, places):
        found = run(network, kind, torch.tensor(times))
        gradients = torch.autograd.grad(found.square().sum(), list(bank.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert one.abs().sum() > 0
    assert not torch.allclose(found, run(network, kind, torch.tensor(times)), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_detached_is_the_network_itself(networks: dict[str, nn.Module], kind: str, tmp_path: Path) -> None:
    network = networks[kind]
    plain, names = run(network, kind, 400), list(network.state_dict())
    network.save_pretrained(tmp_path / "plain")
    with attach(network, SoftTokens(1, 4, token_width(network))):
        assert list(network.state_dict()) == names
        assert sum(1 for _ in network.parameters()) == len(names) - sum(1 for _ in network.buffers())
        network.save_pretrained(tmp_path / "attached")
        assert not torch.equal(run(network, kind, 400), plain)
    assert torch.equal(run(network, kind, 400), plain)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "attached" / file.name).read_bytes() == file.read_bytes()
    again = type(network).from_pretrained(tmp_path / "attached", torch_dtype=torch.float64)
    torch.testing.assert_close(run(again, kind, 400), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_bank_and_the_rows_of_the_times_have_gradients(networks: dict[str, nn.Module], kind: str) -> None:
    network = networks[kind]
    bank = SoftTokens(1, 4, token_width(network))
    process = Flow() if kind in JOINT else Epsilon(torch.linspace(0.99, 0.01, 1000))
    clean, noise, times = noisy_of(1), noisy_of(2)[:1], torch.tensor([123, 850])
    with attach(network, bank):
        errors = denoising_errors(process, network, clean, noise, times, condition_of(kind))
        errors.sum().backward()
    assert errors.shape == (BATCH,)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert bank.base.grad.abs().min() > 0
    assert bank.offset.grad.flatten(1).norm(dim=1).nonzero().flatten().tolist() == [12, 85]
    # The same errors from what diffusers itself gives back, one by one.
    with attach(network, bank):
        predicted = run_on(network, kind, process.add_noise(clean, noise, times), times)
    target = process.target(clean, noise, times)
    torch.testing.assert_close(
        errors, torch.stack([((p - t) ** 2).mean() for p, t in zip(predicted, target, strict=True)])
    )


def run_on(network: nn.Module, kind: str, noisy: Tensor, times: Tensor) -> Tensor:
    told: dict[str, Any] = condition_of(kind)
    if kind == "sdxl":
        told["added_cond_kwargs"] = {name: told.pop(name) for name in ("text_embeds", "time_ids")}
    if kind in JOINT:
        return network(noisy, timestep=times, **told).sample
    return network(noisy, times, **told).sample


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients_with_another_pass_between(
    networks: dict[str, nn.Module], kind: str
) -> None:
    network = networks[kind]

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        bank = SoftTokens(len(token_places(network)) if kind in JOINT else 1, 4, token_width(network))
        with attach(network, bank):
            first, second = run(network, kind, 120, 1), run(network, kind, 980, 2)
            (first.square().sum() + 3 * second.square().sum()).backward()
        return [bank.base.grad, bank.offset.grad]

    expected = gradients()
    network.enable_gradient_checkpointing()
    found = gradients()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found[1].flatten(1).norm(dim=1).nonzero().flatten().tolist() == [12, 98]


@pytest.mark.parametrize("kind", CROSSED)
def test_a_masked_text_is_a_shorter_text(networks: dict[str, nn.Module], kind: str) -> None:
    network, short = networks[kind], condition_of(kind)
    padded = dict(short)
    padded["encoder_hidden_states"] = torch.cat([short["encoder_hidden_states"], torch.randn(BATCH, 3, WIDTH)], 1)
    padded["encoder_attention_mask"] = torch.arange(LENGTH + 3).expand(BATCH, -1) < LENGTH
    with attach(network, SoftTokens(1, 4, WIDTH, init_std=0.5), ["down_blocks", "mid_block"]):
        expected, found = (Flow().predict(network, noisy_of(), 5, text) for text in (short, padded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", CROSSED)
@pytest.mark.parametrize("timestep", [500, torch.tensor(500), torch.tensor([500])])
def test_unets_take_one_time_for_the_batch(networks: dict[str, nn.Module], kind: str, timestep: Any) -> None:
    network = networks[kind]
    with attach(network, SoftTokens(1, 4, WIDTH)):
        expected = run_on(network, kind, noisy_of(), torch.full((BATCH,), 500))
        torch.testing.assert_close(run_on(network, kind, noisy_of(), timestep), expected, rtol=0, atol=1e-11)


def test_extras_of_the_attention_arrive(networks: dict[str, nn.Module]) -> None:
    network, seen = networks["sd1"], []

    def look(_block: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        seen.append(given["cross_attention_kwargs"])

    told = condition_of("sd1")
    with attach(network, SoftTokens(1, 4, WIDTH)):
        handles = [
            network.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)
            for name in ("down_blocks.0", "mid_block", "up_blocks.1")
        ]
        network(noisy_of(), 5, **told)
        network(noisy_of(), 5, **told, cross_attention_kwargs={"scale": 1.0, "ip_adapter_masks": None})
        for handle in handles:
            handle.remove()
    assert seen == [None] * 3 + [{"ip_adapter_masks": None}] * 3


class _Seen(Exception):
    """Ends a pass in which the attention would need an image adapter's weights."""


def test_an_image_prompt_stays_behind_the_text(networks: dict[str, nn.Module]) -> None:
    network, images = copy.deepcopy(networks["sd1"]), [torch.zeros(BATCH, 1, 3, WIDTH)]
    network.process_encoder_hidden_states = lambda encoder_hidden_states, **_: (encoder_hidden_states, images)

    def stop(_block: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        raise _Seen(given["encoder_hidden_states"])

    with attach(network, SoftTokens(1, 4, WIDTH)):
        network.down_blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        with pytest.raises(_Seen) as caught:
            run(network, "sd1", 5)
    text, behind = caught.value.args[0]
    assert torch.equal(text[:, 4:], condition_of("sd1")["encoder_hidden_states"])
    assert behind is images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(networks: dict[str, nn.Module], kind: str, dtype: torch.dtype) -> None:
    network = copy.deepcopy(networks[kind]).float()
    bank = SoftTokens(1, 4, token_width(network))
    with attach(network, bank):
        expected = run(network, kind, 500)
        found = run(network.to(dtype), kind, 500)
        found.float().square().mean().backward()
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < 0.1 * expected.norm()
    assert bank.base.grad.dtype == torch.float32
    assert bank.base.grad.isfinite().all()


# Dynamo asks a tensor that comes out of a hook for its gradient; it hides the warning itself unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore::DeprecationWarning")
def test_compiled(networks: dict[str, nn.Module]) -> None:
    kind, network = "sd3", copy.deepcopy(networks["sd3"])
    del network.transformer_blocks[1:]  # one block compiles sooner
    bank = SoftTokens(1, 4, token_width(network))
    with attach(network, bank):
        expected = run(network, kind, 500)
        found = run(torch.compile(network, backend="aot_eager"), kind, 500)
        torch.testing.assert_close(found, expected)
        wanted = torch.autograd.grad(expected.square().sum(), bank.base)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), bank.base), wanted)


def test_a_copy_has_a_copy_of_the_bank(networks: dict[str, nn.Module]) -> None:
    network = networks["sd3"]
    plain, bank = run(network, "sd3", 5), SoftTokens(1, 4, 8)
    with attach(network, bank):
        expected = run(network, "sd3", 5)
        twin = copy.deepcopy(network)
        assert torch.equal(run(twin, "sd3", 5), expected)
    assert torch.equal(run(twin, "sd3", 5), expected)
    detach(twin)
    assert torch.equal(run(twin, "sd3", 5), plain)


def test_places(networks: dict[str, nn.Module]) -> None:
    assert token_places(networks["sd3"]) == [f"transformer_blocks.{index}" for index in range(3)]
    assert token_places(networks["sd1"]) == ["down_blocks.0"]
    assert token_places(networks["sdxl"]) == ["down_blocks.1", "mid_block"]
    assert token_places(networks["sd1"], [0, 1, 2]) == ["down_blocks.0", "mid_block", "up_blocks.1"]
    assert {kind: token_width(network) for kind, network in networks.items()} == dict.fromkeys(
        JOINT, 8
    ) | dict.fromkeys(CROSSED, WIDTH)
    with pytest.raises(InputError, match=r"no block 'down_blocks.1' that takes the text.*Did you mean down_blocks.0"):
        token_places(networks["sd1"], "down_blocks.1")
    with pytest.raises(InputError, match="must take text of one width in all its blocks"):
        token_width(UNet2DConditionModel(**{**UNET, **CROSSED_FIRST, "cross_attention_dim": (12, 16)}))


def test_bad_rotary_network() -> None:
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"FluxTransformer2DModel cannot take soft tokens: .*\(image_rotary_emb\)"):
        attach(flux, SoftTokens(1, 4, 32))


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)


class TestPipelines:
    """Two steps with guidance, against the loop of the pipeline written out around the blocks by hand."""

    @staticmethod
    def guided(
        loop: Callable[..., Tensor], text: dict[str, Tensor], null: dict[str, Tensor], latents: Tensor
    ) -> Tensor:
        both = {name: torch.cat([null[name], text[name]]) for name in text}
        without, with_text = loop(torch.cat([latents, latents]), both).chunk(2)
        return without + 3.0 * (with_text - without)

    def test_stable_diffusion_3(self, networks: dict[str, nn.Module], vae: Any) -> None:
        network, bank = networks["sd3"], SoftTokens(2, 4, 8, init_std=0.5)
        pipeline = StableDiffusion3Pipeline(
            transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        text, null, latents = condition_of("sd3", 1), condition_of("sd3", 2), noisy_of(3)

        def sample() -> Tensor:
            return pipeline(
                prompt_embeds=text["encoder_hidden_states"], pooled_prompt_embeds=text["pooled_projections"],
                negative_prompt_embeds=null["encoder_hidden_states"],
                negative_pooled_prompt_embeds=null["pooled_projections"],
                latents=latents, guidance_scale=3.0, num_inference_steps=2, output_type="latent",
            ).images  # fmt: skip

        with torch.no_grad():
            plain = sample()
            with attach(pipeline, bank, [0, 1]):
                found = sample()
            assert torch.equal(sample(), plain)
            scheduler, expected = FlowMatchEulerDiscreteScheduler(shift=3.0), latents
            scheduler.set_timesteps(2)
            for time in scheduler.timesteps:
                times = [float(time)] * 2 * BATCH
                of = tokens_by_hand(bank, times)
                velocity = self.guided(
                    lambda x, told, times=times, of=of: sd3_by_hand(network, x, times, told, [0, 1], of),
                    text,
                    null,
                    expected,
                )
                expected = scheduler.step(velocity, time, expected).prev_sample
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
        assert not torch.allclose(found, plain)

    def test_stable_diffusion(self, networks: dict[str, nn.Module], vae: Any) -> None:
        network, bank = networks["sd1"], SoftTokens(1, 4, WIDTH, init_std=0.5)
        pipeline = StableDiffusionPipeline(
            unet=network, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), vae=vae, text_encoder=None,
            tokenizer=None, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        text, null, latents = condition_of("sd1", 1), condition_of("sd1", 2), noisy_of(3)

        def sample() -> Tensor:
            return pipeline(
                prompt_embeds=text["encoder_hidden_states"], negative_prompt_embeds=null["encoder_hidden_states"],
                latents=latents, guidance_scale=3.0, num_inference_steps=2, output_type="latent",
            ).images  # fmt: skip

        with torch.no_grad():
            plain = sample()
            with attach(pipeline, bank):
                found = sample()
            assert torch.equal(sample(), plain)
            scheduler, expected = DDIMScheduler(steps_offset=1, clip_sample=False), latents
            scheduler.set_timesteps(2)
            for time in scheduler.timesteps:
                times = [float(time)] * 2 * BATCH
                of = tokens_by_hand(bank, times)
                noise = self.guided(
                    lambda x, told, times=times, of=of: unet_by_hand(network, x, times, told, ["down_blocks.0"], of),
                    text,
                    null,
                    expected,
                )
                expected = scheduler.step(noise, time, expected).prev_sample
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
        assert not torch.allclose(found, plain)
