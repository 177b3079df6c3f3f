"""``zoo demo``: the whole way of a component, on real images, in a few minutes on two cores.

A teacher is trained on scikit-learn's digits; a student is trained alone, with KD (ND weight 0) and with KD++ over several
seeds, the three differing in nothing else; the best KD++ student by validation accuracy is stored, loaded in a new process,
and must reach the same test accuracy to the last digit. The table says whether ND helped here.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats

from zoo.data import DigitsDataModule
from zoo.errors import InputError
from zoo.registry import component_class

__all__ = ["main", "paired_difference", "verdict"]

_STUDENT = "zoo/resnet8"
_TEACHER = "zoo/resnet20"
_LEVEL = 0.95
# One thread: networks this small spend more time on waking a second one than it saves.
_THREADS = 1

_LOAD_AND_TEST = """
import json, sys, torch, zoo
torch.set_num_threads({threads})
from zoo.demo import accuracy_on_test
model = zoo.from_pretrained(sys.argv[1])
print(json.dumps([accuracy_on_test(model, {train_samples!r}), type(model).__name__]))
"""


@dataclass(frozen=True)
class Run:
    """One training: accuracies in percent, and the model with its best weights by validation accuracy."""

    val: float
    test: float
    model: Any


def main(words: list[str]) -> None:
    """Run the demo.

    Args:
        words: the command's options.

    Raises:
        InputError: an option is out of range.
    """
    parser = argparse.ArgumentParser(prog="zoo demo", description="Distil a student on scikit-learn's digits.")
    parser.add_argument("--seeds", type=int, default=5, help="students a method, at least 2 (default: 5)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs a student (default: 20)")
    parser.add_argument("--teacher-epochs", type=int, default=15, help="epochs of the teacher (default: 15)")
    parser.add_argument("--nd-weight", type=float, default=2.0, help="weight of the ND loss in KD++ (default: 2)")
    parser.add_argument(
        "--train-samples", type=int, default=None, help="training images of the students (default: all)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where the student is stored")
    options = parser.parse_args(words)
    if options.seeds < 2:
        raise InputError(f"--seeds must be at least 2 for a standard deviation, got {options.seeds}")
    if options.epochs < 1 or options.teacher_epochs < 1:
        raise InputError("--epochs and --teacher-epochs must be at least 1")
    _quiet()
    torch.set_num_threads(_THREADS)
    console = Console()
    teacher, runs = _train_all(options, console)
    best = max(runs["KD++"], key=lambda run: run.val)
    _store_and_reload(best, options, console)
    _report(teacher, runs, console)


def accuracy_on_test(model: pl.LightningModule, train_samples: int | None = None) -> float:
    """Return the accuracy on the test digits, in percent.

    Args:
        model: a classifier of the zoo.
        train_samples: as in `DigitsDataModule`; the test split does not depend on it.
    """
    trainer = _trainer(1)
    data = DigitsDataModule(batch_size=256, train_samples=train_samples)
    return 100 * trainer.test(model, data, verbose=False)[0]["test/acc"]


def paired_difference(control: list[float], method: list[float]) -> tuple[float, float, float, float]:
    """Compare two methods over the same seeds.

    Args:
        control: one value a seed.
        method: one value a seed, in the same order.

    Returns:
        Mean difference, its standard deviation over seeds, and the ends of the 95 % confidence interval of the mean (t
        distribution); the interval is the mean itself where all differences are equal.

    Example:
        >>> paired_difference([1.0, 2.0], [2.0, 3.0])
        (1.0, 0.0, 1.0, 1.0)
    """
    differences = np.asarray(method) - np.asarray(control)
    mean, sd = float(differences.mean()), float(differences.std(ddof=1))
    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(differences) - 1)) * sd / len(differences) ** 0.5
    return mean, sd, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    """Say in a sentence what a confidence interval of the difference KD++ - KD means."""
    if low > 0:
        return "ND helped here: the interval of KD++ - KD lies above 0."
    if high < 0:
        return "ND hurt here: the interval of KD++ - KD lies below 0."
    return "ND made no difference here that these seeds could show: the interval of KD++ - KD contains 0."


class _EpochBar(pl.Callback):
    """Advance a progress bar by one an epoch, with the validation accuracy beside."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress = progress
        self.task = task

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val/acc"])
        self.progress.update(self.task, advance=1, status=f"val {accuracy:.1%}")


