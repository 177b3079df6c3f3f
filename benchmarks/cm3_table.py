"""Does CM3 find what its controls do not? On made-up interactions whose structure is known, over several seeds.

    python benchmarks/cm3_table.py                # 27 runs, 7 minutes of one core
    python benchmarks/cm3_table.py --report       # Markdown, and docs/results/cm3.png
    python benchmarks/cm3_table.py --choose       # how the recipes were chosen: validation of another set
    python benchmarks/cm3_table.py --quick        # everything for two epochs, in runs/cm3-table-quick

A seed is another set, split, initialisation and order of training; the arms of a seed have them in common. All options come
from the recipes ``cm3-synthetic`` and ``cm3_baselines-synthetic``, but for those that make the arm. The epoch with the best
recall@20 on validation is tested, for every arm. Compared with CM3:

    popularity, LightGCN          no features
    detached                      the calibration leaves the fused features alone
    not calibrated                plain uniformity
    shuffled                      each item has the features of another: differs in what they tell alone
    one, two, three modalities    of a set with three, each of which shows other factors
    new items                     a set whose cold items come by `add_items`, with their own features or those of another

and with what can be reached: the oracle that knows everything, and the best that could be learned if the contents of the
items were known (`cm3_data.reachable`). Each run is a file ``<out>/<arm>-<seed>.json``, and a rerun does what is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import cm3_report
import lightning as L
import torch
import yaml
from cm3_data import Catalogue, counts_of, measured_cold, permutation, ranked, reachable
from zoo.lightning_modules.cm3 import CM3
from zoo.lightning_modules.cm3_baselines import RecommenderBaseline

from zoo.errors import InputError

RECIPES = Path("zoo/recipes")
MODEL_KINDS = {"cm3-synthetic": CM3, "cm3_baselines-synthetic": RecommenderBaseline}
BEST = "val/recall@20"
# Neither a set nor a seed of the table.
CHOICE_SEED = 100
THREE = {"modalities": {"image": 64, "text": 32, "audio": 32}, "visible": 0.4}


class Arm(NamedTuple):
    """What makes an arm differ from its recipe."""

    recipe: str = "cm3-synthetic"
    data: Mapping[str, Any] = MappingProxyType({})
    model: Mapping[str, Any] = MappingProxyType({})


ARMS = {
    "lightgcn": Arm("cm3_baselines-synthetic"),
    "cm3": Arm(),
    "detached": Arm(model={"detach_similarity": True}),
    "plain": Arm(model={"min_similarity": 1.0, "max_similarity": 1.0}),
    "shuffled": Arm(data={"shuffled": True}),
    "one": Arm(data={**THREE, "keep": ["image"]}),
    "two": Arm(data={**THREE, "keep": ["image", "text"]}),
    "three": Arm(data=THREE),
    "new": Arm(data={"cold": 0.2, "without_cold": True}, model={"keep_features": True}),
}
CHOICES = {
    **{
        f"cm3, lr {lr}, gamma {gamma}": Arm(model={"lr": lr, "uniformity_weight": gamma})
        for lr in (0.001, 0.003)
        for gamma in (0.5, 0.9)
    },
    **{
        f"lightgcn, lr {lr}, weight_decay {decay}": Arm(
            "cm3_baselines-synthetic", model={"lr": lr, "weight_decay": decay}
        )
        for lr in (0.003, 0.01)
        for decay in (1e-4, 1e-2)
    },
}


class BestEpoch(L.Callback):
    """Keep the parameters of the best epoch in memory, and what was logged in each."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.state: dict[str, torch.Tensor] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        logged = {
            name: round(float(value), 6)
            for name, value in trainer.callback_metrics.items()
            if name == BEST or name[:4] == "cm3/"
        }
        if all(logged[BEST] > epoch[BEST] for epoch in self.history):
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.history.append({"epoch": trainer.current_epoch, **logged})


def recipe_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    return content


