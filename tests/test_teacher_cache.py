"""The cached teacher equals the live one, and is refused wherever it might not."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from tests.teachers import SAMPLES, build, loader, teacher
from zoo import towers
from zoo.data.indexed import IndexedDataset
from zoo.errors import InputError
from zoo.teacher_cache import TeacherCache


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return build(tmp_path / "teacher.safetensors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher.safetensors"


def in_order() -> list[Any]:
    return [loader().dataset.__getitems__(list(range(i, min(i + 40, SAMPLES)))) for i in range(0, SAMPLES, 40)]


# -- values ---------------------------------------------------------------------------------------------------------


def test_identity_lookup_is_the_live_teacher_bit_for_bit(cache):
    live = teacher()
    for x, y, index in in_order():
        features, logits = cache.lookup(index, y)
        with torch.no_grad():
            expected = live.features_and_logits(x)
        assert torch.equal(features, expected[0])
        assert torch.equal(logits, expected[1])
    assert (len(cache), cache.dim, cache.num_classes) == (SAMPLES, 64, 10)


def test_identity_lookup_follows_a_shuffled_order(cache):
    live = teacher()
    for x, y, index in loader():
        features, logits = cache.lookup(index, y)
        with torch.no_grad():
            torch.testing.assert_close((features, logits), live.features_and_logits(x), rtol=1e-5, atol=1e-6)
    rows = torch.tensor([149, 0, 149])
    assert torch.equal(cache.lookup(rows)[1], torch.stack([cache.lookup(row[None])[1][0] for row in rows]))
    assert cache.lookup(torch.tensor([], dtype=torch.int64))[0].shape == (0, 64)


def test_half_precision(tmp_path, cache):
    half = build(tmp_path / "half.safetensors", dtype="float16")
    rows = torch.tensor([3, 77, 1])
    for narrow, wide in zip(half.lookup(rows), cache.lookup(rows), strict=True):
        assert narrow.dtype == torch.float32
        assert torch.equal(narrow, wide.half().float())
    assert half.path.stat().st_size < 0.6 * cache.path.stat().st_size


def test_precision_is_that_of_the_call(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        cache = build(tmp_path / "narrow.safetensors")
        x, _, index = in_order()[0]
        with torch.no_grad():
            expected = teacher().features_and_logits(x)
    assert cache.facts.precision == "bfloat16"
    assert torch.equal(cache.lookup(index)[1], expected[1].float())


def test_identity_class_means_are_means(cache):
    labels = torch.cat([y for _, y, _ in in_order()])
    features = cache.lookup(torch.arange(SAMPLES))[0].double()
    means, counts = cache.class_means()
    for label in range(10):
        torch.testing.assert_close(means[label], features[labels == label].mean(0), rtol=1e-12, atol=0)
    assert counts.tolist() == labels.bincount(minlength=10).tolist()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_worker_processes_and_pairs_give_the_same_file(tmp_path, cache):
    for number, source in enumerate((loader(num_workers=1), loader(with_index=False), loader(seed=5))):
        other = TeacherCache.build(tmp_path / str(number), teacher(), source, progress=False)
        assert other.path.read_bytes() == cache.path.read_bytes()


def test_loaders_that_make_their_batches_otherwise(tmp_path, cache):
    data = loader().dataset.dataset
    items = IndexedDataset([data[row] for row in range(SAMPLES)])
    by_item = DataLoader(items, batch_size=40, shuffle=True)
    by_sampler = DataLoader(items, batch_sampler=torch.utils.data.BatchSampler(range(SAMPLES), 40, drop_last=False))
    for number, source in enumerate((by_item, by_sampler)):
        other = TeacherCache.build(tmp_path / str(number), teacher(), source, progress=False)
        other.check_data(source)
        assert other.path.read_bytes() == cache.path.read_bytes()


def test_random_generators_and_the_teacher_stay_as_they_were(path):
    live = teacher().train()
    before = torch.get_rng_state(), towers.fingerprint(live.network)
    cache = TeacherCache.build(path, live, loader(), progress=False)
    cache.check_data(loader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert towers.fingerprint(live.network) == before[1]
    assert not live.network.training
    assert torch.equal(cache.lookup(torch.arange(40))[1], teacher()(in_order()[0][0]))


def test_pickles_as_its_path(cache):
    stored = pickle.dumps(cache)
    assert len(stored) < 1000
    rows = torch.tensor([5, 2])
    assert torch.equal(pickle.loads(stored).lookup(rows)[0], cache.lookup(rows)[0])


# -- data that cannot be cached -------------------------------------------------------------------------------------


class Noisy(Dataset):
    """Draws from the global generator, as torchvision's transforms do; one image in three only."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.ones(1, 8, 8) * (torch.rand(()) if index % 3 == 0 else 1.0), index % 10


