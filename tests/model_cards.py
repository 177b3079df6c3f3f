"""One stored configuration with all facts of a run, and its card, for the tests of model cards."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from zoo import registry
from zoo.card_text import load_yaml
from zoo.model_card import render

__all__ = ["CONFIG", "RECIPE", "card_of", "changed", "metadata_of", "sheet"]

RECIPE = "seed_everything: 0\nrequires: {./runs/teacher: nd-digits-teacher}\nmodel: {class_path: NDDistillation}\n"
CONFIG: dict[str, Any] = {
    "zoo_format": 1,
    "component": "NDDistillation",
    "versions": {"lightning-zoo": "0.1.0", "torch": "2.14.0"},
    "args": {
        "student": "zoo/resnet8",
        "teacher": "timm/resnet34.a1_in1k",
        "nd_weight": 2.0,
        "student_options": {"in_chans": 1},
    },
    "supplied": {},
    "omitted": {
        "teacher": {"name": "timm/resnet34.a1_in1k", "revision": None, "sha256": "ab" * 32, "training_only": True}
    },
    "weights": {"sha256": "cd" * 32},
    "golden": {"seed": 0, "input_shape": [1, 1, 8, 8], "output_shape": [1, 10], "output": [0.0] * 10},
    "run": {
        "data": {
            "name": "ParquetImagesDataModule",
            "args": {"train": ["hf://datasets/uoft-cs/cifar10/plain_text/train.parquet@abc"], "batch_size": 64},
            "splits": {"train": 1259, "val": 179, "test": 359},
        },
        "metrics": {"val": {"acc": 0.994413, "loss": 0.03}, "test": {"acc": 0.98607}},
        "seed": 3,
        "epochs": 20,
        "steps": 400,
        "seconds": 3723.4,
        "hardware": "CPU, 2 threads",
        "precision": "32-true",
        "monitor": "val/acc",
        "history": {},
    },
}  # fmt: skip


def sheet(name: str = "NDDistillation") -> registry.Component:
    component = registry.describe(name)
    return dataclasses.replace(component, sheet={**component.sheet, "control": {"nd_weight": 0}})


def changed(path: str, value: Any) -> dict[str, Any]:
    """The configuration with one part replaced, or removed where the value is ``...``."""
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    replace(config, path, value)
    return config


def replace(config: dict[str, Any], path: str, value: Any) -> None:
    """Replace one part of a configuration in place, or remove it where the value is ``...``."""
    *parents, last = path.split(".")
    for key in parents:
        config = config[key]
    if value is ...:
        del config[last]
    else:
        config[last] = value


def card_of(config: dict[str, Any] = CONFIG, **options: Any) -> str:
    return render(config, **{"component": sheet(), "recipe": RECIPE, "repo_id": "me/nd-digits", **options})


def metadata_of(card: str) -> dict[str, Any]:
    data: dict[str, Any] = load_yaml(card.split("---\n")[1])
    return data
