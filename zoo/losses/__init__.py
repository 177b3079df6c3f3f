"""Losses of the papers: pure functions of tensors, one file a paper."""

from __future__ import annotations

from zoo.losses.logits import dist_loss, dkd_loss, kd_loss
from zoo.losses.nd import nd_loss, nd_statistics
from zoo.losses.review_kd import review_kd_loss

__all__ = ["dist_loss", "dkd_loss", "kd_loss", "nd_loss", "nd_statistics", "review_kd_loss"]
