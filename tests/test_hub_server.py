"""The real huggingface_hub client against our Hub: what must pass, and what must fail with the right error.

Functions named ``_client_…`` run in a fresh process with a fresh cache (``tests.hub_fixtures.call_python``).
"""

from __future__ import annotations

import hashlib
import http.client
import json
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.hub_fixtures import call_python, caught
from tests.hub_server import HubServer


def _client_push(repo_id: str, repo_type: str, files: dict[str, list[int]]) -> dict[str, str]:
    """Push files of pseudo-random content, given as name -> [seed, size, text]; return their hashes."""
    import hashlib
    import random
    from pathlib import Path

    from huggingface_hub import HfApi

    hashes = {}
    for name, (seed, size, text) in files.items():
        content = random.Random(seed).randbytes(size)
        content = content.hex().encode()[:size] if text else content
        path = Path("pushed") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    api = HfApi()
    api.create_repo(repo_id, repo_type=repo_type, space_sdk="static" if repo_type == "space" else None)
    api.upload_folder(repo_id=repo_id, folder_path="pushed", repo_type=repo_type)
    return hashes


def _client_pull(repo_id: str, repo_type: str, names: list[str]) -> dict[str, Any]:
    """Pull the same files by every way there is."""
    import hashlib
    from pathlib import Path

    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    def digest(path: Path | str) -> str:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    one_by_one = {name: digest(hf_hub_download(repo_id, name, repo_type=repo_type)) for name in names}
    folder = Path(snapshot_download(repo_id, repo_type=repo_type, local_dir="pulled"))
    tree = [
        entry for entry in HfApi().list_repo_tree(repo_id, repo_type=repo_type, recursive=True) if hasattr(entry, "lfs")
    ]
    infos = HfApi().get_paths_info(repo_id, [*names, "missing"], repo_type=repo_type)
    return {
        "one by one": one_by_one,
        "snapshot": {name: digest(folder / name) for name in names},
        "lfs": {entry.path: entry.lfs.sha256 for entry in tree if entry.lfs is not None},
        "sizes": {entry.path: getattr(entry, "size", None) for entry in infos},
    }


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_round_trip_is_bit_identical(hub: HubServer, repo_type: str) -> None:
    files = {
        "config.json": [1, 300, 1],
        "empty.txt": [2, 0, 1],
        "deep/er/notes #1 100%.txt": [3, 5000, 1],
        "Größe/naïve.txt": [4, 100, 1],
        "model.safetensors": [5, 3_000_001, 0],  # LFS by its name
        "picture.png": [6, 70_000, 0],  # LFS by its content
    }
    if repo_type == "model":
        files["long.txt"] = [7, 10 * 1024 * 1024 + 1, 1]  # LFS by its size
    repo_id = f"me/round-trip-{repo_type}"
    pushed = call_python(_client_push, repo_id, repo_type, files, server=hub)
    pulled = call_python(_client_pull, repo_id, repo_type, list(files), server=hub)
    assert pulled["one by one"] == pulled["snapshot"] == pushed
    large = [name for name, (_, size, text) in files.items() if not text or size > 10 * 1024 * 1024]
    assert pulled["lfs"] == {name: pushed[name] for name in large}
    assert pulled["sizes"] == {name: size for name, (_, size, _) in files.items()}
    stored = hub.files(repo_id, repo_type=repo_type)
    assert {name: hashlib.sha256(content).hexdigest() for name, content in stored.items()} == pushed
    # The contents of LFS files went to the other origin and back, and the token did not.
    assert len(hub.requests("PUT", "/storage/")) == len(large)
    assert {entry.host for entry in hub.requests(".*", "/storage/")} == {"localhost"}
    assert all(entry.authorization for entry in hub.requests("POST", "/api/"))
    assert not hub.leaks


