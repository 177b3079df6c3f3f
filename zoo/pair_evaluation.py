"""What is measured of a model that embeds pairs: retrieval both ways, zero-shot, and what the heads kept of the encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.metrics import RetrievalRecall, StructureTransfer, ZeroShotAccuracy, class_embeddings

__all__ = ["PairEvaluation"]


class PairEvaluation(nn.Module):
    """The metrics of one evaluation of image-text pairs.

    Args:
        recall: the k of the retrieval metrics.
    """

    def __init__(self, recall: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        self.retrieval = RetrievalRecall(tuple(recall))
        self.image_structure = StructureTransfer()
        self.text_structure = StructureTransfer()
        self.zero_shot: dict[str, ZeroShotAccuracy] = {}

    def start(self, encode_text: Callable[[list[str]], Tensor], data: Any, device: torch.device) -> None:
        """Begin an evaluation: embed the prompts of the classes.

        Args:
            encode_text: texts -> unit embeddings.
            data: a data module; with ``zero_shot_prompts()``, name -> prompts of each class, there is zero-shot accuracy.
            device: where the metrics are kept.
        """
        prompts: Mapping[str, Any] = data.zero_shot_prompts() if hasattr(data, "zero_shot_prompts") else {}
        self.zero_shot = {}
        for name, sentences in prompts.items():
            metric = ZeroShotAccuracy(top_k=1).to(device)
            metric.set_classes(class_embeddings(encode_text, sentences))
            self.zero_shot[name] = metric

    def update(
        self,
        embeddings: Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Take a batch of pairs.

        Args:
            embeddings: unit embeddings (B, D) of "image" and "text".
            features: the frozen features (B, D') behind them.
            ids: which thing each pair shows (B,).
            labels: its class (B,), for zero-shot.
        """
        self.retrieval.update(embeddings["image"], embeddings["text"], ids)
        self.image_structure.update(embeddings["image"], features["image"], ids)
        self.text_structure.update(embeddings["text"], features["text"], ids)
        if labels is not None:
            for zero_shot in self.zero_shot.values():
                zero_shot.update(embeddings["image"], labels)

    def finish(self) -> dict[str, Any]:
        """Return the values by name, and forget the batches.

        Returns:
            ``retrieval/{a}_to_{b}/r{k}``, ``structure/{modality}`` (Spearman correlation between the pairwise cosines of
            the embeddings and of the frozen features behind them), ``zero_shot/{name}``.
        """
        found: dict[str, Any] = {f"retrieval/{key}": value for key, value in self.retrieval.compute().items()}
        found["structure/image"] = self.image_structure.compute()
        found["structure/text"] = self.text_structure.compute()
        found |= {f"zero_shot/{name}": metric.compute() for name, metric in self.zero_shot.items()}
        for each in (self.retrieval, self.image_structure, self.text_structure):
            each.reset()
        self.zero_shot = {}
        return found
