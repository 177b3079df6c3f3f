"""Latents and encoded captions of a data set, computed once, so that a denoiser trains without VAE and text encoders.

An image keeps mean and standard deviation of its latents, so that each epoch can draw another sample of the posterior, and
all its captions; a caption that several images have is encoded and stored once. What is stored is what the backbone gives,
in half precision: float16 keeps three digits, bfloat16 two, which is coarser than the posterior's own noise.

T5's output behind the end of a caption cannot be left out or computed again: Stable Diffusion 3 encodes the padding without
a mask, so it differs from caption to caption. What makes a cache smaller is fewer tokens (``max_sequence_length=77`` of
`zoo.diffusers_backbone.load_backbone`), no T5, or ``captions="first"``.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from zoo.condition_fields import DTYPES, Field, to_storage
from zoo.data.caption_pairs import ImageTextPairs
from zoo.data.loading import SplitDataModule
from zoo.errors import InputError, require_choice
from zoo.latent_shards import Index, LatentCache, identity, read_texts, same_encoders, write_part

__all__ = ["cache_latents"]

_PROBES = 4
_Sample = tuple[Tensor, list[str], int]
"""An image, its captions and its number."""


class _Samples(Dataset[Any]):
    """The images of a data set with their captions as text, unaugmented; None for one that may be skipped and has to be."""

    def __init__(self, data: Any, captions: str) -> None:
        self.data = data
        self.first = captions == "first"

    def __len__(self) -> int:
        pairs = isinstance(self.data, ImageTextPairs)
        return len(self.data.rows) if pairs else len(self.data)

    def __getitem__(self, position: int) -> _Sample | None:
        if not isinstance(self.data, ImageTextPairs):
            return self._checked(self.data[position], position)
        pairs, row = self.data, int(self.data.rows[position])
        try:
            image, captions = pairs._transform(pairs.source.image(row)), pairs.source.captions(row)
        except InputError as error:
            if pairs._skipped is None:
                raise
            pairs._skipped.note(error)
            return None
        return self._checked((image, captions), row)

    def _checked(self, item: Any, number: int) -> _Sample:
        image, captions = item if not isinstance(item, Mapping) else (item.get("image"), item.get("captions"))
        captions = [captions] if isinstance(captions, str) else captions
        texts = isinstance(captions, Sequence) and len(captions) > 0 and all(isinstance(each, str) for each in captions)
        if not isinstance(image, Tensor) or image.ndim != 3 or not texts:
            raise InputError(
                "data must be an ImageTextDataModule, or hold images (C, H, W) with their captions as text: "
                f"(image, captions) or {{'image': …, 'captions': …}}; sample {number} is none of these"
            )
        found = [each.strip() for each in cast("list[str]", captions)]
        return image, found[:1] if self.first else found, number


def cache_latents(
    backbone: nn.Module,
    data: SplitDataModule | Dataset[Any],
    folder: str | Path,
    *,
    dtype: Literal["float16", "bfloat16"] = "float16",
    captions: Literal["all", "first"] = "all",
    shard_size: int = 256,
    batch_size: int = 16,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, LatentCache]:
    """Encode a data set and keep what the encoders say, for `zoo.data.LatentCaptionsDataModule`.

    One process does the work. It can be killed at any time: parts that are complete stay, and the same call goes on behind
    them. A part is held in memory until it is written.

    Args:
        backbone: the backbone, on the device that is to compute; with ``posterior(images) -> (mean, deviation)``, or else
            ``latents(images)``, and ``condition(captions)``, as `zoo.denoisers.Backbone` describes them.
        data: an `zoo.data.ImageTextDataModule`, whose splits are encoded under the evaluation transform, or a data set with
            items ``(image, captions)`` or ``{"image": …, "captions": …}``, which counts as the training split. Images are
            (C, H, W) in the backbone's units, captions one text or several.
        folder: gets a folder for each split: ``train``, ``val``, ``test``.
        dtype: type of the stored numbers.
        captions: "all" captions of each image, or the "first".
        shard_size: images of a part, at least 1.
        batch_size: images, or captions, that are encoded at a time, at least 1.
        num_workers: processes that decode the images.
        progress: show a bar.

    Returns:
        The cache of each split.

    Raises:
        InputError: an argument is out of its range; the data hold something else; a number does not fit into ``dtype``; the
            folder holds a cache of another backbone, of other data or options, or another process is writing it.

    Example:
        >>> import tempfile
        >>> class Halves(nn.Module):
        ...     def latents(self, images, generator=None):
        ...         return images[:, :, ::2, ::2]
        ...
        ...     def condition(self, text):
        ...         return {"encoder_hidden_states": torch.tensor([[[len(each)] * 80] for each in text]).float()}
        >>> pairs = [(torch.zeros(3, 8, 8), ["a cat", "one cat"]), (torch.ones(3, 8, 8), ["a cat"])]
        >>> cache = cache_latents(Halves(), pairs, tempfile.mkdtemp(), progress=False)["train"]
        >>> len(cache), cache.texts, cache.moments([1])[0].shape
        (2, ['a cat', 'one cat'], torch.Size([1, 3, 4, 4]))
    """
    for name, value, known in (("dtype", dtype, tuple(DTYPES)), ("captions", captions, ("all", "first"))):
        require_choice(name, value, known)
    for name, least in (("shard_size", shard_size), ("batch_size", batch_size)):
        if least < 1:
            raise InputError(f"{name} must be at least 1, got {least}")
    splits: dict[str, Any] = {"train": data}
    if isinstance(data, SplitDataModule):
        own = data.splits
        splits = {"train": own.train_eval, "val": own.val, "test": own.test}
    caches = {}
    for split, part in splits.items():
        if part is None:
            continue
        samples, place = _Samples(part, captions), Path(folder).expanduser() / split
        if len(samples) == 0:
            raise InputError(f"the {split} split has no images")
        facts = {
            "backbone": identity(backbone),
            "dtype": dtype,
            "captions": captions,
            "samples": len(samples),
            "shard_size": shard_size,
            "probe": _probe(samples),
        }
        with _writing(place) as index:
            _continue(place, index, facts)
            writer = _Writer(backbone, place, index, batch_size=batch_size)
            if not index.complete:
                writer.run(samples, num_workers=num_workers, progress=progress)
        caches[split] = LatentCache(place)
    return caches


def _probe(samples: _Samples) -> str:
    """A hash of samples all over the data."""
    digest = hashlib.sha256()
    for position in np.unique(np.linspace(0, len(samples) - 1, _PROBES).round().astype(int)).tolist():
        sample = samples[position]
        if sample is not None:
            digest.update(sample[0].contiguous().numpy().tobytes())
        digest.update(repr((position, None if sample is None else sample[1:])).encode())
    return digest.hexdigest()


@contextmanager
def _writing(place: Path) -> Iterator[Index]:
    """Hold the cache at a place for this process, and give what is there of it."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / ".lock").open("a+b")
    except OSError as error:
        raise InputError(f"the latent cache {place} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is writing the latent cache {place}: wait for it, then use it"
            ) from error
        for partial in place.glob(".*.partial"):
            partial.unlink()
        yield Index.read(place) if (place / "index.json").is_file() else Index({})


