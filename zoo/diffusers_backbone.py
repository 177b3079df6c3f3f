"""Stable Diffusion 1.5, XL and 3 as backbones: frozen, from safetensors files, by name.

==================================================================  =================================================
name                                                                pipeline
==================================================================  =================================================
``diffusers/stabilityai/stable-diffusion-3-medium-diffusers``       that repository of the Hub, its default branch
``diffusers/stabilityai/stable-diffusion-xl-base-1.0@462165984030``  that commit, branch or tag of it
``diffusers/./models/sd15``, ``diffusers//models/sd15``             a folder (the path begins with . or / or ~)
==================================================================  =================================================

diffusers and transformers are an extra: ``pip install 'lightning-zoo[diffusion]'``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo.denoisers import Epsilon, Flow
from zoo.diffusers_parts import PipelineFolder, find_pipeline, library
from zoo.errors import InputError
from zoo.prompt_encoders import PromptEncoder, SD3Prompts, SDPrompts, SDXLPrompts, Text

__all__ = ["DiffusersBackbone", "load_backbone"]

_STEPS = 1000
_SLACK = 1.02  # half precision, and resampling that overshoots
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


class DiffusersBackbone(nn.Module):
    """A text-to-image model of diffusers in its parts, as `zoo.denoisers.Backbone` describes them; see `load_backbone`.

    Images are (B, 3, H, W) in [-1, 1]: a data module has ``mean`` and ``std`` 0.5 for each channel. All parts are frozen and
    stay in eval mode. The encoders compute in the type of their own weights, whatever the precision of the trainer, so that
    a cached condition is the same as one that is computed in training.

    Args:
        denoiser: the network that denoises.
        process: how it was trained.
        source: the pipeline that it comes from.
        vae: encoder and decoder of the images; None leaves them out.
        prompts: the text encoders; None leaves them out.
        options: with which options captions are encoded, part of `identity`.

    Attributes:
        denoiser: see above.
        process: see above.
        vae: see above.
        prompts: see above.
        name: the name that it was loaded by, without the revision.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        process: Flow | Epsilon,
        source: PipelineFolder,
        *,
        vae: nn.Module | None = None,
        prompts: PromptEncoder | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = process
        self.vae = vae
        self.prompts = prompts
        self.name = source.name
        self._source = source
        self._options = dict(options or {})
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> DiffusersBackbone:
        """Stay in eval mode.

        Args:
            mode: ignored.
        """
        del mode
        return super().train(False)

    @property
    def revision(self) -> str:
        """The commit; of a local folder ``sha256:`` and the hash of VAE, text encoders and tokenizers.

        Raises:
            InputError: a local folder lacks one of those parts.
        """
        return self._source.revision

    @property
    def identity(self) -> dict[str, Any]:
        """Name, revision and options: what latents and conditions depend on."""
        return {"name": self.name, "revision": self.revision, "options": dict(self._options)}

    @property
    def text_blocks(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Where conditions are other than zero, see `zoo.prompt_encoders.PromptEncoder.blocks`."""
        return dict(self._prompts.blocks)

    @property
    def _vae(self) -> Any:
        if self.vae is None:
            raise InputError(f"{self.name} was loaded with denoiser_only, so it has no VAE: load all of it")
        return self.vae

    @property
    def _prompts(self) -> PromptEncoder:
        if self.prompts is None:
            raise InputError(f"{self.name} was loaded with denoiser_only, so it reads no text: load all of it")
        return self.prompts

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the VAE says about images: mean and standard deviation of their latents.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Two tensors (B, c, h, w), float32, shifted and scaled as the denoiser has them.

        Raises:
            InputError: images of other channels or units, or a side that the VAE does not halve evenly.
        """
        vae = self._vae
        self._check_images(images)
        weight = next(vae.parameters())
        with _as_loaded(weight):
            found = vae.encode(images.to(weight)).latent_dist
        scale, shift = self._scaling()
        return (found.mean.float() - shift) * scale, found.std.float() * scale

    @torch.no_grad()
    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a sample of the posterior.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            generator: draws the noise, on its own device; None draws it on that of the VAE.

        Returns:
            Latents (B, c, h, w), float32.

        Raises:
            InputError: see `posterior`.
        """
        mean, deviation = self.posterior(images)
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device)
        return mean + deviation * noise.to(mean.device)

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) of latents, float32; about [-1, 1], not cut off.

        Args:
            latents: (B, c, h, w).
        """
        vae = self._vae
        weight = next(vae.parameters())
        scale, shift = self._scaling()
        with _as_loaded(weight):
            decoded: Tensor = vae.decode((latents / scale + shift).to(weight)).sample
        return decoded.float()

    @torch.no_grad()
    def condition(self, text: Text) -> dict[str, Tensor]:
        """Return what the denoiser is told about captions.

        Args:
            text: B captions, or tokens (B, L) of CLIP's vocabulary. Tokens have lost the capitals, which T5 would read.

        Returns:
            Tensors (B, …) by the names of the denoiser's arguments.

        Raises:
            InputError: tokens that are not CLIP's.
        """
        prompts = self._prompts
        with _as_loaded(next(prompts.parameters())):
            return cast("dict[str, Tensor]", prompts(text))

    @torch.no_grad()
    def null_condition(self, count: int) -> dict[str, Tensor]:
        """Return the condition without a caption, as the pipeline's guidance has it.

        Args:
            count: how many times.
        """
        prompts = self._prompts
        with _as_loaded(next(prompts.parameters())):
            empty = prompts.null()
        return {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in empty.items()}

    def _scaling(self) -> tuple[float, float]:
        config = self._vae.config
        return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)

    def _check_images(self, images: Tensor) -> None:
        step = 2 ** (len(self._vae.config.block_out_channels) - 1)
        if (
            images.ndim != 4
            or images.shape[1] != self._vae.config.in_channels
            or any(n % step for n in images.shape[2:])
        ):
            raise InputError(
                f"images must have shape (B, {self._vae.config.in_channels}, H, W) with sides that are multiples of {step}, "
                f"got {tuple(images.shape)}"
            )
        largest = float(images.abs().amax()) if images.numel() else 0.0
        if not largest <= _SLACK:
            raise InputError(
                f"images must be in [-1, 1], and the largest value is {largest:.3g}: give the data module mean and std 0.5 "
                "for each channel"
            )


