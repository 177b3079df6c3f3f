"""A KD++ training step of `zoo.NDDistillation` under Lightning: images per second, overhead, memory, a cached teacher.

    python benchmarks/distillation.py [--quick]                        # one CPU thread: ResNet-56 -> ResNet-20, 32 px
    python benchmarks/distillation.py --device cuda --precision bf16-mixed [--compile]    # ResNet-34 -> ResNet-18, 224 px

Four sides do the same work on the same batch, which lies on the device already:

- the two networks alone: teacher forward, student forward and backward, optimizer, with the mean of the logits as loss;
- a bare PyTorch loop with our losses, which are vectorised;
- a bare loop as the released code is described (arXiv 2305.17007; written here from the description): class means parsed
  from JSON text and rounded to four decimals, and an ND loss that walks over the samples (`nd.loop_nd_loss`);
- `NDDistillation` under a Lightning Trainer.

They run in turn, several rounds in one process. A round gives each side the median of its steps; ratios are taken within a
round, and their median is shown. On a CPU time is processor time, which other processes disturb least; on a GPU it is the
time between events on its stream, with no wait in between, so that work of the CPU that overlaps costs nothing. Memory is
the most that a side held beyond what was held before it: tensors on a GPU, resident memory of the process on a CPU (the
median over the rounds: the first one also pays for what libraries keep).

The second table reads the images through a DataLoader, once with the teacher live and once with `teacher_cache`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import itertools
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
import torch
from nd import loop_nd_loss
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.lightning_modules.classifier import Classifier
from zoo.lightning_modules.nd import NDDistillation

from zoo.data.indexed import IndexedDataset
from zoo.data.tensors import ImageTensors
from zoo.losses import kd_loss, nd_loss

PAIRS = {  # student, teacher, side of the images in pixels, classes
    "tiny": ("zoo/resnet8", "zoo/resnet20", 32, 100),
    "cifar": ("zoo/resnet20", "zoo/resnet56", 32, 100),
    "imagenet": ("timm/resnet18", "timm/resnet34", 224, 1000),
}
OVERHEAD = 1.05
SHARE = {"cpu": 0.05, "cuda": 0.03}
WARM = 2  # the first steps, left out
ND_WEIGHT, TEMPERATURE = 2.0, 4.0

Side = Callable[[], "Steps"]


class Steps(NamedTuple):
    """Seconds of each step after the first ones, the loss of the first step, and the bytes held at most."""

    seconds: list[float]
    loss: float
    peak: int


class Clock:
    """Marks between steps: processor time on a CPU, events on a GPU's stream, which nobody waits for until the end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed must not hide what a side takes
            Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
            self.before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.process_time())

    def steps(self, loss: Tensor) -> Steps:
        if self.device == "cuda":
            torch.cuda.synchronize()
            seconds = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self.marks)]
            peak = torch.cuda.max_memory_allocated()
        else:
            seconds = [b - a for a, b in itertools.pairwise(self.marks)]
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        return Steps(seconds[WARM:], float(loss), peak - self.before)


class Timed(pl.Callback):
    """Mark the start of each training step and keep the first loss."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.loss = torch.zeros(())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.clock.mark()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1:
            self.loss = outputs["loss"].detach()


class Same(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """One batch on the device again and again, so that reading data takes no part in the comparison."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.batch


def fresh(options: argparse.Namespace, teacher: str | None = None, **more: Any) -> NDDistillation:
    """The model with the same weights and class means each time; ``teacher`` is the pair's, with random weights, if None."""
    torch.manual_seed(0)
    student, bare_teacher, _, classes = PAIRS[options.pair]
    model = NDDistillation(student, teacher or bare_teacher, classes, warmup_epochs=0, nd_weight=ND_WEIGHT, **more)
    assert model.class_means is not None
    assert model.class_counts is not None
    model.class_means.copy_(torch.rand(model.class_means.shape).mul(1e4).round() / 1e4)
    model.class_counts.fill_(1)
    model.to(options.device, memory_format=torch.channels_last)
    if options.compile:
        model.student.compile()
        if "teacher" in model.frozen_towers:  # a cached one is not built
            model.teacher.network.compile()
    return model


def under_lightning(options: argparse.Namespace, model: NDDistillation, loader: Any) -> Steps:
    clock = Clock(options.device)
    timed = Timed(clock)
    trainer = pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=options.precision,
        max_steps=options.steps + WARM + 1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timed],
    )
    trainer.fit(model, loader)
    return clock.steps(timed.loss)


