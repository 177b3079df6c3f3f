"""Faults to inject and the log of what was asked: both for assertions of tests.

Every fault names the requests that it acts on: ``method`` and ``path`` are regular expressions (``fullmatch`` of the
verb, ``search`` in the path with its query). Of the requests that match, counted from the moment the fault is added, it
acts on the ``nth`` (from 1) and the following ones, ``times`` in all (None: for ever).
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Fault", "Faults", "Request"]


@dataclass(frozen=True)
class Request:
    """One request, logged when its answer begins to leave, so before the client sees it.

    Attributes:
        method: the verb.
        path: path and query, as sent.
        host: the name in the Host header without the port: ``127.0.0.1`` is the Hub, ``localhost`` the storage.
        status: of the answer; None if a fault cut it or the client went away before its request was complete.
        authorization: whether an Authorization header was there. Its value is not kept.
    """

    method: str
    path: str
    host: str
    status: int | None
    authorization: bool


@dataclass(eq=False)
class Fault:
    """One rule; made by the methods of :class:`Faults`.

    Attributes:
        hits: the number of requests that it acted on so far.
        arrived: set as soon as it acts on a request (for ``hold`` after ``after`` bytes: as soon as these are read).
    """

    kind: Literal["fail", "hold", "cut_request", "cut_response"]
    method: str
    path: str
    nth: int
    times: int | None
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    code: str = ""
    message: str = ""
    after: int = 0
    seconds: float | None = None
    reset: bool = False
    hits: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)
    _seen: int = 0
    _released: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Hold the calling thread until :meth:`release`, or for ``seconds``."""
        self.arrived.set()
        self._released.wait(self.seconds)

    def release(self) -> None:
        """Let the held requests go on, now and in future."""
        self._released.set()

    def _acts(self, method: str, path: str) -> bool:
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self._seen += 1
        acts = self._seen >= self.nth and (self.times is None or self._seen < self.nth + self.times)
        self.hits += acts
        return acts


class Faults:
    """The switches of a server; they may be added and cleared while it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Fault] = []

    def fail(
        self,
        method: str,
        path: str,
        status: int = 500,
        *,
        nth: int = 1,
        times: int | None = 1,
        retry_after: int | None = None,
        code: str = "",
        message: str = "injected fault",
        headers: dict[str, str] | None = None,
    ) -> Fault:
        """Answer with ``status`` instead of doing what was asked.

        Args:
            method: regular expression of the verb.
            path: regular expression of the path.
            status: the HTTP status.
            nth: the first matching request that fails.
            times: how many fail.
            retry_after: seconds, sent as ``Retry-After``; the client waits one second more.
            code: ``X-Error-Code``.
            message: ``X-Error-Message`` and the JSON's ``error``.
            headers: further headers of the answer.
        """
        headers = dict(headers or {})
        if retry_after is not None:
            headers["Retry-After"] = str(retry_after)
        rule = Fault("fail", method, path, nth, times, status=status, headers=headers, code=code, message=message)
        return self._add(rule)

    def hold(self, method: str, path: str, *, after: int = 0, nth: int = 1, times: int | None = 1) -> Fault:
        """Stop in the middle of a request until ``release()``: its ``arrived`` tells that a client waits.

        Args:
            method: regular expression of the verb.
            path: regular expression of the path.
            after: read that many bytes of the body first (fewer than it has, or nothing is held); 0 holds before anything
                is read or done.
            nth: the first matching request that is held.
            times: how many are held.
        """
        return self._add(Fault("hold", method, path, nth, times, after=after))

    def delay(self, method: str, path: str, seconds: float, *, nth: int = 1, times: int | None = None) -> Fault:
        """Answer ``seconds`` later; ``release()``, ``clear()`` and the server's ``stop()`` end the wait at once."""
        return self._add(Fault("hold", method, path, nth, times, seconds=seconds))

    def cut_upload(
        self, method: str, path: str, *, after: int = 0, nth: int = 1, times: int | None = 1, reset: bool = True
    ) -> Fault:
        """Close the connection after ``after`` bytes of the request's body; what was asked is not done.

        Args:
            method: regular expression of the verb.
            path: regular expression of the path.
            after: bytes of the body to read first.
            nth: the first matching request that is cut.
            times: how many are cut.
            reset: end with RST instead of FIN.
        """
        return self._add(Fault("cut_request", method, path, nth, times, after=after, reset=reset))

    def cut_download(
        self, method: str, path: str, *, after: int = 0, nth: int = 1, times: int | None = 1, reset: bool = False
    ) -> Fault:
        """Close the connection after ``after`` bytes of the answer's body; what was asked **is** done.

        With ``after=0`` not even the head is sent: the lost answer of a commit that was made.

        Args:
            method: regular expression of the verb.
            path: regular expression of the path.
            after: bytes of the body to send first.
            nth: the first matching request that is cut.
            times: how many are cut.
            reset: end with RST instead of FIN; the client resumes a download after FIN only.
        """
        return self._add(Fault("cut_response", method, path, nth, times, after=after, reset=reset))

    def clear(self) -> None:
        """Remove every fault and let held requests go on."""
        with self._lock:
            for rule in self._rules:
                rule.release()
            self._rules.clear()

    def take(self, method: str, path: str) -> list[Fault]:
        """Return the faults that act on this request, and count it."""
        with self._lock:
            return [rule for rule in self._rules if rule._acts(method, path)]

    def _add(self, rule: Fault) -> Fault:
        with self._lock:
            self._rules.append(rule)
        return rule
