"""``python -m tests.hub_server --port 8765 --root DIR``: a Hub to try commands with, until Ctrl-C."""

from __future__ import annotations

import argparse
import shlex
import signal
import threading
from pathlib import Path

from tests.hub_server.server import HubServer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description="The Hugging Face Hub on loopback.")
    parser.add_argument("--root", type=Path, required=True, help="folder of everything that it keeps")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (default: 8765)")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that every answer takes longer (default: 0)")
    options = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with HubServer(options.root, port=options.port) as server:
        if options.delay:
            server.faults.delay(".*", "", options.delay)
        exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in server.environment().items())
        print(f"Hugging Face Hub at {server.endpoint}, user me, token hf_local, kept in {options.root}")
        print(f"export {exports}", flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
