"""Training batches that say which samples they hold."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from zoo.data import DigitsDataModule
from zoo.data.indexed import IndexedDataset
from zoo.data.loading import Draw
from zoo.errors import InputError

DIGITS = {"train_samples": 100, "batch_size": 32, "augment": True}


class Squares(Dataset):
    """Items one by one, as most data sets of users have them."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(index**2)), int(index)


class ByTheBatch(Squares):
    """A list of items, as torch's convention for ``__getitems__`` wants it."""

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[index] for index in indices]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Wrong(Squares):
    def __getitem__(self, index: int) -> object:
        return {"image": index}


@pytest.mark.parametrize("kind", [Squares, ByTheBatch])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.filterwarnings("ignore:.*fork"))])
def test_index_is_the_position_in_any_order(kind, workers):
    loader = DataLoader(
        IndexedDataset(kind()), batch_sampler=[[6, 0], [Draw(3, 5), Draw(3, 5), 1]], num_workers=workers
    )
    for (x, y, index), rows in zip(loader, [[6, 0], [3, 3, 1]], strict=True):
        assert index.tolist() == y.tolist() == rows
        assert index.dtype == torch.int64
        assert x[:, 0].tolist() == [row**2 for row in rows]


def test_identity_the_zoos_batches_get_a_third_tensor():
    data = DigitsDataModule(**DIGITS).splits.train
    draws = [Draw(index, 3) for index in (4, 99, 0)]
    x, y, index = IndexedDataset(data).__getitems__(draws)
    expected = data.__getitems__(draws)
    assert torch.equal(x, expected[0])  # the epoch reaches the augmentation
    assert torch.equal(y, expected[1])
    assert index.tolist() == [4, 99, 0]
    assert IndexedDataset(data)[7][2] == 7
    assert torch.equal(IndexedDataset(data)[7][0], data[7][0])


def test_position_counts_and_not_the_index_inside_a_subset():
    tensors = TensorDataset(torch.arange(10.0), torch.arange(10))
    outer = IndexedDataset(Subset(tensors, [8, 2, 5]))
    assert [outer[place] for place in range(len(outer))] == [(8.0, 8, 0), (2.0, 2, 1), (5.0, 5, 2)]
    inner = Subset(IndexedDataset(tensors), [8, 2, 5])
    assert [inner[place][2] for place in range(3)] == [8, 2, 5]


def test_pickles():
    copy = pickle.loads(pickle.dumps(IndexedDataset(Squares())))
    assert copy[2][1:] == (2, 2)


def test_bad_data():
    with pytest.raises(InputError, match="Stream has no positions"):
        IndexedDataset(Stream())
    with pytest.raises(InputError, match=r"an item of Wrong must be a pair \(x, y\), got dict"):
        IndexedDataset(Wrong())[0]
    with pytest.raises(InputError, match=r"IndexedDataset must be a pair \(x, y\), got tuple of 3"):
        IndexedDataset(IndexedDataset(Squares())).__getitems__([1])


# -- the option of the data modules ---------------------------------------------------------------------------------


def test_identity_with_index_adds_the_index_and_changes_nothing_else():
    plain, indexed = (DigitsDataModule(**DIGITS, with_index=flag).train_dataloader() for flag in (False, True))
    for epoch in (0, 2):
        plain.sampler.set_epoch(epoch)
        indexed.sampler.set_epoch(epoch)
        seen = []
        for (x, y), (same_x, same_y, index) in zip(plain, indexed, strict=True):
            assert torch.equal(x, same_x)
            assert torch.equal(y, same_y)
            seen += index.tolist()
        assert sorted(seen) == list(range(100))
        assert seen == [int(draw) for draw in indexed.sampler]


def test_only_training_batches_have_an_index():
    data = DigitsDataModule(with_index=True)
    assert len(next(iter(data.train_dataloader()))) == 3
    for name in ("val", "test", "predict", "train_eval"):
        assert len(next(iter(getattr(data, f"{name}_dataloader")()))) == 2


def test_an_indexed_loader_goes_on_in_the_middle_of_an_epoch():
    data = DigitsDataModule(**DIGITS, with_index=True)
    whole = data.train_dataloader()
    batches = iter(whole)
    next(batches)
    state = whole.state_dict()
    resumed = DigitsDataModule(**DIGITS, with_index=True).train_dataloader()
    resumed.load_state_dict(state)
    assert [batch[2].tolist() for batch in resumed] == [batch[2].tolist() for batch in batches]


@pytest.mark.filterwarnings("ignore:.*fork")
def test_worker_processes_and_pickling():
    data = pickle.loads(pickle.dumps(DigitsDataModule(**DIGITS, with_index=True)))
    worked = DigitsDataModule(**DIGITS, with_index=True, num_workers=1).train_dataloader()
    for batch, same in zip(data.train_dataloader(), worked, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
