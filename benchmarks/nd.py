"""ND distillation: losses and class means against the released code's loops.

    python benchmarks/nd.py [--device cuda] [--threads 1] [--rounds 7]

`distillation.py` measures the training step.

Both sides of a ratio are timed in turn in the same run, and the medians are compared. The loops are written from the
description of the released code (arXiv 2305.17007): one `.item()` per label, the class mean made into a tensor from a
Python list and normalised for each sample, the built-in `max` of two tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from zoo.losses import nd_loss
from zoo.metrics import ClassMeans

SIZES = ((128, 256, 100), (512, 2048, 1000))
TARGET = 40
SAMPLES, WIDTH, BATCH, CLASSES = 50_000, 2048, 512, 1000
LOOP_SAMPLES = 64  # the slice of the class-mean loops that is timed; their cost is linear in the samples


def loop_nd_loss(student: Tensor, teacher: Tensor, centres: dict[str, list[float]], labels: Tensor) -> Tensor:
    total = torch.zeros((), device=student.device)
    for s, t, label in zip(student, teacher, labels, strict=True):
        centre = torch.tensor(centres[str(label.item())]).to(student.device)
        direction = centre / centre.norm(p=2)
        total = total + 1 - torch.dot(s, direction) / max(s.norm(p=2), t.norm(p=2))
    return total / len(labels)


def loop_items(features: Tensor, labels: Tensor) -> dict[int, list[float]]:
    """Every number leaves its tensor through .item() and is rounded to four decimals, as in the released script."""
    rows: dict[int, list[list[float]]] = {}
    for row, label in zip(features, labels, strict=True):
        rows.setdefault(int(label.item()), []).append([round(value.item(), 4) for value in row])
    return {k: [round(sum(column) / len(v), 4) for column in zip(*v, strict=True)] for k, v in rows.items()}


def loop_rows(features: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    """A milder loop than the released one: a row at a time stays a tensor, added to sums that exist already."""
    for row, label in zip(features, labels, strict=True):
        sums[label.item()] += row
    return sums


def seconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired_medians(
    ours: Callable[[], object], loop: Callable[[], object], *, rounds: int, calls: int, device: str
) -> tuple[float, float]:
    """Median seconds of both; `calls` of ours for one of the loop in each round, so that both see the same machine."""
    ours()
    loop()
    our_times, loop_times = [], []
    for _ in range(rounds):
        loop_times.append(seconds(loop, device))
        ours()  # the loop has filled the caches with its own data
        our_times += [seconds(ours, device) for _ in range(calls)]
    return statistics.median(our_times), statistics.median(loop_times)


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Most bytes that tensors held at once beyond what they held before the call."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def compare_losses(device: str, rounds: int, calls: int) -> Table:
    table = Table(title="nd_loss, forward + backward")
    for column in ("B, D, K", "loop ms", "ours ms", "ratio", f"target {TARGET}x", "loop peak MiB", "ours peak MiB"):
        table.add_column(column, justify="right")
    for batch, width, classes in track(SIZES, description="nd_loss", transient=True):
        student = torch.randn(batch, width, device=device, requires_grad=True)
        teacher = torch.randn(batch, width, device=device)
        centres = torch.rand(classes, width, device=device)
        labels = torch.randint(classes, (batch,), device=device)
        as_lists = {str(k): row for k, row in enumerate(centres.tolist())}  # as JSON has them

        def ours(
            student: Tensor = student, teacher: Tensor = teacher, centres: Tensor = centres, labels: Tensor = labels
        ) -> Tensor:
            (gradient,) = torch.autograd.grad(nd_loss(student, teacher, centres, labels), student)
            return gradient

        def loop(
            student: Tensor = student,
            teacher: Tensor = teacher,
            as_lists: dict[str, list[float]] = as_lists,
            labels: Tensor = labels,
        ) -> Tensor:
            (gradient,) = torch.autograd.grad(loop_nd_loss(student, teacher, as_lists, labels), student)
            return gradient

        torch.testing.assert_close(ours(), loop(), rtol=1e-4, atol=1e-6)
        our_time, loop_time = paired_medians(ours, loop, rounds=rounds, calls=calls, device=device)
        ratio = loop_time / our_time
        table.add_row(
            f"{batch}, {width}, {classes}",
            f"{1e3 * loop_time:.1f}",
            f"{1e3 * our_time:.3f}",
            f"{ratio:.1f}",
            "met" if ratio >= TARGET else "missed",
            f"{peak_bytes(loop, device) / 2**20:.2f}",
            f"{peak_bytes(ours, device) / 2**20:.2f}",
        )
    return table


def compare_class_means(device: str, rounds: int) -> Table:
    features = torch.randn(BATCH, WIDTH, device=device)
    labels = torch.randint(CLASSES, (BATCH,), device=device)
    metric = ClassMeans(num_classes=CLASSES, dim=WIDTH).to(device)

    def ours() -> Tensor:
        metric.reset()
        for start in range(0, SAMPLES, BATCH):
            rows = min(BATCH, SAMPLES - start)
            metric.update(features[:rows], labels[:rows])
        return metric.compute()

    part = features[:LOOP_SAMPLES], labels[:LOOP_SAMPLES]
    sums = torch.zeros(CLASSES, WIDTH, dtype=torch.float64, device=device)
    loops = {
        "loop, every number .item() (released)": lambda: loop_items(*part),
        "loop, a row at a time": lambda: loop_rows(*part, sums),
    }
    ours()
    times = [seconds(ours, device) for _ in track(range(rounds), description="ClassMeans", transient=True)]
    our_time = statistics.median(times)
    table = Table(title=f"class means of {SAMPLES} x {WIDTH} features, {CLASSES} classes, batches of {BATCH}")
    for column in ("", "seconds", "ratio", "peak MiB"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("ClassMeans", f"{our_time:.3f}", "1", f"{peak_bytes(ours, device) / 2**20:.1f}")
    for name, function in loops.items():
        function()
        measured = statistics.median(seconds(function, device) for _ in range(3))
        whole = measured * SAMPLES / LOOP_SAMPLES
        table.add_row(
            f"{name}, extrapolated from {LOOP_SAMPLES} samples", f"{whole:.1f}", f"{whole / our_time:.1f}", ""
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="nd_loss and ClassMeans against per-sample loops")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which the medians are taken")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    console.print(f"PyTorch {torch.__version__}, {name}, medians of {options.rounds} rounds")
    console.print(compare_losses(options.device, options.rounds, calls=30))
    console.print(compare_class_means(options.device, options.rounds))


if __name__ == "__main__":
    main()
