"""Training from cached latents: which caption and which sample of the latents an epoch sees."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.data.captioned import same, whole
from tests.latent_parts import DISTINCT, IMAGES, TEXTS, Encoders, pairs
from zoo.data.latent_captions import LatentCaptionsDataModule
from zoo.data.loading import Draw
from zoo.errors import InputError
from zoo.latent_cache import cache_latents
from zoo.latent_shards import LatentCache

COUNTS = [len(texts) for texts in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("latents")
    cache_latents(Encoders(), pairs(), place, shard_size=3, batch_size=2, progress=False)
    return str(place / "train")


def drawn(data: LatentCaptionsDataModule, epoch: int) -> dict[str, torch.Tensor]:
    return data.splits.train.__getitems__([Draw(index, epoch) for index in range(IMAGES)])  # type: ignore[attr-defined]


def test_batch_is_what_a_denoiser_takes(folder: str) -> None:
    data = LatentCaptionsDataModule(folder, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "latents": ((4, 3, 4, 4), torch.float32),
        "encoder_hidden_states": ((4, 9, 40), torch.float32),
        "pooled_projections": ((4, 5), torch.float32),
        "encoder_attention_mask": ((4, 9), torch.bool),
        "id": ((4,), torch.int64),
        "caption_id": ((4,), torch.int64),
    }
    assert data.class_names == []
    assert data.bytes_per_image == LatentCache(folder).bytes_per_image


def test_training_draws_a_caption_by_seed_epoch_and_index(folder: str) -> None:
    data = LatentCaptionsDataModule(folder)
    seen: list[set[int]] = [set() for _ in TEXTS]
    for epoch in range(30):
        batch = drawn(data, epoch)
        for index, number in enumerate(batch["caption_id"].tolist()):
            seen[index].add(number)
        expected = Encoders().condition([DISTINCT[number] for number in batch["caption_id"].tolist()])
        assert torch.equal(batch["encoder_hidden_states"], expected["encoder_hidden_states"].half().float())
    assert [{DISTINCT[number] for number in numbers} for numbers in seen] == [
        {text.strip() for text in texts} for texts in TEXTS
    ]
    # A sample depends on neither the batch that it is in nor what was read before.
    alone = data.splits.train.__getitems__([Draw(3, 5)])  # type: ignore[attr-defined]
    assert same(alone, {name: value[3:4] for name, value in drawn(data, 5).items()})
    other = LatentCaptionsDataModule(folder, seed=1)
    assert not torch.equal(drawn(data, 5)["latents"], drawn(other, 5)["latents"])


def test_equal_captions_have_one_number(folder: str) -> None:
    batch = whole(LatentCaptionsDataModule(folder, eval_captions="first").train_eval_dataloader())
    numbers = batch["caption_id"].tolist()
    assert numbers[0] == numbers[2]
    assert numbers[1] == numbers[6]
    assert len(set(numbers)) == 5


def test_each_epoch_samples_the_posterior(folder: str) -> None:
    data = LatentCaptionsDataModule(folder)
    mean, deviation = LatentCache(folder).moments(np.arange(IMAGES))
    assert deviation is not None
    noise = torch.stack([(drawn(data, epoch)["latents"] - mean) / deviation for epoch in range(40)])
    # 13,440 numbers: four standard errors.
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert abs(float(noise.square().mean()) - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert torch.unique(noise).numel() > 0.99 * noise.numel(), "neither images nor epochs share their noise"
    still = LatentCaptionsDataModule(folder, draw_latents=False)
    assert torch.equal(drawn(still, 1)["latents"], mean)
    assert torch.equal(whole(data.train_eval_dataloader())["latents"], mean)


def test_evaluation_takes_the_first_caption_or_each(folder: str) -> None:
    first = whole(LatentCaptionsDataModule(folder, batch_size=3).train_eval_dataloader())
    assert [DISTINCT[number] for number in first["caption_id"].tolist()] == [texts[0].strip() for texts in TEXTS]
    every = whole(LatentCaptionsDataModule(folder, eval_captions="all").train_eval_dataloader())
    assert every["id"].tolist() == [image for image, count in enumerate(COUNTS) for _ in range(count)]
    texts = [text.strip() for texts in TEXTS for text in texts]
    assert [DISTINCT[number] for number in every["caption_id"].tolist()] == texts


def test_splits(folder: str) -> None:
    data = LatentCaptionsDataModule(folder, val_share=0.3)
    parts = [whole(loader)["id"].tolist() for loader in (data.train_eval_dataloader(), data.val_dataloader())]
    assert sorted(parts[0] + parts[1]) == list(range(IMAGES))
    assert len(parts[1]) == 2
    own = LatentCaptionsDataModule(folder, val=folder, test=folder)
    assert len(whole(own.val_dataloader())["id"]) == len(whole(own.test_dataloader())["id"]) == IMAGES
    with pytest.raises(InputError, match="has no validation split"):
        LatentCaptionsDataModule(folder).val_dataloader()


def test_workers_and_pickles_read_the_same(folder: str) -> None:
    data = LatentCaptionsDataModule(folder, batch_size=3)
    other = LatentCaptionsDataModule(folder, batch_size=3, num_workers=1)
    first, second = (list(module.train_dataloader()) for module in (data, other))
    assert all(same(*both) for both in zip(first, second, strict=True))
    copy = pickle.loads(pickle.dumps(data.splits.train))
    assert same(copy.__getitems__([2, 0]), data.splits.train.__getitems__([2, 0]))  # type: ignore[attr-defined]
    assert same(copy[1], {name: value[0] for name, value in copy.__getitems__([1]).items()})


def test_backbone_must_be_the_one_that_wrote_it(folder: str) -> None:
    data = LatentCaptionsDataModule(folder)
    data.check_backbone(Encoders())
    with pytest.raises(InputError, match=r"written by encoders at r1 \(length=9\), and the backbone is encoders at r2"):
        data.check_backbone(Encoders(revision="r2"))
    denoiser_alone = Encoders()
    denoiser_alone.identity["options"] = {}
    data.check_backbone(denoiser_alone)
    denoiser_alone.identity["options"] = {"length": 8}
    with pytest.raises(InputError, match=r"\(length=8\)"):
        data.check_backbone(denoiser_alone)
    with pytest.raises(InputError, match="the backbone is Linear at sha256:"):
        data.check_backbone(nn.Linear(1, 1))


def test_bad_caches(folder: str, tmp_path: Path) -> None:
    cache_latents(Encoders(revision="r2"), pairs(), tmp_path / "other", progress=False)
    with pytest.raises(InputError, match=r"val: .* was written by encoders at r2 .* write both with one backbone"):
        LatentCaptionsDataModule(folder, val=str(tmp_path / "other/train")).setup()
    with pytest.raises(InputError, match="holds no latent cache"):
        LatentCaptionsDataModule(str(tmp_path)).setup()
    with pytest.raises(InputError, match="eval_captions must be one of all, first, got 'last'"):
        LatentCaptionsDataModule(folder, eval_captions="last")  # type: ignore[arg-type]
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = (copy / "latents-00000.safetensors").read_bytes()
    (copy / "latents-00000.safetensors").write_bytes(content[:-1] + b"!")
    LatentCaptionsDataModule(str(copy)).setup()
    with pytest.raises(InputError, match="is not what was written"):
        LatentCaptionsDataModule(str(copy), verify=True).setup()
