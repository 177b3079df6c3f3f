"""CM3 from the start to the lists of all users, against the released code as it is described.

    python benchmarks/recommender.py [--size baby] [--parts start epoch evaluation memory stored growth] [--steps 5]
    python benchmarks/recommender.py --size electronics

Interactions and features are made up, in the numbers of Amazon's sets. The baseline (`recommender_baseline.py`) is written
from the description of the release; before anything is timed, both must have the same loss and gradient for a batch, and
the same measures of the same embeddings. Times are seconds of the processor, in turn in one process, with one thread. An
epoch is its batches, all of them, and its number of steps times the median step of ``--steps``. The baseline's evaluation is
that of ``--users`` users times their share; its lookups of groups need pandas, which is no dependency.

Peak memory is what a phase needs beyond the inputs, in a process of its own: the highest resident size on a CPU (Linux),
PyTorch's allocations on a GPU. With ``--size electronics`` ours is measured alone, and its evaluation is that of ``--users``
users.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from recommender_baseline import (
    ReleasedModel,
    epoch_batches,
    evaluate,
    evaluation_loader,
    has_pandas,
    sampling_sets,
)
from rich.console import Console
from rich.table import Table
from structure import MIB, resident, seconds, table, verdict
from torch import Tensor
from zoo.lightning_modules.cm3 import CM3

from zoo.data.interaction_loading import Interactions, InteractionsDataModule, split_pairs
from zoo.data.interaction_splits import random_user_split

BATCH, EVALUATION_BATCH, FACTORS = 2048, 4096, 16
START_TARGET, EPOCH_TARGET, EVALUATION_TARGET, MEMORY_TARGET, STORED_TARGET = 30, 2, 20, 2, 6
LARGE_TARGET = 4 * 2**30
PARTS = ("start", "epoch", "evaluation", "memory", "stored", "growth")
OPTIONS: dict[str, Any] = {"dim": 64, "layers": 3, "neighbours": 10, "gamma": 0.5, "max_similarity": 0.8, "alpha": 0.5}
IMAGE_WEIGHT = 0.1

Batch = dict[str, Tensor]


class Size(NamedTuple):
    users: int
    items: int
    interactions: int
    image: int
    text: int

    def __str__(self) -> str:
        counts = " x ".join(f"{count:,}" for count in self[:3])
        return f"{counts}, features {self.image} + {self.text}"


SIZES = {
    "small": Size(2000, 800, 16_000, 256, 64),
    "baby": Size(19_445, 7050, 160_792, 4096, 384),
    "electronics": Size(192_403, 63_001, 1_689_188, 4096, 384),
}
GROWTH = Size(4000, 2000, 40_000, 1024, 128)


def size_of(options: argparse.Namespace) -> Size:
    size = SIZES[options.size]
    return size._replace(image=options.widths[0], text=options.widths[1]) if options.widths else size


class MadeData(InteractionsDataModule):
    """Users with at least five items and a long tail of both; features of a few factors and noise."""

    def __init__(self, size: Size) -> None:
        super().__init__(batch_size=BATCH, eval_batch_size=EVALUATION_BATCH)
        self.size = size
        self.data  # noqa: B018 # made before anything is timed

    def _read(self) -> Interactions:
        size, generator = self.size, torch.Generator().manual_seed(0)
        users, items = made_pairs(size, np.random.default_rng(0))
        contents = torch.randn(size.items, FACTORS, generator=generator)
        features = {
            name: torch.addmm(
                torch.randn(size.items, width, generator=generator),
                contents,
                torch.randn(FACTORS, width, generator=generator),
                beta=0.3,
                alpha=FACTORS**-0.5,
            )
            for name, width in (("image", size.image), ("text", size.text))
        }
        pairs, _ = split_pairs(users, items, random_user_split(users, seed=0))
        return Interactions(
            pairs=pairs,
            features=features,
            present={name: torch.ones(size.items, dtype=torch.bool) for name in features},
            user_ids=[str(user) for user in range(size.users)],
            item_ids=[str(item) for item in range(size.items)],
        )


def made_pairs(size: Size, draws: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    odds = [np.arange(1, count + 1) ** -0.6 for count in (size.users, size.items)]
    odds = [draws.permutation(each / each.sum()) for each in odds]
    keys = np.empty(0, dtype=np.int64)
    while len(keys) < size.interactions:
        missing = size.interactions - len(keys)
        each = np.repeat(np.arange(size.users), 5) if len(keys) == 0 else draws.choice(size.users, missing, p=odds[0])
        keys = np.concatenate([keys, each * size.items + draws.choice(size.items, len(each), p=odds[1])])
        keys = keys[np.sort(np.unique(keys, return_index=True)[1])]
    keys = keys[: size.interactions]
    return keys // size.items, keys % size.items


class Ours:
    def __init__(self, data: MadeData, device: str) -> None:
        weights = {"image": IMAGE_WEIGHT, "text": 1 - IMAGE_WEIGHT}
        self.model = CM3(modality_weights=weights, **OPTIONS).to(device)
        self.model.attach(data)
        self.model.graph()
        self.training = data.train_dataloader()
        self.loaders = [data.val_dataloader(), data.test_dataloader()]
        self.device, self.steps, self.optimizer = device, 0, self.model.configure_optimizers()

    def batches(self) -> Iterator[Batch]:
        yield from self.training

    def loss(self, batch: Batch, share: Tensor | None = None) -> Tensor:
        self.steps += 1
        share = self.model.fusion_weights(self.steps) if share is None else share
        terms = self.model.losses(batch, *self.model._encode(share))
        return terms["alignment"] + self.model.gamma * (terms["user_uniformity"] + terms["item_uniformity"]) / 2

    def embeddings(self) -> tuple[Tensor, Tensor]:
        return self.model.eval().embeddings()

    def evaluate(self, users: Tensor, items: Tensor, limit: int | None = None) -> dict[str, float]:
        ranking, seen = self.model.ranking.to(self.device), self.model.seen()
        ranking.reset()
        ranked = 0
        for batch in self.loaders[0]:
            rows = batch["user"].to(self.device)
            ranking.update(users[rows], items, batch["held_out"], seen.select(rows))
            ranked += len(rows)
            if limit and ranked >= limit:
                break
        return {name: float(value) for name, value in ranking.compute().items()}


class Released:
    def __init__(self, data: MadeData, device: str) -> None:
        pairs = {name: (rows[0].numpy(), rows[1].numpy()) for name, rows in data.interactions.items()}
        self.train, size = pairs["train"], data.size
        features = {name: rows.to(device) for name, rows in data.features.items()}
        self.model = ReleasedModel(
            *self.train, num_users=size.users, num_items=size.items, **features, image_weight=IMAGE_WEIGHT, **OPTIONS
        )  # fmt: skip
        self.sampling = sampling_sets(*self.train)
        self.loaders = [evaluation_loader(self.train, pairs[name]) for name in ("val", "test")]
        self.device, self.optimizer = device, torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def batches(self) -> Iterator[Batch]:
        for parts in epoch_batches(*self.train, *self.sampling, BATCH):
            yield dict(zip(("user", "positive", "negative"), parts, strict=True))

    def loss(self, batch: Batch, share: Tensor | None = None) -> Tensor:
        # The weight is that of the text here, and of the image in ours.
        return self.model.loss(*batch.values(), None if share is None else 1 - share)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """What the last forward has left, as in the release: here a new one, which is not timed."""
        with torch.no_grad():
            return self.model(torch.full((self.model.num_items,), 0.5, device=self.device))[:2]

    def evaluate(self, users: Tensor, items: Tensor, limit: int | None = None) -> dict[str, float]:
        return evaluate(users, items, self.loaders[0], EVALUATION_BATCH, limit)


SIDES = {"released": Released, "ours": Ours}
Side = Ours | Released


def train_step(side: Side, batch: Batch) -> Tensor:
    side.model.train()
    loss = side.loss({name: rows.to(side.device) for name, rows in batch.items()})
    side.optimizer.zero_grad()
    loss.backward()
    side.optimizer.step()
    return loss.detach()


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


# -- memory ------------------------------------------------------------------------------------------------------------


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
    command = [sys.executable, __file__, "--peak-of", name, "--size", options.size, "--users", str(options.users)]
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


# -- growth ------------------------------------------------------------------------------------------------------------


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
