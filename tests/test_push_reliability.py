"""PushToHub when the Hub fails: training goes on as if nothing were, and nothing unsent is lost."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Fault, HubServer
from tests.push_runs import Runs

LAST = [{"repo_id": "me/x", "on": "last"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub of this module's own: it is stopped, and its tokens expire."""
    with HubServer(tmp_path_factory.mktemp("hub"), tokens={"hf_local": "me", "hf_short": "me"}) as started:
        yield started


@pytest.fixture(scope="module")
def runs(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Runs(server, tmp_path_factory.mktemp("runs"), figures=False) as started:
        yield started


@pytest.fixture(scope="module")
def control(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run without the callback comes to."""
    return results(runs("fit", folder=str(tmp_path_factory.mktemp("control")), push=[]))


@pytest.fixture
def hub(server: HubServer) -> Iterator[HubServer]:
    server.faults.clear()
    server.log.clear()
    yield server
    server.faults.clear()
    assert not server.errors, server.errors[0]
    assert not server.leaks, server.leaks
    repo = server.store.get("model", "me/x")
    if repo is not None:
        server.store.delete(repo)


def results(answer: dict[str, Any]) -> dict[str, Any]:
    assert answer["error"] is None
    return {name: answer[name] for name in ("weights", "metrics", "random", "steps")}


def send_by_hand(runs: Runs, hub: HubServer, repo_id: str = "me/x") -> Path:
    """Run the last command that the log names for it, check that it sends a whole version, and return its folder."""
    commands = [shlex.split(command) for command in re.findall(r"`(zoo push .*?)` sends it", runs.printed)]
    # Two repositories are sent to side by side: which of them is logged last is chance.
    *_, words = (words for words in commands if words[3] == repo_id)
    folder = Path(words[2])
    assert runs("zoo", words=words[1:]) == 0, runs.printed
    assert hub.files(repo_id)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    first, second = runs("load", sources=[repo_id, str(folder)])
    assert first == second
    return folder


# What fails, and whether it does so for good: then the log names the command that sends the version.
FAULTS: dict[str, tuple[Callable[[HubServer], Fault], bool]] = {
    "rate limit": (lambda hub: hub.faults.fail("POST", "/preupload/", 429, retry_after=3, times=2), False),
    "rate limit for good": (lambda hub: hub.faults.fail("POST", "/commit/", 429, retry_after=3, times=None), True),
    "500 at times": (lambda hub: hub.faults.fail(".*", "/api/models/me/x", 500, times=3), False),
    "500 of commits": (lambda hub: hub.faults.fail("POST", "/commit/", 500, times=None), True),
    "503 of storage": (lambda hub: hub.faults.fail("PUT", "/storage/", 503, times=None), True),
    "cut upload": (lambda hub: hub.faults.cut_upload("PUT", "/storage/", after=1000, times=1), False),
    "cut upload for good": (lambda hub: hub.faults.cut_upload("PUT", "/storage/", after=1000, times=None), True),
    "lost answer": (lambda hub: hub.faults.cut_download("POST", "/commit/", times=1), False),
    "403": (lambda hub: hub.faults.fail("POST", "/commit/", 403, times=None), True),
}


# These run with each change, the others with `make test-thorough`.
USUAL = {"500 at times", "500 of commits", "cut upload", "lost answer"}


@pytest.mark.parametrize(
    "fault", [fault if fault in USUAL else pytest.param(fault, marks=pytest.mark.thorough) for fault in FAULTS]
)
def test_training_is_the_same_under_faults(
    hub: HubServer, runs: Runs, control: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    inject, for_good = FAULTS[fault]
    rule = inject(hub)
    assert results(runs("fit", folder=str(tmp_path), push=LAST)) == control
    assert rule.hits
    assert "hf_local" not in runs.printed
    assert "Traceback" not in runs.printed
    assert ("sends it" in runs.printed) == for_good, runs.printed
    hub.faults.clear()
    newest = tmp_path / "hub/x/0003-epoch-2"
    if for_good:
        assert send_by_hand(runs, hub) == newest
    assert hub.files("me/x")["model.safetensors"] == (newest / "model.safetensors").read_bytes()
    if fault == "lost answer":
        assert len(hub.history("me/x")) <= 1 + 3, "the commit whose answer was lost is not made twice"


def test_refused_connections_from_the_start_and_in_mid_run(
    hub: HubServer, runs: Runs, control: dict[str, Any], tmp_path: Path
) -> None:
    push = [*LAST, {"repo_id": "me/all", "on": "last", "tag_versions": True, "private": True}]
    hub.stop()
    try:
        assert results(runs("fit", folder=str(tmp_path), push=push)) == control
    finally:
        hub.start()
    assert "cannot be reached" in runs.printed
    assert "The run goes on" in runs.printed
    printed = runs.printed
    send_by_hand(runs, hub, "me/all")
    # Every version that is to be sent stays, whole; of the others the newest.
    kept = {folder.parent.name: folder.name for folder in sorted((tmp_path / "hub").glob("*/*"))}
    assert kept == {"all": "0003-epoch-2", "x": "0003-epoch-2"}
    assert len(list((tmp_path / "hub/all").iterdir())) == 3
    runs("load", sources=[str(folder) for folder in (tmp_path / "hub").glob("*/*")])
    assert "--private --tag epoch-1" in printed
    assert hub.store.get("model", "me/all").private
    assert hub.head("me/all") == hub.head("me/all", "epoch-2")

    (tmp_path / "second").mkdir()
    runs.start("fit", folder=str(tmp_path / "second"), push=LAST, stop_after=[1])
    runs.reach("epoch 1")
    hub.stop()
    runs.go_on()
    try:
        assert results(runs.finish()) == control
    finally:
        hub.start()
    send_by_hand(runs, hub)


def test_token_that_expires_in_mid_run(hub: HubServer, runs: Runs, control: dict[str, Any], tmp_path: Path) -> None:
    runs.start("fit", token="hf_short", folder=str(tmp_path), push=LAST, stop_after=[0])
    runs.reach("epoch 0")
    del hub.tokens["hf_short"]
    runs.go_on()
    assert results(runs.finish()) == control
    assert "the Hub refuses (401): the token is missing, expired" in runs.printed
    assert "hf_short" not in runs.printed
    assert send_by_hand(runs, hub).name == "0003-epoch-2"


@pytest.mark.parametrize(
    "place", [pytest.param("PUT /storage/", marks=pytest.mark.thorough), "POST /commit/", "GET /whoami"]
)
def test_silent_hub(hub: HubServer, runs: Runs, control: dict[str, Any], tmp_path: Path, place: str) -> None:
    method, path = place.split()
    rule = hub.faults.hold(method, path, times=None)
    assert results(runs("fit", folder=str(tmp_path), push=LAST, silence=0.3)) == control
    assert rule.arrived.is_set()
    hub.faults.clear()
    if "whoami" in place:
        assert "The run goes on" in runs.printed
        assert hub.files("me/x")
    else:
        send_by_hand(runs, hub)


def test_held_upload_holds_no_step(hub: HubServer, runs: Runs, control: dict[str, Any], tmp_path: Path) -> None:
    """All epochs pass while the first upload is still held."""
    gate = hub.faults.hold("PUT", "/storage/", after=1000)
    runs.start("fit", folder=str(tmp_path), push=LAST, stop_after=[2])
    runs.reach("epoch 2")
    assert gate.arrived.wait(30)
    assert not hub.requests("POST", "/commit/")
    gate.release()
    runs.go_on()
    assert results(runs.finish()) == control
    assert hub.history("me/x")[0].title == "Store epoch-2"


@pytest.mark.parametrize("fails", [False, True])
def test_two_processes_send_once(hub: HubServer, runs: Runs, tmp_path: Path, fails: bool) -> None:
    if fails:
        hub.faults.fail("PUT", "/storage/", 500, times=None)
    options = {"devices": 2, "strategy": "ddp_fork"}
    answer = runs("fit", folder=str(tmp_path), push=[{"repo_id": "me/x"}], scores=[0.1, 0.2, 0.2], **options)
    assert answer["error"] is None
    assert len(hub.requests("GET", "/whoami")) == 1
    assert [folder.name for folder in (tmp_path / "hub/x").iterdir()] == ["0002-epoch-1"]
    assert ("sends it" in runs.printed) == fails
    if fails:
        hub.faults.clear()
        send_by_hand(runs, hub)
        return
    stored = [commit.title for commit in hub.history("me/x") if commit.title.startswith("Store")]
    assert len(set(stored)) == len(stored) == len(hub.requests("POST", "/commit/"))
    assert stored[0] == "Store epoch-1"


def test_refused_in_two_processes(hub: HubServer, runs: Runs, tmp_path: Path) -> None:
    options = {"devices": 2, "strategy": "ddp_fork"}
    with pytest.raises(AssertionError, match="you/x: the token belongs to me"):
        runs("fit", folder=str(tmp_path), push=[{"repo_id": "you/x", "on": "last"}], **options)
    assert not hub.requests("POST", "/repos/create")


def test_readers_see_one_commit(hub: HubServer, runs: Runs, server: HubServer, tmp_path: Path) -> None:
    """A version is pushed while a reader stands between config.json and model.safetensors."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    runs("fit", folder=str(tmp_path / "one"), push=LAST, epochs=1)
    gate = hub.faults.hold("GET|HEAD", "/resolve/.*/model.safetensors")
    folders = ("one/hub/x/0001-epoch-0", "two/hub/x/0002-epoch-1")
    with Runs(server, tmp_path) as readers:
        readers.start("load", sources=["me/x"])
        assert gate.arrived.wait(30)
        runs("fit", folder=str(tmp_path / "two"), push=LAST, epochs=2)
        gate.release()
        found = readers.finish()
    new, one, two = runs("load", sources=["me/x", *(str(tmp_path / name) for name in folders)])
    assert found == [one]
    assert new == two != one
