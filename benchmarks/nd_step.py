"""A training step of NDDistillation against the same step in a bare PyTorch loop: time, ratio, peak memory.

    python benchmarks/nd_step.py [--device cuda] [--precision bf16-mixed] [--compile] [--batch 64] [--size 64]

timm's ResNet-34 distils ResNet-18 with KD++ on random images. Both sides do the same: one pass of the frozen teacher, one
of the student, cross-entropy, KD, ND, backward, SGD. They run in turn in the same process, several rounds, and the median
steps are compared: on a CPU by processor time, which other processes on the machine disturb least. The target is at most
5 % over the bare loop.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from zoo.lightning_modules.nd import NDDistillation

from zoo.losses import kd_loss, nd_loss

TARGET = 1.05
STEPS = 12  # the first two are left out
CLASSES = 100


class Batches(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """The same batch on the device again and again, so that reading data takes no part in the comparison."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.batch


class Clock(pl.Callback):
    """The time between the starts of consecutive steps."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.marks: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.marks.append(self.now())


def gpu_seconds() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def steps_of(marks: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(marks)][2:]


def fresh(options: argparse.Namespace) -> NDDistillation:
    torch.manual_seed(0)
    model = NDDistillation("timm/resnet18", "timm/resnet34", CLASSES, warmup_epochs=0, nd_weight=2.0)
    model.class_means.copy_(torch.rand(model.class_means.shape))
    model.class_counts.fill_(1)
    model.to(options.device)
    if options.compile:
        model.student.compile()
        model.teacher.network.compile()
    return model


def lightning_steps(options: argparse.Namespace, batch: tuple[Tensor, Tensor], now: Callable[[], float]) -> list[float]:
    clock = Clock(now)
    trainer = pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=options.precision,
        max_steps=STEPS + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(fresh(options), torch.utils.data.DataLoader(Batches(batch), batch_size=None))
    return steps_of(clock.marks)


def bare_steps(
    options: argparse.Namespace, batch: tuple[Tensor, Tensor], now: Callable[[], float], *, networks_only: bool = False
) -> list[float]:
    model = fresh(options)
    student, teacher, means = model.student, model.teacher.network, model.class_means
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    kept: dict[str, Tensor] = {}
    for name, network in (("student", student), ("teacher", teacher)):
        network.get_classifier().register_forward_pre_hook(lambda _m, args, name=name: kept.__setitem__(name, args[0]))
    cast = torch.autocast(options.device, torch.bfloat16) if options.precision == "bf16-mixed" else nullcontext()
    x, y = batch
    marks = []
    student.train()
    for _ in range(STEPS + 1):
        marks.append(now())
        optimizer.zero_grad()
        with cast:
            with torch.no_grad():
                teacher_logits = teacher(x)
            logits = student(x)
            if networks_only:
                loss = logits.float().sum()
            else:
                loss = F.cross_entropy(logits.float(), y) + kd_loss(logits, teacher_logits, temperature=4.0)
                loss = loss + 2.0 * nd_loss(kept["student"], kept["teacher"], means, y)
        loss.backward()
        if not networks_only:
            optimizer.step()
    return steps_of(marks)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a KD++ step against a bare PyTorch loop")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(words)


def compare(options: argparse.Namespace, console: Console) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    now = gpu_seconds if options.device == "cuda" else time.process_time
    batch = (
        torch.randn(options.batch, 3, options.size, options.size, device=options.device),
        torch.randint(CLASSES, (options.batch,), device=options.device),
    )
    sides: dict[str, Callable[[], list[float]]] = {
        "networks alone": lambda: bare_steps(options, batch, now, networks_only=True),
        "bare loop": lambda: bare_steps(options, batch, now),
        "NDDistillation": lambda: lightning_steps(options, batch, now),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    for _ in range(options.rounds):
        for name, measure in sides.items():
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[name] += measure()
            peaks[name] = torch.cuda.max_memory_allocated() if options.device == "cuda" else peak_resident()
    report(options, times, peaks, console)


def peak_resident() -> int:
    """Peak of the whole process so far; it can only grow, so on a CPU it bounds the later rows from above."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(options: argparse.Namespace, times: dict[str, list[float]], peaks: dict[str, int], console: Console) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    title = (
        f"KD++ step, ResNet-34 -> ResNet-18, batch {options.batch} of {options.size} px, {options.device}, "
        f"{options.precision}{', compiled' if options.compile else ''}, torch {torch.__version__}"
    )
    table = Table("step", "median, ms", "against the bare loop", "peak memory, MiB", title=title)
    for name, median in medians.items():
        table.add_row(name, f"{1e3 * median:.1f}", f"{median / medians['bare loop']:.3f}", f"{peaks[name] / 2**20:.0f}")
    console.print(table)
    ratio = medians["NDDistillation"] / medians["bare loop"]
    share = 1 - medians["networks alone"] / medians["NDDistillation"]
    console.print(
        f"ratio {ratio:.3f} (target at most {TARGET}); share of the step outside the networks' passes {share:.1%}"
    )


if __name__ == "__main__":
    compare(parse(), Console())