def keep_input(network: nn.Module, head: str) -> list[Tensor]:
    """Return a list whose only entry is the latest input of the classifier: the features."""
    kept = [torch.zeros(())]
    network.get_submodule(head).register_forward_pre_hook(lambda _module, args: kept.__setitem__(0, args[0]))
    return kept


def bare(options: argparse.Namespace, batch: tuple[Tensor, Tensor], losses: str) -> Steps:
    """A loop without Lightning; ``losses`` is "none", "ours" or "released"."""
    model = fresh(options)
    student, teacher, means = model.student, model.teacher.network, model.class_means
    # The released way reads a file of decimals; it does so once a run, outside the steps that are timed.
    text = json.dumps({str(k): [round(value, 4) for value in row] for k, row in enumerate(means.tolist())})
    centres = json.loads(text)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    features = keep_input(student, model.student_tap.heads[0])
    teacher_features = keep_input(teacher, model.teacher.tap.heads[0])
    x, y = batch
    student.train()
    clock, first = Clock(options.device), torch.zeros(())
    for step in range(options.steps + WARM + 1):
        clock.mark()
        cast = torch.autocast(options.device, torch.bfloat16) if options.precision == "bf16-mixed" else nullcontext()
        with cast:
            with torch.no_grad():
                teacher_logits = teacher(x)
            logits = student(x)
        logits, teacher_logits = logits.float(), teacher_logits.float()
        if losses == "none":
            loss = logits.mean()
        else:
            loss = F.cross_entropy(logits, y) + kd_loss(logits, teacher_logits, temperature=TEMPERATURE)
            pair = features[0].float(), teacher_features[0].float()
            nd = nd_loss(*pair, means, y) if losses == "ours" else loop_nd_loss(*pair, centres, y)
            loss = loss + ND_WEIGHT * nd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = loss.detach()
    return clock.steps(first)


def alternate(sides: dict[str, Side], rounds: int, description: str) -> dict[str, list[Steps]]:
    """Run the sides in turn, each round from another one on."""
    found: dict[str, list[Steps]] = {name: [] for name in sides}
    names = list(sides)
    for turn in track(range(rounds * len(names)), description=description, transient=True):
        current, place = divmod(turn, len(names))
        name = names[(current + place) % len(names)]
        found[name].append(sides[name]())
    return found


def ratios(found: dict[str, list[Steps]], name: str, base: str) -> list[float]:
    """A side's median step divided by that of another side in the same round, for each round."""
    pairs = zip(found[name], found[base], strict=True)
    return [statistics.median(a.seconds) / statistics.median(b.seconds) for a, b in pairs]


def spanned(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} … {max(values):{form}})"


def ratio(found: dict[str, list[Steps]], name: str, base: str) -> float:
    return statistics.median(ratios(found, name, base))


def rows(found: dict[str, list[Steps]], base: str, batch: int, title: str) -> Table:
    table = Table("side", "step, ms", "images/s", f"time / {base} (over rounds)", "peak, MiB", title=title)
    for name, rounds in found.items():
        step = statistics.median(itertools.chain.from_iterable(one.seconds for one in rounds))
        peak = statistics.median(one.peak for one in rounds) / 2**20
        spread = spanned(ratios(found, name, base), ".3f")
        table.add_row(name, f"{1e3 * step:.1f}", f"{batch / step:,.0f}", spread, f"{peak:,.0f}")
    return table


def compare_step(options: argparse.Namespace, batch_size: int, console: Console) -> list[str]:
    """The first table for one batch size; returns a sentence for each target."""
    _, _, side, classes = PAIRS[options.pair]
    x = torch.randn(batch_size, 3, side, side, device=options.device).to(memory_format=torch.channels_last)
    batch = x, torch.randint(classes, (batch_size,), device=options.device)

    def ours() -> Steps:
        return under_lightning(options, fresh(options), torch.utils.data.DataLoader(Same(batch), batch_size=None))

    sides: dict[str, Side] = {
        "networks alone": lambda: bare(options, batch, "none"),
        "bare loop": lambda: bare(options, batch, "ours"),
        "released loop": lambda: bare(options, batch, "released"),
        "NDDistillation": ours,
    }
    found = alternate(sides, options.rounds, f"batch {batch_size}")
    tolerance = 2e-2 if options.precision == "bf16-mixed" else 1e-3
    losses = [found[name][0].loss for name in ("bare loop", "released loop", "NDDistillation")]
    assert max(losses) - min(losses) <= tolerance * abs(losses[0]), f"the sides compute different losses: {losses}"
    console.print(rows(found, "bare loop", batch_size, f"KD++ step, batch {batch_size}"))
    overhead = ratio(found, "NDDistillation", "bare loop")
    shares = [1 - value for value in ratios(found, "networks alone", "NDDistillation")]
    share = statistics.median(shares)
    released = ratio(found, "released loop", "NDDistillation")
    limit = SHARE[options.device]
    return [
        f"batch {batch_size}: step / bare loop {overhead:.3f}, target at most {OVERHEAD}: {said(overhead <= OVERHEAD)}",
        f"batch {batch_size}: outside the two networks {spanned(shares, '.1%')} of a step, target at most {limit:.0%}: "
        f"{said(share <= limit)}",
        f"batch {batch_size}: {released:.2f} times as many images per second as the released loop",
    ]


