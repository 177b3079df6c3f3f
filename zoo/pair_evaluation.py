"""What is measured of a model that embeds pairs: retrieval both ways, zero-shot, and what is kept of a frozen geometry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.metrics import RetrievalRecall, StructureTransfer, ZeroShotAccuracy, class_embeddings

__all__ = ["PairEvaluation", "unit"]


class PairEvaluation(nn.Module):
    """The metrics of one evaluation of pairs.

    Args:
        modalities: the two modalities.
        structures: names under which a geometry is compared with a frozen one.
        k: the k of the retrieval metrics.
    """

    def __init__(self, modalities: tuple[str, str], structures: Sequence[str], k: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        self.modalities = modalities
        self.retrieval = RetrievalRecall(tuple(k))
        self.structures = nn.ModuleDict({name: StructureTransfer() for name in structures})
        self.zero_shot: dict[str, ZeroShotAccuracy] = {}

    def start(self, encode_text: Callable[[list[str]], Tensor], data: Any, device: torch.device) -> None:
        """Begin an evaluation: embed the prompts of the classes, where one modality is text.

        Args:
            encode_text: texts -> unit embeddings.
            data: a data module; with ``zero_shot_prompts()``, name -> prompts of each class, there is zero-shot accuracy.
            device: where the metrics are kept.
        """
        asked = hasattr(data, "zero_shot_prompts") and "text" in self.modalities
        prompts: Mapping[str, Any] = data.zero_shot_prompts() if asked else {}
        self.zero_shot = {}
        for name, sentences in prompts.items():
            metric = ZeroShotAccuracy(k=1).to(device)
            metric.set_classes(class_embeddings(encode_text, sentences))
            self.zero_shot[name] = metric

    def update(
        self,
        embeddings: Mapping[str, Tensor],
        structures: Mapping[str, tuple[Tensor, Tensor]],
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Take a batch of pairs.

        Args:
            embeddings: unit embeddings (B, D) by modality.
            structures: by name, embeddings (B, D) and the frozen features (B, D') whose geometry they should have.
            ids: which thing each pair shows (B,).
            labels: its class (B,), for zero-shot.
        """
        first, second = self.modalities
        self.retrieval.update(embeddings[first], embeddings[second], ids)
        for name, (ours, frozen) in structures.items():
            cast("StructureTransfer", self.structures[name]).update(ours, frozen, ids)
        if labels is not None:
            samples = embeddings[second if first == "text" else first]
            for zero_shot in self.zero_shot.values():
                zero_shot.update(samples, labels)

    def finish(self) -> dict[str, Any]:
        """Return the values by name, and forget the batches.

        Returns:
            ``retrieval/{a}_to_{b}/r{k}``, the names of the structures (Spearman correlation between pairwise cosines),
            ``zero_shot/{name}``.
        """
        sides = dict(zip(("image", "text"), self.modalities, strict=True))
        found: dict[str, Any] = {}
        for key, value in self.retrieval.compute().items():
            direction, measure = key.split("/")
            first, second = (sides[side] for side in direction.split("_to_"))
            found[f"retrieval/{first}_to_{second}/{measure}"] = value
        found |= {name: cast("StructureTransfer", metric).compute() for name, metric in self.structures.items()}
        found |= {f"zero_shot/{name}": metric.compute() for name, metric in self.zero_shot.items()}
        for metric in (self.retrieval, *self.structures.values()):
            cast("RetrievalRecall", metric).reset()
        self.zero_shot = {}
        return found


def unit(embeddings: Tensor) -> Tensor:
    """Return rows of length 1, in float32 at least; zeros stay zeros."""
    wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    return F.normalize(wide, dim=1)
