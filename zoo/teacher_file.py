"""The file of a teacher cache: one safetensors file, whole or not there.

Tensors, in this order: ``labels`` (N,) int64, ``features`` (N, D) and ``logits`` (N, K), float32 or float16. What they
come from stands in the header as one JSON object (`TeacherFacts`), and fixes the rest of the header and the file's length:
a file of any other shape or length is refused.

A file is built under a hidden name beside its own, at its full length from the beginning, so that processes write their
rows wherever they belong. Its header comes last and one rename makes it count. Whoever builds holds a lock on it, which
ends with the process: what a crash leaves behind is overwritten by the next build.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zoo.errors import InputError

__all__ = ["TeacherFacts", "building", "commit", "map_tensors", "partial_path", "read_facts", "to_rows", "write_rows"]

_FORMAT = "zoo-teacher-cache-1"
_MAX_HEADER_BYTES = 1 << 20
_CODES = {"int64": "I64", "float32": "F32", "float16": "F16"}


@dataclass(frozen=True)
class TeacherFacts:
    """What a cache was computed from.

    Attributes:
        teacher: name of the tower, None for a module that was given ready.
        revision: revision of its weights, where the name carries one.
        sha256: its fingerprint (`zoo.towers.fingerprint`).
        stored_sha256: for a teacher that is a stored zoo model, the SHA-256 of the weights in its folder.
        options: what else it was built with, as JSON text.
        samples: number of training samples N.
        dim: width D of the features.
        num_classes: number of logits K.
        dtype: float32 or float16.
        precision: the type that the teacher computed in.
        probes: (position, label, digest of the image) of up to 64 samples, evenly spaced.
        zoo_version: the version that wrote it.
    """

    teacher: str | None
    revision: str | None
    sha256: str
    stored_sha256: str | None
    options: str
    samples: int
    dim: int
    num_classes: int
    dtype: str
    precision: str
    probes: list[list[Any]]
    zoo_version: str


def _shapes(facts: TeacherFacts) -> dict[str, tuple[int, ...]]:
    rows = facts.samples
    return {"labels": (rows,), "features": (rows, facts.dim), "logits": (rows, facts.num_classes)}


def _dtype(name: str, facts: TeacherFacts) -> np.dtype[Any]:
    return np.dtype("int64" if name == "labels" else facts.dtype).newbyteorder("<")


def _header(facts: TeacherFacts) -> tuple[bytes, dict[str, int], int]:
    """Return the bytes before the tensors, where each tensor begins in the file, and the length of the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "facts": json.dumps(asdict(facts))}}
    begins, end = {}, 0
    for name, shape in _shapes(facts).items():
        dtype = _dtype(name, facts)
        begins[name] = end
        end += math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype.name], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + begin for name, begin in begins.items()}, first + end


