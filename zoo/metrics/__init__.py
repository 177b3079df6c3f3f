"""Metrics that torchmetrics lacks."""

from __future__ import annotations

from zoo.metrics.cka import CKA, cka_table
from zoo.metrics.class_means import ClassMeans
from zoo.metrics.mutual_knn import MutualKNN, mutual_knn, mutual_knn_table, neighbour_count
from zoo.metrics.neighbourhoods import Continuity, Trustworthiness
from zoo.metrics.neighbours import nearest_neighbours
from zoo.metrics.ranking import FullRanking, ranking_values
from zoo.metrics.retrieval import RetrievalRecall
from zoo.metrics.robustness import RobustAccuracy
from zoo.metrics.saliency_curves import InsertionDeletion, SaliencyCurves, insertion_deletion
from zoo.metrics.saliency_pointing import PointingGame, pointing_hits
from zoo.metrics.saliency_ranks import ClassSensitivity, spearman
from zoo.metrics.structure import StructureTransfer, cosine_structure_correlation
from zoo.metrics.top_items import topk_items
from zoo.metrics.zero_shot import ZeroShotAccuracy, class_embeddings, class_prompts

__all__ = [
    "CKA",
    "ClassMeans",
    "ClassSensitivity",
    "Continuity",
    "FullRanking",
    "InsertionDeletion",
    "MutualKNN",
    "PointingGame",
    "RetrievalRecall",
    "RobustAccuracy",
    "SaliencyCurves",
    "StructureTransfer",
    "Trustworthiness",
    "ZeroShotAccuracy",
    "cka_table",
    "class_embeddings",
    "class_prompts",
    "cosine_structure_correlation",
    "insertion_deletion",
    "mutual_knn",
    "mutual_knn_table",
    "nearest_neighbours",
    "neighbour_count",
    "pointing_hits",
    "ranking_values",
    "spearman",
    "topk_items",
]
