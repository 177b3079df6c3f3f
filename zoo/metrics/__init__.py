"""Metrics that torchmetrics lacks."""

from __future__ import annotations

from zoo.metrics.class_means import ClassMeans

__all__ = ["ClassMeans"]
