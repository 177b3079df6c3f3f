"""Do soft tokens that learn by contrast align samples with captions better? Base, control and SoftREPA on captioned digits.

    python benchmarks/softrepa_table.py --out runs/softrepa-table           # 3 bases, 9 token runs
    python benchmarks/softrepa_table.py --report --out runs/softrepa-table  # Markdown, and docs/results/softrepa.png
    python benchmarks/softrepa_table.py --data cifar10 --folder FOLDER --device cuda --epochs 2 --out runs/softrepa-cifar10

The protocol was written down before the first run:

- A seed trains its own base (`flow_matching-digits`, all of its recipe), and then the arms on that frozen base, all with
  the same tokens, steps, optimizer, order of the data, times and noise: `denoising`, the control, whose loss is the mean
  error of the own captions; `softrepa` with the paper's temperature of 0.07; `softrepa, median`, with the median own error
  of the base on the validation split. 4 tokens in the first 2 of 4 blocks, batches of 16, captions of the same digit masked.
- Of each run, the epoch with the highest alignment on 179 validation captions is tested, the control's too.
- Tested are the 360 captions of the test split, from the same noise in all arms, without guidance and with a guidance of
  3: alignment, the share of samples that a classifier (`nd-digits-teacher`) takes for the digit that was asked for, and the
  Fréchet distance of its features to the 360 real images; and on those images, at five fixed times, the mean error under
  the own caption, the margin to captions of other digits, and how often the own caption has the smallest error.
- The outcome is the alignment without guidance, `softrepa, median` less `denoising`, paired by seed: the errors of such a
  base are around 0.5, and a temperature of 0.07 leaves few pairs a gradient (``val/live_pairs``). All arms are reported. "No
  gain" is expected: a toy study before found a larger margin and no established gain.

On CIFAR-10 (softrepa_data.py; meant for a GPU, not run yet) the captions name the class, the base is larger, and 500 and
2,000 images are sampled in validation and test.

Each finished run is a line of ``<out>/results.jsonl``, and a rerun skips it.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from softrepa_data import Setting, cifar10, digits
from table_report import add_run, difference, open_runs, prepare_torch, spread
from zoo.lightning_modules.flow_matching import FlowMatching
from zoo.lightning_modules.softrepa import SoftREPA

from zoo.captioned_batch import read_captioned
from zoo.cli import main as zoo_command
from zoo.denoisers import denoising_errors
from zoo.prompted_samples import PromptedSamples

ARMS = ("base", "denoising", "softrepa", "softrepa, median")
GUIDANCE = (1.0, 3.0)
TOKENS, BLOCKS, BATCH = 4, [0, 1], 16
FIGURE = Path("docs/results/softrepa.png")
METRICS = {
    "alignment, no guidance (%)": ("1.0", "alignment", 100), "alignment, guidance 3 (%)": ("3.0", "alignment", 100),
    "Fréchet distance, no guidance": ("1.0", "frechet", 1), "Fréchet distance, guidance 3": ("3.0", "frechet", 1),
    "own error x 1000": ("1.0", "positive_error", 1000), "margin x 1000": ("1.0", "margin", 1000),
    "own caption first (%)": ("1.0", "rank1", 100), "pairs with a gradient (%)": ("1.0", "live_pairs", 100),
}  # fmt: skip


def trainer(setting: Setting, **options: Any) -> L.Trainer:
    return L.Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **{**setting.trainer, **options},
    )  # fmt: skip


def trained_base(setting: Setting, seed: int, options: argparse.Namespace) -> Path:
    """Train the base of a seed, unless it is there."""
    folder: Path = options.out / f"base-{seed}"
    if not (folder / "config.json").exists():
        L.seed_everything(seed, verbose=False)
        model = FlowMatching(**setting.base)
        limits = {"limit_val_batches": 0, "limit_train_batches": options.batches}
        run = trainer(setting, enable_checkpointing=False, **limits, **setting.base_trainer)
        run.fit(model, setting.data(seed, setting.base_batch))
        model.save_pretrained(folder)
    return folder


def tokens(setting: Setting, seed: int, arm: str, options: argparse.Namespace) -> tuple[SoftREPA, dict[str, Any]]:
    """Train the tokens of an arm, and return the epoch that validation chose."""
    L.seed_everything(seed, verbose=False)
    base = str(trained_base(setting, seed, options).resolve())
    temperature = median_error(setting, base) if arm.endswith("median") else 0.07
    model = SoftREPA(
        base, tokens=TOKENS, blocks=BLOCKS, mask_equal="labels", temperature=temperature, classifier=setting.judge,
        objective="denoising" if arm == "denoising" else "softrepa", eval_samples=setting.samples[0], sample_steps=20,
    )  # fmt: skip
    facts: dict[str, Any] = {"temperature": temperature, "parameters": sum(p.numel() for p in model.bank.parameters())}
    if arm == "base":
        return model, facts
    folder = options.out / f"tokens-{seed}-{arm.replace(', ', '-')}"
    best = ModelCheckpoint(folder, monitor="val/alignment", mode="max", save_weights_only=True)
    limits = {"limit_train_batches": options.batches, "limit_val_batches": options.evaluated}
    run = trainer(setting, max_epochs=options.epochs, callbacks=[best], **limits)
    run.fit(model, setting.data(seed, BATCH))
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])
    return model, {**facts, "step": checkpoint["global_step"]}


@torch.no_grad()
def median_error(setting: Setting, base: str) -> float:
    """Return the median own error of the base over (at most 1,000) validation images and ten even times."""
    network = SoftREPA(base, tokens=1, blocks=[0]).backbone.network
    data, found = setting.data(0, 179), []
    data.setup("validate")
    for number, batch in enumerate(islice(data.val_dataloader(), 6)):
        given = read_captioned(batch, network, mask_equal="none")
        noise = torch.randn(given.clean.shape, generator=torch.Generator().manual_seed(number))
        for timestep in range(50, 1000, 100):
            time_ = torch.tensor(float(timestep))
            found.append(
                denoising_errors(network.process, network.denoiser, given.clean, noise, time_, given.condition)
            )
    return float(torch.cat(found).median())


def tested(setting: Setting, model: SoftREPA, arm: str, guidance: float, batches: int | None) -> dict[str, float]:
    """Test with one guidance. The base is the same model with its tokens off."""
    model.sample_options["guidance"] = guidance
    model.samples = PromptedSamples(model.frozen_towers["classifier"], setting.samples[1])
    model.evaluation = model.samples.evaluation
    if arm == "base":
        # Tokens that are never attached: the errors and the samples are the network's own.
        model.setup = lambda stage: None  # type: ignore[method-assign]  # noqa: ARG005 - Lightning names it
        model.sample = lambda text, seed=0: plain(model, text, seed)  # type: ignore[method-assign, assignment]
    run = trainer(setting, limit_test_batches=batches)
    (found,) = run.test(model, setting.data(0, BATCH), verbose=False)
    return {name.partition("/")[2]: value for name, value in found.items()}


def plain(model: SoftREPA, text: Any, seed: int) -> torch.Tensor:
    from zoo.generation_evaluation import sample_prompts

    return sample_prompts(model.backbone.network, text, seed=seed, **model.sample_options)


def run(setting: Setting, seed: int, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    start = time.process_time()
    model, facts = tokens(setting, seed, arm, options)
    metrics = {str(guidance): tested(setting, model, arm, guidance, options.evaluated) for guidance in GUIDANCE}
    return {"seed": seed, "arm": arm, **facts, "seconds": round(time.process_time() - start, 1), "metrics": metrics}


# -- the report --------------------------------------------------------------------------------------------------------


def values(rows: list[dict[str, Any]], arm: str, metric: str) -> dict[int, float]:
    guidance, name, factor = METRICS[metric]
    return {row["seed"]: factor * row["metrics"][guidance][name] for row in rows if row["arm"] == arm}


def report(rows: list[dict[str, Any]]) -> None:
    """Print one table, and draw alignment, distance and margin."""
    seeds = {row["seed"] for row in rows}
    print(f"{len(seeds)} seeds; torch {torch.__version__}, one thread; means ± standard deviations\n")
    print(f"| | {' | '.join(ARMS)} | softrepa, median - denoising |")
    print("|---" * (len(ARMS) + 2) + "|")
    for metric in METRICS:
        cells = {arm: values(rows, arm, metric) for arm in ARMS}
        shown = [spread(found.values(), 2) for found in cells.values()]
        print(f"| {metric} | {' | '.join(shown)} | {difference(cells['softrepa, median'], cells['denoising'], 2)} |")
    print("\n| seed | arm | temperature | tested step | seconds |\n|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["seed"], ARMS.index(row["arm"]))):
        print(
            f"| {row['seed']} | {row['arm']} | {row['temperature']:.3f} | {row.get('step', '-')} | {row['seconds']} |"
        )
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    shown = ("alignment, no guidance (%)", "Fréchet distance, no guidance", "margin x 1000")
    for place, metric in enumerate(shown, start=1):
        axes = figure.add_subplot(1, 3, place)
        for seed in sorted({row["seed"] for row in rows}):
            points = [(i, values(rows, arm, metric).get(seed)) for i, arm in enumerate(ARMS)]
            axes.plot(
                *zip(*[p for p in points if p[1] is not None], strict=True),
                marker="o",
                markersize=4,
                label=f"seed {seed}",
            )
        axes.set_xticks(range(len(ARMS)), [arm.replace(", ", ",\n") for arm in ARMS], fontsize=7)
        axes.set_title(metric, fontsize=9)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=120, facecolor="white", metadata={"Software": None})
    print(f"\n{FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/softrepa-table"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--only", type=int, default=None, help="this seed alone, to run seeds side by side")
    parser.add_argument("--limit", type=int, default=None, help="stop after so many new runs")
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--folder", type=Path, help="with cifar10-train.parquet and cifar10-test.parquet")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for CIFAR-10")
    parser.add_argument("--batches", type=int, default=None, help="training batches of an epoch, at most")
    parser.add_argument("--evaluated", type=int, default=None, help="validation and test batches, at most")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.data == "cifar10" and options.folder is None:
        parser.error("--data cifar10 needs --folder")
    prepare_torch()
    rows = open_runs(options.out)
    if options.report:
        report(rows)
        return
    setting = digits() if options.data == "digits" else cifar10(options.folder, options.device)
    if not Path(setting.judge, "config.json").exists():
        files = [f"--data.{split}={options.folder}/cifar10-{split}.parquet" for split in ("train", "test")]
        given = files if options.data == "cifar10" else []
        if zoo_command(["fit", "--config", setting.judge_recipe, *given]) != 0:
            raise SystemExit("the classifier could not be trained")
    done = {(row["seed"], row["arm"]) for row in rows}
    seeds = range(options.seeds) if options.only is None else [options.only]
    wanted = [(seed, arm) for seed in seeds for arm in ARMS if (seed, arm) not in done]
    for seed, arm in wanted[: options.limit]:
        row = run(setting, seed, arm, options)
        print(json.dumps(row), flush=True)
        add_run(options.out, row)


if __name__ == "__main__":
    main()
