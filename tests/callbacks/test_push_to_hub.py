"""PushToHub: which versions it pushes, what they hold, what it refuses. Faults are in tests/test_push_reliability.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor
from zoo.callbacks.push_to_hub import PushToHub

from tests.hub_server import HubServer
from tests.push_runs import Runs
from zoo.errors import InputError


@pytest.fixture(scope="module")
def runs(hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Runs(hub_server, tmp_path_factory.mktemp("runs"), figures=False) as started:
        yield started


def weights(hub: HubServer, repo_id: str, revision: str = "main") -> dict[str, Tensor]:
    return load(hub.files(repo_id, revision)["model.safetensors"])


def equal(found: dict[str, Tensor], folder: Path, epoch: int) -> bool:
    """Whether weights are those that the run had in an epoch's validation, bit for bit."""
    expected = torch.load(folder / f"state-{epoch}.pt", weights_only=True)
    return found.keys() <= expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def titles(hub: HubServer, repo_id: str) -> list[str]:
    return [commit.title for commit in reversed(hub.history(repo_id)) if commit.title.startswith("Store")]


def config(hub: HubServer, repo_id: str, revision: str = "main") -> dict[str, Any]:
    return json.loads(hub.files(repo_id, revision)["config.json"])


def test_each_callback_pushes_its_versions(hub: HubServer, runs: Runs, tmp_path: Path) -> None:
    push = [
        {"repo_id": "me/best", "tag_versions": True},
        {"repo_id": "me/least", "monitor": "val/score", "mode": "min", "tag_versions": True},
        {"repo_id": "lab/last", "on": "last", "tag_versions": True, "private": True},
        {"repo_id": "second", "on": "last", "every_n_epochs": 2, "tag_versions": True},
        {"repo_id": "me/end", "on": "end"},
    ]
    answer = runs("fit", folder=str(tmp_path), push=push, scores=[0.4, 0.8, 0.6, 0.2], epochs=4)
    assert answer["error"] is None
    assert titles(hub, "me/best") == ["Store epoch-0", "Store epoch-1"]
    assert titles(hub, "me/least") == ["Store epoch-0", "Store epoch-3"]
    assert titles(hub, "lab/last") == [f"Store epoch-{epoch}" for epoch in range(4)]
    assert titles(hub, "me/second") == ["Store epoch-1", "Store epoch-3"]
    assert titles(hub, "me/end") == ["Store epoch-3"]
    for repo_id, epoch in (("me/best", 1), ("me/least", 3), ("lab/last", 3), ("me/second", 3), ("me/end", 3)):
        assert equal(weights(hub, repo_id), tmp_path, epoch), repo_id
        assert config(hub, repo_id)["run"]["epochs"] == epoch + 1
    for epoch in range(4):
        assert equal(weights(hub, "lab/last", f"epoch-{epoch}"), tmp_path, epoch)
    assert answer["best"] == [pytest.approx(0.8), pytest.approx(0.2), None, None, None]
    assert hub.store.get("model", "lab/last").private
    assert not hub.store.get("model", "me/best").private
    assert [path.name for path in (tmp_path / "hub/best").iterdir()] == ["0002-epoch-1"]

    card = hub.files("me/best")["README.md"].decode()
    assert "model-index" in card
    assert "value: 0.8" in card
    assert 'zoo.from_pretrained("me/best")' in card
    assert config(hub, "me/best")["run"]["history"]["val/score"] == [[0, pytest.approx(0.4)], [1, pytest.approx(0.8)]]
    first, second = runs("load", sources=["me/best", str(tmp_path / "hub/best/0002-epoch-1")])
    assert first == second
    everything = runs.printed + str([hub.files(repo_id) for repo_id in ("me/best", "me/end", "lab/last")])
    assert "hf_local" not in everything


def test_resumed_run_keeps_the_best_and_sends_what_is_left(hub: HubServer, runs: Runs, tmp_path: Path) -> None:
    push = [{"repo_id": "me/resumed", "tag_versions": True}]
    scores = [0.1, 0.5, 0.4, 0.7]
    runs("fit", folder=str(tmp_path), push=push, scores=scores, epochs=2)
    assert titles(hub, "me/resumed") == ["Store epoch-0", "Store epoch-1"]
    head = hub.head("me/resumed")
    (tmp_path / "hub/resumed/0002-epoch-1/.sent").unlink()
    runs("fit", folder=str(tmp_path), push=push, scores=scores, epochs=2, resume=True)
    assert hub.requests("POST", "/me/resumed/preupload/"), "it was sent again"
    assert hub.head("me/resumed") == head, "what changes nothing makes no commit"
    again = runs("fit", folder=str(tmp_path), push=push, scores=scores, epochs=4, resume=True)
    assert titles(hub, "me/resumed") == ["Store epoch-0", "Store epoch-1", "Store epoch-3"]
    assert again["best"] == [pytest.approx(0.7)]
    assert [point[0] for point in config(hub, "me/resumed")["run"]["history"]["val/score"]] == [0, 1, 2, 3]


def test_tags_of_an_earlier_run_stay(hub: HubServer, runs: Runs, tmp_path: Path) -> None:
    push = [{"repo_id": "me/tags", "on": "last", "tag_versions": True}]
    for name, score in (("first", 0.1), ("second", 0.2)):
        (tmp_path / name).mkdir()
        runs("fit", folder=str(tmp_path / name), push=push, scores=[score], epochs=1)
    first, second = reversed(hub.history("me/tags")[:2])
    assert hub.head("me/tags", "epoch-0") == first.oid
    assert hub.head("me/tags") == second.oid
    assert "epoch-0 is sent. tag 'epoch-0' of me/tags stands on commit" in runs.printed


