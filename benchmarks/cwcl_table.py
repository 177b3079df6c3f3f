"""Does weighting help? CWCL against CLIP with the same towers, data, order, scale and schedule, over several seeds.

    python benchmarks/cwcl_table.py --out runs/cwcl-table          # captioned digits, about 20 minutes of one core
    python benchmarks/cwcl_table.py --report --out runs/cwcl-table # the table as Markdown

The image tower is the student of the recipe ``nd-digits``, frozen; it is trained first if ``runs/nd-digits`` is not there.
The text tower starts from scratch: a seed sets its initial weights, the order of the images and the captions that they get.
What is reported is the test split after the last epoch; nothing is chosen by it. Each finished run is a line of
``<out>/results.jsonl``, and a rerun skips it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from table_report import add_run, difference, open_runs, prepare_torch, require_runs, spread

import zoo
from zoo.data import DigitsCaptionsDataModule

# CWCL's paper has the affine kernel; the sharpened one is ours.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIP", {}),
    "CWCL": ("CWCL", {}),
    "CWCL, kernel exp": ("CWCL", {"kernel": "exp", "kernel_temperature": 0.1}),
}
ROWS = {
    "zero-shot, seen wording": ("seen", "test/zero_shot/seen", 100),
    "zero-shot, unseen wording": ("seen", "test/zero_shot/unseen", 100),
    "image to text R@10, seen": ("seen", "test/retrieval/image_to_text/r10", 100),
    "text to image R@10, seen": ("seen", "test/retrieval/text_to_image/r10", 100),
    "image to text R@10, unseen": ("unseen", "test/retrieval/image_to_text/r10", 100),
    "text to image R@10, unseen": ("unseen", "test/retrieval/text_to_image/r10", 100),
    "structure transfer, seen (Spearman)": ("seen", "test/structure", 1),
    "structure transfer, unseen": ("unseen", "test/structure", 1),
}


def run(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model and return its test metrics under both wordings."""
    L.seed_everything(seed, verbose=False)
    component, arguments = METHODS[method]
    model = getattr(zoo, component)("zoo/text_transformer", "./runs/nd-digits", lr=options.lr, **arguments)
    trainer = L.Trainer(
        max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(model, DigitsCaptionsDataModule(batch_size=options.batch, seed=seed))
    seconds = time.process_time() - start
    metrics = {}
    for wording in ("seen", "unseen"):
        data = DigitsCaptionsDataModule(batch_size=options.batch, eval_wording=wording)
        (metrics[wording],) = trainer.test(model, data, verbose=False)
    return {"method": method, "seed": seed, "seconds": round(seconds, 1), "metrics": metrics}


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table: mean ± standard deviation; difference from CLIP, paired by seed, with its 95 % interval."""
    by = {(row["method"], row["seed"]): row["metrics"] for row in rows}
    seeds = sorted({seed for _, seed in by if all((method, seed) in by for method in METHODS)})
    print(f"{len(seeds)} seeds; torch {torch.__version__}, one thread")
    print(f"\n| test metric | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}")
    for label, (wording, key, factor) in ROWS.items():
        digits = 1 if factor == 100 else 3
        values = {method: {seed: factor * by[method, seed][wording][key] for seed in seeds} for method in METHODS}
        cells = []
        for method, found in values.items():
            cell = spread(found.values(), digits)
            if method != "CLIP":
                cell += f"; {difference(found, values['CLIP'], digits)}"
            cells.append(cell)
        print(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/cwcl-table"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    prepare_torch()
    rows = open_runs(options.out)
    if not options.report:
        require_runs("nd-digits")
        done = {(row["method"], row["seed"]) for row in rows}
        for seed in range(options.seeds):
            for method in METHODS:
                if (method, seed) not in done:
                    rows.append(run(method, seed, options))
                    add_run(options.out, rows[-1])
    report(rows)


if __name__ == "__main__":
    main()
