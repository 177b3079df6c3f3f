"""What every talk with the Hub shares: names, errors as one sentence, second tries, and a limit to silence. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from zoo.errors import InputError

__all__ = [
    "ATTEMPTS",
    "Push",
    "Source",
    "TagTakenError",
    "UnreachableError",
    "limit_silence",
    "readable_errors",
    "retry",
    "shown",
]

_Result = TypeVar("_Result")
ATTEMPTS = 4
# How long the client may hear nothing, or send nothing, before a connection counts as dead. Its own default is for ever.
SILENCE_SECONDS = 60.0


class UnreachableError(InputError):
    """The Hub cannot be reached or has a fault of its own: what was asked for may work later."""


class TagTakenError(InputError):
    """The commit is made, but the tag that it was to have stands on another one."""


@dataclass(frozen=True)
class Source:
    """A repository on the Hub: its id, and the revision that was asked for (None is the head of the default branch)."""

    repo_id: str
    revision: str | None = None


@dataclass(frozen=True)
class Push:
    """What a push sent, or would send.

    Attributes:
        repo_id: the repository.
        files: name and size in bytes of each file of the stored model.
        commit: the commit that holds them, None for a dry run.
        changed: whether a commit was made.
        url: address of the commit or of the pull request.
        tag: the tag that was set, if any.
    """

    repo_id: str
    files: dict[str, int] = field(default_factory=dict)
    commit: str | None = None
    changed: bool = False
    url: str | None = None
    tag: str | None = None


def shown(source: Source) -> str:
    """Return a repository as it is written in messages."""
    return source.repo_id + (f"@{source.revision}" if source.revision else "")


@contextmanager
def readable_errors(source: Source) -> Iterator[None]:
    """Turn what the client raises into one sentence that says what to do; no message of it holds a token."""
    from huggingface_hub import errors

    try:
        yield
    except InputError:
        raise
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{source.repo_id} has no revision {source.revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"no repository {source.repo_id} that this token can see: check the name, and for a private one set HF_TOKEN "
            "or run `hf auth login`"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise InputError("nobody is logged in to the Hub: set HF_TOKEN or run `hf auth login`") from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(f"{shown(source)} is not in the cache, and the Hub is not asked (offline)") from error
    except _passing_errors() as error:
        status = _status_of(error) or _status_of(error.__cause__)
        kind = UnreachableError if status is None or status >= 500 or status == 429 else InputError
        raise kind(f"{shown(source)}: {_reason_of(error)}") from error
    except ValueError as error:  # the client's own checks of names, such as hostile file names
        raise InputError(f"{shown(source)}: {str(error).splitlines()[0]}") from error


def _passing_errors() -> tuple[type[Exception], ...]:
    """Kinds of error that a later try may not meet: the Hub's, the network's, and the client's wrapping of them."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    return (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError)


def _status_of(error: BaseException | None) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _reason_of(error: BaseException) -> str:
    status = _status_of(error) or _status_of(error.__cause__)
    if status in (401, 403):
        return f"the Hub refuses ({status}): the token is missing, expired or may not write there; set HF_TOKEN"
    if status is not None:
        return f"the Hub answered {status}; try again later"
    return f"the Hub cannot be reached ({type(error).__name__}); check the network, then try again"


def retry(call: Callable[[], _Result], *, wait: Callable[[float], None] | None = None) -> _Result:
    """Call until it succeeds, with growing pauses after errors that may pass; other errors are raised at once."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    for attempt in range(ATTEMPTS):
        try:
            limit_silence()
            return call()
        except _passing_errors() as error:
            status = _status_of(error) or _status_of(error.__cause__)
            permanent = status is not None and status < 500 and status != 429
            silent = any(isinstance(found, httpx.TimeoutException) for found in (error, error.__cause__))
            if permanent or silent or attempt == ATTEMPTS - 1:
                raise
            (wait or time.sleep)(min(2.0**attempt, 30.0))
    raise AssertionError("unreachable")


def limit_silence() -> None:
    """Give the client's shared session a time limit where it has none; one that the user has set stays."""
    from huggingface_hub import get_session

    session = get_session()
    if session.timeout.read is None:
        session.timeout = SILENCE_SECONDS
