"""Faults: what the real client makes of them, and that the Hub holds complete commits whatever happens."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hub_fixtures import call_python, caught, run_python, start_python
from tests.hub_server import HubServer

_ROOT = Path(__file__).resolve().parents[1]


def _client_retries() -> dict[str, Any]:
    """One operation per repository; the faults are set by the name. They run side by side, as each waits a second."""
    import hashlib
    import random
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    content = random.Random(0).randbytes(2_000_000)

    def push(name: str) -> str:
        upload = {"path_or_fileobj": content, "path_in_repo": "model.safetensors", "repo_id": f"me/{name}"}
        return caught(api.upload_file, **upload)

    def pull(name: str) -> str:
        return hashlib.sha256(Path(hf_hub_download(f"me/{name}", "model.safetensors")).read_bytes()).hexdigest()

    pushes = ("push-429", "push-500", "push-503", "push-cut", "push-commit-500", "push-lost")
    pulls = ("pull-429", "pull-cut", "pull-timeout", "pull-head-502")
    with ThreadPoolExecutor(12) as pool:
        jobs: dict[str, Any] = {name: pool.submit(push, name) for name in pushes}
        jobs |= {name: pool.submit(pull, name) for name in pulls}
        jobs["pull-reset"] = pool.submit(caught, pull, "pull-reset")
        return {name: job.result() for name, job in jobs.items()}


def test_what_the_client_retries(hub: HubServer) -> None:
    content = random.Random(0).randbytes(2_000_000)
    pushes = ("push-429", "push-500", "push-503", "push-cut", "push-commit-500", "push-lost")
    before = {name: hub.plant(f"me/{name}", {"old": b"old"}) for name in pushes}
    # The client writes in pieces of 10 MiB; what is cut before the first one is begun anew.
    sizes = {"pull-429": 100, "pull-cut": 11_500_000, "pull-timeout": 100, "pull-head-502": 100}
    pulled = {name: random.Random(size).randbytes(size) for name, size in sizes.items()}
    for name in (*pulled, "pull-reset"):
        hub.plant(f"me/{name}", {"model.safetensors": pulled.get(name, content)})
    hub.faults.fail("POST", "me/push-429/preupload", 429, retry_after=0)
    hub.faults.fail("POST", "me/push-500.git/info/lfs/objects/batch", 500)
    hub.faults.fail("PUT", "/storage/models/me/push-503/", 503)
    hub.faults.cut_upload("PUT", "/storage/models/me/push-cut/", after=1_000_000)
    hub.faults.fail("POST", "me/push-commit-500/commit", 500)
    hub.faults.cut_download("POST", "me/push-lost/commit")
    hub.faults.fail("GET", "/storage/models/me/pull-429/", 429, retry_after=0)
    hub.faults.cut_download("GET", "/storage/models/me/pull-cut/", after=11_000_000)
    hub.faults.cut_download("GET", "/storage/models/me/pull-reset/", after=1_500_000, reset=True)
    hub.faults.hold("GET", "/storage/models/me/pull-timeout/")
    hub.faults.fail("HEAD", "me/pull-head-502/resolve", 502)
    out = call_python(_client_retries, server=hub, extra_env={"HF_HUB_DOWNLOAD_TIMEOUT": "3"})
    # A reset connection is a ReadError, which a download does not retry; a closed one it resumes.
    assert out.pop("pull-reset") == "ReadError"
    # The commit itself is not retried either: the client cannot know whether it was made.
    assert out.pop("push-commit-500") == "HfHubHTTPError 500"
    assert out.pop("push-lost") == "RemoteProtocolError"
    hashes = {name: hashlib.sha256(expected).hexdigest() for name, expected in pulled.items()}
    assert out == dict.fromkeys(pushes[:4], "") | hashes
    for name in ("push-429", "push-500", "push-503", "push-cut", "push-lost"):
        assert hub.files(f"me/{name}") == {"old": b"old", "model.safetensors": content}, name
    assert hub.head("me/push-commit-500") == before["push-commit-500"]
    statuses = [entry.status for entry in hub.requests("PUT", "/storage/models/me/push-cut/")]
    assert statuses == [None, 200]
    statuses = [entry.status for entry in hub.requests("GET", "/storage/models/me/pull-cut/")]
    assert statuses == [None, 206]  # resumed by Range, not begun anew


_PUSH = """
import random
from huggingface_hub import HfApi
content = random.Random(1).randbytes(3_000_000)
api = HfApi()
api.upload_file(path_or_fileobj=b"first", path_in_repo="config.json", repo_id="me/killed")
api.create_commit("me/killed", commit_message="second", operations=[
    __import__("huggingface_hub").CommitOperationAdd("config.json", b"second"),
    __import__("huggingface_hub").CommitOperationAdd("model.safetensors", content),
])
print("1")
"""


@pytest.mark.parametrize(
    ("method", "path", "after"),
    [
        ("POST", "me/killed/preupload", 0),
        ("PUT", "/storage/models/me/killed/", 1_000_000),
        ("POST", "me/killed.git/info/lfs/objects/verify", 0),
        ("POST", "me/killed/commit/main", 100),
    ],
)
def test_killed_client_leaves_the_old_commit(tmp_path: Path, method: str, path: str, after: int) -> None:
    with HubServer(tmp_path / "hub") as server:
        server.create("me/killed")
        nth = 2 if path.endswith(("preupload", "main")) else 1  # the first one belongs to the first commit
        gate = server.faults.hold(method, path, after=after, nth=nth)
        process = start_python(_PUSH, server=server, home=tmp_path)
        assert gate.arrived.wait(60)
        process.kill()
        process.communicate()
        gate.release()
        server.wait_idle()
        if path.endswith("main"):  # its request had arrived whole, so the commit is made although nobody waits for it
            assert server.files("me/killed")["config.json"] in (b"first", b"second")
        else:
            assert server.files("me/killed") == {"config.json": b"first"}
        assert not list((server.root / "incoming").iterdir())
        for stored in (server.root / "objects").glob("*/*"):
            assert hashlib.sha256(stored.read_bytes()).hexdigest() == stored.name
        # Another client finds the repository in order and pushes on.
        assert run_python(_PUSH, server=server, home=tmp_path) == 1
        content = random.Random(1).randbytes(3_000_000)
        assert server.files("me/killed") == {"config.json": b"second", "model.safetensors": content}
        assert not server.errors


@contextmanager
def _by_hand(root: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Start ``python -m tests.hub_server`` and yield its process, its port and what it printed."""
    command = [sys.executable, "-m", "tests.hub_server", "--port", "0", "--root", str(root)]
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        printed = process.stdout.readline() + process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", printed)
        assert found is not None, printed
        yield process, int(found[1]), printed
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _send(port: int, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body, {"Authorization": "Bearer hf_local"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_by_hand_and_killed_server(tmp_path: Path) -> None:
    with _by_hand(tmp_path) as (process, port, printed):
        for variable in (f"HF_ENDPOINT=http://127.0.0.1:{port}", "HF_TOKEN=hf_local", "HF_HUB_DISABLE_XET=1"):
            assert variable in printed
        assert _send(port, "POST", "/api/repos/create", b'{"name": "x", "organization": null}')[0] == 200
        commit = (
            b'{"key": "header", "value": {"summary": "s"}}\n{"key": "file", "value": {"path": "a", "content": "%d"}}'
        )
        for number in range(3):
            assert _send(port, "POST", "/api/models/me/x/commit/main", commit % number)[0] == 200
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = tmp_path / "incoming" / "left-by-the-kill"
    left.touch()
    with HubServer(tmp_path) as server:
        assert server.files("me/x") == {"a": b"2"}
        assert len(server.history("me/x")) == 4
        assert not left.exists()


def test_large_uploads_stay_out_of_memory(tmp_path: Path) -> None:
    """64 MiB through the server move its peak memory by less than 16 MiB."""
    size = 64 * 1024 * 1024
    sha256 = hashlib.sha256(bytes(size)).hexdigest()

    def peak(process: subprocess.Popen[str]) -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    large = tmp_path / "large"
    with large.open("wb") as file:
        os.truncate(file.fileno(), size)
    with _by_hand(tmp_path / "hub") as (process, port, _):
        _send(port, "POST", "/api/repos/create", b'{"name": "x", "organization": null}')
        batch = f'{{"operation": "upload", "objects": [{{"oid": "{sha256}", "size": {size}}}]}}'.encode()
        _, answer = _send(port, "POST", "/me/x.git/info/lfs/objects/batch", batch)
        address = re.search(rb"http://localhost:\d+(/storage/[^\"]+)", answer)
        assert address is not None
        before = peak(process)
        with (
            closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection,
            large.open("rb") as content,
        ):
            connection.request("PUT", address[1].decode(), content, {"Host": f"localhost:{port}"})
            assert connection.getresponse().status == 200
        assert peak(process) - before < 16 * 1024 * 1024


def _client_once() -> str:
    from huggingface_hub import HfApi

    upload = {"path_or_fileobj": b"\0", "path_in_repo": "w.bin", "repo_id": "me/x"}
    return caught(HfApi().upload_file, **upload)


def test_token_expires_in_mid_push(tmp_path: Path) -> None:
    with HubServer(tmp_path) as server:
        server.create("me/x")
        gate = server.faults.hold("POST", "/preupload/")

        def expire() -> None:
            gate.arrived.wait(60)
            del server.tokens["hf_local"]
            gate.release()

        thread = threading.Thread(target=expire)
        thread.start()
        assert call_python(_client_once, server=server) == "HfHubHTTPError 401"
        thread.join()
        assert server.files("me/x") == {}
        server.tokens["hf_local"] = "me"
        assert call_python(_client_once, server=server) == ""
        assert server.files("me/x") == {"w.bin": b"\0"}


def test_stopped_server_refuses_and_comes_back(tmp_path: Path) -> None:
    server = HubServer(tmp_path).start()
    endpoint = server.endpoint
    server.create("me/x")
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as kept_alive:
        kept_alive.request("GET", "/api/models/me/x")
        assert kept_alive.getresponse().read()
        server.stop()
        with pytest.raises(ConnectionRefusedError):
            _send(server.port, "GET", "/", b"")
        assert kept_alive.sock.recv(1) == b""
    with server:
        assert server.endpoint == endpoint
        assert call_python(_client_once, server=server) == ""
    server.stop()  # twice does no harm


def test_stop_gives_up_held_requests(tmp_path: Path) -> None:
    with HubServer(tmp_path) as server:
        held = [server.faults.delay("POST", "repos/create", 3600.0), server.faults.hold("PUT", "/storage/", after=2)]
        server.create("me/x")
        storage = server.storage.removeprefix(f"http://localhost:{server.port}")
        with (
            closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as first,
            closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as second,
        ):
            first.request("POST", "/api/repos/create", b'{"name": "y"}', {"Authorization": "Bearer hf_local"})
            second.request("PUT", f"{storage}/models/me/x/{'0' * 64}", b"1234", {"Host": "localhost"})
            for fault in held:
                assert fault.arrived.wait(60)
            server.stop()
            for connection in (first, second):
                assert connection.sock.recv(1) == b""
    assert server.store.get("model", "me/y") is None


def test_nth_and_times(tmp_path: Path) -> None:
    with HubServer(tmp_path) as server:
        fault = server.faults.fail("GET", r"/x\b", 418, nth=2, times=2)
        statuses = [_send(server.port, "GET", path, b"")[0] for path in ("/x", "/y", "/x", "/x", "/x")]
        assert statuses == [200, 200, 418, 418, 200]
        assert fault.hits == 2
        server.faults.fail("GET", "", 503, times=None)
        assert {_send(server.port, "GET", "/x", b"")[0] for _ in range(3)} == {503}
        server.faults.clear()
        assert _send(server.port, "GET", "/x", b"")[0] == 200


def test_leaked_token_is_found_and_refused(tmp_path: Path) -> None:
    """The check of the leak itself: a client that sends its token to the storage."""
    with HubServer(tmp_path) as server:
        server.plant("me/x", {"w.safetensors": b"w"})
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
            connection.request("GET", "/me/x/resolve/main/w.safetensors", headers={"Authorization": "Bearer hf_local"})
            answer = connection.getresponse()
            answer.read()
            address = answer.headers["Location"].removeprefix(server.storage.removesuffix("/storage"))
            assert not server.leaks
            headers = {"Host": f"localhost:{server.port}", "Authorization": "Bearer hf_local"}
            connection.request("GET", address, headers=headers)
            assert connection.getresponse().status == 400
        assert len(server.leaks) == 1
        assert "hf_local" not in repr(server.log)


def _client_side_by_side(number: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    def push(i: int) -> object:
        return HfApi().upload_file(path_or_fileobj=b"%d" % i, path_in_repo=f"{i}", repo_id="me/crowd")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(push, range(number)))


def test_no_commit_is_lost_in_a_crowd(hub: HubServer) -> None:
    hub.create("me/crowd")
    call_python(_client_side_by_side, 20, server=hub)
    assert hub.files("me/crowd") == {f"{i}": b"%d" % i for i in range(20)}
    assert len(hub.history("me/crowd")) == 21
