"""A stored model's folder, written so that a crash at any moment leaves one whole version.

A version is staged in a hidden folder beside the files, flushed, and committed by one rename to ``.saved``. From then on
it counts: readers look into ``.saved`` first, and its files move to their places one by one. A crash before the rename
leaves the old version, a crash after it the new one; the next save finishes what is left. One process saves at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from zoo.errors import InputError

__all__ = ["DRAWN", "FILES", "locate", "names", "write"]

# Figures that components draw themselves (see `zoo.run_facts.figures`), by file.
DRAWN = tuple(
    f"figures/{name}{number}.png"
    for name in ("layers", "robustness", "saliency", "samples")
    for number in ("", "_2", "_3", "_4")
)
# The files of the format. A hand-written README.md outlives a save that brings none; the others belong to one version.
FILES = (
    "config.json", "model.safetensors", "recipe.yaml", "README.md", "figures/loss.png", "figures/metrics.png", *DRAWN,
)  # fmt: skip
_KEPT = ("README.md",)
_COMMITTED = ".saved"
_STAGED = ".saving-"
_MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 1 << 12


def write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace the stored model in a folder by what ``fill`` writes.

    Args:
        folder: the folder; it is created, and files that are not part of the format stay.
        fill: writes some of `FILES` into the empty folder that it is given.

    Raises:
        InputError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder to save into")
    folder.mkdir(parents=True, exist_ok=True)
    _finish(folder)
    for abandoned in folder.glob(f"{_STAGED}*"):
        shutil.rmtree(abandoned)
    staging = folder / f"{_STAGED}{os.getpid()}"
    staging.mkdir()
    try:
        fill(staging)
        names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        assert set(names) <= set(FILES), names
        (staging / _MANIFEST).write_text(json.dumps(names))
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        staging.rename(folder / _COMMITTED)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _flush(folder)
    _finish(folder)


def locate(folder: Path, name: str) -> Path | None:
    """Return the path of one file of the version that counts, or None if it has no such file.

    Args:
        folder: the folder of a stored model.
        name: one of `FILES`.

    Raises:
        InputError: the folder holds a version that is no work of `write`.
    """
    committed = folder / _COMMITTED
    names = _manifest(committed)
    if names is not None and name not in _KEPT and name not in names:
        return None
    for path in (committed / name, folder / name) if names is not None else (folder / name,):
        if path.is_file():
            return path
    return None


def names(folder: Path) -> list[str]:
    """Return the files of the format that the version that counts has."""
    return [name for name in FILES if locate(folder, name) is not None]


def _finish(folder: Path) -> None:
    """Move the files of a committed version to their places; safe to repeat after a crash at any point."""
    committed = folder / _COMMITTED
    names = _manifest(committed)
    if names is not None:
        for name in FILES:
            if name not in names and name not in _KEPT:
                (folder / name).unlink(missing_ok=True)
        for name in names:
            if (committed / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                (committed / name).replace(folder / name)
        _flush(folder)
        for nested in committed.iterdir():
            if nested.is_dir():
                nested.rmdir()
        (committed / _MANIFEST).unlink()
    if committed.is_dir():
        # Never with its content: what is in there now would be the next version, of another process.
        committed.rmdir()


def _manifest(committed: Path) -> list[str] | None:
    """Return the names of the files of a committed version, or None where there is none."""
    path = committed / _MANIFEST
    if not path.is_file():
        return None
    if path.stat().st_size <= _MAX_MANIFEST_BYTES:
        try:
            names = json.loads(path.read_bytes())
        except ValueError:
            names = None
        if isinstance(names, list) and all(name in FILES for name in names):
            return names
    raise InputError(f"{path} is not what a save leaves behind: delete {committed}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
