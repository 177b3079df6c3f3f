"""Facts of a run for the card: what the run says of itself, in JSON, and nothing more."""

from __future__ import annotations

import json

from zoo.lightning_modules.classifier import Classifier

from tests.training import digits, quick_trainer, small_network
from zoo import run_facts


def test_facts_of_a_run_are_json_and_its_own() -> None:
    trainer = quick_trainer(max_epochs=2)
    trainer.fit(Classifier(small_network(), 10), digits(train_samples=64, batch_size=32))
    facts = run_facts.collect(
        trainer,
        metrics={"val": {"acc": 0.5, "loss": float("nan")}},
        seconds=1.26,
        seed=3,
        monitor="val/acc",
        history={"val/acc": [[0, 0.25], [1, 0.5]], "empty": []},
    )
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert (facts["epochs"], facts["steps"], facts["seconds"], facts["seed"]) == (2, 4, 1.3, 3)
    assert facts["metrics"] == {"val": {"acc": 0.5, "loss": "nan"}}
    assert facts["history"] == {"val/acc": [[0, 0.25], [1, 0.5]]}
    assert facts["precision"] == "32-true"
    assert facts["data"]["name"] == "DigitsDataModule"
    assert facts["data"]["args"]["train_samples"] == 64
    assert facts["data"]["splits"] == {"train": 64, "val": 179, "test": 359}


def test_facts_of_a_run_on_bare_loaders_name_no_data() -> None:
    data = digits(train_samples=32)
    data.setup()
    trainer = quick_trainer(max_steps=1)
    trainer.fit(Classifier(small_network(), 10), data.train_dataloader())
    facts = run_facts.collect(trainer, metrics={})
    assert "data" not in facts
    assert "seed" not in facts


def test_by_split_leaves_out_training_steps() -> None:
    found = run_facts.by_split({"val/acc": 0.5, "test/loss": 2, "train/loss": 1.0, "lr": 0.1})
    assert found == {"val": {"acc": 0.5}, "test": {"loss": 2.0}}
