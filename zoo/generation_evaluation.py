"""What generated images are worth: do they show what was asked for, and are they spread like real ones?

Both are judged by a frozen classifier that the generator was not trained with: the share of images that it takes for the
class that was asked for, and the Fréchet distance of its features (Heusel et al.: GANs Trained by a Two Time-Scale Update
Rule, NeurIPS 2017, arXiv 1706.08500) by torchmetrics, with the classifier's features in the place of Inception's. Such a
distance compares with others by the same classifier and the same numbers of images alone: few images make it larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.image.fid import FrechetInceptionDistance

from zoo.errors import InputError
from zoo.flow_sampling import sample
from zoo.losses.contracts import require_labels
from zoo.towers import Tower

__all__ = ["GenerationEvaluation", "sample_prompts"]


class _Given(nn.Module):
    """Stands for Inception where the features are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """Return the features (B, D)."""
        return features


class GenerationEvaluation(nn.Module):
    """Counts over generated and real images; a LightningModule may hold it as an attribute.

    It has no parameters and adds nothing to a state dict. Under several processes `compute` is over the images of all.

    Args:
        classifier: a frozen tower that reads images in the units of the data module. It stays where it is and is no part of
            this module: whoever holds both moves it (`ZooModule.attach_frozen`).

    Example:
        >>> from zoo import towers
        >>> evaluation = GenerationEvaluation(towers.create("zoo/resnet8", frozen=True, num_classes=10))
        >>> evaluation.update_real(torch.rand(8, 3, 8, 8))
        >>> seen = evaluation.update(torch.rand(8, 3, 8, 8), torch.arange(8))
        >>> sorted(evaluation.compute())
        ['alignment', 'frechet']
    """

    def __init__(self, classifier: Tower) -> None:
        super().__init__()
        self._classifier = (classifier,)  # in a tuple, so that its weights are not ours
        self.accuracy = MulticlassAccuracy(classifier.num_classes, average="micro")
        self.frechet = FrechetInceptionDistance(_Given(classifier.dim))

    @property
    def classifier(self) -> Tower:
        """The frozen tower that judges."""
        return self._classifier[0]

    @torch.no_grad()
    def update(self, images: Tensor, asked: Tensor) -> Tensor:
        """Count generated images.

        Args:
            images: (B, C, H, W).
            asked: the class that was asked for in each, (B,), int64.

        Returns:
            The class that the classifier sees in each, (B,).

        Raises:
            InputError: the classes are not B whole numbers of the classifier's.
        """
        require_labels("asked", asked, rows=len(images), classes=self.classifier.num_classes)
        features, logits = self._look(images)
        seen = logits.argmax(1)
        self.accuracy.update(seen, asked.to(seen.device))
        self.frechet.update(features, real=False)
        return seen

    @torch.no_grad()
    def update_real(self, images: Tensor) -> None:
        """Count real images (B, C, H, W), with which the generated ones are compared."""
        self.frechet.update(self._look(images)[0], real=True)

    def compute(self) -> dict[str, Tensor]:
        """Return ``alignment``, 0 … 1, and ``frechet``, 0 or more, which takes two real and two generated images at least.

        Raises:
            InputError: no generated image was counted.
        """
        if not self.accuracy.update_called:
            raise InputError("no generated image was counted: update(images, asked) comes first")
        found = {"alignment": self.accuracy.compute()}
        counts = (self.frechet.real_features_num_samples, self.frechet.fake_features_num_samples)
        if all(int(count) > 1 for count in counts):
            found["frechet"] = self.frechet.compute()
        return found

    def reset(self) -> None:
        """Begin anew."""
        self.accuracy.reset()
        self.frechet.reset()

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        place = next(self.classifier.parameters()).device
        features, logits = self.classifier.features_and_logits(images.to(place))
        home = self.accuracy.device
        return features.float().to(home), logits.float().to(home)


def sample_prompts(
    backbone: Any,
    text: Tensor | Sequence[str],
    *,
    steps: int = 28,
    guidance: float = 1.0,
    shift: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Return an image for each text; the noise depends on seed, number of texts and shape alone.

    So models are compared on the same texts from the same noise, whatever the device and the batch size.

    Args:
        backbone: see `zoo.denoisers.Backbone`.
        text: tokens (N, L), or N texts.
        steps: see `zoo.flow_sampling.sample`.
        guidance: see there.
        shift: see there.
        seed: of the noise.
        batch_size: texts at a time.

    Returns:
        (N, C, H, W), float32, in the units of the data module, on the device of the backbone.

    Raises:
        InputError: there is no text, or see `zoo.flow_sampling.sample`.
    """
    if not len(text) or batch_size < 1:
        raise InputError(f"text must have a row and batch_size be positive, got {len(text)} and {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(text), *backbone.latent_shape), generator=generator)
    images = []
    for first in range(0, len(text), batch_size):
        rows = slice(first, first + batch_size)
        with torch.no_grad():
            condition = backbone.condition(text[rows])
            latents = sample(
                backbone, condition, noise=noise[rows], steps=steps, guidance=guidance, shift=shift
            )  # fmt: skip
            images.append(backbone.images(latents))
    return torch.cat(images)
