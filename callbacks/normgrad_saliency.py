"""Where in a few fixed images a network finds what speaks for a class, drawn while it trains.

Rebuffi, Fong, Ji, Vedaldi: There and Back Again: Revisiting Backpropagation Saliency Methods, CVPR 2020, arXiv 2004.02866.
The maps are those of `zoo.saliency`; this is their place in a run of Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from zoo.combined_maps import Combine, combine_maps
from zoo.contributions import Aggregate, Extract
from zoo.errors import InputError
from zoo.first_images import FirstImages, LabelledImages, fingerprint, labelled
from zoo.image_logging import log_image
from zoo.layer_taps import LayerTaps, find_layers
from zoo.overlays import overlay_grid
from zoo.saliency import LayerMaps, Method, chosen_method, layer_maps
from zoo.score_passes import Score, ScorePasses

__all__ = ["NormGradSaliency"]

Named = Literal["predicted", "label", "least_likely"]
Classes = Named | int | Callable[[Tensor, Tensor | None], Tensor]


class NormGradSaliency(pl.Callback):
    """Draw saliency maps of the same few images again and again, for any LightningModule whose forward takes images.

    The images are the first ones of the first validation loader, as they reach ``validation_step``, or given ones. A figure
    has a column an image and a row a layer, and with several layers one for their combination. It goes to every logger that
    takes pictures, else to ``images/saliency/step-N.png`` in the run's folder (`zoo.image_logging.log_image`); the last one
    is put into the model card. The raw range of the maps of each layer, which the figure does not show, is logged as
    ``saliency/<layer>/min`` and ``…/max``. A second callback of the same name is called ``saliency_2``.

    Drawn at the end of each validation in every n-th epoch; after each n-th epoch where the run has no validation but images
    are given; at the end of training, if the last figure is of older weights; and by ``trainer.validate``. The sanity check
    draws nothing. Under ``fast_dev_run`` all is computed and nothing written.

    Training is what it would be without the callback, to the bit: the network is run in eval mode, eagerly and without
    autocast, by passes that leave weights, gradients, running statistics, modes and random numbers alone. Under DDP the
    first process works, on its own part of the loader, and the others wait at their next collective call; a network whose
    forward itself needs all processes would wait for ever. Sharded strategies (FSDP, DeepSpeed) are refused.

    What a logger raises ends the run, as it does when Lightning logs a metric.

    Args:
        layers: names of modules, as for `zoo.saliency.saliency`; what stands in front of a name may be left out where it is
            clear, such as the ``model.`` of the LightningModule.
        every_n_epochs: draw in every so many epochs, counted from 1: with 5, in the fifth, tenth and so on.
        max_images: how many images of the validation loader to take, at least 1.
        classes: what is explained in each image: its ``"predicted"`` class, its ``"label"``, the ``"least_likely"`` class,
            one class for all, or a function of logits (B, K) and labels (B,) or None that returns classes (B,).
        method: as for `zoo.saliency.saliency`; NormGrad if `extract` and `aggregate` are omitted too.
        extract: as for `zoo.saliency.saliency`.
        aggregate: as for `zoo.saliency.saliency`.
        kernel_size: as for `zoo.saliency.saliency`.
        combine: how several layers are put together, as for `zoo.combined_maps.combine_maps`.
        weights: of the layers in the combination, equal if omitted.
        score: as for `zoo.saliency.saliency`, in place of `classes`: output and labels (or None) -> scores (B,), for modules
            whose forward returns something else than logits.
        meta_lr: as for `zoo.saliency.saliency`.
        prefix_tokens: as for `zoo.saliency.saliency`.
        channels_last: as for `zoo.saliency.saliency`.
        images: (B, C, H, W) in floating point, normalised as the network expects, to draw all of them in place of images of
            the validation loader.
        labels: their classes (B,), if known.
        batch_to_input: batch -> images; the batch itself, or its first item, if omitted.
        batch_to_target: batch -> classes (B,), or (B, K) of which the largest counts; the second item, if it is one of
            these, if omitted.
        class_names: names of the classes, for the titles.
        mean: what the images were normalised with, to show them in their colours; each image is stretched to its range if
            omitted.
        std: the same.
        also_on_test: draw by ``trainer.test`` as well, the first images of its first loader.
        in_card: put the last figure into the model card. It shows images of the validation data: set this to False where
            they may not be published.
        name: what the figures are called in the loggers.

    Raises:
        InputError: a value is out of range or does not fit the others; at the start: no such layer, a sharded strategy, or
            no images; when drawing: what `zoo.saliency.saliency` refuses, a batch without images, or labels that are missing
            for ``classes="label"``.

    Warns:
        UserWarning: what `zoo.saliency.layer_maps` warns of, such as a layer whose map cannot depend on the class; a resumed
            run has other images than before; training ended before there were images.

    Example:
        >>> callback = NormGradSaliency("layer3", every_n_epochs=5, method="selective")
        >>> [epoch for epoch in range(1, 11) if callback.is_due(epoch)]
        [5, 10]
    """

    def __init__(
        self,
        layers: str | Sequence[str],
        *,
        every_n_epochs: int = 1,
        max_images: int = 8,
        classes: Classes = "predicted",
        method: str | Method | None = None,
        extract: Extract | None = None,
        aggregate: Aggregate | None = None,
        kernel_size: int = 3,
        combine: Combine = "geomean",
        weights: Sequence[float] | None = None,
        score: Score | None = None,
        meta_lr: float | None = None,
        prefix_tokens: int | None = None,
        channels_last: bool | None = None,
        images: Tensor | None = None,
        labels: Tensor | Sequence[int] | None = None,
        batch_to_input: Callable[[Any], Tensor] | None = None,
        batch_to_target: Callable[[Any], Tensor] | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        also_on_test: bool = False,
        in_card: bool = True,
        name: str = "saliency",
    ) -> None:
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        for argument, value in (("every_n_epochs", every_n_epochs), ("max_images", max_images)):
            if value < 1:
                raise InputError(f"{argument} must be at least 1, got {value}")
        self.method = chosen_method(method, extract, aggregate)
        self.method_name = method if isinstance(method, str) else f"{self.method.extract} {self.method.aggregate}"
        _check_classes(classes, score)
        if weights is not None and (len(self.layers) == 1 or len(weights) != len(self.layers)):
            raise InputError(f"weights must be one number a layer, {len(self.layers)}, of several, got {len(weights)}")
        self.every_n_epochs = every_n_epochs
        self.max_images = max_images
        self.classes = classes
        self.score = score
        self.meta_lr = meta_lr
        self.combine = combine
        self.weights = weights
        self.maps: dict[str, Any] = {
            "layers": self.layers,
            "method": self.method,
            "kernel_size": kernel_size,
            "score": score,
            "meta_lr": meta_lr,
            "prefix_tokens": prefix_tokens,
            "channels_last": channels_last,
        }
        self.given = _given(images, labels)
        self.class_names = class_names
        self.mean = mean
        self.std = std
        self.also_on_test = also_on_test
        self.in_card = in_card
        self.name = name
        self.label = name
        self._first = FirstImages(max_images, batch_to_input, batch_to_target)
        self._shown: LabelledImages | None = None
        self._figure: bytes | None = None
        self._drawn_at = -1
        self._fingerprint: str | None = None
        self._expected: str | None = None

    @property
    def state_key(self) -> str:
        """Two callbacks may stand side by side if they differ in name, layers, classes or method."""
        classes = getattr(self.classes, "__qualname__", self.classes)
        maps = {key: str(self.maps[key]) for key in ("method", "kernel_size", "meta_lr")}
        return self._generate_state_key(name=self.name, layers=list(self.layers), classes=classes, **maps)

    def state_dict(self) -> dict[str, Any]:
        """Return by what a resumed run knows the images again, not the images: checkpoints are passed on."""
        return {"images": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what images the run had, to warn if it has others now."""
        self._expected = state_dict["images"]

    def card_figures(self) -> dict[str, bytes]:
        """Return the last figure for the card, a PNG file; none before the first drawing or with ``in_card=False``."""
        return {} if self._figure is None or not self.in_card else {"saliency": self._figure}

    def is_due(self, epoch: int) -> bool:
        """Whether an epoch is one of those in which figures are drawn.

        Args:
            epoch: counted from 1.
        """
        return epoch % self.every_n_epochs == 0

    # -- life ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run.

        Raises:
            InputError: a sharded strategy.
        """
        if not isinstance(trainer.strategy, pl.strategies.DDPStrategy | pl.strategies.SingleDeviceStrategy):
            raise InputError(
                f"{type(self).__name__} needs the whole network in one process, which {type(trainer.strategy).__name__} "
                "does not have: use DDP or one device"
            )
        everyone: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        kin = [one for one in everyone if isinstance(one, NormGradSaliency) and one.name == self.name]
        place = kin.index(self) + 1
        self.label = self.name if place == 1 else f"{self.name}_{place}"
        self._first.close()
        self._shown = self.given
        self._fingerprint = self._expected = None
        if stage == "fit":
            self._figure, self._drawn_at = None, -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers before the first step.

        Raises:
            InputError: no such layer, or there will be no images.
        """
        find_layers(pl_module, self.layers)
        if self.given is None and not trainer.enable_validation:
            raise InputError(
                f"{type(self).__name__} takes its images from the validation loader, and this run has no validation: give "
                "images=…"
            )

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first images, before the network can change them in place."""
        if self._shown is None and not trainer.sanity_checking and dataloader_idx == 0:
            self._first.show(batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw; before ``on_validation_end``, where versions for the Hub are stored."""
        if trainer.sanity_checking:
            return
        self._close()
        if trainer.state.fn != TrainerFn.FITTING:
            self._draw(trainer, pl_module)
        elif self.is_due(trainer.current_epoch + 1):
            self._draw(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the given images where the run has no validation."""
        if not trainer.enable_validation and self.is_due(trainer.current_epoch + 1):
            self._draw(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final weights, unless that is done already."""
        if self._shown is None:
            rank_zero_warn(f"{type(self).__name__} drew nothing: training ended before the first validation")
        elif self._drawn_at != trainer.global_step:
            self._draw(trainer, pl_module, trainer.current_epoch - 1)  # the trainer has raised its number already

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first images where test is to be drawn."""
        if self._shown is None and self.also_on_test and dataloader_idx == 0:
            self._first.show(batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw where that is asked for."""
        if self.also_on_test:
            self._close()
            self._draw(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the images; the last figure stays, for the card."""
        self._first.close()
        self._shown = self.given

    # -- drawing ---------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        """From now on the images are fixed."""
        if self._shown is not None:
            return
        self._shown = self._first.close()
        self._fingerprint = None if self._shown is None else fingerprint(self._shown.images)
        if self._expected not in (None, self._fingerprint):
            rank_zero_warn(
                f"{type(self).__name__} draws other images than before the checkpoint: the validation loader begins with "
                "others now, because it shuffles, or the number of processes or the precision has changed"
            )

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int | None = None) -> None:
        """Compute, draw and log; nothing in here is collective."""
        self._drawn_at = trainer.global_step
        if not trainer.is_global_zero or self._shown is None:
            return
        images, labels = self._shown
        x = images.to(pl_module.device)
        predicted, targets = self._targets(pl_module, x, labels)
        found = layer_maps(pl_module, x, targets, **self.maps)
        rows = {name or "input": one for name, one in found.maps.items()}
        ranges = {f"{self.label}/{name}/{what}": value for name, one in rows.items() for what, value in _range(one)}
        if len(rows) > 1:
            size = (images.shape[2], images.shape[3])
            rows["combined"] = combine_maps(list(rows.values()), self.weights, self.combine, size=size)
        when = f"step {trainer.global_step}" if epoch is None else f"epoch {epoch}, step {trainer.global_step}"
        meta = "" if self.meta_lr is None else f" after a step of {self.meta_lr:g}"
        titles = self._titles(labels, predicted, found)
        self._figure = overlay_grid(
            images, rows, titles, caption=f"{self.method_name}{meta}, {when}", mean=self.mean, std=self.std
        )
        log_image(trainer, self.label, self._figure, step=trainer.global_step)
        for logger in trainer.loggers:
            logger.log_metrics(ranges, trainer.global_step)

    def _targets(
        self, pl_module: pl.LightningModule, x: Tensor, labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | int | None]:
        """Return the predicted classes and those to explain."""
        labels = None if labels is None else labels.to(x.device)
        if self.score is not None:
            return None, labels
        # Without a layer to look at, this is a plain forward pass, under the conditions of the others.
        logits = ScorePasses(LayerTaps(pl_module, {})).run(x).output
        assert logits is not None, "ScorePasses refuses anything else"
        predicted = logits.argmax(1)
        if self.classes == "predicted":
            return predicted, predicted
        if self.classes == "least_likely":
            return predicted, logits.argmin(1)
        if self.classes == "label":
            if labels is None:
                raise InputError(
                    "classes='label' needs labels, and the batch has none: give batch_to_target=… or labels=…"
                )
            return predicted, labels
        return predicted, self.classes(logits, labels) if callable(self.classes) else self.classes

    def _titles(self, labels: Tensor | None, predicted: Tensor | None, found: LayerMaps) -> list[str]:
        explained = None if self.score is not None or self.classes == "predicted" else found.targets
        titles = []
        for index in range(len(found.scores)):
            told = (("label", labels), ("predicted", predicted), ("explained", explained))
            lines = [f"{what} {self._class_name(int(one[index]))}" for what, one in told if one is not None]
            titles.append("\n".join(lines or [f"score {float(found.scores[index]):.3g}"]))
        return titles

    def _class_name(self, index: int) -> str:
        names = self.class_names
        return names[index] if names is not None and 0 <= index < len(names) else str(index)


def _check_classes(classes: Any, score: Score | None) -> None:
    if score is not None and classes != "predicted":
        raise InputError("score says what is explained: leave classes out, or score")
    number = isinstance(classes, int) and not isinstance(classes, bool)
    if not callable(classes) and (classes < 0 if number else classes not in get_args(Named)):
        raise InputError(
            f"classes must be one of {', '.join(get_args(Named))}, a class of at least 0 or a function, got {classes!r}"
        )


def _given(images: Tensor | None, labels: Tensor | Sequence[int] | None) -> LabelledImages | None:
    if images is None:
        if labels is not None:
            raise InputError("labels belong to images: give both")
        return None
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise InputError(
            f"images must be (B, C, H, W) in floating point, at least one, got shape {tuple(images.shape)} of {images.dtype}"
        )
    return labelled(images.detach().cpu(), labels)


def _range(saliency_map: Tensor) -> list[tuple[str, float]]:
    return [("min", float(saliency_map.min())), ("max", float(saliency_map.max()))]
