"""What a pull calls: information, listings, trees, files and storage."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Any
from urllib.parse import parse_qs, quote

from tests.hub_server.card import problems
from tests.hub_server.front_matter import front_matter
from tests.hub_server.site import Site
from tests.hub_server.store import Commit, Entry, HubError, Repo
from tests.hub_server.wire import Answer, Call, Slice

__all__ = ["commits", "info", "listing", "paths_info", "resolve", "storage_get", "tree"]


def info(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """Describe a repository at a revision, its files included."""
    commit = site.store.resolve(repo, rest[0] if rest else "main")
    return Answer.of(_describe(site, repo, commit, blobs=call.flag("blobs")))


def listing(site: Site, call: Call, repo_type: str) -> Answer:
    """List repositories that the caller may see, the last modified first."""
    user = site.user(call)
    found = []
    for repo in site.store.all(repo_type):
        if repo.private and not site.member(user, repo.namespace):
            continue
        described = _describe(site, repo, site.store.resolve(repo, "main"), blobs=False)
        if _asked_for(call, described):
            found.append(described)
    found.sort(key=lambda described: described["lastModified"], reverse=True)
    hidden = {"siblings", "sha", "author", "lastModified", "cardData"} - {"cardData" if call.flag("cardData") else ""}
    if call.flag("full") or "expand" in call.query:
        hidden = set()
    return site.page(call, found, lambda described: {k: v for k, v in described.items() if k not in hidden})


def tree(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """List the files and folders below a path."""
    commit = site.store.resolve(repo, rest[0])
    below = "/".join(rest[1:]).strip("/")
    prefix = f"{below}/" if below else ""
    folders = _folders(commit)
    if below and below not in folders:
        raise _no_entry(commit, below)
    names = [path for path in sorted({*commit.files, *folders}) if path.startswith(prefix)]
    if not call.flag("recursive"):
        names = [name for name in names if "/" not in name.removeprefix(prefix)]
    return site.page(call, names, lambda name: _node(site, repo, commit, name, expand=call.flag("expand")))


def paths_info(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """Describe the asked files and folders; those that do not exist are left out."""
    commit = site.store.resolve(repo, rest[0])
    form = parse_qs(call.body.read().decode())
    expand = form.get("expand", ["false"])[-1].lower() == "true"
    folders = _folders(commit)
    known = [path.strip("/") for path in form.get("paths", []) if path.strip("/") in {*commit.files, *folders}]
    return Answer.of([_node(site, repo, commit, path, expand=expand) for path in known])


def commits(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """List the history of a revision, the newest first."""
    history = list(site.store.history(repo, site.store.resolve(repo, rest[0])))

    def render(commit: Commit) -> dict[str, Any]:
        document: dict[str, Any] = {"id": commit.oid, "title": commit.title, "message": commit.message}
        document |= {"authors": [{"user": commit.author, "avatar": ""}], "date": commit.date}
        if "formatted" in (*call.query.get("expand[]", []), *call.query.get("expand", [])):
            document["formatted"] = {"title": commit.title, "message": commit.message}
        return document

    return site.page(call, history, render)


def resolve(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """Serve a regular file; send an LFS file's reader to the storage, which is another origin."""
    commit = site.store.resolve(repo, rest[0])
    path = "/".join(rest[1:])
    entry = commit.files.get(path)
    if entry is None:
        raise _no_entry(commit, path)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "ETag": f'"{entry.etag}"'}
    if not entry.lfs:
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])}"
        return _ranged(site, call, entry, headers)
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return Answer(status=302, headers={**headers, "Location": site.signed_url("GET", repo, entry.sha256)})