@contextmanager
def _as_loaded(weight: Tensor) -> Iterator[None]:
    """Compute in the type of the weights, whatever the trainer casts to."""
    with torch.autocast(weight.device.type, enabled=False):
        yield


def load_backbone(
    name: str,
    *,
    denoiser_only: bool = False,
    torch_dtype: str = "float32",
    image_size: int = 512,
    max_sequence_length: int = 256,
    t5: bool = True,
    gradient_checkpointing: bool = False,
) -> DiffusersBackbone:
    """Load Stable Diffusion 1.5 (or 2), XL or 3 (or 3.5) from the Hub or a folder.

    Args:
        name: see the table above.
        denoiser_only: leave out VAE and text encoders, for training from cached latents (`zoo.latent_cache`).
        torch_dtype: type of the weights: "float32", "bfloat16" or "float16". A VAE that overflows in float16, as that of
            Stable Diffusion XL, stays in float32.
        image_size: side of the images in pixels, which XL is told.
        max_sequence_length: tokens of T5 in Stable Diffusion 3, 1 … 512, as the pipeline's argument.
        t5: load T5, where the pipeline has it; without it, zeros stand in its place.
        gradient_checkpointing: let the denoiser compute its activations again in the backward pass: less memory, more time.

    Returns:
        The backbone, frozen and in eval mode, on the CPU.

    Raises:
        InputError: diffusers or transformers are not installed; no such folder, repository or revision; another kind of
            pipeline (the nearest is shown), a part of another class, or no safetensors files; an option out of its range.
    """
    if image_size < 1:
        raise InputError(f"image_size must be at least 1, got {image_size}")
    if not 1 <= max_sequence_length <= 512:
        raise InputError(f"max_sequence_length must be in 1 … 512, got {max_sequence_length}")
    for needed in ("diffusers", "transformers"):
        library(needed)
    source = find_pipeline(name, denoiser_only=denoiser_only)
    denoiser = source.load(source.family.denoiser, torch_dtype)
    if gradient_checkpointing:
        cast("Any", denoiser).enable_gradient_checkpointing()
    process = _process(source)
    if denoiser_only:
        return DiffusersBackbone(denoiser, process, source)
    has_t5 = t5 and source.has("text_encoder_3")
    options = {"image_size": image_size, "max_sequence_length": max_sequence_length, "t5": has_t5}
    relevant = _OPTIONS[source.pipeline]
    return DiffusersBackbone(
        denoiser,
        process,
        source,
        vae=_load_vae(source, torch_dtype),
        prompts=_load_prompts(source, denoiser, torch_dtype, options),
        options={key: options[key] for key in relevant},
    )


_OPTIONS: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": (),
    "StableDiffusionXLPipeline": ("image_size",),
    "StableDiffusion3Pipeline": ("max_sequence_length", "t5"),
}


def _load_vae(source: PipelineFolder, dtype: str) -> nn.Module:
    config = source.config("vae")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise InputError(f"{source.name}: a VAE with latents_mean or latents_std is not supported")
    return source.load("vae", "float32" if config.get("force_upcast", True) and dtype == "float16" else dtype)


def _load_prompts(source: PipelineFolder, denoiser: Any, dtype: str, options: Mapping[str, Any]) -> PromptEncoder:
    family = source.family
    left_out = () if options["t5"] else family.optional
    names = [part for part in family.encoders if source.has(part) and part not in left_out]
    encoders = [source.load(part, dtype) for part in names]
    tokenizers = [source.tokenizer(part.replace("text_encoder", "tokenizer")) for part in names]
    if source.pipeline == "StableDiffusion3Pipeline":
        width = int(denoiser.config.joint_attention_dim)
        return SD3Prompts(encoders, tokenizers, width=width, length=options["max_sequence_length"])
    if source.pipeline == "StableDiffusionXLPipeline":
        zero = bool(source.index.get("force_zeros_for_empty_prompt", True))
        return SDXLPrompts(encoders, tokenizers, image_size=options["image_size"], zero_null=zero)
    return SDPrompts(encoders, tokenizers)


def _process(source: PipelineFolder) -> Flow | Epsilon:
    config = source.config("scheduler", "scheduler_config.json")
    steps = config.get("num_train_timesteps", _STEPS)
    if steps != _STEPS:
        raise InputError(f"{source.name}: the scheduler must have {_STEPS} steps, got {steps}")
    if source.family.scheduler is not None:
        return Flow()
    kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise InputError(f"{source.name}: prediction_type must be {' or '.join(_PREDICTIONS)}, got {kind!r}")
    kept = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}
    schedule = library("diffusers").DDPMScheduler(
        num_train_timesteps=_STEPS, **{key: config[key] for key in kept & config.keys()}
    )
    return Epsilon(schedule.alphas_cumprod.float(), prediction=cast("Any", _PREDICTIONS[kind]))
