"""`GenerationModule`: what a text-to-image module does at the end of an evaluation, whatever it learns."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from zoo import towers
from zoo.module import ZooModule
from zoo.pixel_units import find_normalisation
from zoo.prompted_samples import PromptedSamples

__all__ = ["GenerationModule"]


class GenerationModule(ZooModule):
    """Sample images for the first captions of a split, have a frozen classifier judge them, and draw them in the card.

    A subclass logs the losses of a batch in `evaluate`, and says in `draw_samples` how it samples.

    Args:
        classifier: the judge: a tower name or a module; without one nothing is sampled.
        classifier_options: options for its builder.
        eval_samples: images that an evaluation samples in each process, at most.

    Attributes:
        samples: the captions and what came of them, None without a classifier.
        evaluation: its counts.
    """

    def __init__(
        self,
        *,
        classifier: str | dict[str, Any] | nn.Module | None,
        classifier_options: dict[str, Any] | None,
        eval_samples: int,
    ) -> None:
        super().__init__()
        self.samples: PromptedSamples | None = None
        self.evaluation: nn.Module | None = None
        if classifier is not None:
            options = towers.tower_options("classifier_options", classifier_options)
            with isolate_rng(include_cuda=False):  # a tower that comes from the disk draws no random numbers either
                tower = towers.create(classifier, frozen=True, **options)
            self.attach_frozen("classifier", tower)
            self.samples = PromptedSamples(tower, eval_samples)
            self.evaluation = self.samples.evaluation  # so that it moves with the module

    # -- what a subclass says --------------------------------------------------------------------------------------

    def evaluate(self, batch: Any, batch_idx: int, split: str) -> None:
        """Log the losses of a batch under the name of the split."""
        raise NotImplementedError

    def draw_samples(self, text: Tensor | list[str], *, seed: int) -> Tensor:
        """Return an image (B, C, H, W) of each text, from noise that depends on the seed alone."""
        raise NotImplementedError

    def draw_also(self, text: Tensor | list[str], *, seed: int) -> dict[str, Tensor]:
        """Return images of the same texts to stand beside them in the figure, by what the figure calls them."""
        return {}

    # -- evaluation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the evaluation before."""
        if self.samples is not None:
            self.samples.reset()

    def on_test_epoch_start(self) -> None:
        """Forget the evaluation before."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the losses, and remember what is asked for."""
        self._step(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the losses, and remember what is asked for."""
        self._step(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Sample, and log what the samples are worth."""
        self._judge("val")

    def on_test_epoch_end(self) -> None:
        """Sample, and log what the samples are worth."""
        self._judge("test")

    def _step(self, batch: Any, batch_idx: int, split: str) -> None:
        self.evaluate(batch, batch_idx, split)
        if self.samples is not None and not self.trainer.sanity_checking:
            self.samples.take(batch)

    def _judge(self, split: str) -> None:
        if self.samples is not None:
            # These are over all processes already; so is their mean.
            found = self.samples.judge(
                lambda text: self.draw_samples(text, seed=self.global_rank),
                lambda text: self.draw_also(text, seed=self.global_rank),
            )
            self.log_dict({f"{split}/{name}": value for name, value in found.items()}, sync_dist=True)

    def card_figures(self) -> dict[str, bytes]:
        """Return what the model card shows: ``"samples"`` of the last evaluation, with the class that was asked for."""
        if self.samples is None:
            return {}
        found = find_normalisation(self.trainer, self)
        units = {} if found is None else {"mean": found[0].mean, "std": found[0].std}
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        figure = self.samples.figure(names=names, **units)
        return {} if figure is None else {"samples": figure}
