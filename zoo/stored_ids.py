"""The names of users and items: as a tensor, so that a stored model holds them, and as positions.

A hundred thousand names are no part of a configuration. They are stored beside the weights, as the bytes of a JSON list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import InputError, nearest

__all__ = ["NameIndex", "names_from_tensor", "names_to_tensor"]

# Names that are compared with a mistyped one: difflib takes seconds for a million.
_COMPARED = 20_000


def names_to_tensor(names: Sequence[str]) -> Tensor:
    """Write a list of names as bytes.

    Args:
        names: any strings.

    Returns:
        The UTF-8 bytes of a JSON list, uint8.

    Raises:
        InputError: two names are equal, or one is no string.

    Example:
        >>> names_from_tensor(names_to_tensor(["a", "é"]), "users")
        ['a', 'é']
    """
    _check(names, "ids")
    return torch.frombuffer(bytearray(json.dumps(list(names)).encode()), dtype=torch.uint8)


def names_from_tensor(tensor: Tensor, what: str) -> list[str]:
    """Read what `names_to_tensor` wrote.

    Args:
        tensor: bytes, uint8, that may come from a stored file.
        what: whose names they are, for the error message.

    Returns:
        The names.

    Raises:
        InputError: it is no such list.
    """
    try:
        names = json.loads(bytes(tensor.cpu().numpy()))
    except ValueError as error:
        raise InputError(f"the stored ids of the {what} cannot be read: {error}") from error
    if not isinstance(names, list):
        raise InputError(f"the stored ids of the {what} must be a list, got {type(names).__name__}")
    _check(names, f"the stored ids of the {what}")
    return names


class NameIndex:
    """Names and their positions.

    Args:
        names: different strings.
        what: what they name, ``"user"`` or ``"item"``, for error messages.

    Example:
        >>> NameIndex(["ann", "bob"], "user").positions(["bob", "ann"])
        [1, 0]
    """

    def __init__(self, names: Sequence[str], what: str) -> None:
        self.names = list(names)
        self.what = what
        self._positions = {name: position for position, name in enumerate(self.names)}

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def __len__(self) -> int:
        return len(self.names)

    def positions(self, names: Sequence[str], remedy: str = "") -> list[int]:
        """Return the positions of names.

        Args:
            names: names that must exist.
            remedy: what to do about an unknown one, appended to the message.

        Raises:
            InputError: a name is unknown; the nearest ones are shown. Or `names` is one string.
        """
        if isinstance(names, str):
            raise InputError(f"give a list of {self.what} ids, not the one string {names!r}")
        unknown = [name for name in names if name not in self._positions]
        if unknown:
            first = unknown[0]
            wrong = f" Ids are strings, this is {type(first).__name__}."
            known = nearest(first, self.names[:_COMPARED]) if isinstance(first, str) else wrong
            raise InputError(
                f"{len(unknown)} of the {len(names)} {self.what}s are unknown, the first is {first!r}.{known}{remedy}"
            )
        return [self._positions[name] for name in names]


def _check(names: Sequence[object], what: str) -> None:
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise InputError(f"{what} must be strings, number {position} is {type(name).__name__}")
    if len(set(names)) != len(names):
        seen: set[object] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InputError(f"{what} must be different, {twice!r} is there twice")
