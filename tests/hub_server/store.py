"""What the Hub keeps: content-addressed objects, commits and one document of references a repository, all on disk.

::

    root/objects/ab/abcd…          every file's content, named by its SHA-256
    root/incoming/                 uploads in progress; emptied when a server starts
    root/repos/models/me/x/        repo.json (visibility, references, pull requests), commits/OID.json, lfs/SHA-256

Each file and folder appears under its final name by one rename, and a commit becomes visible by the rename of
``repo.json`` alone, which comes last. A SIGKILL at any moment therefore leaves complete commits only. One server a root.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

__all__ = ["REPO_TYPES", "Change", "Commit", "Entry", "HubError", "Pull", "Repo", "Store"]

REPO_TYPES = ("model", "dataset", "space")
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(?<![.-])(?<!\.git)")
# fmt: off
_LFS_PATTERNS = [
    "*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib", "*.lfs.*", "*.mlmodel",
    "*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt",
    "*.pth", "*.rar", "*.safetensors", "saved_model/**/*", "*.tar.*", "*.tar", "*.tflite", "*.tgz", "*.wasm",
    "*.xz", "*.zip", "*.zst", "*tfevents*",
]
# fmt: on
_GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS).encode()


class HubError(Exception):
    """A refusal: HTTP status, ``X-Error-Code`` (empty for none), message, further headers and JSON members."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: dict[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = headers or {}
        self.members = members


@dataclass(frozen=True)
class Entry:
    """One file of a commit: git object id (of the pointer, for LFS), size in bytes, SHA-256 of the content."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    @classmethod
    def regular(cls, data: bytes) -> Entry:
        return cls(_git_oid(data), len(data), hashlib.sha256(data).hexdigest(), lfs=False)

    @classmethod
    def large(cls, sha256: str, size: int) -> Entry:
        return cls(_git_oid(_pointer(sha256, size)), size, sha256, lfs=True)

    @property
    def pointer_size(self) -> int:
        return len(_pointer(self.sha256, self.size))

    @property
    def etag(self) -> str:
        """What the client compares: SHA-256 of an LFS file, git object id of any other."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Change:
    """One operation of a commit; ``entry`` is there for ``put`` only."""

    kind: Literal["put", "delete", "delete_folder"]
    path: str
    entry: Entry | None = None


