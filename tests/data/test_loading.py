"""Order, shards and resumption: what all data modules share, tried on the digits."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DistributedSampler, Subset

from zoo.data import DigitsDataModule
from zoo.data.draws import random_words
from zoo.data.loading import Draw, EpochShuffle, StridedShard, epoch_of
from zoo.errors import InputError

lightning_warnings = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec, LeafSpec.",
    "ignore:Total length of `list` across ranks is zero",
)


def trainer(rank: int = 0, world: int = 1, fn: str = "fit") -> Any:
    return SimpleNamespace(world_size=world, global_rank=rank, state=SimpleNamespace(fn=fn))


def order(loader: Any, epoch: int) -> list[int]:
    loader.sampler.set_epoch(epoch)
    return [int(index) for index in loader.sampler]


def test_draw_is_an_index_with_an_epoch():
    draw = pickle.loads(pickle.dumps([Draw(7, 3)]))[0]
    assert draw == 7
    assert [10, 20, 30][Draw(1, 5)] == 20
    assert epoch_of([draw, Draw(1, 3)]) == 3
    assert epoch_of([4]) == epoch_of([]) == 0


def test_identity_order_is_that_of_torch_with_a_hashed_seed():
    for rank in range(3):
        ours = EpochShuffle(range(100), num_replicas=3, rank=rank, seed=5)
        seed = int(random_words((5,), [0])[0]) >> 2
        torchs = DistributedSampler(range(100), num_replicas=3, rank=rank, shuffle=True, seed=seed)
        for epoch in (0, 4):
            ours.set_epoch(epoch)
            torchs.set_epoch(epoch)
            assert list(ours) == list(torchs)
            assert {draw.epoch for draw in ours} == {epoch}


def test_subset_of_draws_is_a_view():
    data = DigitsDataModule(augment=True).splits.train
    views = [Subset(data, [Draw(index, view) for index in range(50)]).__getitems__([4, 9])[0] for view in (0, 1, 0)]
    assert torch.equal(views[0], data.__getitems__([4, 9])[0])
    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], views[1])


def test_order_is_a_function_of_seed_and_epoch():
    first = DigitsDataModule(seed=3).train_dataloader()
    orders = [order(first, epoch) for epoch in range(3)]
    assert all(sorted(each) == list(range(1259)) for each in orders)
    assert len({tuple(each) for each in orders}) == 3
    torch.manual_seed(99)  # neither the global random state nor what was drawn before takes part
    again = DigitsDataModule(seed=3).train_dataloader()
    assert order(again, 2) == orders[2]
    others = [order(DigitsDataModule(seed=seed).train_dataloader(), epoch) for seed in (2, 4) for epoch in range(4)]
    assert not {tuple(each) for each in others} & {tuple(each) for each in orders}


def test_loaders_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    data = DigitsDataModule(augment=True, train_samples=100)
    _ = list(data.train_dataloader()), list(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_training_shards_are_complete_and_as_equal_as_torch_makes_them(world):
    shards = []
    for rank in range(world):
        data = DigitsDataModule()
        data.trainer = trainer(rank, world)
        shards.append(order(data.train_dataloader(), 1))
    joint = [index for shard in shards for index in shard]
    assert len({len(shard) for shard in shards}) == 1
    assert set(joint) == set(range(1259))
    assert len(joint) - 1259 == -1259 % world


@pytest.mark.parametrize("split", ["val", "test", "predict", "train_eval"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_shards_are_disjoint_and_complete(split, world):
    whole = torch.cat([x for x, _ in getattr(DigitsDataModule(), f"{split}_dataloader")()])
    seen = torch.full_like(whole, float("nan"))
    for rank in range(world):
        data = DigitsDataModule(batch_size=50, drop_last=True)
        data.trainer = trainer(rank, world)
        loader = getattr(data, f"{split}_dataloader")()
        images = torch.cat([x for x, _ in loader])
        assert isinstance(loader.sampler, DistributedSampler)  # or Lightning would put its own, padding one in
        assert len(images) == len(loader.sampler) == len(range(rank, len(whole), world))
        assert seen[rank::world].isnan().all()
        seen[rank::world] = images
    assert torch.equal(seen, whole)


def test_drop_last_and_batch_sizes():
    sizes = [len(y) for _, y in DigitsDataModule(batch_size=500).train_dataloader()]
    assert sizes == [500, 500, 259]
    dropped = DigitsDataModule(batch_size=500, drop_last=True)
    assert [len(y) for _, y in dropped.train_dataloader()] == [500, 500]
    assert sum(len(y) for _, y in dropped.train_eval_dataloader()) == 1259


def test_loader_goes_on_in_the_middle_of_an_epoch():
    whole = DigitsDataModule(batch_size=200, augment=True).train_dataloader()
    whole.sampler.set_epoch(2)
    batches = []
    for batch in whole:
        batches.append(batch)
        if len(batches) == 3:
            state = whole.state_dict()
    resumed = DigitsDataModule(batch_size=200, augment=True).train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # a checkpoint before the first batch is not lost
    resumed.sampler.set_epoch(2)
    rest = list(resumed)
    assert len(rest) == len(batches) - 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, batches[3:], strict=True))
    assert resumed.state_dict() == whole.state_dict()
    assert len(list(resumed)) == len(batches)  # only once


def test_loader_starts_anew_after_a_checkpoint_from_the_end_of_an_epoch():
    loader = DigitsDataModule(batch_size=200).train_dataloader()
    batches = list(loader)
    loader.load_state_dict(loader.state_dict())
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == len(batches)


@pytest.mark.parametrize(("name", "kwargs", "world"), [("batch_size", {"batch_size": 100}, 1), ("processes", {}, 2)])
def test_bad_resumption_with_another_layout(name, kwargs, world):
    loader = DigitsDataModule().train_dataloader()
    next(iter(loader))
    data = DigitsDataModule(**kwargs)
    data.trainer = trainer(0, world)
    other = data.train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(InputError, match=f"resumed with the same {name}"):
        next(iter(other))


class Recorder(L.LightningModule):
    """Trains a linear model and writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)
        self.seen: list[tuple[int, int, float]] = []
        self.kinds: set[str] = set()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch[0].double().sum().item()))
        self.kinds.add(type(self.trainer.train_dataloader.sampler).__name__)
        return torch.nn.functional.cross_entropy(self.linear(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: Any) -> None:
        raise AssertionError("the run has no validation split")

    def predict_step(self, batch: Any) -> torch.Tensor:
        return batch[1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAfter(L.Callback):
    def __init__(self, path: str, step: int, *, epoch_end: bool) -> None:
        self.path, self.step, self.epoch_end = path, step, epoch_end

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if not self.epoch_end and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        if self.epoch_end and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(*, callbacks: Any = None, ckpt_path: str | None = None, workers: int = 0, **options: Any) -> Recorder:
    torch.manual_seed(0)
    model = Recorder()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=callbacks, **dict.fromkeys(quiet, False) | options)
    data = DigitsDataModule(augment=True, train_samples=200, num_workers=workers, val_share=0.0)
    # Our own checkpoint of a moment ago; Lightning says nothing when weights_only is given.
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return model


@lightning_warnings
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("step", "epoch_end"), [(6, False), (8, False), (8, True)])
def test_identity_resumed_run_equals_an_uninterrupted_one(tmp_path, workers, step, epoch_end):
    path = str(tmp_path / "run.ckpt")
    whole = fit(callbacks=[SaveAfter(path, step, epoch_end=epoch_end)])
    resumed = fit(ckpt_path=path, workers=workers)
    assert whole.kinds == {"EpochShuffle"}
    assert len(whole.seen) == 12
    assert resumed.seen == whole.seen[step:]
    assert torch.equal(resumed.linear.weight, whole.linear.weight)


