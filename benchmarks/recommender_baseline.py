"""CM3 as its released code is described, for `recommender.py`: what ours is timed against.

Written from the project's notes on the release of arXiv 2508.01226 (sections 1, 3 and 5), not from its source:

- the interactions go through a Python dict of pairs to sparse matrices, and to one in coordinates that is not coalesced;
- neighbours come from the dense matrix of all cosines;
- the loaders of evaluation look up each user's rows by ``groupby.get_group``, once for the items of training and once for
  those to find (where pandas is not installed: a comparison of the whole column with the user's number);
- negatives and hits are Python loops;
- all layers of the propagation are kept and stacked; every item goes through every hop;
- the pairs of a batch are ``pdist`` and a gather of all similarities by ``torch.combinations``;
- both matrices of features are parameters that nothing uses.

What no longer runs with today's scipy, numpy or a CPU is mended: the dict becomes a matrix without ``dok_matrix._update``.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "LIST_LENGTHS",
    "ReleasedModel",
    "epoch_batches",
    "evaluate",
    "evaluation_loader",
    "has_pandas",
    "sampling_sets",
]

LIST_LENGTHS = (5, 10, 20, 50)
Numbers = npt.NDArray[np.int64]
Group = Callable[[int], Numbers]
EvaluationLoader = tuple[Numbers, list[Numbers], list[Numbers]]


def interaction_matrix(users: Numbers, items: Numbers, num_users: int, num_items: int) -> Tensor:
    """The normalised bipartite graph in coordinates."""
    nodes = num_users + num_items
    entries = dict(zip(zip(users, items + num_users, strict=True), [1] * len(users), strict=True))
    entries.update(dict(zip(zip(items + num_users, users, strict=True), [1] * len(users), strict=True)))
    rows, columns = zip(*entries.keys(), strict=True)
    made = scipy.sparse.csr_matrix((np.array(list(entries.values()), np.float32), (rows, columns)), (nodes, nodes))
    scale = scipy.sparse.diags(np.power(np.asarray(made.sum(1)).flatten() + 1e-7, -0.5))
    scaled = scipy.sparse.coo_matrix(scale @ made @ scale)
    places = torch.from_numpy(np.stack([scaled.row, scaled.col]).astype(np.int64))
    values = torch.from_numpy(scaled.data.astype(np.float32))
    return torch.sparse_coo_tensor(places, values, (nodes, nodes), check_invariants=False)


def neighbour_matrix(features: Tensor, k: int) -> Tensor:
    """Each item's k nearest by cosine, itself included, from the dense matrix of all cosines."""
    directions = features / features.norm(p=2, dim=1, keepdim=True)
    similarity = directions @ directions.t()
    nearest = similarity.topk(k, dim=1).indices
    rows = torch.arange(len(nearest), device=nearest.device).unsqueeze(1).expand(-1, k)
    places = torch.stack([rows.flatten(), nearest.flatten()])
    degrees = torch.full((len(nearest),), float(k), device=nearest.device) + 1e-7
    values = degrees.pow(-0.5)[places[0]] * degrees.pow(-0.5)[places[1]]
    return torch.sparse_coo_tensor(places, values, similarity.shape, check_invariants=False)


def uniformity(x: Tensor) -> Tensor:
    return torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log()


def calibrated_uniformity(x: Tensor, fused: Tensor, pairs: Tensor, highest: float) -> Tensor:
    similarity = (fused @ fused.t()).clamp(0, highest)
    first, second = pairs.to(x.device).unbind(1)
    return torch.pdist(x, p=2).pow(2).sub(2).add(2 * similarity[first, second]).mul(-2).exp().mean().log()


def slerp(text: Tensor, image: Tensor, share: Tensor) -> Tensor:
    text, image = F.normalize(text, dim=1), F.normalize(image, dim=1)
    angle = (text * image).sum(1, keepdim=True).clamp(-1 + 1e-8, 1 - 1e-8).arccos()
    share = share.unsqueeze(1)
    return ((share * angle).sin() * text + ((1 - share) * angle).sin() * image) / angle.sin()


