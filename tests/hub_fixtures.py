"""A Hub for the whole test run, and real clients in fresh processes.

huggingface_hub reads its environment when it is imported, so a client that is to see a server needs a process of its own:
:func:`run_python` and :func:`call_python` run one and return what it found, :func:`start_python` starts one to be killed.
The client of another interpreter is used with ``HUB_CLIENT_PYTHON=/path/to/python``, to try other versions of
huggingface_hub.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fresh_processes import run_fresh
from tests.hub_server import HubServer

__all__ = ["call_python", "caught", "client_environment", "hub", "hub_server", "run_python", "start_python"]


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """One Hub for all tests; token ``hf_local`` writes as ``me``, ``hf_other`` as ``you``, ``hf_read`` reads as ``me``.

    ``me`` is a member of the organization ``lab``. Tests that share it use repositories of their own.
    """
    tokens = {"hf_local": "me", "hf_other": "you"}
    orgs = {"lab": ["me"]}
    root = tmp_path_factory.mktemp("hub")
    with HubServer(root, tokens=tokens, read_tokens={"hf_read": "me"}, orgs=orgs) as server:
        yield server
        assert not server.errors, server.errors[0]
        assert not server.leaks, server.leaks


@pytest.fixture
def hub(hub_server: HubServer) -> Iterator[HubServer]:
    """The Hub of the session with an empty log and no faults; afterwards without any again, and checked for leaks."""
    hub_server.faults.clear()
    hub_server.log.clear()
    yield hub_server
    hub_server.faults.clear()
    assert not hub_server.errors, hub_server.errors[0]
    assert not hub_server.leaks, hub_server.leaks


def client_environment(
    server: HubServer,
    *,
    home: str | Path,
    token: str | None = "hf_local",
    extra_env: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the environment of a client: this process's own without anything of the Hub, then the server's.

    Args:
        server: whose address it gets.
        home: the client's cache and login; empty for a fresh one.
        token: ``HF_TOKEN``; None leaves the client anonymous, or as ``home`` is logged in.
        extra_env: further variables; they win.
    """
    Path(home).mkdir(parents=True, exist_ok=True)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XDG_"))}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return {**ours, **quiet, "HF_HOME": str(home), **server.environment(token), **(extra_env or {})}


def run_python(
    code: str,
    *,
    server: HubServer,
    token: str | None = "hf_local",
    home: str | Path | None = None,
    extra_env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
) -> Any:
    """Run ``code`` in a fresh process that sees ``server`` as the Hub and return its standard output, parsed as JSON.

    Args:
        code: Python; it prints one JSON document, or nothing (None is returned then).
        server: the Hub.
        token: ``HF_TOKEN``, None for none.
        home: ``HF_HOME`` and the working directory; None makes a fresh one that is deleted afterwards.
        extra_env: further environment variables.
        timeout: seconds after which the process is killed.

    Returns:
        The printed value.

    Raises:
        AssertionError: the process failed or did not print JSON; the message holds its output.
    """
    with tempfile.TemporaryDirectory() as fresh:
        environment = client_environment(server, home=home or fresh, token=token, extra_env=extra_env)
        if client := os.environ.get("HUB_CLIENT_PYTHON"):
            command = [client, "-c", code]
            process = subprocess.run(
                command,
                env=environment,
                cwd=home or fresh,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        else:
            process = run_fresh(code=code, environment=environment, cwd=home or fresh, timeout=timeout)
    output = process.stdout
    report = f"exit status {process.returncode}\n{output}\n{process.stderr}"
    assert process.returncode == 0, report
    try:
        return json.loads(output) if output.strip() else None
    except json.JSONDecodeError:
        raise AssertionError(f"the output is not JSON: {report}") from None


def caught(function: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """Call ``function`` and return the class name of its exception, with the HTTP status if it has one, else ``""``.

    Functions that :func:`call_python` sends may use it by this name.
    """
    try:
        function(*arguments, **options)
    except Exception as error:  # noqa: BLE001 - the test says which one it must be
        response = getattr(error, "response", None)
        return type(error).__name__ + (f" {response.status_code}" if response is not None else "")
    return ""


def call_python(
    function: Callable[..., Any],
    *arguments: Any,
    server: HubServer,
    token: str | None = "hf_local",
    home: str | Path | None = None,
    extra_env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
) -> Any:
    """Call ``function(*arguments)`` in a fresh process as :func:`run_python` does, and return what it returns.

    Args:
        function: at module level, without decorators and complete in itself: its source is sent, so it imports what it
            needs and uses nothing of its module but :func:`caught`.
        arguments: JSON values.
        server: as in :func:`run_python`.
        token: as in :func:`run_python`.
        home: as in :func:`run_python`.
        extra_env: as in :func:`run_python`.
        timeout: as in :func:`run_python`.
    """
    code = f"""
from __future__ import annotations
import json
from collections.abc import Callable
from typing import Any
{inspect.getsource(caught)}
{textwrap.dedent(inspect.getsource(function))}
print(json.dumps({function.__name__}(*json.loads({json.dumps(arguments)!r}))))
"""
    return run_python(code, server=server, token=token, home=home, extra_env=extra_env, timeout=timeout)


def start_python(
    code: str,
    *,
    server: HubServer,
    home: str | Path,
    token: str | None = "hf_local",
    extra_env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start ``code`` as :func:`run_python` does and return the process, for tests that kill it.

    Args:
        code: Python.
        server: the Hub.
        home: ``HF_HOME`` and the working directory.
        token: ``HF_TOKEN``, None for none.
        extra_env: further environment variables.
    """
    return subprocess.Popen(
        [os.environ.get("HUB_CLIENT_PYTHON", sys.executable), "-c", code],
        env=client_environment(server, home=home, token=token, extra_env=extra_env),
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
