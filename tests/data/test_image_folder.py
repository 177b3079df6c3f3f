"""Folders of images and torchvision's data sets under timm's transforms."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.data import create_transform

from zoo.data import ImageFolderDataModule
from zoo.data.image_folder import _NAMED
from zoo.errors import InputError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def paint(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def write(folder: Path, classes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            paint(1000 * number + index).save(folder / name / f"{index:03}.png")
    return folder


@pytest.fixture
def flat(tmp_path: Path) -> str:
    return str(write(tmp_path / "flat", {"ant": 10, "bee": 20}))


@pytest.fixture
def split(tmp_path: Path) -> str:
    for name, count in (("train", 6), ("val", 2), ("test", 3)):
        write(tmp_path / "split" / name, {"ant": count, "bee": count})
    return str(tmp_path / "split")


def whole(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_identity_evaluation_transform_is_timms(split):
    options = {"crop_pct": 0.8, "interpolation": "bicubic"}
    data = ImageFolderDataModule(split, image_size=16, batch_size=3, eval_transform=options)
    transform = create_transform(16, mean=tuple(MEAN), std=tuple(STD), **options)
    for loader, name in (
        (data.train_eval_dataloader(), "train"),
        (data.val_dataloader(), "val"),
        (data.test_dataloader(), "test"),
        (data.predict_dataloader(), "test"),
    ):
        files = sorted(Path(split, name).rglob("*.png"))
        images, labels = whole(loader)
        assert torch.equal(images, torch.stack([transform(Image.open(file)) for file in files]))
        assert labels.tolist() == [["ant", "bee"].index(file.parent.name) for file in files]
    assert data.num_classes == 2
    assert data.class_names == ["ant", "bee"]


def test_training_transform_is_timms(split):
    # Without anything random, the training transform has one result, whatever the seed.
    options = {"scale": [1.0, 1.0], "ratio": [4 / 3, 4 / 3], "hflip": 1.0, "color_jitter": None}
    data = ImageFolderDataModule(split, image_size=24, train_transform=options, mean=[0.5] * 3, std=[0.5] * 3)
    loader = data.train_dataloader()
    images, _ = whole(loader)
    transform = create_transform(24, is_training=True, mean=(0.5,) * 3, std=(0.5,) * 3, **options)
    files = sorted(Path(split, "train").rglob("*.png"))
    assert torch.equal(images, torch.stack([transform(Image.open(files[index])) for index in loader.sampler]))


def test_views_depend_on_seed_epoch_and_index_only(flat):
    options = {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5, "re_mode": "pixel"}

    def views(epoch: int, **kwargs: Any) -> dict[int, bytes]:
        loader = ImageFolderDataModule(flat, image_size=16, train_transform=options, **kwargs).train_dataloader()
        loader.sampler.set_epoch(epoch)
        images, _ = whole(loader)
        return {int(index): image.numpy().tobytes() for index, image in zip(loader.sampler, images, strict=True)}

    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = views(3, batch_size=4)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    random.seed(5)
    torch.manual_seed(5)
    assert views(3, batch_size=11) == first
    for other in (views(4), views(3, seed=1)):
        assert other.keys() == first.keys()
        assert all(other[index] != first[index] for index in first)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_worker_processes_give_the_same_batches(flat):
    kwargs = {"image_size": 16, "batch_size": 8, "train_transform": {"auto_augment": "rand-m9-mstd0.5"}}
    ours = list(ImageFolderDataModule(flat, **kwargs).train_dataloader())
    theirs = list(ImageFolderDataModule(flat, **kwargs, num_workers=1).train_dataloader())
    assert all(torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def test_flat_folder_is_split_by_class(flat):
    data = ImageFolderDataModule(flat, image_size=8, val_share=0.2, test_share=0.1)
    parts = [whole(loader()) for loader in (data.train_eval_dataloader, data.val_dataloader, data.test_dataloader)]
    assert [torch.bincount(labels).tolist() for _, labels in parts] == [[7, 14], [2, 4], [1, 2]]
    assert len({image.numpy().tobytes() for images, _ in parts for image in images}) == 30
    again = ImageFolderDataModule(flat, image_size=8, val_share=0.2, test_share=0.1, seed=9)
    assert torch.equal(whole(again.val_dataloader())[0], parts[1][0])
    other = ImageFolderDataModule(flat, image_size=8, val_share=0.2, test_share=0.1, split_seed=1)
    assert not torch.equal(whole(other.val_dataloader())[0], parts[1][0])


def test_shares_hold_only_where_a_split_is_missing(split, tmp_path):
    data = ImageFolderDataModule(split, image_size=8, val_share=0.5, test_share=0.4)
    assert [len(whole(loader())[1]) for loader in (data.train_dataloader, data.val_dataloader)] == [12, 4]
    write(tmp_path / "two" / "train", {"ant": 10, "bee": 10})
    write(tmp_path / "two" / "validation", {"ant": 1, "bee": 1})
    data = ImageFolderDataModule(str(tmp_path / "two"), image_size=8)
    assert [len(whole(loader())[1]) for loader in (data.train_dataloader, data.val_dataloader)] == [20, 2]
    with pytest.raises(InputError, match="ImageFolderDataModule has no test split"):
        data.test_dataloader()


def test_a_class_may_be_called_train(tmp_path):
    data = ImageFolderDataModule(str(write(tmp_path / "vehicles", {"car": 5, "train": 5})), image_size=8)
    assert data.class_names == ["car", "train"]


def test_shards_of_processes(flat):
    whole_set = whole(ImageFolderDataModule(flat, image_size=8).train_eval_dataloader())[0]
    for rank in range(2):
        data = ImageFolderDataModule(flat, image_size=8)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        assert torch.equal(whole(data.train_eval_dataloader())[0], whole_set[rank::2])


def write_mnist(root: Path, count: int) -> None:
    """torchvision's own reader takes the idx format: magic number, sizes, bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, size in (("train", count), ("t10k", 10)):
        pixels = np.random.default_rng(size).integers(0, 256, (size, 28, 28), dtype=np.uint8)
        header = np.array([0x803, size, 28, 28], dtype=">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.arange(size, dtype=np.uint8) % 10
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, size], ">i4").tobytes() + labels.tobytes()
        )


