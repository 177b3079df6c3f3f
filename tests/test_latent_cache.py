"""Caches of latents and encoded captions: what is stored, what comes back, and what a killed run leaves."""

from __future__ import annotations

import fcntl
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.data.captioned import EACH, SMALL, caption, write_table
from tests.latent_parts import DISTINCT, IMAGES, TEXTS, Encoders, pairs
from zoo import latent_shards
from zoo.condition_fields import Field
from zoo.data.image_text import ImageTextDataModule
from zoo.errors import InputError
from zoo.latent_cache import cache_latents
from zoo.latent_shards import LatentCache, identity

QUIET: dict[str, Any] = {"progress": False, "shard_size": 3, "batch_size": 2}


def written(folder: Path, **options: Any) -> LatentCache:
    return cache_latents(Encoders(), pairs(), folder, **{**QUIET, **options})["train"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip_is_exact_but_for_the_type(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = written(tmp_path, dtype=str(dtype).removeprefix("torch."))
    assert (len(cache), cache.captions, cache.texts) == (IMAGES, len(DISTINCT), DISTINCT)
    assert cache.ids.tolist() == list(range(IMAGES))
    assert cache.counts.tolist() == [len(texts) for texts in TEXTS]
    order = np.array([6, 0, 3, 3])
    mean, deviation = cache.moments(order)
    images = torch.stack([image for image, _ in pairs()])[order]
    expected = F.avg_pool2d(images, 2)
    assert torch.equal(mean, expected.to(dtype).float())
    assert deviation is not None
    assert torch.equal(deviation, (0.1 + expected.abs() / 10).to(dtype).float())
    chosen = np.array([8, 0, 4, 4])
    found, whole = cache.condition(chosen), Encoders().condition([DISTINCT[number] for number in chosen])
    assert torch.equal(found["encoder_hidden_states"], whole["encoder_hidden_states"].to(dtype).float())
    assert torch.equal(found["pooled_projections"], whole["pooled_projections"]), "few numbers stay float32"
    assert torch.equal(found["encoder_attention_mask"], whole["encoder_attention_mask"])


def test_every_caption_of_an_image_is_kept_and_equal_ones_have_one_number(tmp_path: Path) -> None:
    backbone = Encoders()
    cache = cache_latents(backbone, pairs(), tmp_path, **QUIET)["train"]
    for image, texts in enumerate(TEXTS):
        rows, which = np.full(len(texts), image), np.arange(len(texts))
        assert [cache.texts[number] for number in cache.captions_of(rows, which)] == [text.strip() for text in texts]
    assert backbone.texts == DISTINCT, "each caption is encoded once"


def test_identity_of_a_row_in_any_shard(tmp_path: Path) -> None:
    """The size of shards and batches changes the files, not what is read."""
    whole = written(tmp_path / "a", shard_size=100, batch_size=100)
    split = written(tmp_path / "b", shard_size=1, batch_size=1)
    rows = np.arange(IMAGES)
    assert all(torch.equal(*both) for both in zip(whole.moments(rows), split.moments(rows), strict=True))
    numbers = np.arange(len(DISTINCT))
    first, second = whole.condition(numbers), split.condition(numbers)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_files_hold_their_rows_and_no_more(tmp_path: Path) -> None:
    """The released code saves slices with the storage of their batch, 16 times as much; and zeros are not stored."""
    cache = written(tmp_path)
    for number, images in enumerate((3, 3, 1)):
        path = cache.folder / f"latents-{number:05}.safetensors"
        header = int.from_bytes(path.read_bytes()[:8], "little")
        captions = sum(len(texts) for texts in TEXTS[3 * number : 3 * number + 3])
        assert path.stat().st_size == 8 + header + images * (2 * 3 * 4 * 4 * 2 + 16) + 8 * captions
    new = [len(json.loads((cache.folder / f"texts-{number:05}.json").read_text())) for number in (0, 1)]
    assert new == [5, 4]
    assert not (cache.folder / "captions-00002.safetensors").exists(), "part 2 has no new caption"
    for number, count in enumerate(new):
        path = cache.folder / f"captions-{number:05}.safetensors"
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == 8 + header + count * (2 * (2 * 30 + 3 * 40) + 4 * 5 + 9)
    total = sum(len(content) for name, content in files(cache.folder).items() if name != "index.json")
    assert cache.bytes_per_image == total / IMAGES
    conditions = sum(len(content) for name, content in files(cache.folder).items() if name.startswith("captions"))
    assert cache.bytes_per_caption == conditions / len(DISTINCT)


@pytest.mark.parametrize("commits", [1, 5, 7, 8])
def test_killed_run_goes_on_behind_its_last_whole_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: int
) -> None:
    """Killed before any of its renames: of a part's files, of the index."""
    expected = files(written(tmp_path / "whole").folder)
    rename, count = latent_shards._commit, 0

    def killed(partial: Path, path: Path) -> None:
        nonlocal count
        count += 1
        if count == commits:
            raise KeyboardInterrupt
        rename(partial, path)

    monkeypatch.setattr(latent_shards, "_commit", killed)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "killed")
    monkeypatch.setattr(latent_shards, "_commit", rename)
    if commits > 4:
        with pytest.raises(InputError, match=r"not complete, it has 1 parts: call cache_latents again"):
            LatentCache(tmp_path / "killed/train")
    backbone = Encoders()
    cache_latents(backbone, pairs(), tmp_path / "killed", **QUIET)
    assert sum(backbone.images) == (IMAGES if commits < 5 else IMAGES - 3)
    assert not set(backbone.texts) & (set() if commits < 5 else set(DISTINCT[:5]))
    assert files(tmp_path / "killed/train") == expected
    assert not list((tmp_path / "killed/train").glob("*.partial"))


