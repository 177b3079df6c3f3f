"""What every test shares: no network, a fixed number of threads, two-process runs on loopback files."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hub_fixtures import hub, hub_server  # noqa: F401 - fixtures
from tests.processes import run_processes

# Networks this small spend more time on waking a second thread than it saves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[..., list[Any]]:
    """Run ``function(rank, world_size, *args)`` in two gloo processes and return what each returned."""

    def run(function: Callable[..., Any], *args: Any) -> list[Any]:
        return run_processes(function, *args, world_size=2, folder=tmp_path)

    return run
