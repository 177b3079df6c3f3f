"""The contrastive engine against the dense formula: time, peak memory, growth, and CWCL against CLIP.

    python benchmarks/contrastive.py [--device cuda] [--threads 1] [--rounds 3] [--parts time memory growth cwcl products]

Times of a ratio are taken in turn in one process; on a CPU they are seconds of the processor, which other processes of
the machine disturb less than those of the clock (both are printed). Peak memory is what one step needs beyond its
inputs, measured in a process of its own: the highest resident size on a CPU, PyTorch's allocations on a GPU.

On a GPU the features are bfloat16 and the dense formula is given in float32 and in bfloat16; the tiles run as they are
("eager") and with their element-wise parts compiled, and `products` compares them with the four matrix products that
they cannot do without, at the rate at which this card multiplies. One command decides which tile is the default:

    python benchmarks/contrastive.py --device cuda
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo.losses import log_sums, pairwise
from zoo.losses.contrastive import clip_loss, siglip_loss
from zoo.losses.cwcl import cwcl_loss

WIDTH = 512
SCALE = 1 / 0.07
PARTS = ("time", "memory", "growth", "cwcl", "products")
SIZES = {"cpu": (4096, 8192, 12_000, 16_384), "cuda": (8192, 16_384, 32_768)}
MEMORY_TARGETS = {"cpu": {12_000: 12, 16_384: 20}, "cuda": {32_768: 50}}
GROWTH = {"cpu": (2048, 4096, 8192, 16_384), "cuda": (2048, 4096, 8192, 16_384, 32_768, 65_536)}
CWCL_SIZE = {"cpu": 8192, "cuda": 32_768}
GPU_TILES = ((1024, 4096), (2048, 4096), (4096, 4096), (4096, 8192), (8192, 8192))
MIB = 2**20


class Seconds(NamedTuple):
    processor: float  # of all threads; of the GPU's events on a GPU
    clock: float


def dense_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The formula as it is written everywhere."""
    scores = scale * x @ y.t()
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2


def dense_float_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return dense_clip(x.float(), y.float(), scale)


def dense_siglip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    sign = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(sign * (scale * x @ y.t() - 10)).sum() / len(x)


def clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return clip_loss(x, y, scale=scale)


def siglip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return siglip_loss(x, y, scale=scale, bias=-10.0)


