"""The first few images of a loader and their classes, kept while a run goes over it: the same ones at every visit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.errors import InputError

__all__ = ["FirstImages", "LabelledImages", "fingerprint", "labelled"]


class LabelledImages(NamedTuple):
    """Images and what is known of them.

    Attributes:
        images: (B, C, H, W).
        labels: classes (B,), or None.
    """

    images: Tensor
    labels: Tensor | None


class FirstImages:
    """Takes the first images of the batches that it is shown, until it has enough or is closed.

    Images of another size than the first ones are left out. What is kept are copies on the CPU.

    Args:
        count: how many to take.
        batch_to_input: batch -> images; the batch itself, or its first item, if omitted.
        batch_to_target: batch -> classes (B,), or (B, K) of which the largest counts; the second item, if that looks like
            one of these, if omitted.

    Example:
        >>> first = FirstImages(3)
        >>> for value in (0.0, 1.0, 2.0):
        ...     first.show((torch.full((2, 1, 4, 4), value), torch.tensor([5, 6])))
        >>> kept = first.close()
        >>> kept.images[:, 0, 0, 0].tolist(), kept.labels.tolist()
        ([0.0, 0.0, 1.0], [5, 6, 5])
    """

    def __init__(
        self,
        count: int,
        batch_to_input: Callable[[Any], Tensor] | None = None,
        batch_to_target: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.count = count
        self.batch_to_input = batch_to_input
        self.batch_to_target = batch_to_target
        self._parts: list[LabelledImages] = []

    def show(self, batch: Any) -> None:
        """Copy what is still missing.

        Args:
            batch: of a loader.

        Raises:
            InputError: the batch has no images, or labels that are none.
        """
        missing = self.count - sum(len(part.images) for part in self._parts)
        if missing < 1:
            return
        images, labels = self._split(batch)
        if self._parts and images.shape[1:] != self._parts[0].images.shape[1:]:
            return
        kept = [None if one is None else one[:missing].detach().to("cpu", copy=True) for one in (images, labels)]
        assert kept[0] is not None
        self._parts.append(LabelledImages(kept[0], kept[1]))

    def close(self) -> LabelledImages | None:
        """Return what was kept, None if that is nothing, and begin anew."""
        parts, self._parts = self._parts, []
        if not parts:
            return None
        labels = [part.labels for part in parts if part.labels is not None]
        together = torch.cat(labels) if len(labels) == len(parts) else None
        return LabelledImages(torch.cat([part.images for part in parts]), together)

    def _split(self, batch: Any) -> LabelledImages:
        several = isinstance(batch, list | tuple)
        images = batch
        if self.batch_to_input is not None:
            images = self.batch_to_input(batch)
        elif several and batch:
            images = batch[0]
        if not isinstance(images, Tensor) or images.ndim != 4:
            told = str(tuple(images.shape)) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(
                f"a batch must be images (B, C, H, W) or begin with them, got {told}: give batch_to_input=…, a function of "
                "a batch"
            )
        if self.batch_to_target is not None:
            return labelled(images, self.batch_to_target(batch))
        second = batch[1] if several and len(batch) > 1 and self.batch_to_input is None else None
        return labelled(images, second if _are_classes(second, len(images)) else None)


def labelled(images: Tensor, labels: Tensor | Sequence[int] | None) -> LabelledImages:
    """Return images with their classes.

    Args:
        images: (B, C, H, W).
        labels: classes (B,), or (B, K) in floating point of which the largest counts, or None.

    Raises:
        InputError: labels of another shape or type.
    """
    if labels is None:
        return LabelledImages(images, None)
    classes = torch.as_tensor(labels)
    if not _are_classes(classes, len(images)):
        raise InputError(
            f"labels must be whole numbers ({len(images)},) or ({len(images)}, K) in floating point, got shape "
            f"{tuple(classes.shape)} of {classes.dtype}"
        )
    return LabelledImages(images, classes.argmax(1) if classes.ndim == 2 else classes)


def fingerprint(images: Tensor) -> str:
    """Return by what images are known again, a SHA-256 of their values in float32.

    Args:
        images: on the CPU.
    """
    return hashlib.sha256(images.float().contiguous().numpy().tobytes()).hexdigest()


def _are_classes(labels: Any, count: int) -> bool:
    if not isinstance(labels, Tensor) or labels.ndim not in (1, 2) or len(labels) != count:
        return False
    return labels.is_floating_point() == (labels.ndim == 2) and not labels.is_complex()
