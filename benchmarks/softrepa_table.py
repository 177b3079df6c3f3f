"""Do soft tokens that learn by contrast align samples with captions better? Base, control and SoftREPA on captioned digits.

    python benchmarks/softrepa_table.py --out runs/softrepa-table           # 3 bases, 9 token runs
    python benchmarks/softrepa_table.py --report --out runs/softrepa-table  # Markdown, and docs/results/softrepa.png

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

Each finished run is a line of ``<out>/results.jsonl``, and a rerun skips it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy import stats
from zoo.lightning_modules.flow_matching import FlowMatching
from zoo.lightning_modules.softrepa import SoftREPA

from zoo import registry
from zoo.captioned_batch import read_captioned
from zoo.cli import main as zoo_command
from zoo.data import DigitsCaptionsDataModule
from zoo.denoisers import denoising_errors
from zoo.prompted_samples import PromptedSamples

BASE, JUDGE = "flow_matching-digits", "./runs/nd-digits-teacher"
ARMS = ("base", "denoising", "softrepa", "softrepa, median")
GUIDANCE = (1.0, 3.0)
LENGTH, TOKENS, BLOCKS, BATCH = 12, 4, [0, 1], 16
FIGURE = Path("docs/results/softrepa.png")
METRICS = {
    "alignment, no guidance (%)": ("1.0", "alignment", 100), "alignment, guidance 3 (%)": ("3.0", "alignment", 100),
    "Fréchet distance, no guidance": ("1.0", "frechet", 1), "Fréchet distance, guidance 3": ("3.0", "frechet", 1),
    "own error x 1000": ("1.0", "positive_error", 1000), "margin x 1000": ("1.0", "margin", 1000),
    "own caption first (%)": ("1.0", "rank1", 100), "pairs with a gradient (%)": ("1.0", "live_pairs", 100),
}  # fmt: skip


def data(seed: int, batch: int = BATCH) -> DigitsCaptionsDataModule:
    return DigitsCaptionsDataModule(batch_size=batch, context_length=LENGTH, seed=seed)


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **options,
    )  # fmt: skip


def trained_base(seed: int, out: Path) -> Path:
    """Train the base of a seed by its recipe, unless it is there."""
    folder = out / f"base-{seed}"
    if not (folder / "config.json").exists():
        recipe = yaml.safe_load(registry.recipe_path(BASE).read_text())
        L.seed_everything(seed, verbose=False)
        model = FlowMatching(**recipe["model"]["init_args"])
        kept = {name: recipe["trainer"][name] for name in ("max_epochs", "gradient_clip_val")}
        images = DigitsCaptionsDataModule(**recipe["data"]["init_args"], seed=seed)
        trainer(enable_checkpointing=False, limit_val_batches=0, **kept).fit(model, images)
        model.save_pretrained(folder)
    return folder


def tokens(seed: int, arm: str, out: Path, epochs: int) -> tuple[SoftREPA, dict[str, Any]]:
    """Train the tokens of an arm, and return the epoch that validation chose."""
    L.seed_everything(seed, verbose=False)
    base = str(trained_base(seed, out).resolve())
    temperature = median_error(base) if arm.endswith("median") else 0.07
    model = SoftREPA(
        base, tokens=TOKENS, blocks=BLOCKS, mask_equal="labels", temperature=temperature, classifier=JUDGE,
        objective="denoising" if arm == "denoising" else "softrepa", val_samples=179, sample_steps=20,
    )  # fmt: skip
    facts: dict[str, Any] = {"temperature": temperature, "parameters": sum(p.numel() for p in model.bank.parameters())}
    if arm == "base":
        return model, facts
    folder = out / f"tokens-{seed}-{arm.replace(', ', '-')}"
    best = ModelCheckpoint(folder, monitor="val/alignment", mode="max", save_weights_only=True)
    trainer(max_epochs=epochs, callbacks=[best]).fit(model, data(seed))
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])
    return model, {**facts, "step": checkpoint["global_step"]}


@torch.no_grad()
def median_error(base: str) -> float:
    """Return the median own error of the base over validation images and ten even times."""
    network = SoftREPA(base, tokens=1, blocks=[0]).backbone.network
    found = []
    for number, batch in enumerate(data(0, 179).val_dataloader()):
        given = read_captioned(batch, network, mask_equal="none")
        noise = torch.randn(given.clean.shape, generator=torch.Generator().manual_seed(number))
        for timestep in range(50, 1000, 100):
            time_ = torch.tensor(float(timestep))
            found.append(
                denoising_errors(network.process, network.denoiser, given.clean, noise, time_, given.condition)
            )
    return float(torch.cat(found).median())


def tested(model: SoftREPA, arm: str, guidance: float) -> dict[str, float]:
    """Test with one guidance. The base is the same model with its tokens off."""
    model.sample_options["guidance"] = guidance
    model.samples = PromptedSamples(model.frozen_towers["classifier"], 360)
    model.evaluation = model.samples.evaluation
    runner = trainer()
    if arm == "base":
        # Tokens that are never attached: the errors and the samples are the network's own.
        model.setup = lambda stage: None  # type: ignore[method-assign]  # noqa: ARG005 - Lightning names it
        model.sample = lambda text, seed=0: plain(model, text, seed)  # type: ignore[method-assign, assignment]
    (found,) = runner.test(model, data(0), verbose=False)
    return {name.partition("/")[2]: value for name, value in found.items()}


def plain(model: SoftREPA, text: Any, seed: int) -> torch.Tensor:
    from zoo.generation_evaluation import sample_prompts

    return sample_prompts(model.backbone.network, text, seed=seed, **model.sample_options)


def run(seed: int, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    start = time.process_time()
    model, facts = tokens(seed, arm, options.out, options.epochs)
    metrics = {str(guidance): tested(model, arm, guidance) for guidance in GUIDANCE}
    return {"seed": seed, "arm": arm, **facts, "seconds": round(time.process_time() - start, 1), "metrics": metrics}


# -- the report --------------------------------------------------------------------------------------------------------


def values(rows: list[dict[str, Any]], arm: str, metric: str) -> dict[int, float]:
    guidance, name, factor = METRICS[metric]
    return {row["seed"]: factor * row["metrics"][guidance][name] for row in rows if row["arm"] == arm}


def difference(ours: dict[int, float], control: dict[int, float]) -> str:
    """Return the mean difference paired by seed, with its 95 % interval."""
    paired = [ours[seed] - control[seed] for seed in sorted(ours.keys() & control.keys())]
    if len(paired) < 2:
        return "-"
    mean = statistics.mean(paired)
    half = stats.t.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / len(paired) ** 0.5
    return f"{mean:+.2f} ({mean - half:+.2f} … {mean + half:+.2f})"


def report(rows: list[dict[str, Any]]) -> None:
    """Print one table, and draw alignment, distance and margin."""
    seeds = {row["seed"] for row in rows}
    print(f"{len(seeds)} seeds; torch {torch.__version__}, one thread; means ± standard deviations\n")
    print(f"| | {' | '.join(ARMS)} | softrepa, median - denoising |")
    print("|---" * (len(ARMS) + 2) + "|")
    for metric in METRICS:
        cells = {arm: values(rows, arm, metric) for arm in ARMS}
        shown = [
            f"{statistics.mean(v.values()):.2f} ± {statistics.stdev(v.values()):.2f}" if len(v) > 1 else "-"
            for v in cells.values()
        ]
        print(f"| {metric} | {' | '.join(shown)} | {difference(cells['softrepa, median'], cells['denoising'])} |")
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
    if not Path(JUDGE, "config.json").exists() and zoo_command(["fit", "--config", "nd-digits-teacher"]) != 0:
        raise SystemExit("the classifier could not be trained")
    done = {(row["seed"], row["arm"]) for row in rows}
    seeds = range(options.seeds) if options.only is None else [options.only]
    wanted = [(seed, arm) for seed in seeds for arm in ARMS if (seed, arm) not in done]
    for seed, arm in wanted[: options.limit]:
        row = run(seed, arm, options)
        print(json.dumps(row), flush=True)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
