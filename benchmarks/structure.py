"""STRUCTURE: the loss in blocks against its dense formula, and mutual neighbours against Python sets.

    python benchmarks/structure.py [--device cuda] [--threads 1] [--rounds 3] [--parts time memory levels neighbours]

Times of a ratio are taken in turn in one process; on a CPU they are seconds of the processor, which other processes of
the machine disturb less than those of the clock. Peak memory is what one forward and backward needs beyond its inputs,
measured in a process of its own: the highest resident size on a CPU (Linux, with a heap that keeps nothing for later),
PyTorch's allocations on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo.losses import structure
from zoo.losses.structure import structure_loss, structure_statistics
from zoo.metrics.mutual_knn import count_shared, mutual_knn_table, neighbour_count
from zoo.metrics.neighbours import BYTES_PER_SCORE, block_rows, exact_units, neighbour_sets

SIZE, LARGE, WIDTH = 4096, 32_768, 512
CPU_CHUNKS, GPU_CHUNKS = (64, 128, 256, 512), (256, 512, 1024, 2048)
LEVELS_SIZE = {"cpu": 2048, "cuda": 8192}
MEMORY_TARGET, TIME_TARGET, LARGE_TARGET, NEIGHBOURS_TARGET = 10, 1.3, 2.0, 20
IMAGE_LAYERS, TEXT_LAYERS, SAMPLES, LAYER_WIDTH = 24, 25, 5000, 256
LOOP_PAIRS = 3  # pairs of layers whose sets are timed; all pairs have equally large sets
PARTS = ("time", "memory", "levels", "neighbours")
MIB = 2**20

Loss = Callable[[Tensor, Tensor], Tensor]


def dense_loss(frozen: Tensor, aligned: Tensor, levels: int = 1) -> Tensor:
    """The formula of the notes as it stands, 1e-12 included; the frozen side without a graph."""

    def walk(features: Tensor) -> Tensor:
        z = F.normalize(features, dim=1)
        z = z - z.mean(0)
        return torch.softmax(z @ z.t() / 0.05, dim=1)

    with torch.no_grad():
        step_x = walk(frozen)
    step_a = walk(aligned)
    x, a = step_x, step_a
    total = torch.zeros((), device=aligned.device)
    for level in range(levels):
        if level:
            x, a = x @ step_x, a @ step_a
        m = (a + x) / 2 + 1e-12
        of_x, of_a = (F.kl_div((p + 1e-12).log(), m, reduction="batchmean") for p in (x, a))
        total = total + (of_x + of_a) / 2
    return total / levels


def make_inputs(size: int, device: str) -> tuple[Tensor, Tensor]:
    """Features with some structure, 64 clusters, and what a head makes of them that has begun to lose it."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(64, WIDTH, generator=generator)
    frozen = centres[torch.randint(64, (size,), generator=generator)] + torch.randn(size, WIDTH, generator=generator)
    aligned = frozen + 0.3 * torch.randn(size, WIDTH, generator=generator)
    return frozen.to(device), aligned.to(device).requires_grad_()


def step(loss: Loss, frozen: Tensor, aligned: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(frozen, aligned)
    return value.detach(), torch.autograd.grad(value, aligned)[0]


def seconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    function()
    return time.process_time() - start


def in_turn(losses: dict[str, Loss], size: int, options: argparse.Namespace) -> dict[str, float]:
    """Medians of the rounds, in each of which every loss has its turn; a first round is checked and not counted."""
    frozen, aligned = make_inputs(size, options.device)
    found = {name: step(loss, frozen, aligned) for name, loss in losses.items()}
    value, gradient = next(iter(found.values()))
    for other_value, other_gradient in found.values():
        assert (other_value - value).abs() <= 1e-4 * value
        assert (other_gradient - gradient).norm() <= 1e-4 * gradient.norm()
    taken: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(options.rounds):
        for name, loss in losses.items():
            taken[name].append(seconds(lambda loss=loss: step(loss, frozen, aligned), options.device))
    return {name: statistics.median(values) for name, values in taken.items()}


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}: the memory of a CPU is measured on Linux only")


