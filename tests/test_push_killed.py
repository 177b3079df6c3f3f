"""SIGKILL at ten moments of a run that pushes every epoch: Hub and disk each hold a whole version, and a new run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer
from tests.push_runs import Runs


@pytest.fixture(scope="module")
def runs(hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Runs(hub_server, tmp_path_factory.mktemp("runs"), figures=False) as started:
        yield started


# The place where the run is killed: a request to the Hub (verb, path, of which version, after how many bytes), or a call in
# the run (module, function, which one), and whether a version is on the Hub (None: it may) and on the disk by then.
REQUESTS = {
    "before the repository": (("POST", "/repos/create", 1, 0), False, True),
    "first upload": (("PUT", "/storage/", 1, 65536), False, True),
    "first commit": (("POST", "/commit/", 1, 0), None, True),
    "second preupload": (("POST", "/preupload/", 2, 0), True, True),
    "second upload": (("PUT", "/storage/", 2, 65536), True, True),
    "second commit": (("POST", "/commit/", 2, 0), True, True),
}
CALLS = {
    "first version not written": (("zoo.storing", "save_file", 1), False, False),
    "first version not in place": (("zoo.storage", "_finish", 2), False, True),
    "second version not in place": (("zoo.storage", "_finish", 4), None, True),
    "old version not deleted": (("zoo.callbacks.push_to_hub", "_staged", 3), True, True),
}


def check(runs: Runs, hub: HubServer, repo_id: str, folder: Path, sent: bool | None, stored: bool) -> None:
    """Check that whatever is on the Hub and on the disk loads, and resume."""
    head = hub.store.get("model", repo_id)
    published = head is not None and "model.safetensors" in hub.files(repo_id)
    assert sent is None or published == sent
    name = repo_id.partition("/")[2]
    whole = [path for path in (folder / "hub" / name).glob("*-epoch-*") if _is_whole(path)]
    assert bool(whole) == stored
    runs("load", sources=[*map(str, whole), *([repo_id] if published else [])])
    push = [{"repo_id": repo_id, "on": "last"}]
    resume = (folder / "checkpoints/last.ckpt").exists()
    answer = runs("fit", folder=str(folder), push=push, epochs=3, resume=resume)
    assert answer["error"] is None
    assert hub.history(repo_id)[0].title == "Store epoch-2"
    assert len(list((folder / "hub" / name).iterdir())) == 1, "what was left is cleared away"
    kept = next((folder / "hub" / name).iterdir())
    assert hub.files(repo_id)["model.safetensors"] == (kept / "model.safetensors").read_bytes()


def _is_whole(folder: Path) -> bool:
    return any((folder / place / "model.safetensors").exists() for place in (".", ".saved"))


# These run with each change, the others with `make test-thorough`.
USUAL = {"first commit", "second upload", "first version not written", "second version not in place"}


def moments(named: dict[str, Any]) -> list[Any]:
    return [name if name in USUAL else pytest.param(name, marks=pytest.mark.thorough) for name in named]


@pytest.mark.parametrize("moment", moments(REQUESTS))
def test_killed_during_a_request(hub: HubServer, runs: Runs, tmp_path: Path, moment: str) -> None:
    (method, path, version, after), sent, stored = REQUESTS[moment]
    repo_id = "me/" + moment.replace(" ", "-")
    push: list[dict[str, Any]] = [{"repo_id": repo_id, "on": "last"}]
    first = hub.faults.delay("POST", "/commit/", 0.0, times=1)
    runs.start("fit", folder=str(tmp_path), push=push, epochs=2, stop_in=("zoo.hub", "snapshot", version))
    runs.reach("snapshot")
    if version == 2:  # otherwise the first version could be left out for it
        assert first.arrived.wait(30)
        hub.wait_idle()
    gate = hub.faults.hold(method, path, after=after, times=None)
    runs.go_on()
    assert gate.arrived.wait(30)
    runs.kill()
    hub.faults.clear()
    hub.wait_idle()
    check(runs, hub, repo_id, tmp_path, sent, stored)


@pytest.mark.parametrize("moment", moments(CALLS))
def test_killed_on_the_disk(hub: HubServer, runs: Runs, tmp_path: Path, moment: str) -> None:
    place, sent, stored = CALLS[moment]
    repo_id = "me/" + moment.replace(" ", "-")
    runs.start("fit", folder=str(tmp_path), push=[{"repo_id": repo_id, "on": "last"}], epochs=2, stop_in=place)
    runs.reach(place[1])
    runs.kill()
    hub.wait_idle()
    check(runs, hub, repo_id, tmp_path, sent, stored)
