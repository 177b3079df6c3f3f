"""Which attacks a robustness trial makes, how far and how long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch

from zoo.attack_losses import ATTACK_LOSSES
from zoo.attacks import Bound, Norm
from zoo.errors import InputError, require_choice

__all__ = ["ATTACKS", "CHECKS", "AttackPlan", "eps_label"]

ATTACKS = tuple(f"{search}-{loss}" for search in ("pgd", "apgd") for loss in ATTACK_LOSSES)
CHECKS = ("check_same", "check_loss", "check_one_step", "check_steps", "check_whole_range")


def eps_label(eps: float) -> str:
    """Return a short name of a radius, fit for the names of files and metrics.

    Args:
        eps: the radius, a share of the valid range.

    Example:
        >>> [eps_label(eps) for eps in (2 / 255, 0.5 / 255, 0.1, 1.0)]
        ['2_255', '0.00196078', '0.1', '1']
    """
    levels = eps * 255
    whole = round(levels)
    return f"{whole}_255" if 0 < whole < 255 and math.isclose(levels, whole, rel_tol=1e-6) else f"{eps:.6g}"


@dataclass(frozen=True, eq=False)
class AttackPlan:
    """Which attacks, how far and how long.

    Attributes:
        eps: radii, shares of the valid range, ascending, each once.
        attacks: ``"pgd-ce"`` or others of `ATTACKS`, a search and a loss each: ``ce``, ``dlr`` and ``repel`` work against
            the label, ``l2`` and ``cos`` away from the clean embedding. Each takes the samples that the ones before it
            have not turned.
        steps: gradient steps of each attack. Those of PGD are a quarter of the radius long, or longer if there are
            fewer than ten.
        restarts: random starts of each attack, of which the highest loss counts.
        norm: ``"linf"`` moves each entry by the radius at most, ``"l2"`` each sample by so much in all.
        valid_range: lowest and highest value of an input, numbers or tensors that broadcast to a sample.
        micro_batch: samples that pass through the network at a time; all if omitted. Fewer need less memory.

    Raises:
        InputError: a value is out of range, or there is no attack of a name.

    Example:
        >>> AttackPlan(eps=(1 / 255, 0.1), attacks=("pgd-ce", "apgd-dlr")).radii
        {'1_255': 0.00392156862745098, '0.1': 0.1}
    """

    eps: tuple[float, ...] = (2 / 255, 4 / 255)
    attacks: tuple[str, ...] = ("pgd-ce",)
    steps: int = 10
    restarts: int = 1
    norm: Norm = "linf"
    valid_range: tuple[Bound, Bound] = (0.0, 1.0)
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if len(self.radii) < len(self.eps) or not self.eps or not all(0 < eps < math.inf for eps in self.eps):
            raise InputError(f"eps must be different positive numbers, at least one, got {self.eps}")
        if list(self.eps) != sorted(self.eps):
            raise InputError(f"eps must ascend, got {self.eps}")
        if not self.attacks or len(set(self.attacks)) < len(self.attacks):
            raise InputError(f"attacks must be different names, at least one, got {self.attacks}")
        for name in self.attacks:
            require_choice("attacks", name, ATTACKS)
        require_choice("norm", self.norm, get_args(Norm))
        for option in ("steps", "restarts", "micro_batch"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise InputError(f"{option} must be at least 1, got {value}")
        low, high = (torch.as_tensor(bound) for bound in self.valid_range)
        if not bool((low < high).all()) or not bool((high - low).isfinite().all()):
            raise InputError(
                f"valid_range must be the lowest and the highest value of an input, got {self.valid_range}"
            )

    @property
    def radii(self) -> dict[str, float]:
        """The radii by the names that they have in results."""
        return {eps_label(eps): eps for eps in self.eps}

    def conditions(self, *, surrogate: bool = False, checks: bool = False) -> list[str]:
        """Return the names of the verdicts of a `zoo.robustness.RobustnessTrial`.

        Args:
            surrogate: whether there is another network to make attacks for.
            checks: whether the checks are made.
        """
        kinds = ("adaptive", "transfer", "noise") if surrogate else ("adaptive", "noise")
        names = ["clean", *(f"{kind}_{label}" for label in self.radii for kind in kinds)]
        return [*names, *CHECKS] if checks else names
