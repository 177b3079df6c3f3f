"""Between a folder and the Hub: push, pull, resolve. No torch, so that the commands answer at once.

A stored model is read from one resolved commit, file by file by name, and is sent in one commit that is built on the head
it was merged with; huggingface_hub streams the weights from disk and drops what has not changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo import storage
from zoo.errors import InputError
from zoo.hub_client import (
    ATTEMPTS,
    Push,
    Source,
    TagTakenError,
    UnreachableError,
    limit_silence,
    readable_errors,
    retry,
    shown,
)

__all__ = [
    "Push", "Source", "UnreachableError", "check_access", "fetch", "parse_source", "pull", "push", "resolve",
]  # fmt: skip

_REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_LOADED = ("config.json", "model.safetensors")
_MAX_TEXT_BYTES = 1 << 20


def parse_source(source: str | Path, revision: str | None = None) -> Path | Source:
    """Tell a local folder from a repository.

    Args:
        source: a folder, ``owner/name``, or ``hf://owner/name@revision``.
        revision: branch, tag or commit, where the source does not name one.

    Returns:
        The folder if there is one by that name, else the repository.

    Raises:
        InputError: neither a folder nor the name of a repository, or two revisions.
    """
    text = str(source)
    if text.startswith("hf://"):
        repo_id, _, named = text.removeprefix("hf://").partition("@")
        if named and revision and named != revision:
            raise InputError(f"{text} names revision {named!r}, and revision={revision!r} was given: give one of them")
        revision = named or revision
    else:
        folder = Path(source).expanduser()
        if folder.is_dir():
            if revision is not None:
                raise InputError(
                    f"{text} is a folder here, and a folder has no revision {revision!r}: write hf://{text} for the Hub"
                )
            return folder
        repo_id = text
    if not _REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        raise InputError(f"{text} is no folder with a stored model, and {repo_id!r} cannot be a repository on the Hub")
    return Source(repo_id, revision)


def resolve(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """Return a folder with a stored model, and the commit it comes from.

    Args:
        source: see `parse_source`.
        revision: see `parse_source`.
        token: a token, None for the one of the environment or the login, False for none.
        cache_dir: the cache of huggingface_hub, its own if omitted.
        local_files_only: use what is cached and ask nobody.

    Returns:
        The folder, and the commit's hash; None for a local folder.

    Raises:
        InputError: no such folder, repository, revision or file, or no right to it; the message says which.
    """
    parsed = parse_source(source, revision)
    if isinstance(parsed, Path):
        return parsed, None
    return fetch(parsed, _LOADED, token=token, cache_dir=cache_dir, local_files_only=local_files_only)


def fetch(
    source: Source,
    names: tuple[str, ...],
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str]:
    """Download files of one commit by name.

    Args:
        source: the repository.
        names: files that must be there.
        token: see `resolve`.
        cache_dir: see `resolve`.
        local_files_only: see `resolve`.

    Returns:
        The folder of the commit in the cache, and the commit's hash.

    Raises:
        InputError: see `resolve`.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
    with readable_errors(source):
        if local_files_only or constants.HF_HUB_OFFLINE:
            folder = Path(
                snapshot_download(
                    source.repo_id,
                    revision=source.revision,
                    allow_patterns=list(names),
                    local_files_only=True,
                    **options,
                )
            )
        else:
            info = HfApi().model_info(source.repo_id, revision=source.revision, files_metadata=True, token=token)
            sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
            _require(names, sizes, source)
            # By the name that was asked for, so that the cache knows it offline; it resolves to one commit itself.
            folder = Path(
                snapshot_download(source.repo_id, revision=source.revision, allow_patterns=list(names), **options)
            )
    _require(names, {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}, source)
    return folder, folder.name


