"""The objective of adversarial calibration: what a head pays for, and with which weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.class_centres import Centres
from zoo.errors import InputError, nearest
from zoo.losses.advcal import (
    centre_cross_entropy,
    centre_divergence,
    clean_adversarial_info_nce,
    clean_adversarial_l2,
)
from zoo.losses.centres import Pool
from zoo.losses.contracts import require_number

__all__ = ["OBJECTIVES", "CalibrationObjective", "objective_weights"]

OBJECTIVES = ("ce", "l2", "nce")


def objective_weights(objective: str | Mapping[str, float]) -> dict[str, float]:
    """Return the weights of an objective: 1 for a name.

    Args:
        objective: one of `OBJECTIVES`, or a weight for some of them.

    Raises:
        InputError: an unknown name, none, or a weight that is not positive.

    Example:
        >>> objective_weights("l2")
        {'l2': 1.0}
    """
    weights = {objective: 1.0} if isinstance(objective, str) else dict(objective)
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            raise InputError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}.{nearest(name, OBJECTIVES)}"
            )
        require_number(f"objective[{name!r}]", weight, positive=True)
    if not weights:
        raise InputError(f"objective must name at least one of {', '.join(OBJECTIVES)}")
    return weights


@dataclass(frozen=True)
class CalibrationObjective:
    """sum of weights of an objective + beta (identity + divergence); see `zoo.losses.advcal`.

    Attributes:
        weights: of the parts of the objective.
        regulariser_weight: beta.
        clean_identity: whether it has the identity.
        scale: factor of the cosines in logits.
        pool: how several centres of a class count.
        temperature: of ``nce``.
        symmetric: whether ``nce`` takes both directions.
        same_class_negatives: whether samples of one class are negatives of each other there.
        chunk_size: its tile.
    """

    weights: dict[str, float]
    regulariser_weight: float
    clean_identity: bool
    scale: float
    pool: Pool
    temperature: float
    symmetric: bool
    same_class_negatives: bool
    chunk_size: int | None

    def __post_init__(self) -> None:
        require_number("regulariser_weight", self.regulariser_weight, positive=False)
        require_number("scale", self.scale, positive=False)
        require_number("temperature", self.temperature, positive=True)

    def terms(
        self,
        head: Callable[[Tensor], Tensor],
        clean: Tensor,
        attacked: Tensor,
        labels: Tensor | None,
        centres: Centres,
        *,
        gather: bool = False,
    ) -> dict[str, Tensor]:
        """Return the terms that count, unweighted: those of the objective, "divergence" and "identity".

        Args:
            head: unit embeddings -> unit embeddings.
            clean: unit embeddings (B, D) of clean inputs, before the head.
            attacked: the same of attacked inputs.
            labels: classes (B,), where a term needs them.
            centres: those of the classes of one modality: vectors (K, M, D) and mask (K, M).
            gather: whether ``nce`` spans the batches of all processes.

        Raises:
            InputError: labels are missing.
        """
        moved = head(attacked)
        found = {}
        for name in self.weights:
            if labels is None and (name == "ce" or (name == "nce" and not self.same_class_negatives)):
                raise InputError(f"objective {name!r} needs labels here: give batches with 'label', or objective='l2'")
            found[name] = self._term(name, moved, clean, labels, centres, gather=gather)
        if self.regulariser_weight > 0:
            found["divergence"] = centre_divergence(
                moved, clean, centres.vectors, scale=self.scale, pool=self.pool, mask=centres.mask
            )
            if self.clean_identity:
                found["identity"] = clean_adversarial_l2(head(clean), clean)
        return found

    def _term(
        self,
        name: str,
        moved: Tensor,
        clean: Tensor,
        labels: Tensor | None,
        centres: Centres,
        *,
        gather: bool,
    ) -> Tensor:
        if name == "l2":
            return clean_adversarial_l2(moved, clean)
        if name == "ce":
            assert labels is not None
            return centre_cross_entropy(
                moved, centres.vectors, labels, scale=self.scale, pool=self.pool, mask=centres.mask
            )
        return clean_adversarial_info_nce(
            moved, clean, temperature=self.temperature, symmetric=self.symmetric, chunk_size=self.chunk_size,
            labels=None if self.same_class_negatives else labels, gather=gather,
        )  # fmt: skip

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of terms."""
        weights = {**self.weights, "divergence": self.regulariser_weight, "identity": self.regulariser_weight}
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()
