"""What a push calls: upload modes, LFS batch, storage PUT, LFS verify, commit."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
import re
from collections.abc import Callable
from typing import Any

from tests.hub_server.site import Site, User, checked_path
from tests.hub_server.store import Change, Entry, HubError, Repo
from tests.hub_server.wire import Answer, Call

__all__ = ["commit", "lfs_batch", "lfs_verify", "preupload", "storage_put"]

MAX_REGULAR = 10 * 1024 * 1024


def preupload(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """Say for each file whether it goes through LFS, and the object id that its path has now."""
    _writer(site, call, repo)
    head = site.store.resolve(repo, rest[0])
    attributes = head.files.get(".gitattributes")
    patterns = _lfs_patterns(site.store.read(attributes).decode()) if attributes else []
    files = []
    for file in call.json()["files"]:
        large = file["size"] > 0 and _is_large(file, patterns)
        answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if file["path"] in head.files:
            answer["oid"] = head.files[file["path"]].etag
        files.append(answer)
    return Answer.of({"files": files, "commitOid": head.oid})


def lfs_batch(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """Give a signed address for each object that the repository lacks."""
    _writer(site, call, repo, pull_request=True)
    request = call.json()
    if request.get("operation") != "upload":
        raise HubError(422, "", "Only the operation upload is served; download by /resolve/")
    objects = []
    for wanted in request["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not re.fullmatch(r"[0-9a-f]{64}", oid):
            answer["error"] = {"code": 422, "message": "oid is not a SHA-256"}
        elif site.store.lfs_size(repo, oid) is None:
            verify = {"href": f"{site.repo_url(repo)}.git/info/lfs/objects/verify"}
            answer["actions"] = {"upload": {"href": site.signed_url("PUT", repo, oid)}, "verify": verify}
        objects.append(answer)
    return Answer.of({"transfer": "basic", "objects": objects, "hash_algo": "sha256"})


def storage_put(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """Stream one object to disk; it counts when it is complete and its SHA-256 is the one of its address."""
    sha256 = rest[0]
    site.check_signature(call, "PUT", repo.type, repo.id, sha256)
    site.store.receive(call.body.pieces(), sha256=sha256)
    site.store.link_lfs(repo, sha256)
    return Answer(headers={"ETag": f'"{sha256}"'})


def lfs_verify(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """Confirm that an object has arrived."""
    _writer(site, call, repo, pull_request=True)
    request = call.json()
    size = site.store.lfs_size(repo, request["oid"])
    if size is None:
        raise HubError(404, "", f"LFS object not found: {request['oid']}")
    if size != request["size"]:
        raise HubError(400, "", f"LFS object {request['oid']} has {size} bytes, not {request['size']}")
    return Answer.of({"success": True})


def commit(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """Apply a commit sent as lines of JSON: a header, then one operation a line; all or nothing."""
    user = _writer(site, call, repo)
    pull_request = call.flag("create_pr")
    ref = _branch(repo, rest[0])
    header: dict[str, Any] | None = None
    changes = []
    for line in filter(None, call.body.lines()):
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise HubError(400, "", f"Invalid line of a commit: {error!r}") from error
        if key == "header":
            header = value
        elif key in _OPERATIONS:
            changes.append(_OPERATIONS[key](site, repo, value))
        else:
            raise HubError(400, "", f"Unknown operation of a commit: {key}")
    if header is None or not header.get("summary"):
        raise HubError(400, "", "A commit needs a header with a summary")
    made, pull = site.store.commit(
        repo,
        ref,
        changes,
        title=header["summary"],
        message=header.get("description", ""),
        author=user.name,
        parent=header.get("parentCommit"),
        pull_request=pull_request,
    )
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{site.repo_url(repo)}/commit/{made.oid}"}
    if pull is not None:
        answer["pullRequestUrl"] = f"{site.repo_url(repo)}/discussions/{pull.num}"
    return Answer.of(answer)


def _file(site: Site, repo: Repo, value: dict[str, Any]) -> Change:
    path, content = checked_path(value["path"]), value["content"]
    if value.get("encoding", "utf-8") == "base64":
        try:
            data = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise HubError(400, "", f"Invalid base64 of {path}: {error}") from error
    else:
        data = content.encode()
    if len(data) > MAX_REGULAR:
        raise HubError(413, "", f"{path} is larger than 10 MiB and must go through LFS")
    site.store.receive([data])
    return Change("put", path, Entry.regular(data))


def _lfs_file(site: Site, repo: Repo, value: dict[str, Any]) -> Change:
    path, oid = checked_path(value["path"]), value["oid"]
    size = site.store.lfs_size(repo, oid)
    if size is None or value.get("size", size) != size:
        raise HubError(400, "", f"LFS pointer pointed to a file that does not exist. Offending file: {path}")
    return Change("put", path, Entry.large(oid, size))


_OPERATIONS: dict[str, Callable[[Site, Repo, dict[str, Any]], Change]] = {
    "file": _file,
    "lfsFile": _lfs_file,
    "deletedFile": lambda site, repo, value: Change("delete", value["path"]),
    "deletedFolder": lambda site, repo, value: Change("delete_folder", value["path"]),
}


def _writer(site: Site, call: Call, repo: Repo, *, pull_request: bool = False) -> User:
    return site.writer(call, repo.namespace, pull_request=pull_request or call.flag("create_pr"))


def _branch(repo: Repo, revision: str) -> str:
    """Return the reference that a commit may move: a branch or a pull request, never a tag or a hash."""
    for ref in (f"refs/heads/{revision}", revision):
        if ref in repo.refs and not ref.startswith("refs/tags/"):
            return ref
    raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


def _lfs_patterns(attributes: str) -> list[str]:
    return [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line.split()[1:]]


def _is_large(file: dict[str, Any], patterns: list[str]) -> bool:
    """LFS by size, by ``.gitattributes``, or because the first 512 bytes are not text, as on the Hub."""
    path, name = file["path"], file["path"].rsplit("/", 1)[-1]
    matches = any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)
    return matches or file["size"] > MAX_REGULAR or b"\0" in base64.b64decode(file.get("sample", ""))