def storage_get(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    """Serve an object to whoever holds its signed address."""
    site.check_signature(call, "GET", repo.type, repo.id, rest[0])
    size = site.store.object_path(rest[0]).stat().st_size
    entry = Entry.large(rest[0], size)
    return _ranged(site, call, entry, {"ETag": f'"{entry.sha256}"', "Accept-Ranges": "bytes"})


def _ranged(site: Site, call: Call, entry: Entry, headers: dict[str, str]) -> Answer:
    path = site.store.object_path(entry.sha256)
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", "").replace(" ", ""))
    if wanted is None or wanted.groups() == ("", ""):
        return Answer(Slice(path, 0, entry.size), 200, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(0, entry.size - int(last))
    end = min(int(last), entry.size - 1) if first and last else entry.size - 1
    if start >= entry.size or end < start:
        raise HubError(416, "", "Range not satisfiable", headers={"Content-Range": f"bytes */{entry.size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{entry.size}"
    return Answer(Slice(path, start, end - start + 1), 206, headers)


def _no_entry(commit: Commit, path: str) -> HubError:
    return HubError(404, "EntryNotFound", f"Entry not found: {path}", headers={"X-Repo-Commit": commit.oid})


def _folders(commit: Commit) -> set[str]:
    return {path[:at] for path in commit.files for at, sign in enumerate(path) if sign == "/" and at > 0}


def _node(site: Site, repo: Repo, commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
    entry = commit.files.get(path)
    node: dict[str, Any] = {"type": "directory", "path": path, "size": 0, "oid": _folder_oid(commit, path)}
    if entry is not None:
        node = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
        if entry.lfs:
            node["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    if expand:
        last = _last_change(site, repo, commit, path)
        node["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return node


def _folder_oid(commit: Commit, folder: str) -> str:
    content = "".join(f"{path} {entry.oid}\n" for path, entry in commit.files.items() if path.startswith(f"{folder}/"))
    return hashlib.sha1(content.encode()).hexdigest()


def _last_change(site: Site, repo: Repo, commit: Commit, path: str) -> Commit:
    def content(at: Commit) -> list[tuple[str, Entry]]:
        return [item for item in at.files.items() if item[0] == path or item[0].startswith(f"{path}/")]

    last = commit
    for older in site.store.history(repo, commit):
        if content(older) != content(commit):
            break
        last = older
    return last


def _describe(site: Site, repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    card = _card(site, commit)
    siblings = []
    for path, entry in commit.files.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"size": entry.size, "blobId": entry.oid}
        if blobs and entry.lfs:
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        siblings.append(sibling)
    document = {
        "_id": hashlib.sha1(repo.url_path.encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(card),
        "siblings": siblings,
        "usedStorage": sum(entry.size for entry in commit.files.values()),
    }
    document |= {"modelId": repo.id} if repo.type == "model" else {}
    document |= {"cardData": card} if card else {}
    return document | {name: card[name] for name in ("library_name", "pipeline_tag", "model-index") if name in card}


def _card(site: Site, commit: Commit) -> dict[str, Any]:
    """Return the metadata of the card; none if there is no card, or an invalid one."""
    readme = commit.files.get("README.md")
    if readme is None or readme.lfs:
        return {}
    return _parsed(site.store.read(readme))


@functools.lru_cache(maxsize=256)
def _parsed(content: bytes) -> dict[str, Any]:
    text = content.decode("utf-8-sig", errors="replace")
    errors, _ = problems(text)
    return {} if errors else front_matter(text) or {}


def _tags(card: dict[str, Any]) -> list[str]:
    def values(name: str) -> list[str]:
        value = card.get(name, [])
        return [str(item) for item in (value if isinstance(value, list) else [value])]

    tags = [*values("library_name"), *values("pipeline_tag"), *values("tags"), *values("language")]
    tags += [f"{name}:{value}" for name in ("license", "base_model") for value in values(name)]
    tags += [f"dataset:{value}" for value in values("datasets")]
    return list(dict.fromkeys(tags))


def _asked_for(call: Call, described: dict[str, Any]) -> bool:
    wanted = call.query.get("filter", [])
    return (
        call.text("author").lower() in ("", described["author"].lower())
        and call.text("search").lower() in described["id"].lower()
        and call.text("pipeline_tag") in ("", described.get("pipeline_tag", ""))
        and all(tag in described["tags"] for tag in wanted)
    )
