"""The made-up set: that it has the structure that it claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.interaction_files import rows_of
from zoo.data import MultimodalInteractionsDataModule, SyntheticInteractionsDataModule, synthetic_interactions
from zoo.data.synthetic_interactions import SyntheticInteractions
from zoo.errors import InputError
from zoo.interaction_graph import pair_lists
from zoo.metrics import FullRanking

OPTIONS = {"num_users": 400, "num_items": 200, "interactions_per_user": 12.0, "strength": 6.0, "cold": 0.1}


@pytest.fixture(scope="module")
def made() -> SyntheticInteractions:
    return synthetic_interactions(**OPTIONS, seed=1)


def test_sizes_and_splits(made):
    assert len(np.unique(made.users * 200 + made.items)) == len(made.users)  # no pair twice
    warm = ~made.cold[made.items]
    counts = np.bincount(made.users[warm], minlength=400)
    assert counts.min() >= 3
    assert abs(counts.mean() - 12) < 1
    assert made.cold.sum() == 20
    assert (made.labels[~warm] > 0).all()
    assert 0.05 < (~warm).mean() < 0.15
    for label, share in ((0, 0.72), (1, 0.12), (2, 0.16)):
        assert abs((made.labels == label).mean() - share) < 0.05


def test_seed_alone_decides(made):
    again = synthetic_interactions(**OPTIONS, seed=1)
    assert np.array_equal(made.items, again.items)
    assert np.array_equal(made.features["text"], again.features["text"])
    assert not np.array_equal(made.items, synthetic_interactions(**OPTIONS, seed=2).items[: len(made.items)])


def regression(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """R² of each column of the target by a linear regression on features."""
    inputs = np.column_stack([features, np.ones(len(features))])
    left = target - inputs @ np.linalg.lstsq(inputs, target, rcond=None)[0]
    return 1 - left.var(0) / target.var(0)


def test_each_modality_shows_its_share_of_the_factors():
    made = synthetic_interactions(
        num_users=5, num_items=1000, modalities={"a": 20, "b": 24, "c": 12}, factors=10, visible=0.4
    )
    assert made.visible == {"a": [0, 1, 2, 3], "b": [3, 4, 5, 6], "c": [6, 7, 8, 9]}
    for name, shown in made.visible.items():
        explained = regression(made.features[name], made.item_factors)
        hidden = np.setdiff1d(np.arange(10), shown)
        assert explained[shown].min() > 0.75
        assert explained[hidden].max() < 0.15


def test_taste_and_popularity_decide(made):
    affinity = made.user_factors @ made.item_factors.T
    assert affinity[made.users, made.items].mean() > 0.15 > 5 * abs(affinity.mean())
    by_popularity = synthetic_interactions(num_users=400, num_items=200, strength=0.0, skew=1.0, cold=0.0)
    counts = np.sort(np.bincount(by_popularity.items, minlength=200))[::-1]
    assert counts[:20].sum() > 3 * counts[100:120].sum()
    affinity = by_popularity.user_factors @ by_popularity.item_factors.T
    assert abs(affinity[by_popularity.users, by_popularity.items].mean()) < 0.02
    flat = synthetic_interactions(num_users=400, num_items=200, strength=0.0, skew=0.0, cold=0.0)
    assert np.bincount(flat.items, minlength=200).std() < 2 * np.bincount(flat.items).mean() ** 0.5


def found(users: np.ndarray, items: np.ndarray, data: SyntheticInteractionsDataModule) -> float:
    """Recall@20 on validation."""
    seen, held_out = (
        pair_lists(*data.interactions[split], num_rows=len(users), num_columns=len(items)) for split in ("train", "val")
    )
    metric = FullRanking(20)
    metric.update(torch.from_numpy(users).float(), torch.from_numpy(items).float(), held_out, seen)
    return float(metric.compute()["recall@20"])


def test_oracle_is_the_log_of_the_odds_and_finds_most():
    data = SyntheticInteractionsDataModule(num_users=300, num_items=150)
    popularity = np.bincount(data.interactions["train"][1], minlength=150)[:, None]
    assert data.made is not None
    made = data.made
    users, items = made.oracle()
    ranks = np.exp(made.bias / -0.7)
    assert np.allclose(np.sort(ranks), np.arange(1, 151))
    np.testing.assert_allclose(users @ items.T, 10 * made.user_factors @ made.item_factors.T - 0.7 * np.log(ranks))
    best = found(users, items, data)
    assert best > 2 * found(np.ones((300, 1)), popularity, data)
    assert best > found(made.user_factors, made.item_factors, data)  # taste alone
    assert best > found(np.ones((300, 1)), made.bias[:, None], data)  # popularity alone, though known exactly


def test_default_is_as_dense_as_the_sets_of_the_papers_and_has_no_cold_items():
    data = SyntheticInteractionsDataModule()
    train = data.interactions["train"]
    assert 5.7 <= train.shape[1] / data.num_users <= 7.0
    assert 9.7 <= train.shape[1] / data.num_items <= 21.4
    assert data.made is not None
    assert not data.made.cold.any()


def test_written_and_read_again(made, tmp_path):
    made.write(tmp_path)
    data = MultimodalInteractionsDataModule(str(tmp_path))
    direct = SyntheticInteractionsDataModule(**OPTIONS, data_seed=1)
    for split in ("train", "val", "test"):
        assert torch.equal(data.interactions[split], direct.interactions[split])
    for name, values in direct.features.items():
        assert torch.equal(data.features[name], values)
    assert direct.user_ids[:2] == ["u0", "u1"]
    assert direct.made is not None
    assert len(rows_of(direct, "test")) > 0


def test_missing_modalities():
    data = SyntheticInteractionsDataModule(num_users=10, num_items=100, missing=0.25, modalities={"a": 3, "b": 4})
    assert {name: int((~has).sum()) for name, has in data.present.items()} == {"a": 25, "b": 25}
    assert not torch.equal(data.present["a"], data.present["b"])
    assert torch.equal(data.features["a"].any(1), data.present["a"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_items": 7}, "num_items must be at least 8, got 7"),
        ({"cold": 0.6}, r"cold must be between 0 and 0.5, got 0.6"),
        ({"interactions_per_user": 201}, r"interactions_per_user must be between 3 and 200.0, got 201"),
        ({"visible": 0.0, "noise": 0.0}, r"noise must be at least 1e-06, got 0.0"),
        ({"modalities": {}}, r"the number of modalities must be at least 1, got 0"),
        ({"modalities": {"a": 0}}, r"modalities\['a'\] must be at least 1, got 0"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(InputError, match=match):
        synthetic_interactions(**options)
