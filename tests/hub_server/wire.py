"""HTTP: one thread a connection, bodies read and written piecewise, faults injected, every request logged."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.hub_server.faults import Fault, Faults, Request
from tests.hub_server.store import HubError

__all__ = ["Answer", "Body", "Call", "Slice", "Wire"]

_PIECE = 1 << 16


@dataclass(frozen=True)
class Slice:
    """``length`` bytes of a file from ``start``."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Answer:
    """What a route returns; a HEAD request gets its headers alone."""

    body: bytes | Slice = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
        """Answer with JSON; NaN is refused, as a JavaScript server would never send it."""
        body = json.dumps(value, allow_nan=False).encode()
        return cls(body, status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


class Cut(ConnectionError):
    """The connection ended before the request was complete, by a fault or by the client."""


class Body:
    """A request's body, by ``Content-Length`` or chunked, read in pieces of at most 64 KiB."""

    def __init__(self, stream: io.BufferedIOBase, *, length: int | None) -> None:
        self._stream = stream
        self._left = length  # None: chunked
        self._chunk = 0
        self._count = 0
        self._done = length == 0
        self.marks: list[tuple[int, Callable[[], None]]] = []

    def pieces(self) -> Iterator[bytes]:
        """Yield what is left of the body.

        Raises:
            Cut: the client closed the connection in the middle.
        """
        while not self._done:
            due = [mark for mark in self.marks if mark[0] <= self._count]
            for mark in due:
                self.marks.remove(mark)
                mark[1]()
            limit = min((at - self._count for at, _ in self.marks), default=_PIECE)
            piece = self._next(min(limit, _PIECE))
            self._count += len(piece)
            if piece:
                yield piece

    def read(self, *, limit: int = 1 << 26) -> bytes:
        """Return the rest of the body; 413 if it is longer than ``limit`` bytes."""
        buffer = bytearray()
        for piece in self.pieces():
            buffer += piece
            if len(buffer) > limit:
                raise HubError(413, "", "Payload too large")
        return bytes(buffer)

    def lines(self, *, limit: int = 1 << 25) -> Iterator[bytes]:
        """Yield line by line; 413 if one is longer than ``limit`` bytes."""
        buffer = bytearray()
        for piece in self.pieces():
            buffer += piece
            if b"\n" in piece:
                *complete, buffer = buffer.split(b"\n")
                yield from map(bytes, complete)
            if len(buffer) > limit:
                raise HubError(413, "", "Payload too large")
        if buffer:
            yield bytes(buffer)

    def _next(self, limit: int) -> bytes:
        if self._left is not None:
            piece = self._read1(min(limit, self._left))
            self._left -= len(piece)
            self._done = self._left == 0
            return piece
        if self._chunk == 0:
            self._chunk = self._chunk_size()
            if self._chunk == 0:
                self._stream.readline(3)
                self._done = True
                return b""
        piece = self._read1(min(limit, self._chunk))
        self._chunk -= len(piece)
        if self._chunk == 0:
            self._stream.readline(3)
        return piece

    def _chunk_size(self) -> int:
        line = self._stream.readline(64).split(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,16}", line):
            raise Cut("The client closed the connection between two chunks")
        return int(line, 16)

    def _read1(self, count: int) -> bytes:
        piece = self._stream.read1(count)
        if not piece:
            raise Cut("The client closed the connection in mid-body")
        return piece


@dataclass
class Call:
    """One request as a route sees it: ``parts`` are the unquoted segments of the path, so ``a%2Fb`` stays one."""

    method: str
    parts: list[str]
    query: dict[str, list[str]]
    headers: Any
    body: Body
    target: str

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("1", "true")

    def text(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[-1]

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body.read() or b"{}")
        except ValueError as error:
            raise HubError(400, "", f"Invalid JSON: {error}") from error
        if not isinstance(value, dict):
            raise HubError(400, "", "The body must be a JSON object")
        return value


class Wire(ThreadingHTTPServer):
    """The listening socket with its connections, log and faults; ``route`` does what is asked."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, route: Callable[[Call], Answer], faults: Faults) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.route = route
        self.faults = faults
        self.log: list[Request] = []
        self.errors: list[str] = []
        self.changed = threading.Condition()
        self.busy = 0
        self.stopping = False
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.changed:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.changed:
            self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close every connection, kept-alive ones too, and give up the requests that a fault holds."""
        self.stopping = True
        with self.changed:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # closed a moment ago
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that ended is a fact of life; anything else is a defect of this server, kept for the tests."""
        if not isinstance(sys.exception(), ConnectionError):
            self.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Wire
    _logged = False

    def log_message(self, *arguments: Any) -> None:
        return

    def _serve(self) -> None:
        self._logged = False
        with self.server.changed:
            self.server.busy += 1
        try:
            self._answer()
        except ConnectionError:
            self.close_connection = True
        finally:
            self._log(None)
            with self.server.changed:
                self.server.busy -= 1
                self.server.changed.notify_all()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _log(self, status: int | None) -> None:
        """Log once a request, before its answer leaves: who sees the answer finds the entry."""
        if self._logged:
            return
        self._logged = True
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        entry = Request(self.command, self.path, host, status, "Authorization" in self.headers)
        with self.server.changed:
            self.server.log.append(entry)

    def _answer(self) -> None:
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        body = Body(self.rfile, length=None if chunked else int(self.headers.get("Content-Length", 0)))
        faults = self.server.faults.take(self.command, self.path)
        answer = self._injected(faults, body) or self._routed(body)
        for _ in body.pieces():  # what the route left unread; the next request follows it on this connection
            pass
        self._send(answer, next((fault for fault in faults if fault.kind == "cut_response"), None))

    def _injected(self, faults: list[Fault], body: Body) -> Answer | None:
        """Install the faults of the body, wait where one says so, and return the failure of the one that fails."""
        for fault in faults:
            action = {"hold": self._hold, "cut_request": self._cut}.get(fault.kind)
            if action is not None and fault.after == 0:
                action(fault)
            elif action is not None:
                body.marks.append((fault.after, functools.partial(action, fault)))
        failing = next((fault for fault in faults if fault.kind == "fail"), None)
        if failing is None:
            return None
        failing.arrived.set()
        return _refusal(HubError(failing.status, failing.code, failing.message, headers=failing.headers))

    def _routed(self, body: Body) -> Answer:
        path, _, query = self.path.partition("?")
        parts = [unquote(part) for part in path.split("/") if part]
        fields = parse_qs(query, keep_blank_values=True)
        try:
            return self.server.route(Call(self.command, parts, fields, self.headers, body, self.path))
        except HubError as error:
            return _refusal(error)

    def _send(self, answer: Answer, cut: Fault | None) -> None:
        if cut is not None and cut.after == 0:
            self._cut(cut)
        self._log(answer.status if cut is None else None)
        self.send_response(answer.status)
        length = answer.body.length if isinstance(answer.body, Slice) else len(answer.body)
        for name, value in {"Content-Length": str(length), **answer.headers}.items():
            self.send_header(name, re.sub(r"[^\x20-\x7e]", "?", value))
        self.end_headers()
        if self.command == "HEAD":
            return
        left = length if cut is None else min(cut.after, length)
        for piece in _pieces(answer.body, left):
            self.wfile.write(piece)
        if cut is not None:
            self._cut(cut)

    def _hold(self, fault: Fault) -> None:
        fault.wait()
        if self.server.stopping:
            raise Cut("The server stopped while a fault held this request")

    def _cut(self, fault: Fault) -> None:
        fault.arrived.set()
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise Cut("A fault closed the connection")


def _pieces(body: bytes | Slice, length: int) -> Iterator[bytes]:
    if isinstance(body, bytes):
        yield body[:length]
        return
    with body.path.open("rb") as file:
        file.seek(body.start)
        while length > 0 and (piece := file.read(min(length, _PIECE))):
            length -= len(piece)
            yield piece


def _refusal(error: HubError) -> Answer:
    headers = {"X-Error-Message": error.message.replace("\n", " "), **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    return Answer.of({"error": error.message, **error.members}, status=error.status, headers=headers)