def _ask(method: str, url: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(url)
    with closing(http.client.HTTPConnection("127.0.0.1", parts.port, timeout=20)) as connection:
        connection.request(method, f"{parts.path}?{parts.query}", body, {"Host": parts.netloc, **headers})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_ranges(hub: HubServer) -> None:
    hub.plant("me/ranges", {"small.txt": b"0123456789", "big.safetensors": b"0123456789"})
    small = f"{hub.endpoint}/me/ranges/resolve/main/small.txt"
    status, redirect, _ = _ask("GET", f"{hub.endpoint}/me/ranges/resolve/main/big.safetensors", {})
    assert (status, redirect["X-Linked-Size"]) == (302, "10")
    assert redirect["X-Linked-Etag"] == f'"{hashlib.sha256(b"0123456789").hexdigest()}"'
    for url in (small, redirect["Location"]):
        for wanted, content, extent in (
            ("bytes=2-4", b"234", "bytes 2-4/10"),
            ("bytes=7-", b"789", "bytes 7-9/10"),
            ("bytes=-3", b"789", "bytes 7-9/10"),
            ("bytes=8-99", b"89", "bytes 8-9/10"),
        ):
            status, headers, body = _ask("GET", url, {"Range": wanted})
            assert (status, headers["Content-Range"], body) == (206, extent, content)
        status, headers, _ = _ask("GET", url, {"Range": "bytes=10-"})
        assert (status, headers["Content-Range"]) == (416, "bytes */10")
    tampered = redirect["Location"].replace("signature=", "signature=0")
    assert _ask("GET", tampered, {})[0] == 403
    status, headers, _ = _ask("GET", f"{hub.endpoint}/me/ranges/resolve/main/no-such", {})
    assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", hub.head("me/ranges"))


def test_storage_takes_only_what_was_announced(hub: HubServer) -> None:
    hub.create("me/announced")
    sha256 = hashlib.sha256(b"content").hexdigest()
    token = {"Authorization": "Bearer hf_local"}

    def batch() -> Any:
        request = {"operation": "upload", "objects": [{"oid": sha256, "size": 7}]}
        address = f"{hub.endpoint}/me/announced.git/info/lfs/objects/batch"
        return json.loads(_ask("POST", address, token, json.dumps(request).encode())[2])["objects"][0].get("actions")

    def verify(size: int) -> int:
        return _ask("POST", actions["verify"]["href"], token, json.dumps({"oid": sha256, "size": size}).encode())[0]

    actions = batch()
    assert _ask("PUT", actions["upload"]["href"], {}, b"another")[0] == 400
    assert (verify(7), hub.store.object_path(sha256).exists()) == (404, False)
    assert _ask("PUT", actions["upload"]["href"], {}, b"content")[0] == 200
    assert (verify(7), verify(8), batch()) == (200, 400, None)
    # A hash alone opens no object of another repository.
    hub.create("me/announced-2")
    stolen = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": sha256, "size": 7}}
    assert _commit(hub, "me/announced-2", stolen) == 400


def _commit(hub: HubServer, repo_id: str, *operations: dict[str, Any]) -> int:
    lines = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "s"}}, *operations]))
    address = f"{hub.endpoint}/api/models/{repo_id}/commit/main"
    return _ask("POST", address, {"Authorization": "Bearer hf_local"}, lines.encode())[0]


def _client_repositories() -> dict[str, Any]:
    from huggingface_hub import HfApi

    api = HfApi()
    out: dict[str, Any] = {"bare": str(api.create_repo("repositories"))}
    out["again"] = caught(api.create_repo, "me/repositories")
    out["exist_ok"] = api.create_repo("me/repositories", exist_ok=True).repo_id
    out["org"] = api.create_repo("lab/repositories").repo_id
    out["foreign"] = caught(api.create_repo, "you/repositories")
    file = {"path_or_fileobj": b"x", "path_in_repo": "x", "repo_id": "me/repositories"}
    out["foreign push"] = caught(api.upload_file, **file, token="hf_other")
    out["anonymous push"] = caught(api.upload_file, **file, token=False)
    out["read token"] = caught(api.create_repo, "me/other", token="hf_read")
    out["read token push"] = caught(api.upload_file, **file, token="hf_read")
    out["bad token"] = caught(api.create_repo, "me/other", token="hf_expired")
    out["bad token read"] = caught(api.model_info, "me/repositories", token="hf_expired")
    out["whoami"] = [api.whoami()["name"], api.whoami()["orgs"][0]["name"], caught(api.whoami, token="hf_no")]
    out["role"] = [api.whoami(token=token)["auth"]["accessToken"]["role"] for token in ("hf_local", "hf_read")]
    out["auth_check"] = [caught(api.auth_check, "me/repositories", token=token) for token in ("hf_local", "hf_other")]
    api.delete_repo("me/repositories")
    out["exists"] = [api.repo_exists(name) for name in ("me/repositories", "lab/repositories")]
    out["delete"] = caught(api.delete_repo, "me/repositories")
    api.delete_repo("me/repositories", missing_ok=True)
    out["delete foreign"] = caught(api.delete_repo, "lab/repositories", token="hf_other")
    return out


