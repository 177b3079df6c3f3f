"""MutualKNN: every pair of 24 image layers and 25 text layers against set intersections in Python loops.

    python benchmarks/mutual_knn.py [--device cuda] [--threads 1] [--samples 5000] [--width 768] [--rounds 5]

Loops, written from the description of the released layer selection (arXiv 2506.16895): for each pair of layers and each
sample the size of an intersection of two sets, divided by k. One starts from neighbours that are given, as ours does; the
others find them, in float32 with a full sort of each row, once for each layer or anew for each pair of layers. Loops and
their searches are timed on some of the pairs and layers, and their cost is linear in them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from nd import peak_bytes, seconds
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from zoo.metrics.mutual_knn import count_shared, mutual_knn_table, neighbour_count
from zoo.metrics.neighbours import BYTES_PER_SCORE, block_rows, exact_units, nearest_neighbours, neighbour_sets

IMAGE_LAYERS, TEXT_LAYERS = 24, 25
TARGET = 20
LOOP_PAIRS = 12  # pairs of layers that the loop over given neighbours is timed on
SEARCHED = 2  # layers that the loop's search is timed on


def loop_overlap(first: Tensor, second: Tensor) -> float:
    total = 0.0
    for ours, theirs in zip(first.tolist(), second.tolist(), strict=True):
        total += len(set(ours) & set(theirs)) / len(ours)
    return total / len(first)


def loop_neighbours(features: Tensor, k: int) -> Tensor:
    units = torch.nn.functional.normalize(features, dim=1)
    scores = units @ units.T
    scores.fill_diagonal_(-1e8)
    return scores.argsort(dim=1, descending=True)[:, :k]


def draw_layers(samples: int, width: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    shared = torch.randn(samples, 16, device=device)
    layers = [
        shared @ torch.randn(16, width, device=device) + torch.randn(samples, width, device=device)
        for _ in range(IMAGE_LAYERS + TEXT_LAYERS)
    ]
    return layers[:IMAGE_LAYERS], layers[IMAGE_LAYERS:]


def compare(device: str, samples: int, width: int, rounds: int) -> Table:
    images, texts = draw_layers(samples, width, device)
    k, pairs = neighbour_count("rice", samples), IMAGE_LAYERS * TEXT_LAYERS
    rows = block_rows(None, BYTES_PER_SCORE * samples)

    def search(layer: Tensor) -> Tensor:
        return neighbour_sets(exact_units(layer), k, rows)

    found = [
        torch.stack([search(layer) for layer in track(layers, description="neighbours", transient=True)])
        for layers in (images, texts)
    ]
    expected = torch.tensor([[loop_overlap(found[0][0], found[1][t]) for t in range(2)]])
    torch.testing.assert_close(count_shared(*found)[:1, :2].cpu() / (samples * k), expected, rtol=0, atol=1e-6)

    def ours() -> Tensor:
        return count_shared(*found)

    def loop() -> list[float]:
        return [loop_overlap(found[0][p % IMAGE_LAYERS], found[1][p % TEXT_LAYERS]) for p in range(LOOP_PAIRS)]

    ours()
    our_times, loop_times = [], []
    for _ in track(range(rounds), description="intersections", transient=True):
        loop_times.append(seconds(loop, device) * pairs / LOOP_PAIRS)
        our_times += [seconds(ours, device) for _ in range(3)]
    our_time, loop_time = statistics.median(our_times), statistics.median(loop_times)

    def search_time(function: Callable[[Tensor], Tensor]) -> float:
        return statistics.median(seconds(lambda layer=layer: function(layer), device) for layer in images[:SEARCHED])

    once, float64 = search_time(search), search_time(lambda layer: nearest_neighbours(layer, k))
    theirs = search_time(lambda layer: loop_neighbours(layer, k))
    our_whole = seconds(lambda: mutual_knn_table(images, texts), device)
    layers = IMAGE_LAYERS + TEXT_LAYERS

    table = Table(title=f"mutual kNN, {IMAGE_LAYERS} x {TEXT_LAYERS} layers, n = {samples}, width {width}, k = {k}")
    for column in ("", "loop s", "ours s", "ratio", f"target {TARGET}x", "ours peak MiB"):
        table.add_column(column, justify="left" if not column else "right")
    results = (
        ("from given neighbours", loop_time, our_time, f"{peak_bytes(ours, device) / 2**20:.0f}"),
        ("from features, the loop's search once a layer", theirs * layers + loop_time, our_whole, ""),
        ("from features, the loop's search anew for each pair", theirs * 2 * pairs + loop_time, our_whole, ""),
        ("search of one layer, against the loop's", theirs, once, ""),
        ("search of one layer, against float64 alone", float64, once, ""),
    )
    for name, loops, mine, peak in results:
        ratio = loops / mine
        verdict = "" if name.startswith("search") else "met" if ratio >= TARGET else "missed"
        table.add_row(name, f"{loops:.2f}", f"{mine:.3f}", f"{ratio:.1f}", verdict, peak)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="mutual_knn_table against set intersections in Python loops")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the medians are taken")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    console.print(f"PyTorch {torch.__version__}, {name}, medians of {options.rounds} rounds")
    console.print(compare(options.device, options.samples, options.width, options.rounds))


if __name__ == "__main__":
    main()
