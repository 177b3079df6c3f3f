"""What calibration heads are worth: clean accuracy, drift, and accuracy under attacks that know the head or do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.calibration_cross_modal import CrossModalMetric, ModalityView
from zoo.metrics.robustness import RobustAccuracy

__all__ = ["CONDITIONS", "CalibrationEvaluation"]

CONDITIONS = ("clean", "clean_without_head", "adversarial/full", "adversarial/backbone", "adversarial/noise")


class CalibrationEvaluation(nn.Module):
    """The metrics of one evaluation, by modality.

    Args:
        modalities: the modalities.
        samples: how many samples of each modality are attacked in each process, at most.

    Attributes:
        across: retrieval and agreement between the modalities; None where there is one.
    """

    def __init__(self, modalities: list[str], samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.accuracies = nn.ModuleDict({name: RobustAccuracy(CONDITIONS) for name in modalities})
        self.drifts = nn.ModuleDict({name: MeanMetric() for name in modalities})
        self.across = CrossModalMetric(modalities) if len(modalities) > 1 else None
        self._attacked = dict.fromkeys(modalities, 0)

    def left(self, modality: str) -> int:
        """How many more samples are to be attacked."""
        return max(0, self.samples - self._attacked[modality])

    def update(self, modality: str, verdicts: Mapping[str, Tensor], drift: Tensor) -> None:
        """Take a batch.

        Args:
            modality: its modality.
            verdicts: whether samples are right, by condition (B,).
            drift: squared distance of clean embeddings behind the head from those before it (B,).
        """
        cast("RobustAccuracy", self.accuracies[modality]).update(verdicts)
        cast("MeanMetric", self.drifts[modality]).update(drift)
        self._attacked[modality] += len(verdicts.get("adversarial/full", ()))

    def compare(self, views: Mapping[str, ModalityView], *, paired: bool) -> None:
        """Take what was attacked of a batch, where there are several modalities; see `CrossModalMetric.update`."""
        if self.across is not None:
            self.across.update(views, paired=paired)

    def finish(self) -> dict[str, Tensor]:
        """Return the values and forget the batches.

        Returns:
            By name the mean over the modalities, and where there are several ``{modality}/{name}``. Modalities that had no
            samples are left out, and so is what could not be compared.
        """
        by_modality: dict[str, dict[str, Tensor]] = {}
        for name, module in self.accuracies.items():
            accuracy, drift = cast("RobustAccuracy", module), cast("MeanMetric", self.drifts[name])
            # All processes compute all of them, or one would wait for another that had no sample of a modality.
            # torchmetrics warns where nothing was counted.
            accuracy.update({})
            drift.update(0.0, 0.0)
            found = accuracy.compute()
            if not found["clean"].isnan():
                by_modality[name] = {**found, "drift": drift.compute()}
            accuracy.reset()
            drift.reset()
            self._attacked[name] = 0
        for name, values in self._compared().items():
            if name in by_modality:
                by_modality[name] |= values
        keys = dict.fromkeys(key for found in by_modality.values() for key in found)
        means = {
            key: torch.stack([found[key] for found in by_modality.values() if key in found]).mean() for key in keys
        }
        if len(self.accuracies) == 1:
            return means
        return means | {f"{name}/{key}": value for name, found in by_modality.items() for key, value in found.items()}

    def _compared(self) -> dict[str, dict[str, Tensor]]:
        if self.across is None:
            return {}
        # torchmetrics warns where nothing was counted, and a process may have no sample.
        self.across.update({}, paired=False)
        found: dict[str, dict[str, Tensor]] = self.across.compute()
        self.across.reset()
        return found
