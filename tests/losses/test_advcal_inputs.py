"""Input that the objectives of adversarial calibration refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.errors import InputError
from zoo.losses.advcal import (
    centre_cross_entropy,
    centre_divergence,
    clean_adversarial_info_nce,
    clean_adversarial_l2,
)

EYE = torch.eye(3)
BAD_CENTRES: list[tuple[dict[str, Any], str]] = [
    ({"centres": torch.eye(4)}, r"centres must be as wide as the embeddings, 3, got 4"),
    ({"centres": torch.zeros(3)}, r"centres must be \(classes, width\) or \(classes, centres, width\)"),
    ({"centres": torch.zeros(0, 3)}, r"none of them 0, got shape \(0, 3\)"),
    (
        {"centres": torch.ones(3, 3, device="meta")},
        r"centres must be on the device of the embeddings, got meta and cpu",
    ),
    ({"mask": torch.ones(3, 2, dtype=torch.bool)}, r"mask must be booleans \(classes, centres\)"),
    ({"centres": torch.ones(2, 2, 3), "mask": torch.ones(2, 2)}, r"mask must be booleans .* of torch.float32"),
    (
        {"centres": torch.ones(2, 2, 3), "mask": torch.tensor([[True, True], [False, False]])},
        r"mask must leave every class a centre, and class 1 has none",
    ),
    ({"pool": "mean_center"}, r"pool must be one of .*, got 'mean_center'. Did you mean mean_centre"),
    ({"sharpness": 0.0}, r"sharpness must be positive and finite, got 0.0"),
    ({"scale": -1.0}, r"scale must be finite and not negative, got -1.0"),
    ({"labels": torch.tensor([0, 1, 3])}, r"labels must be labels in 0 … 2 \(3 classes\), found 3"),
    ({"embeddings": torch.zeros(3)}, r"embeddings must have two dimensions"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CENTRES)
def test_bad_centres(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"embeddings": EYE, "centres": EYE, "labels": torch.arange(3)} | change
    with pytest.raises(InputError, match=message):
        centre_cross_entropy(given.pop("embeddings"), given.pop("centres"), given.pop("labels"), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be positive and finite, got 0.0"),
        ({"chunk_size": 0}, r"chunk_size must be at least 1"),
        ({"chunk_size": 0, "labels": torch.arange(3)}, r"chunk_size must be at least 1"),
        (
            {"labels": torch.ones(3)},
            r"labels must be one integer a sample, shape \(3,\), got shape \(3,\) of torch.float32",
        ),
        ({"labels": torch.arange(4)}, r"labels must be one integer a sample, shape \(3,\), got shape \(4,\)"),
    ],
)
def test_bad_info_nce(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        clean_adversarial_info_nce(EYE, EYE, **options)


def test_bad_sides() -> None:
    for loss in (clean_adversarial_l2, clean_adversarial_info_nce, lambda x, y: centre_divergence(x, y, EYE)):
        with pytest.raises(InputError, match=r"clean must have the shape of attacked, got \(2, 3\) and \(3, 3\)"):
            loss(EYE, EYE[:2])
        with pytest.raises(InputError, match=r"attacked must be floating point"):
            loss(EYE.long(), EYE.long())
