"""Latents and encoded captions that `zoo.latent_cache.cache_latents` wrote, as training pairs."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.data.draws import random_words
from zoo.data.loading import SplitDataModule, Splits, epoch_of
from zoo.data.splits import Indices, stratified_split
from zoo.data.text import PairBatch
from zoo.errors import InputError, require_choice
from zoo.latent_shards import LatentCache, identity, same_encoders

__all__ = ["LatentCaptions", "LatentCaptionsDataModule"]

_CAPTIONS = 8  # the stream of random numbers that chooses captions
_NOISE = 9  # the stream of the posterior's noise


class LatentCaptions(Dataset[Any]):
    """Some images of a cache with their captions, read by the batch.

    With a seed, for training: one item an image, with one of its captions and a sample of its latents, others each epoch;
    both depend on (seed, epoch, index) alone. Without one, for evaluation: the mean of the latents.

    Args:
        cache: the cache.
        rows: positions of the images (N,).
        seed: number of the choices; None for evaluation.
        every_caption: in evaluation, an item for every caption; otherwise only for the first of each image.
        draw: with a seed, draw the latents; otherwise take their mean.
    """

    def __init__(
        self,
        cache: LatentCache,
        rows: Indices,
        *,
        seed: int | None = None,
        every_caption: bool = False,
        draw: bool = True,
    ) -> None:
        self.cache = cache
        self.seed = seed
        self.draw = draw
        self.rows, self.which = rows, np.zeros(len(rows), dtype=np.int64)
        if seed is None and every_caption:
            counts = cache.counts[rows]
            self.rows = np.repeat(rows, counts)
            self.which = np.arange(len(self.rows)) - np.repeat(np.cumsum(counts) - counts, counts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PairBatch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> PairBatch:
        positions = np.array(indices, dtype=np.int64)
        rows, which = self.rows[positions], self.which[positions]
        latents, deviation = self.cache.moments(rows)
        if self.seed is not None:
            key = (self.seed, epoch_of(indices))
            words = random_words((_CAPTIONS, *key), positions)
            which = (words >> np.uint64(1)).astype(np.int64) % self.cache.counts[rows]
            if self.draw and deviation is not None:
                latents = latents + deviation * _noise(key, positions, latents)
        numbers = self.cache.captions_of(rows, which)
        return {
            "latents": latents,
            **self.cache.condition(numbers),
            "id": torch.from_numpy(self.cache.ids[rows]),
            "caption_id": torch.from_numpy(numbers),
        }


def _noise(key: tuple[int, int], positions: Indices, like: Tensor) -> Tensor:
    words = random_words((_NOISE, *key), positions) >> np.uint64(1)
    drawn = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(int(word))) for word in words]
    return torch.stack(drawn)


class LatentCaptionsDataModule(SplitDataModule):
    """Latents and encoded captions from a cache on the disk: training without VAE and text encoders.

    A batch is a dict: "latents" (B, c, h, w) as the denoiser has them, the conditions (B, …) by the names of the denoiser's
    arguments, float32 where they are floating point, "id" (B,), the number of the image in the data that the cache was made
    from, and "caption_id" (B,), equal for equal captions, so that a loss can mask them. A training image has one of its
    captions each epoch, and a new sample of its latents; evaluation takes the mean of the latents.

    The files are mapped into memory, so a cache may be larger than it. `zoo.latent_cache.cache_latents` writes one.

    Args:
        train: folder of the cache.
        val: the same for the validation split; None takes ``val_share`` of the training images.
        test: the same for the test split; None if there is none.
        draw_latents: draw latents from the posterior in training; False takes their mean.
        eval_captions: in evaluation, "all" captions of each image (one item each) or the "first".
        verify: compare the SHA-256 of all files before training; it reads them once.
        batch_size: pairs in a batch and process, at least 1.
        num_workers: processes that read the data; 0 reads in the training process.
        val_share: share of the training images for validation, in [0, 1), if ``val`` is None.
        split_seed: number of the split.
        seed: number of the training order and of the choice of captions and latents.
        drop_last: leave out a last training batch that is not full.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Raises:
        InputError: an argument is out of its range. When the data are read: a folder holds no complete cache or is damaged,
            or the caches are of different backbones.
    """

    def __init__(
        self,
        train: str,
        *,
        val: str | None = None,
        test: str | None = None,
        draw_latents: bool = True,
        eval_captions: Literal["all", "first"] = "first",
        verify: bool = False,
        batch_size: int = 16,
        num_workers: int = 0,
        val_share: float = 0.0,
        split_seed: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last, pin_memory=pin_memory
        )
        require_choice("eval_captions", eval_captions, ("all", "first"))
        self.folders = {"train": train, "val": val, "test": test}
        self.draw_latents = draw_latents
        self.every_caption = eval_captions == "all"
        self.verify = verify
        self.val_share = val_share
        self.split_seed = split_seed
        self._caches: dict[str, LatentCache] | None = None

    @property
    def class_names(self) -> list[str]:
        """None: captions are no classes."""
        return []

    @property
    def caches(self) -> dict[str, LatentCache]:
        """The caches by split, opened at the first use.

        Raises:
            InputError: a folder holds no complete cache, or the caches are of different backbones.
        """
        if self._caches is None:
            caches = {split: LatentCache(folder) for split, folder in self.folders.items() if folder is not None}
            for split, cache in caches.items():
                first = caches["train"]
                if not same_encoders(cache.backbone, first.backbone) or cache.index.fields != first.index.fields:
                    raise InputError(
                        f"{split}: {cache.folder} was written by {_shown(cache.backbone)}, and {caches['train'].folder} by "
                        f"{_shown(caches['train'].backbone)}: write both with one backbone"
                    )
            self._caches = caches
        return self._caches

    @property
    def bytes_per_image(self) -> float:
        """Bytes on the disk for each training image: latents, and all captions that are its own."""
        return self.caches["train"].bytes_per_image

    def check_backbone(self, backbone: nn.Module) -> None:
        """Refuse a backbone whose encoders are not those that wrote the caches.

        Args:
            backbone: the one that is to be trained; its name does not count, its revision (commit or hash) does, and its
                options where it has encoders.

        Raises:
            InputError: they are others.
        """
        known, ours = self.caches["train"].backbone, identity(backbone)
        if not same_encoders(known, {**ours, "options": ours["options"] or known["options"]}):
            raise InputError(
                f"{self.folders['train']} was written by {_shown(known)}, and the backbone is {_shown(ours)}: name that "
                "revision, or write the cache anew"
            )

    def _load(self) -> Splits:
        caches = self.caches
        if self.verify:
            for cache in caches.values():
                cache.verify()
        train = caches["train"]
        held_out, rest = np.arange(0), np.arange(len(train))
        if "val" not in caches:
            held_out, rest = stratified_split(np.zeros(len(train)), {"val_share": self.val_share}, seed=self.split_seed)
        own = {split: self._evaluation(cache, np.arange(len(cache))) for split, cache in caches.items()}
        return Splits(
            train=LatentCaptions(train, rest, seed=self.seed, draw=self.draw_latents),
            train_eval=self._evaluation(train, rest),
            val=self._evaluation(train, held_out) if len(held_out) else own.get("val"),
            test=own.get("test"),
        )

    def _evaluation(self, cache: LatentCache, rows: Indices) -> LatentCaptions:
        return LatentCaptions(cache, rows, every_caption=self.every_caption)


def _shown(backbone: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in backbone["options"].items())
    return f"{backbone['name']} at {backbone['revision']}" + (f" ({options})" if options else "")
