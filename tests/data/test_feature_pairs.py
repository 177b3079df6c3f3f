"""Pairs of precomputed features."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zoo.data.feature_files import FeatureFile, read_integers
from zoo.data.feature_pairs import FeaturePairsDataModule
from zoo.errors import InputError

PAIRS, IMAGES = 40, 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "image.npy", generator.normal(size=(PAIRS, 6)).astype(np.float16))
    np.save(tmp_path / "text.npy", generator.normal(size=(PAIRS, 4)).astype(np.float32))
    np.save(tmp_path / "label.npy", np.arange(PAIRS) % 4)
    np.save(tmp_path / "few.npy", generator.normal(size=(IMAGES, 6)))
    np.save(tmp_path / "which.npy", np.arange(PAIRS, dtype=np.int32) // 5)
    return tmp_path


def files(folder: Path, **more: str) -> dict[str, str]:
    names = {"image": "image.npy", "text": "text.npy", **more}
    return {name: str(folder / file) for name, file in names.items()}


def many_to_one(folder: Path, **options: Any) -> FeaturePairsDataModule:
    features = files(folder, image="few.npy")
    return FeaturePairsDataModule(features=features, index={"image": str(folder / "which.npy")}, **options)


def whole(loader: Any) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_identity_rows_of_the_files_stay_together(folder):
    features = files(folder, label="label.npy", r="image.npy")
    data = FeaturePairsDataModule(features=features, batch_size=7, test_share=0.25)
    assert data.dims == {"image": 6, "text": 4, "r": 6}
    assert data.class_names == ["0", "1", "2", "3"]
    ids = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = whole(loader)
        rows = batch["id"].numpy()
        ids += rows.tolist()
        for name, file in (("image", "image.npy"), ("r", "image.npy"), ("text", "text.npy")):
            assert batch[name].dtype == torch.float32
            assert torch.equal(batch[name], torch.from_numpy(np.load(folder / file)[rows]).float())
        assert torch.equal(batch["label"], torch.from_numpy(rows % 4))
    assert sorted(ids) == list(range(PAIRS))
    assert torch.bincount(whole(data.val_dataloader())["label"]).tolist() == [1, 1, 1, 1]


def test_safetensors_by_name(folder):
    tensors = {"image": torch.randn(PAIRS, 3, dtype=torch.bfloat16), "backbone": torch.randn(PAIRS, 5)}
    save_file(tensors, folder / "both.safetensors")
    data = FeaturePairsDataModule(
        features=files(folder, image="both.safetensors", text="both.safetensors"), tensors={"text": "backbone"}
    )
    batch = whole(data.train_eval_dataloader())
    assert torch.equal(batch["image"], tensors["image"][batch["id"]].float())
    assert torch.equal(batch["text"], tensors["backbone"][batch["id"]])


def test_files_stay_on_disk(folder):
    save_file({"x": torch.randn(PAIRS, 300)}, folder / "x.safetensors")
    np.save(folder / "x.npy", np.zeros((PAIRS, 300)))
    for name in ("x.npy", "x.safetensors"):
        file = FeatureFile(str(folder / name), "x")
        stored = pickle.dumps(file)
        assert len(stored) < 1000
        assert torch.equal(pickle.loads(stored).read(np.array([3, 5])), file.read(np.array([3, 5])))


def test_many_pairs_share_a_row(folder):
    data = many_to_one(folder, val_share=0.25)
    train, val = whole(data.train_eval_dataloader()), whole(data.val_dataloader())
    assert len(train["id"]) == 30
    assert len(val["id"]) == 10
    assert not set(train["id"].tolist()) & set(val["id"].tolist())  # no image is in both
    few = torch.from_numpy(np.load(folder / "few.npy")).float()
    assert torch.equal(train["image"], few[train["id"]])
    text = torch.from_numpy(np.load(folder / "text.npy"))
    assert torch.equal(train["text"], text[[n for n in range(PAIRS) if n // 5 in set(train["id"].tolist())]])


def test_one_pair_of_each_image_and_epoch(folder):
    data = many_to_one(folder, val_share=0.0, one_per="image", batch_size=3)
    text = torch.from_numpy(np.load(folder / "text.npy"))
    loader, drawn = data.train_dataloader(), []
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        batch = whole(loader)
        assert sorted(batch["id"].tolist()) == list(range(IMAGES))
        pairs = (batch["text"][:, None] == text).all(-1).long().argmax(1)
        assert torch.equal(pairs // 5, batch["id"])
        drawn.append(pairs[batch["id"].argsort()] % 5)
    assert torch.stack(drawn).unique().tolist() == [0, 1, 2, 3, 4]
    again = many_to_one(folder, val_share=0.0, one_per="image", batch_size=8).train_dataloader()
    again.sampler.set_epoch(7)
    batch = whole(again)
    pairs = (batch["text"][:, None] == text).all(-1).long().argmax(1)
    assert torch.equal(pairs[batch["id"].argsort()] % 5, drawn[7])
    assert len(whole(data.train_eval_dataloader())["id"]) == PAIRS


def test_own_files_for_validation(folder):
    np.save(folder / "other.npy", np.ones((5, 6), np.float32))
    np.save(folder / "words.npy", np.ones((5, 4), np.float32))
    own = files(folder, image="other.npy", text="words.npy")
    data = FeaturePairsDataModule(features=files(folder), val=own, test=own)
    assert len(whole(data.train_dataloader())["id"]) == PAIRS
    assert whole(data.val_dataloader())["image"].shape == (5, 6)
    assert whole(data.test_dataloader())["text"].shape == (5, 4)


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("workers", [0, 1])
def test_loader_goes_on_in_the_middle_of_an_epoch(folder, workers):
    options: dict[str, Any] = {"batch_size": 3, "one_per": "image", "val_share": 0.0}
    whole_loader = many_to_one(folder, **options).train_dataloader()
    whole_loader.sampler.set_epoch(4)
    iterator = iter(whole_loader)
    next(iterator)
    resumed = many_to_one(folder, num_workers=workers, **options).train_dataloader()
    resumed.load_state_dict(whole_loader.state_dict())
    resumed.sampler.set_epoch(4)
    for ours, theirs in zip(resumed, iterator, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("image", "text", "id"))


def test_two_processes_share_the_pairs(folder):
    ids = []
    for rank in range(2):
        data = FeaturePairsDataModule(features=files(folder), val_share=0.0)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        ids += whole(data.train_dataloader())["id"].tolist()
    assert sorted(ids) == list(range(PAIRS))


def test_zero_rows_are_counted(folder):
    values = np.ones((PAIRS, 6), np.float32)
    values[[4, 9]] = 0
    np.save(folder / "image.npy", values)
    with pytest.warns(UserWarning, match=r"image: 2 of 40 rows of .*image.npy are all zero, the first is row 4"):
        FeaturePairsDataModule(features=files(folder)).setup()
    FeaturePairsDataModule(features=files(folder), check=False).setup()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_bad_rows_that_are_not_finite(folder, value):
    values = np.ones((PAIRS, 6))
    values[17, 2] = value
    np.save(folder / "image.npy", values)
    with pytest.raises(InputError, match=r"image.npy has rows that are not finite, the first is row 17"):
        FeaturePairsDataModule(features=files(folder)).setup()


def test_bad_files(folder):
    def message(match: str, **more: str) -> None:
        with pytest.raises(InputError, match=match):
            FeaturePairsDataModule(features=files(folder, **more)).setup()

    message("text: there is no file", text="absent.npy")
    (folder / "text.bin").write_bytes(b"x")
    message("text: '.*text.bin' must be an .npy or .safetensors file", text="text.bin")
    (folder / "broken.npy").write_bytes(b"x" * 100)
    message("broken.npy is no readable npy file", text="broken.npy")
    (folder / "cut.npy").write_bytes((folder / "text.npy").read_bytes()[:-8])
    message("cut.npy is no readable npy file", text="cut.npy")
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    message("objects.npy is no readable npy file", text="objects.npy")
    np.save(folder / "swapped.npy", np.ones((PAIRS, 2), ">f4"))
    message("swapped.npy must hold numbers in this machine's byte order", text="swapped.npy")
    message("text: .*label.npy must hold a matrix", text="label.npy")
    np.save(folder / "whole.npy", np.ones((PAIRS, 2), int))
    message("must hold floating-point features, got torch.int64", text="whole.npy")
    message("as many rows are needed of everything, got 40 of image, 8 of text; .* need an index", text="few.npy")
    message("label: .*text.npy must hold a vector", label="text.npy")
    (folder / "broken.safetensors").write_bytes(b"x" * 100)
    message("broken.safetensors is no readable safetensors file", text="broken.safetensors")
    save_file({"text_b": torch.ones(PAIRS, 2), "c": torch.ones(PAIRS, 2)}, folder / "two.safetensors")
    message("two.safetensors has no tensor 'text'. Did you mean text_b.* It has: c, text_b", text="two.safetensors")


def test_bad_arguments(folder):
    with pytest.raises(InputError, match=r"features must name at least two modalities, .* got \['image', 'label'\]"):
        FeaturePairsDataModule(features={"image": "a.npy", "label": "b.npy"})
    with pytest.raises(InputError, match="one_per must be a name in index, got 'image'"):
        FeaturePairsDataModule(features=files(folder), one_per="image")
    with pytest.raises(InputError, match=r"an index for 'imag', which is no feature. Did you mean image"):
        FeaturePairsDataModule(features=files(folder), index={"imag": "x.npy"}).setup()
    with pytest.raises(InputError, match="tensors has 'txt', which is no feature"):
        FeaturePairsDataModule(features=files(folder), tensors={"txt": "x"})
    with pytest.raises(InputError, match="val must have the names of features"):
        FeaturePairsDataModule(features=files(folder), val={"image": "x.npy"})
    with pytest.raises(InputError, match="val_index needs val"):
        FeaturePairsDataModule(features=files(folder), val_index={"image": "x.npy"})
    with pytest.raises(InputError, match=r"tensors names 'x' for 'text', but .* is an npy file"):
        FeaturePairsDataModule(features=files(folder), tensors={"text": "x"}).setup()
    np.save(folder / "which.npy", np.arange(PAIRS))
    with pytest.raises(InputError, match=r"the index of image goes up to row 39, but .*few.npy has 8 rows"):
        many_to_one(folder).setup()
    with pytest.raises(InputError, match="label 3 is outside 0 … 1, the 2 classes"):
        FeaturePairsDataModule(features=files(folder, label="label.npy"), class_names=["a", "b"]).setup()
    own = files(folder, image="text.npy")
    with pytest.raises(InputError, match=r"val: .*text.npy has 4 features a row, in training 'image' has 6"):
        FeaturePairsDataModule(features=files(folder), val=own).setup()


def test_bad_integers(tmp_path):
    np.save(tmp_path / "x.npy", np.array([1, -2]))
    with pytest.raises(InputError, match=r"x: .* must hold numbers of at least 0, got -2"):
        read_integers(str(tmp_path / "x.npy"), "x")
