"""Losses of the papers: pure functions of tensors, one file a paper."""

from __future__ import annotations

from zoo.losses.advcal import (
    calibration_consistency,
    centre_cross_entropy,
    centre_divergence,
    clean_adversarial_info_nce,
    clean_adversarial_l2,
)
from zoo.losses.centres import pooled_similarities
from zoo.losses.cm3 import alignment_loss, calibrated_uniformity_loss, calibration_statistics, uniformity_loss
from zoo.losses.contrastive import clip_loss, info_nce, siglip_loss
from zoo.losses.cwcl import cwcl_loss, cwcl_statistics
from zoo.losses.logits import dist_loss, dkd_loss, kd_loss
from zoo.losses.nd import nd_loss, nd_statistics
from zoo.losses.review_kd import review_kd_loss
from zoo.losses.softrepa import equal_captions, softrepa_gradient, softrepa_loss
from zoo.losses.spherical import slerp, spherical_bezier
from zoo.losses.structure import structure_loss, structure_statistics

__all__ = [
    "alignment_loss",
    "calibrated_uniformity_loss",
    "calibration_consistency",
    "calibration_statistics",
    "centre_cross_entropy",
    "centre_divergence",
    "clean_adversarial_info_nce",
    "clean_adversarial_l2",
    "clip_loss",
    "cwcl_loss",
    "cwcl_statistics",
    "dist_loss",
    "dkd_loss",
    "equal_captions",
    "info_nce",
    "kd_loss",
    "nd_loss",
    "nd_statistics",
    "pooled_similarities",
    "review_kd_loss",
    "siglip_loss",
    "slerp",
    "softrepa_gradient",
    "softrepa_loss",
    "spherical_bezier",
    "structure_loss",
    "structure_statistics",
    "uniformity_loss",
]
