"""The first images of a loader, their classes, and by what they are known again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.first_images import FirstImages, fingerprint, labelled


def batch(start: int, count: int = 2, side: int = 4) -> tuple[Tensor, Tensor]:
    values = torch.arange(start, start + count)
    return values.float().view(-1, 1, 1, 1).expand(-1, 3, side, side).clone(), values


def kept(*batches: Any, count: int = 3, **options: Any) -> tuple[list[float], list[int] | None]:
    first = FirstImages(count, **options)
    for one in batches:
        first.show(one)
    found = first.close()
    assert found is not None
    assert first.close() is None
    return found.images[:, 0, 0, 0].tolist(), None if found.labels is None else found.labels.tolist()


def test_first_of_several_batches() -> None:
    assert kept(batch(0), batch(2), batch(4)) == ([0, 1, 2], [0, 1, 2])
    assert kept(batch(0), count=9) == ([0, 1], [0, 1])
    assert kept(batch(0), batch(2, side=5), batch(4)) == ([0, 1, 4], [0, 1, 4])


def test_kept_are_copies() -> None:
    images, labels = batch(0)
    first = FirstImages(2)
    first.show([images, labels])
    images.zero_()
    labels.zero_()
    found = first.close()
    assert found is not None
    assert found.images[1].min() == 1
    assert found.labels is not None
    assert found.labels[1] == 1


@pytest.mark.parametrize(
    ("second", "labels"),
    [
        (torch.tensor([3, 4]), [3, 4]),
        (torch.tensor([[0.1, 0.9], [0.8, 0.2]]), [1, 0]),
        (torch.tensor([0.5, 0.5]), None),
        (torch.zeros(2, 4, 4, dtype=torch.int64), None),
        (torch.tensor([[1, 0], [0, 1]]), None),
        (["a", "b"], None),
    ],
)
def test_labels_of_a_batch(second: Any, labels: list[int] | None) -> None:
    assert kept((batch(0)[0], second)) == ([0, 1], labels)


def test_batches_of_other_kinds() -> None:
    images, labels = batch(0)
    assert kept(images) == ([0, 1], None)
    given: dict[str, Any] = {"x": images, "y": labels}
    assert kept(given, batch_to_input=lambda one: one["x"]) == ([0, 1], None)
    both: dict[str, Any] = {"batch_to_input": lambda one: one["x"], "batch_to_target": lambda one: one["y"]}
    assert kept(given, **both) == ([0, 1], [0, 1])
    assert kept((images, labels), (images, "none")) == ([0, 1, 0], None)


def test_fingerprint_knows_values_and_not_memory() -> None:
    images = batch(0)[0]
    assert fingerprint(images) == fingerprint(images.transpose(2, 3).contiguous().transpose(2, 3))
    assert fingerprint(images.to(torch.bfloat16)) == fingerprint(images)  # small whole numbers are the same in both
    assert fingerprint(images) != fingerprint(images.flip(0))


@pytest.mark.parametrize("bad", [{"x": 1}, [], torch.zeros(2, 4, 4), (torch.zeros(2, 3), 1), "text"])
def test_bad_batches(bad: Any) -> None:
    with pytest.raises(InputError, match=r"a batch must be images .* give batch_to_input="):
        FirstImages(2).show(bad)


@pytest.mark.parametrize("labels", [[1], [0.5, 0.5], torch.zeros(2, 2, 2), torch.zeros(2, 3, dtype=torch.int64)])
def test_bad_labels(labels: Any) -> None:
    with pytest.raises(InputError, match="labels must be whole numbers"):
        labelled(batch(0)[0], labels)
