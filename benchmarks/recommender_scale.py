"""Memory of both sides of ``recommender.py``, and how ours grows.

Peak memory is what a phase needs beyond the inputs, in a process of its own: the highest resident size on a CPU (Linux),
PyTorch's allocations on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from recommender_sides import SIDES, SIZES, MadeData, Ours, Side, Size, train_step
from rich.table import Table
from structure import MIB, resident, seconds, table, verdict

MEMORY_TARGET, LARGE_TARGET = 2, 4 * 2**30
GROWTH = Size(4000, 2000, 40_000, 1024, 128)


def size_of(options: argparse.Namespace) -> Size:
    size = SIZES[options.size]
    return size._replace(image=options.widths[0], text=options.widths[1]) if options.widths else size


class Phase(NamedTuple):
    name: str
    peak: int  # beyond the inputs
    whole: int  # of the process
    seconds: float


def phases_of(name: str, size: Size, options: argparse.Namespace) -> list[Phase]:
    """Start, two steps and an evaluation, in a process that has done nothing else."""
    device = options.device
    kind = SIDES[name]
    warm = kind(MadeData(SIZES["small"]), device)
    train_step(warm, next(warm.batches()))
    warm.evaluate(*warm.embeddings())
    data = MadeData(size)
    held: list[Side] = []

    def steps() -> None:
        for _, batch in zip(range(2), held[0].batches(), strict=False):
            train_step(held[0], batch)

    def ranks() -> None:
        held[0].evaluate(*held[0].embeddings(), options.users)

    before = allocated(device)
    found = []
    for phase, function in (("start", lambda: held.append(kind(data, device))), ("step", steps), ("lists", ranks)):
        forget_peak(device)
        taken = seconds(function, device)
        peak = highest(device)
        found.append(Phase(phase, peak - before, peak, taken))
    return found


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")


def highest(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def phases_in_process(name: str, options: argparse.Namespace) -> list[Phase]:
    command = [
        sys.executable,
        str(Path(__file__).with_name("recommender.py")),
        "--peak-of",
        name,
        "--size",
        options.size,
        "--users",
        str(options.users),
    ]
    command += ["--device", options.device, "--threads", str(options.threads)]
    command += ["--widths", *map(str, size_of(options)[3:])]
    # As in structure.py: what is freed goes back to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return [Phase(*each) for each in json.loads(result.stdout.splitlines()[-1])]


def compare_memory(options: argparse.Namespace) -> Table:
    made = table("peak memory beyond the inputs", "", "released MiB", "ours MiB", "of released", "target")
    released, ours = (phases_in_process(name, options) for name in SIDES)
    for theirs, mine in zip(released, ours, strict=True):
        made.add_row(
            theirs.name, f"{theirs.peak / MIB:.0f}", f"{mine.peak / MIB:.0f}", f"1/{theirs.peak / mine.peak:.1f}", ""
        )
    peaks = [max(phase.peak for phase in side) for side in (released, ours)]
    ratio = peaks[0] / peaks[1]
    target = verdict(ratio >= MEMORY_TARGET, f"<= 1/{MEMORY_TARGET}")
    made.add_row("highest", f"{peaks[0] / MIB:.0f}", f"{peaks[1] / MIB:.0f}", f"1/{ratio:.1f}", target)
    return made


def measure_large(options: argparse.Namespace) -> Table:
    made = table(f"ours alone, {size_of(options)}", "", "seconds", "MiB", "MiB with the inputs", "target")
    names = {"start": "start", "step": "two steps", "lists": f"lists of {options.users:,} users, with the forward"}
    for phase in phases_in_process("ours", options):
        target = verdict(phase.whole <= LARGE_TARGET, "<= 4 GiB")
        made.add_row(
            names[phase.name], f"{phase.seconds:.1f}", f"{phase.peak / MIB:.0f}", f"{phase.whole / MIB:.0f}", target
        )
    return made


def times_of(size: Size, options: argparse.Namespace) -> list[float]:
    """Seconds of start, step and lists of all users."""
    data, held = MadeData(size), []
    start = seconds(lambda: held.append(Ours(data, options.device)), options.device)
    side = held[0]
    batch = next(side.batches())
    train_step(side, batch)
    step = statistics.median(seconds(lambda: train_step(side, batch), options.device) for _ in range(options.rounds))
    found = side.embeddings()
    return [start, step, seconds(lambda: side.evaluate(*found), options.device)]


def measure_growth(options: argparse.Namespace) -> Table:
    made = table(f"growth of our times, from {GROWTH}", "", "start s", "step s", "lists s", "exponents")
    base = times_of(GROWTH, options)
    made.add_row("as it is", *(f"{value:.3f}" for value in base), "")
    for name in ("users", "items", "interactions"):
        for factor in (2, 4):
            grown = GROWTH._replace(**{name: factor * getattr(GROWTH, name)})
            if name == "users":  # each has five at least
                grown = grown._replace(interactions=max(grown.interactions, 6 * grown.users))
            found = times_of(grown, options)
            shares = [math.log(new / old, factor) for new, old in zip(found, base, strict=True)]
            made.add_row(
                f"{name} x {factor}", *(f"{value:.3f}" for value in found), ", ".join(f"{each:.1f}" for each in shares)
            )
    return made
