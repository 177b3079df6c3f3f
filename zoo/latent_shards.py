"""A cache of latents and encoded captions on the disk: one folder, an index, and parts that are whole or not there.

A part is three files. ``latents-00000.safetensors`` has ``mean`` and ``deviation`` (n, c, h, w) of the images, their ``id``,
how many captions each has (``count``) and which (``caption``, one after the other); ``captions-00000.safetensors`` has the
conditions of the captions that appear here for the first time, and ``texts-00000.json`` their text. Captions are numbered
over all parts in the order of their first appearance, and equal ones have one number. ``index.json`` says what the cache was
made from, how a condition is laid out, and length and SHA-256 of each file.

A condition (L, D) whose lower or right part is zero by construction is stored without it (`Field`). Numbers are float16 or
bfloat16, vectors of up to 64 float32. Files are mapped into memory, so a cache may be larger than it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.condition_fields import Field
from zoo.errors import InputError
from zoo.towers import fingerprint

if TYPE_CHECKING:  # zoo.data imports this file
    from zoo.data.splits import Indices

__all__ = ["Index", "LatentCache", "Part", "identity", "read_texts", "same_encoders", "write_part"]

_FORMAT = "zoo-latent-cache-1"


def identity(backbone: nn.Module) -> dict[str, Any]:
    """Return what tells the encoders of a backbone from others: name, revision and options.

    Args:
        backbone: one with an attribute ``identity``, or any other, whose weights are hashed.
    """
    own = getattr(backbone, "identity", None)
    if own is not None:
        return dict(own)
    return {"name": type(backbone).__name__, "revision": f"sha256:{fingerprint(backbone)}", "options": {}}


def same_encoders(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities stand for the same encoders with the same options, whatever their names.

    Args:
        one: as `identity` gives it.
        other: likewise.
    """
    return all(one[key] == other[key] for key in ("revision", "options"))


@dataclass
class Part:
    """One part.

    Attributes:
        images: how many images it has.
        captions: how many captions appear in it for the first time.
        files: length in bytes and SHA-256 of each of its files.
    """

    images: int
    captions: int
    files: dict[str, dict[str, Any]]