class Items(Dataset):
    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.item


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


def mixup(items: Any) -> Any:
    x, y = default_collate(items)
    return x + torch.rand(()) * x.flip(0), y


def random_sizes(items: Any) -> Any:
    x, y = default_collate(items)
    random_sizes.side = getattr(random_sizes, "side", 3) + 1
    return x[..., : random_sizes.side], y


def test_bad_random_transforms(path):
    message = (
        r"random \(\d+ of 64 images differ between epochs\).* set data.augment=false, .* or leave teacher_cache out"
    )
    with pytest.raises(InputError, match=message):
        TeacherCache.build(path, teacher(), loader(augment=True))
    with pytest.raises(InputError, match=r"random \(2\d of 64"):
        TeacherCache.build(path, teacher(), DataLoader(Noisy(), batch_size=30))
    fixed = TensorDataset(torch.rand(90, 1, 8, 8), torch.zeros(90).long())
    with pytest.raises(InputError, match="random"):
        TeacherCache.build(path, teacher(), DataLoader(fixed, batch_size=30, collate_fn=mixup))
    with pytest.raises(InputError, match=r"random \(64 of 64"):
        TeacherCache.build(path, teacher(), DataLoader(fixed, batch_size=30, collate_fn=random_sizes))
    assert list(path.parent.iterdir()) == []


IMAGE = torch.ones(1, 8, 8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DataLoader(Stream()), "Stream has no positions by which"),
        (DataLoader(Items((IMAGE, 1)), batch_size=None), "give it a batch_size"),
        (DataLoader(TensorDataset(torch.ones(0, 1), torch.ones(0))), "the training data set is empty"),
        (DataLoader(Items({"image": IMAGE}), batch_size=2), r"needs batches \(x, targets, index\)"),
        (
            DataLoader(Items((IMAGE, torch.ones(10) / 10)), batch_size=2),
            r"needs integer labels \(B,\), got torch.float32",
        ),
        (DataLoader(Items((IMAGE, 1, 0)), batch_size=2), "must be its position .* outermost wrapper"),
        (
            DataLoader(Items((IMAGE, 1)), batch_size=2, collate_fn=lambda items: (IMAGE, torch.ones(()))),
            "needs batches",
        ),
        ([1], "needs one training DataLoader, got list"),
    ],
)
def test_bad_data(path, source, message):
    with pytest.raises(InputError, match=message):
        TeacherCache.build(path, teacher(), source)
    assert not path.exists()


def test_bad_arguments(path):
    with pytest.raises(InputError, match="needs a frozen teacher"):
        TeacherCache.build(path, towers.create("zoo/resnet8", num_classes=10), loader())
    with pytest.raises(InputError, match="dtype must be one of float32, float16, got 'int8'"):
        build(path, dtype="int8")
    with pytest.raises(InputError, match="options must be JSON values"):
        build(path, options={"norm": nn.LayerNorm})


# -- a cache of something else --------------------------------------------------------------------------------------


def test_check_data_accepts_its_own(cache):
    cache.check_data(loader(seed=9, batch_size=7))


