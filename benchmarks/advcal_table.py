"""Do calibration heads make a frozen encoder robust? Three objectives, two controls, attacks that know the head or do not.

    python benchmarks/advcal_table.py --out runs/advcal-table           # digits, 3 seeds: 24 runs of a minute each
    python benchmarks/advcal_table.py --cifar10 ../shared/data --out runs/advcal-table   # and a ResNet-20 on CIFAR-10
    python benchmarks/advcal_table.py --report --out runs/advcal-table  # Markdown, and docs/results/advcal.png

Columns: no head; the same head trained on clean inputs (CE with noise of no size: what supervised probing gives); CE,
L2 and NCE, each with beta 0 and 0.1, and each trained on attacks of the bare encoder ("backbone", cached) and of
encoder and head ("full", with --adaptive), within the radius or a share of it (--train-radius). Rows: clean accuracy,
and right when clean and under every attack of a list (PGD on CE, APGD on CE and DLR, APGD on the embedding) within half
the radius and the radius, made through the bare encoder ("backbone") and through encoder and head ("full"). The radius
is the one within which the bare encoder falls to near 0. The test split; the last epoch, nothing is chosen. A seed sets
the order, the attacks and the samples that are attacked.

Each finished run is a line of ``<out>/results.jsonl``, and a rerun skips it. The expected finding, before the runs: gains
under "backbone" vanish under "full".
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from scipy import stats
from torch import Tensor, nn
from zoo.lightning_modules.advcal import AdversarialCalibration

import zoo
from zoo.attack_plan import AttackPlan, eps_label
from zoo.cli import main as zoo_command
from zoo.robustness import RobustnessTrial, undisturbed_networks

ATTACKS = ("pgd-ce", "apgd-ce", "apgd-dlr", "apgd-l2")
TOWERS = ("nd-digits", "cwcl-digits", "cwcl-digits-profile")
FIGURE = Path("docs/results/advcal.png")
COLOURS = {
    "none": "#000000",
    "clean-trained": "#999999",
    "ce": "#d55e00",
    "l2": "#0072b2",
    "nce": "#009e73",
}  # Okabe and Ito
# The radii at which the bare encoders fall from 97 % and more to near 0, shares of the valid range.
RADII = {"image": 0.25, "profile": 0.05, "cifar10": 4 / 255}

Key = tuple[str, str, str, float, int]


@dataclass(frozen=True)
class Setting:
    """A data set with its encoders.

    Attributes:
        name: of the data set.
        data: its data module.
        arguments: of the module.
    """

    name: str
    data: Any
    arguments: dict[str, Any]

    @property
    def modalities(self) -> list[str]:
        return list(self.arguments["encoders"])


def digits(seed: int, train_radius: float) -> Setting:
    recipe = zoo.registry.recipe_path("advcal-digits")
    import yaml

    given = yaml.safe_load(recipe.read_text())["model"]["init_args"]
    for name in ("eps", "step_size"):
        share = train_radius / (4 if name == "step_size" else 1)
        given[name] = {key: share * RADII[key] for key in given["encoders"]}
    return Setting("digits", zoo.DigitsModalitiesDataModule(batch_size=64, seed=seed), given)


def cifar10(folder: Path, seed: int, train_radius: float) -> Setting:
    """A ResNet-20 that `nd-cifar10-resnet56-resnet20` trained, with its class means as centres."""
    data = zoo.ParquetImagesDataModule(
        train=str(folder / "cifar10-train.parquet"), test=str(folder / "cifar10-test.parquet"), batch_size=256, seed=seed,
        train_samples=5000,
    )  # fmt: skip
    place = "./runs/nd-cifar10-resnet56-resnet20"
    mean, std = data.mean, data.std
    bounds = tuple([(edge - m) / s for m, s in zip(mean, std, strict=True)] for edge in (0.0, 1.0))
    radius = train_radius * RADII["cifar10"]
    return Setting(
        "cifar10", data,
        {
            "encoders": {"image": place}, "centers": class_means(place, data), "valid_range": {"image": bounds},
            "eps": radius, "step_size": radius / 4,
        },
    )  # fmt: skip


@torch.no_grad()
def class_means(place: str, data: Any) -> list[list[float]]:
    """Unit mean of the unit embeddings of each class's training images: centres where there is no text tower."""
    tower = zoo.towers.create(place, frozen=True, embedding=True, modality="image")
    data.setup()
    sums = torch.zeros(data.num_classes, tower.dim)
    for images, labels in data.train_eval_dataloader():
        sums.index_add_(0, labels, nn.functional.normalize(tower.features(images), dim=1))
    return nn.functional.normalize(sums, dim=1).tolist()  # type: ignore[no-any-return]


