"""Images in parquet files: reading, labels, the decoded cache and timm's transforms."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from timm.data import create_transform

from zoo.data import ParquetImagesDataModule
from zoo.data.parquet_table import ParquetTable
from zoo.errors import InputError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pixels(count: int, *, size: tuple[int, int] = (8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def write(
    path: Path, images: Any, labels: Any, *, struct: bool = True, names: list[str] | None = None, **options: Any
) -> str:
    cells = [encode(image) if isinstance(image, np.ndarray) else image for image in images]
    if struct:
        column = pa.array(
            [{"bytes": cell, "path": None} for cell in cells], pa.struct({"bytes": "binary", "path": "string"})
        )
    else:
        column = pa.array(cells, pa.binary())
    table = pa.table({"img": column, "label": labels if isinstance(labels, pa.Array) else pa.array(labels)})
    if names:  # as Hugging Face datasets declares a ClassLabel
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "train.parquet", pixels(40), [0, 1] * 20, row_group_size=7)


def whole(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def normal(images: np.ndarray) -> torch.Tensor:
    scaled = torch.tensor(images / 255).permute(0, 3, 1, 2)
    return (scaled - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("cache", ["decoded", None])
def test_values(tmp_path, struct, cache):
    files = [write(tmp_path / f"{n}.parquet", pixels(10, seed=n), [0, 1, 2, 1, 0] * 2, struct=struct) for n in (1, 2)]
    test = write(tmp_path / "test.parquet", pixels(6, seed=3), [2, 1, 0] * 2, struct=struct)
    options = {"image_size": 8, "eval_transform": {"crop_pct": 1.0}} if cache is None else {}
    data = ParquetImagesDataModule(files, test=test, val_share=0.0, cache=cache, batch_size=7, **options)
    images, labels = whole(data.train_eval_dataloader())
    close(images, normal(np.concatenate([pixels(10, seed=1), pixels(10, seed=2)])))
    assert labels.tolist() == [0, 1, 2, 1, 0] * 4
    assert labels.dtype == torch.int64
    images, labels = whole(data.test_dataloader())
    close(images, normal(pixels(6, seed=3)))
    assert labels.tolist() == [2, 1, 0] * 2
    assert data.num_classes == 3
    assert data.class_names == ["0", "1", "2"]


def test_jpeg_greyscale_and_palette_become_rgb(tmp_path):
    image = Image.fromarray(pixels(1, size=(16, 12))[0])
    streams = [io.BytesIO() for _ in range(3)]
    image.save(streams[0], "JPEG")
    image.convert("L").save(streams[1], "PNG")
    image.convert("P").save(streams[2], "GIF")
    path = write(tmp_path / "a.parquet", [stream.getvalue() for stream in streams], [0, 1, 2])
    data = ParquetImagesDataModule(path, cache="decoded", val_share=0.0)
    images, _ = whole(data.train_eval_dataloader())
    decoded = [np.asarray(Image.open(stream).convert("RGB")) for stream in streams]
    close(images, normal(np.stack(decoded)))


def test_identity_cached_training_views_are_crops_and_flips(train):
    data = ParquetImagesDataModule(train, cache="decoded", val_share=0.0, batch_size=40)
    loader = data.train_dataloader()
    order = list(loader.sampler)
    ((views, labels),) = loader
    assert labels.tolist() == [[0, 1][index % 2] for index in order]
    images = torch.tensor(pixels(40)[order]).permute(0, 3, 1, 2)
    both = [F.pad(turned, (4,) * 4) for turned in (images, images.flip(-1))]
    crops = [padded[:, :, a : a + 8, b : b + 8] for padded in both for a in range(9) for b in range(9)]
    fits = torch.stack(
        [(views - normal(crop.permute(0, 2, 3, 1).numpy())).abs().flatten(1).amax(1) < 1e-5 for crop in crops]
    )
    assert fits.any(0).all()
    assert fits[:81].any()  # not flipped
    assert fits[81:].any()
    loader.sampler.set_epoch(1)
    assert not torch.equal(whole(loader)[0].sort(0).values, views.sort(0).values)


def test_cached_training_views_without_augmentation(train):
    options = {"crop_padding": 0, "hflip": 0}
    data = ParquetImagesDataModule(train, cache="decoded", val_share=0.0, train_transform=options)
    loader = data.train_dataloader()
    close(whole(loader)[0], normal(pixels(40)[list(loader.sampler)]))


def test_lazy_transforms_are_timms(tmp_path):
    sizes = [(20, 30), (16, 16), (40, 18), (17, 25)]
    images = [pixels(1, size=size, seed=n)[0] for n, size in enumerate(sizes)]
    path = write(tmp_path / "a.parquet", images, [0, 1, 0, 1])
    options = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 1.0, "color_jitter": None}
    data = ParquetImagesDataModule(path, image_size=12, val_share=0.0, train_transform=options)
    transform = create_transform(12, mean=tuple(MEAN), std=tuple(STD))
    expected = torch.stack([transform(Image.fromarray(image)) for image in images])
    assert torch.equal(whole(data.train_eval_dataloader())[0], expected)
    square = ParquetImagesDataModule(
        write(tmp_path / "b.parquet", pixels(4, size=(12, 12)), [0, 1] * 2),
        image_size=12, val_share=0.0, train_transform=options,
    )  # fmt: skip
    loader = square.train_dataloader()
    close(whole(loader)[0].flip(-1), normal(pixels(4, size=(12, 12))[list(loader.sampler)]))


def test_image_size_resizes_once_with_a_cache(tmp_path):
    images = [pixels(1, size=size)[0] for size in ((8, 8), (10, 6))]
    path = write(tmp_path / "a.parquet", images, [0, 1])
    data = ParquetImagesDataModule(path, cache="decoded", image_size=5, val_share=0.0)
    resized = [np.asarray(Image.fromarray(image).resize((5, 5), Image.Resampling.BILINEAR)) for image in images]
    close(whole(data.train_eval_dataloader())[0], normal(np.stack(resized)))


@pytest.mark.parametrize("cache", ["decoded", None])
def test_validation_split_is_stratified_disjoint_and_fixed(train, cache):
    def parts(**kwargs: Any) -> list[set[bytes]]:
        data = ParquetImagesDataModule(train, cache=cache, image_size=8, val_share=0.25, **kwargs)
        loaders = data.train_eval_dataloader(), data.val_dataloader()
        assert [torch.bincount(whole(loader)[1]).tolist() for loader in loaders] == [[15, 15], [5, 5]]
        return [{image.numpy().tobytes() for image in whole(loader)[0]} for loader in loaders]

    torch.manual_seed(0)
    first = parts()
    assert len(first[0] | first[1]) == 40
    torch.manual_seed(1)
    assert parts(seed=5) == first
    assert parts(split_seed=5) != first


def test_own_validation_files(train, tmp_path):
    val = write(tmp_path / "val.parquet", pixels(3, seed=9), [1, 1, 0])
    data = ParquetImagesDataModule(train, val=val, cache="decoded")
    assert len(whole(data.train_eval_dataloader())[1]) == 40
    close(whole(data.val_dataloader())[0], normal(pixels(3, seed=9)))


def test_string_labels_are_numbered_in_sorted_order(tmp_path):
    labels = ["dog", "cat", "ant", "cat"]
    path = write(tmp_path / "a.parquet", pixels(4), labels)
    coded = write(tmp_path / "b.parquet", pixels(2), pa.array(["cat", "ant"]).dictionary_encode())
    data = ParquetImagesDataModule(path, test=coded, cache="decoded", val_share=0.0)
    assert data.class_names == ["ant", "cat", "dog"]
    assert whole(data.train_eval_dataloader())[1].tolist() == [2, 1, 0, 1]
    assert whole(data.test_dataloader())[1].tolist() == [1, 0]
    given = ParquetImagesDataModule(path, class_names=["dog", "cat", "ant"], cache="decoded", val_share=0.0)
    assert whole(given.train_eval_dataloader())[1].tolist() == [0, 1, 2, 1]


def test_class_names_are_given_or_declared(tmp_path):
    path = write(tmp_path / "a.parquet", pixels(4), [0, 2, 0, 2], names=["ant", "bee", "cow"])
    assert ParquetImagesDataModule(path).class_names == ["ant", "bee", "cow"]
    data = ParquetImagesDataModule(path, class_names=["a", "b", "c", "d"], cache="decoded", val_share=0.0)
    assert data.num_classes == 4
    assert data._splits is None  # no image was read for that
    assert whole(data.train_eval_dataloader())[1].tolist() == [0, 2, 0, 2]


def test_patterns_and_folder_names(tmp_path):
    for n in (2, 1):
        write(tmp_path / "label=7" / f"train-{n}.parquet", pixels(2, seed=n), [0, 1])
    data = ParquetImagesDataModule(str(tmp_path / "label=7" / "train-*.parquet"), cache="decoded", val_share=0.0)
    close(whole(data.train_eval_dataloader())[0], normal(np.concatenate([pixels(2, seed=1), pixels(2, seed=2)])))


@pytest.mark.parametrize(
    ("name", "path", "revision"),
    [
        ("hf://datasets/me/tiny/plain/train.parquet", "plain/train.parquet", None),
        ("hf://datasets/me/tiny/train.parquet@v1.0", "train.parquet", "v1.0"),
        ("hf://datasets/me/tiny/train.parquet@refs/convert/parquet", "train.parquet", "refs/convert/parquet"),
        ("hf://datasets/me/tiny@abc123/plain/train.parquet", "plain/train.parquet", "abc123"),
        ("hf://datasets/me/tiny@refs%2Fpr%2F1/train.parquet", "train.parquet", "refs/pr/1"),
    ],
)
def test_files_of_the_hub(train, monkeypatch, name, path, revision):
    calls = []

    def download(repo_id, filename, *, repo_type, revision):
        calls.append((repo_id, filename, repo_type, revision))
        return train

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    data = ParquetImagesDataModule(name, cache="decoded")
    data.prepare_data()
    assert calls == [("me/tiny", path, "dataset", revision)]
    assert len(whole(data.train_dataloader())[1]) == 36


def test_bad_files_of_the_hub(monkeypatch):
    def download(*args, **kwargs):
        raise EntryNotFoundError("404: no such entry")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError, match=r"hf://datasets/me/tiny/a.parquet cannot be had from the Hub: 404"):
        ParquetImagesDataModule("hf://datasets/me/tiny/a.parquet").prepare_data()
    for name in ("hf://me/tiny/a.parquet", "hf://datasets/tiny/a.parquet", "hf://datasets/me/tiny@v1/a.parquet@v2"):
        with pytest.raises(InputError, match=r"is no Hub file; expected hf://datasets/owner/name/path.parquet"):
            ParquetImagesDataModule(name).prepare_data()


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_give_the_same_batches(train, method):
    def loader(**kwargs: Any) -> Any:
        return ParquetImagesDataModule(train, image_size=8, batch_size=16, **kwargs).train_dataloader()

    workers = loader(num_workers=1)
    workers.multiprocessing_context = method
    for ours, theirs in zip(loader(), workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_only_names_of_files_are_pickled(tmp_path):
    path = write(tmp_path / "a.parquet", pixels(4, size=(64, 64)), [0, 1, 0, 1])
    table = ParquetTable([path], "img", "label")
    table.read()
    text = pickle.dumps(table)
    assert len(text) < 1000
    assert (np.asarray(pickle.loads(text).image(3)) == pixels(4, size=(64, 64))[3]).all()


def test_shards_of_processes(train):
    everything = whole(ParquetImagesDataModule(train, cache="decoded").train_eval_dataloader())[0]
    for rank in range(3):
        data = ParquetImagesDataModule(train, cache="decoded")
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank)
        assert torch.equal(whole(data.train_eval_dataloader())[0], everything[rank::3])


def test_arguments_are_json(train):
    kwargs = {"train": [train], "cache": "decoded", "mean": [0.5] * 3, "train_transform": {"crop_padding": 2}}
    data = ParquetImagesDataModule(**json.loads(json.dumps(kwargs)))
    assert next(iter(data.train_dataloader()))[0].shape == (36, 3, 8, 8)


def test_bad_files(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    empty = write(tmp_path / "empty.parquet", [], pa.array([], pa.int64()))
    for name, message in (
        (str(tmp_path / "none.parquet"), r"train: there is no file '.*none\.parquet'"),
        (str(tmp_path / "none-*.parquet"), r"train: no file matches '.*none-\*"),
        (str(tmp_path), r"is a folder; name its files, for example .*/\*\.parquet"),
        ([], "train must name at least one parquet file"),
        (str(tmp_path / "text.parquet"), r"text\.parquet is no readable parquet file"),
        (empty, r"empty\.parquet: no rows"),
    ):
        with pytest.raises(InputError, match=message):
            ParquetImagesDataModule(name).setup()


def test_bad_columns(train, tmp_path):
    for kwargs, message in (
        ({"image_column": "image"}, r"train\.parquet has no column 'image'\. Did you mean img\? It has: img, label"),
        ({"label_column": "labels"}, "has no column 'labels'. Did you mean label"),
        ({"image_column": "label"}, "the image column 'label' must be binary, or a struct .* it is int64"),
        ({"label_column": "img"}, "the label column 'img' must hold integers or strings; it is struct"),
    ):
        with pytest.raises(InputError, match=message):
            ParquetImagesDataModule(train, **kwargs).setup()
    other = tmp_path / "test.parquet"
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), other)
    with pytest.raises(InputError, match=r"test\.parquet has no column 'img'"):
        ParquetImagesDataModule(train, test=str(other)).setup()


def test_bad_labels(tmp_path):
    first = write(tmp_path / "a.parquet", pixels(4), [0, 1, 0, 1])
    for labels, message in (
        ([0, None, 1], r"b\.parquet, row 1: the label column 'label' is null"),
        (pa.nulls(3), r"b\.parquet, row 0: the label column 'label' is null"),
        ([0.0, 1.0, 2.0], "must hold integers or strings; it is double"),
        (["a", "b", "c"], "holds integers in one file and strings in another"),
        ([5, 1, 2], "integer labels must be 0 … K-1 with every class present, got 0 … 5 without 3, 4; renumber"),
        ([-1, 1, 2], "got -1 … 2"),
    ):
        path = write(tmp_path / "b.parquet", pixels(3), labels)
        with pytest.raises(InputError, match=message):
            ParquetImagesDataModule([first, path]).setup()
    for labels, message in (
        ([0, 2], r"test\.parquet, row 1: label 2 is outside 0 … 1, the 2 classes"),
        (["0", "1"], "row 0: labels are strings, in the training data they are integers"),
    ):
        path = write(tmp_path / "test.parquet", pixels(2), labels)
        with pytest.raises(InputError, match=message):
            ParquetImagesDataModule(first, test=path, cache="decoded", val_share=0.0).setup()
    named = write(tmp_path / "named.parquet", pixels(2), ["cat", "dog"])
    path = write(tmp_path / "test.parquet", pixels(2), ["cat", "dogg"])
    with pytest.raises(InputError, match=r"row 1: label 'dogg' is no class\. Did you mean dog"):
        ParquetImagesDataModule(named, test=path, cache="decoded", val_share=0.0).setup()
    with pytest.raises(InputError, match="label 1 is outside 0 … 0, the 1 classes"):
        ParquetImagesDataModule(first, class_names=["only"]).setup()


@pytest.mark.parametrize("cache", ["decoded", None])
def test_bad_images(tmp_path, cache):
    good = list(pixels(3, size=(64, 64)))
    files = [write(tmp_path / "a.parquet", good, [0, 1, 0])]
    cut = encode(good[0])
    for cell, message in (
        (b"no image", r"b\.parquet, row 2: the image cannot be decoded: cannot identify"),
        (cut[: len(cut) // 2], r"b\.parquet, row 2: the image cannot be decoded"),
        (None, r"b\.parquet, row 2: the image column 'img' holds no bytes"),
    ):
        path = write(tmp_path / "b.parquet", [*good[:2], cell], [1, 0, 1])
        data = ParquetImagesDataModule([*files, path], cache=cache, val_share=0.0)
        with pytest.raises(InputError, match=message):
            whole(data.train_dataloader())


def test_bad_sizes_with_a_cache(tmp_path):
    path = write(tmp_path / "a.parquet", [pixels(1)[0], pixels(1, size=(9, 7))[0]], [0, 1])
    with pytest.raises(InputError, match=r"row 1: the image has 7x9 pixels, the first one 8x8; set image_size"):
        ParquetImagesDataModule(path, cache="decoded", val_share=0.0).setup()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cache": "disk"}, "cache must be 'decoded' or None, got 'disk'"),
        (
            {"cache": "decoded", "train_transform": {"auto_augment": "x"}},
            "cache='decoded' has no option 'auto_augment'",
        ),
        ({"cache": "decoded", "eval_transform": {"crop_pct": 1.0}}, "cache='decoded' has no option 'crop_pct'"),
        (
            {"cache": "decoded", "train_transform": {"crop_padding": -1}},
            "crop_padding must be an integer from 0 to 1000",
        ),
        ({"cache": "decoded", "train_transform": {"hflip": 1.5}}, "hflip must be a probability, got 1.5"),
        ({"cache": "decoded", "image_size": 0}, "image_size must be at least 1, got 0"),
        ({"cache": "decoded", "std": [1.0, 1.0]}, "mean and std must have three numbers each"),
        ({"train_transform": {"crop_padding": 4}}, "train_transform has no option 'crop_padding'"),
        ({"image_size": -1}, "image_size must be at least 1, got -1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(InputError, match=message):
        ParquetImagesDataModule("a.parquet", **kwargs)


@pytest.mark.parametrize("cache", ["decoded", None])
def test_training_batches_with_an_index(train, cache):
    options = {"cache": cache, "image_size": 8, "batch_size": 7}
    plain, indexed = (ParquetImagesDataModule(train, **options, with_index=flag) for flag in (False, True))
    for (x, y), (same_x, same_y, index), rows in zip(
        plain.train_dataloader(), indexed.train_dataloader(), indexed.train_dataloader().batch_sampler, strict=True
    ):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
        assert index.tolist() == rows
    assert len(next(iter(indexed.val_dataloader()))) == 2
