"""Diffusion and flow matching as three equations: what is noised how, what a network predicts, and how it is called.

Time runs from 0 (clean) to 1000 (noise) in both, as the networks of diffusers are told it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from zoo.errors import InputError, require_choice
from zoo.losses.contracts import working_dtype
from zoo.token_places import network_of, parameters_of

__all__ = ["Backbone", "Epsilon", "Flow", "Process", "denoising_errors"]

# Time at which only noise is left.
_END = 1000.0
_ADDED = ("text_embeds", "time_ids")


class Process(Protocol):
    """What a noising process knows: `Flow` and `Epsilon` are the two of them."""

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """Return (B, …) at the given times."""

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """Return what the network is to predict (B, …)."""

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor | float, condition: Mapping[str, Tensor]
    ) -> Tensor:
        """Return what the network predicts (B, …)."""


class Backbone(Protocol):
    """A text-to-image model in its parts; an nn.Module has them as attributes and methods."""

    @property
    def denoiser(self) -> nn.Module:
        """The network that soft tokens go into, called as SD3Transformer2DModel or UNet2DConditionModel is."""

    @property
    def process(self) -> Process:
        """How it was trained."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w) of what is noised; only needed where nobody gives noise to begin with (`zoo.flow_sampling`)."""

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return what is noised (B, c, h, w) for images in the units of the data module (B, C, H, W)."""

    def images(self, latents: Tensor) -> Tensor:
        """Return the images of latents, in the units of the data module."""

    def condition(self, text: Tensor | list[str]) -> dict[str, Tensor]:
        """Return what the denoiser is told: tensors with the batch in front, by the names of its arguments.

        Args:
            text: captions, or their tokens (B, L).
        """

    def null_condition(self, count: int) -> dict[str, Tensor]:
        """Return the condition of no text, `count` times, for guidance without a classifier."""


@dataclass(frozen=True)
class Flow:
    """Rectified flow: straight lines from image to noise, whose direction the network predicts.

    With ``s = t / 1000``: ``x_t = (1 - s) x_0 + s e`` and target ``e - x_0``.

    Example:
        >>> Flow().add_noise(torch.zeros(1, 2), torch.ones(1, 2), 250)
        tensor([[0.2500, 0.2500]])
    """

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """Return images at given times.

        Args:
            clean: images or latents (B, …).
            noise: normal noise of the same shape, or one that broadcasts to it.
            timestep: times in 0 … 1000, one or (B,).

        Returns:
            (B, …) in float32, or float64 for float64.

        Raises:
            InputError: there are neither one nor B times.
        """
        clean, noise = _working(clean, noise)
        share = _per_sample(_times(timestep, clean) / _END, clean)
        return (1 - share) * clean + share * noise

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """Return ``noise - clean``, in float32, or float64 for float64; the same at all times.

        Args:
            clean: images or latents (B, …).
            noise: normal noise of the same shape, or one that broadcasts to it.
            timestep: not used.
        """
        clean, noise = _working(clean, noise)
        return noise - clean

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor | float, condition: Mapping[str, Tensor]
    ) -> Tensor:
        """Return what a network predicts, as `Epsilon.predict` does.

        Args:
            denoiser: the network.
            noisy: (B, …).
            timestep: times in 0 … 1000, one or (B,).
            condition: tensors with the batch in front, by the names of the network's arguments.
        """
        return _call(denoiser, noisy, timestep, condition)


@dataclass(frozen=True, eq=False)
class Epsilon:
    """Denoising diffusion (DDPM) in discrete steps: the network predicts the noise, or the velocity of it.

    With ``a = alphas_cumprod[trunc(t)]``: ``x_t = sqrt(a) x_0 + sqrt(1 - a) e``; target ``e``, or
    ``sqrt(a) e - sqrt(1 - a) x_0``.

    Args:
        alphas_cumprod: (1000,) share of the image's variance that is left at each step, as the schedulers of diffusers have
            it; times past the end count as the last step.
        prediction: ``"epsilon"``, or ``"v"``, which diffusers calls ``"v_prediction"``.

    Raises:
        InputError: `alphas_cumprod` is not a vector of numbers, or `prediction` is another name.

    Example:
        >>> process = Epsilon(torch.tensor([0.64, 0.0]))
        >>> process.add_noise(torch.ones(1, 1), torch.zeros(1, 1), 0)
        tensor([[0.8000]])
    """

    alphas_cumprod: Tensor
    prediction: Literal["epsilon", "v"] = "epsilon"

    def __post_init__(self) -> None:
        if self.alphas_cumprod.ndim != 1 or not len(self.alphas_cumprod):
            raise InputError(
                "alphas_cumprod must be one number for each step, shape (1000,), got shape "
                f"{tuple(self.alphas_cumprod.shape)}"
            )
        require_choice("prediction", self.prediction, ("epsilon", "v"))

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """Return images at given times.

        Args:
            clean: images or latents (B, …).
            noise: normal noise of the same shape, or one that broadcasts to it.
            timestep: times in 0 … 1000, one or (B,).

        Returns:
            (B, …) in float32, or float64 for float64.

        Raises:
            InputError: there are neither one nor B times.
        """
        clean, noise = _working(clean, noise)
        image, rest = self._shares(timestep, clean)
        return image * clean + rest * noise

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """Return what the network is to predict, of the shape of `clean`, in float32, or float64 for float64.

        Args:
            clean: images or latents (B, …).
            noise: normal noise of the same shape, or one that broadcasts to it.
            timestep: times in 0 … 1000, one or (B,).

        Raises:
            InputError: there are neither one nor B times.
        """
        clean, noise = _working(clean, noise)
        if self.prediction == "epsilon":
            return noise.expand_as(clean)
        image, rest = self._shares(timestep, clean)
        return image * noise - rest * clean

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor | float, condition: Mapping[str, Tensor]
    ) -> Tensor:
        """Return what a network predicts, called as diffusers calls it.

        A network that takes ``sample`` is called as a U-Net, with ``text_embeds`` and ``time_ids`` in
        ``added_cond_kwargs``; any other as SD3Transformer2DModel, with all conditions as they are. What is floating point
        takes the type of the network's parameters, the times aside.

        Args:
            denoiser: the network.
            noisy: (B, …).
            timestep: times in 0 … 1000, one or (B,).
            condition: tensors with the batch in front, by the names of the network's arguments.

        Raises:
            InputError: there are neither one nor B times.
        """
        return _call(denoiser, noisy, timestep, condition)

    def _shares(self, timestep: Tensor | float, clean: Tensor) -> tuple[Tensor, Tensor]:
        step = _times(timestep, clean).long().clamp(0, len(self.alphas_cumprod) - 1)
        share = _per_sample(self.alphas_cumprod.to(clean)[step], clean)
        return share.sqrt(), (1 - share).sqrt()


def denoising_errors(  # noqa: PLR0917 - what is noised, how, and what the network is told: all of them always
    process: Process,
    denoiser: nn.Module,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor | float,
    condition: Mapping[str, Tensor],
) -> Tensor:
    """Return how far off a network is for each image: the mean over its elements of the squared error.

    Args:
        process: how images are noised, and what is predicted.
        denoiser: the network.
        clean: images or latents (B, C, H, W).
        noise: of the same shape, or one that broadcasts to it, such as one noise (1, C, H, W) for all.
        timestep: times in 0 … 1000, one or (B,).
        condition: tensors with the batch in front, by the names of the network's arguments.

    Returns:
        (B,) in float32, or float64 for float64 images; a sample's value does not depend on the others.

    Raises:
        InputError: there are neither one nor B times, or the prediction has another shape than the images.
    """
    predicted = process.predict(denoiser, process.add_noise(clean, noise, timestep), timestep, condition)
    target = process.target(clean, noise, timestep)
    if predicted.shape != target.shape:
        raise InputError(
            f"denoiser must predict a tensor of the shape of its input, {tuple(target.shape)}, got "
            f"{tuple(predicted.shape)}"
        )
    return (predicted.to(target.dtype) - target).square().flatten(1).mean(1)


def _working(clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(clean)
    return clean.to(dtype), noise.to(clean.device, dtype)


def _times(timestep: Tensor | float, clean: Tensor) -> Tensor:
    times = torch.as_tensor(timestep, device=clean.device).reshape(-1)
    if len(times) not in (1, len(clean)):
        raise InputError(f"timestep must be one time, or one for each of the {len(clean)} images, got {len(times)}")
    return times.to(working_dtype(clean)).expand(len(clean))


def _per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (like.ndim - 1))


def _call(denoiser: nn.Module, noisy: Tensor, timestep: Tensor | float, condition: Mapping[str, Tensor]) -> Tensor:
    dtype = _number_type(denoiser, noisy.dtype)
    told: dict[str, Any] = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()
    }
    image = "hidden_states"
    if "sample" in parameters_of(network_of(denoiser)):
        image = "sample"
        added = {name: told.pop(name) for name in _ADDED if name in told}
        told |= {"added_cond_kwargs": added} if added else {}
    predicted: Tensor = denoiser(
        **{image: noisy.to(dtype)}, timestep=_times(timestep, noisy), **told, return_dict=False
    )[0]
    return predicted


def _number_type(denoiser: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Return the type that a network computes in; weights stored in one byte say nothing about it."""
    kinds = (p.dtype for p in denoiser.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(kinds, otherwise)
