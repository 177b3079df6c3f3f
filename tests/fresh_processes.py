"""Fresh processes without the time that imports take: a server has imported what reads no environment, and forks.

huggingface_hub, lightning and the zoo are imported by each process anew, in its own environment; torch, torchvision, scipy
and matplotlib are there. ``python -m tests.fresh_processes`` is the server, :func:`run_fresh` the other end.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

__all__ = ["run_fresh"]

# Nothing here may import huggingface_hub, which reads the environment once.
_PRELOADED = (
    "torch", "torch._dynamo", "torchvision", "scipy.signal", "scipy.stats", "sklearn.datasets", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "PIL.Image", "jinja2", "yaml", "safetensors.torch", "rich.console",
)  # fmt: skip
_server: subprocess.Popen[str] | None = None


def run_fresh(
    *,
    code: str = "",
    module: str = "",
    words: list[str] | None = None,
    environment: Mapping[str, str],
    cwd: Path | str | None = None,
    timeout: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, as ``python -W ignore -c code`` or ``python -W ignore -m module words`` would.

    Args:
        code: Python; or
        module: the module that is run as a script.
        words: its arguments.
        environment: the whole environment of the process.
        cwd: its working directory; this process's if None.
        timeout: seconds after which it is killed; its exit status is then -14.
    """
    server = _started()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        order = {
            "code": code,
            "module": module,
            "words": words or [],
            "environment": dict(environment),
            "cwd": str(cwd or Path.cwd()),
            "folder": folder,
            "timeout": int(timeout),
        }
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        printed = [Path(folder, name).read_text(encoding="utf-8") for name in ("out", "err")]
    return subprocess.CompletedProcess([module or code], status, *printed)


def _started() -> subprocess.Popen[str]:
    global _server  # noqa: PLW0603 - one server a test process
    if _server is None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.fresh_processes"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        _server = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_stop, _server)
    return _server


def _stop(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()


def _serve() -> None:
    for name in _PRELOADED:
        import_module(name)
    assert "huggingface_hub" not in sys.modules
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_run(json.loads(line)))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


def _run(order: dict[str, object]) -> int:
    import signal

    signal.alarm(int(str(order["timeout"])))
    for number, name in ((0, os.devnull), (1, f"{order['folder']}/out"), (2, f"{order['folder']}/err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(order["environment"])  # type: ignore[call-overload]
    os.chdir(str(order["cwd"]))
    sys.path[0] = ""
    status: object = 0
    try:
        if order["module"]:
            sys.argv = [str(order["module"]), *order["words"]]  # type: ignore[misc]
            runpy.run_module(str(order["module"]), run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c"]
            exec(compile(str(order["code"]), "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code
        if isinstance(status, str):
            sys.stderr.write(status + "\n")
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    _serve()
