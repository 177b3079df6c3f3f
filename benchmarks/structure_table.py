"""Does keeping neighbourhoods help with few pairs? STRUCTURE with and without its regulariser, on captioned digits.

    python benchmarks/structure_table.py --out runs/structure-table           # 72 runs
    python benchmarks/structure_table.py --report --out runs/structure-table  # Markdown, and docs/results/structure.png

Both towers are frozen: the student of ``nd-digits``, and the text tower of ``cwcl-digits`` (each is trained first if it
is not there). n images with one caption each are what the heads and the choice of layers see. Compared are a weight of
0 (the control) against 10, and the last blocks against those chosen by mutual kNN, with the same heads, steps, schedule
and seeds; a seed sets the initial heads and the order, the n images are the same for all. The step with the lowest
contrastive loss on the validation split (179 images, the same for every arm) is tested, as the paper stops early: at a
fixed number of steps a control with few pairs is overtrained, and the regulariser looks better than it is. Each
finished run is a line of ``<out>/results.jsonl``, and a rerun skips it.

The text tower of ``cwcl-digits`` has learned from this image tower, on all training images: the two are no strangers,
and few pairs go far. "No gain" is an outcome that was expected before the runs: a third party found at most 1 point.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from table_report import add_run, difference, open_runs, prepare_torch, require_runs, spread
from zoo.lightning_modules.structure import StructureAlignment

from zoo.data import DigitsCaptionsDataModule

PAIRS = (50, 100, 250, 500, 1000, None)
WEIGHTS = (0.0, 10.0)
LAYERS = ("last", "select")
TOWERS = ("nd-digits", "cwcl-digits")
BATCH = 256
METRICS = {
    "zero-shot, seen wording": ("seen", "test/zero_shot/seen"),
    "zero-shot, unseen wording": ("seen", "test/zero_shot/unseen"),
    "image to text R@10, seen": ("seen", "test/retrieval/image_to_text/r10"),
    "text to image R@10, seen": ("seen", "test/retrieval/text_to_image/r10"),
    "image to text R@10, unseen": ("unseen", "test/retrieval/image_to_text/r10"),
    "text to image R@10, unseen": ("unseen", "test/retrieval/text_to_image/r10"),
}
COLOURS = {"last": "#56b4e9", "select": "#d55e00"}  # Okabe and Ito
FIGURE = Path("docs/results/structure.png")

Key = tuple[int | None, str, float, int]


class Pairs(DigitsCaptionsDataModule):
    """The digits without prompts: while the heads train, the validation loss is all that is asked for."""

    def zero_shot_prompts(self) -> dict[str, list[list[str]]]:
        return {}


def run(pairs: int | None, layers: Any, weight: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train the heads once and return their test metrics under both wordings."""
    L.seed_everything(seed, verbose=False)
    model = StructureAlignment(
        *(f"./runs/{name}" for name in TOWERS), layer_choice=layers, structure_weight=weight,
        warmup_steps=options.steps // 5, schedule="cosine", lr=options.lr,
        layer_cache=str(options.out / "cache" / f"{pairs or 'all'}-{layers}"),
    )  # fmt: skip
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val/base_loss", mode="min", save_weights_only=True)
        # A validation pass costs as much as many steps of the heads.
        every = 10 if pairs is not None and pairs <= BATCH else 3
        trainer = L.Trainer(
            max_steps=options.steps, max_epochs=-1, accelerator="cpu", logger=False, callbacks=[best],
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=every,
        )  # fmt: skip
        trainer.fit(model, Pairs(train_samples=pairs, batch_size=BATCH, seed=seed))
        checkpoint = torch.load(best.best_model_path, weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
    seconds = time.process_time() - start
    metrics = {}
    for wording in ("seen", "unseen"):
        (metrics[wording],) = trainer.test(
            model, DigitsCaptionsDataModule(batch_size=BATCH, eval_wording=wording), verbose=False
        )
    return {
        "pairs": pairs, "layers": layers, "weight": weight, "seed": seed, "seconds": round(seconds, 1),
        "step": checkpoint["global_step"], "chosen": [model.layers["image"], model.layers["text"]],
        "metrics": metrics,
    }  # fmt: skip


def key_of(row: dict[str, Any]) -> Key:
    return row["pairs"], row["layers"], row["weight"], row["seed"]


def values(
    by: dict[Key, dict[str, Any]], pairs: int | None, layers: str, weight: float, metric: str
) -> dict[int, float]:
    """Return per cent by seed."""
    wording, name = METRICS[metric]
    return {
        seed: 100 * row["metrics"][wording][name]
        for (n, kind, given, seed), row in by.items()
        if (n, kind, given) == (pairs, layers, weight)
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Print a table for each metric, in per cent, and draw the first two over n."""
    by = {key_of(row): row for row in rows}
    print(
        f"{len({row['seed'] for row in rows})} seeds; torch {torch.__version__}, one thread; means ± standard deviations"
    )
    for metric in METRICS:
        print(f"\n{metric}\n")
        print(
            "| pairs | last, λ=0 | last, λ=10 | selected, λ=0 | selected, λ=10 | 10 - 0, selected | selected - last, λ=10 |"
        )
        print("|---|---|---|---|---|---|---|")
        for pairs in PAIRS:
            cells = {(k, w): values(by, pairs, k, w, metric) for k in LAYERS for w in WEIGHTS}
            if not all(cells.values()):
                continue
            shown = [spread(v.values(), 1) for v in cells.values()]
            ends = [
                difference(cells["select", 10.0], cells["select", 0.0], 1),
                difference(cells["select", 10.0], cells["last", 10.0], 1),
            ]
            print(f"| {pairs or 'all'} | {' | '.join([*shown, *ends])} |")
    print("\n| pairs | selected image layer | selected text layer |\n|---|---|---|")
    for pairs in PAIRS:
        chosen = sorted({tuple(row["chosen"]) for row in rows if row["pairs"] == pairs and row["layers"] == "select"})
        for image, text in chosen:
            print(f"| {pairs or 'all'} | {image} | {text} |")
    draw(by)


def label_of(kind: str, weight: float) -> str:
    return f"{'selected' if kind == 'select' else 'last'} layers, λ = {weight:g}"


def draw(by: dict[Key, dict[str, Any]]) -> None:
    """Draw accuracy over the number of pairs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, metric in enumerate(list(METRICS)[:2], start=1):
        axes = figure.add_subplot(1, 2, place)
        for kind in LAYERS:
            for weight in WEIGHTS:
                found = [(i, list(values(by, n, kind, weight, metric).values())) for i, n in enumerate(PAIRS)]
                points = [(i, statistics.mean(v), statistics.stdev(v)) for i, v in found if v]
                if points:
                    axes.errorbar(
                        *zip(*points, strict=True), color=COLOURS[kind], linestyle="-" if weight else "--", marker="o",
                        markersize=3, capsize=2,
                    )  # fmt: skip
        axes.set_xticks(range(len(PAIRS)), [str(n or "all") for n in PAIRS])
        axes.set_xlabel("pairs")
        axes.set_ylabel("top-1 accuracy (%)")
        axes.set_title(metric, fontsize=10)
        axes.grid(alpha=0.3)
    # A line as short as those of a legend is hidden by its marker and bars, dashes and all.
    handles = [
        Line2D([], [], color=COLOURS[kind], linestyle="-" if weight else "--", label=label_of(kind, weight))
        for kind in LAYERS
        for weight in WEIGHTS
    ]
    axes.legend(handles=handles, fontsize=7, handlelength=3.5)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=120, facecolor="white", metadata={"Software": None})
    print(f"\n{FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/structure-table"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, default=None, help="stop after so many new runs")
    parser.add_argument("--pairs", type=int, nargs="*", help="these numbers of pairs only, 0 for all")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    prepare_torch()
    rows = open_runs(options.out)
    if options.report:
        report(rows)
        return
    require_runs(*TOWERS)
    done = {key_of(row) for row in rows}
    sizes = PAIRS if options.pairs is None else [n or None for n in options.pairs]
    wanted = [(n, k, w, s) for s in range(options.seeds) for n in sizes for k in LAYERS for w in WEIGHTS]
    for pairs, layers, weight, seed in [each for each in wanted if each not in done][: options.limit]:
        row = run(pairs, layers, weight, seed, options)
        print(json.dumps({name: value for name, value in row.items() if name != "metrics"}), flush=True)
        add_run(options.out, row)


if __name__ == "__main__":
    main()
