"""Do calibration heads make a frozen encoder robust? Three objectives, two controls, attacks that know the head or do not.

    python benchmarks/advcal_table.py --out runs/advcal-table           # digits, 3 seeds: 24 runs of half a minute each
    python benchmarks/advcal_table.py --data cifar10 --folder FOLDER --out runs/advcal-table-cifar10
    python benchmarks/advcal_report.py --out runs/advcal-table          # Markdown, and docs/results/advcal.png

FOLDER holds CIFAR-10 as cifar10-train.parquet and cifar10-test.parquet; its encoder, a ResNet-8, is trained first.

Columns: no head; the same head trained on clean inputs (CE with noise of no size: what supervised probing gives); CE,
L2 and NCE, each with beta 0 and 0.1, and each trained on attacks of the bare encoder ("backbone", cached) and of
encoder and head ("full", with --adaptive), within the radius or a share of it (--train-radius). Rows: clean accuracy,
and right when clean and under every attack of a list (PGD on CE, APGD on CE and DLR, APGD on the embedding) within half
the radius and the radius, made through the bare encoder ("backbone") and through encoder and head ("full"). The radius
is the one within which the bare encoder falls to near 0. With two modalities also retrieval across them and agreement, as
the component logs them, within the radius. The test split; the last epoch, nothing is chosen. A seed sets the order, the
attacks and the samples that are attacked.

Each finished run is a line of ``<out>/results.jsonl``, and a rerun skips it. The expected finding, before the runs: gains
under "backbone" vanish under "full".
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from advcal_report import ATTACKS, key_of
from table_report import add_run, open_runs, prepare_torch, require_runs
from torch import Tensor, nn
from zoo.lightning_modules.advcal import AdversarialCalibration

import zoo
from zoo.attack_plan import AttackPlan, eps_label
from zoo.calibration_attacks import generator_of
from zoo.calibration_cross_modal import CrossModalMetric, ModalityView
from zoo.cli import main as zoo_command
from zoo.robustness import RobustnessTrial, undisturbed_networks

TOWERS = ("nd-digits", "cwcl-digits", "cwcl-digits-profile")
# Shares of the valid range: the radii at which the bare encoders of the digits fall to near 0.
RADII = {"image": 0.25, "profile": 0.05, "cifar10": 12 / 255}
ENCODER, ENCODER_EPOCHS, ENCODER_SAMPLES = "./runs/advcal-cifar10-resnet8", 5, 20_000
# Small, for a CPU: images of half their side, and the first of the test images.
CIFAR10_SIDE, CIFAR10_TEST = 16, 2_000
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # those of the recipe


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


def digits(seed: int, train_radius: float, train_steps: int, modalities: list[str]) -> Setting:
    recipe = zoo.registry.recipe_path("advcal-digits")
    import yaml

    given = yaml.safe_load(recipe.read_text())["model"]["init_args"]
    for name in ("eps", "step_size"):
        share = train_radius / (4 if name == "step_size" else 1)
        given[name] = {key: share * RADII[key] for key in modalities}
    for name in ("encoders", "templates", "valid_range"):
        given[name] = {key: given[name][key] for key in modalities}
    given["steps"] = train_steps
    return Setting("digits", zoo.DigitsModalitiesDataModule(batch_size=64, seed=seed), given)


def cifar10(folder: Path, seed: int, train_radius: float, train_steps: int, train_samples: int) -> Setting:
    """A ResNet-8 on CIFAR-10 with its class means as centres; the heads train on the first images of the file."""
    data = zoo.ParquetImagesDataModule(
        train=first_images(folder, "train", train_samples), test=first_images(folder, "test", CIFAR10_TEST),
        cache="decoded", image_size=CIFAR10_SIDE, val_share=0.0, batch_size=64, seed=seed, mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )  # fmt: skip
    bounds = tuple([(edge - m) / s for m, s in zip(CIFAR10_MEAN, CIFAR10_STD, strict=True)] for edge in (0.0, 1.0))
    radius = train_radius * RADII["cifar10"]
    return Setting(
        "cifar10", data,
        {
            "encoders": {"image": ENCODER}, "centres": class_means(ENCODER, data), "valid_range": {"image": bounds},
            "eps": radius, "step_size": radius / 4, "steps": train_steps,
        },
    )  # fmt: skip


def first_images(folder: Path, split: str, count: int) -> str:
    """A file with the first images of a split, whose order is random."""
    import pyarrow.parquet

    part = Path("runs") / f"cifar10-{split}-{count}.parquet"
    if not part.exists():
        whole = pyarrow.parquet.read_table(folder / f"cifar10-{split}.parquet")
        pyarrow.parquet.write_table(whole.slice(0, count), part)
    return str(part)


def train_encoder(folder: Path) -> bool:
    """Train the encoder of CIFAR-10; its card has the accuracy."""
    changes = {
        "model.student": "zoo/resnet8", "trainer.max_epochs": ENCODER_EPOCHS, "trainer.default_root_dir": ENCODER,
        "data.train": first_images(folder, "train", ENCODER_SAMPLES),
        "data.test": first_images(folder, "test", CIFAR10_TEST), "data.image_size": CIFAR10_SIDE,
        "data.train_transform": '{"crop_padding": 2, "hflip": 0.5}', "data.batch_size": 128, "optimizer.init_args.lr": 0.1,
        "lr_scheduler.init_args.milestones": [ENCODER_EPOCHS // 2, ENCODER_EPOCHS - 1],
    }  # fmt: skip
    given = [str(word) for name, value in changes.items() for word in (f"--{name}", value)]
    return zoo_command(["fit", "--config", "nd-cifar10-resnet56", *given]) == 0


@torch.no_grad()
def class_means(place: str, data: Any) -> list[list[float]]:
    """Unit mean of the unit embeddings of each class's training images: centres where there is no text tower."""
    tower = zoo.towers.create(place, frozen=True, embedding=True, modality="image")
    data.setup()
    sums = torch.zeros(data.num_classes, tower.dim)
    for images, labels in data.train_eval_dataloader():
        sums.index_add_(0, labels, nn.functional.normalize(tower.features(images), dim=1))
    return nn.functional.normalize(sums, dim=1).tolist()  # type: ignore[no-any-return]