def read_facts(path: Path) -> TeacherFacts:
    """Read what a cache was computed from; the file's header and length are checked, its values are not read.

    Args:
        path: the file.

    Raises:
        InputError: it is no teacher cache, of another version, damaged, or not whole.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            raw = file.read(size) if size <= _MAX_HEADER_BYTES else b""
            length = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read as a teacher cache: {error.strerror}") from error
    try:
        metadata = json.loads(raw)["__metadata__"]
        form, text = metadata["format"], metadata["facts"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no teacher cache, or damaged: delete it, or give another path, and it is built anew"
        ) from error
    if form != _FORMAT:
        raise InputError(f"{path} has format {form!r}, this version of the zoo reads {_FORMAT}: delete it")
    try:
        facts = TeacherFacts(**json.loads(text))
        header, _, expected = _header(facts)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: its header is not what the zoo writes; delete it") from error
    if header[8:] != raw:
        raise InputError(f"{path} is damaged: its header is not what the zoo writes; delete it")
    if length != expected:
        raise InputError(
            f"{path} is not whole: it has {length} bytes, expected {expected}; copy it again, or delete it"
        )
    return facts


def map_tensors(path: Path, facts: TeacherFacts) -> dict[str, npt.NDArray[Any]]:
    """Map the tensors of a cache, read-only; pages are read when they are touched.

    Args:
        path: the file.
        facts: what `read_facts` returned for it.
    """
    _, begins, _ = _header(facts)
    return {
        # A plain view of the map: np.memmap makes a Python object of every slice, which costs more than the slice.
        name: np.asarray(np.memmap(path, _dtype(name, facts), mode="r", offset=begins[name], shape=shape))
        for name, shape in _shapes(facts).items()
    }


def partial_path(path: Path) -> Path:
    """Return the name under which the file at ``path`` is built."""
    return path.with_name(f".{path.name}.building")


@contextmanager
def building(path: Path, facts: TeacherFacts) -> Iterator[None]:
    """Hold an empty file of the full length under the name `partial_path`; it is gone at the end, unless `commit` took it.

    Args:
        path: where the cache will be.
        facts: what it will hold.

    Raises:
        InputError: the folder is none, there is too little room on the disk, or another run is building this cache.
    """
    partial = partial_path(path)
    _, _, length = _header(facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("a+b")
    except OSError as error:
        raise InputError(f"the teacher cache {path} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run is building the teacher cache {path}: wait for it, then use it") from error
        if not _is_same(file.fileno(), partial):
            raise InputError(f"another run has just built the teacher cache {path}: use it")
        try:
            file.truncate(0)
            free = shutil.disk_usage(path.parent).free
            if length > free:
                raise InputError(
                    f"the teacher cache {path} takes {length / 2**30:.3g} GiB, and the disk has {free / 2**30:.3g} free: "
                    "choose another disk, or dtype='float16'"
                )
            file.truncate(length)
            yield
        finally:
            if _is_same(file.fileno(), partial):
                partial.unlink()


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def to_rows(output: Tensor, name: str, facts: TeacherFacts, *, first: int) -> npt.NDArray[Any]:
    """Return outputs of the teacher in the type of the file.

    Args:
        output: features or logits of a batch.
        name: which of them.
        facts: what the file will hold.
        first: position of the first row.

    Raises:
        InputError: a value is not finite, or not in that type.
    """
    rows = output.detach().to("cpu", torch.float16 if facts.dtype == "float16" else torch.float32)
    broken = rows.isfinite().all(1).logical_not().nonzero().flatten().tolist()
    if broken:
        largest = float(output[broken[0]].abs().max())
        remedy = (
            "dtype='float32' holds it" if math.isfinite(largest) else "the teacher is broken, or overflows in autocast"
        )
        raise InputError(
            f"the teacher's {name} for sample {first + broken[0]} do not fit into {facts.dtype} (the largest is "
            f"{largest:.3g}): {remedy}"
        )
    return rows.numpy()


def write_rows(file: FileIO, facts: TeacherFacts, first: int, rows: dict[str, npt.NDArray[Any]]) -> None:
    """Write consecutive rows of every tensor.

    Args:
        file: the file at `partial_path`, opened with ``"r+b"`` and without a buffer.
        facts: what it will hold.
        first: position of the first row.
        rows: the rows (B, …) by tensor, in the dtypes of the file.
    """
    _, begins, _ = _header(facts)
    for name, values in rows.items():
        assert values.dtype == _dtype(name, facts), name
        assert values.shape[1:] == _shapes(facts)[name][1:], name
        width = math.prod(values.shape[1:]) * values.itemsize
        file.seek(begins[name] + first * width)
        left = memoryview(values.tobytes())
        while left:
            left = left[file.write(left) :]


def commit(path: Path, facts: TeacherFacts) -> None:
    """Let a file count, all rows of which are written: header, flush, rename.

    Args:
        path: where the cache will be; an older one there is replaced.
        facts: what it holds.
    """
    header, _, _ = _header(facts)
    with partial_path(path).open("r+b") as file:
        file.write(header)
        file.flush()
        os.fsync(file.fileno())
    partial_path(path).replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
