"""Which files a data set was read from: their SHA-256, which the model card shows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from zoo.errors import InputError, nearest

__all__ = ["checked_digests", "digest"]


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits.

    Args:
        path: the file.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_digests(files: Iterable[str | Path], expected: Mapping[str, str]) -> dict[str, str]:
    """Hash files and compare them with what is expected.

    Args:
        files: existing files; one that is named twice counts once.
        expected: SHA-256 of some of them by name.

    Returns:
        The SHA-256 of each by its name, with its folder in front if several have that name.

    Raises:
        InputError: a file differs, or a name is none of the files.
    """
    unique = list(dict.fromkeys(Path(file) for file in files))
    names = [path.name for path in unique]
    named = {path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}": path for path in unique}
    found = {name: digest(path) for name, path in named.items()}
    for name, value in expected.items():
        if name not in found:
            raise InputError(
                f"sha256 names {name!r}, which is no input.{nearest(name, found)} They are: {', '.join(found)}"
            )
        if found[name] != value.lower():
            raise InputError(
                f"{named[name]} has SHA-256 {found[name]}, but sha256 expects {value}: it is another file, or damaged"
            )
    return found
