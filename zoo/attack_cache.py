"""The embeddings of clean and attacked training samples, computed once: the heads then train in seconds.

An attack on the bare encoder does not depend on the head that is trained behind it, so it need not be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset

from zoo.calibration_attacks import modality_samples
from zoo.data.loading import SplitDataModule
from zoo.errors import InputError

__all__ = ["AttackedRows", "CachedAttacks"]

# Samples that are attacked at once; a number of its own, so that the attacks do not depend on the size of a batch.
_CHUNK = 64

Pair = Callable[[str, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AttackedRows(Dataset[Any]):
    """Embeddings of clean and attacked training samples, read by the batch: "clean", "attacked" and "label".

    Attributes:
        clean: unit embeddings (N, D) by modality.
        attacked: the same of the attacked samples.
        labels: classes (N,), where there are labels.
    """

    clean: dict[str, Tensor]
    attacked: dict[str, Tensor]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.clean.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        sides: dict[str, Any] = {
            side: {name: rows[0] for name, rows in batch[side].items()} for side in ("clean", "attacked")
        }
        return sides if self.labels is None else {**sides, "label": batch["label"][0]}

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        rows = torch.tensor([int(index) for index in indices], dtype=torch.int64)
        found: dict[str, Any] = {
            "clean": {name: value[rows] for name, value in self.clean.items()},
            "attacked": {name: value[rows] for name, value in self.attacked.items()},
        }
        return found if self.labels is None else {**found, "label": self.labels[rows]}


class CachedAttacks:
    """Puts embeddings of clean and attacked samples in the place of a data module's training split, until `undo`.

    Training then sees each sample as evaluation does, unaugmented, with one attack. Order, batches and processes are those
    of the data module. The attacks are made 64 samples at a time, shared out among the processes, and depend neither on how
    many of those there are nor on the size of a batch.

    Args:
        trainer: the trainer that is about to fit.
        modalities: the modalities.
        pair: modality, inputs, labels, number of the 64 -> unit embeddings of clean and attacked samples, (B, D) each.
        device: where it computes.

    Raises:
        InputError: the data module is none of the zoo's.

    Attributes:
        example_shape: shape of one input of the first modality.
    """

    def __init__(self, trainer: Trainer, *, modalities: Sequence[str], pair: Pair, device: torch.device) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, SplitDataModule) or data.with_index:
            raise InputError(
                "target='backbone' keeps the attacks of the training data, for which it needs one of the zoo's data "
                f"modules, without with_index, got {type(data).__name__}: give cache_attacks=False to attack in each step"
            )
        self.data = data
        self._own = data.splits
        source: Any = self._own.train_eval
        starts = range(0, len(source), _CHUNK)
        parts: dict[int, dict[str, Any]] = {}
        with isolate_rng():
            for number in range(trainer.global_rank, len(starts), trainer.world_size):
                stop = min(starts[number] + _CHUNK, len(source))
                samples = modality_samples(source.__getitems__(list(range(starts[number], stop))), modalities)
                parts[number] = _rows(samples, pair, number, device)
        parts = _gather(parts, trainer.world_size)
        ordered = [parts[number] for number in range(len(starts))]
        names = list(ordered[0]["rows"])
        clean, attacked = (
            {name: torch.cat([part["rows"][name][side] for part in ordered]) for name in names} for side in (0, 1)
        )
        labelled = ordered[0]["label"] is not None
        labels = torch.cat([part["label"] for part in ordered]) if labelled else None
        self.example_shape: tuple[int, ...] = ordered[0]["shape"]
        data._splits = replace(self._own, train=cast("Any", AttackedRows(clean, attacked, labels)))

    def undo(self) -> None:
        """Give the data module its own data back."""
        self.data._splits = self._own


def _rows(
    samples: dict[str, tuple[Tensor, Tensor | None]], pair: Pair, number: int, device: torch.device
) -> dict[str, Any]:
    """Embeddings of one batch by modality, on the CPU, its labels, and the shape of an input."""
    rows = {}
    for name, (x, labels) in samples.items():
        found = pair(name, x.to(device), None if labels is None else labels.to(device), number)
        rows[name] = [side.cpu() for side in found]
    x, labels = next(iter(samples.values()))
    return {"rows": rows, "label": labels, "shape": tuple(x.shape[1:])}


def _gather(parts: dict[int, dict[str, Any]], world: int) -> dict[int, dict[str, Any]]:
    if world == 1:
        return parts
    shares: list[dict[int, dict[str, Any]]] = [{} for _ in range(world)]
    torch.distributed.all_gather_object(shares, parts)
    return {number: part for share in shares for number, part in share.items()}