def arms(*, adaptive: bool) -> list[tuple[str, str, float]]:
    """Column, what the attacks of training go through, and beta."""
    targets = ("backbone", "full") if adaptive else ("backbone",)
    heads = [(name, target, beta) for target in targets for name in ("ce", "l2", "nce") for beta in (0.0, 0.1)]
    return [("none", "-", 0.0), ("clean-trained", "-", 0.0), *heads]


def build(setting: Setting, arm: tuple[str, str, float], seed: int) -> AdversarialCalibration:
    column, target, beta = arm
    given = {**setting.arguments, "beta": beta, "seed": seed}
    if column == "clean-trained":
        # CE with attacks of no size: the same head, steps, schedule and labels, on clean inputs.
        tiny = dict.fromkeys(setting.modalities, 1e-12)
        return AdversarialCalibration(**{**given, "objective": "ce", "eps": tiny, "step_size": tiny, "steps": 1})
    if column == "none":  # the head stays the identity
        return AdversarialCalibration(**{**given, "cache_attacks": False})
    return AdversarialCalibration(**{**given, "objective": column, "target": target})


def run(setting: Setting, arm: tuple[str, str, float], seed: int, options: Any) -> dict[str, Any]:
    """Train the heads once, and attack the test split."""
    L.seed_everything(seed, verbose=False)
    column, target, beta = arm
    model = build(setting, arm, seed)
    start = time.process_time()
    trainer = L.Trainer(
        max_epochs=options.epochs, accelerator=options.accelerator, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        gradient_clip_val=1.0, limit_train_batches=0 if column == "none" else 1.0,
    )  # fmt: skip
    trainer.fit(model, setting.data)
    seconds = time.process_time() - start
    metrics = {name: judge(model, setting, name, seed, options) for name in setting.modalities}
    return {
        "data": setting.name, "column": column, "target": target, "beta": beta, "seed": seed, "radii": dict(RADII),
        "seconds": round(seconds, 1), "share": model.trainable_share, "train_radius": options.train_radius,
        "samples": options.samples, "steps": options.steps,
        "metrics": metrics,
    }  # fmt: skip


def judge(model: AdversarialCalibration, setting: Setting, modality: str, seed: int, options: Any) -> dict[str, float]:
    """Return the rows of the table of one modality, shares in 0 … 1."""
    device = torch.device("cuda" if options.accelerator == "gpu" else "cpu")
    model.to(device).eval()
    x, labels = chosen(setting, modality, seed, options.samples)
    x, labels = x.to(device), labels.to(device)
    radius = RADII[modality if setting.name == "digits" else setting.name]
    plan = AttackPlan(
        (radius / 2, radius), ATTACKS, options.steps, valid_range=model.attacks[modality].bounds(x), micro_batch=256
    )
    trial = RobustnessTrial(
        partial(model.logits, modality), plan, embedding=partial(model.encode, modality),
        surrogate=partial(model.logits, modality, calibrated=False), surrogate_embedding=partial(model.embed, modality),
    )  # fmt: skip
    with undisturbed_networks(device):
        found = trial.verdicts(x, labels, generator=torch.Generator(device).manual_seed(seed))
    rows = {name: found[name].float().mean().item() for name in found}
    half, whole = eps_label(radius / 2), eps_label(radius)
    with torch.no_grad():
        drift = (model.encode(modality, x) - model.embed(modality, x)).square().sum(1).mean().item()
    return {
        "clean": rows["clean"], "drift": drift, "noise": rows[f"noise_{whole}"],
        "backbone/half": rows[f"transfer_{half}"], "backbone/whole": rows[f"transfer_{whole}"],
        "full/half": rows[f"adaptive_{half}"], "full/whole": rows[f"adaptive_{whole}"],
    }  # fmt: skip


def chosen(setting: Setting, modality: str, seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """Test samples, drawn by the seed."""
    setting.data.setup()
    split = setting.data.splits.test
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(split), generator=generator)[:samples].tolist()
    batch = split.__getitems__(rows)
    return (batch[modality], batch["label"]) if isinstance(batch, dict) else (batch[0], batch[1])


# -- report --------------------------------------------------------------------------------------------------------

ROWS = ("clean", "backbone/half", "backbone/whole", "full/half", "full/whole", "noise", "drift")


def key_of(row: dict[str, Any]) -> Key:
    return row["data"], row["column"], row["target"], row["beta"], row["seed"]


def column_name(column: str, target: str, beta: float) -> str:
    return column if target == "-" else f"{column}, β={beta:g}{'' if target == 'backbone' else ', full'}"


def cell(values: list[float], row: str) -> str:
    """Mean ± standard deviation: per cent, and the drift as it is."""
    scale, digits_ = (1, 4) if row == "drift" else (100, 1)
    spread = f" ± {scale * statistics.stdev(values):.{digits_}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits_}f}{spread}"


