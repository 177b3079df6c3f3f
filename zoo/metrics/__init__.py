"""Metrics that torchmetrics lacks."""

from __future__ import annotations

from zoo.metrics.class_means import ClassMeans
from zoo.metrics.retrieval import RetrievalRecall
from zoo.metrics.structure import StructureTransfer, cosine_structure_correlation
from zoo.metrics.zero_shot import ZeroShotAccuracy, class_embeddings, class_prompts

__all__ = [
    "ClassMeans",
    "RetrievalRecall",
    "StructureTransfer",
    "ZeroShotAccuracy",
    "class_embeddings",
    "class_prompts",
    "cosine_structure_correlation",
]