def test_repositories(hub: HubServer) -> None:
    out = call_python(_client_repositories, server=hub)
    assert out == {
        "bare": f"{hub.endpoint}/me/repositories",
        "again": "HfHubHTTPError 409",
        "exist_ok": "me/repositories",
        "org": "lab/repositories",
        "foreign": "HfHubHTTPError 403",
        "foreign push": "HfHubHTTPError 403",
        "anonymous push": "RepositoryNotFoundError 401",
        "read token": "HfHubHTTPError 403",
        "read token push": "HfHubHTTPError 403",
        "bad token": "HfHubHTTPError 401",
        "bad token read": "HfHubHTTPError 401",
        "whoami": ["me", "lab", "HfHubHTTPError 401"],
        "role": ["write", "read"],
        "auth_check": ["", ""],
        "exists": [False, True],
        "delete": "RepositoryNotFoundError 404",
        "delete foreign": "HfHubHTTPError 403",
    }


def _client_private() -> dict[str, Any]:
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    api.create_repo("me/private", private=True)
    api.upload_file(path_or_fileobj=b"\0secret", path_in_repo="model.bin", repo_id="me/private")
    out: dict[str, Any] = {"private": api.model_info("me/private").private}
    for who in (False, "hf_other", "hf_read"):
        out[str(who)] = [
            caught(api.model_info, "me/private", token=who),
            caught(hf_hub_download, "me/private", "model.bin", token=who),
            any(model.id == "me/private" for model in api.list_models(token=who)),
        ]
    api.update_repo_settings("me/private", private=False)
    out["opened"] = api.model_info("me/private", token=False).private
    return out


def test_private_repository(hub: HubServer) -> None:
    out = call_python(_client_private, server=hub)
    assert out == {
        "False": ["RepositoryNotFoundError 401", "RepositoryNotFoundError 401", False],
        "hf_other": ["RepositoryNotFoundError 404", "RepositoryNotFoundError 404", False],
        "hf_read": ["", "", True],
        "private": True,
        "opened": False,
    }


def _client_missing() -> dict[str, Any]:
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    file = {"path_or_fileobj": b"", "path_in_repo": "z"}
    return {
        "repository": caught(api.model_info, "me/no-such"),
        "anonymous": caught(api.model_info, "me/no-such", token=False),
        "download": caught(hf_hub_download, "me/no-such", "x"),
        "revision": caught(api.model_info, "me/missing", revision="no-such"),
        "file revision": caught(hf_hub_download, "me/missing", "x.txt", revision="no-such"),
        "file": caught(hf_hub_download, "me/missing", "y.txt"),
        "folder": caught(lambda: list(api.list_repo_tree("me/missing", "no/such"))),
        "push": caught(api.upload_file, **file, repo_id="me/no-such"),
        "branch": caught(api.upload_file, **file, repo_id="me/missing", revision="no-such"),
        "exist": [
            api.repo_exists("me/missing"),
            api.revision_exists("me/missing", "no-such"),
            api.file_exists("me/missing", "x.txt"),
            api.file_exists("me/missing", "y.txt"),
        ],
    }


def test_what_is_missing(hub: HubServer) -> None:
    hub.plant("me/missing", {"x.txt": b"x"})
    assert call_python(_client_missing, server=hub) == {
        "repository": "RepositoryNotFoundError 404",
        "anonymous": "RepositoryNotFoundError 401",
        "download": "RepositoryNotFoundError 404",
        "revision": "RevisionNotFoundError 404",
        "file revision": "RevisionNotFoundError 404",
        "file": "RemoteEntryNotFoundError 404",
        "folder": "RemoteEntryNotFoundError 404",
        "push": "RepositoryNotFoundError 404",
        "branch": "RevisionNotFoundError 404",
        "exist": [True, False, True, False],
    }


