"""Which layer of one frozen encoder resembles which layer of another: their outputs, a score of every pair, a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import InputError, require_choice
from zoo.image_grid import write_png
from zoo.layer_features import Pool, block_names, extract_layers
from zoo.metrics.cka import cka_table
from zoo.metrics.embeddings import TIE
from zoo.metrics.mutual_knn import NeighbourRule, mutual_knn_table, neighbour_count

__all__ = ["LayerScores", "Pool", "block_names", "extract_layers", "select_layers"]

_METRICS = {"mutual_knn": "mutual kNN", "cka": "linear CKA", "cka_unbiased": "linear CKA, unbiased"}
_INK = "#222222"
_MARK = "#d55e00"  # Okabe and Ito
_DPI = 120
_NUMBERED = 8  # layers a side up to which each cell shows its score


@dataclass(frozen=True)
class LayerScores:
    """The score of every pair of an image layer and a text layer.

    Attributes:
        scores: scores (image layers, text layers), float32, on the CPU.
        image_layers: names of the image layers, the rows.
        text_layers: names of the text layers, the columns.
        metric: "mutual_knn", "cka" or "cka_unbiased".
        k: number of neighbours; None for CKA.
        samples: number of samples n that the scores come from.

    Example:
        >>> table = LayerScores(torch.tensor([[0.1, 0.3], [0.2, 0.3]]), ("a", "b"), ("c", "d"), "cka", None, 9)
        >>> table.best, round(table.score, 2)
        (('a', 'd'), 0.3)
    """

    scores: Tensor
    image_layers: tuple[str, ...]
    text_layers: tuple[str, ...]
    metric: Literal["mutual_knn", "cka", "cka_unbiased"]
    k: int | None
    samples: int

    @property
    def best(self) -> tuple[str, str]:
        """Names of the image layer and the text layer with the highest score; of equal ones (to 1e-6) the first, by rows."""
        row, column = self._place
        return self.image_layers[row], self.text_layers[column]

    @property
    def score(self) -> float:
        """The score of the best pair."""
        return float(self.scores[self._place])

    @property
    def _place(self) -> tuple[int, int]:
        flat = self.scores.flatten().tolist()
        return divmod(next(i for i, value in enumerate(flat) if value >= max(flat) - TIE), len(self.text_layers))

    def draw(self, path: str | Path) -> None:
        """Draw the scores as a heat map with the best pair framed, a PNG file; the same bytes for the same scores.

        Args:
            path: the file, whose folder is made where it is missing.

        Raises:
            InputError: the path does not end in ``.png``.
        """
        write_png(path, self.png())

    def png(self) -> bytes:
        """Return the picture of `draw`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        rows, columns = self.scores.shape
        names = [[_label(name) for name in side] for side in (self.image_layers, self.text_layers)]
        cell = 0.5 if max(rows, columns) <= _NUMBERED else 0.28
        room = [0.07 * max(map(len, side)) for side in names]
        size = (max(4.0, 1.6 + room[0] + cell * columns), 1.2 + room[1] + cell * rows)
        # Square cells leave room over: this layout takes it away.
        figure = Figure(figsize=size, layout="compressed")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(self.scores.numpy(), cmap="viridis", interpolation="nearest")
        row, column = self._place
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=_MARK, linewidth=2))
        if max(rows, columns) <= _NUMBERED:
            middle = float(self.scores.min() + self.scores.max()) / 2
            for y, values in enumerate(self.scores.tolist()):
                for x, value in enumerate(values):
                    colour = "black" if value > middle else "white"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
        axes.set_xticks(range(columns), names[1], rotation=90, parse_math=False)
        axes.set_yticks(range(rows), names[0], parse_math=False)
        axes.tick_params(labelsize=7, colors=_INK)
        axes.set_xlabel("text layer", fontsize=9, color=_INK)
        axes.set_ylabel("image layer", fontsize=9, color=_INK)
        neighbours = "" if self.k is None else f", k = {self.k}"
        figure.suptitle(f"{_METRICS[self.metric]}{neighbours}, n = {self.samples}", fontsize=10, color=_INK)
        bar = figure.colorbar(image, ax=axes)
        bar.ax.tick_params(labelsize=7, colors=_INK)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
        return file.getvalue()


def select_layers(
    image_layers: Mapping[str, Tensor],
    text_layers: Mapping[str, Tensor],
    *,
    metric: Literal["mutual_knn", "cka", "cka_unbiased"] = "mutual_knn",
    k: int | NeighbourRule = "rice",
    device: str | torch.device | None = None,
    chunk_size: int | None = None,
) -> LayerScores:
    """Score every pair of an image layer and a text layer over the same samples; the best pair is where to align.

    The neighbours are the same on any device, see `zoo.metrics.nearest_neighbours`. With features of 768 numbers, 24 and 25
    layers and n = 5,000, the neighbours take 2e12 operations in float32, about a minute on a CPU core, and the comparison of
    all pairs less than a second; CKA takes as many in float64.

    Source: the layer selection of STRUCTURE (arXiv 2506.16895), as the project's notes describe the released code,
    section 4.

    Args:
        image_layers: features (n, D) by layer, finite, as `extract_layers` gives them.
        text_layers: features (n, D') of the same samples, row by row.
        metric: "mutual_knn" (see `zoo.metrics.mutual_knn_table`), or "cka" or "cka_unbiased" (`zoo.metrics.cka_table`).
        k: number of neighbours, or "rice", "sqrt" or "sturges"; for "mutual_knn" alone.
        device: where to compute; None computes where the features are.
        chunk_size: rows a block; None takes as many as need 64 MiB.

    Returns:
        The scores, with names.

    Raises:
        InputError: an unknown metric, a `k` for CKA, no layers, layers that differ in rows or are not finite, or too few
            samples.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> select_layers({"early": rows.roll(1, 0), "late": rows}, {"text": 3 * rows}, k=1).best
        ('late', 'text')
    """
    require_choice("metric", metric, _METRICS)
    if metric != "mutual_knn" and k != "rice":
        raise InputError(f"k must be left out for metric={metric!r}, which has no neighbours, got {k!r}")
    for name, layers in (("image_layers", image_layers), ("text_layers", text_layers)):
        if not isinstance(layers, Mapping):
            raise InputError(f"{name} must be features by the name of the layer, got {type(layers).__name__}")
    images, texts = ([layer.to(device) for layer in layers.values()] for layers in (image_layers, text_layers))
    count = None
    if metric == "mutual_knn":
        scores = mutual_knn_table(images, texts, k=k, chunk_size=chunk_size)
        count = neighbour_count(k, len(images[0]))
    else:
        scores = cka_table(images, texts, unbiased=metric == "cka_unbiased", chunk_size=chunk_size)
    return LayerScores(scores.cpu(), tuple(image_layers), tuple(text_layers), metric, count, len(images[0]))


def _label(name: str) -> str:
    # The end of a name tells layers apart; the font that comes with matplotlib lacks many signs.
    text = "".join(character if " " <= character <= "~" else "?" for character in name)
    return text if len(text) <= 32 else f"...{text[-29:]}"