class ReleasedModel(nn.Module):
    """Parameters and graphs; building it is the larger part of the start."""

    def __init__(
        self,
        users: Numbers,
        items: Numbers,
        *,
        num_users: int,
        num_items: int,
        image: Tensor,
        text: Tensor,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_users, self.num_items = num_users, num_items
        self.layers, self.gamma = options["hops"], options["uniformity_weight"]
        self.highest, self.alpha = options["max_similarity"], options["alpha"]
        dim, device = options["dim"], image.device
        self.graph = interaction_matrix(users, items, num_users, num_items).to(device)
        share, k = options["image_weight"], options["neighbours"]
        self.item_graph = share * neighbour_matrix(image, k) + (1 - share) * neighbour_matrix(text, k)
        self.features = {"image": image, "text": text}
        self.unused = nn.ModuleDict(
            {name: nn.Embedding.from_pretrained(rows, freeze=False) for name, rows in self.features.items()}
        )
        self.tables = nn.ParameterDict(
            {name: nn.init.xavier_normal_(torch.empty(num_users, dim)) for name in ("image", "text", "fused")}
        )
        self.gate = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_users, 3, 1)))
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(rows.shape[1], 4 * dim), nn.LeakyReLU(), nn.Linear(4 * dim, dim, bias=False)
                )
                for name, rows in self.features.items()
            }
        )
        self.heads = nn.ModuleDict({name: nn.Linear(rows.shape[1], dim) for name, rows in self.features.items()})
        for head in self.heads.values():
            nn.init.xavier_normal_(head.weight)
        self.pairs: dict[int, Tensor] = {}
        self.to(device)

    def forward(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of users and items, and the fused features; share is the text's in each item."""
        made = {name: encoder(self.features[name]) for name, encoder in self.encoders.items()}
        heads = {name: head(self.features[name]) for name, head in self.heads.items()}
        made["fused"] = slerp(heads["text"], heads["image"], share)
        sides = [torch.cat([self.tables[name], made[name]]) for name in ("image", "text", "fused")]
        hop = torch.cat([F.normalize(side, dim=1) for side in sides], 1)
        layers = [hop]
        for _ in range(self.layers):
            hop = torch.sparse.mm(self.graph, hop)
            layers.append(hop)
        users, items = torch.stack(layers, 1).sum(1).split([self.num_users, self.num_items])
        parts = torch.stack(users.chunk(3, dim=1), 1) * self.gate.softmax(1)
        return parts.flatten(1), items + torch.sparse.mm(self.item_graph, items), made["fused"]

    def loss(self, users: Tensor, positives: Tensor, negatives: Tensor, share: Tensor | None = None) -> Tensor:
        if share is None:
            drawn = torch.distributions.Beta(self.alpha, self.alpha).sample((self.num_items,))
            share = drawn.to(self.gate.device)
        of_users, of_items, fused = self(share)
        of_users, of_items = F.normalize(of_users, dim=1), F.normalize(of_items, dim=1)
        user, positive, negative = of_users[users], of_items[positives], of_items[negatives]
        alignment = (user - positive).norm(p=2, dim=1).pow(2).mean()
        rows = len(users)
        if rows not in self.pairs:
            self.pairs[rows] = torch.combinations(torch.arange(rows), 2)
        apart = uniformity(user) + calibrated_uniformity(negative, fused[negatives], self.pairs[rows], self.highest)
        return alignment + self.gamma * apart / 2


# -- loaders -----------------------------------------------------------------------------------------------------------


def sampling_sets(users: Numbers, items: Numbers) -> tuple[list[int], dict[int, set[int]]]:
    """Items to draw negatives from, and those of each user."""
    had: dict[int, set[int]] = {}
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        had.setdefault(user, set()).add(item)
    return sorted(set(items.tolist())), had


def epoch_batches(
    users: Numbers, items: Numbers, pool: Sequence[int], had: dict[int, set[int]], batch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Shuffled batches with one negative for each row, drawn in a Python loop."""
    order = np.random.default_rng().permutation(len(users))
    for start in range(0, len(users), batch):
        rows = order[start : start + batch]
        negatives = []
        for user in users[rows]:
            drawn = random.sample(pool, 1)[0]
            while drawn in had[user]:
                drawn = random.sample(pool, 1)[0]
            negatives.append(drawn)
        yield torch.from_numpy(users[rows]), torch.from_numpy(items[rows]), torch.tensor(negatives)


def has_pandas() -> bool:
    return importlib.util.find_spec("pandas") is not None


def _groups(users: Numbers, items: Numbers) -> Group:
    if not has_pandas():
        return lambda user: items[users == user]
    import pandas

    grouped = pandas.DataFrame({"user": users, "item": items}).groupby("user")["item"]
    return lambda user: grouped.get_group(user).to_numpy()


def evaluation_loader(train: tuple[Numbers, Numbers], held_out: tuple[Numbers, Numbers]) -> EvaluationLoader:
    """Users with something to find; for each of them the items of training, and those to find."""
    users = np.unique(held_out[0])
    had, wanted = _groups(*train), _groups(*held_out)
    return users, [had(user) for user in users], [wanted(user) for user in users]


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluate(
    of_users: Tensor, of_items: Tensor, loader: EvaluationLoader, batch: int, limit: int | None = None
) -> dict[str, float]:
    """Rank all items for the users of a loader, or for the first of them, and look for each item in Python."""
    users, had, wanted = (part[:limit] for part in loader)
    lists = []
    for start in range(0, len(users), batch):
        own = slice(start, start + batch)
        scores = of_users[torch.from_numpy(users[own]).to(of_users.device)] @ of_items.t()
        rows = [np.full(len(seen), row) for row, seen in enumerate(had[own])]
        scores[np.concatenate(rows), np.concatenate(had[own])] = -1e10
        lists.append(scores.topk(max(LIST_LENGTHS), dim=1).indices.cpu().numpy())
    hits = []
    for found, items in zip(np.concatenate(lists), wanted, strict=True):
        hits.append([item in items for item in found])
    return _measures(np.array(hits, dtype=bool), np.array([len(items) for items in wanted]))


def _measures(hits: npt.NDArray[np.bool_], counts: Numbers) -> dict[str, float]:
    places = np.arange(1, hits.shape[1] + 1)
    gains = 1 / np.log2(places + 1)
    best = np.cumsum(gains)
    found = np.cumsum(hits, 1)
    measures = {}
    for k in LIST_LENGTHS:
        reachable = np.minimum(counts, k)
        precisions = (hits * found / places)[:, :k].sum(1)
        measures[f"recall@{k}"] = float((found[:, k - 1] / counts).mean())
        measures[f"ndcg@{k}"] = float(((hits * gains)[:, :k].sum(1) / best[reachable - 1]).mean())
        measures[f"precision@{k}"] = float((found[:, k - 1] / k).mean())
        measures[f"map@{k}"] = float((precisions / reachable).mean())
    return measures