def pull(source: str | Path, folder: Path, *, revision: str | None = None, token: str | bool | None = None) -> str:
    """Copy a stored model from the Hub into a folder, at one stroke.

    Args:
        source: a repository; see `parse_source`.
        folder: the folder; a stored model in it is replaced.
        revision: see `parse_source`.
        token: see `resolve`.

    Returns:
        The commit's hash.

    Raises:
        InputError: see `resolve`.
    """
    import shutil

    parsed = parse_source(source, revision)
    if isinstance(parsed, Path):
        raise InputError(f"{source} is a folder here: write hf://{source} for the repository of that name")
    cached, commit = fetch(parsed, _LOADED, token=token)
    present = _names_of(parsed, commit, token)
    extra = tuple(name for name in present if name in storage.FILES and name not in _LOADED)
    if extra:
        cached, commit = fetch(Source(parsed.repo_id, commit), (*_LOADED, *extra), token=token)

    def fill(staging: Path) -> None:
        for name in (*_LOADED, *extra):
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(cached / name, staging / name)

    storage.write(folder, fill)
    return commit


def check_access(repo_id: str, *, token: str | bool | None = None) -> str:
    """Check that a token is there and may write to a repository's owner, before a long run relies on it.

    Args:
        repo_id: ``owner/name``, or ``name`` for the token's own user.
        token: see `resolve`.

    Returns:
        The full id, with the owner.

    Raises:
        InputError: the id cannot be one, nobody is logged in, the token is refused, or it may not write there.
    """
    from huggingface_hub import HfApi

    parsed = parse_source(f"hf://{repo_id}")
    assert isinstance(parsed, Source)
    with readable_errors(parsed):
        limit_silence()
        user = HfApi().whoami(token=token)
    owner, _, name = repo_id.rpartition("/")
    own = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if owner and owner not in own:
        raise InputError(f"{repo_id}: the token belongs to {user['name']}, who may not write to {owner}")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"{repo_id}: the token may only read; make one that may write in the settings of the Hub")
    return f"{owner or user['name']}/{name}"


def push(
    folder: Path,
    repo_id: str,
    *,
    prepare: Callable[[Path, str | None, Path], None] | None = None,
    branch: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    message: str = "Store the model",
    tag: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Send a stored model in one commit.

    Args:
        folder: the folder of the stored model.
        repo_id: ``owner/name``; it is created if needed.
        prepare: called with the folder, the README.md on the Hub (None if there is none) and an empty folder; what it
            writes there is sent in place of the file of that name. It is called again when somebody else has pushed
            meanwhile.
        branch: the branch, created if needed; the default branch if omitted.
        private: make a new repository private.
        token: see `resolve`.
        create_pr: open a pull request instead of committing.
        message: the commit's first line.
        tag: tag the commit; a tag of that name must not exist on another commit.
        dry_run: send nothing.

    Returns:
        What was sent.

    Raises:
        InputError: nothing is stored in the folder, or the Hub refuses; the message says what to do.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="zoo-push-") as scratch:
        files = _stored_files(folder)
        if dry_run:
            if prepare is not None:
                prepare(folder, None, Path(scratch))
            files |= _files_in(Path(scratch))
            return Push(repo_id, {name: path.stat().st_size for name, path in sorted(files.items())})
        sender = _Sender(repo_id, branch, token, private=private, create_pr=create_pr, message=message)
        source = Source(repo_id, branch)
        with readable_errors(source):
            retry(sender.make_room)
        return _send(sender, folder, Path(scratch), prepare, tag)


def _send(
    sender: _Sender,
    folder: Path,
    scratch: Path,
    prepare: Callable[[Path, str | None, Path], None] | None,
    tag: str | None,
) -> Push:
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(ATTEMPTS):
        with readable_errors(Source(sender.repo_id, sender.branch)):
            head, present = retry(sender.head)
            if prepare is not None:
                prepare(folder, sender.readme(head) if "README.md" in present else None, scratch)
            files = _stored_files(folder) | _files_in(scratch)
            gone = [name for name in present if name in storage.FILES and name not in files]
            try:
                info = retry(lambda: sender.commit(files, gone, head))  # noqa: B023 - called at once
            except HfHubHTTPError as error:
                moved = error.response is not None and error.response.status_code == 412  # somebody pushed meanwhile
                if not moved or attempt == ATTEMPTS - 1:
                    raise
                continue
            sizes = {name: path.stat().st_size for name, path in sorted(files.items())}
            if tag is not None:
                retry(lambda: sender.tag(tag, info.oid))  # noqa: B023 - called at once
            url = info.pr_url or info.commit_url
            return Push(sender.repo_id, sizes, info.oid, changed=info.oid != head, url=url, tag=tag)
    raise AssertionError("unreachable")