def difference(ours: dict[int, float], control: dict[int, float]) -> str:
    """Mean difference paired by seed, in points, with its 95 % interval."""
    paired = [100 * (ours[seed] - control[seed]) for seed in sorted(ours.keys() & control.keys())]
    if len(paired) < 2:
        return "-"
    mean = statistics.mean(paired)
    half = stats.t.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / len(paired) ** 0.5
    return f"{mean:+.1f} ({mean - half:+.1f} … {mean + half:+.1f})"


def report(rows: list[dict[str, Any]]) -> None:
    """Print a table for each data set and modality, and draw accuracy under both kinds of attack."""
    by = {key_of(row): row for row in rows}
    panels = []
    for data in sorted({row["data"] for row in rows}):
        ours = [row for row in rows if row["data"] == data]
        columns = sorted(
            {key_of(row)[1:4] for row in ours}, key=lambda c: (c[1] == "full", list(COLOURS).index(c[0]), c[2])
        )
        for modality in ours[0]["metrics"]:
            found = {
                c: {
                    row: {k[4]: v["metrics"][modality][row] for k, v in by.items() if k[:4] == (data, *c)}
                    for row in ROWS
                }
                for c in columns
            }
            panels.append((f"{data}, {modality}", found))
            radius = ours[0]["radii"][modality if data == "digits" else data]
            seeds = len({row["seed"] for row in ours})
            print(
                f"\n{data}, {modality}: radius {radius:.4g} of the valid range, {ours[0]['samples']} test samples, {seeds} "
                f"seeds, {ours[0]['steps']} steps of {', '.join(ATTACKS)}; heads {100 * ours[0]['share']:.1f} % of the "
                f"parameters\n\n| | {' | '.join(column_name(*c) for c in columns)} |\n|---|{'---|' * len(columns)}"
            )
            for row in ROWS:
                print(f"| {row} | {' | '.join(cell(list(found[c][row].values()), row) for c in columns)} |")
            if ("none", "-", 0.0) in found:
                for row in ("backbone/whole", "full/whole"):
                    ends = [difference(found[c][row], found["none", "-", 0.0][row]) for c in columns]
                    print(f"| {row}, less none | {' | '.join(ends)} |")
    draw(panels)


def draw(panels: list[tuple[str, dict[Any, Any]]]) -> None:
    """Draw, for each data set and modality, accuracy over the radius under both kinds of attack."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.0 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, found) in enumerate(panels):
        for side, kind in enumerate(("backbone", "full")):
            axes = figure.add_subplot(len(panels), 2, 2 * place + side + 1)
            for column, values in found.items():
                if column[2] == 0.1 or column[1] == "-":
                    series = [list(values[row].values()) for row in ("clean", f"{kind}/half", f"{kind}/whole")]
                    axes.errorbar(
                        [0, 0.5, 1], [100 * statistics.mean(v) for v in series],
                        [100 * statistics.stdev(v) if len(v) > 1 else 0.0 for v in series],
                        color=COLOURS[column[0]], linestyle=":" if column[1] == "full" else "-", marker="o", markersize=3,
                        capsize=2, label=column_name(*column),
                    )  # fmt: skip
            axes.set_ylim(-3, 103)
            axes.set_xlabel("radius, as a share of the largest")
            axes.set_ylabel("accuracy (%)")
            axes.set_title(f"{title}: {kind}", fontsize=10)
            axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=120, facecolor="white", metadata={"Software": None})
    print(f"\n{FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/advcal-table"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--train-radius", type=float, default=1.0, help="of the attacks in training, a share of the radius"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50, help="of each attack of the evaluation")
    parser.add_argument("--samples", type=int, default=359, help="test samples that are attacked, at most")
    parser.add_argument("--adaptive", action="store_true", help="also train on attacks through the head")
    parser.add_argument("--cifar10", type=Path, help="folder with cifar10-train.parquet and cifar10-test.parquet")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--limit", type=int, default=None, help="stop after so many new runs")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if options.report:
        report(rows)
        return
    towers = [*TOWERS, *(["nd-cifar10-resnet56-resnet20"] if options.cifar10 else [])]
    for tower in towers:
        if not Path("runs", tower, "config.json").exists() and zoo_command(["fit", "--config", tower]) != 0:
            raise SystemExit(f"the encoder {tower} could not be trained")
    done = {key_of(row) for row in rows}
    share = {"train_radius": options.train_radius}
    makers = [partial(digits, **share), *([partial(cifar10, options.cifar10, **share)] if options.cifar10 else [])]
    names = ["digits", "cifar10"]
    wanted = [
        (make, (name, *arm, seed))
        for seed in range(options.seeds)
        for name, make in zip(names, makers, strict=False)
        for arm in arms(adaptive=options.adaptive)
    ]
    for make, key in [each for each in wanted if each[1] not in done][: options.limit]:
        row = run(make(key[4]), key[1:4], key[4], options)
        print(json.dumps({name: value for name, value in row.items() if name != "radii"}), flush=True)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
