"""Images out of a rectified flow: Euler steps along the predicted velocity, with classifier-free guidance.

Liu, Gong, Liu: Flow Straight and Fast, ICLR 2023, arXiv 2209.03003 (the sampler); Ho, Salimans: Classifier-Free Diffusion
Guidance, 2021, arXiv 2207.12598; Esser et al., ICML 2024, arXiv 2403.03206, section 5.3.2 (the shift of the times).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zoo.denoisers import Flow
from zoo.errors import InputError

__all__ = ["flow_times", "sample"]


def flow_times(steps: int, shift: float = 1.0) -> Tensor:
    """Return the shares of noise between which a sampler steps.

    Args:
        steps: number of steps, at least 1.
        shift: s in s a / (1 + (s - 1) a), which spends more steps at high noise the larger it is; 1 leaves even steps,
            Stable Diffusion 3 has 3 at 1024 pixels.

    Returns:
        (steps + 1,), float64, from 1, noise alone, down to 0.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> flow_times(4).tolist(), flow_times(2, shift=3.0).tolist()
        ([1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.75, 0.0])
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if not 0 < shift < float("inf"):
        raise InputError(f"shift must be positive, got {shift}")
    even = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device="cpu")
    return even / (even + (1 - even) / shift)  # exact at both ends


@torch.no_grad()
def sample(
    backbone: Any,
    condition: Mapping[str, Tensor],
    *,
    null: Mapping[str, Tensor] | None = None,
    noise: Tensor | None = None,
    steps: int = 28,
    guidance: float = 1.0,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return latents of which a condition tells; `zoo.denoisers.Backbone` says what a backbone is.

    The same noise, condition and weights give the same latents. What is attached to the denoiser, such as soft tokens, acts
    in both halves of guidance. The mode of the networks is left as it is.

    Args:
        backbone: its process is a `Flow`.
        condition: what ``backbone.condition`` returned for B texts.
        null: the condition of empty texts, B rows; ``backbone.null_condition(B)`` if omitted. Without guidance it is not
            used.
        noise: where to begin, (B, …); drawn in the shape ``backbone.latent_shape`` if omitted.
        steps: number of Euler steps; each is one call of the denoiser, on 2 B rows with guidance.
        guidance: g in v_null + g (v - v_null): 1 is no guidance, 0 ignores the texts.
        shift: of the times; see `flow_times`.
        generator: of the noise; torch's own if omitted. Where it lives, the noise is drawn.

    Returns:
        (B, …), float32 (float64 stays).

    Raises:
        InputError: another process, a number out of range, or noise of another number of rows.
    """
    if not isinstance(backbone.process, Flow):
        raise InputError(
            f"this sampler is for rectified flows, and the backbone's process is {type(backbone.process).__name__}: use a "
            "scheduler of diffusers"
        )
    if not 0 <= guidance < float("inf"):
        raise InputError(f"guidance must be finite and not negative, got {guidance}")
    times = flow_times(steps, shift).tolist()
    like = next(iter(condition.values()))
    latents = _start(backbone, noise, generator, like)
    told = dict(condition)
    if guidance != 1:
        empty = backbone.null_condition(len(like)) if null is None else null
        told = {name: torch.cat([value, empty[name]]) for name, value in condition.items()}
    for now, then in pairwise(times):
        noisy = torch.cat([latents, latents]) if guidance != 1 else latents
        timestep = torch.full((len(noisy),), 1000 * now, device=noisy.device)
        velocity = backbone.process.predict(backbone.denoiser, noisy, timestep, told).to(latents.dtype)
        if guidance != 1:
            with_text, free = velocity.chunk(2)
            velocity = free + guidance * (with_text - free)
        latents = latents + (then - now) * velocity
    return latents


def _start(backbone: Any, noise: Tensor | None, generator: torch.Generator | None, like: Tensor) -> Tensor:
    if noise is None:
        place = like.device if generator is None else generator.device
        noise = torch.randn((len(like), *backbone.latent_shape), generator=generator, device=place)
    if len(noise) != len(like):
        raise InputError(f"noise must have a row for each of the {len(like)} texts, got {tuple(noise.shape)}")
    return noise.to(like.device, torch.promote_types(noise.dtype, torch.float32))
