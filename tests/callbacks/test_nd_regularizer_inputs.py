"""NDRegularizer: batches that are no pairs, data without indices, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from zoo.callbacks.nd_regularizer import NDRegularizer

from tests.auxiliary_runs import Plain, fit, mlp, regularizer, seeded, teacher_network
from tests.training import digits, quick_trainer
from zoo.errors import InputError


class Dicts(torch.utils.data.Dataset[Any]):
    """Batches that are dicts with soft labels."""

    def __init__(self) -> None:
        self.x, self.y = (
            torch.cat(parts) for parts in zip(*digits(train_samples=64).train_eval_dataloader(), strict=True)
        )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        soft = 0.9 * F.one_hot(self.y[index], 10) + 0.01
        return {"image": self.x[index], "soft": soft}


class TakesDicts(Plain):
    def training_step(self, batch: Any) -> Any:
        return F.cross_entropy(self(batch["image"]), batch["soft"])


def test_dicts_and_soft_labels() -> None:
    callback = regularizer(
        width=20, batch_to_input=lambda batch: batch["image"], batch_to_target=lambda batch: batch["soft"]
    )
    data = Dicts()
    trainer = quick_trainer(max_steps=3, callbacks=[callback])
    trainer.fit(seeded(TakesDicts), torch.utils.data.DataLoader(data, batch_size=16))
    assert torch.isfinite(trainer.callback_metrics["train/nd"])
    assert callback.class_counts.tolist() == data.y.bincount(minlength=10).tolist()  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"a batch must be a tuple \(x, y, …\), got dict: give batch_to_input=…"):
        quick_trainer(max_steps=1, callbacks=[regularizer()]).fit(
            seeded(TakesDicts), torch.utils.data.DataLoader(data, batch_size=16)
        )


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        for x, y in digits(train_samples=32, batch_size=8).train_eval_dataloader():
            yield from zip(x, y, strict=True)


def test_data_without_indices_need_a_width() -> None:
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    with pytest.raises(InputError, match=r"no example can be taken .* without using it up: give student_dim=…"):
        quick_trainer(max_steps=1, callbacks=[regularizer()]).fit(seeded(), loader)
    callback = regularizer(width=20, student_dim=12)
    quick_trainer(max_steps=2, callbacks=[callback]).fit(seeded(), loader)
    assert int(callback.class_counts.sum()) == 32  # type: ignore[union-attr]


def test_frozen_layer_warns() -> None:
    module = seeded()
    module.model.first.requires_grad_(requires_grad=False)
    with pytest.warns(UserWarning, match=r"layer 'model.act' gives features without a gradient"):
        fit(module, NDRegularizer(teacher_network(), "model.act"), max_epochs=1)


def test_bad_teacher_of_another_run(tmp_path: Path) -> None:
    fit(seeded(), regularizer(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    other = NDRegularizer(mlp(), "model.hidden")
    with pytest.raises(InputError, match=r"the teacher of NDRegularizer.* is not the one of the checkpoint"):
        fit(seeded(), other, ckpt=str(tmp_path / "a.ckpt"))


def test_bad_teacher_inside_the_module() -> None:
    module = seeded()
    with pytest.raises(InputError, match=r"shares parameters with the module that is trained.*copy.deepcopy"):
        fit(module, NDRegularizer(module.model, "model.hidden"))
    assert all(parameter.requires_grad for parameter in module.parameters())
    fit(module, NDRegularizer(copy.deepcopy(module.model), "model.hidden"), max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be finite and not negative, got -1.0"),
        ({"warmup_epochs": -1}, "warmup_epochs must not be negative, got -1"),
        ({"reduction": "sum"}, "reduction must be one of mean, class, got 'sum'"),
        ({"projector_dropout": 1.5}, "projector_dropout must be in 0 … 1, got 1.5"),
        ({"num_classes": 0}, "num_classes must be at least 1 or None, got 0"),
        ({"student_dim": 0}, "student_dim must be at least 1 or None, got 0"),
        ({"class_mean_views": 0}, "class_mean_views must be at least 1 or None, got 0"),
        ({"teacher": 3}, "teacher must be a tower name or an nn.Module, got int"),
        ({"teacher_options": {"head": "fc"}}, "teacher_options may not hold head"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NDRegularizer(**{"teacher": "zoo/resnet8", "student_layer": "model.hidden", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_layer": "model.hiden"}, r"no layer 'model.hiden' .*Did you mean model.hidden"),
        ({"teacher_layer": "hiden"}, r"no module 'hiden'. Did you mean hidden"),
        ({"teacher": "zoo/resnet9"}, r"no architecture 'resnet9'"),
        ({"num_classes": 5}, r"must be labels in 0 … 4"),
        ({"student_dim": 9}, r"12"),
    ],
)
def test_bad_at_fit_start(options: dict[str, Any], message: str) -> None:
    callback = NDRegularizer(**{"teacher": teacher_network(), "student_layer": "model.hidden", **options})
    module = seeded()
    with pytest.raises((InputError, RuntimeError, ValueError), match=message):
        fit(module, callback)
    assert "training_step" not in vars(module)
