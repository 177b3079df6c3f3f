"""Does ND help? Each base objective with the ND loss and without it, everything else equal, over several seeds.

    python benchmarks/nd_table.py --preset cpu --out runs/nd-table              # 45 minutes of one core
    python benchmarks/nd_table.py --preset gpu --out runs/nd-table-gpu          # ResNet-56 -> ResNet-20, all images
    python benchmarks/nd_table.py --preset paper --out runs/nd-table-paper      # the same for 240 epochs
    python benchmarks/nd_table.py --report --out runs/nd-table                  # the table as Markdown

A teacher is trained once (`zoo.Classifier`). Then for each seed the student alone, and for each base the student with
``nd_weight=0`` (the control) and with the paper's weight for its pair of these widths, ResNet-56 -> ResNet-20. The two of
a pair share initial weights, order, crops, optimizer, schedule and every other weight. Nothing is chosen by test accuracy:
a figure is the accuracy on the test images after the last epoch.

Each finished run is one line of ``<out>/results.jsonl``. With ``--resume`` a rerun does what is missing, so a table may be
stopped, continued, and made in parts; the parts may run side by side once the teacher is there, which a GPU needs, because
networks this small do not fill it:

    python benchmarks/nd_table.py --preset gpu --out runs/nd-table-gpu --methods teacher
    for m in alone,kd dkd dist review_kd; do
        python benchmarks/nd_table.py --preset gpu --out runs/nd-table-gpu --resume --methods $m &
    done; wait
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import nd_table_report
import torch
from nd_table_data import Batches, Images, Splits, load
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from zoo.lightning_modules.classifier import Classifier
from zoo.lightning_modules.nd import NDDistillation

from zoo import towers
from zoo.errors import InputError, nearest

# The paper's weights for ResNet-56 -> ResNet-20 on CIFAR-100; a, the weight of the cross-entropy, is 1 and T is 4.
BASES: dict[str, tuple[dict[str, float], float]] = {
    "kd": ({"kd_weight": 1.0}, 2.0),
    "dkd": ({"kd_weight": 1.0, "dkd_alpha": 2.5, "dkd_beta": 4.0}, 3.5),
    "dist": ({"kd_weight": 2.0}, 1.0),
    "review_kd": ({"kd_weight": 1.2}, 1.0),
}
METHODS = ("teacher", "alone", *BASES)
_BIG = {
    "data": "cifar10", "path": "../shared/data", "teacher": "zoo/resnet56", "student": "zoo/resnet20", "train_samples": None,
    "test_samples": None, "batch": 128, "lr": 0.1, "device": "cuda",
}  # fmt: skip
# cpu: measured on one thread of an AMD EPYC with bfloat16 instructions, free of other jobs: a step of KD takes 0.155 s (830
# images/s), of ReviewKD 0.45 s. In minutes: the teacher 8, a student alone 1, of KD, DKD or DIST 2, of ReviewKD 5; the whole
# table 75, without ReviewKD 48.
# gpu: estimated, not measured. A step of both networks launches some 500 kernels, 7 ms if each takes 14 us to launch, so an
# epoch of 390 steps takes 2.7 s, and 27 students of 30 epochs 37 minutes one after the other; the teacher 4. Four processes
# side by side, each on a core of its own, as above, are to bring that below 25.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        **_BIG, "teacher": "zoo/resnet20", "student": "zoo/resnet8", "train_samples": 4000, "test_samples": 2000,
        "epochs": 12, "teacher_epochs": 30, "device": "cpu", "precision": "bf16-mixed",
    },
    "gpu": {**_BIG, "epochs": 30, "teacher_epochs": 40, "precision": "bf16-mixed"},
    "paper": {**_BIG, "epochs": 240, "teacher_epochs": 240, "precision": "32-true"},
}  # fmt: skip
# What a figure depends on, beside its method and seed: one table never mixes two values of these.
SETTINGS = (
    "data", "teacher", "student", "train_samples", "test_samples", "epochs", "teacher_epochs", "batch", "lr", "precision",
)  # fmt: skip


class Epochs(pl.Callback):
    """Tell a progress bar that an epoch is over."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.advance()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the ND table of docs/results/nd.md")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="defaults of all other options")
    parser.add_argument("--out", type=Path, default=Path("runs/nd-table"), help="folder of the teacher and the results")
    parser.add_argument("--resume", action="store_true", help="continue a table: finished runs are skipped")
    parser.add_argument("--report", action="store_true", help="print the table of --out as Markdown and train nothing")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"which of {', '.join(METHODS)}; a missing teacher "
                        "is always trained")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", choices=["cifar10", "digits"])
    parser.add_argument("--path", help="folder of cifar10-train.parquet and cifar10-test.parquet")
    parser.add_argument("--teacher", help="a tower name, such as zoo/resnet56")
    parser.add_argument("--student", help="a tower name, such as zoo/resnet20")
    parser.add_argument("--train-samples", type=int, help="stratified subset of the training images")
    parser.add_argument("--test-samples", type=int, help="stratified subset of the test images")
    parser.add_argument("--epochs", type=int, help="epochs of a student")
    parser.add_argument("--teacher-epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, help="divided by 10 at 62.5, 75 and 87.5 %% of the epochs")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    first = parser.parse_known_args(words)[0]
    parser.set_defaults(**PRESETS[first.preset])
    if first.data == "digits":  # they are few: all of them, unless told otherwise
        parser.set_defaults(train_samples=None, test_samples=None)
    return check(parser.parse_args(words))


def check(options: argparse.Namespace) -> argparse.Namespace:
    options.methods = [name for name in options.methods.split(",") if name]
    for name in options.methods:
        if name not in METHODS:
            raise InputError(f"--methods: {name!r} is none of {', '.join(METHODS)}.{nearest(name, METHODS)}")
    for name in ("seeds", "epochs", "teacher_epochs", "batch"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available() and not options.report:
        raise InputError("--device cuda: PyTorch finds no GPU here; use --preset cpu or --device cpu")
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {**{name: getattr(options, name) for name in SETTINGS}, "bases": BASES, "warmup_epochs": warmup(options)}


def warmup(options: argparse.Namespace) -> int:
    """The paper's ramp of 20 in 240 epochs, scaled to the schedule, at least one epoch."""
    return max(1, round(options.epochs * 20 / 240))


def open_table(options: argparse.Namespace) -> dict[tuple[str, bool, int], dict[str, Any]]:
    """Return the finished runs of the table, and refuse one that was begun with other settings."""
    options.out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings_of(options)))
    path = options.out / "settings.json"
    if path.exists():
        stored = json.loads(path.read_text())
        changed = [f"{name} {stored.get(name)!r}, now {value!r}" for name, value in settings.items()
                   if stored.get(name) != value]  # fmt: skip
        if changed:
            raise InputError(f"{options.out} holds a table with {'; '.join(changed)}: give another --out")
    else:
        path.write_text(json.dumps(settings, indent=2) + "\n")
    finished = nd_table_report.read(options.out)
    if any(method != "teacher" for method, _, _ in finished) and not options.resume:
        raise InputError(
            f"{options.out} holds {len(finished)} finished runs: give --resume to continue, or another --out"
        )
    return finished


