"""The results of `nd_table.py` as Markdown for docs/results/nd.md."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from zoo.demo import paired_difference
from zoo.errors import InputError

NAMES = {
    "teacher": "teacher",
    "alone": "student alone",
    "kd": "KD",
    "dkd": "DKD",
    "dist": "DIST",
    "review_kd": "ReviewKD",
}
Key = tuple[str, bool, int]


def label(method: str, with_nd: bool) -> str:
    return NAMES[method] + ("++" if with_nd else "")


def read(out: Path) -> dict[Key, dict[str, Any]]:
    """The finished runs by (method, with ND, seed)."""
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(run["method"], run["nd"], run["seed"]): run for run in map(json.loads, lines)}


def markdown(out: Path) -> str:
    runs = read(out)
    if not runs or not (out / "settings.json").exists():
        raise InputError(f"--out {out} holds no finished run; train first, without --report")
    settings = json.loads((out / "settings.json").read_text())
    return "\n\n".join([_heading(settings), _setting(settings), "\n".join(_rows(runs, settings)), _made(runs)])


def _short(name: str) -> str:
    return name.removeprefix("zoo/").replace("resnet", "ResNet-")


def _heading(settings: dict[str, Any]) -> str:
    data = "CIFAR-10 (JPEG copies)" if settings["data"] == "cifar10" else "scikit-learn's digits"
    return f"## {data}, {_short(settings['teacher'])} → {_short(settings['student'])}"


def _setting(settings: dict[str, Any]) -> str:
    train, test = (settings[name] or "all" for name in ("train_samples", "test_samples"))
    text = (
        f"Training images: {train}, test images: {test}{' (stratified subsets)' if settings['train_samples'] else ''}. "
        f"Teacher {settings['teacher_epochs']} epochs, students {settings['epochs']} epochs, batch {settings['batch']}, SGD "
        f"with Nesterov momentum (lr {settings['lr']}, divided by 10 at 62.5, 75 and 87.5 % of the epochs, weight decay "
        f"5e-4), {settings['precision']}, temperature 4, ramp of the base term over {settings['warmup_epochs']} epoch(s). "
        "The weights are the paper's for ResNet-56 → ResNet-20 on CIFAR-100, not tuned here. Each method with ND and its "
        "control, `nd_weight 0`, share initial weights, order of the data, augmentation and every other setting. Accuracy "
        "is that on the test images after the last epoch: no epoch was chosen. The teacher is one seed."
    )
    if settings["data"] == "cifar10":
        text += (
            " The CIFAR-10 images at hand are JPEG copies of the originals, slightly lossy, so these figures are not "
            "exactly comparable with published ones."
        )
    return text


def _rows(runs: dict[Key, dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    rows = [
        "| method | weight of ND | seeds | test accuracy, % | minus its control, points (95 % interval of the mean) |",
        "|---|---|---|---|---|",
    ]
    for method in NAMES:
        for with_nd in (False, True):
            found = {seed: run["accuracy"] for (name, nd, seed), run in runs.items() if (name, nd) == (method, with_nd)}
            if not found:
                continue
            weight, difference = "", ""
            if method not in {"teacher", "alone"}:
                weight = f"{settings['bases'][method][1]:g}" if with_nd else "0"
            if with_nd:
                control = {
                    seed: run["accuracy"] for (name, nd, seed), run in runs.items() if (name, nd) == (method, False)
                }
                difference = _difference(control, found)
            rows.append(
                f"| {label(method, with_nd)} | {weight} | {len(found)} | {_spread(list(found.values()))} | {difference} |"
            )
    return rows


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _difference(control: dict[int, float], method: dict[int, float]) -> str:
    seeds = sorted(control.keys() & method.keys())
    if len(seeds) < 2:
        return f"{method[seeds[0]] - control[seeds[0]]:+.2f} (one seed: no interval)" if seeds else "control missing"
    mean, sd, low, high = paired_difference([control[seed] for seed in seeds], [method[seed] for seed in seeds])
    verdict = "ND helped" if low > 0 else "ND hurt" if high < 0 else "no difference shown"
    return f"{mean:+.2f} ± {sd:.2f} ({low:+.2f} … {high:+.2f}): {verdict}"


def _made(runs: dict[Key, dict[str, Any]]) -> str:
    def distinct(name: str) -> str:
        return ", ".join(sorted({str(run[name]) for run in runs.values()}))

    wall, processor = (sum(run[name] for run in runs.values()) / 60 for name in ("seconds", "processor_seconds"))
    commands = "\n".join(sorted({run["command"] for run in runs.values()}))
    return (
        "Mean ± standard deviation over seeds; differences are paired by seed, with the interval of the t distribution. "
        f"Several intervals are read here at once, none of them corrected for that. Machine: {distinct('machine')}; torch "
        f"{distinct('torch')}, lightning {distinct('lightning')}; {len(runs)} runs, together {wall:.0f} minutes and "
        f"{processor:.0f} of processor time.\n\n"
        f"```bash\n{commands}\n```"
    )