def arms(*, adaptive: bool, objectives: list[str], betas: list[float]) -> list[tuple[str, str, float]]:
    """Column, what the attacks of training go through, and beta."""
    targets = ("backbone", "full") if adaptive else ("backbone",)
    heads = [(name, target, beta) for target in targets for name in objectives for beta in betas]
    return [*heads, ("clean-trained", "-", 0.0), ("none", "-", 0.0)]


def build(setting: Setting, arm: tuple[str, str, float], seed: int) -> AdversarialCalibration:
    column, target, beta = arm
    given = {**setting.arguments, "regulariser_weight": beta, "seed": seed}
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
    if len(setting.modalities) > 1:
        for name, values in across(model, setting, seed, options).items():
            metrics[name] |= values
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


def across(model: AdversarialCalibration, setting: Setting, seed: int, options: Any) -> dict[str, dict[str, float]]:
    """Return retrieval and agreement by the modality that is attacked within the radius, on the samples of `judge`."""
    metric, views = CrossModalMetric(setting.modalities), {}
    for place, name in enumerate(setting.modalities):
        x, labels = (value.to(model.device) for value in chosen(setting, name, seed, options.samples))
        attack = replace(model.attacks[name], eps=RADII[name])
        with torch.no_grad():
            clean = model.encode(name, x)
        attacked = attack.driven_away(
            x, clean, encode=partial(model.encode, name), steps=options.steps,
            generator=generator_of(x.device, (seed, place)),
        )  # fmt: skip
        classes, turned = (model.similarities(name, rows).argmax(1) for rows in (clean, attacked))
        views[name] = ModalityView(clean, attacked, classes, turned, labels)
    metric.update(views, paired=True)
    return {name: {key: value.item() for key, value in values.items()} for name, values in metric.compute().items()}


def chosen(setting: Setting, modality: str, seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """Test samples, drawn by the seed."""
    setting.data.setup()
    split = setting.data.splits.test
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(split), generator=generator)[:samples].tolist()
    batch = split.__getitems__(rows)
    return (batch[modality], batch["label"]) if isinstance(batch, dict) else (batch[0], batch[1])


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
    parser.add_argument("--train-steps", type=int, default=10, help="of each attack in training")
    parser.add_argument("--modalities", nargs="+", choices=("image", "profile"), default=["image", "profile"])
    parser.add_argument("--objectives", nargs="*", choices=("ce", "l2", "nce"), default=["ce", "l2", "nce"])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--folder", type=Path, help="with cifar10-train.parquet and cifar10-test.parquet")
    parser.add_argument("--train-samples", type=int, default=2000, help="of CIFAR-10, that the heads train on")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--limit", type=int, default=None, help="stop after so many new runs")
    options = parser.parse_args()
    if options.data == "cifar10" and options.folder is None:
        parser.error("--data cifar10 needs --folder")
    prepare_torch()
    rows = open_runs(options.out)
    prepare(options)
    done = {key_of(row) for row in rows}
    make = partial(
        digits, train_radius=options.train_radius, train_steps=options.train_steps, modalities=options.modalities
    )
    if options.data == "cifar10":
        make = partial(
            cifar10, options.folder, train_radius=options.train_radius, train_steps=options.train_steps,
            train_samples=options.train_samples,
        )  # fmt: skip
    columns = arms(adaptive=options.adaptive, objectives=options.objectives, betas=options.betas)
    wanted = [(options.data, *arm, seed) for arm in columns for seed in range(options.seeds)]
    for key in [each for each in wanted if each not in done][: options.limit]:
        row = run(make(seed=key[4]), key[1:4], key[4], options)
        print(json.dumps({name: value for name, value in row.items() if name != "radii"}), flush=True)
        add_run(options.out, row)


def prepare(options: argparse.Namespace) -> None:
    """Train the encoders that are missing."""
    if options.data == "cifar10":
        if not Path(ENCODER, "config.json").exists() and not train_encoder(options.folder):
            raise SystemExit("the encoder of CIFAR-10 could not be trained")
        return
    require_runs(*TOWERS)


if __name__ == "__main__":
    main()
