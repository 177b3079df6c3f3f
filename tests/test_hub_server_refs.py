"""The real huggingface_hub client against our Hub: references, pull requests, listings and cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hub_fixtures import call_python, caught
from tests.hub_server import HubServer
from tests.hub_server.card import problems
from tests.hub_server.front_matter import CardError, parse_yaml


def _client_refs(first: str) -> dict[str, Any]:
    from pathlib import Path

    from huggingface_hub import HfApi, hf_hub_download

    api, name = HfApi(), "me/refs"
    api.create_branch(name, branch="feature/x", revision=first)
    api.create_tag(name, tag="v1.0", tag_message="first", revision=first)
    api.upload_file(path_or_fileobj=b"two", path_in_repo="a", repo_id=name, revision="feature/x")
    out: dict[str, Any] = {
        "branch again": caught(api.create_branch, name, branch="feature/x"),
        "branch exist_ok": caught(api.create_branch, name, branch="feature/x", exist_ok=True),
        "branch name": caught(api.create_branch, name, branch="refs/pr/5"),
        "branch of nothing": caught(api.create_branch, name, branch="y", revision="no-such"),
        "tag again": caught(api.create_tag, name, tag="v1.0"),
        "tag exist_ok": caught(api.create_tag, name, tag="v1.0", exist_ok=True),
        "tag of nothing": caught(api.create_tag, name, tag="v2", revision="no-such"),
        "commit on tag": caught(api.upload_file, path_or_fileobj=b"", path_in_repo="z", repo_id=name, revision="v1.0"),
        "foreign": caught(api.create_tag, name, tag="v3", token="hf_other"),
    }
    refs = api.list_repo_refs(name)
    out["branches"] = sorted(branch.name for branch in refs.branches)
    out["tags"] = {tag.name: tag.target_commit for tag in refs.tags}
    out["content"] = {
        revision: Path(hf_hub_download(name, "a", revision=revision)).read_text()
        for revision in ("main", "feature/x", "v1.0", first, "refs/heads/feature/x")
    }
    api.delete_branch(name, branch="feature/x")
    api.delete_tag(name, tag="v1.0")
    out["delete main"] = caught(api.delete_branch, name, branch="main")
    out["deleted"] = [caught(api.delete_branch, name, branch="feature/x"), caught(api.delete_tag, name, tag="v1.0")]
    return out


def test_branches_and_tags(hub: HubServer) -> None:
    first = hub.plant("me/refs", {"a": b"one"})
    hub.plant("me/refs", {"a": b"head"})
    assert call_python(_client_refs, first, server=hub) == {
        "branch again": "HfHubHTTPError 409",
        "branch exist_ok": "",
        "branch name": "BadRequestError 400",
        "branch of nothing": "RevisionNotFoundError 404",
        "tag again": "HfHubHTTPError 409",
        "tag exist_ok": "",
        "tag of nothing": "RevisionNotFoundError 404",
        "commit on tag": "RevisionNotFoundError 404",
        "foreign": "HfHubHTTPError 403",
        "branches": ["feature/x", "main"],
        "tags": {"v1.0": first},
        "content": {"main": "head", "feature/x": "two", "v1.0": "one", first: "one", "refs/heads/feature/x": "two"},
        "delete main": "HfHubHTTPError 403",
        "deleted": ["RevisionNotFoundError 404", "RevisionNotFoundError 404"],
    }
    assert list(hub.refs("me/refs")) == ["refs/heads/main"]


def _client_pull_requests(head: str) -> dict[str, Any]:
    from pathlib import Path

    from huggingface_hub import HfApi, hf_hub_download

    api, name = HfApi(), "me/pulls"
    mine = api.upload_file(path_or_fileobj=b"mine", path_in_repo="a", repo_id=name, create_pr=True)
    other = api.upload_file(
        path_or_fileobj=b"\0other", path_in_repo="w.bin", repo_id=name, token="hf_other", create_pr=True
    )
    nothing = api.upload_file(path_or_fileobj=b"main", path_in_repo="a", repo_id=name, create_pr=True)
    more = api.upload_file(path_or_fileobj=b"more", path_in_repo="b", repo_id=name, revision="refs/pr/1")
    return {
        "urls": [mine.pr_url, other.pr_url],
        "revisions": [mine.pr_revision, mine.pr_num, other.pr_revision],
        "nothing": [nothing.pr_url, nothing.oid == head],
        "main": api.model_info(name).sha == head,
        "content": Path(hf_hub_download(name, "a", revision="refs/pr/1")).read_text(),
        "more": more.oid == api.model_info(name, revision="refs/pr/1").sha,
        "refs": [ref.ref for ref in api.list_repo_refs(name, include_pull_requests=True).pull_requests or []],
        "discussions": [[pull.num, pull.title, pull.author] for pull in api.get_repo_discussions(name)],
        "read token": caught(
            api.upload_file, path_or_fileobj=b"", path_in_repo="c", repo_id=name, token="hf_read", create_pr=True
        ),
    }


def test_pull_requests(hub: HubServer) -> None:
    head = hub.plant("me/pulls", {"a": b"main"})
    assert call_python(_client_pull_requests, head, server=hub) == {
        "urls": [f"{hub.endpoint}/me/pulls/discussions/{number}" for number in (1, 2)],
        "revisions": ["refs/pr/1", 1, "refs/pr/2"],
        "nothing": [None, True],
        "main": True,
        "content": "mine",
        "more": True,
        "refs": ["refs/pr/1", "refs/pr/2"],
        "discussions": [
            [2, "Upload w.bin with huggingface_hub", "you"],
            [1, "Upload a with huggingface_hub", "me"],
        ],
        "read token": "HfHubHTTPError 403",
    }


def _client_pages() -> dict[str, Any]:
    from huggingface_hub import HfApi

    api = HfApi()
    return {
        "files": api.list_repo_files("me/x"),
        "below": [entry.path for entry in api.list_repo_tree("me/x", "d")],
        "commits": [commit.title for commit in api.list_repo_commits("me/x")],
        "models": [model.id for model in api.list_models()],
        "limit": [model.id for model in api.list_models(limit=1)],
    }


def test_pages(tmp_path: Path) -> None:
    with HubServer(tmp_path, page_size=2) as server:
        for number in range(3):
            server.plant("me/x", {f"{number}": b"", f"d/{number}": b""}, title=f"commit {number}")
        for name in ("me/y", "me/z"):
            server.create(name)
        out = call_python(_client_pages, server=server)
        assert not server.errors
        assert len(server.requests("GET", "/api/models/me/x/tree/main[?]")) == 4  # 8 nodes, the folder included
    assert out == {
        "files": [".gitattributes", "0", "1", "2", "d/0", "d/1", "d/2"],
        "below": ["d/0", "d/1", "d/2"],
        "commits": ["commit 2", "commit 1", "commit 0", "initial commit"],
        "models": ["me/z", "me/y", "me/x"],
        "limit": ["me/z"],
    }


def _client_cards() -> dict[str, Any]:
    import warnings
    from pathlib import Path

    import huggingface_hub
    from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download

    api = HfApi()
    api.create_repo("lab/cards")

    def refused(metadata: str) -> str:
        content = f"---\n{metadata}\n---\n".encode()
        try:
            api.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id="lab/cards")
        except ValueError as error:
            return str(error)
        return ""

    results = [EvalResult("image-classification", "digits", "Digits", "accuracy", 0.975, metric_name="Top-1: best")]
    data = ModelCardData(
        model_name="Née 'quoted'",
        license="apache-2.0",
        library_name="lightning-zoo",
        pipeline_tag="image-classification",
        tags=["lightning-zoo", "nd"],
        datasets=["digits"],
        language="en",
        eval_results=results,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n# Hello\n")
    newer = (
        int(huggingface_hub.__version__.partition(".")[0]) >= 2
    )  # a card of 1.x asks huggingface.co whether it is valid
    if newer:
        card.validate()
        card.push_to_hub("lab/cards")
    else:
        api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="lab/cards")
    info = api.model_info("lab/cards", files_metadata=True)
    assert info.card_data is not None
    out: dict[str, Any] = {
        "license": refused("license: none-of-them"),
        "tags": refused("tags: word"),
        "index": refused("model-index:\n- name: x\n  results:\n  - task: {type: t}"),
        "pickle": refused("x: !!python/object/apply:torch._utils._rebuild_tensor_v2 []"),
        "not finite": refused("x: [.nan]"),
        "loaded": str(ModelCard.load("lab/cards")) == str(card),
        "same": str(info.card_data) == str(data),
        "tag": sorted(info.tags or []),
        "library": [info.library_name, info.pipeline_tag],
        "results": [[r.metric_type, r.metric_value, r.dataset_name] for r in info.card_data.eval_results or []],
        "sizes": {
            sibling.rfilename: sibling.size for sibling in info.siblings or [] if sibling.rfilename == "README.md"
        },
    }
    size = len(Path(hf_hub_download("lab/cards", "README.md")).read_bytes())
    out["size"] = out.pop("sizes") == {"README.md": size}
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        api.upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id="lab/cards", create_pr=True)
    out["warning"] = "empty or missing yaml metadata" in str(caught_warnings[0].message)
    out["validate"] = caught(ModelCard("---\nlicense: x\n---\n").validate) if newer else "ValueError"
    queries: list[dict[str, Any]] = [
        {"author": "lab"},
        {"author": "lab", "filter": ["nd", "lightning-zoo"]},
        {"author": "lab", "filter": "no-such-tag"},
        {"search": "CARD", "author": "lab"},
        {"author": "lab", "pipeline_tag": "image-classification"},
        {"author": "lab", "pipeline_tag": "text-generation"},
    ]
    out["found"] = ["lab/cards" in [model.id for model in api.list_models(**query)] for query in queries]
    out["full"] = [model.sha == info.sha for model in api.list_models(author="lab", search="cards", full=True)]
    return out


def test_cards_and_listing(hub: HubServer) -> None:
    out = call_python(_client_cards, server=hub)
    assert "must be one of" in out.pop("license")
    assert "must be an array" in out.pop("tags")
    index = out.pop("index")
    assert all(f"results[0].{name}" in index for name in ("dataset", "metrics"))
    assert "not served" in out.pop("pickle")
    assert "not finite" in out.pop("not finite")
    assert out == {
        "loaded": True,
        "same": True,
        "tag": ["dataset:digits", "en", "image-classification", "license:apache-2.0", "lightning-zoo", "nd"],
        "library": ["lightning-zoo", "image-classification"],
        "results": [["accuracy", 0.975, "Digits"]],
        "size": True,
        "warning": True,
        "validate": "ValueError",
        "found": [True, True, False, True, True, False],
        "full": [True],
    }


_KEYS = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_. #:?-]{0,8}", fullmatch=True).map(str.strip)
# Of strings, only what YAML 1.1 (PyYAML) and 1.2 (the Hub) read alike; PyYAML cannot write line separators plainly.
_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029\ufeff")).filter(
    lambda text: not text or not set(text.lower()) <= set("-+.0123456789xoabcdefinn_:")
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(_KEYS, inner),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_KEYS, _VALUES, min_size=1), st.booleans())
def test_properties_front_matter_reads_what_the_client_writes(data: dict[str, Any], brackets: bool) -> None:
    text = (
        yaml.safe_dump(data, default_flow_style=True)
        if brackets
        else yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=float("inf"))
    )
    assert parse_yaml(text) == data


@pytest.mark.parametrize(
    "text",
    [
        "a: b # c\nd: e#f\n# x\n",
        "a:\n- 1\n- 2\nb:\n  - x: 1\n    y: 2\n  -\n    z: 3\n",
        "a: >\n  one\n  two\n\n  three\n   more\n  four\nb: |-\n  l1\n   l2\n\n\nc: |+\n  k\n\nd: >-\n  x\n  y",
        "t: one\n  two\n\n  three\nu: 1",
        "q: 'one\n  two\n\n  three'\nr: \"x \\\n  y\\tz\"",
        "f: [a, 'b, c', {d: 1, e: [2, 3]}, ]\ng: {a: 1,\n  b: two words,\n  # comment\n  c: [1,\n 2]}\nh: []\ni: {}",
        "- - 1\n  - 2\n- x\n",
        "a: http://x.y/z?q=1#f\nb: x:y\nc: -1\nd: 1.5e-3\ne: .5\nf: 'it''s'\n\"k k\": v",
        "a:\n\nb: ~\nc: null\nd: ''\ne: true\n",
        "a:\n  b:\n    c: 1\n  d: 2\ne: 3",
        "- a: 1\n  b:\n  - c\n  - d\n- e",
        "k: v\r\nl: w\r\n",
        "a: |\n  x\n  # not a comment\n  y\nb: 1",
        "a: 'x'  # y\nb: ?x\nc: '#'",
        "",
    ],
)
def test_front_matter_equals_pyyaml(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object:x y",
        "a: &x 1\nb: *x",
        "a: 1\na: 2",
        "a: [1",
        "a: 'x",
        "a: b: c",
        "\ta: 1",
        "a: - b",
        "a:\n   b: 1\n  c: 2",
        "? a\n: b",
        "a: 'x' y",
        "x\ny: 1",
        "- a\nb: 1",
        "a: [1 2: 3",
        "%YAML 1.2",
        'a: "\\q"',
    ],
)
def test_bad_front_matter(text: str) -> None:
    with pytest.raises(CardError):
        parse_yaml(text)
    assert problems(f"---\n{text}\n---\n")[0]