def test_bad_other_data(cache):
    known = loader().dataset.dataset
    x, y = known.__getitems__(list(range(SAMPLES)))

    def refused(images: Any, labels: Any, message: str) -> None:
        source = DataLoader(IndexedDataset(TensorDataset(images, labels)), batch_size=40)
        with pytest.raises(InputError, match=message + r".*delete .*teacher\.safetensors to build it anew"):
            cache.check_data(source)

    refused(x[:149], y[:149], "holds 150 samples, the training data have 149")
    turned = torch.arange(SAMPLES).flip(0)
    refused(
        x[turned], y[turned], r"\d+ of 64 labels are not those of .* \(sample 0 has \d, there \d\): .* another order"
    )
    refused(
        x * 1.01, y, r"64 of 64 images are not those of .*first is sample 0.*another transform, size or normalisation"
    )
    refused(torch.cat((x, x), 2), y, "64 of 64 images")
    one = x.clone()
    one[149, 0, 0, 0] += 1
    refused(one, y, r"1 of 64 images .*first is sample 149")


def test_bad_batches_without_an_index(cache):
    with pytest.raises(InputError, match=r"set data\.with_index=true, or wrap your data set in zoo\.data\.indexed"):
        cache.check_data(loader(with_index=False))
    inner = Subset(IndexedDataset(loader().dataset.dataset), list(range(SAMPLES))[::-1])
    with pytest.raises(InputError, match="outermost wrapper"):
        cache.check_data(DataLoader(inner, batch_size=40, collate_fn=lambda batch: batch))


def test_bad_lookups(cache):
    for rows in ([150], [-1, 3]):
        with pytest.raises(InputError, match=r"index must be in 0 … 149, the samples in .*have grown or are others"):
            cache.lookup(torch.tensor(rows))
    _, y, index = in_order()[1]
    with pytest.raises(InputError, match="in another order, or others"):
        cache.lookup(index, y.flip(0))
    with pytest.raises(InputError, match="in another order, or others"):
        cache.lookup(index, y[:1])
    for wrong in (torch.tensor([0.5]), torch.tensor([[1]]), torch.zeros(2, dtype=torch.int64, device="meta")):
        with pytest.raises(InputError, match=r"index must be integers \(B,\) on the CPU"):
            cache.lookup(wrong)


def test_check_teacher_by_fingerprint(cache):
    assert cache.tower_facts == {"name": "zoo/resnet8", "revision": None, "sha256": teacher().fingerprint}
    cache.check_teacher(teacher())
    with pytest.raises(
        InputError, match=r"another teacher: zoo/resnet8 with SHA-256 \w{12}…, expected zoo/resnet8 with"
    ):
        cache.check_teacher(teacher(seed=1))
    cache.check_teacher(teacher().fingerprint)
    with pytest.raises(
        InputError,
        match=r"another teacher: zoo/resnet8 with SHA-256 \w{12}…, expected SHA-256 0{12}…; give another path",
    ):
        cache.check_teacher("0" * 64)
    with pytest.raises(InputError, match="'zoo/resnet8' is a bare architecture with random weights"):
        cache.check_teacher("zoo/resnet8")


def test_check_teacher_by_name(path, monkeypatch):
    tower = teacher()
    tower.name = "timm/resnet18.a1_in1k"  # no network here: the weights behind a name are not looked at
    cache = TeacherCache.build(path, tower, loader(), options={"in_chans": 1}, progress=False)
    monkeypatch.setattr(towers, "build", None)
    cache.check_teacher("timm/resnet18.a1_in1k", {"in_chans": 1})
    with pytest.raises(InputError, match=re.escape("teacher: timm/resnet18.a1_in1k, expected timm/resnet18.a2_in1k;")):
        cache.check_teacher("timm/resnet18.a2_in1k", {"in_chans": 1})
    with pytest.raises(InputError, match=re.escape('with options {"in_chans": 1}, expected {};')):
        cache.check_teacher("timm/resnet18.a1_in1k")


def test_check_teacher_by_the_weights_of_its_folder(tmp_path, path):
    from zoo.lightning_modules.classifier import Classifier

    def store(seed: int) -> str:
        torch.manual_seed(seed)
        model = Classifier("zoo/resnet8", num_classes=10, student_options={"in_chans": 1})
        model.save_pretrained(tmp_path / "stored")
        return str(tmp_path / "stored")

    name = store(0)
    cache = TeacherCache.build(path, towers.create(name, frozen=True), loader(), progress=False)
    cache.check_teacher(name)
    store(1)
    with pytest.raises(InputError, match=r"another teacher: /.* with SHA-256 \w{12}…, expected /.* with SHA-256"):
        cache.check_teacher(name)
