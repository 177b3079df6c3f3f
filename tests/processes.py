"""Two gloo processes on this machine, joined through a file: no port, no network."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["run_processes"]


def _entry(rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    try:
        torch.save(function(rank, world_size, *args), f"{store}.{rank}")
    except BaseException:
        Path(f"{store}.{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run_processes(function: Callable[..., Any], *args: Any, world_size: int, folder: Path) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` in ``world_size`` processes and return the results by rank.

    Args:
        function: a function at module level (it is pickled).
        args: its further arguments, picklable.
        world_size: the number of processes.
        folder: an empty folder for the rendezvous file and the results.

    Returns:
        What each rank returned, loaded with ``torch.load``.

    Raises:
        AssertionError: a process failed; the message holds its traceback.
    """
    store = folder / f"store-{len(list(folder.iterdir()))}"
    # A process that has imported torch and lightning once and forks: nothing has run in it, so it is as clean as a new one.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "torchmetrics", "torchvision", "zoo.metrics"])
    processes = [
        context.Process(target=_entry, args=(rank, world_size, str(store), function, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    errors = [path.read_text() for path in sorted(folder.glob(f"{store.name}.*.error"))]
    assert not errors, "\n".join(errors)
    return [torch.load(f"{store}.{rank}", weights_only=False) for rank in range(world_size)]
