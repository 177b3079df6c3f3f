"""Interactions with known latent structure: how much features can tell of them is an argument, not a guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zoo.data.draws import random_words
from zoo.data.interaction_splits import random_user_split
from zoo.data.splits import Indices
from zoo.errors import InputError

__all__ = ["SyntheticInteractions", "synthetic_interactions"]

Floats = npt.NDArray[np.float64]

# Streams of random numbers, each with the seed and, where there are several, a number.
_USER, _ITEM, _POPULARITY, _COLD, _COUNT, _CHOICE, _MIXING, _NOISE, _MISSING = range(20, 29)
_BLOCK = 1 << 22  # scores of users and items at a time


@dataclass(frozen=True)
class SyntheticInteractions:
    """A made-up set.

    Attributes:
        users: user of each interaction (N,).
        items: item of each interaction (N,).
        labels: 0, 1 or 2 for training, validation and test (N,).
        features: features of the items (I, D) by modality, float32; rows of zeros where an item lacks the modality.
        user_factors: the latent tastes (U, F), of length 1.
        item_factors: the latent contents (I, F), of length 1.
        strength: how much taste decides.
        bias: what popularity adds to the log of an item's odds (I,).
        cold: which items have no training interaction by design (I,), bool.
        visible: the factors that each modality shows.
    """

    users: Indices
    items: Indices
    labels: Indices
    features: dict[str, npt.NDArray[np.float32]]
    user_factors: Floats
    item_factors: Floats
    strength: float
    bias: Floats
    cold: npt.NDArray[np.bool_]
    visible: dict[str, list[int]]

    def oracle(self) -> tuple[Floats, Floats]:
        """Return vectors of users (U, F + 1) and items (I, F + 1) whose inner product is the log of the odds.

        A list by them is the best that can be: it knows what a recommender has to learn.
        """
        tastes = np.column_stack([self.strength * self.user_factors, np.ones(len(self.user_factors))])
        return tastes, np.column_stack([self.item_factors, self.bias])

    def write(self, folder: str | Path, *, name: str = "synthetic") -> None:
        """Write the set as MMRec does: ``name.inter`` and ``<modality>_feat.npy``.

        Args:
            folder: an existing folder.
            name: of the set.
        """
        lines = ["userID\titemID\trating\ttimestamp\tx_label"]
        columns = (self.users.tolist(), self.items.tolist(), self.labels.tolist())
        lines += [
            f"{user}\t{item}\t1.0\t{time}\t{label}"
            for time, (user, item, label) in enumerate(zip(*columns, strict=True))
        ]
        Path(folder, f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for modality, values in self.features.items():
            np.save(Path(folder, f"{modality}_feat.npy"), values, allow_pickle=False)


def _uniform(key: tuple[int, ...], count: int, *, start: int = 0) -> Floats:
    """Return numbers in (0, 1) that depend on their key and position alone."""
    words = random_words(key, np.arange(start, start + count))
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _normal(key: tuple[int, ...], rows: int, columns: int) -> Floats:
    from scipy.special import ndtri

    values: Floats = ndtri(_uniform(key, rows * columns)).reshape(rows, columns)
    return values


def _directions(key: tuple[int, ...], rows: int, columns: int) -> Floats:
    values = _normal(key, rows, columns)
    unit: Floats = values / np.linalg.norm(values, axis=1, keepdims=True)
    return unit


def _order(key: tuple[int, ...], count: int) -> Indices:
    return np.argsort(random_words(key, np.arange(count)))


def _chosen(
    tastes: Floats, contents: Floats, bias: Floats, counts: Indices, key: tuple[int, ...]
) -> tuple[Indices, Indices]:
    """Draw counts[u] different items for each user, with the odds exp(tastes @ contents + bias), by Gumbel's maxima."""
    size, users, items = len(contents), [], []
    if size == 0 or counts.max() == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    step = max(1, _BLOCK // size)
    for start in range(0, len(tastes), step):
        part = tastes[start : start + step]
        noise = -np.log(-np.log(_uniform(key, len(part) * size, start=start * size).reshape(len(part), size)))
        best = np.argsort(-(part @ contents.T + bias + noise), axis=1)
        row, place = np.nonzero(np.arange(size) < counts[start : start + step, None])
        users.append(row + start)
        items.append(best[row, place])
    return np.concatenate(users), np.concatenate(items)


def _require(name: str, value: float, least: float, most: float = np.inf) -> None:
    if not least <= value <= most:
        rule = f"at least {least}" if most == np.inf else f"between {least} and {most}"
        raise InputError(f"{name} must be {rule}, got {value}")


def synthetic_interactions(
    *,
    num_users: int = 1000,
    num_items: int = 400,
    modalities: Mapping[str, int] | None = None,
    interactions_per_user: float = 8.0,
    factors: int = 16,
    strength: float = 10.0,
    visible: float = 0.6,
    noise: float = 0.3,
    skew: float = 0.7,
    cold: float = 0.0,
    missing: float = 0.0,
    seed: int = 0,
) -> SyntheticInteractions:
    """Make interactions of users and items with latent factors, part of which the items' features show.

    Users and items are directions of F factors. User u takes different items with odds proportional to

        exp(strength <u, i> + b_i),   b_i = -skew log(rank of i),

    where the ranks are a random order of the items: popularity says nothing about content. A modality shows a share of the
    factors; those of several modalities begin at different ones, so that each knows something that another does not. Its
    features are those factors by a random matrix, and noise. Numbers of interactions are uniform about their mean, from 3.
    They are split by `random_user_split`, with half of the interactions of cold items in validation and half in the test.

    By default there are as many training interactions for each user and item (6 and 15) as in the Amazon sets of the papers
    (6 to 7, and 10 to 21), and strength is the least whole number with which popularity finds at most half of what can be
    learned from them (docs/results/cm3.md). No item is cold by default, as in those sets; with a tenth of them cold, over a
    third of what is held out is theirs.

    Args:
        num_users: U, at least 1.
        num_items: I, at least 8.
        modalities: number of features of each modality; None makes ``{"image": 64, "text": 32}``.
        interactions_per_user: their mean, at least 3, and at most half of the items that are not cold.
        factors: F, at least 1.
        strength: how much taste decides, at least 0; 0 leaves popularity alone.
        visible: share of the factors that a modality shows, in [0, 1]; 0 is noise alone.
        noise: standard deviation of the noise, where the signal has 1; at least 0, and above 0 with ``visible=0``.
        skew: exponent of the popularity, at least 0; 0 is none.
        cold: share of the items without training interaction, in [0, 0.5].
        missing: share of the items that lack a modality, in [0, 0.99], for each modality by itself.
        seed: number of the set, equal on every machine up to rounding.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> made = synthetic_interactions(num_users=50, num_items=60, cold=0.1, seed=0)
        >>> {name: values.shape for name, values in made.features.items()}
        {'image': (60, 64), 'text': (60, 32)}
        >>> bool(np.isin(made.items[made.labels == 0], np.flatnonzero(made.cold)).any())
        False
    """
    shapes = dict({"image": 64, "text": 32} if modalities is None else modalities)
    bounds: dict[str, tuple[float, float, float]] = {
        "num_users": (num_users, 1, np.inf),
        "num_items": (num_items, 8, np.inf),
        "factors": (factors, 1, np.inf),
        "strength": (strength, 0, np.inf),
        "visible": (visible, 0, 1),
        "noise": (noise, 0 if round(visible * factors) else 1e-6, np.inf),
        "skew": (skew, 0, np.inf),
        "cold": (cold, 0, 0.5),
        "missing": (missing, 0, 0.99),
        "the number of modalities": (len(shapes), 1, np.inf),
        **{f"modalities[{name!r}]": (width, 1, np.inf) for name, width in shapes.items()},
    }
    for name, (value, least, most) in bounds.items():
        _require(name, value, least, most)
    is_cold = np.zeros(num_items, dtype=bool)
    is_cold[_order((_COLD, seed), num_items)[: round(cold * num_items)]] = True
    warm_items, cold_items = np.flatnonzero(~is_cold), np.flatnonzero(is_cold)
    _require("interactions_per_user", interactions_per_user, 3, len(warm_items) / 2)
    tastes, contents = _directions((_USER, seed), num_users, factors), _directions((_ITEM, seed), num_items, factors)
    rank = np.empty(num_items)
    rank[_order((_POPULARITY, seed), num_items)] = np.arange(1, num_items + 1)
    bias = -skew * np.log(rank)
    draws = _uniform((_COUNT, seed), num_users)
    counts = np.floor(3 + draws * (2 * interactions_per_user - 5)).astype(np.int64)
    # A user takes cold items as often as their share says: the fraction of one at random.
    extra = np.floor(counts * cold / (1 - cold) + _uniform((_COUNT, seed, 1), num_users)).astype(np.int64)
    extra = np.minimum(extra, len(cold_items))
    users, items = _chosen(strength * tastes, contents[warm_items], bias[warm_items], counts, (_CHOICE, seed, 0))
    late_users, late = _chosen(strength * tastes, contents[cold_items], bias[cold_items], extra, (_CHOICE, seed, 1))
    halves = 1 + (random_words((_CHOICE, seed, 2), np.arange(len(late))) >> np.uint64(63)).astype(np.int64)
    labels = np.concatenate([random_user_split(users, seed=seed), halves])
    users, items = np.concatenate([users, late_users]), np.concatenate([warm_items[items], cold_items[late]])
    order = np.argsort(users, kind="stable")
    shown = _shown(list(shapes), factors, visible)
    features = {
        name: _features(contents[:, shown[name]], width, noise, missing, (seed, number))
        for number, (name, width) in enumerate(shapes.items())
    }
    return SyntheticInteractions(
        users=users[order],
        items=items[order],
        labels=labels[order],
        features=features,
        user_factors=tastes,
        item_factors=contents,
        strength=strength,
        bias=bias,
        cold=is_cold,
        visible=shown,
    )


def _shown(names: list[str], factors: int, visible: float) -> dict[str, list[int]]:
    count = round(visible * factors)
    return {
        name: sorted((number * factors // len(names) + each) % factors for each in range(count))
        for number, name in enumerate(names)
    }


def _features(
    contents: Floats, width: int, noise: float, missing: float, key: tuple[int, int]
) -> npt.NDArray[np.float32]:
    count, shown = contents.shape
    values = noise * _normal((_NOISE, *key), count, width)
    if shown:
        signal = contents @ _normal((_MIXING, *key), shown, width)
        values += signal / signal.std()
    values[_order((_MISSING, *key), count)[: round(missing * count)]] = 0.0
    return values.astype(np.float32)