class _KeepBest(pl.Callback):
    """Keep the weights of the epoch with the best validation accuracy, the earliest of equals."""

    def __init__(self) -> None:
        self.accuracy = -1.0
        self.weights: dict[str, torch.Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val/acc"])
        if accuracy > self.accuracy:
            self.accuracy = accuracy
            self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def _train_all(options: argparse.Namespace, console: Console) -> tuple[Run, dict[str, list[Run]]]:
    methods = {"student alone": None, "KD": 0.0, "KD++": options.nd_weight}
    classifier, distillation = component_class("Classifier"), component_class("NDDistillation")
    one = {"student_options": {"in_chans": 1}, "num_classes": 10}
    columns = (
        TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[status]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("models", total=1 + options.seeds * len(methods), status="")

        def train(label: str, build: Any, epochs: int, seed: int, train_samples: int | None) -> Run:
            task = progress.add_task(label, total=epochs, status="")
            run = _train(build, epochs, seed, train_samples, _EpochBar(progress, task))
            progress.remove_task(task)
            progress.advance(total)
            return run

        teacher = train("teacher", lambda: classifier(_TEACHER, **one), options.teacher_epochs, 0, None)
        for seed in range(options.seeds):
            for name, weight in methods.items():

                def build(weight: float | None = weight) -> Any:
                    if weight is None:
                        return classifier(_STUDENT, **one)
                    network = teacher.model.student
                    return distillation(_STUDENT, network, nd_weight=weight, warmup_epochs=2, **one)

                label = f"{name}, seed {seed}"
                runs[name].append(train(label, build, options.epochs, seed, options.train_samples))
    return teacher, runs


def _train(build: Any, epochs: int, seed: int, train_samples: int | None, bar: pl.Callback) -> Run:
    pl.seed_everything(seed, verbose=False)
    model = build()
    best = _KeepBest()
    trainer = _trainer(epochs, bar, best)
    trainer.fit(model, DigitsDataModule(train_samples=train_samples, seed=seed))
    model.load_state_dict(best.weights)
    return Run(val=100 * best.accuracy, test=accuracy_on_test(model, train_samples), model=model)


def _trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _store_and_reload(best: Run, options: argparse.Namespace, console: Console) -> None:
    folder = best.model.save_pretrained(options.folder)
    code = _LOAD_AND_TEST.format(threads=_THREADS, train_samples=options.train_samples)
    answer = subprocess.run(  # noqa: S603 - this interpreter, our own text
        [sys.executable, "-W", "ignore", "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise RuntimeError(f"loading {folder} in a new process failed:\n{answer.stderr}")
    accuracy, component = json.loads(answer.stdout.splitlines()[-1])
    if accuracy != best.test:
        raise RuntimeError(f"test accuracy {accuracy!r} after loading, {best.test!r} at training")
    console.print(
        f"\nThe best KD++ student by validation accuracy is stored in [bold]{folder}[/bold]. A new process loaded it as "
        f"{component}: test accuracy {accuracy!r} %, equal to the one at training to the last digit."
    )


def _report(teacher: Run, runs: dict[str, list[Run]], console: Console) -> None:
    tests = {name: [run.test for run in results] for name, results in runs.items()}
    seeds = len(tests["KD"])
    table = Table(
        "model", "test accuracy, %", "minus KD, points (paired)", title="scikit-learn digits, 359 test images"
    )
    table.add_row(f"teacher ({_TEACHER})", f"{teacher.test:.2f}", "")
    for name, values in tests.items():
        difference = ""
        if name != "KD":
            mean, sd, low, high = paired_difference(tests["KD"], values)
            difference = f"{mean:+.2f} ± {sd:.2f}  (95 % of the mean: {low:+.2f} … {high:+.2f})"
        table.add_row(f"{name} ({_STUDENT})", f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}", difference)
    console.print(table)
    console.print(f"Mean ± standard deviation over {seeds} seeds; the rows differ in the named loss alone.")
    _, _, low, high = paired_difference(tests["KD"], tests["KD++"])
    console.print(f"[bold]{verdict(low, high)}[/bold]")


def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
