"""k-core and split rules against restatements in plain Python, and the draw of negatives."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from zoo.data.interaction_splits import k_core, leave_one_out_split, random_user_split, temporal_split
from zoo.data.negatives import NegativeSampler
from zoo.errors import InputError

PAIRS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=60)


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    users, items = np.array(pairs, dtype=np.int64).T
    return users, items


def mix(state: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


@settings(deadline=None, max_examples=50)
@given(PAIRS, st.integers(0, 4))
def test_k_core_equals_removal_one_by_one(pairs, k):
    left = list(enumerate(pairs))
    while True:
        users, items = (Counter(pair[part] for _, pair in left) for part in (0, 1))
        poor = [entry for entry in left if users[entry[1][0]] < k or items[entry[1][1]] < k]
        if not poor:
            break
        left.remove(poor[0])
    assert k_core(*columns(pairs), k).tolist() == [row for row, _ in left]


@pytest.mark.parametrize("n", [*range(1, 31), 55, 100, 1005])
def test_random_split_has_the_sizes_of_the_rule(n):
    if n < 3:
        expected = [n, 0, 0]
    elif n < 10:
        expected = [n - 2, 1, 1]
    else:
        h = int(0.2 * n)
        expected = [n - h, h // 2, h - h // 2]
    users = np.concatenate([np.full(n, 1), np.zeros(3, dtype=np.int64)])
    labels = random_user_split(users, seed=0)
    assert np.bincount(labels[:n], minlength=3).tolist() == expected
    assert sorted(labels[n:]) == [0, 1, 2]


def test_random_split_is_random_for_each_user_and_stays_the_same():
    users = np.arange(3000) % 300  # ten each, their rows far apart
    labels = random_user_split(users, seed=0)
    again = random_user_split(users, seed=0)
    assert np.array_equal(labels, again)
    for user in (0, 1, 299):  # the same for ever: by the words of SplitMix64 with the key (5, seed)
        *_, before, last = sorted(range(user, 3000, 300), key=lambda row: mix(mix(mix(5) ^ 0) ^ row))
        assert (labels[before], labels[last]) == (1, 2)
    assert 0.1 < (random_user_split(users, seed=1) != labels).mean() < 0.5
    # Each of a user's ten places is held out equally often: 300 users, one test item each.
    places = np.arange(3000) // 300
    assert chisquare(np.bincount(places[labels == 2], minlength=10)).pvalue > 1e-3


@settings(deadline=None, max_examples=30)
@given(PAIRS, st.randoms(use_true_random=False))
def test_leave_one_out_equals_sorting_each_user(pairs, random):
    users, _ = columns(pairs)
    times = [random.randint(0, 5) for _ in pairs]
    histories = defaultdict(list)
    for row, user in enumerate(users.tolist()):
        histories[user].append((times[row], row))
    expected = [0] * len(pairs)
    for history in histories.values():
        if len(history) >= 3:
            (_, before), (_, last) = sorted(history)[-2:]
            expected[before], expected[last] = 1, 2
    assert leave_one_out_split(users, np.array(times, dtype=np.float64)).tolist() == expected
    assert leave_one_out_split(users, None).tolist() == leave_one_out_split(users, np.arange(len(users)) * 1.0).tolist()


def test_temporal_split_keeps_moments_together():
    times = np.array([5.0, 1, 2, 2, 3, 9, 9, 4, 1, 8])
    labels = temporal_split(times)
    assert labels.tolist() == [0, 0, 0, 0, 0, 2, 2, 0, 0, 0]  # both of 9 are in the last tenth
    assert temporal_split(times, val_share=0.3).tolist() == [1, 0, 0, 0, 0, 2, 2, 0, 0, 1]
    for options in ({}, {"val_share": 0.2, "test_share": 0.0}):
        labels = temporal_split(times, **options)
        for earlier in (0, 1):
            later = times[labels > earlier]
            assert not len(later) or times[labels <= earlier].max() < later.min()


def test_bad_rules():
    with pytest.raises(InputError, match="split='temporal' needs a column of times"):
        temporal_split(None)
    with pytest.raises(InputError, match="leaves nothing to train on"):
        temporal_split(np.ones(10))
    with pytest.raises(InputError, match=r"below 1 in sum, got 0.5, 0.5"):
        temporal_split(np.ones(10), val_share=0.5, test_share=0.5)
    with pytest.raises(InputError, match="k_core must be at least 0, got -1"):
        k_core(np.zeros(1, dtype=int), np.zeros(1, dtype=int), -1)


@settings(deadline=None, max_examples=50)
@given(PAIRS, st.integers(0, 3))
def test_negatives_are_of_training_and_not_the_users(pairs, epoch):
    users, items = columns(pairs)
    own = defaultdict(set)
    for user, item in pairs:
        own[user].add(item)
    known = set(items.tolist())
    if any(each == known for each in own.values()):
        with pytest.raises(InputError, match="have interacted with all"):
            NegativeSampler(users, items)
        return
    drawn = NegativeSampler(users, items).draw(users, np.arange(len(users)), epoch=epoch)
    assert all(item in known - own[user] for user, item in zip(users.tolist(), drawn.tolist(), strict=True))


def test_negatives_are_uniform_and_a_function_of_seed_epoch_and_position():
    generator = np.random.default_rng(0)
    users, items = generator.integers(0, 20, 200), generator.integers(0, 30, 200) * 3
    users[:20], items[:20] = 7, np.unique(items)[:20]  # one who has most
    sampler = NegativeSampler(users, items, seed=1)
    for user in (7, 11):
        free = np.setdiff1d(items, items[users == user])
        drawn = sampler.draw(np.full(6000, user), np.arange(6000), epoch=0)
        found, counts = np.unique(drawn, return_counts=True)
        assert found.tolist() == free.tolist()
        assert chisquare(counts).pvalue > 1e-3
    rows = np.arange(200)
    first = sampler.draw(users, rows, epoch=0)
    assert np.array_equal(sampler.draw(users[::-1], rows[::-1], epoch=0), first[::-1])
    assert (sampler.draw(users, rows, epoch=1) != first).mean() > 0.8
    assert (NegativeSampler(users, items, seed=2).draw(users, rows, epoch=0) != first).mean() > 0.8