def said(met: bool) -> str:
    return "met" if met else "missed"


def compare_teacher(options: argparse.Namespace, batch_size: int, console: Console) -> list[str]:
    """The second table for one batch size: the teacher live against the teacher cached, through the same DataLoader."""
    if "teacher_cache" not in inspect.signature(NDDistillation.__init__).parameters:
        return [f"batch {batch_size}: NDDistillation has no teacher_cache here, nothing to compare"]
    _, _, side, classes = PAIRS[options.pair]
    samples = 4 * batch_size
    images, labels = torch.rand(samples, 3, side, side), torch.arange(samples) % classes
    data = ImageTensors(images, labels, range(samples), mean=[0.5] * 3, std=[0.25] * 3)

    def loader(*, indexed: bool) -> Any:
        return torch.utils.data.DataLoader(
            IndexedDataset(data) if indexed else data, batch_size=batch_size, shuffle=True, collate_fn=as_is,
            pin_memory=options.device == "cuda",
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        # A cache can be checked only against a teacher with stored weights.
        stored = Classifier(PAIRS[options.pair][1], classes)
        stored.example_shape = (3, side, side)
        teacher = str(stored.save_pretrained(Path(folder, "teacher")))
        path = str(Path(folder, "cache.safetensors"))
        sides: dict[str, Side] = {
            "teacher live": lambda: under_lightning(options, fresh(options, teacher), loader(indexed=False)),
            "teacher cached": lambda: under_lightning(
                options, fresh(options, teacher, teacher_cache=path), loader(indexed=True)
            ),
        }
        sides["teacher cached"]()  # computes the file
        found = alternate(sides, options.rounds, f"cached teacher, batch {batch_size}")
    console.print(rows(found, "teacher live", batch_size, f"KD++ step through a DataLoader, batch {batch_size}"))
    gain = ratio(found, "teacher live", "teacher cached")
    return [f"batch {batch_size}: {gain:.2f} times as many images per second with the teacher cached"]


def as_is(batch: Any) -> Any:
    return batch


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a KD++ training step: overhead, released loop, cached teacher")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512], help="batch sizes (default: 128 512)")
    parser.add_argument("--pair", choices=sorted(PAIRS), help="networks (default: cifar on a CPU, imagenet on a GPU)")
    parser.add_argument("--rounds", type=int, help="rounds (default: 5)")
    parser.add_argument("--steps", type=int, help="timed steps of a side in a round (default: 5 on a CPU, 20 on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument(
        "--quick", action="store_true", help="the tiny pair, batch 32, 2 rounds of 2 steps: does it run?"
    )
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if min(options.batch) < 2 or min(options.rounds or 1, options.steps or 1, options.threads) < 1:
        parser.error("--batch must be at least 2, --rounds, --steps and --threads at least 1")
    if options.quick:
        options.batch, options.pair = [32], options.pair or "tiny"
        options.rounds, options.steps = options.rounds or 2, options.steps or 2
    options.rounds = options.rounds or 5
    options.steps = options.steps or (20 if options.device == "cuda" else 5)
    options.pair = options.pair or ("imagenet" if options.device == "cuda" else "cifar")
    return options


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    console = Console()
    student, teacher, side, classes = PAIRS[options.pair]
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    console.print(
        f"{teacher} -> {student}, {side} px, {classes} classes; {name}; {options.precision}"
        f"{', compiled' if options.compile else ''}; torch {torch.__version__}, lightning {lightning.__version__}; "
        f"{options.rounds} rounds of {options.steps} steps"
    )
    lines = ["--quick: so few steps say that it runs, not how fast"] if options.quick else []
    for batch_size in options.batch:
        lines += compare_step(options, batch_size, console)
        lines += compare_teacher(options, batch_size, console)
    console.print("\n".join(lines), highlight=False)


if __name__ == "__main__":
    main()