def cwcl(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return cwcl_loss(x, y, scale=scale)


def normalised_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CLIP with what CWCL does itself: both sides in float32 and of unit length."""
    return clip_loss(F.normalize(x.float(), dim=1), F.normalize(y.float(), dim=1), scale=scale)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dense": dense_clip,
    "dense float32": dense_float_clip,
    "dense siglip": dense_siglip,
    "clip": clip,
    "siglip": siglip,
    "cwcl": cwcl,
    "normalised clip": normalised_clip,
}


class Step:
    """Forward and backward of one loss for one batch of unit vectors."""

    def __init__(self, name: str, size: int, device: str, *, frozen: bool = False) -> None:
        self.loss, self.size, self.device = LOSSES[name], size, device
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        x, y = (F.normalize(torch.randn(size, WIDTH, generator=generator), dim=1) for _ in range(2))
        # Pairs that have begun to agree: a batch of pure noise would not show the range of a training's scores.
        y = F.normalize(y + 0.5 * x, dim=1)
        self.sides = x.to(device, dtype).requires_grad_(), y.to(device, dtype).requires_grad_(not frozen)
        self.scale = torch.tensor(SCALE, device=device, requires_grad=True)

    def __call__(self) -> list[Tensor]:
        loss = self.loss(*self.sides, self.scale)
        learned = [x for x in (*self.sides, self.scale) if x.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, learned)]

    def seconds(self) -> Seconds:
        if self.device == "cuda":
            torch.cuda.synchronize()
        clock, processor = time.perf_counter(), time.process_time()
        self()
        if self.device == "cuda":
            torch.cuda.synchronize()
            return Seconds(time.perf_counter() - clock, time.perf_counter() - clock)
        return Seconds(time.process_time() - processor, time.perf_counter() - clock)


class Product(Step):
    """One product of the size of a block of scores, in the type of the features."""

    def __init__(self, size: int, device: str) -> None:
        super().__init__("clip", size, device)
        self.factors = [side.detach() for side in self.sides]

    def __call__(self) -> list[Tensor]:
        return [self.factors[0] @ self.factors[1].t()]


def in_turn(steps: dict[str, Step], rounds: int) -> dict[str, Seconds]:
    """The medians of the rounds, in each of which every step has its turn; one round to warm up goes uncounted."""
    taken: dict[str, list[Seconds]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            seconds = step.seconds()
            if turn:
                taken[name].append(seconds)
    return {
        name: Seconds(*(statistics.median(column) for column in zip(*values, strict=True)))
        for name, values in taken.items()
    }


def resident() -> tuple[int, int]:
    """Bytes that this process holds, and the most that it has held since the counter was set back."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(fields["VmRSS"].split()[0]), 1024 * int(fields["VmHWM"].split()[0])


def peak_of_step(name: str, size: int, device: str) -> int:
    """Most bytes beyond those held before the step. Only in a process that has done nothing else."""
    step = Step(name, size, device)
    Step(name, 64, device)()  # libraries load and allocate at their first use
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed while the inputs were made must not be there to use
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the highest resident size back
        before, _ = resident()
        step()
        return resident()[1] - before
    except OSError:  # not on Linux, or not allowed: the highest size ever, of which making the inputs is a part
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peak_bytes(name: str, size: int, options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--peak-of", name, "--size", str(size)]
    command += ["--device", options.device, "--threads", str(options.threads)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(result.stdout.splitlines()[-1]))


def table(title: str, *columns: str) -> Table:
    made = Table(title=title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def verdict(ratio: float, target: float) -> str:
    return f"{'met' if ratio <= target else 'MISSED'} (<= {target:g})"


def compare_time(options: argparse.Namespace) -> Table:
    made = table(
        f"forward + backward, d = {WIDTH}",
        "N",
        "loss",
        "dense s",
        "ours s",
        "ratio",
        "clock ratio",
        "target",
        "ns/pair",
    )
    pairs = [("dense", "clip"), ("dense siglip", "siglip")]
    if options.device == "cuda":
        pairs = [("dense float32", "clip"), *pairs]
    for size in options.sizes:
        for dense, ours in pairs if size <= 8192 or options.device == "cuda" else pairs[:1]:
            steps = {name: Step(name, size, options.device) for name in (dense, ours)}
            for found, expected in zip(steps[ours](), steps[dense](), strict=True):
                tolerance = 2e-2 if options.device == "cuda" else 1e-4
                assert (found - expected).float().norm() <= tolerance * expected.float().norm(), (dense, ours)
            taken = in_turn(steps, options.rounds)
            ratio = taken[ours].processor / taken[dense].processor
            made.add_row(
                f"{size}",
                f"{ours} / {dense}",
                f"{taken[dense].processor:.2f}",
                f"{taken[ours].processor:.2f}",
                f"{ratio:.2f}",
                f"{taken[ours].clock / taken[dense].clock:.2f}",
                verdict(ratio, 1),
                f"{1e9 * taken[ours].processor / size**2:.1f}",
            )
    return made


def compare_memory(options: argparse.Namespace) -> Table:
    made = table("peak memory beyond the inputs", "N", "dense MiB", "ours MiB", "dense / ours", "target")
    targets = MEMORY_TARGETS[options.device]
    dense = "dense float32" if options.device == "cuda" else "dense"
    for size in targets:
        peaks = [peak_bytes(name, size, options) for name in (dense, "clip")]
        made.add_row(
            f"{size}",
            *(f"{peak / MIB:.0f}" for peak in peaks),
            f"{peaks[0] / peaks[1]:.1f}",
            f"{'met' if peaks[0] >= targets[size] * peaks[1] else 'MISSED'} (>= {targets[size]})",
        )
    if options.device == "cuda":
        made.add_row("262144", "-", f"{peak_bytes('clip', 262_144, options) / MIB:.0f}", "-", "runs")
    return made


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """Slope of a straight line through the logarithms."""
    x, y = ([math.log(value) for value in column] for column in (sizes, values))
    return statistics.linear_regression(x, y).slope


def compare_growth(options: argparse.Namespace) -> Table:
    sizes = tuple(size for size in GROWTH[options.device] if size <= options.largest)
    taken = [in_turn({"clip": Step("clip", size, options.device)}, options.rounds)["clip"].processor for size in sizes]
    peaks = [peak_bytes("clip", size, options) for size in sizes]
    made = table("growth of ours", "N", "seconds", "MiB")
    for size, seconds, peak in zip(sizes, taken, peaks, strict=True):
        made.add_row(f"{size}", f"{seconds:.3f}", f"{peak / MIB:.1f}")
    made.add_row(
        "exponent", f"{exponent(sizes, taken):.2f} (near 2)", f"{exponent(sizes, list(map(float, peaks))):.2f} (near 1)"
    )
    return made


def compare_cwcl(options: argparse.Namespace) -> Table:
    size = CWCL_SIZE[options.device]
    made = table(f"CWCL and CLIP, N = {size}", "loss", "seconds", "over CLIP", "target", "peak MiB")
    steps = {
        "clip": Step("clip", size, options.device),
        "normalised clip": Step("normalised clip", size, options.device),
        "cwcl": Step("cwcl", size, options.device),
        "cwcl, frozen side constant": Step("cwcl", size, options.device, frozen=True),
    }
    taken = in_turn(steps, options.rounds)
    for name in steps:
        ratio = taken[name].processor / taken["clip"].processor
        peak = f"{peak_bytes(name, size, options) / MIB:.0f}" if name in LOSSES else ""
        target = verdict(ratio, 1.15) if name.startswith("cwcl") else ""
        made.add_row(name, f"{taken[name].processor:.2f}", f"{ratio:.2f}", target, peak)
    return made


def compare_products(options: argparse.Namespace) -> Table:
    """Against four products at the rate of one large product of the same type; on a GPU for several tiles."""
    size = 65_536 if options.device == "cuda" else 8192
    block = min(size, 8192 if options.device == "cuda" else 1024)
    step, product = Step("clip", size, options.device), Product(block, options.device)
    taken = in_turn({"product": product}, 10)["product"].processor
    floor = 4 * taken * (size / block) ** 2
    tera = 2 * block * block * WIDTH / taken / 1e12
    made = table(
        f"N = {size}: four products at {tera:.2f} TFLOP/s take {floor:.3f} s",
        "tile",
        "seconds",
        "over products",
        "target",
    )
    eager = log_sums._accumulate, log_sums._weigh
    for shape in GPU_TILES if options.device == "cuda" else (pairwise._CPU_TILE,):
        for name in ("eager", "compiled") if options.device == "cuda" or options.compiled else ("eager",):
            pairwise._CPU_TILE = pairwise._GPU_TILE = shape
            log_sums._accumulate, log_sums._weigh = (torch.compile(f) for f in eager) if name == "compiled" else eager
            seconds = in_turn({"clip": step}, options.rounds)["clip"].processor
            made.add_row(f"{shape}, {name}", f"{seconds:.3f}", f"{seconds / floor:.2f}", verdict(seconds / floor, 2))
    log_sums._accumulate, log_sums._weigh = eager
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="the contrastive engine against the dense formula")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of which the medians are taken")
    parser.add_argument("--sizes", type=int, nargs="+", help="batches of the comparison of times")
    parser.add_argument("--largest", type=int, default=65_536, help="largest batch of the growth")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--compiled", action="store_true", help="compile the element-wise parts on a CPU too")
    parser.add_argument("--peak-of", choices=sorted(LOSSES), help="print the peak of one step; for the script itself")
    parser.add_argument("--size", type=int, default=1024, help="the batch of --peak-of")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    options.sizes = options.sizes or SIZES[options.device]
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak_of_step(options.peak_of, options.size, options.device))
        return
    console = Console(width=130)
    name = torch.cuda.get_device_name() if options.device == "cuda" else processor_name()
    unit = (
        "seconds by the clock" if options.device == "cuda" else f"{options.threads} thread(s), seconds of the processor"
    )
    console.print(f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}, {name}; {unit}")
    compare = {
        "time": compare_time,
        "memory": compare_memory,
        "growth": compare_growth,
        "cwcl": compare_cwcl,
        "products": compare_products,
    }
    for part in options.parts:
        console.print(compare[part](options))


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    main()
