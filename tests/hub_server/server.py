"""The Hub as an object: start it, push to it, inject faults, look at what it holds."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.hub_server.faults import Faults, Request
from tests.hub_server.routes import dispatch
from tests.hub_server.site import Site
from tests.hub_server.store import Change, Commit, Entry, HubError, Repo, Store
from tests.hub_server.wire import Answer, Call, Wire

__all__ = ["HubServer"]


class HubServer:
    """A Hugging Face Hub on 127.0.0.1.

    It may be stopped (connections are refused then) and started again on the same folder and port. What it holds survives,
    also a SIGKILL.

    Args:
        root: the folder of everything that it keeps; made if missing. One server a folder.
        tokens: tokens of the role ``write`` and their users; may be changed while it runs (an expired token: delete it).
        read_tokens: tokens of the role ``read``, likewise.
        orgs: organizations with the names of their members.
        port: 0 takes a free one.
        page_size: entries a page of trees, commits and models.

    Attributes:
        faults: switches that make it slow, fail or hang up.
        tokens: as given.
        read_tokens: as given.
        root: as given.
        store: what it keeps, for tests that look closer.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        tokens: Mapping[str, str] | None = None,
        read_tokens: Mapping[str, str] | None = None,
        orgs: Mapping[str, Sequence[str]] | None = None,
        port: int = 0,
        page_size: int = 1000,
    ) -> None:
        self.root = Path(root)
        self.store = Store(self.root)
        self.tokens = dict({"hf_local": "me"} if tokens is None else tokens)
        self.read_tokens = dict(read_tokens or {})
        self.faults = Faults()
        self._site = Site(self.store, self.tokens, self.read_tokens, orgs or {}, page_size, port)
        self._wire: Wire | None = None
        self._thread: threading.Thread | None = None
        self._reserved: socket.socket | None = None
        self._log: list[Request] = []
        self._errors: list[str] = []

    # Running

    def start(self) -> Self:
        """Listen; the port is free or as before."""
        assert self._wire is None, "the server runs already"
        self._wire = Wire(self._site.port, self._route, self.faults)
        self._wire.log, self._wire.errors = self._log, self._errors
        self._site.port = self._wire.server_address[1]
        self._give_up_port()
        self._thread = threading.Thread(target=self._wire.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close the port and every connection; what a held request asked is not done. Clears the faults.

        Connections are refused from then on, and no other process gets the port until the server starts again or its
        ``with`` block ends.
        """
        if self._wire is None:
            return
        assert self._thread is not None
        wire, self._wire = self._wire, None
        wire.shutdown()
        wire.hang_up()
        self.faults.clear()
        wire.server_close()
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", self._site.port))
        self._thread.join()
        with wire.changed:  # whoever looks at the folder next finds nobody writing there
            wire.changed.wait_for(lambda: wire.busy == 0, 30.0)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._give_up_port()

    def _give_up_port(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    @property
    def port(self) -> int:
        return self._site.port

    @property
    def endpoint(self) -> str:
        """``http://127.0.0.1:PORT``, for ``HF_ENDPOINT``."""
        return self._site.endpoint

    @property
    def storage(self) -> str:
        """Where LFS contents live: another origin, to which no token may be sent."""
        return self._site.storage

    def environment(self, token: str | None = "hf_local") -> dict[str, str]:
        """Return the environment variables that make huggingface_hub use this server; it reads them at import."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        return variables if token is None else {**variables, "HF_TOKEN": token}

    # What was asked

    @property
    def log(self) -> list[Request]:
        """Every request so far, in the order of their answers; ``log.clear()`` begins anew."""
        return self._log

    @property
    def errors(self) -> list[str]:
        """Tracebacks of this server's own defects; a test run must leave it empty."""
        return self._errors

    @property
    def leaks(self) -> list[Request]:
        """Requests that carried a token to the storage; must be empty."""
        return [request for request in self._log if request.authorization and request.host != "127.0.0.1"]

    def requests(self, method: str = ".*", path: str = "") -> list[Request]:
        """Return the logged requests whose verb matches ``method`` whole and whose path matches ``path`` somewhere."""
        return [
            entry for entry in list(self._log) if re.fullmatch(method, entry.method) and re.search(path, entry.path)
        ]

    def wait_idle(self, timeout: float = 30.0) -> None:
        """Wait until no request is being served, as after the client was killed.

        Raises:
            TimeoutError: one still is after ``timeout`` seconds.
        """
        assert self._wire is not None, "the server does not run"
        wire = self._wire
        with wire.changed:
            if not wire.changed.wait_for(lambda: wire.busy == 0, timeout):
                raise TimeoutError(f"{wire.busy} requests are still being served after {timeout} s")

    # What it holds, without a client

    def create(self, repo_id: str, *, repo_type: str = "model", private: bool = False) -> None:
        """Make a repository."""
        self.store.create(repo_type, repo_id, private=private, author=repo_id.partition("/")[0])

    def plant(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        *,
        lfs: Sequence[str] = (),
        repo_type: str = "model",
        private: bool = False,
        revision: str = "main",
        title: str = "planted",
    ) -> str:
        """Commit ``files`` without any of the checks that a client or the Hub makes, and return the commit.

        This is how a hostile repository comes about: names may hold ``..`` or be absolute.

        Args:
            repo_id: the repository; made if missing.
            files: contents by name; None deletes.
            lfs: the names that are kept as LFS files; ``.safetensors`` always are.
            repo_type: ``model``, ``dataset`` or ``space``.
            private: of a repository that is made.
            revision: a branch.
            title: of the commit.
        """
        if self.store.get(repo_type, repo_id) is None:
            self.create(repo_id, repo_type=repo_type, private=private)
        repo = self._repo(repo_id, repo_type)
        changes = []
        for path, content in files.items():
            if content is None:
                changes.append(Change("delete", path))
                continue
            sha256, size = self.store.receive([content])
            large = path in lfs or path.endswith(".safetensors")
            if large:
                self.store.link_lfs(repo, sha256)
            changes.append(Change("put", path, Entry.large(sha256, size) if large else Entry.regular(content)))
        made, _ = self.store.commit(repo, f"refs/heads/{revision}", changes, title=title, message="", author="planter")
        return made.oid

    def head(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> str:
        """Return the commit that ``revision`` names."""
        return self._commit(repo_id, revision, repo_type).oid

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """Return all contents by name, without ``.gitattributes``."""
        files = self._commit(repo_id, revision, repo_type).files
        return {path: self.store.read(entry) for path, entry in files.items() if path != ".gitattributes"}

    def history(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> list[Commit]:
        """Return the commits of ``revision``, the newest first."""
        repo = self._repo(repo_id, repo_type)
        return list(self.store.history(repo, self.store.resolve(repo, revision)))

    def refs(self, repo_id: str, *, repo_type: str = "model") -> dict[str, str]:
        """Return commits by full reference name: ``refs/heads/main``, ``refs/tags/v1``, ``refs/pr/1``."""
        return dict(self._repo(repo_id, repo_type).refs)

    def _repo(self, repo_id: str, repo_type: str) -> Repo:
        repo = self.store.get(repo_type, repo_id)
        if repo is None:
            raise HubError(404, "RepoNotFound", f"there is no {repo_type} {repo_id}")
        return repo

    def _commit(self, repo_id: str, revision: str, repo_type: str) -> Commit:
        return self.store.resolve(self._repo(repo_id, repo_type), revision)

    def _route(self, call: Call) -> Answer:
        return dispatch(self._site, call)
