"""Images with captions from tables, shards and the Hub."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from tests.data.captioned import (
    EACH,
    IMAGES,
    SMALL,
    caption,
    encoded,
    pack,
    same,
    tokens,
    whole,
    write_lists,
    write_shards,
    write_table,
)
from zoo.data.image_text import ImageTextDataModule
from zoo.data.loading import EpochShuffle
from zoo.data.tar_shards import ShardShuffle
from zoo.errors import InputError

SOURCES = {"table": write_table, "lists": write_lists, "shards": write_shards}


@pytest.fixture(params=SOURCES)
def source(request: Any, tmp_path: Path) -> str:
    return SOURCES[request.param](tmp_path)


def test_identity_evaluation_has_every_caption_and_timms_view(source):
    data = ImageTextDataModule(source, label_column="kind", mean=[0.5] * 3, std=[0.25] * 3, **SMALL)
    batch = whole(data.train_eval_dataloader())
    assert batch["id"].tolist() == [number for number in range(IMAGES) for _ in range(EACH)]
    assert batch["label"].tolist() == [number % 3 for number in batch["id"].tolist()]
    texts = [caption(number, which) for number in range(IMAGES) for which in range(EACH)]
    assert torch.equal(batch["text"], tokens(texts))
    transform = create_transform(8, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, interpolation="bicubic")
    views = [transform(Image.open(io.BytesIO(encoded(number)))) for number in range(IMAGES)]
    assert torch.equal(batch["image"], torch.stack(views)[batch["id"]])
    first = whole(ImageTextDataModule(source, eval_captions="first", **SMALL).train_eval_dataloader())
    assert first["id"].tolist() == list(range(IMAGES))
    assert torch.equal(first["text"], batch["text"][::EACH])
    assert "label" not in first


def test_training_draws_a_caption_by_seed_epoch_and_index(source):
    every = tokens([caption(number, which) for number in range(IMAGES) for which in range(EACH)])

    def drawn(epoch: int, **options: Any) -> dict[int, tuple[int, bytes]]:
        crops = {"scale": (0.2, 1.0), "hflip": 0.5, "color_jitter": 0.4}
        loader = ImageTextDataModule(source, train_transform=crops, **{**SMALL, **options}).train_dataloader()
        loader.sampler.set_epoch(epoch)
        batch = whole(loader)
        which = (batch["text"][:, None] == every).all(-1).long().argmax(1)
        assert torch.equal(which // EACH, batch["id"])
        assert sorted(batch["id"].tolist()) == list(range(IMAGES))
        views = [image.numpy().tobytes() for image in batch["image"]]
        return dict(zip(batch["id"].tolist(), zip((which % EACH).tolist(), views, strict=True), strict=True))

    epochs = [drawn(epoch) for epoch in range(6)]
    assert {which for epoch in epochs for which, _ in epoch.values()} == {0, 1, 2}
    assert sum(len({epoch[number][0] for epoch in epochs}) > 1 for number in range(IMAGES)) > IMAGES / 2
    assert len({view for epoch in epochs for _, view in epoch.values()}) == 6 * IMAGES
    assert drawn(3, batch_size=7) == epochs[3]
    assert drawn(3, seed=1) != epochs[3]


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("workers", [0, 1])
def test_loader_goes_on_in_the_middle_of_an_epoch(source, workers):
    options = {**SMALL, "batch_size": 2, "shuffle_shards": 2}
    loader = ImageTextDataModule(source, **options).train_dataloader()
    loader.sampler.set_epoch(2)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    state = loader.state_dict()
    resumed = ImageTextDataModule(source, num_workers=workers, **options).train_dataloader()
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(2)
    rest, ours = list(iterator), list(resumed)
    assert len(rest) == 4
    assert all(same(a, b) for a, b in zip(ours, rest, strict=True))


def test_two_processes_share_the_images(source):
    ids, lengths = [], set()
    for rank in range(2):
        data = ImageTextDataModule(source, val_share=0.25, **SMALL)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=2, global_rank=rank, state=SimpleNamespace(fn="fit")
        )
        loader: Any = data.train_dataloader()
        lengths.add(len(loader))
        ids += whole(loader)["id"].tolist()
        val = whole(data.val_dataloader())["id"].tolist()
        assert not set(val) & set(ids)
    assert lengths == {1}
    assert len(ids) == len(set(ids)) + 1 == 10  # 9 images for training; one comes twice, so that both have 5


def test_samplers(tmp_path):
    assert type(ImageTextDataModule(write_table(tmp_path), **SMALL).train_dataloader().sampler) is EpochShuffle
    sampler = ImageTextDataModule(write_shards(tmp_path), shuffle_shards=2, **SMALL).train_dataloader().sampler
    assert isinstance(sampler, ShardShuffle)
    assert sampler.window == 2


def test_splits(source, tmp_path):
    data = ImageTextDataModule(source, val_share=0.25, test=source, **SMALL)
    train, val, test = (
        set(whole(loader)["id"].tolist())
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    assert len(train) == 9
    assert not train & val
    assert train | val == test == set(range(IMAGES))
    assert len(whole(ImageTextDataModule(source, val=source, **SMALL).val_dataloader())["id"]) == IMAGES * EACH
    assert data.class_names == []
    assert ImageTextDataModule(source, class_names=["a"], **SMALL).num_classes == 1


def test_data_set_survives_pickling(source):
    data = ImageTextDataModule(source, **SMALL)
    train = data.splits.train
    assert same(pickle.loads(pickle.dumps(train)).__getitems__([3, 1]), train.__getitems__([3, 1]))  # type: ignore[attr-defined]


def damage(folder: Path, kind: str, *, count: int = 1) -> tuple[str, str]:
    """Spoil the first images of a source; return its name and how the first is called in messages."""
    if kind == "table":
        name = write_table(folder)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(encoded(number)[:200])
        return name, "/0.png"
    for number in range(IMAGES):
        members = {f"{number}.png": encoded(number)[: 200 if number < count else None], f"{number}.txt": b"x"}
        pack(folder / f"s-{number:02}.tar", members)
    return f"{folder}/s-*.tar", "s-00.tar, 0.png"


@pytest.mark.parametrize("kind", ["table", "shards"])
def test_bad_images_are_named_or_skipped(tmp_path, kind):
    name, called = damage(tmp_path, kind)
    with pytest.raises(InputError, match=f"{called}: the image cannot be decoded"):
        whole(ImageTextDataModule(name, **SMALL).train_dataloader())
    options = {**SMALL, "on_error": "skip", "eval_captions": "first"}
    with pytest.warns(UserWarning, match=f"skipped in this process: 1; the last: .*{called}"):
        train = whole(ImageTextDataModule(name, **options).train_dataloader())
    assert sorted(train["id"].tolist()) == [1, *range(1, IMAGES)]  # the next one in its place
    with pytest.warns(UserWarning, match="skipped in this process: 1;"):
        val = whole(ImageTextDataModule(name, **options).train_eval_dataloader())
    assert val["id"].tolist() == list(range(1, IMAGES))


@pytest.mark.filterwarnings("ignore:samples that could not be read")
def test_bad_images_on_end(tmp_path):
    name, _ = damage(tmp_path, "table", count=IMAGES)
    data = ImageTextDataModule(name, on_error="skip", **SMALL)
    with pytest.raises(InputError, match=r"100 samples on end cannot be read; the last: .*png"):
        next(iter(data.train_dataloader()))
    with pytest.raises(InputError, match=r"no sample of a batch can be read, among them .*/0.png"):
        next(iter(data.train_eval_dataloader()))


def test_skipped_samples_are_counted(tmp_path):
    name, _ = damage(tmp_path, "table", count=IMAGES)
    data = ImageTextDataModule(name, on_error="skip", **SMALL)
    loader = iter(data.train_dataloader())
    with pytest.warns(UserWarning, match="skipped in this process") as caught, pytest.raises(InputError):
        next(loader)
    counts = [str(each.message).split(": ")[1].split(";")[0] for each in caught]
    assert counts == ["1", "10", "100"]


def test_bad_arguments(tmp_path):
    for match, options in (
        ("on_error must be one of raise, skip, got 'ignore'", {"on_error": "ignore"}),
        ("eval_captions must be one of all, first, got 'one'", {"eval_captions": "one"}),
        ("shuffle_shards must be at least 1, got 0", {"shuffle_shards": 0}),
        ("train_transform has no option 'crop'", {"train_transform": {"crop": 1}}),
        ("mean and std must have three numbers", {"mean": [0.5]}),
    ):
        with pytest.raises(InputError, match=match):
            ImageTextDataModule("x.csv", **options)
    with pytest.raises(InputError, match="val_share must be at least 0 and below 1"):
        ImageTextDataModule(write_table(tmp_path), val_share=1.5, **SMALL).setup()
    with pytest.raises(InputError, match="drop_last leaves no training batch"):
        ImageTextDataModule(write_shards(tmp_path), drop_last=True, **{**SMALL, "batch_size": 50}).train_dataloader()


def test_prepare_data_indexes_the_shards(tmp_path):
    data = ImageTextDataModule(write_shards(tmp_path), index_dir=str(tmp_path / "index"), **SMALL)
    data.prepare_data()
    assert len(list((tmp_path / "index").iterdir())) == 4
    assert len(whole(data.train_dataloader())["id"]) == IMAGES