def trained(arm: Arm, seed: int, options: argparse.Namespace) -> tuple[Any, Catalogue, dict[str, Any]]:
    """Train one arm, and return its model at its best epoch, its data and what is known of the run."""
    recipe = recipe_of(arm.recipe)
    data = Catalogue(**{**recipe["data"]["init_args"], **arm.data, "data_seed": seed, "seed": seed})
    L.seed_everything(seed, verbose=False)
    model = MODEL_KINDS[arm.recipe](**{**recipe["model"]["init_args"], **arm.model})
    best = BestEpoch()
    given = recipe["trainer"]
    trainer = L.Trainer(
        max_epochs=2 if options.quick else given["max_epochs"], accelerator="cpu", logger=False, callbacks=[best],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        log_every_n_steps=given["log_every_n_steps"],
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(model, data)
    seconds = round(time.process_time() - start, 1)
    model.load_state_dict(best.state)
    (val,) = trainer.validate(model, data, verbose=False)
    chosen = max(best.history, key=lambda epoch: epoch[BEST])
    assert abs(val[BEST] - chosen[BEST]) < 1e-5
    return model.eval(), data, {"cpu_seconds": seconds, "best": chosen, "history": best.history}


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and measure it on the test split, by inner products and by cosines."""
    model, data, row = trained(ARMS[name], seed, options)
    users, items = model.embeddings()
    pairs = data.interactions
    for score in ("dot", "cosine"):
        row[score] = ranked(users, items, pairs["test"], pairs["train"], score=score)
    if name == "new":
        row.update(added(model, data))
    return row


def added(model: CM3, data: Catalogue) -> dict[str, Any]:
    """Add the cold items with their features, and with those of one another, and measure both."""
    cold = data.cold_items
    count = len(cold.item_ids)
    orders = {"own": torch.arange(count), "shuffled": permutation(count, data.data_seed)}
    row: dict[str, Any] = {"items": count, "all_items": count + data.num_items}
    for kind, order in orders.items():
        extended = copy.deepcopy(model)
        extended.add_items(cold.item_ids, {name: rows[order] for name, rows in cold.features.items()})
        users, items = extended.embeddings()
        for score in ("dot", "cosine"):
            row[f"{kind}, {score}"] = measured_cold(users, items, data, score=score)
    assert data.made is not None
    users, items = (torch.from_numpy(rows) for rows in data.made.oracle())
    is_cold = torch.from_numpy(data.made.cold)
    row["oracle"] = measured_cold(users, torch.cat([items[~is_cold], items[is_cold]]), data, score="dot")
    return row


def known(seed: int, split: str) -> dict[str, Any]:
    """Measure what needs no training."""
    data = Catalogue(data_seed=seed)
    return {"counts": counts_of(data), **reachable(data, split)}


def open_table(options: argparse.Namespace) -> None:
    """Refuse a table that was begun with other recipes."""
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: recipe_of(name) for name in MODEL_KINDS}
    path = options.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise InputError(f"{options.out} holds a table of other recipes: give another --out")
    path.write_text(json.dumps(settings))


def once(path: Path, make: Any) -> dict[str, Any]:
    """Return what the file holds, and make it first where it is not there."""
    if not path.exists():
        row = make()
        print(path.stem, {name: value for name, value in row.items() if name in ("cpu_seconds", "best")}, flush=True)
        path.with_suffix(".part").write_text(json.dumps(row))
        path.with_suffix(".part").rename(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def choose(options: argparse.Namespace) -> None:
    """Print the validation of every choice on the set that is not in the table."""
    folder = options.out.with_name(options.out.name + "-choice")
    folder.mkdir(parents=True, exist_ok=True)
    once(folder / "known.json", lambda: known(CHOICE_SEED, "val"))
    for name, arm in CHOICES.items():
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        best = once(path, lambda arm=arm: trained(arm, CHOICE_SEED, options)[2])["best"]  # type: ignore[misc]
        print(f"| {name} | {best[BEST]:.3f} | {best['epoch'] + 1} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; runs/cm3-table by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--limit", type=int, default=None, help="stop after so many new runs")
    parser.add_argument("--quick", action="store_true", help="two epochs, to see that all works")
    parser.add_argument("--choose", action="store_true", help="validation of the choices for the recipes")
    parser.add_argument("--report", action="store_true", help="print the tables of --out as Markdown and draw them")
    options = parser.parse_args()
    options.out = options.out or Path("runs/cm3-table-quick" if options.quick else "runs/cm3-table")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.report:
        print(cm3_report.markdown(options.out))
        cm3_report.draw(options.out)
        return
    if options.choose:
        choose(options)
        return
    open_table(options)
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.arms]
    missing = [key for key in wanted if not (options.out / f"{key[0]}-{key[1]}.json").exists()]
    for seed in range(options.seeds):
        once(options.out / f"known-{seed}.json", lambda seed=seed: known(seed, "test"))  # type: ignore[misc]
    for name, seed in missing[: options.limit]:
        once(options.out / f"{name}-{seed}.json", lambda name=name, seed=seed: run(name, seed, options))  # type: ignore[misc]


if __name__ == "__main__":
    main()
