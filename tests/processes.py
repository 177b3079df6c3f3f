"""Two gloo processes on this machine, joined through a file: no port, no network."""

from __future__ import annotations

import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["fit_in_two_processes", "run_processes"]

# What the processes would import, each anew.
_PRELOADED = [
    "lightning.pytorch", "torchmetrics", "torchvision", "timm", "scipy.stats", "sklearn.datasets", "hypothesis", "pytest",
    "zoo.metrics", "zoo.towers", "zoo.lightning_modules.nd", "zoo.losses",
]  # fmt: skip


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
    context.set_forkserver_preload(_PRELOADED)
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


def fit_in_two_processes(model: pl.LightningModule, data: Any, *, folder: Path, **options: Any) -> None:
    """Train a model in two processes by DDP, and give it the weights that the first one ends with.

    Args:
        model: the model, picklable.
        data: its data module or loader, picklable, with the batches of a process.
        folder: an empty folder.
        options: arguments of the trainer.
    """
    # As bytes: tensors that are sent as such are shared, and both processes would train the same weights.
    given = pickle.dumps((model, data, options))
    states = run_processes(_fit, given, world_size=2, folder=folder)
    model.load_state_dict(states[0])


def _fit(rank: int, world_size: int, given: bytes) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    model, data, options = pickle.loads(given)
    # The process group stands already; the address is never used.
    os.environ.update(
        LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="1", WORLD_SIZE=str(world_size), NODE_RANK="0"
    )
    trainer = pl.Trainer(accelerator="cpu", devices=world_size, strategy="ddp", **options)
    trainer.fit(model, data)
    state: dict[str, Any] = model.state_dict()
    return state