def _continue(place: Path, index: Index, facts: dict[str, Any]) -> None:
    """Begin an index, or refuse one that was begun with something else."""
    for name, value in facts.items():
        known = index.facts.get(name, value)
        if not (same_encoders(known, value) if name == "backbone" else known == value):
            raise InputError(
                f"{place} was begun with other {name}: {known}, now {value}; give another folder, or delete it"
            )
    index.facts = facts


class _Writer:
    """Encodes and writes what a cache lacks.

    Args:
        backbone: encodes images and captions.
        place: the cache.
        index: what there is of it.
        batch_size: images, or captions, that are encoded at a time.
    """

    def __init__(self, backbone: Any, place: Path, index: Index, *, batch_size: int) -> None:
        self.backbone = backbone
        self.place = place
        self.index = index
        self.batch_size = batch_size
        self.dtype: str = index.facts["dtype"]
        self.device = next((value.device for value in backbone.parameters()), torch.device("cpu"))
        self.numbers = {text: number for number, text in enumerate(read_texts(place, index))}

    def run(self, samples: _Samples, *, num_workers: int, progress: bool) -> None:
        """Write all parts that are missing."""
        size, done = self.index.facts["shard_size"], len(self.index.parts)
        batches = [
            range(start, min(start + self.batch_size, last))
            for first in range(done * size, len(samples), size)
            for last in [min(first + size, len(samples))]
            for start in range(first, last, self.batch_size)
        ]
        loader: DataLoader[Any] = DataLoader(
            samples, batch_sampler=[list(batch) for batch in batches], num_workers=num_workers, collate_fn=_as_is
        )
        found: list[dict[str, Any]] = []
        with tqdm(
            total=len(samples), initial=done * size, desc=self.place.name, leave=False, disable=not progress
        ) as bar:
            for batch, content in zip(batches, loader, strict=True):
                kept = [sample for sample in content if sample is not None]
                if kept:
                    found.append(self._encode(kept))
                bar.update(len(batch))
                if batch.stop % size == 0 or batch.stop == len(samples):
                    self._store(found)
                    found = []
        if not sum(part.images for part in self.index.parts):
            raise InputError(f"no image of {self.place} can be read")
        self.index.complete = True
        self.index.write(self.place)

    @torch.no_grad()
    def _encode(self, samples: list[_Sample]) -> dict[str, Any]:
        """Encode a batch; new captions get the next numbers."""
        images = torch.stack([image for image, _, _ in samples]).to(self.device)
        posterior = getattr(self.backbone, "posterior", None)
        mean, deviation = posterior(images) if posterior is not None else (self.backbone.latents(images), None)
        latents = {"mean": to_storage(mean, self.dtype, "the latents")}
        if deviation is not None:
            latents["deviation"] = to_storage(deviation, self.dtype, "the deviation of the latents")
        captions = [text for _, texts, _ in samples for text in texts]
        new = [text for text in dict.fromkeys(captions) if text not in self.numbers]
        self.numbers |= {text: len(self.numbers) + place for place, text in enumerate(new)}
        latents["id"] = torch.tensor([number for _, _, number in samples])
        latents["count"] = torch.tensor([len(texts) for _, texts, _ in samples])
        latents["caption"] = torch.tensor([self.numbers[text] for text in captions])
        return {"latents": latents, "captions": [self._condition(part) for part in self._chunks(new)], "texts": new}

    def _chunks(self, texts: list[str]) -> list[list[str]]:
        return [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]

    def _condition(self, texts: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.backbone.condition(texts)
        if not self.index.fields:
            blocks = getattr(self.backbone, "text_blocks", {})
            self.index.fields = {
                name: Field.of(name, value, blocks.get(name, ()), self.dtype) for name, value in found.items()
            }
        if found.keys() != self.index.fields.keys():
            raise InputError(f"a condition has {sorted(found)}, before it had {sorted(self.index.fields)}")
        pieces: dict[str, Tensor] = {}
        for name, value in found.items():
            pieces |= self.index.fields[name].pack(name, value)
        return pieces

    def _store(self, found: list[dict[str, Any]]) -> None:
        latents = _joined([each["latents"] for each in found]) or {
            name: torch.zeros(0, dtype=torch.int64) for name in ("id", "count", "caption")
        }
        captions = _joined([pieces for each in found for pieces in each["captions"]])
        texts = [text for each in found for text in each["texts"]]
        try:
            self.index.parts.append(write_part(self.place, len(self.index.parts), latents, captions, texts))
            self.index.write(self.place)
        except OSError as error:
            raise InputError(f"the latent cache {self.place} cannot be written: {error.strerror}") from error


def _joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([each[name] for each in pieces]) for name in pieces[0]} if pieces else {}


def _as_is(batch: Any) -> Any:
    return batch
