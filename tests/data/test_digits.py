"""scikit-learn's digits: the split, the values, the sizes and the augmentation."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from zoo.data import DigitsDataModule
from zoo.errors import InputError

MASK = (1 << 64) - 1
MEAN, STD = 0.3054, 0.3759


def splitmix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def expected_split(*, seed: int = 0, val: float = 0.1, test: float = 0.2) -> dict[str, list[int]]:
    """The split in plain Python, from scikit-learn's labels."""
    target = load_digits().target.tolist()
    key = splitmix(splitmix(1) ^ seed)
    parts: dict[str, list[int]] = {"val": [], "test": [], "train": []}
    for digit in range(10):
        members = sorted((i for i, label in enumerate(target) if label == digit), key=lambda i: splitmix(key ^ i))
        a, b = int(val * len(members) + 0.5), int(test * len(members) + 0.5)
        parts["val"] += members[:a]
        parts["test"] += members[a : a + b]
        parts["train"] += members[a + b :]
    return {name: sorted(part) for name, part in parts.items()}


def pixels(indices: list[int]) -> torch.Tensor:
    return (torch.tensor(load_digits().images[indices] / 16).unsqueeze(1) - MEAN) / STD


def whole(loader: object) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_golden_split():
    split = expected_split()
    assert {name: len(part) for name, part in split.items()} == {"val": 179, "test": 359, "train": 1259}
    # The digest of expected_split() above, which knows nothing of zoo: it fixes the split for ever.
    digest = hashlib.sha256(repr([split[name] for name in ("train", "val", "test")]).encode()).hexdigest()
    assert digest == "b65c4636d2a7db63f8749ff9219e6e3af7da09af234bd0ecac45dfd17be02e6b"
    data = DigitsDataModule()
    for name, loader in (
        ("train", data.train_eval_dataloader()),
        ("val", data.val_dataloader()),
        ("test", data.test_dataloader()),
        ("test", data.predict_dataloader()),
    ):
        images, labels = whole(loader)
        assert labels.tolist() == load_digits().target[split[name]].tolist()
        torch.testing.assert_close(images.double(), pixels(split[name]), rtol=0, atol=1e-6)


def test_split_depends_on_its_own_seed_only():
    torch.manual_seed(1)
    base = whole(DigitsDataModule().test_dataloader())
    torch.manual_seed(2)
    same = whole(DigitsDataModule(seed=7, batch_size=10, augment=True, train_samples=50).test_dataloader())
    other = whole(DigitsDataModule(split_seed=1).test_dataloader())
    assert torch.equal(base[0], same[0])
    assert not torch.equal(base[0][:50], other[0][:50])
    torch.testing.assert_close(other[0].double(), pixels(expected_split(seed=1)["test"]), rtol=0, atol=1e-6)


def test_split_is_stratified_and_disjoint():
    data = DigitsDataModule(val_share=0.15, test_share=0.25)
    parts = [whole(loader()) for loader in (data.train_eval_dataloader, data.val_dataloader, data.test_dataloader)]
    total = np.bincount(load_digits().target)
    counts = [torch.bincount(labels, minlength=10).numpy() for _, labels in parts]
    assert (sum(counts) == total).all()
    assert abs(counts[1] - 0.15 * total).max() <= 0.5
    assert abs(counts[2] - 0.25 * total).max() <= 0.5
    images = torch.cat([images.flatten(1) for images, _ in parts])
    everything = (torch.tensor(load_digits().data / 16).float() - MEAN) / STD
    torch.testing.assert_close(images.sort(0).values, everything.sort(0).values)


def test_documented_normalisation():
    train = load_digits().images[expected_split()["train"]] / 16
    assert (round(train.mean(), 4), round(train.std(), 4)) == (MEAN, STD)
    images, _ = whole(DigitsDataModule().train_eval_dataloader())
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3


def test_training_split_is_the_evaluated_one_in_another_order():
    data = DigitsDataModule()
    (images, labels), (ordered, expected) = whole(data.train_dataloader()), whole(data.train_eval_dataloader())
    order = torch.tensor(list(data.train_dataloader().sampler))
    assert torch.equal(images, ordered[order])
    assert torch.equal(labels, expected[order])


