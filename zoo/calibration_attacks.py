"""What adversarial calibration trains against: the attack of its steps, by modality, and the embeddings that it makes.

Radii and steps are shares of the valid range of a modality, so that one number suits images, spectra and coordinates. The
random starts depend on a key alone, such as seed, process, epoch and step: a resumed run goes on with the same attacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.attacks import attack_loss, pgd
from zoo.data.draws import random_words
from zoo.errors import InputError, nearest
from zoo.losses.contracts import working_dtype
from zoo.robustness import undisturbed_networks

__all__ = [
    "Network",
    "Range",
    "TrainingAttack",
    "by_modality",
    "generator_of",
    "modality_samples",
    "require_modalities",
]

Range = tuple[float | list[float], float | list[float]]
"""Lowest and highest value of an input: numbers, or one for each channel."""
Network = Callable[[Tensor], Tensor]

_EMBEDDING_LOSSES = ("l2", "cos")


def by_modality(argument: str, value: float | Mapping[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """Return a number for each modality.

    Args:
        argument: its name, for the error message.
        value: one for all, or by modality.
        modalities: the modalities.

    Raises:
        InputError: a modality is missing or unknown, or a number is not positive and finite.

    Example:
        >>> by_modality("eps", 0.1, ["image", "audio"])
        {'image': 0.1, 'audio': 0.1}
    """
    found = dict(value) if isinstance(value, Mapping) else dict.fromkeys(modalities, float(value))
    require_modalities(argument, found, modalities, every=True)
    for name, number in found.items():
        if not 0 < number < math.inf:
            raise InputError(f"{argument} must be positive and finite, got {number} for {name}")
    return found


def require_modalities(
    argument: str, given: Mapping[str, Any], modalities: Sequence[str], *, every: bool = False
) -> None:
    """Refuse unknown modalities among the keys of an argument, and with ``every`` missing ones.

    Raises:
        InputError: the message names them.
    """
    for name in given:
        if name not in modalities:
            raise InputError(f"{argument} names {name!r}, which is no encoder.{nearest(name, modalities)}")
    missing = [name for name in modalities if name not in given]
    if every and missing:
        raise InputError(f"{argument} must name every modality, it has nothing for {', '.join(missing)}")


def modality_samples(batch: Any, modalities: Sequence[str]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return inputs and labels of the modalities that a batch has.

    Args:
        batch: a dict with inputs by modality and "label"; a dict of pairs (inputs, labels) by modality, as Lightning joins
            several loaders; or a pair, where there is one modality.
        modalities: the modalities.

    Raises:
        InputError: the batch is none of these.
    """
    if isinstance(batch, list | tuple) and len(batch) >= 2 and len(modalities) == 1:
        return {modalities[0]: (batch[0], batch[1])}
    present = [name for name in modalities if name in batch] if isinstance(batch, dict) else []
    if not present:
        shown = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise InputError(f"a batch must be a dict with one of {', '.join(modalities)} and 'label', got {shown}")
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name in present:
        value = batch[name]
        own = isinstance(value, list | tuple)
        found[name] = (value[0], value[1]) if own else (value, batch.get("label"))
    return found


def generator_of(device: torch.device, key: Sequence[int]) -> torch.Generator:
    """Return a generator whose numbers depend on the key alone.

    Args:
        device: where it draws.
        key: integers, such as seed, process, epoch and step.
    """
    return torch.Generator(device).manual_seed(int(random_words(key[:-1], [key[-1]])[0]) >> 1)


@dataclass(frozen=True)
class TrainingAttack:
    """PGD on one modality.

    Attributes:
        loss: a name of `zoo.attack_losses`.
        eps: radius, a share of the range.
        step_size: length of a step, a share of the range.
        steps: how many.
        valid_range: lowest and highest value of the inputs.
        micro_batch: samples that pass through the encoder at a time; all if omitted.
    """

    loss: str
    eps: float
    step_size: float
    steps: int
    valid_range: Range = (0.0, 1.0)
    micro_batch: int | None = None

    @property
    def needs_labels(self) -> bool:
        """Whether it works against the label, and not away from the clean embedding."""
        return self.loss not in _EMBEDDING_LOSSES

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range as tensors that broadcast to inputs (B, …); lists are along their first dimension."""
        shape = (-1, *[1] * max(x.ndim - 2, 0))
        bounds = [torch.as_tensor(bound, dtype=working_dtype(x), device=x.device) for bound in self.valid_range]
        low, high = (bound.view(shape) if bound.ndim == 1 else bound for bound in bounds)
        return low, high

    def run(
        self,
        x: Tensor,
        labels: Tensor | None,
        *,
        embed: Network,
        classify: Network,
        clean: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return attacked inputs (B, …).

        Args:
            x: clean inputs (B, …).
            labels: classes (B,), where the loss needs them.
            embed: inputs -> unit embeddings.
            classify: inputs -> logits.
            clean: the unit embeddings of the clean inputs (B, D) that `embed` is driven away from.
            generator: draws the starts, on the device of ``x``.

        Raises:
            InputError: labels are missing, or the inputs lie outside of the range.
        """
        if self.needs_labels and labels is None:
            raise InputError(f"attack={self.loss!r} needs labels: give batches with 'label', or attack='l2'")
        loss = attack_loss(self.loss, classify if self.needs_labels else embed)
        low, high = self.bounds(x)
        attacked: Tensor = pgd(
            loss, x, labels if self.needs_labels else clean, eps=self.eps * (high - low),
            step_size=self.step_size * (high - low), steps=self.steps, valid_range=(low, high), generator=generator,
            micro_batch=self.micro_batch,
        )  # fmt: skip
        return attacked

    def driven_away(
        self, x: Tensor, clean: Tensor, *, encode: Network, steps: int, generator: torch.Generator
    ) -> Tensor:
        """Return the unit embeddings (B, D) of inputs that are moved away from the clean ones, also in inference mode.

        Args:
            x: clean inputs (B, …).
            clean: their unit embeddings (B, D).
            encode: inputs -> unit embeddings.
            steps: how many, each a quarter of the radius or as long as it takes to cross the ball.
            generator: draws the starts, on the device of ``x``.
        """
        length = max(0.25, 2.5 / steps) * self.eps
        attack = replace(self, loss="l2", steps=steps, step_size=length)
        with undisturbed_networks(x.device):
            # Copies, because what inference mode made has no gradient.
            attacked = attack.run(
                x.clone(), None, embed=encode, classify=encode, clean=clean.clone(), generator=generator
            )
            return encode(attacked).detach()
