"""Training with a cached teacher: the same losses, from what the training step sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.teachers import SAMPLES, build, loader, teacher
from tests.training import quick_trainer
from zoo.class_means import compute_class_means
from zoo.data import DigitsDataModule
from zoo.errors import InputError
from zoo.teacher_cache import TeacherCache

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec, LeafSpec.",
    "ignore:You passed in a `val_dataloader` but have no `validation_step`",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher.safetensors"


class Student(pl.LightningModule):
    """Imitates a teacher that is there, or a cache in its place."""

    def __init__(self, live: Any, cache: TeacherCache | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.live = [live]
        self.cache = cache
        self.losses: list[float] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.cache is None:
            return batch
        x, targets, index = batch
        return x, targets, self.cache.lookup(index, targets)[1]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with torch.no_grad():
            logits = batch[2] if self.cache is not None else self.live[0](batch[0])
        loss = (self.network(batch[0]) - logits).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def fit(live: Any, cache: TeacherCache | None) -> list[float]:
    student = Student(live, cache)
    quick_trainer(max_epochs=3).fit(student, loader())
    return student.losses


def test_identity_training_without_the_teacher_has_the_same_losses(path):
    live, cached = fit(teacher(), None), fit(None, build(path))
    assert len(live) == 12
    assert cached == pytest.approx(live, rel=1e-5)


class Builder(pl.LightningModule):
    """Builds from the trainer before its first step, and looks whether the teacher agrees."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.zeros(()))
        self.steps = 0

    def on_train_start(self) -> None:
        self.cache = TeacherCache.build(self.path, teacher(), self.trainer)
        self.cache.check_data(self.trainer)
        self.means = compute_class_means(teacher(), self.trainer, num_classes=10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        expected = teacher()(batch[0])
        torch.testing.assert_close(self.cache.lookup(batch[2], batch[1])[1], expected, rtol=1e-5, atol=1e-6)
        self.steps += 1
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Hooked(pl.LightningDataModule):
    """Changes images on their way to the device, and draws noise there."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def train_dataloader(self) -> Any:
        return loader()

    def train_eval_dataloader(self) -> Any:
        return loader(with_index=False)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1, *batch[1:]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 2 * batch[0] + self.noise * torch.randn(batch[0].shape), *batch[1:]


def test_build_from_a_trainer_sees_what_the_step_sees(path):
    module = Builder(path)
    quick_trainer(max_epochs=1).fit(module, datamodule=Hooked(0.0))
    assert module.steps == 4
    path.unlink()
    with pytest.raises(InputError, match=r"the training transform is random \(64 of 64"):
        quick_trainer(max_epochs=1).fit(Builder(path), datamodule=Hooked(0.1))
    assert not path.exists()


def test_identity_class_means_are_those_of_the_pass_over_the_images(path):
    module = Builder(path)
    quick_trainer(max_epochs=1).fit(
        module, datamodule=DigitsDataModule(train_samples=SAMPLES, batch_size=40, with_index=True)
    )
    torch.testing.assert_close(module.cache.class_means(), module.means, rtol=1e-6, atol=1e-7)