@lightning_warnings
def test_epoch_may_be_cut_short_by_limit_train_batches(tmp_path):
    path = str(tmp_path / "run.ckpt")
    whole = fit(callbacks=[SaveAfter(path, 4, epoch_end=True)], limit_train_batches=2)
    assert fit(ckpt_path=path, limit_train_batches=2).seen == whole.seen[4:]


@lightning_warnings
def test_predictions_come_in_order():
    data = DigitsDataModule(batch_size=100)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    predicted = torch.cat(trainer.predict(Recorder(), datamodule=data))
    assert torch.equal(predicted, torch.cat([y for _, y in data.test_dataloader()]))


def test_val_dataloader_without_a_validation_split():
    data = DigitsDataModule(val_share=0.0, test_share=0.0)
    data.trainer = trainer()
    assert data.val_dataloader() == []
    data.trainer = trainer(fn="validate")
    with pytest.raises(InputError, match="DigitsDataModule has no validation split"):
        data.val_dataloader()
    with pytest.raises(InputError, match="DigitsDataModule has no test split"):
        data.test_dataloader()


def test_bad_numbers():
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        DigitsDataModule(batch_size=0)
    with pytest.raises(InputError, match="num_workers must be at least 0, got -1"):
        DigitsDataModule(num_workers=-1)
    with pytest.raises(InputError, match=r"drop_last leaves no training batch: batch_size is 2000, but .* 1259"):
        DigitsDataModule(batch_size=2000, drop_last=True).train_dataloader()
    data = DigitsDataModule(val_share=0.003)
    data.trainer = trainer(0, 20)
    with pytest.raises(InputError, match="validation split has 10 samples for 20 processes"):
        data.val_dataloader()


def test_strided_shard():
    assert [list(StridedShard(range(7), num_replicas=3, rank=rank)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert len(StridedShard(range(7), num_replicas=3, rank=2)) == 2