class _Sender:
    """The calls of one push, with what they share."""

    def __init__(
        self,
        repo_id: str,
        branch: str | None,
        token: str | bool | None,
        *,
        private: bool | None,
        create_pr: bool,
        message: str,
    ) -> None:
        from huggingface_hub import HfApi

        self.api = HfApi(token=token)
        self.repo_id = repo_id
        self.branch = branch
        self.private = private
        self.create_pr = create_pr
        self.message = message

    def make_room(self) -> None:
        """Create the repository and the branch unless they exist."""
        self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.branch is not None:
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)

    def head(self) -> tuple[str, list[str]]:
        """Return the head of the branch and the names of its files."""
        info = self.api.model_info(self.repo_id, revision=self.branch)
        assert info.sha is not None
        return info.sha, [sibling.rfilename for sibling in info.siblings or []]

    def readme(self, commit: str) -> str:
        """Return the README.md of a commit."""
        path = self.api.hf_hub_download(self.repo_id, "README.md", revision=commit)
        return Path(path).read_text(encoding="utf-8-sig")

    def commit(self, files: dict[str, Path], gone: list[str], head: str) -> Any:
        """Make one commit on ``head``; without a change none is made and the head is returned."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        return self.api.create_commit(
            self.repo_id,
            [*operations, *(CommitOperationDelete(name) for name in gone)],
            commit_message=self.message,
            revision=self.branch,
            create_pr=self.create_pr,
            parent_commit=head,
        )

    def tag(self, tag: str, commit: str) -> None:
        """Tag a commit; a tag that stands on it already is fine."""
        refs = self.api.list_repo_refs(self.repo_id)
        known = {ref.name: ref.target_commit for ref in refs.tags}
        if known.get(tag) == commit:
            return
        if tag in known:
            raise TagTakenError(
                f"tag {tag!r} of {self.repo_id} stands on commit {known[tag][:8]} already: name another tag"
            )
        self.api.create_tag(self.repo_id, tag=tag, revision=commit)


def _names_of(source: Source, commit: str, token: str | bool | None) -> list[str]:
    from huggingface_hub import HfApi

    with readable_errors(source):
        info = HfApi().model_info(source.repo_id, revision=commit, token=token)
    return [sibling.rfilename for sibling in info.siblings or []]


def _stored_files(folder: Path) -> dict[str, Path]:
    found = {name: path for name in storage.names(folder) if (path := storage.locate(folder, name)) is not None}
    for name in _LOADED:
        if name not in found:
            raise InputError(f"{folder} is no stored model: it has no {name}")
    return found


def _files_in(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def _require(names: tuple[str, ...], sizes: dict[str, int], source: Source) -> None:
    missing = [name for name in names if name not in sizes]
    if missing:
        others = sorted(name for name in sizes if name.endswith((".ckpt", ".bin", ".pt", ".pth", ".pkl")))
        note = f" It has {', '.join(others[:3])}: the zoo reads no pickled files" if others else ""
        raise InputError(f"{shown(source)} is no stored model of the zoo: it has no {', '.join(missing)}.{note}")
    for name in names:
        if not name.endswith((".safetensors", ".png")) and sizes[name] > _MAX_TEXT_BYTES:
            raise InputError(f"{shown(source)}: {name} has {sizes[name]} bytes, more than {_MAX_TEXT_BYTES}: refused")
