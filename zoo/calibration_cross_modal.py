"""What attacks do between modalities: retrieval of things of one class across them, and whether their predictions agree.

Queries of one modality look for things of their class among those of another, which are never attacked: ``r{k}`` is the
share of queries with at least one of their class among the k nearest by cosine. That is about classes, not single things.

Source: the project's notes on adversarial calibration (arXiv 2505.11895), section 5; how ties and rows that are not finite
count is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.metrics.embeddings import TIE, RowsMetric, cosines, require_embeddings, require_ks, unit_rows

__all__ = ["CrossModalMetric", "ModalityView", "class_retrieval"]

# Queries whose scores are held at a time.
_BLOCK = 1024


class ModalityView(NamedTuple):
    """What a model makes of the samples of one modality.

    Attributes:
        clean: embeddings (B, D) of the inputs as they are.
        attacked: embeddings (B, D) of the attacked inputs.
        clean_classes: predictions (B,) for the former.
        attacked_classes: predictions (B,) for the latter.
        labels: classes (B,).
    """

    clean: Tensor
    attacked: Tensor
    clean_classes: Tensor
    attacked_classes: Tensor
    labels: Tensor


def class_retrieval(
    queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, *, k: int | Sequence[int] = (1, 5)
) -> dict[str, Tensor]:
    """Return how often things of the query's class are among the k nearest by cosine.

    Items of another class that are not farther by more than 1e-6 come first, and so do those that are not finite: embeddings
    that are all alike find nothing. Queries whose class the gallery lacks do not count.

    Args:
        queries: embeddings (Q, D).
        query_labels: classes (Q,).
        gallery: embeddings (G, D).
        gallery_labels: classes (G,).
        k: one k or several, at least 1.

    Returns:
        ``r{k}``, share of the queries that find their class, and ``precision{k}``, share of it among k; NaN without a query.

    Raises:
        InputError: `k` is out of range, or shapes do not fit.

    Example:
        >>> found = class_retrieval(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 0]), k=2)
        >>> {name: value.item() for name, value in found.items()}
        {'r2': 1.0, 'precision2': 1.0}
    """
    ks = require_ks("k", k)
    for name, rows, labels in (("queries", queries, query_labels), ("gallery", gallery, gallery_labels)):
        require_embeddings(name, rows)
        if labels.shape != rows.shape[:1]:
            raise InputError(f"{name} must have one label a row, got {len(rows)} rows and labels {tuple(labels.shape)}")
    if queries.shape[1] != gallery.shape[1]:
        raise InputError(f"gallery must be as wide as queries, {queries.shape[1]}, got {gallery.shape[1]}")
    blocks = zip(torch.split(unit_rows(queries), _BLOCK), torch.split(query_labels, _BLOCK), strict=True)
    items = unit_rows(gallery)
    hits = torch.cat([_hits(rows, labels, items, gallery_labels, max(ks)) for rows, labels in blocks]).float()
    found = {}
    for size in ks:
        found[f"r{size}"] = hits[:, :size].amax(1).mean() if hits.numel() else hits.new_full((), torch.nan)
        found[f"precision{size}"] = hits[:, :size].sum(1).mean() / size
    return found


def _hits(queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, depth: int) -> Tensor:
    """Whether the nearest items are of the query's class (Q', min(depth, G)), of those queries whose class there is."""
    own = query_labels.unsqueeze(1) == gallery_labels
    scores = cosines(queries, gallery)
    known = own & ~scores.isnan()
    # topk takes NaN for the greatest: right for what is foreign.
    ranked = torch.where(own, torch.where(known, scores - TIE, -torch.inf), scores)
    nearest = ranked.topk(min(depth, len(gallery)), dim=1).indices
    return known.gather(1, nearest)[own.any(1)]


class CrossModalMetric(RowsMetric):
    """Retrieval and agreement between modalities, without an attack and when one of the two is attacked.

    Kept are unit rows of what it is given, twice a sample, which every process gathers at the end.

    Args:
        modalities: the modalities, at least two.
        k: of the retrieval.

    Example:
        >>> metric = CrossModalMetric(["image", "audio"], k=1)
        >>> right, wrong = torch.eye(2), torch.eye(2).flip(0)
        >>> image = ModalityView(right, wrong, torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0, 1]))
        >>> metric.update({"image": image, "audio": image._replace(attacked=right)}, paired=True)
        >>> {name: value.item() for name, value in metric.compute()["image"].items()}  # doctest: +NORMALIZE_WHITESPACE
        {'retrieval/r1': 1.0, 'retrieval/attacked_r1': 0.0, 'agreement/clean': 1.0, 'agreement/attacked': 0.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    agreed: Tensor
    compared: Tensor

    def __init__(self, modalities: Sequence[str], k: int | Sequence[int] = (1, 5)) -> None:
        super().__init__()
        self.modalities = list(modalities)
        self.k = require_ks("k", k)
        count = len(self.modalities)
        for place in range(count):
            self.add_rows(f"clean_{place}")
            self.add_rows(f"attacked_{place}")
            self.add_numbers(f"labels_{place}")
        # Clean and attacked, of the modality that may be attacked, with the other.
        self.add_state("agreed", torch.zeros(2, count, count, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("compared", torch.zeros(count, count, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, views: Mapping[str, ModalityView], *, paired: bool) -> None:
        """Take a batch.

        Args:
            views: some or all of the modalities.
            paired: whether row i of all of them is one thing; predictions are compared then.
        """
        for name, view in views.items():
            place = self.modalities.index(name)
            self.keep(f"clean_{place}", unit_rows(view.clean))
            self.keep(f"attacked_{place}", unit_rows(view.attacked))
            self.keep(f"labels_{place}", view.labels)
        if not paired:
            return
        # Not in place: a reset inside inference_mode leaves tensors that cannot be changed outside of it.
        agreed, compared = self.agreed.clone(), self.compared.clone()
        for name, other in ((a, b) for a in views for b in views if a != b):
            pair = self.modalities.index(name), self.modalities.index(other)
            rows = min(len(views[name].labels), len(views[other].labels))
            wanted = views[other].clean_classes[:rows]
            for kind, classes in enumerate((views[name].clean_classes, views[name].attacked_classes)):
                agreed[(kind, *pair)] += (classes[:rows] == wanted).sum()
            compared[pair] += rows
        self.agreed, self.compared = agreed, compared

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Compare the modalities over all processes.

        Returns:
            By modality that queries and may be attacked, means over the others, in 0 … 1: ``retrieval/r{k}`` and
            ``retrieval/attacked_r{k}``, see `class_retrieval`; ``agreement/clean`` and ``agreement/attacked``, the share of
            samples for which its prediction is that of the other modality, which is clean. What has no sample is left out.
        """
        return {name: self._values(place) for place, name in enumerate(self.modalities)}

    def _values(self, place: int) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for other in range(len(self.modalities)):
            if other == place:
                continue
            for key, value in (self._retrieval(place, other) | self._agreement(place, other)).items():
                if not value.isnan():
                    found.setdefault(key, []).append(value)
        return {key: torch.stack(values).mean() for key, values in found.items()}

    def _retrieval(self, place: int, other: int) -> dict[str, Tensor]:
        gallery, labels = self.matrix(f"clean_{other}"), self.numbers(f"labels_{other}")
        found: dict[str, Tensor] = {}
        for kind, prefix in (("clean", ""), ("attacked", "attacked_")):
            queries = self.matrix(f"{kind}_{place}")
            if len(queries) and len(gallery):
                values = class_retrieval(queries, self.numbers(f"labels_{place}"), gallery, labels, k=self.k)
                found |= {f"retrieval/{prefix}r{size}": values[f"r{size}"] for size in self.k}
        return found

    def _agreement(self, place: int, other: int) -> dict[str, Tensor]:
        shares = self.agreed[:, place, other] / self.compared[place, other]
        return {"agreement/clean": shares[0], "agreement/attacked": shares[1]}
