"""Losses of the papers: pure functions of tensors, one file a paper."""

from __future__ import annotations

from zoo.losses.contrastive import clip_loss, info_nce, siglip_loss
from zoo.losses.cwcl import cwcl_loss, cwcl_statistics
from zoo.losses.logits import dist_loss, dkd_loss, kd_loss
from zoo.losses.nd import nd_loss, nd_statistics
from zoo.losses.review_kd import review_kd_loss
from zoo.losses.structure import structure_loss, structure_statistics

__all__ = [
    "clip_loss",
    "cwcl_loss",
    "cwcl_statistics",
    "dist_loss",
    "dkd_loss",
    "info_nce",
    "kd_loss",
    "nd_loss",
    "nd_statistics",
    "review_kd_loss",
    "siglip_loss",
    "structure_loss",
    "structure_statistics",
]
