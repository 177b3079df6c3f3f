"""Samples in tar files, the layout of webdataset, by position.

A tar file without compression can be read at any place once its headers are known. So shards are indexed first, some
15,000 members a second, and then every sample has a number, as in a folder. Exact resumption in the middle of an epoch,
equal shares for all processes, splits and an order that depends on (seed, epoch) alone follow from that without a stream
whose state would have to be stored. What is kept of streaming is its locality: `ShardShuffle` walks through the shards, a
few at a time.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.data.draws import random_words
from zoo.data.loading import Draw, EpochShuffle
from zoo.data.splits import Indices
from zoo.data.transforms import naming_image
from zoo.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ShardShuffle", "TarShards", "shard_files"]

_BLOCK = 512
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_IMAGES = ("jpg", "jpeg", "png", "webp")
# Columns of an index: begin and size of the image, the text, the JSON and the class; a size of -1 says there is none.
_ENDINGS = {**dict.fromkeys(_IMAGES, 0), "txt": 1, "json": 2, "cls": 3}
_SHARDS, _SAMPLES = 4, 5  # streams of random numbers


def _expand(name: str) -> list[str]:
    match = _RANGE.search(name)
    if match is None:
        return [name]
    first, last = match[1], match[2]
    if not int(first) <= int(last) < int(first) + 10**6:
        raise InputError(f"{name!r}: {match[0]} must count upwards, over at most a million shards")
    head = name[: match.start()]
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [head + number + tail for number in numbers for tail in _expand(name[match.end() :])]


def shard_files(argument: str, names: str | Sequence[str]) -> list[str]:
    """Find the local tar files that names stand for.

    Args:
        argument: the argument that holds the names, for messages.
        names: paths, with ranges as in ``shard-{0000..0099}.tar`` or patterns with ``*``; one or several.

    Returns:
        Paths in the order of the names; those of a pattern in sorted order.

    Raises:
        InputError: a file does not exist, a pattern matches none, or a name stands for a command or a web address.

    Example:
        >>> shard_files("train", "no-{8..10}.tar")
        Traceback (most recent call last):
        zoo.errors.InputError: train: there is no shard 'no-8.tar'
    """
    files: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if re.match(r"[a-z0-9]+://|pipe:", name):
            raise InputError(
                f"{argument}: shards must be local files, so that any sample can be read; copy {name} first"
            )
        for path in _expand(name):
            matches = sorted(glob.glob(path)) if glob.has_magic(path) and not Path(path).exists() else [path]  # noqa: PTH207
            if not matches or not Path(matches[0]).is_file():
                raise InputError(f"{argument}: there is no shard {path!r}")
            files += matches
    if not files:
        raise InputError(f"{argument} must name at least one shard, got {names!r}")
    return files


def _index(path: str) -> Indices:
    """Read the headers of a tar file and return the places (n, 8) of its samples."""
    rows: list[list[int]] = []
    last = None
    size = Path(path).stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or tarfile remembers every one
                # Members of a sample follow each other and differ behind the first dot of the file's name.
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                kind = _ENDINGS.get(ending.lower())
                if kind is None or not member.isreg() or member.issparse():
                    continue
                if (folder, stem) != last or rows[-1][2 * kind + 1] >= 0:
                    last = (folder, stem)
                    rows.append([0, -1] * 4)
                if member.offset_data + member.size > size:
                    raise InputError(f"{path}: {member.name} is cut off; copy the shard again")
                rows[-1][2 * kind : 2 * kind + 2] = member.offset_data, member.size
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{path} is no readable tar file: {error}; a compressed one must be unpacked to .tar first"
        ) from error
    with Path(path).open("rb") as file:  # tarfile takes a damaged header behind the first one for the end
        file.seek(end)
        if any(file.read(_BLOCK)):
            raise InputError(f"{path} is damaged at byte {end}; copy the shard again")
    return np.asarray(rows, dtype=np.int64).reshape(-1, 8)


def _stored_index(path: str, folder: str | None) -> Indices:
    """Return the index of a tar file, kept in a folder for the next time if there is one."""
    if folder is None:
        return _index(path)
    place, state = Path(path).resolve(), Path(path).stat()
    stamp = np.asarray([state.st_size, state.st_mtime_ns], dtype=np.int64)
    name = f"{place.name}.{hashlib.sha256(str(place).encode()).hexdigest()[:16]}.npy"
    kept = Path(folder, name)
    if kept.is_file():
        try:
            table = np.load(kept, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{kept} is no readable index of {path}: {error}; delete it") from error
        if table.ndim == 2 and table.shape[1] == 8 and np.array_equal(table[0, :2], stamp):
            return np.asarray(table[1:])
    table = np.concatenate([np.pad(stamp, (0, 6))[None], _index(path)])
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(f".{os.getpid()}.part")
    with draft.open("wb") as file:
        np.save(file, table)
    draft.replace(kept)
    return table[1:]


class TarShards:
    """The images and captions of some shards, by position; picklable.

    Members that belong together follow each other and are named alike up to the first dot: ``0001.jpg`` (or jpeg, png,
    webp), ``0001.txt``, ``0001.json``, ``0001.cls``. Others are ignored, and so are names with neither an image nor a text.
    Nothing is ever unpacked to disk.

    Args:
        files: paths of uncompressed tar files.
        caption_field: field of the JSON member with the caption, a text or a list of texts. None takes the txt member
            and, where a sample has none, the field ``caption``.
        label_field: "cls" for the member of that ending, otherwise a field of the JSON member; None: no labels.
        index_dir: folder that keeps the index of each shard for the next run; None indexes the shards each time.

    Raises:
        InputError: a file is no tar file, damaged or cut off, or there are no samples.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        caption_field: str | None = None,
        label_field: str | None = None,
        index_dir: str | None = None,
    ) -> None:
        self.files = list(files)
        self.caption_field = caption_field
        self.label_field = label_field
        tables = [_stored_index(file, index_dir) for file in self.files]
        tables = [table[(table[:, 1] >= 0) | (table[:, 3] >= 0)] for table in tables]
        self._ends = np.cumsum([len(table) for table in tables]).tolist()
        if self._ends[-1] == 0:
            raise InputError(
                f"{', '.join(self.files[:3])}: no samples; expected members such as 0001.jpg and 0001.txt, side by side"
            )
        table = np.concatenate(tables)
        if caption_field is None:
            self._use_json = table[:, 3] < 0
            caption = np.where(self._use_json[:, None], table[:, 4:6], table[:, 2:4])
        else:
            self._use_json = np.ones(len(table), dtype=bool)
            caption = table[:, 4:6]
        label = table[:, 6:8] if label_field == "cls" else table[:, 4:6]
        self._places = np.concatenate([table[:, :2], caption, *([label] if label_field else [])], axis=1)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shard_of(self) -> Indices:
        """The shard that each sample is in (N,), from 0."""
        counts = np.diff(np.asarray([0, *self._ends]))
        return np.repeat(np.arange(len(self.files)), counts)

    def place(self, row: int) -> str:
        """Say where a sample is.

        Args:
            row: its position in all shards, from 0.

        Returns:
            The file, and the name of a member of the sample.
        """
        file = Path(self.files[bisect_right(self._ends, row)])
        part = 0 if self._places[row, 1] >= 0 else 2
        begin = max(int(self._places[row, part]) - _BLOCK, 0)
        with file.open("rb") as opened:  # the header, where the name is, stands before the content
            opened.seek(begin)
            name = opened.read(100).split(b"\0")[0].decode("utf-8", "replace")
        return f"{file}, {name}"

    def _read(self, row: int, part: int, what: str) -> bytes:
        begin, size = self._places[row, part : part + 2].tolist()
        if size < 0:
            raise InputError(f"{self.place(row)}: the sample has no {what}")
        with Path(self.files[bisect_right(self._ends, row)]).open("rb", buffering=0) as file:
            file.seek(begin)
            content = file.read(size)
        if len(content) != size:
            raise InputError(f"{self.place(row)}: the shard is shorter than it was when it was indexed")
        return content

    def _field(self, row: int, part: int, field: str) -> Any:
        try:
            value = json.loads(self._read(row, part, "json member"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{self.place(row)}: the json member cannot be read: {error}") from error
        if not isinstance(value, dict) or field not in value:
            raise InputError(f"{self.place(row)}: the json member has no field {field!r}")
        return value[field]

    def image(self, row: int) -> Image:
        """Decode the image of a sample, mode RGB.

        Args:
            row: its position in all shards, from 0.

        Raises:
            InputError: there is none, or it cannot be decoded.
        """
        from PIL import Image

        content = self._read(row, 0, f"image ({', '.join(_IMAGES)})")
        with naming_image(self.place, row):
            return Image.open(io.BytesIO(content)).convert("RGB")

    def captions(self, row: int) -> list[str]:
        """Return the captions of a sample, at least one, none of them blank.

        Args:
            row: its position in all shards, from 0.

        Raises:
            InputError: there is none, or it is no text.
        """
        if self._use_json[row]:
            found = self._field(row, 2, self.caption_field or "caption")
        else:
            try:
                found = self._read(row, 2, "caption").decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{self.place(row)}: the caption is no UTF-8 text: {error}") from error
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{self.place(row)}: the caption must be a text or a list of texts, got {found!r:.80}")
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise InputError(f"{self.place(row)}: the caption is empty")
        return texts

    def caption_counts(self, rows: Indices) -> Indices:
        """Return how many captions samples have, at least 1 (one that cannot be read is found out when it is asked for).

        Args:
            rows: their positions (B,).
        """
        counts = np.ones(len(rows), dtype=np.int64)
        for position in np.flatnonzero(self._use_json[rows]).tolist():
            try:
                counts[position] = len(self.captions(int(rows[position])))
            except InputError:
                continue
        return counts

    def label(self, row: int) -> int | None:
        """Return the class of a sample; None without ``label_field``.

        Args:
            row: its position in all shards, from 0.

        Raises:
            InputError: it is no whole number of at least 0.
        """
        if self.label_field is None:
            return None
        text = self._read(row, 4, "cls member") if self.label_field == "cls" else self._field(row, 4, self.label_field)
        try:
            number = int(text) if not isinstance(text, float | bool | list | dict | None) else -1
        except ValueError:
            number = -1
        if number < 0:
            raise InputError(f"{self.place(row)}: the label must be a whole number of at least 0, got {text!r:.80}")
        return number


class ShardShuffle(EpochShuffle):
    """A shuffled order that reads a few shards at a time.

    An epoch goes through the shards in random order, ``window`` shards at a time, and through the samples of a window in
    random order. With no more shards than that, it is a shuffle of all samples. Each process takes one stretch of the
    epoch, and thus opens its own shards; all stretches are equally long, for which the last is filled up from the epoch's
    beginning. The order is a function of (seed, epoch) alone.

    Args:
        shard_of: shard of each sample of the data set (N,), from 0.
        window: shards that are mixed, at least 1.
        num_replicas: number of processes.
        rank: this process, from 0.
        seed: number of the order.

    Example:
        >>> order = list(ShardShuffle(np.array([0, 0, 0, 1, 1, 1]), window=1, seed=1))
        >>> sorted(order[:3]), sorted(order[3:])
        ([3, 4, 5], [0, 1, 2])
    """

    def __init__(self, shard_of: Indices, *, window: int, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(range(len(shard_of)), num_replicas=num_replicas, rank=rank, seed=seed)
        self.window = window
        self._key = seed
        self._members = np.argsort(shard_of, kind="stable")
        self._counts = np.bincount(shard_of)
        self._starts = np.cumsum(self._counts) - self._counts

    def __iter__(self) -> Iterator[Draw]:
        skip, self.skip = self.skip, 0
        begin = self.rank * self.num_samples
        return (Draw(index, self.epoch) for index in islice(self._from(begin + skip), self.num_samples - skip))

    def _from(self, position: int) -> Iterator[int]:
        """Go through the epoch from a position onwards, and round its end."""
        shards = np.argsort(random_words((_SHARDS, self._key, self.epoch), np.arange(len(self._counts))), kind="stable")
        windows = [shards[start : start + self.window] for start in range(0, len(shards), self.window)]
        position %= len(self._members)
        while True:
            for window in windows:
                size = int(self._counts[window].sum())
                if position < size:
                    yield from self._mixed(window)[position:].tolist()
                position = max(position - size, 0)

    def _mixed(self, window: Indices) -> Indices:
        members = np.concatenate(
            [self._members[self._starts[shard] : self._starts[shard] + self._counts[shard]] for shard in window]
        )
        return members[np.argsort(random_words((_SAMPLES, self._key, self.epoch), members), kind="stable")]
