"""A user's module with everything that a callback could disturb, and runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from zoo.callbacks.normgrad_saliency import NormGradSaliency

from zoo.overlays import overlay_grid
from zoo.saliency import layer_maps

__all__ = [
    "LAYERS",
    "Net",
    "equal",
    "expected_figure",
    "fit",
    "loader",
    "make",
    "picture_files",
    "rows",
    "saliency_callback",
]

LAYERS = ["first", "second"]


class Net(pl.LightningModule):
    """Batch norm, dropout, ReLUs in place, one of them on the input, and a user's own random numbers."""

    def __init__(self, *, compiled: str | None = None, frozen: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential()
        for name, layer in (
            ("clip", nn.ReLU(inplace=True)),
            ("first", nn.Conv2d(1, 4, 3, padding=1)),
            ("norm", nn.BatchNorm2d(4)),
            ("act", nn.ReLU(inplace=True)),
            ("drop", nn.Dropout(0.3)),
            ("second", nn.Conv2d(4, 6, 3, padding=1)),
            ("act2", nn.ReLU(inplace=True)),
            ("flat", nn.Flatten()),
            ("head", nn.Linear(6 * 36, 3)),
        ):
            self.net.add_module(name, layer)
        if frozen:
            for name in ("first", "norm", "second"):
                self.net.get_submodule(name).requires_grad_(requires_grad=False)
        if compiled is not None:
            self.net.compile(backend=compiled)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any) -> Tensor:
        self.seen.append(float(torch.rand(())))
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make(**options: Any) -> Net:
    torch.manual_seed(3)
    return Net(**options)


def rows(seed: int, count: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, 1, 6, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    )


def loader(seed: int = 1, count: int = 20, *, shuffle: bool = False) -> DataLoader[Any]:
    """Batches of 4 images, 6x6, of three classes."""
    return DataLoader(rows(seed, count), batch_size=4, shuffle=shuffle)


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    folder: Path,
    val: Any = True,
    ckpt: str | None = None,
    **options: Any,
) -> pl.Trainer:
    torch.manual_seed(11)
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "default_root_dir": folder, "callbacks": list(callbacks),
    }  # fmt: skip
    trainer = pl.Trainer(**{**settings, **options})
    trainer.fit(
        module,
        loader(0, 24, shuffle=True),
        loader() if val is True else val,
        ckpt_path=ckpt,
        weights_only=ckpt and True,
    )
    return trainer


def equal(one: pl.LightningModule, two: pl.LightningModule) -> bool:
    states = one.state_dict(), two.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def picture_files(folder: Path, name: str = "saliency") -> list[int]:
    """The steps of which there are files."""
    return [int(path.stem.partition("-")[2]) for path in sorted((folder / "images" / name).glob("*.png"))]


def expected_figure(
    module: pl.LightningModule,
    caption: str,
    kept: tuple[Tensor, Tensor],
    targets: Any,
    explained: Any = None,
    **options: Any,
) -> bytes:
    """The figure by what the public functions make of the images, one layer."""
    images, labels = kept
    was = [one.training for one in module.modules()]
    predicted = module.eval()(images.clone()).argmax(1)
    for one, mode in zip(module.modules(), was, strict=True):
        one.training = mode
    maps = layer_maps(module, images, predicted if targets is None else targets, layers=["second"], **options).maps
    titles = [f"label {int(y)}\npredicted {int(p)}" for y, p in zip(labels, predicted, strict=True)]
    if explained is not None:
        titles = [f"{title}\nexplained {int(c)}" for title, c in zip(titles, explained, strict=True)]
    return overlay_grid(images, maps, titles, caption=caption)


def saliency_callback(**options: Any) -> NormGradSaliency:
    return NormGradSaliency(**{"layers": LAYERS, "max_images": 5, **options})
