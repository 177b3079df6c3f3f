"""What a text-to-image module samples at the end of an evaluation: the captions, the judgement and the card's figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.errors import InputError
from zoo.generation_evaluation import GenerationEvaluation
from zoo.image_grid import image_grid
from zoo.towers import Tower

__all__ = ["PromptedSamples"]

_DRAWN = 20  # images of the card's figure


class PromptedSamples:
    """The first captions of an evaluation split, images that are sampled for them, and what a classifier says of those.

    Args:
        classifier: the frozen judge; see `GenerationEvaluation`.
        max_samples: captions of a process, at most; 0 for none.

    Attributes:
        evaluation: the counts; a LightningModule holds it as an attribute of its own, so that it moves with it.
    """

    def __init__(self, classifier: Tower, max_samples: int) -> None:
        self.evaluation = GenerationEvaluation(classifier)
        self.max_samples = max_samples
        self._prompts: list[tuple[Any, Tensor]] = []
        self._drawn: dict[str, Any] | None = None

    def reset(self) -> None:
        """Begin an evaluation."""
        self._prompts = []
        self.evaluation.reset()

    def take(self, batch: Mapping[str, Any]) -> None:
        """Count the real images of a batch, and remember its captions while there are too few.

        Args:
            batch: with "image", "text" and "label".

        Raises:
            InputError: the batch does not say which class is asked for.
        """
        if not self.max_samples:
            return
        missing = sorted({"image", "text", "label"} - batch.keys())
        if missing:
            raise InputError(
                f'a classifier judges images by "image", "text" and "label" of a batch, which has no {", ".join(missing)}; '
                "leave the classifier out"
            )
        self.evaluation.update_real(batch["image"])
        room = self.max_samples - sum(len(asked) for _, asked in self._prompts)
        if room > 0:
            self._prompts.append((batch["text"][:room], batch["label"][:room]))

    def judge(
        self, draw: Callable[[Any], Tensor], also: Callable[[Any], Mapping[str, Tensor]] = lambda _: {}
    ) -> dict[str, Tensor]:
        """Sample, and return what the samples are worth, over all processes.

        Args:
            draw: texts -> images (B, C, H, W).
            also: the first texts -> further images of them for the figure, by what it calls them.

        Returns:
            See `GenerationEvaluation.compute`; empty if no text was taken.
        """
        if not self._prompts:
            return {}
        parts, asked = zip(*self._prompts, strict=True)
        text = torch.cat(parts) if isinstance(parts[0], Tensor) else [one for part in parts for one in part]
        labels = torch.cat(asked)
        images = draw(text)
        seen = self.evaluation.update(images, labels)
        first = slice(0, _DRAWN)
        drawn = {"": images[first], **also(text[first])}
        self._drawn = {"asked": labels[first].tolist(), "seen": seen[first].tolist(), "images": drawn}
        return self.evaluation.compute()

    def figure(self, *, names: Sequence[str] | None = None, **units: Any) -> bytes | None:
        """Return the last samples as a PNG file, or None if there are none.

        Args:
            names: names of the classes.
            **units: ``mean`` and ``std`` of the images; see `zoo.overlays.displayed`.
        """
        if self._drawn is None:
            return None
        drawn: dict[str, Tensor] = self._drawn["images"]
        titles: list[str] = []
        for kind in drawn:
            for asked, seen in zip(self._drawn["asked"], self._drawn["seen"], strict=True):
                one, other = (str(label) if names is None else str(names[label]) for label in (asked, seen))
                titles.append(f"{one} ({kind})" if kind else one if asked == seen else f"{one} (seen: {other})")
        return image_grid(torch.cat([images.detach().cpu() for images in drawn.values()]), titles, **units)
