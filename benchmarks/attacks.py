"""PGD against as many bare passes, against torchattacks, and its memory in micro-batches, on ResNet-18.

    python benchmarks/attacks.py [--device cuda] [--threads 1] [--batch 64] [--side 64] [--rounds 5]

Random weights in eval mode, images in [0, 1], the network's own predictions as labels; ten steps. A bare pass is forward
and the gradient of the cross-entropy in the images, nothing else. Times of a ratio are taken in turn in one process and the
medians compared; on a CPU they are seconds of the processor, which other processes of the machine disturb less than those of
the clock. Peak memory is what tensors hold beyond the inputs. torchattacks is compared where it is installed; it is no
dependency.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from nd import peak_bytes
from rich.console import Console
from rich.progress import track
from rich.table import Table
from structure import MIB, seconds, table, verdict
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attacks import apgd, attack_loss, pgd

STEPS = 10
PASSES_TARGET, MEMORY_TARGET, LIBRARY_TARGET, SAMPLES_TARGET = 1.05, 1.25, 1.0, 1
RADIUS = 0.25 / 255  # about half of what the random network predicts falls


def bare_passes(network: nn.Module, x: Tensor, labels: Tensor, count: int = STEPS) -> Tensor:
    for _ in range(count):
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(leaf), labels, reduction="sum"), leaf)
    return gradient


def medians(functions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in track(range(rounds), description="rounds", transient=True):
        for name, function in functions.items():
            taken[name].append(seconds(function, device))
    return {name: statistics.median(values) for name, values in taken.items()}


def compare_passes(network: nn.Module, x: Tensor, labels: Tensor, options: argparse.Namespace) -> Table:
    loss = attack_loss("ce", network)
    radius: dict[str, Any] = {"eps": RADIUS, "step_size": RADIUS / 4, "steps": STEPS}
    functions: dict[str, Callable[[], object]] = {
        f"{STEPS} bare passes": lambda: bare_passes(network, x, labels),
        "pgd": lambda: pgd(loss, x, labels, **radius),
        "pgd, l2": lambda: pgd(loss, x, labels, norm="l2", **radius),
        "pgd, micro_batch 16": lambda: pgd(loss, x, labels, micro_batch=16, **radius),
        "apgd": lambda: apgd(loss, x, labels, eps=RADIUS, steps=STEPS),
    }
    found = medians(functions, options.rounds, options.device)
    made = table(f"{STEPS} steps on {len(x)} x 3 x {x.shape[-1]} x {x.shape[-1]}", "", "seconds", "over bare", "target")
    bare = next(iter(found.values()))
    for name, value in found.items():
        judged = verdict(value <= PASSES_TARGET * bare, f"<= {PASSES_TARGET}") if name == "pgd" else ""
        made.add_row(name, f"{value:.3f}", f"{value / bare:.3f}", judged)
    return made


def compare_memory(network: nn.Module, x: Tensor, labels: Tensor, options: argparse.Namespace) -> Table:
    """What micro-batches need against one bare pass of their size, and what is kept for the whole batch."""
    loss = attack_loss("ce", network)
    made = table("peak memory beyond the inputs", "micro-batch", "pgd MiB", "bare pass MiB", "less the batch", "target")
    # Clean copy, bounds and results of the whole batch are as large as it is, each; activations are those of a part.
    kept = 8 * x.numel() * x.element_size()
    for size in (len(x), len(x) // 4, len(x) // 16):
        ours = peak_bytes(
            lambda size=size: pgd(loss, x, labels, eps=RADIUS, step_size=RADIUS, steps=2, micro_batch=size),
            options.device,
        )
        bare = peak_bytes(lambda size=size: bare_passes(network, x[:size], labels[:size], 1), options.device)
        ratio = (ours - kept) / bare
        made.add_row(
            f"{size}", f"{ours / MIB:.1f}", f"{bare / MIB:.1f}", f"{ratio:.2f}",
            verdict(ratio <= MEMORY_TARGET, f"<= {MEMORY_TARGET}, {kept / MIB:.1f} MiB taken off"),
        )  # fmt: skip
    return made


def compare_library(network: nn.Module, x: Tensor, labels: Tensor, options: argparse.Namespace) -> Table:
    made = table("against torchattacks' PGD", "", "seconds", "ratio", "stand", "target")
    if not importlib.util.find_spec("torchattacks"):
        made.add_row("torchattacks", "not installed", "", "", "")
        return made
    import torchattacks

    loss = attack_loss("ce", network)

    def ours(*, random_start: bool = True) -> Tensor:
        return pgd(loss, x, labels, eps=RADIUS, step_size=RADIUS / 4, steps=STEPS, random_start=random_start)

    def theirs(*, random_start: bool = True) -> Tensor:
        attack = torchattacks.PGD(network, eps=RADIUS, alpha=RADIUS / 4, steps=STEPS, random_start=random_start)
        return attack(x, labels)

    found = medians({"torchattacks": theirs, "ours": ours}, options.rounds, options.device)
    for random_start in (True, False):
        stand = {
            name: int((network(function(random_start=random_start)).argmax(1) == labels).sum())
            for name, function in {"torchattacks": theirs, "ours": ours}.items()
        }
        start = "random start" if random_start else "from the clean input"
        close = abs(stand["ours"] - stand["torchattacks"]) <= SAMPLES_TARGET
        made.add_row(f"torchattacks, {start}", f"{found['torchattacks']:.3f}", "1", f"{stand['torchattacks']}", "")
        ratio = found["ours"] / found["torchattacks"]
        target = f"{verdict(ratio <= LIBRARY_TARGET, '<= 1')}, {verdict(close, f'within {SAMPLES_TARGET}')}"
        made.add_row(f"ours, {start}", f"{found['ours']:.3f}", f"{ratio:.3f}", f"{stand['ours']} of {len(x)}", target)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="PGD against bare passes and torchattacks")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--batch", type=int, default=64, help="images, at least 16")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the medians are taken")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval().to(options.device)
    x = torch.rand(options.batch, 3, options.side, options.side, device=options.device)
    with torch.no_grad():
        labels = network(x).argmax(1)
    console = Console(width=140)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    console.print(f"PyTorch {torch.__version__}, {name}, medians of {options.rounds} rounds")
    for compare in (compare_passes, compare_memory, compare_library):
        console.print(compare(network, x, labels, options))


if __name__ == "__main__":
    main()