@dataclass
class Index:
    """What index.json holds.

    Attributes:
        facts: what the cache is made from.
        fields: the layout of a condition; empty before the first part.
        parts: the parts that are complete.
        complete: whether there are no more to come.
    """

    facts: dict[str, Any]
    fields: dict[str, Field] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of a cache, and look whether its files are there at their full length.

        Args:
            folder: the cache.

        Raises:
            InputError: it is no cache, of another version, damaged, or lacks a file.
        """
        path = folder / "index.json"
        if not path.is_file():
            raise InputError(f"{folder} holds no latent cache: zoo.latent_cache.cache_latents writes one")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            form = content["format"]
            index = cls(
                content["facts"],
                {name: Field(**_tuples(each)) for name, each in content["fields"].items()},
                [Part(**each) for each in content["parts"]],
                content["complete"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged: delete the folder, and write the cache anew") from error
        if form != _FORMAT:
            raise InputError(f"{path} has format {form!r}, this version of the zoo reads {_FORMAT}: write it anew")
        for part in index.parts:
            for name, facts in part.files.items():
                length = (folder / name).stat().st_size if (folder / name).is_file() else 0
                if length != facts["bytes"]:
                    raise InputError(
                        f"{folder / name} has {length} bytes, expected {facts['bytes']}: copy it again, or delete the "
                        "folder and write the cache anew"
                    )
        return index

    def write(self, folder: Path) -> None:
        """Replace index.json at one stroke.

        Args:
            folder: the cache.
        """
        content = {
            "format": _FORMAT,
            "facts": self.facts,
            "fields": {name: asdict(each) for name, each in self.fields.items()},
            "parts": [asdict(part) for part in self.parts],
            "complete": self.complete,
        }
        partial = folder / ".index.json.partial"
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        _commit(partial, folder / "index.json")


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {
        "shape": tuple(content["shape"]),
        "dtype": content["dtype"],
        "blocks": tuple((rows, width) for rows, width in content["blocks"]),
    }


def _commit(partial: Path, path: Path) -> None:
    """Let a file count once all of it is on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_part(
    folder: Path, number: int, latents: Mapping[str, Tensor], captions: Mapping[str, Tensor], texts: list[str]
) -> Part:
    """Write the files of a part; they count once `Index.write` has stored what is returned.

    Args:
        folder: the cache.
        number: number of the part.
        latents: "mean", perhaps "deviation", "id", "count" and "caption".
        captions: the pieces of the conditions of new captions.
        texts: their texts.
    """
    from safetensors.torch import save_file

    files = {}
    for stem, content in (("latents", latents), ("captions", captions), ("texts", texts)):
        if not texts and stem != "latents":
            continue
        name = f"{stem}-{number:05d}." + ("json" if stem == "texts" else "safetensors")
        partial = folder / f".{name}.partial"
        if stem == "texts":
            partial.write_text(json.dumps(texts), encoding="utf-8")
        else:
            save_file(dict(content), partial)  # type: ignore[arg-type]
        _commit(partial, folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    return Part(images=len(latents["id"]), captions=len(texts), files=files)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LatentCache:
    """A complete cache; its files are mapped when they are first asked for, and a pickled copy maps them again.

    Args:
        folder: the cache.

    Raises:
        InputError: it is no cache, damaged, or not complete.

    Attributes:
        folder: the cache, absolute.
        index: what it holds.
        ids: number (N,) of each image in the data that it was made from.
        counts: how many captions each image has (N,).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.index = Index.read(self.folder)
        if not self.index.complete:
            raise InputError(
                f"{folder} is not complete, it has {len(self.index.parts)} parts: call cache_latents again with the same "
                "arguments, and it goes on"
            )
        self._files: dict[str, dict[str, Tensor]] = {}
        self._first_images = np.cumsum([0, *(part.images for part in self.index.parts)])
        self._first_captions = np.cumsum([0, *(part.captions for part in self.index.parts)])
        small = [self._latents(number) for number in range(len(self.index.parts))]
        self.ids, self.counts, self._captions = (
            np.concatenate([each[name].numpy() for each in small]) for name in ("id", "count", "caption")
        )
        self._starts = np.cumsum(self.counts) - self.counts

    def __len__(self) -> int:
        return int(self._first_images[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    @property
    def captions(self) -> int:
        """How many different captions there are."""
        return int(self._first_captions[-1])

    @property
    def backbone(self) -> dict[str, Any]:
        """Identity of the backbone that wrote it: name, revision, options."""
        found: dict[str, Any] = self.index.facts["backbone"]
        return found

    @property
    def bytes_per_image(self) -> float:
        """Length of all files by the number of images: latents, and all captions of an image."""
        return self._bytes("") / len(self)

    @property
    def bytes_per_caption(self) -> float:
        """Length of the files of conditions by the number of different captions."""
        return self._bytes("captions-") / self.captions

    def _bytes(self, stem: str) -> int:
        return sum(
            int(facts["bytes"])
            for part in self.index.parts
            for name, facts in part.files.items()
            if name.startswith(stem)
        )

    @cached_property
    def texts(self) -> list[str]:
        """The captions by their number."""
        return read_texts(self.folder, self.index)

    def verify(self) -> None:
        """Read all files and compare their SHA-256 with the index.

        Raises:
            InputError: a file is not what was written.
        """
        for part in self.index.parts:
            for name, facts in part.files.items():
                if _sha256(self.folder / name) != facts["sha256"]:
                    raise InputError(
                        f"{self.folder / name} is not what was written (SHA-256): copy it again, or write the cache anew"
                    )

    def captions_of(self, rows: Indices, which: Indices) -> Indices:
        """Return the numbers of captions.

        Args:
            rows: positions (B,) of images.
            which: which of an image's captions (B,), each below the image's count.
        """
        found: Indices = self._captions[self._starts[rows] + which]
        return found

    def moments(self, rows: Indices) -> tuple[Tensor, Tensor | None]:
        """Return mean and standard deviation of images' latents, float32; no deviation if the backbone gave none.

        Args:
            rows: positions (B,) of images.
        """
        stored = self._gather(self._first_images, rows, self._latents, ["mean", "deviation"])
        deviation = stored.get("deviation")
        return stored["mean"].float(), None if deviation is None else deviation.float()

    def condition(self, numbers: Indices) -> dict[str, Tensor]:
        """Return the conditions (B, …) of captions; float32 where they are floating point.

        Args:
            numbers: numbers (B,) of captions.
        """
        names = [piece for name, each in self.index.fields.items() for piece in each.names(name)]
        stored = self._gather(self._first_captions, numbers, self._conditions, names)
        return {name: each.unpack(name, stored) for name, each in self.index.fields.items()}

    def _gather(self, firsts: Any, rows: Indices, file: Any, names: list[str]) -> dict[str, Tensor]:
        parts = np.searchsorted(firsts, rows, side="right") - 1
        samples = [
            {name: value[int(row - firsts[part])] for name, value in file(int(part)).items() if name in names}
            for part, row in zip(parts, rows, strict=True)
        ]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def _latents(self, part: int) -> dict[str, Tensor]:
        return self._mapped(f"latents-{part:05d}.safetensors")

    def _conditions(self, part: int) -> dict[str, Tensor]:
        return self._mapped(f"captions-{part:05d}.safetensors")

    def _mapped(self, name: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        if name not in self._files:
            try:
                with safe_open(self.folder / name, framework="pt") as file:  # a tensor is a view of the mapping
                    self._files[name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            except (OSError, SafetensorError) as error:
                raise InputError(f"{self.folder / name} is damaged: copy it again, or write the cache anew") from error
        return self._files[name]


def read_texts(folder: Path, index: Index) -> list[str]:
    """Return the captions of a cache, complete or not, by their number.

    Args:
        folder: the cache.
        index: its index.
    """
    texts: list[str] = []
    for number, part in enumerate(index.parts):
        if part.captions:
            texts += json.loads((folder / f"texts-{number:05d}.json").read_text(encoding="utf-8"))
    return texts
