"""Tables and figure of what `advcal_table.py` measured.

    python benchmarks/advcal_report.py --out runs/advcal-table [--figure docs/results/advcal.png]

Prints Markdown: mean and standard deviation over the seeds, and differences to no head, paired by seed, with the 95 %
interval of their mean. It needs no torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import table_report
from table_report import spread

ATTACKS = ("pgd-ce", "apgd-ce", "apgd-dlr", "apgd-l2")
COLOURS = {
    "none": "#000000",
    "clean-trained": "#999999",
    "ce": "#d55e00",
    "l2": "#0072b2",
    "nce": "#009e73",
}  # Okabe and Ito

Key = tuple[str, str, str, float, int]

ROWS = ("clean", "backbone/half", "backbone/whole", "full/half", "full/whole", "noise", "drift")
ACROSS = ("retrieval/r1", "retrieval/attacked_r1", "agreement/clean", "agreement/attacked")


def key_of(row: dict[str, Any]) -> Key:
    return row["data"], row["column"], row["target"], row["beta"], row["seed"]


def column_name(column: str, target: str, beta: float) -> str:
    return column if target == "-" else f"{column}, β={beta:g}{'' if target == 'backbone' else ', full'}"


def cell(values: list[float], row: str) -> str:
    """Mean ± standard deviation: per cent, and the drift as it is."""
    scale, decimals = (1, 4) if row == "drift" else (100, 1)
    return spread([scale * value for value in values], decimals)


def difference(ours: dict[int, float], control: dict[int, float]) -> str:
    """Mean difference paired by seed, in points, with its 95 % interval."""
    per_cent = ({seed: 100 * value for seed, value in side.items()} for side in (ours, control))
    return table_report.difference(*per_cent, 1)


def report(rows: list[dict[str, Any]], file: Path) -> None:
    """Print a table for each data set and modality, and draw accuracy under both kinds of attack."""
    by = {key_of(row): row for row in rows}
    panels = []
    for data in sorted({row["data"] for row in rows}):
        ours = [row for row in rows if row["data"] == data]
        columns = sorted(
            {key_of(row)[1:4] for row in ours}, key=lambda c: (c[1] == "full", list(COLOURS).index(c[0]), c[2])
        )
        for modality in ours[0]["metrics"]:
            # Earlier rows lack what was added since.
            shown = [row for row in (*ROWS, *ACROSS) if all(row in each["metrics"][modality] for each in ours)]
            found = {
                c: {
                    row: {k[4]: v["metrics"][modality][row] for k, v in by.items() if k[:4] == (data, *c)}
                    for row in shown
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
            for row in shown:
                print(f"| {row} | {' | '.join(cell(list(found[c][row].values()), row) for c in columns)} |")
            if ("none", "-", 0.0) in found:
                for row in ("backbone/half", "backbone/whole", "full/half", "full/whole"):
                    ends = [difference(found[c][row], found["none", "-", 0.0][row]) for c in columns]
                    print(f"| {row}, less none | {' | '.join(ends)} |")
    draw(panels, file)


def draw(panels: list[tuple[str, dict[Any, Any]]], file: Path) -> None:
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
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, facecolor="white", metadata={"Software": None})
    print(f"\n{file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/advcal-table"))
    parser.add_argument("--figure", type=Path, default=Path("docs/results/advcal.png"))
    options = parser.parse_args()
    lines = (options.out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    report([json.loads(line) for line in lines], options.figure)


if __name__ == "__main__":
    main()