def peak_of(name: str, size: int, device: str) -> tuple[int, float]:
    """Most bytes beyond the inputs, and the seconds. Only in a process that has done nothing else."""
    loss = dense_loss if name == "dense" else structure_loss
    frozen, aligned = make_inputs(size, device)
    step(loss, *make_inputs(64, device))  # libraries load and allocate at their first use
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        taken = seconds(lambda: step(loss, frozen, aligned), device)
        return torch.cuda.max_memory_allocated() - before, taken
    # What was freed while the inputs were made counts for neither; setting the highest size back needs no rights.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    taken = seconds(lambda: step(loss, frozen, aligned), device)
    return resident("VmHWM") - before, taken


def peak_in_process(name: str, size: int, options: argparse.Namespace) -> tuple[int, float]:
    command = [sys.executable, __file__, "--peak-of", name, "--size", str(size)]
    command += ["--device", options.device, "--threads", str(options.threads)]
    # glibc would keep what is freed, up to twice what is held and by chance; so it goes back to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    peak, taken = json.loads(result.stdout.splitlines()[-1])
    return peak, taken


def table(title: str, *columns: str) -> Table:
    made = Table(title=title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def verdict(met: bool, target: str) -> str:
    return f"{'met' if met else 'MISSED'} ({target})"


def compare_time(options: argparse.Namespace) -> Table:
    made = table(f"forward + backward, N = {SIZE}, d = {WIDTH}, L = 1", "", "seconds", "over dense", "target")
    default = structure._row_tile(None, SIZE, torch.device(options.device))
    chunks = GPU_CHUNKS if options.device == "cuda" else CPU_CHUNKS
    losses: dict[str, Loss] = {"dense": dense_loss}
    for chunk in chunks:
        losses[f"chunk_size {chunk}"] = lambda x, a, chunk=chunk: structure_loss(x, a, chunk_size=chunk)
    losses["js"] = lambda x, a: structure_loss(x, a, divergence="js")
    js = losses.pop("js")
    taken = in_turn(losses, SIZE, options)
    taken["js, default chunk"] = in_turn({"js": js}, SIZE, options)["js"]
    for name, value in taken.items():
        ratio = value / taken["dense"]
        judged = name == f"chunk_size {default}"
        target = verdict(ratio <= TIME_TARGET, f"<= {TIME_TARGET}") + ", the default" if judged else ""
        made.add_row(name, f"{value:.3f}", f"{ratio:.2f}", target)
    frozen, _ = make_inputs(SIZE, options.device)
    made.add_row("structure_statistics", f"{seconds(lambda: structure_statistics(frozen), options.device):.3f}", "", "")
    return made


def compare_memory(options: argparse.Namespace) -> Table:
    made = table("peak memory beyond the inputs, L = 1", "", "MiB", "of dense", "target", "seconds")
    (dense, taken), (ours, our_time) = (peak_in_process(name, SIZE, options) for name in ("dense", "ours"))
    made.add_row(f"dense, N = {SIZE}", f"{dense / MIB:.0f}", "1", "", f"{taken:.2f}")
    target = verdict(MEMORY_TARGET * ours <= dense, f"<= 1/{MEMORY_TARGET}")
    made.add_row(f"ours, N = {SIZE}", f"{ours / MIB:.0f}", f"1/{dense / ours:.1f}", target, f"{our_time:.2f}")
    ours, our_time = peak_in_process("ours", options.large, options)
    target = verdict(ours <= LARGE_TARGET * 2**30, f"<= {LARGE_TARGET:g} GiB")
    made.add_row(f"ours, N = {options.large}", f"{ours / MIB:.0f}", "", target, f"{our_time:.1f}")
    return made


def compare_levels(options: argparse.Namespace) -> Table:
    size = LEVELS_SIZE[options.device]
    made = table(f"more levels, N = {size}, d = {WIDTH}", "L", "dense s", "ours s", "ratio")
    for levels in (1, 2, 3):
        losses: dict[str, Loss] = {
            "dense": lambda x, a, levels=levels: dense_loss(x, a, levels),
            "ours": lambda x, a, levels=levels: structure_loss(x, a, levels=levels),
        }
        taken = in_turn(losses, size, options)
        made.add_row(
            f"{levels}", f"{taken['dense']:.2f}", f"{taken['ours']:.2f}", f"{taken['ours'] / taken['dense']:.2f}"
        )
    return made


def compare_neighbours(options: argparse.Namespace) -> Table:
    """The table of all pairs of layers against sets in Python loops, which both have each layer's neighbours found once.

    Layers drift, one from the next, as those of an encoder do.
    """
    title = f"mutual neighbours, {IMAGE_LAYERS} x {TEXT_LAYERS} layers, n = {SAMPLES}, width {LAYER_WIDTH}"
    made = table(title, "", "seconds", "sets / ours", "target")
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(SAMPLES, LAYER_WIDTH, generator=generator)]
    while len(layers) < IMAGE_LAYERS + TEXT_LAYERS:
        layers.append(0.9 * layers[-1] + 0.4 * torch.randn(SAMPLES, LAYER_WIDTH, generator=generator))
    layers = [layer.to(options.device) for layer in layers]
    images, texts = layers[:IMAGE_LAYERS], layers[IMAGE_LAYERS:]
    k = neighbour_count("rice", SAMPLES)
    found: list[Tensor] = []
    rows = block_rows(None, BYTES_PER_SCORE * SAMPLES)
    search = seconds(
        lambda: found.extend(neighbour_sets(exact_units(layer), k, rows) for layer in layers), options.device
    )
    scores: list[Tensor] = []
    whole = seconds(lambda: scores.append(mutual_knn_table(images, texts)), options.device)
    lists = [neighbours.tolist() for neighbours in found]

    def loop(image: int, text: int) -> float:
        pairs = zip(lists[image], lists[IMAGE_LAYERS + text], strict=True)
        return sum(len(set(first) & set(second)) for first, second in pairs) / (SAMPLES * k)

    start = time.process_time()
    shares = [loop(pair, pair) for pair in range(LOOP_PAIRS)]
    sets = (time.process_time() - start) * IMAGE_LAYERS * TEXT_LAYERS / LOOP_PAIRS
    for pair, share in enumerate(shares):
        assert abs(float(scores[0][pair, pair]) - share) < 1e-6
    stacked = torch.stack(found[:IMAGE_LAYERS]), torch.stack(found[IMAGE_LAYERS:])
    counting = statistics.median(seconds(lambda: count_shared(*stacked), options.device) for _ in range(options.rounds))
    ratio = sets / counting
    target = verdict(ratio >= NEIGHBOURS_TARGET, f">= {NEIGHBOURS_TARGET}")
    made.add_row("neighbours of all layers, found once", f"{search:.2f}", "", "")
    made.add_row(f"sets in loops, from {LOOP_PAIRS} pairs of layers", f"{sets:.2f}", "", "")
    made.add_row("the same sets by count_shared", f"{counting:.2f}", f"{ratio:.0f}", target)
    made.add_row("mutual_knn_table", f"{whole:.2f}", f"{(search + sets) / whole:.1f} with the search", "")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="structure_loss against the dense formula, MutualKNN against sets")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of which the medians are taken")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--peak-of", choices=["dense", "ours"], help="print the peak of one step; for the script itself"
    )
    parser.add_argument("--large", type=int, default=LARGE, help="the large batch whose memory is measured")
    parser.add_argument("--size", type=int, default=SIZE, help="the batch of --peak-of")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    torch.set_num_threads(options.threads)
    if options.peak_of:
        sys.stdout.write(json.dumps(peak_of(options.peak_of, options.size, options.device)) + "\n")
        return
    console = Console(width=120)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    console.print(f"PyTorch {torch.__version__}, {name}, medians of {options.rounds} rounds, float32")
    parts = {
        "time": compare_time,
        "memory": compare_memory,
        "levels": compare_levels,
        "neighbours": compare_neighbours,
    }
    for part in options.parts:
        console.print(parts[part](options))


if __name__ == "__main__":
    main()
