"""Batches of interactions: training blocks, evaluation of users, processes, and resumption."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DistributedSampler

from tests.training import quick_trainer
from zoo import run_facts
from zoo.data import SyntheticInteractionsDataModule
from zoo.data.interaction_batches import BlockShuffle
from zoo.data.loading import EpochShuffle
from zoo.errors import InputError
from zoo.metrics import FullRanking

SMALL = {"num_users": 30, "num_items": 40, "batch_size": 32, "eval_batch_size": 7}
lightning_warnings = pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*dataloader shuffling")


def module(rank: int = 0, world: int = 1, **options: Any) -> SyntheticInteractionsDataModule:
    data = SyntheticInteractionsDataModule(**{**SMALL, **options})
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=world, state=SimpleNamespace(fn="fit")
    )
    return data


def epoch_of(data: SyntheticInteractionsDataModule, epoch: int) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def pairs_of(batches: list[dict[str, torch.Tensor]], item: str = "positive") -> list[tuple[int, int]]:
    return [pair for batch in batches for pair in zip(batch["user"].tolist(), batch[item].tolist(), strict=True)]


def test_an_epoch_has_every_interaction_once():
    data = module()
    train = list(zip(*data.interactions["train"].tolist(), strict=True))
    epochs = [epoch_of(data, epoch) for epoch in (0, 1, 0)]
    for batches in epochs:
        assert sorted(pairs_of(batches)) == sorted(train)
        assert not set(pairs_of(batches, "negative")) & set(train)
        for batch in batches:
            assert list(batch) == ["user", "positive", "negative"]
            assert {part.dtype for part in batch.values()} == {torch.int64}
        assert [len(batch["user"]) for batch in batches[:-1]] == [32] * (len(batches) - 1)
    assert pairs_of(epochs[0]) == pairs_of(epochs[2]) != pairs_of(epochs[1])
    assert pairs_of(epochs[0], "negative") == pairs_of(epochs[2], "negative")
    other = epoch_of(module(seed=1), 0)
    assert pairs_of(other) != pairs_of(epochs[0])
    by_rows = [dict(zip(pairs_of(each), pairs_of(each, "negative"), strict=True)) for each in (*epochs[:2], other)]
    for again in by_rows[1:]:
        assert sum(by_rows[0][pair] != again[pair] for pair in train) > 0.8 * len(train)


def test_blocks_are_the_order_of_epoch_shuffle():
    for world in (1, 2, 3):
        for rank in range(world):
            options = {"num_replicas": world, "rank": rank, "seed": 5}
            blocks, single = BlockShuffle(range(50), 8, **options), EpochShuffle(range(50), **options)
            blocks.set_epoch(3)
            single.set_epoch(3)
            rows = [row for _, part in blocks for row in part.tolist()]
            assert rows == list(single)[: len(rows)]
            assert len(rows) >= 17 - 1
            assert len(list(blocks)) == len(blocks)


@pytest.mark.parametrize(
    ("rows", "drop_last", "sizes"), [(9, False, [4, 4]), (10, False, [4, 4, 2]), (10, True, [4, 4])]
)
def test_no_batch_of_one_row(rows, drop_last, sizes):
    sampler = BlockShuffle(range(rows), 4, drop_last=drop_last)
    assert [len(part) for _, part in sampler] == sizes


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_an_epoch(world):
    train = sorted(zip(*module().interactions["train"].tolist(), strict=True))
    shards = [epoch_of(module(rank, world), 1) for rank in range(world)]
    assert len({tuple(len(batch["user"]) for batch in shard) for shard in shards}) == 1  # as losses over pairs need
    assert set(train) == {pair for shard in shards for pair in pairs_of(shard)}
    assert sum(len(pairs_of(shard)) for shard in shards) < len(train) + world
    assert pairs_of(shards[0], "negative") != pairs_of(shards[1], "negative")


@pytest.mark.parametrize("split", ["val", "test", "predict", "train_eval"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_see_each_user_once(split, world):
    name = {"predict": "test", "train_eval": "train"}.get(split, split)
    expected = sorted(zip(*module().interactions[name].tolist(), strict=True))
    users, pairs = [], []
    for rank in range(world):
        loader = getattr(module(rank, world), f"{split}_dataloader")()
        assert isinstance(loader.sampler, DistributedSampler)  # or Lightning would put its own, padding one in
        for batch in loader:
            assert len(batch["user"]) == len(batch["held_out"].offsets) - 1 <= 7
            users += batch["user"].tolist()
            rows = batch["user"][batch["held_out"].rows()]
            pairs += zip(rows.tolist(), batch["held_out"].columns.tolist(), strict=True)
    assert len(users) == len(set(users)) == len({user for user, _ in expected})
    assert sorted(pairs) == expected


def test_two_processes_measure_what_one_does():
    data = module()
    users, items = torch.randn(data.num_users, 4), torch.randn(data.num_items, 4)

    def measured(world: int) -> dict[str, float]:
        metric = FullRanking(k=(1, 5))
        for rank in range(world):
            for batch in module(rank, world).test_dataloader():
                metric.update(users[batch["user"]], items, batch["held_out"])
        return {name: float(value) for name, value in metric.compute().items()}

    assert measured(1) == measured(2)
    test = data.interactions["test"]
    found = {u: set(test[1, test[0] == u].tolist()) for u in test[0].tolist()}
    best = (users @ items.T).topk(5).indices.tolist()
    recall = sum(len(held & set(best[user])) / len(held) for user, held in found.items()) / len(found)
    assert measured(1)["recall@5"] == pytest.approx(recall)


class Recorder(L.LightningModule):
    """Writes down what it is given, and stores a checkpoint after some steps."""

    def __init__(self, path: str | None = None, step: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.path, self.step = path, step
        self.seen: list[Any] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen.append({name: part.tolist() for name, part in batch.items()})
        return self.weight.sum()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.path and self.trainer.global_step == self.step:
            self.trainer.save_checkpoint(self.path)

    def validation_step(self, batch: dict[str, Any]) -> None:
        assert len(batch["user"]) == len(batch["held_out"].lengths())
        self.validated += batch["user"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@lightning_warnings
@pytest.mark.parametrize("step", [4, 13])
def test_identity_resumed_run_equals_an_uninterrupted_one(tmp_path, step):
    path = str(tmp_path / "run.ckpt")

    def fit(model: Recorder, **options: Any) -> Recorder:
        quick_trainer(max_epochs=3).fit(model, datamodule=SyntheticInteractionsDataModule(**SMALL), **options)
        return model

    whole = fit(Recorder(path, step))
    per_epoch = len(whole.seen) // 3
    assert whole.seen[:per_epoch] != whole.seen[per_epoch : 2 * per_epoch]
    assert fit(Recorder(), ckpt_path=path, weights_only=False).seen == whole.seen[step:]


@lightning_warnings
def test_overfitting_and_validation_by_lightning():
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=2,
        overfit_batches=2,
        accelerator="cpu",
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    model = Recorder()
    trainer.fit(model, datamodule=SyntheticInteractionsDataModule(**SMALL))
    assert len(model.seen) == 4
    assert model.seen[:2] == model.seen[2:]
    assert len(model.seen[0]["user"]) == 32
    model.validated.clear()
    quick = L.Trainer(accelerator="cpu", enable_model_summary=False, **options)
    quick.validate(model, datamodule=SyntheticInteractionsDataModule(**SMALL), verbose=False)
    assert model.validated == list(range(30))


@pytest.mark.parametrize(("name", "options", "world"), [("batch_size", {"batch_size": 16}, 1), ("processes", {}, 2)])
def test_bad_resumption_with_another_layout(name, options, world):
    loader = module().train_dataloader()
    next(iter(loader))
    other = module(0, world, **options).train_dataloader()
    other.load_state_dict(loader.state_dict())  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=f"resumed with the same {name}"):
        next(iter(other))


def test_bad_batches():
    with pytest.raises(InputError, match="there is no training batch: a process has 30 interactions, batch_size is 64"):
        module(train_samples=30, batch_size=64, drop_last=True).train_dataloader()
    with pytest.raises(InputError, match=r"the val.* split has 30 users for 40 processes: each needs one"):
        module(0, 40).val_dataloader()
    with pytest.raises(InputError, match="have interacted with all 2 items of training"):
        module(num_items=8, num_users=1, interactions_per_user=4, train_samples=2, cold=0.0).train_dataloader()


def test_loaders_leave_the_global_random_state_alone_and_pickle():
    before = torch.get_rng_state()
    data = module()
    _ = list(data.train_dataloader()), list(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())
    again = pickle.loads(pickle.dumps(data.train_dataloader().dataset))
    assert torch.equal(again[1]["negative"], data.train_dataloader().dataset[1]["negative"])


def test_what_the_card_shows():
    data = module(train_samples=64)
    assert run_facts._splits(data) == {
        "train": 64, "val": data.interactions["val"].shape[1], "test": data.interactions["test"].shape[1]
    }  # fmt: skip
    facts = run_facts._arguments(data)
    assert {"num_users": 30, "num_items": 40, "train_samples": 64, "batch_size": 32}.items() <= facts.items()