@dataclass(frozen=True)
class Commit:
    """A complete listing of files with its history."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]


@dataclass(frozen=True)
class Pull:
    """A pull request; its commits are at ``refs/pr/num``."""

    num: int
    title: str
    author: str
    date: str


@dataclass
class Repo:
    """The document ``repo.json``."""

    type: str
    id: str
    private: bool
    created: str
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def url_path(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"


class Store:
    """Repositories under one folder; every method may be called from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        shutil.rmtree(root / "incoming", ignore_errors=True)
        for name in ("objects", "repos", "incoming"):
            (root / name).mkdir(parents=True, exist_ok=True)

    # Objects

    def object_path(self, sha256: str) -> Path:
        return self.root / "objects" / sha256[:2] / sha256

    def receive(self, chunks: Iterable[bytes], *, sha256: str | None = None) -> tuple[str, int]:
        """Stream ``chunks`` to disk and return their SHA-256 and size; ``sha256`` is what it must come to."""
        temporary = self._temporary()
        digest, size = hashlib.sha256(), 0
        try:
            with temporary.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            found = digest.hexdigest()
            if sha256 not in (None, found):
                raise HubError(400, "", f"The content's SHA-256 is {found}, not {sha256}")
            target = self.object_path(found)
            target.parent.mkdir(exist_ok=True)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return found, size

    # Repositories

    def create(self, repo_type: str, repo_id: str, *, private: bool, author: str) -> Repo:
        """Make a repository with the initial commit that the Hub makes (``.gitattributes``)."""
        if not _is_repo_id(repo_id):
            raise HubError(400, "", f"Invalid repository name: {repo_id}")
        repo = Repo(repo_type, repo_id, private, _now())
        folder = self._folder(repo)
        with self.lock:
            if folder.exists():
                raise HubError(409, "", f"You already created this {repo_type} repo: {repo_id}")
            attributes = Entry.regular(_GITATTRIBUTES)
            self.receive([_GITATTRIBUTES])
            commit = _new_commit(None, "initial commit", "", author, {".gitattributes": attributes})
            repo.refs["refs/heads/main"] = commit.oid
            building = self._temporary()
            for name in ("commits", "lfs"):
                (building / name).mkdir(parents=True)
            (building / "commits" / f"{commit.oid}.json").write_text(_dump(asdict(commit)))
            (building / "repo.json").write_text(_dump(asdict(repo)))
            folder.parent.mkdir(parents=True, exist_ok=True)
            building.rename(folder)
        return repo

    def get(self, repo_type: str, repo_id: str) -> Repo | None:
        if not _is_repo_id(repo_id):
            return None
        return self._load(self.root / "repos" / f"{repo_type}s" / repo_id / "repo.json")

    def all(self, repo_type: str) -> list[Repo]:
        found = (self._load(path) for path in sorted((self.root / "repos" / f"{repo_type}s").glob("*/*/repo.json")))
        return [repo for repo in found if repo is not None]

    def set_private(self, repo: Repo, *, private: bool) -> None:
        with self.lock:
            current = self._reread(repo)
            current.private = private
            self._save(current)

    def _save(self, repo: Repo) -> None:
        self._write(self._folder(repo) / "repo.json", asdict(repo))

    def delete(self, repo: Repo) -> None:
        doomed = self._temporary()
        with self.lock:
            self._folder(repo).rename(doomed)
        shutil.rmtree(doomed)

    # LFS: an object belongs to the repositories that it was sent to, or a hash alone would open private files.

    def link_lfs(self, repo: Repo, sha256: str) -> None:
        (self._folder(repo) / "lfs" / sha256).touch()

    def lfs_size(self, repo: Repo, sha256: str) -> int | None:
        """Size of an LFS object that ``repo`` has, or None."""
        known = re.fullmatch(r"[0-9a-f]{64}", sha256) and (self._folder(repo) / "lfs" / sha256).exists()
        return self.object_path(sha256).stat().st_size if known else None

    # Commits

    def commit(
        self,
        repo: Repo,
        ref: str,
        changes: Iterable[Change],
        *,
        title: str,
        message: str,
        author: str,
        parent: str | None = None,
        pull_request: bool = False,
    ) -> tuple[Commit, Pull | None]:
        """Commit ``changes`` on the head of ``ref``, or on ``parent`` in a new pull request.

        ``parent`` locks: if it is not the head of ``ref``, the commit is refused with 412. Its first 7 digits are enough.
        """
        with self.lock:
            current = self._reread(repo)
            base = self.load(current, current.refs[ref])
            if parent is not None and not base.oid.startswith(parent):
                if not pull_request:
                    raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
                base = self.resolve(current, parent)
            files = dict(base.files)
            for change in changes:
                _apply(files, change)
            commit = _new_commit(base.oid, title, message, author, dict(sorted(files.items())))
            pull = Pull(len(current.pulls) + 1, title, author, commit.date) if pull_request else None
            if pull is not None:
                current.pulls.append(pull)
                ref = f"refs/pr/{pull.num}"
            self._write(self._folder(repo) / "commits" / f"{commit.oid}.json", asdict(commit))
            current.refs[ref] = commit.oid
            self._save(current)
        return commit, pull

    def set_ref(self, repo: Repo, ref: str, oid: str) -> None:
        """Make the reference ``ref``; refused with 409 if there is one."""
        with self.lock:
            current = self._reread(repo)
            if ref in current.refs:
                raise HubError(409, "", f"Reference already exists: {ref}")
            current.refs[ref] = oid
            self._save(current)

    def delete_ref(self, repo: Repo, ref: str) -> None:
        with self.lock:
            current = self._reread(repo)
            if current.refs.pop(ref, None) is None:
                raise HubError(404, "RevisionNotFound", f"Reference does not exist: {ref}")
            self._save(current)

    def resolve(self, repo: Repo, revision: str) -> Commit:
        """Return the commit of a branch, a tag, a full reference or a hash (7 digits or more)."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in repo.refs:
                return self.load(repo, repo.refs[ref])
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = list((self._folder(repo) / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return self.load(repo, found[0].stem)
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def load(self, repo: Repo, oid: str) -> Commit:
        document = json.loads((self._folder(repo) / "commits" / f"{oid}.json").read_text())
        files = {path: Entry(**entry) for path, entry in document.pop("files").items()}
        return Commit(**document, files=files)

    def history(self, repo: Repo, commit: Commit) -> Iterator[Commit]:
        """Yield ``commit`` and its ancestors, the newest first."""
        yield commit
        while commit.parent is not None:
            commit = self.load(repo, commit.parent)
            yield commit

    def read(self, entry: Entry) -> bytes:
        return self.object_path(entry.sha256).read_bytes()

    def _folder(self, repo: Repo) -> Path:
        return self.root / "repos" / f"{repo.type}s" / repo.id

    def _reread(self, repo: Repo) -> Repo:
        """Return the repository as it is now; a request may have waited for the lock while another one changed it."""
        current = self.get(repo.type, repo.id)
        if current is None:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return current

    def _load(self, path: Path) -> Repo | None:
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        pulls = [Pull(**pull) for pull in document.pop("pulls")]
        return Repo(**document, pulls=pulls)

    def _temporary(self) -> Path:
        return self.root / "incoming" / uuid.uuid4().hex

    def _write(self, path: Path, document: dict[str, Any]) -> None:
        temporary = self._temporary()
        temporary.write_text(_dump(document))
        temporary.replace(path)


def _is_repo_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(_NAME.fullmatch(part) for part in parts)


def _apply(files: dict[str, Entry], change: Change) -> None:
    if change.kind == "put":
        assert change.entry is not None
        files[change.path] = change.entry
        return
    folder = change.path.rstrip("/") + "/"
    doomed = [path for path in files if path == change.path or path.startswith(folder)]
    if change.kind == "delete":
        doomed = [path for path in doomed if path == change.path]
    if not doomed:
        raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {change.path}")
    for path in doomed:
        del files[path]


def _new_commit(parent: str | None, title: str, message: str, author: str, files: dict[str, Entry]) -> Commit:
    date = _now()
    # The nonce keeps two equal commits of one microsecond apart, as two commits of git with one date would not be.
    content = [parent, title, message, author, date, uuid.uuid4().hex, {path: asdict(e) for path, e in files.items()}]
    oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
    return Commit(oid, parent, title, message, author, date, files)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1)
