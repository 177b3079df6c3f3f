"""The in-memory data set: windows, flips and normalisation, by the batch."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zoo.data.draws import random_words
from zoo.data.loading import Draw
from zoo.data.tensors import ImageTensors, cut_windows

MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(5, 3, 6, 4), (1, 1, 3, 7)])
@pytest.mark.parametrize("margin", [0, 1, 3])
def test_identity_windows_are_slices_of_the_padded_image(dtype, shape, margin):
    images = torch.randint(1, 250, shape).to(dtype)
    rows, down, right = torch.randint(shape[0], (9,)), *torch.randint(2 * margin + 1, (2, 9))
    padded = F.pad(images, (margin,) * 4)
    slices = [
        padded[n, :, a : a + shape[2], b : b + shape[3]]
        for n, a, b in zip(rows.tolist(), down.tolist(), right.tolist(), strict=True)
    ]
    assert torch.equal(cut_windows(images, rows, down, right, margin=margin), torch.stack(slices))


@pytest.mark.parametrize(("margin", "step", "flip"), [(4, 1, 0.5), (4, 4, 0.0), (0, 1, 1.0), (2, 2, 0.3)])
def test_identity_augmentation_by_the_sample(margin, step, flip):
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    data = ImageTensors(
        images, torch.arange(20), range(3, 20), mean=MEAN, std=STD, margin=margin, step=step, flip=flip, seed=11
    )
    draws = [Draw(index, 6) for index in (4, 0, 16, 2, 9, 1)]
    got, labels = data.__getitems__(draws)
    assert labels.tolist() == [index + 3 for index in draws]
    for view, draw, bits in zip(got, draws, random_words((11, 6), draws).tolist(), strict=True):
        image = images[draw + 3].double()
        if (bits >> 32) / 2**32 < flip:
            image = image.flip(-1)
        places = 2 * margin // step + 1
        down, right = bits % 2**16 % places * step, bits // 2**16 % 2**16 % places * step
        image = F.pad(image, (margin,) * 4)[:, down : down + 8, right : right + 8] / 255
        expected = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(view.double(), expected.double(), rtol=0, atol=2e-6)


def test_every_shift_and_flip_occurs_and_depends_on_seed_and_epoch_only():
    image = torch.arange(64.0).view(1, 1, 8, 8) + 1
    data = ImageTensors(image, torch.zeros(1).long(), [0] * 2000, mean=[0.0], std=[1.0], margin=1, flip=0.5)
    views, _ = data.__getitems__(list(range(2000)))
    kinds, counts = torch.unique(views.flatten(1), dim=0, return_counts=True)
    assert len(kinds) == 18
    assert counts.min() > 60
    assert torch.equal(views[:7], data.__getitems__(list(range(7)))[0])  # neither the batch nor an earlier call matters
    assert torch.equal(views[5], data[5][0])
    assert not torch.equal(views, data.__getitems__([Draw(index, 1) for index in range(2000)])[0])
    data.seed = 1
    assert not torch.equal(views, data.__getitems__(list(range(2000)))[0])


def test_stored_images_are_not_changed():
    images = torch.rand(3, 1, 4, 4)
    before = images.clone()
    for flip in (0.0, 1.0):
        data = ImageTensors(images, torch.zeros(3).long(), [0, 1, 2], mean=[0.5], std=[0.5], flip=flip)
        data.__getitems__([0, 1, 2])
    assert torch.equal(images, before)


def test_pickles():
    data = ImageTensors(torch.rand(3, 1, 4, 4), torch.arange(3), np.array([2, 0]), mean=[0.5], std=[0.5], margin=1)
    copy = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(a, b) for a, b in zip(data.__getitems__([0, 1]), copy.__getitems__([0, 1]), strict=True))