def test_metric_of_training_and_validation_in_mid_epoch(hub: HubServer, runs: Runs, tmp_path: Path) -> None:
    """A metric of training is complete at the end of the epoch, so its version is not staged by the validation before."""
    push = [
        {"repo_id": "me/train", "monitor": "train/epoch", "mode": "max", "tag_versions": True},
        {"repo_id": "me/middle", "monitor": "val/score", "mode": "max", "tag_versions": True},
    ]
    answer = runs("fit", folder=str(tmp_path), push=push, scores=[0.5, 0.7], epochs=2, val_check_interval=0.5)
    assert answer["best"] == [1.0, pytest.approx(0.7)]
    assert titles(hub, "me/train") == ["Store epoch-0", "Store epoch-1"]
    assert config(hub, "me/train", "epoch-0")["run"]["history"]["train/epoch"][-1] == [0, 0.0]
    assert equal(weights(hub, "me/train", "epoch-0"), tmp_path, 0)
    assert titles(hub, "me/middle") == ["Store epoch-0-step-1", "Store epoch-1-step-3"]
    assert config(hub, "me/middle")["run"]["epochs"] == 1


def test_any_lightning_module(hub: HubServer, runs: Runs, tmp_path: Path) -> None:
    from tests.push_parts import Plain
    from tests.training import small_network
    from zoo import hub as stored

    push = [{"repo_id": "me/plain", "folder": str(tmp_path / "staged")}]
    runs.figures = True
    try:
        runs("fit", folder=str(tmp_path), push=push, epochs=2, plain=True)
    finally:
        runs.figures = False
    assert titles(hub, "me/plain")[-1] == "Store epoch-1"
    assert any(name.startswith("figures/") for name in hub.files("me/plain"))
    assert equal(weights(hub, "me/plain"), tmp_path, 1)
    assert config(hub, "me/plain")["args"] == {"rate": 0.1}
    module = stored.load_weights(tmp_path / "staged/0002-epoch-1", Plain(small_network()))
    assert equal(module.state_dict(), tmp_path, 1)
    assert b"zoo.load_weights" in hub.files("me/plain")["README.md"]


def test_missing_and_not_finite_metrics_and_weights(hub: HubServer, runs: Runs, tmp_path: Path) -> None:
    push = [{"repo_id": "me/gaps"}, {"repo_id": "me/weights", "on": "last"}]
    runs("fit", folder=str(tmp_path), push=push, scores=[0.5, float("nan"), 0.9], epochs=3, nan_in=2)
    assert titles(hub, "me/gaps") == ["Store epoch-0"]
    assert "'val/score' is not finite in epoch 1, nothing is pushed" in runs.printed
    assert titles(hub, "me/weights")[-1] == "Store epoch-1"
    assert "epoch-2 is not pushed" in runs.printed
    assert "Traceback" not in runs.printed


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "me/x", "nobody is logged in to the Hub: set HF_TOKEN or run `hf auth login`"),
        ("hf_read", "me/x", "me/x: the token may only read"),
        ("hf_local", "you/x", "you/x: the token belongs to me, who may not write to you"),
        ("hf_expired", "me/x", "the Hub refuses (401)"),
    ],
)
def test_bad_token_is_refused_before_the_first_step(
    hub: HubServer, runs: Runs, tmp_path: Path, token: str | None, repo_id: str, message: str
) -> None:
    answer = runs("fit", token=token, folder=str(tmp_path), push=[{"repo_id": repo_id}])
    assert message in answer["error"]
    assert answer["steps"] == 0
    assert token is None or token not in answer["error"] + runs.printed


def test_fast_dev_run_does_nothing(hub: HubServer, runs: Runs, tmp_path: Path) -> None:
    answer = runs("fit", token=None, folder=str(tmp_path), push=[{"repo_id": "me/dev"}], fast_dev_run=True)
    assert answer["error"] is None
    assert not hub.log
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "a/b/c"}, "cannot be a repository on the Hub"),
        ({"repo_id": "me/x", "on": "first"}, "on must be best, last or end, got 'first'"),
        ({"repo_id": "me/x", "mode": "up"}, "mode must be min or max, got 'up'"),
        ({"repo_id": "me/x", "every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PushToHub(**options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("monitor", "message"), [(None, "no metric to call best"), ("val/acc", "needs mode='min' or mode='max'")]
)
def test_bad_metric_is_refused_before_the_first_step(tmp_path: Path, monitor: str | None, message: str) -> None:
    import lightning.pytorch as pl

    from tests.push_parts import Plain
    from tests.training import digits, quick_trainer, small_network

    trainer = quick_trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[PushToHub("me/x", monitor)])
    with pytest.raises(InputError, match=message):
        trainer.fit(Plain(small_network()), digits(train_samples=64))
    assert isinstance(trainer, pl.Trainer)
    assert trainer.global_step == 0


def test_state_keys_differ() -> None:
    keys = {PushToHub(*arguments).state_key for arguments in (("me/x",), ("me/y",), ("me/x", "val/acc"))}
    assert len(keys | {PushToHub("me/x", on="end").state_key}) == 4
