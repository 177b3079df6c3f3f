"""Robust accuracy: samples that stay right under every attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.errors import InputError, nearest

__all__ = ["RobustAccuracy"]


class RobustAccuracy(Metric):
    """Share of samples that are right under every attack of a condition, for several conditions.

    A condition is a set of attacks, such as all white-box attacks within one radius. The worst case counts a sample at a
    time: it is robust if none of the attacks of the condition turns it. That is at most the lowest accuracy under any single
    attack, because each may turn other samples.

    Kept are counts, which are added over processes. A sampler that pads a shard by repeating samples makes those count
    twice.

    Args:
        conditions: names, at least one, each once.

    Raises:
        InputError: no name, or one twice.

    Example:
        >>> metric = RobustAccuracy(["clean", "attacked"])
        >>> right = torch.tensor([True, True, True, False])
        >>> first, second = torch.tensor([[True, True, False, False], [False, True, True, False]])
        >>> metric.update({"clean": right, "attacked": torch.stack([right, first, second])})
        >>> {name: share.item() for name, share in metric.compute().items()}
        {'clean': 0.75, 'attacked': 0.25}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    hits: Tensor
    totals: Tensor

    def __init__(self, conditions: Sequence[str]) -> None:
        super().__init__()
        if isinstance(conditions, str) or not conditions or len(set(conditions)) < len(conditions):
            raise InputError(f"conditions must be a list of different names, at least one, got {conditions!r}")
        self.conditions = tuple(conditions)
        self._totals_of_shares: Tensor | None = None
        zeros = torch.zeros(len(self.conditions), dtype=torch.int64)
        self.add_state("hits", zeros, dist_reduce_fx="sum")
        self.add_state("totals", zeros, dist_reduce_fx="sum")

    def update(self, verdicts: Mapping[str, Tensor]) -> None:
        """Count a batch; an empty one adds nothing.

        Args:
            verdicts: for some or all of the conditions whether each sample is right, (B,), or that under each of A attacks,
                (A, B), as booleans. B may differ between conditions.

        Raises:
            InputError: an unknown condition, another shape, or no booleans.
        """
        hits, totals = self.hits.new_zeros(len(self.conditions)), [0] * len(self.conditions)
        for name, value in verdicts.items():
            if name not in self.conditions:
                raise InputError(f"there is no condition {name!r}.{nearest(name, self.conditions)}")
            if value.dtype != torch.bool or value.ndim not in (1, 2):
                raise InputError(
                    f"verdicts of {name!r} must be booleans (samples) or (attacks, samples), got {value.dtype} of shape "
                    f"{tuple(value.shape)}"
                )
            place = self.conditions.index(name)
            hits[place] = (value if value.ndim == 1 else value.all(0)).sum()
            totals[place] = value.shape[-1]
        # Not in place: a reset inside inference_mode leaves tensors that cannot be changed outside of it.
        self.hits = self.hits + hits
        self.totals = self.totals + torch.tensor(totals, device=self.totals.device)

    def compute(self) -> dict[str, Tensor]:
        """Divide the samples that are right by all, over all processes.

        Returns:
            By condition a share in 0 … 1, float32; NaN without samples.
        """
        # Inside compute torchmetrics has put the sums of all processes in place of this one's.
        self._totals_of_shares = self.totals.clone()
        return dict(zip(self.conditions, self.hits / self.totals, strict=True))

    @property
    def samples(self) -> dict[str, int]:
        """Samples of each condition.

        After `compute()` those behind its result, of all processes; after a later `update` or `reset`, and before the
        first `compute()`, those that this process has seen.
        """
        computed = cast("dict[str, Tensor] | None", self._computed)
        counted = self.totals if computed is None or self._totals_of_shares is None else self._totals_of_shares
        return dict(zip(self.conditions, counted.tolist(), strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def keep_type(tensor: Tensor) -> Tensor:
            # `set_dtype` would turn whole numbers into fractions.
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_type, exclude_state)
