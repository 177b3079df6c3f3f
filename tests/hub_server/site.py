"""Who may do what, and the addresses of the site: what every route needs."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from tests.hub_server.store import HubError, Repo, Store
from tests.hub_server.wire import Answer, Call

__all__ = ["Route", "Site", "User", "checked_path"]


@dataclass(frozen=True)
class User:
    """Who asks, and whether the token may write."""

    name: str
    writes: bool


@dataclass
class Site:
    """One Hub: storage, accounts, addresses.

    Attributes:
        store: the repositories.
        tokens: write tokens and the users they belong to.
        read_tokens: tokens of the role ``read``.
        orgs: organizations and their members.
        page_size: entries a page of listings.
        port: of the listening socket.
    """

    store: Store
    tokens: dict[str, str]
    read_tokens: dict[str, str]
    orgs: Mapping[str, Sequence[str]]
    page_size: int
    port: int

    def __post_init__(self) -> None:
        self._secret = _secret(self.store.root / "secret")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Another origin than :attr:`endpoint`, as the real Hub's CDN is: tokens must not be sent there."""
        return f"http://localhost:{self.port}/storage"

    # Rights

    def user(self, call: Call) -> User | None:
        """Return who asks, None without a token; 401 for a token that is unknown (or expired)."""
        header = call.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ").strip()
        for known, writes in ((self.tokens, True), (self.read_tokens, False)):
            if token in known:
                return User(known[token], writes)
        raise HubError(401, "", "Invalid credentials in Authorization header")

    def member(self, user: User | None, namespace: str) -> bool:
        return user is not None and (user.name == namespace or user.name in self.orgs.get(namespace, ()))

    def signed_in(self, call: Call) -> User:
        user = self.user(call)
        if user is None:
            # The client turns a 401 of a repository's API into RepositoryNotFoundError over https alone; the code makes it
            # do so here too.
            code = "RepoNotFound" if re.match(r"/api/(models|datasets|spaces)/.", call.target) else ""
            raise HubError(401, code, "Invalid username or password.")
        return user

    def readable(self, call: Call, repo_type: str, repo_id: str) -> Repo:
        """Return the repository; for who may not read it, it does not exist (and an anonymous reader gets 401)."""
        user = self.user(call)
        repo = self.store.get(repo_type, repo_id)
        if repo is None or (repo.private and not self.member(user, repo.namespace)):
            if user is None:
                raise HubError(401, "RepoNotFound", "Invalid username or password.")
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repo

    def writer(self, call: Call, namespace: str, *, pull_request: bool = False) -> User:
        """Return who asks if the user may write in ``namespace``; a pull request is open to every user."""
        user = self.signed_in(call)
        if not user.writes:
            raise HubError(403, "", "Forbidden: this token has the role read; a token of the role write is needed")
        if not (pull_request or self.member(user, namespace)):
            raise HubError(403, "", f"Forbidden: you don't have the rights to write under the namespace {namespace}")
        return user

    # Addresses

    def repo_url(self, repo: Repo) -> str:
        return f"{self.endpoint}/{repo.url_path}"

    def signed_url(self, method: str, repo: Repo, sha256: str) -> str:
        """An address of the storage that opens one object for one verb without a token."""
        signature = self._signature(method, repo.type, repo.id, sha256)
        return f"{self.storage}/{repo.type}s/{quote(repo.id)}/{sha256}?signature={signature}"

    def check_signature(self, call: Call, method: str, repo_type: str, repo_id: str, sha256: str) -> None:
        if "Authorization" in call.headers:
            raise HubError(400, "", "Only one auth mechanism allowed: a signed address takes no Authorization header")
        if not hmac.compare_digest(call.text("signature"), self._signature(method, repo_type, repo_id, sha256)):
            raise HubError(403, "", "The signature of this address does not match")

    def _signature(self, method: str, *parts: str) -> str:
        return hmac.new(self._secret, "\n".join((method, *parts)).encode(), hashlib.sha256).hexdigest()[:32]

    def page(self, call: Call, entries: Sequence[Any], render: Callable[[Any], dict[str, Any]]) -> Answer:
        """Answer with one page of ``entries`` and, if more follow, a ``Link`` header to the next page."""
        size = self.page_size
        if call.text("limit").isdigit():
            size = max(1, min(size, int(call.text("limit"))))
        start = int(call.text("cursor", "0")) if call.text("cursor", "0").isdigit() else 0
        headers = {}
        if start + size < len(entries):
            query = urlencode({**call.query, "cursor": [str(start + size)]}, doseq=True)
            headers["Link"] = f'<{self.endpoint}{call.target.partition("?")[0]}?{query}>; rel="next"'
        return Answer.of([render(entry) for entry in entries[start : start + size]], headers=headers)


# A route of one repository; the list holds the segments of the path that follow its own.
Route = Callable[[Site, Call, Repo, list[str]], Answer]


def _secret(path: Path) -> bytes:
    """Keep signed addresses valid when the server is started again on its folder."""
    if not path.exists():
        path.write_bytes(secrets.token_bytes(32))
        path.chmod(0o600)
    return path.read_bytes()


def checked_path(path: str) -> str:
    """Return ``path`` if a commit may write it; 400 for absolute names, ``..``, empty parts and ``.git``."""
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or re.search(r"[\\\x00-\x1f]", path):
        raise HubError(400, "", f"Invalid path in the repository: {path!r}")
    return path
