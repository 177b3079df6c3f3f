"""The one exception of the zoo: input that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

__all__ = ["InputError", "nearest", "require_choice"]


class InputError(ValueError):
    """Input that cannot be used; the message names it, the rule it breaks and the remedy.

    The command line prints the message alone and exits with 2; anything else keeps its traceback, because it is a defect
    of the zoo or of user code and not of the input.
    """


def _likeness(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, second, first).ratio()


def nearest(name: str, candidates: Iterable[str], *, count: int = 3) -> str:
    """Return `` Did you mean …?`` with the nearest candidates, or an empty string if none is near.

    Args:
        name: what was asked for.
        candidates: the names that exist.
        count: how many names to show at most.

    Returns:
        A sentence that begins with a space, to be appended to an error message.

    Example:
        >>> nearest("resnet81", ["resnet18", "vit_tiny"])
        ' Did you mean resnet18?'
    """
    pool = list(candidates)
    lowered = {candidate.lower(): candidate for candidate in pool}
    found = difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)
    if found:  # beside a name that is one letter away, one that is half alike is noise
        best = _likeness(name.lower(), found[0])
        found = [key for key in found if _likeness(name.lower(), key) > best - 0.3]
    return f" Did you mean {', '.join(lowered[key] for key in found)}?" if found else ""


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse anything but one of some names.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        choices: the names.

    Raises:
        InputError: it is none of them; the nearest are shown.

    Example:
        >>> require_choice("mode", "sum", ("product", "sum"))
    """
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{nearest(str(value), choices)}")