def fit(
    options: argparse.Namespace, model: pl.LightningModule, splits: Splits, epochs: int, advance: Callable[[], None]
) -> None:
    """Train with as little of Lightning as there is: neither bars nor checkpoints nor validation."""
    if options.compile:
        torch.compiler.reset()  # each run starts with a fresh count of recompilations
        model.student.compile()
        if isinstance(model, NDDistillation):
            model.teacher.network.compile()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=options.precision,
        callbacks=[Epochs(advance)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=10**6,
        benchmark=options.device == "cuda",
    )
    trainer.fit(model.to(memory_format=torch.channels_last), splits)
    if trainer.current_epoch != epochs:
        raise RuntimeError(f"the run ended after {trainer.current_epoch} of {epochs} epochs")  # an interrupt: no result


@torch.no_grad()
def accuracy(network: nn.Module, batches: Batches) -> float:
    """Percent right, in float32 whatever the precision of the training was."""
    network.to(batches.device).eval()
    right = torch.zeros((), dtype=torch.int64, device=batches.device)
    for x, targets in batches:
        right += (network.forward(x).argmax(1) == targets).sum()  # forward itself: never the compiled call
    return 100 * right.item() / batches.samples


def machine(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    return f"{names[0] if names else 'CPU'}, {options.threads} thread(s)"


class TableRun:
    """The runs of one process: what they share, and how each is done and written down."""

    def __init__(self, options: argparse.Namespace, images: Images, progress: Progress) -> None:
        self.options = options
        self.images = images
        self.progress = progress
        self.built = {"num_classes": images.num_classes, "student_options": {"in_chans": images.channels}}

    def student(self, method: str, *, with_nd: bool) -> pl.LightningModule:
        options = self.options
        if method == "teacher":
            return Classifier(options.teacher, lr=options.lr, **self.built)
        if method == "alone":
            return Classifier(options.student, lr=options.lr, **self.built)
        weights, nd_weight = BASES[method]
        return NDDistillation(
            options.student,
            self.teacher_network(),
            base=method,
            nd_weight=nd_weight if with_nd else 0.0,
            warmup_epochs=warmup(options),
            lr=options.lr,
            **weights,
            **self.built,
        )

    def teacher_network(self) -> nn.Module:
        with torch.random.fork_rng():  # building it must not move the student's initial weights
            tower = towers.create(
                self.options.teacher, num_classes=self.images.num_classes, in_chans=self.images.channels
            )
        tower.network.load_state_dict(torch.load(self.options.out / "teacher.pt", weights_only=True))
        return tower.network

    def do(self, method: str, with_nd: bool, seed: int) -> dict[str, Any]:
        options = self.options
        epochs = options.teacher_epochs if method == "teacher" else options.epochs
        start, worked = time.perf_counter(), time.process_time()
        pl.seed_everything(seed, verbose=False)
        model = self.student(method, with_nd=with_nd)
        splits = Splits(self.images, options.batch, seed=seed)
        task = self.progress.add_task(f"{nd_table_report.label(method, with_nd)}, seed {seed}", total=epochs)
        fit(options, model, splits, epochs, lambda: self.progress.advance(task))
        self.progress.remove_task(task)
        percent = accuracy(model.student, splits.batches("test"))
        if method == "teacher":
            weights = {name: tensor.cpu() for name, tensor in model.student.state_dict().items()}
            torch.save(weights, options.out / "teacher.tmp")
            (options.out / "teacher.tmp").replace(options.out / "teacher.pt")
        result = {
            "method": method, "nd": with_nd, "seed": seed, "accuracy": percent,
            "seconds": round(time.perf_counter() - start, 1), "processor_seconds": round(time.process_time() - worked, 1),
            "machine": machine(options), "compiled": options.compile, "torch": torch.__version__,
            "lightning": lightning.__version__, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python " + shlex.join(sys.argv),
        }  # fmt: skip
        with (options.out / "results.jsonl").open("a") as file:  # one write of one line: parts may run side by side
            file.write(json.dumps(result) + "\n")
        return result


def plan(options: argparse.Namespace, finished: set[tuple[str, bool, int]]) -> list[tuple[str, bool, int]]:
    """The runs to do, seed by seed, so that a table that is stopped early is even."""
    runs = [("teacher", False, 0)]
    for seed in range(options.seeds):
        for method in [name for name in options.methods if name != "teacher"]:
            runs += [(method, with_nd, seed) for with_nd in ((False, True) if method in BASES else (False,))]
    return [run for run in runs if run not in finished]


def main() -> None:
    options = parse()
    if options.report:
        print(nd_table_report.markdown(options.out))
        return
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high" if options.precision == "bf16-mixed" else "highest")
    runs = plan(options, set(open_table(options)))
    console = Console()
    console.print(f"{len(runs)} runs on {machine(options)}, torch {torch.__version__}, into {options.out}")
    if not runs:
        return
    images = load(options.data, options.path, options.train_samples, options.test_samples, device=options.device)
    columns = (
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        total = progress.add_task("runs", total=len(runs))
        table = TableRun(options, images, progress)
        for run in runs:
            result = table.do(*run)
            progress.advance(total)
            progress.console.print(
                f"{nd_table_report.label(*run[:2]):<16} seed {run[2]}  {result['accuracy']:6.2f} %  "
                f"{result['seconds']:7.1f} s ({result['processor_seconds']:.1f} s of processor time)"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"nd_table: {error}")
