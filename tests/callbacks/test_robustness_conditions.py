"""RobustnessEvaluation: modes of the parts, how many samples are checked and rehearsed."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.callbacks.test_robustness_evaluation import EPS, Plain, evaluation, loader, logged, trainer, worst
from tests.robust_networks import Linear, direction, margins, samples


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Awake(Plain):
    """Keeps its dropout on in validation."""

    def on_validation_start(self) -> None:
        self.drop.train()


def test_modes_under_attack_and_afterwards() -> None:
    """Module and surrogate are attacked in eval mode, and get back the mode of each part."""
    module, surrogate = Awake(), Plain()
    surrogate.body = Linear(5)
    run = trainer(evaluation(surrogate=surrogate))
    run.validate(module, loader(), verbose=False)
    x, labels = samples()
    across = (direction(Linear(0)) * direction(Linear(5)).sign()).sum()
    found = logged(run)
    assert found["val/robust/clean"] == pytest.approx(worst(40, 0.0))
    assert found["val/robust/adaptive_0.01"] == pytest.approx(worst(40, EPS))
    transferred = (margins(Linear(0), x, labels, EPS * across) > 0).float().mean()
    assert found["val/robust/transfer_0.01"] == pytest.approx(float(transferred))
    assert all(part.training for part in surrogate.modules())
    assert module.drop.training


def test_checks_are_made_on_the_first_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[dict[str, int]] = []

    def watched(_shares: object, counts: dict[str, int], _radii: object) -> list[object]:
        judged.append(counts)
        return []

    monkeypatch.setattr("zoo.callbacks.robustness_evaluation.find_flaws", watched)
    trainer(evaluation(check_samples=20)).validate(Plain(), loader(), verbose=False)
    assert [(counts["check_same"], counts["check_steps"], counts["clean"]) for counts in judged] == [(20, 20, 40)]


class Watched(Plain):
    """Remembers how many samples were attacked, and whether that was before training."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[bool, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            self.passes.append((self.trainer.sanity_checking, len(x)))
        return super().forward(x)


def test_the_rehearsal_is_short() -> None:
    module = Watched()
    trainer(evaluation(check_samples=0), max_epochs=1, num_sanity_val_steps=2).fit(module, loader(), loader())
    rehearsed = [rows for sanity, rows in module.passes if sanity]
    assert 0 < len(rehearsed) <= 2  # a step for each radius
    assert max(rehearsed) <= 2
    assert sum(rows for sanity, rows in module.passes if not sanity) > 200
