"""The digits as images and as shadows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.data import DigitsDataModule
from zoo.data.digits_modalities import DigitsModalitiesDataModule, shadows
from zoo.errors import InputError


def test_shadows_are_sums_along_lines() -> None:
    images = torch.rand(3, 1, 8, 8)
    found = shadows(images, 4)
    assert found.shape == (3, 1, 4, 8)
    torch.testing.assert_close(found[:, :, 0], images.sum(2) / 8)
    torch.testing.assert_close(found[:, :, 2], images.sum(3) / 8)
    # Where nothing lies in the corners, every side sees all of the ink.
    middle = torch.zeros(1, 1, 8, 8)
    middle[..., 3:5, 2:6] = torch.rand(2, 4)
    torch.testing.assert_close(shadows(middle, 7).sum(3) * 8, middle.sum().expand(1, 1, 7))


def test_one_pixel_by_hand() -> None:
    """At 45 degrees the corner (0, 7) of the middle 4 x 4 projects half its way between two bins."""
    image = torch.zeros(1, 1, 2, 2)
    image[0, 0, 0, 0] = 1.0
    # x = y = -1/2 lies at -sqrt(1/2), 0.7071 - 0.5 = 0.2071 left of the first bin: weight 1 - 0.2071 there, halved.
    assert shadows(image, 4)[0, 0, 1].tolist() == pytest.approx([(1 - 0.20710678) / 2, 0.0], abs=1e-6)


def test_batches_are_those_of_the_digits() -> None:
    ours, plain = DigitsModalitiesDataModule(batch_size=50), DigitsDataModule(batch_size=50)
    for name in ("train_dataloader", "train_eval_dataloader", "val_dataloader", "test_dataloader"):
        batch: Any = next(iter(getattr(ours, name)()))
        images, labels = next(iter(getattr(plain, name)()))
        assert torch.equal(batch["image"], images)
        assert torch.equal(batch["label"], labels)
        pixels = images * ours.std[0] + ours.mean[0]
        torch.testing.assert_close(batch["profile"][:, :, 0], pixels.sum(2) / 8, rtol=1e-4, atol=1e-5)
        for modality, (low, high) in ours.valid_range.items():
            assert low - 1e-6 <= float(batch[modality].min()) <= float(batch[modality].max()) <= high + 1e-6
    assert ours.splits.test is not None
    assert ours.splits.test[3]["profile"].shape == (1, 8, 8)


def test_bad_angles() -> None:
    with pytest.raises(InputError, match="angles must be at least 1, got 0"):
        DigitsModalitiesDataModule(angles=0)
