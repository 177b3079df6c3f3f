"""Which address does what, and the routes of accounts, repositories and references."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.hub_server import downloads, uploads
from tests.hub_server.card import problems
from tests.hub_server.site import Route, Site
from tests.hub_server.store import REPO_TYPES, HubError, Repo
from tests.hub_server.wire import Answer, Call

__all__ = ["dispatch"]

_PLURALS = {f"{name}s": name for name in REPO_TYPES}


def dispatch(site: Site, call: Call) -> Answer:
    """Find the route of a request and call it; 404 if there is none."""
    match call.parts:
        case ["api", *rest]:
            return _api(site, call, rest)
        case ["storage", plural, namespace, name, sha256] if plural in _PLURALS:
            return _storage(site, call, _PLURALS[plural], f"{namespace}/{name}", sha256)
        case [plural, namespace, name, *rest] if plural in _PLURALS:
            return _pages(site, call, _PLURALS[plural], f"{namespace}/{name}", rest)
        case [namespace, name, *rest]:
            return _pages(site, call, "model", f"{namespace}/{name}", rest)
        case _:
            return Answer(b"A Hugging Face Hub for tests.\n", headers={"Content-Type": "text/plain"})


def _api(site: Site, call: Call, parts: list[str]) -> Answer:
    method = "GET" if call.method == "HEAD" else call.method
    match parts:
        case [plural] if plural in _PLURALS and method == "GET":
            return downloads.listing(site, call, _PLURALS[plural])
        case [plural, namespace, name, *rest] if plural in _PLURALS:
            route = _REPO.get((method, rest[0] if rest else ""))
            if route is not None:
                return route(site, call, site.readable(call, _PLURALS[plural], f"{namespace}/{name}"), rest[1:])
        case [*path]:
            top = _SITE.get((method, "/".join(path)))
            if top is not None:
                return top(site, call)
    raise HubError(404, "", f"This Hub does not serve {call.method} {call.target}")


def _storage(site: Site, call: Call, repo_type: str, repo_id: str, sha256: str) -> Answer:
    repo = site.store.get(repo_type, repo_id)
    if repo is None:
        raise HubError(404, "", "No such object")
    route = uploads.storage_put if call.method == "PUT" else downloads.storage_get
    return route(site, call, repo, [sha256])


def _pages(site: Site, call: Call, repo_type: str, repo_id: str, rest: list[str]) -> Answer:
    git = repo_id.endswith(".git")
    repo = site.readable(call, repo_type, repo_id.removesuffix(".git"))
    match [call.method, *rest]:
        case ["GET" | "HEAD", "resolve", _, _, *_] if not git:
            return downloads.resolve(site, call, repo, rest[1:])
        case ["POST", "info", "lfs", "objects", "batch"] if git:
            return uploads.lfs_batch(site, call, repo, [])
        case ["POST", "info", "lfs", "objects", "verify"] if git:
            return uploads.lfs_verify(site, call, repo, [])
    raise HubError(404, "", f"This Hub does not serve {call.method} {call.target}")


# Accounts and repositories


def _whoami(site: Site, call: Call) -> Answer:
    user = site.signed_in(call)
    orgs = [
        {"type": "org", "name": name, "fullname": name} for name, members in site.orgs.items() if user.name in members
    ]
    token = {"displayName": "token", "role": "write" if user.writes else "read"}
    document = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "isPro": False, "orgs": orgs}
    return Answer.of({**document, "auth": {"type": "access_token", "accessToken": token}})


def _validate_yaml(site: Site, call: Call) -> Answer:
    errors, warnings = problems(call.json()["content"])
    document = {
        name: [{"message": text} for text in texts] for name, texts in (("errors", errors), ("warnings", warnings))
    }
    return Answer.of(document, status=400 if errors else 200)


def _named(site: Site, call: Call) -> tuple[dict[str, Any], str, str]:
    """Return the request with the type and the id that it names; a bare name belongs to the user."""
    request = call.json()
    repo_type = request.get("type") or "model"
    if repo_type not in REPO_TYPES:
        raise HubError(400, "", f"type must be one of {', '.join(REPO_TYPES)}, not {repo_type}")
    namespace = request.get("organization") or site.signed_in(call).name
    return request, repo_type, f"{namespace}/{request['name']}"


def _create_repo(site: Site, call: Call) -> Answer:
    request, repo_type, repo_id = _named(site, call)
    user = site.writer(call, repo_id.partition("/")[0])
    private = bool(request.get("private")) or request.get("visibility") == "private"
    try:
        repo = site.store.create(repo_type, repo_id, private=private, author=user.name)
    except HubError as error:
        existing = site.store.get(repo_type, repo_id)
        if error.status == 409 and existing is not None:
            error.members = {"url": site.repo_url(existing)}
        raise
    return Answer.of({"url": site.repo_url(repo), "name": repo.id, "id": repo.id})


def _delete_repo(site: Site, call: Call) -> Answer:
    _, repo_type, repo_id = _named(site, call)
    repo = site.readable(call, repo_type, repo_id)
    site.writer(call, repo.namespace)
    site.store.delete(repo)
    return Answer.of({})


def _settings(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    site.writer(call, repo.namespace)
    request = call.json()
    private = request.get("private", request.get("visibility") == "private")
    site.store.set_private(repo, private=bool(private))
    return Answer.of({"private": bool(private)})


def _auth_check(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    if rest == ["write"]:
        site.writer(call, repo.namespace)
    return Answer.of({})


# References


def _refs(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    def below(prefix: str) -> list[dict[str, str]]:
        found = [(ref, oid) for ref, oid in sorted(repo.refs.items()) if ref.startswith(prefix)]
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in found]

    document: dict[str, Any] = {"branches": below("refs/heads/"), "tags": below("refs/tags/"), "converts": []}
    if call.flag("include_prs"):
        document["pullRequests"] = below("refs/pr/")
    return Answer.of(document)


def _create_branch(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    site.writer(call, repo.namespace)
    start = call.json().get("startingPoint") or "main"
    site.store.set_ref(repo, f"refs/heads/{_ref_name(rest[0])}", site.store.resolve(repo, start).oid)
    return Answer.of({})


def _delete_branch(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    site.writer(call, repo.namespace)
    if rest[0] == "main":
        raise HubError(403, "", "The branch main cannot be deleted")
    site.store.delete_ref(repo, f"refs/heads/{rest[0]}")
    return Answer.of({})


def _create_tag(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    site.writer(call, repo.namespace)
    site.store.set_ref(repo, f"refs/tags/{_ref_name(call.json()['tag'])}", site.store.resolve(repo, rest[0]).oid)
    return Answer.of({})


def _delete_tag(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    site.writer(call, repo.namespace)
    site.store.delete_ref(repo, f"refs/tags/{rest[0]}")
    return Answer.of({})


def _ref_name(name: str) -> str:
    """Return ``name`` if git would take it; 400 for ``refs/…``, ``..``, spaces and the signs of revisions."""
    if not re.fullmatch(r"(?!refs/)(?!.*(\.\.|//|@\{|\.lock$))[^\s~^:?*\[\\/.-][^\s~^:?*\[\\]*(?<![/.])", name):
        raise HubError(400, "", f"Invalid reference name: {name}")
    return name


def _discussions(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    pulls = [
        {
            "num": pull.num,
            "title": pull.title,
            "author": {"name": pull.author},
            "createdAt": pull.date,
            "status": "open",
            "isPullRequest": True,
            "repo": {"name": repo.id, "type": repo.type},
        }
        for pull in reversed(repo.pulls)
    ]
    return Answer.of({"discussions": pulls, "count": len(pulls), "start": 0, "numClosedDiscussions": 0})


def _no_xet(site: Site, call: Call, repo: Repo, rest: list[str]) -> Answer:
    raise HubError(501, "", "This Hub has no Xet storage: set HF_HUB_DISABLE_XET=1")


_SITE: dict[tuple[str, str], Callable[[Site, Call], Answer]] = {
    ("GET", "whoami-v2"): _whoami,
    ("POST", "validate-yaml"): _validate_yaml,
    ("POST", "repos/create"): _create_repo,
    ("DELETE", "repos/delete"): _delete_repo,
}
_REPO: dict[tuple[str, str], Route] = {
    ("GET", ""): downloads.info,
    ("GET", "revision"): downloads.info,
    ("GET", "tree"): downloads.tree,
    ("POST", "paths-info"): downloads.paths_info,
    ("GET", "commits"): downloads.commits,
    ("GET", "refs"): _refs,
    ("POST", "branch"): _create_branch,
    ("DELETE", "branch"): _delete_branch,
    ("POST", "tag"): _create_tag,
    ("DELETE", "tag"): _delete_tag,
    ("PUT", "settings"): _settings,
    ("GET", "auth-check"): _auth_check,
    ("GET", "discussions"): _discussions,
    ("POST", "preupload"): uploads.preupload,
    ("POST", "commit"): uploads.commit,
    ("GET", "xet-write-token"): _no_xet,
    ("GET", "xet-read-token"): _no_xet,
}