def test_torchvision_data_set_by_name(tmp_path):
    write_mnist(tmp_path, 100)
    data = ImageFolderDataModule(str(tmp_path), dataset="MNIST", image_size=28, eval_transform={"crop_pct": 1.0})
    images, labels = whole(data.test_dataloader())
    raw = np.random.default_rng(10).integers(0, 256, (10, 28, 28), dtype=np.uint8) / 255
    expected = (torch.tensor(raw).unsqueeze(1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(images.double(), expected.double(), rtol=0, atol=1e-5)
    assert labels.tolist() == list(range(10))
    assert torch.bincount(whole(data.val_dataloader())[1]).tolist() == [1] * 10
    assert len(whole(data.train_dataloader())[1]) == 90
    assert data.num_classes == 10
    assert data.class_names[3] == "3 - three"


def test_download_is_asked_for_once_and_only_if_wanted(tmp_path, monkeypatch):
    calls = []

    class FakeCIFAR10:
        classes, targets = ["cat", "dog"], [0, 1] * 10

        def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
            calls.append((root, train, download))

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return paint(index), index % 2

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    data = ImageFolderDataModule("there", dataset="CIFAR10", download=True)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0)
    data.prepare_data()
    assert calls == [("there", True, True), ("there", False, True)]
    data.setup()
    assert calls[2:] == [("there", True, False), ("there", False, False)]
    alone = ImageFolderDataModule("there", dataset="CIFAR10", download=True)  # without a trainer nobody else asks
    assert alone.num_classes == 2
    assert len(calls) == 8
    ImageFolderDataModule("there", dataset="CIFAR10").prepare_data()
    assert len(calls) == 8


@pytest.mark.parametrize("name", sorted(_NAMED))
def test_named_data_sets_exist_and_take_our_arguments(name):
    parameters = inspect.signature(getattr(torchvision.datasets, name)).parameters
    assert all(key in parameters for arguments in _NAMED[name] for key in arguments)
    assert name in ImageFolderDataModule.__doc__


def test_arguments_are_json(flat):
    kwargs = {
        "root": flat, "image_size": 8, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
        "train_transform": {"auto_augment": None, "re_prob": 0.1, "hflip": 0.0, "scale": [0.5, 1.0]},
        "eval_transform": {"crop_pct": 1.0, "crop_mode": "squash"},
    }  # fmt: skip
    data = ImageFolderDataModule(**json.loads(json.dumps(kwargs)))
    assert next(iter(data.train_dataloader()))[0].shape == (27, 3, 8, 8)


def test_bad_root(tmp_path):
    with pytest.raises(InputError, match=r"nowhere' is no folder: expected root/train/<class>/\*\.png"):
        ImageFolderDataModule(str(tmp_path / "nowhere")).setup()
    with pytest.raises(InputError, match="has no class folders: expected root/train"):
        ImageFolderDataModule(str(tmp_path)).setup()
    write(tmp_path / "half" / "test", {"ant": 1})
    with pytest.raises(InputError, match="has test/, but no train/ with class folders"):
        ImageFolderDataModule(str(tmp_path / "half")).setup()


def test_bad_empty_class(flat):
    Path(flat, "cow").mkdir()
    with pytest.raises(InputError, match=r"flat: .*cow"):
        ImageFolderDataModule(flat).setup()


def test_bad_class_folders_that_differ(split):
    Path(split, "test", "bee").rename(Path(split, "test", "wasp"))
    with pytest.raises(InputError, match=r"test has other class .* missing \['bee'\], unknown \['wasp'\]"):
        ImageFolderDataModule(split).setup()


def test_bad_image(flat):
    Path(flat, "bee", "003.png").write_bytes(b"no image")
    data = ImageFolderDataModule(flat, image_size=8)
    with pytest.raises(InputError, match=r"003\.png: the image cannot be decoded: cannot identify"):
        whole(data.train_dataloader())
    cut = Path(flat, "bee", "004.png").read_bytes()
    Path(flat, "bee", "003.png").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(InputError, match=r"003\.png: the image cannot be decoded"):
        whole(data.train_dataloader())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dataset": "CIFAR11"}, "dataset 'CIFAR11' is unknown. Did you mean CIFAR1"),
        ({"dataset": "cifar10"}, "Did you mean CIFAR10"),
        ({"dataset": "MNIST"}, "MNIST cannot be read from root='nowhere': .*Set download=true"),
        ({"dataset": "ImageNet"}, "ImageNet cannot be read from root='nowhere'"),
        ({"download": True}, "download needs the name of a data set"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"mean": [0.5]}, r"mean and std must have three numbers each, std positive, got \[0.5\]"),
        ({"std": [0.5, 0.0, 0.5]}, "std positive"),
        (
            {"train_transform": {"autoaugment": "rand-m9"}},
            "train_transform has no option 'autoaugment'. Did you mean auto_",
        ),
        ({"train_transform": {"crop_pct": 1.0}}, "train_transform has no option 'crop_pct'"),
        ({"eval_transform": {"hflip": 0.5}}, "eval_transform has no option 'hflip'"),
        ({"train_transform": {"auto_augment": "nonsense"}}, "is refused by timm.data.create_transform: AssertionError"),
        ({"eval_transform": {"interpolation": "cubism"}}, "eval_transform.* is refused by timm"),
        ({"eval_transform": {"crop_pct": "big"}}, "eval_transform.* is refused by timm"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(InputError, match=message):
        ImageFolderDataModule("nowhere", **kwargs).setup()


def test_training_batches_with_an_index(split):
    plain, indexed = (
        ImageFolderDataModule(split, image_size=16, batch_size=5, with_index=flag) for flag in (False, True)
    )
    for (x, y), (same_x, same_y, index), rows in zip(
        plain.train_dataloader(), indexed.train_dataloader(), indexed.train_dataloader().batch_sampler, strict=True
    ):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
        assert index.tolist() == rows
    assert len(next(iter(indexed.val_dataloader()))) == 2
