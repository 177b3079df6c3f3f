"""Does NormGrad show what the class depends on? It and its relatives by layer, with controls, over several seeds.

    python benchmarks/normgrad_table.py --out runs/normgrad-table            # trains, measures: an hour of one core
    python benchmarks/normgrad_table.py --report --out runs/normgrad-table   # Markdown, and docs/results/normgrad*.png

Two classifiers a seed, ResNet-8 both: of a subset of CIFAR-10, and of canvases of 48 x 48 pixels with 2 to 4 of
scikit-learn's digits, ten labels that may be there or not. Measured at the end of each of the three stages and with the
three combined (geometric mean):

    sensitivity    correlation between the maps of the most and the least likely class (CIFAR-10); lower is better
    randomization  correlation with the map of a network whose head, or all of it, is random (CIFAR-10); near 0 is right
    curves         areas under insertion (higher is better) and deletion (lower), class as predicted (CIFAR-10)
    pointing       the most salient pixel lies in the box of the digit that is explained (canvases); higher is better

Controls: a random map (curves, pointing), the centre and the brightest pixel (pointing), and the same network untrained
(sensitivity, pointing). Nothing is tuned, no layer and no seed is chosen. Each finished measurement is a line of
``<out>/results.jsonl`` and each classifier a file beside it; a rerun does what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import normgrad_report
import torch
from nd_table_data import Batches
from normgrad_data import LAYERS, NETWORK, TEST_SEED, Canvases, cifar, compose, trained, untrained
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.combined_maps import combine_maps, resize_map
from zoo.errors import InputError
from zoo.metrics.saliency_curves import InsertionDeletion
from zoo.metrics.saliency_pointing import PointingGame, pointing_hits
from zoo.metrics.saliency_ranks import ClassSensitivity
from zoo.randomization import randomization_check
from zoo.saliency import layer_maps

METHODS = ("normgrad", "selective", "gradcam", "gradient", "linear")
META = ("normgrad + meta", "selective + meta")
META_LR = 0.0025
CONTROLS = ("centre", "random", "brightest")
COMBINED = "combined"
# The head first, then everything, stage by stage.
ORDER = ("fc", "layer3", "layer2", "layer1", "bn1", "conv1")
BATCH = 50
SETTINGS = (
    "cifar_samples", "test_samples", "cifar_epochs", "batch", "canvases", "canvas_epochs", "test_canvases", "images",
    "curve_images", "curve_steps",
)  # fmt: skip

Values = dict[str, dict[str, float]]
Key = tuple[str, str, str, int]


def log_probability(output: Tensor, targets: Tensor) -> Tensor:
    """Score of a label that may be there or not; the meta step then lowers its own cross-entropy, not that of a softmax."""
    return F.logsigmoid(output.gather(1, targets.unsqueeze(1)).squeeze(1))


def maps_of(
    model: nn.Module, images: Tensor, targets: Tensor, arm: str, *, multilabel: bool = False
) -> dict[str, Tensor]:
    """Return maps (B, 1, H, W) of the images' size by layer, and of all layers combined."""
    method, _, meta = arm.partition(" + ")
    options: dict[str, Any] = {"meta_lr": META_LR, "score": log_probability if multilabel else None} if meta else {}
    size = (images.shape[2], images.shape[3])
    parts: dict[str, list[Tensor]] = {}
    for some, classes in zip(images.split(BATCH), targets.split(BATCH), strict=True):
        found = layer_maps(model, some, classes, layers=LAYERS, method=method, **options)
        for name, one in found.maps.items():
            parts.setdefault(name, []).append(resize_map(one, size))
        parts.setdefault(COMBINED, []).append(combine_maps(list(found.maps.values()), size=size))
    return {name: torch.cat(some) for name, some in parts.items()}


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(some) for some in images.split(BATCH)])


