"""CM3 from the start to the lists of all users, against the released code as it is described.

    python benchmarks/recommender.py [--size baby] [--parts start epoch evaluation memory stored growth] [--steps 5]
    python benchmarks/recommender.py --size electronics

Interactions and features are made up, in the numbers of Amazon's sets. The baseline (`recommender_baseline.py`) is written
from the description of the release; before anything is timed, both must have the same loss and gradient for a batch, and
the same measures of the same embeddings. Times are seconds of the processor, in turn in one process, with one thread. An
epoch is its batches, all of them, and its number of steps times the median step of ``--steps``. The baseline's evaluation is
that of ``--users`` users times their share; its lookups of groups need pandas, which is no dependency.

With ``--size electronics`` ours is measured alone, and its evaluation is that of ``--users`` users.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from recommender_baseline import has_pandas
from recommender_scale import compare_memory, measure_growth, measure_large, phases_of, size_of
from recommender_sides import BATCH, SIDES, SIZES, Batch, MadeData, Ours, Released, Side, train_step
from rich.console import Console
from rich.table import Table
from structure import seconds, table, verdict

START_TARGET, EPOCH_TARGET, EVALUATION_TARGET, STORED_TARGET = 30, 2, 20, 6
PARTS = ("start", "epoch", "evaluation", "memory", "stored", "growth")


def require_agreement(ours: Ours, released: Released) -> None:
    """Refuse to time what does not compute the same."""
    mine, theirs = ours.model.model, released.model
    with torch.no_grad():
        names = [*mine.encoders.names, "fused"]
        for name, part in zip(names, mine.user_parts.chunk(len(names), dim=1), strict=True):
            theirs.tables[name].copy_(part)
        theirs.gate.copy_(mine.gate.unsqueeze(2))
        for name, encoder in zip(mine.encoders.names, mine.encoders.encoders, strict=True):
            hidden = 4 * encoder.dim
            theirs.encoders[name][0].weight.copy_(encoder.reader.weight[:hidden])
            theirs.encoders[name][0].bias.copy_(encoder.reader.bias[:hidden])
            theirs.encoders[name][2].weight.copy_(encoder.out.weight)
            theirs.heads[name].weight.copy_(encoder.reader.weight[hidden:])
            theirs.heads[name].bias.copy_(encoder.reader.bias[hidden:])
    batch = {name: rows.to(ours.device) for name, rows in next(ours.batches()).items()}
    share = ours.model.fusion_weights(0)
    losses = ours.loss(batch, share), released.loss(batch, share)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    tables = torch.autograd.grad(losses[1], [theirs.tables[name] for name in names])
    (gradient,) = torch.autograd.grad(losses[0], mine.user_parts)
    theirs_gradient = torch.cat(tables, 1)
    assert (gradient - theirs_gradient).norm() <= 1e-3 * gradient.norm(), "gradients differ"
    for my, their in zip(ours.embeddings(), released.embeddings(), strict=True):
        assert (my - their).norm() <= 1e-3 * my.norm(), "embeddings differ"
    require_equal_measures(ours, released)


def require_equal_measures(ours: Ours, released: Released) -> None:
    found = ours.embeddings()
    measures, others = ours.evaluate(*found), released.evaluate(*found)
    for name, value in measures.items():
        assert abs(value - others[name]) <= 1e-4, f"{name} is {value} and {others[name]}"


def compare_start(taken: dict[str, float]) -> Table:
    lookups = "pandas" if has_pandas() else "no pandas: lookups by comparison"
    made = table(f"start: graphs, neighbours, loaders ({lookups})", "", "seconds", "ratio", "target")
    ratio = taken["released"] / taken["ours"]
    made.add_row("released", f"{taken['released']:.2f}", "1", "")
    target = verdict(ratio >= START_TARGET, f">= {START_TARGET}")
    made.add_row("ours", f"{taken['ours']:.2f}", f"{ratio:.1f}", target)
    return made


def compare_epoch(sides: dict[str, Side], options: argparse.Namespace) -> Table:
    made = table(
        f"an epoch, batches of {BATCH}, {options.steps} steps timed", "", "batches s", "step s", "epoch s", "ratio", "target"
    )  # fmt: skip
    loading: dict[str, float] = {}
    batches: dict[str, list[Batch]] = {}
    for name, side in sides.items():
        batches[name] = []
        loading[name] = seconds(lambda side=side, name=name: batches[name].extend(side.batches()), options.device)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(options.steps + 1):
        for name, side in sides.items():
            batch = batches[name][index % len(batches[name])]
            spent = seconds(lambda side=side, batch=batch: train_step(side, batch), options.device)
            if index:  # the first one allocates
                taken[name].append(spent)
    step = {name: statistics.median(values) for name, values in taken.items()}
    epoch = {name: loading[name] + len(batches[name]) * step[name] for name in sides}
    for name in sides:
        ratio = epoch["released"] / epoch[name]
        target = verdict(ratio >= EPOCH_TARGET, f">= {EPOCH_TARGET}") if name == "ours" else ""
        made.add_row(name, f"{loading[name]:.2f}", f"{step[name]:.2f}", f"{epoch[name]:.1f}", f"{ratio:.1f}", target)
    return made


def compare_evaluation(sides: dict[str, Side], options: argparse.Namespace) -> Table:
    found = sides["ours"].embeddings()
    users = len(sides["released"].loaders[0][0])
    sample = min(users, options.users)
    made = table(
        f"lists of {users:,} users and their measures, embeddings given (released: of {sample:,}, scaled)",
        "", "seconds", "ratio", "target",
    )  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        spent = seconds(lambda: sides["released"].evaluate(*found, sample), options.device)
        taken["released"].append(spent * users / sample)
        taken["ours"].append(seconds(lambda: sides["ours"].evaluate(*found), options.device))
    median = {name: statistics.median(values) for name, values in taken.items()}
    ratio = median["released"] / median["ours"]
    made.add_row("released", f"{median['released']:.2f}", "1", "")
    target = verdict(ratio >= EVALUATION_TARGET, f">= {EVALUATION_TARGET}")
    made.add_row("ours", f"{median['ours']:.2f}", f"{ratio:.1f}", target)
    forward = seconds(sides["ours"].model.train().embeddings, options.device)
    made.add_row("ours: the clean forward before it (released: none)", f"{forward:.2f}", "", "")
    return made


def compare_stored(sides: dict[str, Side]) -> Table:
    made = table("the stored model", "", "MB", "of released", "target")
    buffer = io.BytesIO()
    torch.save(sides["released"].model.state_dict(), buffer)
    released = buffer.getbuffer().nbytes
    with tempfile.TemporaryDirectory() as folder:
        sides["ours"].model.save_pretrained(folder)
        ours = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    made.add_row("released: parameters, neither ids nor graph", f"{released / 1e6:.1f}", "1", "")
    ratio = released / ours
    target = verdict(ratio >= STORED_TARGET, f"<= 1/{STORED_TARGET}")
    made.add_row("ours: with ids, interactions, neighbours, items", f"{ours / 1e6:.1f}", f"1/{ratio:.1f}", target)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="CM3 against the released code as it is described")
    parser.add_argument("--size", choices=sorted(SIZES), default="baby")
    parser.add_argument("--widths", nargs=2, type=int, metavar=("IMAGE", "TEXT"), help="other widths of the features")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of which the medians are taken")
    parser.add_argument("--users", type=int, default=2048, help="users of the baseline's evaluation, and of memory's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peak-of", choices=sorted(SIDES), help="print the phases of one side; for the script itself")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # Sparse matrices of the baseline are in beta, says PyTorch.
    warnings.filterwarnings("ignore", message=".*[Ss]parse")
    if options.peak_of:
        print(json.dumps(phases_of(options.peak_of, size_of(options), options)))
        return
    console = Console(width=140)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    console.print(f"PyTorch {torch.__version__}, {name}, {size_of(options)}, medians of {options.rounds} rounds")
    if options.size == "electronics":
        console.print(measure_large(options))
        return
    compare(console, options)


def compare(console: Console, options: argparse.Namespace) -> None:
    small = MadeData(SIZES["small"])
    require_agreement(Ours(small, options.device), Released(small, options.device))  # libraries load here as well
    data = MadeData(size_of(options))
    sides: dict[str, Side] = {}
    taken = {
        name: seconds(lambda name=name, kind=kind: sides.update({name: kind(data, options.device)}), options.device)
        for name, kind in SIDES.items()
    }
    comparisons: dict[str, Callable[[], Table]] = {
        "start": lambda: compare_start(taken),
        "epoch": lambda: compare_epoch(sides, options),
        "evaluation": lambda: compare_evaluation(sides, options),
        "memory": lambda: compare_memory(options),
        "stored": lambda: compare_stored(sides),
        "growth": lambda: measure_growth(options),
    }
    for part in options.parts:
        console.print(comparisons[part]())


if __name__ == "__main__":
    main()
