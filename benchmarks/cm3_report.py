"""The results of `cm3_table.py` as Markdown and a figure for docs/results/cm3.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import table_report
import torch

FIGURE = Path("docs/results/cm3.png")
NAMES = {
    "popularity": "popularity", "lightgcn": "LightGCN", "cm3": "CM3", "detached": "CM3, detached",
    "plain": "CM3, not calibrated", "shuffled": "CM3, shuffled features", "one": "image", "two": "image, text",
    "three": "image, text, audio", "learnable": "learnable, contents known", "oracle": "oracle",
}  # fmt: skip
MAIN = ("lightgcn", "cm3", "detached", "plain", "shuffled")
COLOURS = {"cm3": "#d55e00", "detached": "#0072b2"}  # Okabe and Ito

Row = dict[str, Any]
Numbers = dict[int, float]


def read(out: Path) -> dict[str, dict[int, Row]]:
    """Return the finished runs by arm and seed."""
    found: dict[str, dict[int, Row]] = {}
    for path in sorted(out.glob("*-*.json")):
        arm, _, seed = path.stem.rpartition("-")
        found.setdefault(arm, {})[int(seed)] = json.loads(path.read_text())
    return found


def numbers(rows: dict[str, dict[int, Row]], arm: str, *keys: str) -> Numbers:
    """Return one number a seed; popularity and what can be reached are in the file of the set."""
    if arm in ("popularity", "learnable", "oracle"):
        arm, keys = "known", (arm, *keys[1:])
    found = {}
    for seed, row in rows.get(arm, {}).items():
        value: Any = row
        for key in keys:
            value = value[key]
        found[seed] = float(value)
    return found


def spread(found: Numbers, decimals: int = 3) -> str:
    return table_report.spread(found.values(), decimals)


def difference(ours: Numbers, control: Numbers) -> str:
    return table_report.difference(ours, control, 3)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    shown = [f"| {' | '.join(row)} |" for row in (header, *lines)]
    return "\n".join([shown[0], "|---" * len(header) + "|", *shown[1:]])


def main_table(rows: dict[str, dict[int, Row]]) -> str:
    lines = []
    ours = numbers(rows, "cm3", "dot", "recall@20")
    for arm in ("popularity", *MAIN, "learnable", "oracle"):
        recall = numbers(rows, arm, "dot", "recall@20")
        trains = arm in MAIN
        epochs = {seed: value + 1 for seed, value in numbers(rows, arm, "best", "epoch").items()} if trains else {}
        lines.append(
            [
                NAMES[arm], spread(recall), spread(numbers(rows, arm, "dot", "ndcg@20")),
                spread(numbers(rows, arm, "cosine", "recall@20") if trains else {}),
                "" if arm == "cm3" else difference(ours, recall),
                spread(epochs, 0),
            ]
        )  # fmt: skip
    return table(["", "recall@20", "ndcg@20", "recall@20 by cosine", "CM3 less this, recall@20", "best epoch"], lines)


def similarity_table(rows: dict[str, dict[int, Row]]) -> str:
    lines = []
    for arm in ("cm3", "detached"):
        for place, when in ((0, "first"), (-1, "last")):
            last = {seed: row["history"][place] for seed, row in rows.get(arm, {}).items()}
            shown = [
                spread({seed: epoch[f"cm3/{name}"] for seed, epoch in last.items()})
                for name in ("similarity", "clipped_above")
            ]
            epochs = sorted({int(epoch["epoch"]) + 1 for epoch in last.values()})
            lines.append([NAMES[arm], f"{when}, {', '.join(map(str, epochs))}", *shown])
    return table(["", "evaluation, after epoch", "mean of s", "share of pairs above 0.8"], lines)


def modality_table(rows: dict[str, dict[int, Row]]) -> str:
    lines = []
    one = numbers(rows, "one", "dot", "recall@20")
    for arm in ("one", "two", "three"):
        recall = numbers(rows, arm, "dot", "recall@20")
        shown = spread(recall), spread(numbers(rows, arm, "dot", "ndcg@20"))
        lines.append([NAMES[arm], *shown, "" if arm == "one" else difference(recall, one)])
    pairs = difference(numbers(rows, "three", "dot", "recall@20"), numbers(rows, "two", "dot", "recall@20"))
    return table(["modalities", "recall@20", "ndcg@20", "less image alone, recall@20"], lines) + (
        f"\n\nThree less two: {pairs}."
    )


def new_table(rows: dict[str, dict[int, Row]]) -> str:
    lines = []
    kinds = {
        "own, cosine": "own features, cosine", "shuffled, cosine": "features of another, cosine",
        "own, dot": "own features, dot", "shuffled, dot": "features of another, dot", "oracle": "oracle",
    }  # fmt: skip
    for kind, name in kinds.items():
        cells = [
            spread(numbers(rows, "new", kind, f"{where}/recall@{k}"))
            for where, k in (("among new", 5), ("among new", 20), ("among all", 20), ("old", 20))
        ]
        lines.append([name, *cells])
    runs = list(rows.get("new", {}).values())
    if runs:
        chance = [f"{k / runs[0]['items']:.3f}" for k in (5, 20)]
        everything = f"{20 / runs[0]['all_items']:.3f}"
        old = [spread(numbers(rows, "new", score, "recall@20")) for score in ("cosine", "dot")]
        lines.append(["random order", *chance, everything, everything])
        lines.append(["popularity (0 for each new item)", *chance, "0", "-"])
        lines += [
            [f"before they came, {score}", "-", "-", "-", value]
            for score, value in zip(("cosine", "dot"), old, strict=True)
        ]
    header = [
        "",
        "recall@5 among new",
        "recall@20 among new",
        "new items, recall@20 among all",
        "old items, recall@20 among all",
    ]
    return table(header, lines)


def set_table(rows: dict[str, dict[int, Row]]) -> str:
    lines = []
    for seed, row in sorted(rows.get("known", {}).items()):
        counts = row["counts"]
        shares = [row["popularity"]["recall@20"] / row[name]["recall@20"] for name in ("learnable", "oracle")]
        lines.append(
            [str(seed), f"{counts['per user']:.1f}", f"{counts['per item']:.1f}", f"{counts['test users']:.0f}"]
            + [f"{share:.2f}" for share in shares]
        )
    return table(
        [
            "seed",
            "training interactions per user",
            "per item",
            "test users",
            "popularity / learnable",
            "popularity / oracle",
        ],
        lines,
    )


def markdown(out: Path) -> str:
    """Return the tables."""
    rows = read(out)
    spent = sum(row.get("cpu_seconds", 0.0) for runs in rows.values() for row in runs.values())
    count = sum(len(runs) for arm, runs in rows.items() if arm != "known")
    parts = [
        f"{len(rows.get('cm3', {}))} seeds, {count} runs, {spent / 60:.0f} minutes of one core, torch {torch.__version__}.",
        "### Test\n\n" + main_table(rows),
        "### Similarity\n\n" + similarity_table(rows),
        "### Modalities\n\n" + modality_table(rows),
        "### New items\n\n" + new_table(rows),
        "### Sets (test)\n\n" + set_table(rows),
    ]
    return "\n\n".join(parts)


def draw(out: Path) -> None:
    """Draw recall@20 of each arm and seed, and the share of pairs at the upper bound over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(out)
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    arms = ("popularity", *MAIN, "learnable", "oracle")
    for place, arm in enumerate(reversed(arms)):
        found = list(numbers(rows, arm, "dot", "recall@20").values())
        left.plot(found, [place] * len(found), "o", markersize=4, color=COLOURS.get(arm, "#555555"), alpha=0.8)
    left.set_yticks(range(len(arms)), [NAMES[arm] for arm in reversed(arms)])
    left.set_xlim(left=0)
    left.set_xlabel("recall@20, test; a point is a seed")
    left.grid(alpha=0.3)
    for arm, colour in COLOURS.items():
        for number, row in enumerate(rows.get(arm, {}).values()):
            points = [(epoch["epoch"] + 1, epoch["cm3/clipped_above"]) for epoch in row["history"]]
            right.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=NAMES[arm] if number == 0 else None)
    right.set_ylim(-0.02, 1.02)
    right.set_xlabel("epoch")
    right.set_ylabel("share of pairs clipped above")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=120, facecolor="white", metadata={"Software": None})
    print(f"\n{FIGURE}")