class Measurements:
    """What is measured on one pair of classifiers."""

    def __init__(self, options: argparse.Namespace) -> None:
        data = cifar(options)
        self.images, _ = next(iter(Batches(data, "test", options.images)))
        self.curve_images = self.images[: options.curve_images]
        self.curve_steps = options.curve_steps
        self.canvases: Canvases = compose(options.test_canvases, "test", TEST_SEED)
        # One pair an image and class that is there.
        self.rows, self.digits = torch.nonzero(self.canvases.labels, as_tuple=True)

    def sensitivity(self, model: nn.Module, arm: str, _seed: int) -> Values:
        logits = logits_of(model, self.images)
        most, least = (maps_of(model, self.images, some, arm) for some in (logits.argmax(1), logits.argmin(1)))
        values: Values = {}
        for layer, maps in most.items():
            metric = ClassSensitivity()
            metric.update(maps, least[layer])
            values[layer] = {name: float(value) for name, value in metric.compute().items()}
        return values

    def randomization(self, model: nn.Module, arm: str, seed: int) -> Values:
        values: Values = {}
        for name, layers in {**{layer: (layer,) for layer in LAYERS}, COMBINED: LAYERS}.items():
            check = randomization_check(model, self.curve_images, layers=layers, method=arm, order=ORDER, seed=seed)
            values[name] = {step: float(rho) for step, rho in zip(ORDER, check.mean, strict=True)}
            values[name]["constant"] = float((~check.rho[0].isfinite()).sum())
        return values

    def curves(self, model: nn.Module, arm: str, seed: int) -> Values:
        targets = logits_of(model, self.curve_images).argmax(1)
        if arm == "random":
            maps = {"-": torch.rand(self.curve_images[:, :1].shape, generator=torch.Generator().manual_seed(seed))}
        else:
            maps = maps_of(model, self.curve_images, targets, arm)
        values: Values = {}
        for layer, one in maps.items():
            metric = InsertionDeletion(steps=self.curve_steps)
            metric.update(model, self.curve_images, one, targets)
            values[layer] = {name: float(value) for name, value in metric.compute().items()}
        return values

    def pointing(self, model: nn.Module, arm: str, seed: int) -> Values:
        images = self.canvases.images[self.rows]
        if arm in CONTROLS:
            maps = {"-": self._control(arm, images, seed)}
        else:
            maps = maps_of(model, images, self.digits, arm, multilabel=True)
        boxes = self.canvases.boxes[self.rows, self.digits]
        everywhere = [self.canvases.boxes[row][self.canvases.labels[row] > 0] for row in self.rows.tolist()]
        values: Values = {}
        for layer, one in maps.items():
            game = PointingGame(tolerance=0)
            game.update(one, boxes, self.digits)
            on_any = pointing_hits(one, everywhere, tolerance=0)
            values[layer] = {"right": float(game.compute()), "any": float(on_any.double().mean())}
        return values

    def _control(self, arm: str, images: Tensor, seed: int) -> Tensor:
        if arm == "random":
            return torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
        if arm == "brightest":
            return images
        centre = torch.zeros_like(images)
        centre[:, :, images.shape[2] // 2, images.shape[3] // 2] = 1.0
        return centre


def plan(seeds: int) -> list[Key]:
    """All measurements, seed by seed, so that a table that is stopped early is even."""
    keys: list[Key] = []
    for seed in range(seeds):
        keys += [("pointing", "trained", arm, seed) for arm in (*CONTROLS, *METHODS, *META)]
        keys += [("pointing", "untrained", arm, seed) for arm in METHODS]
        keys += [("sensitivity", "trained", arm, seed) for arm in (*METHODS, *META)]
        keys += [("sensitivity", "untrained", arm, seed) for arm in METHODS]
        keys += [("randomization", "trained", arm, seed) for arm in METHODS]
        keys += [("curves", "trained", arm, seed) for arm in ("random", *METHODS)]
    return keys


def open_table(options: argparse.Namespace) -> set[Key]:
    """Return the finished measurements of the table, and refuse one that was begun with other settings."""
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"network": NETWORK, **{name: getattr(options, name) for name in SETTINGS}}
    path = options.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise InputError(f"{options.out} holds a table with other settings, {path.read_text()}: give another --out")
    path.write_text(json.dumps(settings))
    return {normgrad_report.key_of(row) for row in normgrad_report.read(options.out)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/normgrad-table"))
    parser.add_argument("--report", action="store_true", help="print the tables of --out as Markdown and draw them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=None, help="stop after so many new measurements")
    parser.add_argument("--path", default="../shared/data", help="folder of CIFAR-10's parquet files")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cifar-samples", type=int, default=10000, help="training images, a stratified subset")
    parser.add_argument("--test-samples", type=int, default=1000, help="test images, a stratified subset")
    parser.add_argument("--cifar-epochs", type=int, default=15)
    parser.add_argument("--canvases", type=int, default=12000, help="training canvases")
    parser.add_argument("--canvas-epochs", type=int, default=4)
    parser.add_argument("--test-canvases", type=int, default=300)
    parser.add_argument("--images", type=int, default=200, help="test images for the sensitivity")
    parser.add_argument("--curve-images", type=int, default=100, help="of them, for randomisation and curves")
    parser.add_argument("--curve-steps", type=int, default=16)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.report:
        print(normgrad_report.markdown(options.out))
        normgrad_report.draw(options, maps_of)
        return
    done = open_table(options)
    measurements = Measurements(options)
    for part, weights, arm, seed in [key for key in plan(options.seeds) if key not in done][: options.limit]:
        kind = "canvases" if part == "pointing" else "cifar"
        model = trained(kind, options, seed) if weights == "trained" else untrained(kind, seed)
        measure: Callable[[nn.Module, str, int], Values] = getattr(measurements, part)
        start = time.process_time()
        values = measure(model, arm, seed)
        spent = round(time.process_time() - start, 1)
        row = {"part": part, "weights": weights, "arm": arm, "seed": seed, "cpu_seconds": spent, "values": values}
        print(part, weights, arm, seed, f"{spent} s", flush=True)
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
