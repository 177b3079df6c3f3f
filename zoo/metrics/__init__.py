"""Metrics that torchmetrics lacks."""

from __future__ import annotations

from zoo.metrics.cka import CKA, cka_table
from zoo.metrics.class_means import ClassMeans
from zoo.metrics.mutual_knn import MutualKNN, mutual_knn, mutual_knn_table, neighbour_count
from zoo.metrics.neighbourhoods import Continuity, Trustworthiness
from zoo.metrics.neighbours import nearest_neighbours
from zoo.metrics.retrieval import RetrievalRecall
from zoo.metrics.structure import StructureTransfer, cosine_structure_correlation
from zoo.metrics.zero_shot import ZeroShotAccuracy, class_embeddings, class_prompts

__all__ = [
    "CKA",
    "ClassMeans",
    "Continuity",
    "MutualKNN",
    "RetrievalRecall",
    "StructureTransfer",
    "Trustworthiness",
    "ZeroShotAccuracy",
    "cka_table",
    "class_embeddings",
    "class_prompts",
    "cosine_structure_correlation",
    "mutual_knn",
    "mutual_knn_table",
    "nearest_neighbours",
    "neighbour_count",
]
