"""Stored models to look at and to tamper with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import zoo
from tests.training import small_distillation

__all__ = ["config_of", "edit_config", "edit_tensors", "seeded_distillation", "tensors_of"]


def seeded_distillation(**options: Any) -> zoo.NDDistillation:
    """A distillation as after a fit: class means, statistics and an input shape, without the time that a fit takes."""
    torch.manual_seed(0)
    model = small_distillation(**options)
    with torch.no_grad():
        model.student.train()(torch.randn(8, 1, 8, 8))
        if model.class_means is not None:
            model.class_means.copy_(torch.rand(model.class_means.shape))
            model.class_counts.copy_(torch.arange(1, 11))
    model.example_shape = (1, 8, 8)
    return model


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration as it lies there."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the configuration in place."""
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The stored tensors by name."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors, with the hash that config.json records: what an attacker would do."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"sha256": config_of(folder)["weights"]["sha256"]})