def test_complete_cache_is_not_written_again(tmp_path: Path) -> None:
    written(tmp_path)
    backbone = Encoders()
    cache_latents(backbone, pairs(), tmp_path, **QUIET)
    assert not backbone.images
    assert not backbone.texts


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"dtype": "bfloat16"}, "other dtype: float16, now bfloat16"),
        ({"captions": "first"}, "other captions"),
        ({"shard_size": 4}, "other shard_size: 3, now 4"),
    ],
)
def test_bad_other_options_on_resume(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    written(tmp_path)
    with pytest.raises(InputError, match=match):
        written(tmp_path, **changed)


def test_bad_other_backbone_or_data_on_resume(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(InputError, match=r"other backbone: .*'r1'.* now .*'r2'"):
        cache_latents(Encoders(revision="r2"), pairs(), tmp_path, **QUIET)
    with pytest.raises(InputError, match="other samples: 7, now 6"):
        cache_latents(Encoders(), pairs()[:6], tmp_path, **QUIET)
    with pytest.raises(InputError, match="other probe"):
        cache_latents(Encoders(), pairs([*TEXTS[:-1], ["a cow"]]), tmp_path, **QUIET)
    renamed = Encoders()
    renamed.identity["name"] = "the same by another name"
    cache_latents(renamed, pairs(), tmp_path, **QUIET)


def test_bad_second_writer(tmp_path: Path) -> None:
    place = tmp_path / "train"
    place.mkdir()
    with (place / ".lock").open("a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing the latent cache"):
            written(tmp_path)


def test_bad_numbers_for_the_type(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"the latents has numbers up to .* that float16 cannot hold: dtype='bfloat16'"
    ):
        cache_latents(Encoders(factor=1e6), pairs(), tmp_path / "a", **QUIET)
    cache_latents(Encoders(factor=1e6), pairs(), tmp_path / "b", dtype="bfloat16", **QUIET)
    with pytest.raises(InputError, match="the encoder overflows"):
        cache_latents(Encoders(factor=float("inf")), pairs(), tmp_path / "c", dtype="bfloat16", **QUIET)


def test_bad_damaged_cache(tmp_path: Path) -> None:
    cache = written(tmp_path)
    cache.verify()
    path = cache.folder / "captions-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    LatentCache(cache.folder)
    with pytest.raises(InputError, match=r"captions-00001.safetensors is not what was written \(SHA-256\)"):
        cache.verify()
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="bytes, expected"):
        LatentCache(cache.folder)
    path.unlink()
    with pytest.raises(InputError, match="has 0 bytes, expected"):
        LatentCache(cache.folder)
    (cache.folder / "index.json").write_text('{"format": "zoo-latent-cache-1", "facts": {}}')
    with pytest.raises(InputError, match=r"index.json is damaged"):
        LatentCache(cache.folder)
    with pytest.raises(InputError, match="holds no latent cache"):
        LatentCache(tmp_path)


def test_bad_other_format(tmp_path: Path) -> None:
    path = written(tmp_path).folder / "index.json"
    path.write_text(path.read_text().replace("zoo-latent-cache-1", "zoo-latent-cache-0"))
    with pytest.raises(InputError, match="has format 'zoo-latent-cache-0'"):
        LatentCache(path.parent)


def test_first_captions_alone(tmp_path: Path) -> None:
    cache = written(tmp_path, captions="first")
    assert cache.texts == ["a cat", "a dog", "a hen", "a fox", "an owl"]
    assert cache.counts.tolist() == [1] * IMAGES


def test_backbone_without_posterior_or_identity(tmp_path: Path) -> None:
    """The protocol's members suffice; such a backbone is known by its weights."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((1,), 2.0))

        def latents(self, images: torch.Tensor, generator: object = None) -> torch.Tensor:
            return images[:, :1] * self.weight

        def condition(self, text: list[str]) -> dict[str, torch.Tensor]:
            return {"encoder_hidden_states": torch.ones(len(text), 2, 3)}

    cache = cache_latents(Plain(), [{"image": torch.ones(3, 2, 2), "captions": "one"}], tmp_path, **QUIET)["train"]
    mean, deviation = cache.moments(np.array([0]))
    assert torch.equal(mean, torch.full((1, 1, 2, 2), 2.0))
    assert deviation is None
    assert cache.backbone == identity(Plain())
    assert cache.backbone["revision"].startswith("sha256:")


def test_splits_of_an_image_text_module_are_encoded_as_they_are_evaluated(tmp_path: Path) -> None:
    data = ImageTextDataModule(
        write_table(tmp_path), val_share=0.25, mean=[0.5] * 3, std=[0.5] * 3, eval_captions="first", **SMALL
    )
    caches = cache_latents(Encoders(), data, tmp_path / "cache", **{**QUIET, "num_workers": 1})
    assert caches.keys() == {"train", "val"}
    for name, loader in (("train", data.train_eval_dataloader()), ("val", data.val_dataloader())):
        cache, batches = caches[name], list(loader)
        images, ids = (torch.cat([batch[key] for batch in batches]) for key in ("image", "id"))
        assert cache.ids.tolist() == ids.tolist()
        assert torch.equal(cache.moments(np.arange(len(cache)))[0], F.avg_pool2d(images, 2).half().float())
        numbers = cache.captions_of(np.zeros(EACH, dtype=np.int64), np.arange(EACH))
        assert [cache.texts[number] for number in numbers] == [caption(int(ids[0]), which) for which in range(EACH)]


def test_images_that_cannot_be_read_are_left_out_or_raise(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    for broken in (1, 2, 3, 7):
        (tmp_path / f"{broken}.png").write_bytes(b"")
    data = ImageTextDataModule(table, on_error="skip", **SMALL)
    with pytest.warns(UserWarning, match="could not be read"):
        cache = cache_latents(Encoders(), data, tmp_path / "cache", **{**QUIET, "batch_size": 3})["train"]
    assert cache.ids.tolist() == [0, 4, 5, 6, 8, 9, 10, 11]
    assert len(cache.moments(np.arange(8))[0]) == 8
    with pytest.raises(InputError, match=r"7\.png: the image cannot be decoded"):
        cache_latents(Encoders(), ImageTextDataModule(table, **SMALL), tmp_path / "raise", **QUIET)


def test_whole_part_that_cannot_be_read(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    for broken in (3, 4, 5):
        (tmp_path / f"{broken}.png").write_bytes(b"")
    data = ImageTextDataModule(table, on_error="skip", **SMALL)
    with pytest.warns(UserWarning, match="could not be read"):
        cache = cache_latents(Encoders(), data, tmp_path / "cache", **QUIET)["train"]
    assert cache.ids.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert torch.isfinite(cache.moments(np.arange(9))[0]).all()


@pytest.mark.parametrize(
    "item",
    [
        (torch.zeros(3, 8, 8), torch.zeros(4)),
        (torch.zeros(3, 8, 8), []),
        (torch.zeros(8, 8), ["flat"]),
        {"image": torch.zeros(3, 8, 8), "text": torch.zeros(4)},
    ],
)
def test_bad_data(tmp_path: Path, item: Any) -> None:
    with pytest.raises(InputError, match=r"images \(C, H, W\) with their captions as text"):
        cache_latents(Encoders(), [item], tmp_path, **QUIET)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "float8"}, r"dtype must be one of float16, bfloat16, got 'float8'. Did you mean float16"),
        ({"captions": "last"}, "captions must be one of all, first"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        written(tmp_path, **options)
    with pytest.raises(InputError, match="the train split has no images"):
        cache_latents(Encoders(), [], tmp_path)


def test_bad_conditions() -> None:
    value = torch.ones(2, 5, 20)
    blocks = Field.of("text", value, ((2, 20), (3, 7)), "float16")
    with pytest.raises(InputError, match=r"numbers beyond its block 2:5, 0:7"):
        blocks.pack("text", value)
    with pytest.raises(InputError, match=r"has shape \(4, 20\), before it was \(5, 20\)"):
        blocks.pack("text", value[:, :4])
    with pytest.raises(InputError, match="do not fit its shape"):
        Field.of("text", value, ((2, 20),), "float16")
    with pytest.raises(InputError, match="do not fit its shape"):
        Field.of("text", value, ((5, 0),), "float16")
    with pytest.raises(InputError, match=r"is torch.complex64, and a cache holds"):
        Field.of("text", value.to(torch.complex64), (), "float16")


@given(
    blocks=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 70)), min_size=1, max_size=4).filter(
        lambda blocks: any(width for _, width in blocks)
    ),
    dtype=st.sampled_from(["float16", "bfloat16"]),
)
@settings(max_examples=20, deadline=None)
@example(blocks=[(2, 0), (1, 70)], dtype="float16")
def test_properties_of_blocks(blocks: list[tuple[int, int]], dtype: str) -> None:
    """Packing and unpacking gives the numbers back, and stores as many as the blocks have."""
    value, start = torch.zeros(3, sum(rows for rows, _ in blocks), 70), 0
    for rows, width in blocks:
        value[:, start : start + rows, :width] = torch.randn(3, rows, width).to(getattr(torch, dtype)).float()
        start += rows
    layout = Field.of("text", value, tuple(blocks), dtype)
    stored = layout.pack("text", value)
    assert list(stored) == layout.names("text")
    assert sum(piece.numel() for piece in stored.values()) == 3 * sum(rows * width for rows, width in blocks)
    assert all(piece.untyped_storage().nbytes() == piece.numel() * piece.itemsize for piece in stored.values())
    assert torch.equal(layout.unpack("text", stored), value)


def test_pickled_cache_maps_its_files_again(tmp_path: Path) -> None:
    cache = written(tmp_path)
    stored = pickle.dumps(cache)
    assert len(stored) < 10_000
    copy = pickle.loads(stored)
    assert torch.equal(copy.moments(np.array([5]))[0], cache.moments(np.array([5]))[0])
