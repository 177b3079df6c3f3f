"""Classifier: cross-entropy alone, with the evaluation that all classifiers of the zoo share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from zoo.lightning_modules.classifier import Classifier

from tests.training import digits, quick_trainer, small_network
from zoo.errors import InputError
from zoo.evaluation import check_batch

OPTIONS: dict[str, Any] = {"student_options": {"in_chans": 1}, "num_classes": 10}


def test_learns_digits_and_reports_the_accuracy_it_has() -> None:
    model = Classifier("zoo/resnet8", **OPTIONS)
    quick_trainer(max_epochs=3).fit(model, digits())
    data = digits(batch_size=100)
    trainer = quick_trainer()
    logged = trainer.test(model, data, verbose=False)[0]
    predicted = trainer.predict(model, data)
    assert predicted is not None
    labels = torch.cat([y for _, y in data.test_dataloader()])
    prediction = torch.cat([batch["prediction"] for batch in predicted])
    logits = torch.cat([batch["logits"] for batch in predicted])
    assert logged["test/acc"] == pytest.approx(float((prediction == labels).float().mean()), abs=1e-6)
    assert logged["test/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert logged["test/acc"] > 0.8


def test_training_step_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classifier("zoo/resnet8", label_smoothing=0.1, **OPTIONS).eval()
    monkeypatch.setattr(model, "log", lambda *a, **k: None)
    x, y = next(iter(digits().train_dataloader()))
    log_p = model.student(x).log_softmax(1)
    expected = -(0.9 * log_p.gather(1, y[:, None]).squeeze(1) + 0.1 * log_p.mean(1)).mean()
    torch.testing.assert_close(model.training_step((x, y), 0), expected)


def test_default_schedule_is_the_papers() -> None:
    """150, 180 and 210 of 240 epochs, in proportion."""
    model = Classifier("zoo/resnet8", lr=0.2, **OPTIONS)
    quick_trainer(max_epochs=16, max_steps=1).fit(model, digits(train_samples=64))
    optimizer = model.optimizers(use_pl_optimizer=False)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    assert sorted(model.lr_schedulers().milestones) == [10, 12, 14]


def test_label_smoothing_and_soft_labels_reach_validation_as_labels() -> None:
    with pytest.raises(InputError, match="soft labels have 3 classes, expected num_classes=10"):
        check_batch((torch.zeros(2, 1, 8, 8), torch.zeros(2, 3)), 10)
    with pytest.raises(InputError, match=r"a batch must be a pair \(x, targets\), got dict"):
        check_batch({"image": 1}, 10)
    with pytest.raises(InputError, match=r"labels must be in 0 … 9 .*got -1 … 3"):
        check_batch((torch.zeros(2, 1, 8, 8), torch.tensor([-1, 3])), 10)


def test_bad_number_of_classes() -> None:
    with pytest.raises(InputError, match="CifarResNet has a classifier of 7 classes, expected 10"):
        Classifier(small_network(num_classes=7), 10)