@pytest.mark.parametrize(("size", "channels"), [(8, 3), (16, 1), (20, 1), (32, 3)])
def test_sizes_and_channels(size, channels):
    data = DigitsDataModule(image_size=size, channels=channels)
    images, _ = next(iter(data.test_dataloader()))
    raw = torch.tensor(load_digits().images[expected_split()["test"][:64]] / 16).unsqueeze(1)
    if size != 8:
        raw = F.interpolate(raw, size=(size, size), mode="bilinear")
    assert images.shape == (64, channels, size, size)
    assert images.dtype == torch.float32
    expected = ((raw - MEAN) / STD).expand(-1, channels, -1, -1)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-5)
    assert data.mean == [MEAN] * channels
    assert data.std == [STD] * channels


@pytest.mark.parametrize(("size", "step"), [(8, 1), (32, 4)])
def test_augmentation_shifts_by_one_original_pixel(size, step):
    plain = DigitsDataModule(image_size=size, batch_size=2000)
    moved = DigitsDataModule(image_size=size, batch_size=2000, augment=True)
    (images, _), (views, _) = next(iter(plain.train_dataloader())), next(iter(moved.train_dataloader()))
    black = -MEAN / STD
    padded = F.pad(images - black, (step,) * 4) + black
    shifts = [
        padded[:, :, down : down + size, right : right + size]
        for down in (0, step, 2 * step)
        for right in (0, step, 2 * step)
    ]
    fits = torch.stack([(views - shift).abs().flatten(1).amax(1) < 1e-5 for shift in shifts])
    assert fits.any(0).all()
    assert (fits.sum(1) > 90).all()  # each of the nine for about a ninth of 1,259 images
    assert torch.equal(whole(plain.train_eval_dataloader())[0], whole(moved.train_eval_dataloader())[0])
    assert torch.equal(whole(plain.val_dataloader())[0], whole(moved.val_dataloader())[0])


def test_augmented_epochs_differ_and_repeat():
    def views(seed: int, epoch: int) -> torch.Tensor:
        loader = DigitsDataModule(augment=True, seed=seed, batch_size=2000).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return next(iter(loader))[0]

    assert torch.equal(views(0, 1), views(0, 1))
    assert len({views(seed, epoch).numpy().tobytes() for seed in range(2) for epoch in range(2)}) == 4


@pytest.mark.filterwarnings("ignore:.*fork")
def test_worker_processes_give_the_same_batches():
    kwargs = {"augment": True, "train_samples": 150}
    ours = list(DigitsDataModule(**kwargs).train_dataloader())
    theirs = list(DigitsDataModule(**kwargs, num_workers=1).train_dataloader())
    assert all(torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("count", [10, 40, 137, 1259])
def test_few_labels(count):
    data = DigitsDataModule(train_samples=count)
    images, labels = whole(data.train_eval_dataloader())
    assert len(labels) == count
    per_class = torch.bincount(labels, minlength=10)
    assert per_class.min() >= 1
    assert (
        per_class.max() - per_class.min() <= 1 + 0.1 * count / 10
    )  # classes of the training split have 122 … 128 images
    full = {image.numpy().tobytes() for image in whole(DigitsDataModule().train_eval_dataloader())[0]}
    assert {image.numpy().tobytes() for image in images} <= full
    assert len(whole(data.test_dataloader())[1]) == 359


def test_names():
    data = DigitsDataModule()
    assert data.num_classes == 10
    assert data.class_names == list("0123456789")
    assert data._splits is None  # known without reading anything


def test_setup_reads_once():
    data = DigitsDataModule()
    data.setup("fit")
    splits = data.splits
    data.setup("test")
    assert data.splits is splits


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 7}, "image_size must be at least 8, the side of the original images, got 7"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"train_samples": 5}, r"train_samples must lie between the number of classes \(10\) .* \(1259\), got 5"),
        ({"train_samples": 1260}, "train_samples must lie between"),
        ({"val_share": 1.5}, "val_share must be at least 0 and below 1, got 1.5"),
        ({"val_share": 0.5, "test_share": 0.5}, r"val_share \+ test_share must be below 1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(InputError, match=message):
        DigitsDataModule(**kwargs).setup()
