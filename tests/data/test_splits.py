"""Counter-based random numbers and the fixed stratified splits made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.draws import random_words
from zoo.data.splits import stratified_split, stratified_subset
from zoo.errors import InputError

MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    """SplitMix64's first output for a state, restated with Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def word(key: tuple[int, ...], index: int) -> int:
    state = 0
    for part in key:
        state = splitmix(state ^ (part & MASK))
    return splitmix(state ^ index)


def test_golden():
    # The first two outputs for seed 1234567 in the published test vectors of SplitMix64 (rosettacode.org).
    words = random_words((), [1234567, 1234567 + 0x9E3779B97F4A7C15])
    assert words.tolist() == [6457827717110365317, 3203168211198807973]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3), st.lists(st.integers(0, 2**62), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_identity_words_are_splitmix_of_key_and_index(key, indices):
    assert random_words(key, indices).tolist() == [word(tuple(key), index) for index in indices]


def test_words_are_uniform_and_differ_between_keys():
    words = random_words((0, 0), np.arange(20000))
    assert len(np.unique(words)) == 20000
    for bits in (0, 16, 32, 48):
        counts = np.bincount(((words >> np.uint64(bits)) % np.uint64(9)).astype(int), minlength=9)
        assert abs(counts - 20000 / 9).max() < 5 * np.sqrt(20000 / 9)
    assert not np.isin(random_words((0, 1), np.arange(20000)), words).any()
    assert not np.isin(random_words((1, 0), np.arange(20000)), words).any()


def test_identity_split_takes_the_first_of_each_class_in_the_order_of_the_words():
    labels = [2, 0, 1, 0, 2, 2, 0, 0, 1, 2, 0, 0, 1, 2, 0, 0]
    expected = {"val": [], "test": [], "rest": []}
    for label in (0, 1, 2):
        members = sorted((i for i, x in enumerate(labels) if x == label), key=lambda i: word((1, 5), i))
        first, second = int(0.2 * len(members) + 0.5), int(0.3 * len(members) + 0.5)
        expected["val"] += members[:first]
        expected["test"] += members[first : first + second]
        expected["rest"] += members[first + second :]
    parts = stratified_split(labels, {"val_share": 0.2, "test_share": 0.3}, seed=5)
    assert [part.tolist() for part in parts] == [sorted(part) for part in expected.values()]


@given(
    st.lists(st.integers(0, 4), min_size=40, max_size=200),
    st.floats(0, 0.3),
    st.floats(0, 0.3),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_properties_of_splits(labels, first, second, seed):
    labels = np.asarray(labels + [0, 1, 2, 3, 4] * 6)
    parts = stratified_split(labels, {"val_share": first, "test_share": second}, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for label in range(5):
        size = int((labels == label).sum())
        for part, share in zip(parts, (first, second), strict=False):
            assert abs((labels[part] == label).sum() - share * size) <= 0.5 + 1e-9
    assert all((np.diff(part) > 0).all() for part in parts)


def test_split_uses_and_changes_no_random_state():
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = stratified_split([0] * 50, {"val_share": 0.5}, seed=0)
    torch.manual_seed(123)
    torch.rand(3)
    torch.set_rng_state(before)
    assert (np.random.get_state()[1] == numpys).all()  # noqa: NPY002
    assert np.array_equal(first[0], stratified_split([0] * 50, {"val_share": 0.5}, seed=0)[0])
    assert not np.array_equal(first[0], stratified_split([0] * 50, {"val_share": 0.5}, seed=1)[0])


@given(st.lists(st.integers(0, 3), min_size=10, max_size=100), st.data())
@settings(deadline=None, max_examples=60)
def test_properties_of_subsets(labels, data):
    labels = np.asarray([*labels, 0, 1, 2, 3])
    large = data.draw(st.integers(5, len(labels)))
    small = data.draw(st.integers(4, large))
    chosen = stratified_subset(labels, large, seed=3)
    assert len(np.unique(chosen)) == large
    assert set(labels[chosen]) == {0, 1, 2, 3}
    assert set(stratified_subset(labels, small, seed=3)) <= set(chosen)


def test_subset_is_proportional():
    labels = np.repeat([0, 1, 2], [100, 200, 700])
    assert np.bincount(labels[stratified_subset(labels, 50, seed=0)]).tolist() == [5, 10, 35]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"val_share": -0.1}, "val_share must be at least 0 and below 1, got -0.1"),
        ({"val_share": 1.0}, "val_share must be at least 0"),
        ({"val_share": float("nan")}, "val_share must be at least 0"),
        ({"val_share": 0.5, "test_share": 0.5}, r"val_share \+ test_share must be below 1"),
        ({"val_share": 0.8}, "leaves no sample of class 1 to train on: the class has 2"),
    ],
)
def test_bad_shares(shares, message):
    with pytest.raises(InputError, match=message):
        stratified_split([0] * 10 + [1] * 2, shares, seed=0)


@pytest.mark.parametrize("count", [1, 13, -1])
def test_bad_subset_size(count):
    with pytest.raises(InputError, match=rf"between the number of classes \(2\) .* \(12\), got {count}"):
        stratified_subset([0] * 10 + [1] * 2, count, seed=0)