def _client_commits() -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    api = HfApi()
    out: dict[str, Any] = {}
    name = api.create_repo("me/commits").repo_id

    def commit(*operations: Any, title: str = "t", **options: Any) -> Any:
        return api.create_commit(name, operations, commit_message=title, **options)

    def add(path: str, content: bytes) -> Any:
        return CommitOperationAdd(path, content)

    first = commit(add("a.txt", b"a"), add("w.safetensors", b"\0w"), add("d/b.txt", b"b"), title="first")
    second = commit(
        CommitOperationDelete("a.txt"),
        CommitOperationDelete("d/"),
        CommitOperationCopy("w.safetensors", "v.safetensors"),
        add("c.txt", b"c"),
        title="second",
        commit_description="more",
        parent_commit=first.oid,
    )
    out["files"] = sorted(api.list_repo_files(name))
    out["old files"] = sorted(api.list_repo_files(name, revision=first.oid[:8]))
    out["stale"] = caught(commit, add("e.txt", b"e"), parent_commit=first.oid)
    out["no-op"] = [commit(add("c.txt", b"c"), add("w.safetensors", b"\0w")).oid == second.oid]
    out["no-op"] += [api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id=name).oid == second.oid]
    out["gone"] = caught(commit, CommitOperationDelete("a.txt"))
    out["short parent"] = caught(commit, add("f.txt", b"f"), title="third", parent_commit=second.oid[:7])
    api.delete_files(name, ["*.safetensors"], commit_message="fourth")
    log = api.list_repo_commits(name, formatted=True)
    out["log"] = [[entry.title, entry.message, entry.authors[0]] for entry in log]
    out["hashes"] = [log[-2].commit_id == first.oid, log[-3].commit_id == second.oid]
    tree = {entry.path: entry.last_commit for entry in api.list_repo_tree(name, expand=True)}
    out["last"] = [getattr(tree[path], "title", None) for path in ("c.txt", "f.txt", ".gitattributes")]
    return out


def test_commits(hub: HubServer) -> None:
    out = call_python(_client_commits, server=hub)
    assert out == {
        "files": [".gitattributes", "c.txt", "v.safetensors", "w.safetensors"],
        "old files": [".gitattributes", "a.txt", "d/b.txt", "w.safetensors"],
        "stale": "HfHubHTTPError 412",
        "no-op": [True, True],
        "gone": "RemoteEntryNotFoundError 404",
        "short parent": "",
        "log": [
            ["fourth", "", "me"],
            ["third", "", "me"],
            ["second", "more", "me"],
            ["first", "", "me"],
            ["initial commit", "", "me"],
        ],
        "hashes": [True, True],
        "last": ["second", "third", "initial commit"],
    }
    assert hub.files("me/commits") == {"c.txt": b"c", "f.txt": b"f"}


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ({"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}, 400),
        ({"key": "file", "value": {"path": "../x", "content": "", "encoding": "base64"}}, 400),
        ({"key": "file", "value": {"path": "/x", "content": "", "encoding": "base64"}}, 400),
        ({"key": "file", "value": {"path": "a/.git/x", "content": "", "encoding": "base64"}}, 400),
        ({"key": "file", "value": {"path": "x", "content": "?", "encoding": "base64"}}, 400),
        ({"key": "submodule", "value": {}}, 400),
        ({"key": "deletedFolder", "value": {"path": "no/such"}}, 404),
    ],
)
def test_bad_commit_changes_nothing(hub: HubServer, line: dict[str, Any], status: int) -> None:
    """What the client would never send."""
    if hub.store.get("model", "me/bad-commits") is None:
        hub.create("me/bad-commits")
    before = hub.refs("me/bad-commits")
    good = {"key": "file", "value": {"path": "good", "content": "good"}}
    assert _commit(hub, "me/bad-commits", good, line) == status
    assert hub.refs("me/bad-commits") == before


def test_planted_repository_may_be_hostile(hub: HubServer) -> None:
    hub.plant("me/hostile", {"../escape": b"!", "/absolute": b"!", "model.safetensors": b"no header"})
    hub.plant("me/hostile", {"/absolute": None, "b": b"b"}, title="second")
    assert set(hub.files("me/hostile")) == {"../escape", "model.safetensors", "b"}
    hub.plant("me/hostile", {"README.md": b"---\nx: [.nan]\n---\n"}, title="third")
    status, _, body = _ask("GET", f"{hub.endpoint}/api/models/me/hostile", {})
    assert (status, "cardData" in json.loads(body)) == (200, False)
    assert [commit.title for commit in hub.history("me/hostile")][1:] == ["second", "planted", "initial commit"]
