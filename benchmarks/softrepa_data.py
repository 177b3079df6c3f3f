"""What `softrepa_table.py` runs on: captioned digits on a CPU, or CIFAR-10 with class captions on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from zoo import registry
from zoo.data import DigitsCaptionsDataModule, ParquetImagesDataModule
from zoo.data.text import OpenClipTokens

LENGTH = 12
TEMPLATES = ("a photo of {}", "a picture of {}", "an image of {}", "{}", "a small photo of {}", "this is {}")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Setting:
    """A data set with the base that is trained on it, and who judges its samples.

    Attributes:
        data: the data module of a seed with a batch size.
        base: arguments of the base.
        base_trainer: arguments of its trainer.
        base_batch: its batch size.
        judge: the classifier's place.
        judge_recipe: the recipe that trains it.
        samples: images that are sampled in validation and in the test.
        trainer: where and in which precision all of it runs.
    """

    data: Callable[[int, int], Any]
    base: dict[str, Any]
    base_trainer: dict[str, Any]
    base_batch: int
    judge: str
    judge_recipe: str
    samples: tuple[int, int]
    trainer: dict[str, Any]


def digits() -> Setting:
    """The digits with the base of the recipe ``flow_matching-digits``."""
    recipe = yaml.safe_load(registry.recipe_path("flow_matching-digits").read_text())
    return Setting(
        data=lambda seed, batch: DigitsCaptionsDataModule(batch_size=batch, context_length=LENGTH, seed=seed),
        base=recipe["model"]["init_args"],
        base_trainer={name: recipe["trainer"][name] for name in ("max_epochs", "gradient_clip_val")},
        base_batch=recipe["data"]["init_args"]["batch_size"],
        judge="./runs/nd-digits-teacher", judge_recipe="nd-digits-teacher", samples=(179, 360),
        trainer={"accelerator": "cpu"},
    )  # fmt: skip


def cifar10(folder: Path, device: str) -> Setting:
    """CIFAR-10 with a caption of six templates that names the class, and a base of 20 times the digits' size."""
    judge = "./runs/nd-cifar10-resnet56"
    backbone = {
        "sample_size": 32, "channels": 3, "patch_size": 4, "width": 256, "depth": 8, "heads": 8, "context_length": LENGTH,
    }  # fmt: skip
    gpu = device != "cpu"
    return Setting(
        data=lambda seed, batch: CaptionedCifar(folder, seed=seed, batch_size=batch),
        base={"backbone_options": backbone, "classifier": judge, "lr": 1e-3, "decay": True},
        base_trainer={"max_epochs": 100, "gradient_clip_val": 1.0}, base_batch=256,
        judge=judge, judge_recipe="nd-cifar10-resnet56", samples=(500, 2000),
        trainer={"accelerator": "gpu" if gpu else "cpu", "devices": 1, "precision": "bf16-mixed" if gpu else "32-true"},
    )  # fmt: skip


class CaptionedCifar(L.LightningDataModule):
    """CIFAR-10 out of parquet files, with tokens of a caption for each image.

    Args:
        folder: with cifar10-train.parquet and cifar10-test.parquet.
        seed: of the order.
        batch_size: images in a batch.
    """

    class_names = CLASSES

    def __init__(self, folder: Path, *, seed: int, batch_size: int) -> None:
        super().__init__()
        self.images = ParquetImagesDataModule(
            str(folder / "cifar10-train.parquet"), test=str(folder / "cifar10-test.parquet"), image_column="img",
            label_column="label", cache="decoded", batch_size=batch_size, val_share=0.1, mean=[0.5] * 3, std=[0.25] * 3,
            seed=seed,
        )  # fmt: skip
        self.mean, self.std = self.images.mean, self.images.std
        tokenize = OpenClipTokens("ViT-B-32", LENGTH)
        self.tokens = torch.stack([tokenize([t.format(name) for t in TEMPLATES]) for name in CLASSES])

    def setup(self, stage: str) -> None:
        self.images.setup(stage)

    def train_dataloader(self) -> Any:
        return _Captioned(self.images.train_dataloader(), self.tokens, drawn=True)

    def val_dataloader(self) -> Any:
        return _Captioned(self.images.val_dataloader(), self.tokens, drawn=False)

    def test_dataloader(self) -> Any:
        return _Captioned(self.images.test_dataloader(), self.tokens, drawn=False)


class _Captioned:
    """A loader of images and labels with a caption beside each: a drawn template, or the first one."""

    def __init__(self, loader: Any, tokens: torch.Tensor, *, drawn: bool) -> None:
        self.loader, self.tokens, self.drawn = loader, tokens, drawn

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for images, labels in self.loader:
            template = torch.randint(len(TEMPLATES), labels.shape) if self.drawn else torch.zeros_like(labels)
            yield {"image": images, "text": self.tokens[labels, template], "label": labels}
