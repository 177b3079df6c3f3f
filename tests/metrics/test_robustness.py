"""RobustAccuracy: counts of samples that are right under every attack."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import InputError
from zoo.metrics.robustness import RobustAccuracy


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 3))
def test_worst_case_a_sample_at_a_time(sizes: list[int], attacks: int) -> None:
    metric = RobustAccuracy(["clean", "attacked", "never"])
    right, robust, total = 0, 0, 0
    for size in sizes:
        clean, under = torch.rand(size) < 0.8, torch.rand(attacks, size) < 0.7
        metric.update({"clean": clean, "attacked": under})
        for sample in range(size):
            right += bool(clean[sample])
            robust += all(bool(one[sample]) for one in under)
            total += 1
    assert metric.samples == {"clean": total, "attacked": total, "never": 0}
    found = metric.compute()
    assert found["never"].isnan()
    if total:
        assert found["clean"] == torch.tensor(right / total)
        assert found["attacked"] == torch.tensor(robust / total)


def test_counts_stay_whole_numbers() -> None:
    metric = RobustAccuracy(["a"]).half()
    metric.set_dtype(torch.bfloat16)
    with torch.inference_mode():
        metric.reset()
    for _ in range(3):
        metric.update({"a": torch.ones(1000, dtype=torch.bool)})
    assert metric.samples == {"a": 3000}
    assert metric.compute()["a"] == 1
    assert pickle.loads(pickle.dumps(metric)).compute()["a"] == 1
    metric.reset()
    assert metric.samples == {"a": 0}


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: RobustAccuracy([]), "conditions must be a list of different names"),
    (lambda: RobustAccuracy("clean"), "conditions must be a list"),
    (lambda: RobustAccuracy(["a", "a"]), "different names"),
    (
        lambda: RobustAccuracy(["clean"]).update({"claen": torch.ones(1).bool()}),
        "no condition 'claen'. Did you mean clean",
    ),
    (lambda: RobustAccuracy(["a"]).update({"a": torch.ones(2)}), "must be booleans .* got torch.float32 of shape"),
    (lambda: RobustAccuracy(["a"]).update({"a": torch.ones(1, 1, 1).bool()}), r"got torch.bool of shape \(1, 1, 1\)"),
]


@pytest.mark.parametrize(("call", "match"), BAD)
def test_bad_arguments(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        call()
