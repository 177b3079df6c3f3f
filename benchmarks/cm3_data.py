"""The sets of `cm3_table.py`, and what can be reached on them without any recommender of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.data import SyntheticInteractionsDataModule
from zoo.data.interaction_loading import Interactions
from zoo.interaction_graph import PairLists, pair_lists
from zoo.metrics import FullRanking
from zoo.metrics.top_items import ScoreName

LENGTHS = (5, 20)


class Catalogue(SyntheticInteractionsDataModule):
    """The made-up set with fewer modalities, with features of other items, or without its cold items.

    Args:
        keep: modalities that are shown; None for all.
        shuffled: whether each item has the features of another, drawn at random: all is the same but what they tell.
        without_cold: whether cold items are left out of the catalogue, to be added later; `cold` has them then.
        options: of the set.
    """

    def __init__(
        self, *, keep: Sequence[str] | None = None, shuffled: bool = False, without_cold: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.keep = keep
        self.shuffled = shuffled
        self.without_cold = without_cold
        self.cold_items = Interactions({}, {}, {}, [], [])

    def _read(self) -> Interactions:
        data = super()._read()
        features = {name: rows for name, rows in data.features.items() if self.keep is None or name in self.keep}
        if self.shuffled:
            features = {name: rows[permutation(len(rows), self.data_seed)] for name, rows in features.items()}
        data = Interactions(
            data.pairs, features, {name: data.present[name] for name in features}, data.user_ids, data.item_ids
        )
        if not self.without_cold:
            return data
        assert self.made is not None
        cold = torch.from_numpy(self.made.cold)
        self.cold_items = part_of(data, cold)
        return part_of(data, ~cold)


def permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def part_of(data: Interactions, kept: Tensor) -> Interactions:
    """Return the set of some items (I,), bool, which are numbered anew."""
    number = kept.cumsum(0) - 1
    pairs = {}
    for split, (users, items) in data.pairs.items():
        there = kept[items]
        pairs[split] = torch.stack([users[there], number[items[there]]])
    return Interactions(
        pairs=pairs,
        features={name: rows[kept] for name, rows in data.features.items()},
        present={name: rows[kept] for name, rows in data.present.items()},
        user_ids=data.user_ids,
        item_ids=[name for name, there in zip(data.item_ids, kept.tolist(), strict=True) if there],
    )


def ranked(
    users: Tensor, items: Tensor, held_out: Tensor, seen: Tensor | None, *, score: ScoreName = "dot"
) -> dict[str, float]:
    """Rank all items for all users.

    Args:
        users: (U, d).
        items: (I, d).
        held_out: (2, N), users and items to find.
        seen: the same of what is left out of the lists; None for nothing.
        score: "dot" or "cosine".
    """
    metric = FullRanking(LENGTHS, score=score)
    metric.update(
        users.float(),
        items.float(),
        lists_of(held_out, users, items),
        None if seen is None else lists_of(seen, users, items),
    )
    return {name: round(float(value), 6) for name, value in metric.compute().items()}


def lists_of(pairs: Tensor, users: Tensor, items: Tensor) -> PairLists:
    return pair_lists(*pairs, num_rows=len(users), num_columns=len(items))


def reachable(data: SyntheticInteractionsDataModule, split: str) -> dict[str, dict[str, float]]:
    """Return what popularity finds, what the oracle finds, and what could be learned at best.

    The last, ``"learnable"``, knows the contents of the items, and has to learn tastes and popularity from the training
    interactions: a logistic regression for each user, with the true spread of tastes as its prior.
    """
    train, held_out = data.interactions["train"], data.interactions[split]
    made = data.made
    assert made is not None
    counts = torch.bincount(train[1], minlength=data.num_items).double()
    tastes, contents = (torch.from_numpy(rows) for rows in made.oracle())
    one = torch.ones(data.num_users, 1, dtype=torch.float64)
    factors = torch.from_numpy(made.item_factors)
    logs = (counts + 1).log()
    learned = learned_tastes(lists_of(train, tastes, contents), factors, logs, made.strength)
    found = {
        "popularity": (one, counts.unsqueeze(1)),
        "learnable": (torch.cat([learned, one], 1), torch.cat([factors, logs.unsqueeze(1)], 1)),
        "oracle": (tastes, contents),
    }
    return {name: ranked(*vectors, held_out, train) for name, vectors in found.items()}


def learned_tastes(seen: PairLists, factors: Tensor, logs: Tensor, strength: float) -> Tensor:
    """Return the tastes (U, F) of largest probability, given the items of each user and the contents of all (I, F)."""
    lengths = seen.lengths()
    tastes = torch.zeros(len(lengths), factors.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([tastes], max_iter=60, line_search_fn="strong_wolfe")
    rows, precision = seen.rows(), factors.shape[1] / max(strength, 1e-6) ** 2

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = tastes @ factors.t() + logs
        value = (lengths * scores.logsumexp(1)).sum() - scores[rows, seen.columns].sum()
        value = value + precision / 2 * tastes.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return tastes.detach()


def counts_of(data: SyntheticInteractionsDataModule) -> dict[str, float]:
    """Return training interactions per user and item, and users with something to find."""
    train, test = data.interactions["train"], data.interactions["test"]
    return {
        "per user": train.shape[1] / data.num_users,
        "per item": train.shape[1] / data.num_items,
        "test users": float(len(np.unique(test[0].numpy()))),
    }


def measured_cold(users: Tensor, items: Tensor, data: Catalogue, *, score: ScoreName) -> dict[str, float]:
    """Return what is found of the cold items, which are the last ones, among themselves and among all.

    Also what is found of the others, now that new ones stand among them.
    """
    first = data.num_items
    new, seen = data.cold_items.pairs["test"], data.interactions["train"]
    among_all = torch.stack([new[0], new[1] + first])
    found: Mapping[str, dict[str, float]] = {
        "among new": ranked(users, items[first:], new, None, score=score),
        "among all": ranked(users, items, among_all, seen, score=score),
        "old": ranked(users, items, data.interactions["test"], seen, score=score),
    }
    return {f"{where}/{name}": value for where, values in found.items() for name, value in values.items()}
