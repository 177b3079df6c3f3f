"""Two frozen towers and two heads: the layers that feed the heads, embeddings, what is stored, and validation.

A batch is a dict: "image" and "text", inputs of the towers, or "image_features" and "text_features", what the chosen layers
said of them; "label" and "id" where the data have them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from zoo import towers
from zoo.aligned_encoder import AlignedEncoder
from zoo.alignment_heads import HeadName, build_head
from zoo.errors import InputError, require_choice
from zoo.frozen_layers import choose_layers, layer_features, layer_width
from zoo.layer_cache import CachedLayers
from zoo.layer_features import sample_batches
from zoo.layer_selection import LayerScores
from zoo.metrics.neighbourhoods import NeighbourhoodTransfer
from zoo.module import ZooModule
from zoo.open_clip_networks import build_tokenizer
from zoo.pair_evaluation import PairEvaluation, unit

__all__ = ["MODALITIES", "TwoHeadModule"]

MODALITIES = ("image", "text")
_CHOICES = ("select", "last")


class TwoHeadModule(ZooModule):
    """Two frozen towers and two heads; a subclass says what the heads learn.

    Only the heads are stored, with the towers whose weights have no public name. At the start of fit, layers that are not
    named are chosen and recorded among the arguments, with the widths of all layers.

    Args:
        image: the image tower: a tower name, or a module.
        text: the text tower.
        image_layer: name of the layer that feeds the head, or "features", the tower's own; chosen if omitted.
        text_layer: the same.
        image_dim: width of that layer; looked up at the start of fit if omitted.
        text_dim: the same.
        layer_choice: how layers are chosen, "select" or "last"; see `zoo.frozen_layers.choose_layers`.
        neighbours: k of the choice.
        selection_samples: pairs that the choice is made from, at most, at least 2.
        head: see `zoo.alignment_heads`, ``"canonical"`` included.
        embed_dim: width D of the common space.
        image_options: options for the builder of a named tower.
        text_options: the same.
        layer_cache: folder for the features of the chosen layers; see `zoo.layer_cache`.
        pad_id: token number of padding, where the text tower does not know it.
        k: the k of the retrieval metrics.
        kept_neighbours: k of trustworthiness and continuity in evaluation, or None for neither.

    Attributes:
        layers: names of the layers by modality, None where it is not chosen yet.
        layer_scores: the scores of the choice, if one was made in this process.
    """

    deployable = "image_head"
    stored_towers = MODALITIES

    def __init__(
        self,
        *,
        image: str | dict[str, Any] | nn.Module,
        text: str | dict[str, Any] | nn.Module,
        image_layer: str | None,
        text_layer: str | None,
        image_dim: int | None,
        text_dim: int | None,
        layer_choice: Literal["select", "last"],
        neighbours: int | Literal["rice", "sqrt", "sturges"],
        selection_samples: int,
        head: HeadName | Literal["canonical"],
        embed_dim: int,
        image_options: dict[str, Any] | None,
        text_options: dict[str, Any] | None,
        layer_cache: str | None,
        pad_id: int | None,
        k: Sequence[int],
        kept_neighbours: int | None,
    ) -> None:
        super().__init__()
        # A place on this machine, which no stored model should hold.
        self._arguments.pop("layer_cache", None)
        require_choice("layer_choice", layer_choice, _CHOICES)
        if selection_samples < 2:
            raise InputError(f"selection_samples must be at least 2, got {selection_samples}")
        self.layer_cache = layer_cache
        self.layers: dict[str, str | None] = {"image": image_layer, "text": text_layer}
        self._widths = {"image": image_dim, "text": text_dim}
        self._selection: dict[str, Any] = {
            "layer_choice": layer_choice, "k": neighbours, "max_samples": selection_samples
        }  # fmt: skip
        self.layer_scores: LayerScores | None = None
        self.head = head
        self.embed_dim = embed_dim
        self.pad_id = pad_id
        self._clip_name = text if isinstance(text, str) and text.startswith("open_clip/") else None
        frozen = {}
        for modality, name, options in (("image", image, image_options), ("text", text, text_options)):
            given = towers.tower_options(f"{modality}_options", options)
            tower = towers.create(name, frozen=True, embedding=True, modality=modality, **given)
            # Where the width is not known yet, the head gets its own at the start of fit.
            setattr(self, f"{modality}_head", build_head(head, self._widths[modality] or tower.dim, embed_dim))
            frozen[modality] = (tower, towers.has_public_weights(name))
        for modality, (tower, public) in frozen.items():
            if public:
                self.attach_frozen(modality, tower)
            else:
                setattr(self, modality, tower)
        self.evaluation = PairEvaluation(MODALITIES, [f"structure/{modality}" for modality in MODALITIES], k)
        self.neighbourhoods = nn.ModuleDict(
            {} if kept_neighbours is None else {m: NeighbourhoodTransfer(kept_neighbours) for m in MODALITIES}
        )

    # -- embeddings ------------------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        """The image tower with its head, images -> unit embeddings: what a name such as ``./runs/structure-digits`` is.

        Raises:
            InputError: the layer is not chosen yet.
        """
        return AlignedEncoder(self.image, self._chosen_layer("image"), self.image_head, pad_id=self.pad_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit embeddings (B, D) of images (B, C, H, W)."""
        return self.encode_image(x)

    def encode_image(self, x: Tensor) -> Tensor:
        """Return unit embeddings (B, D), float32, of images (B, C, H, W), or of what the image tower takes.

        Raises:
            InputError: the layer is not chosen yet, or gives another width than the head takes.
        """
        return unit(self.aligned("image", self._layer("image", x)))

    def encode_text(self, x: Tensor | list[str]) -> Tensor:
        """Return unit embeddings (B, D), float32, of tokens (B, L), of a list of texts, or of what the text tower takes.

        Raises:
            InputError: as for `encode_image`, or texts for a tower that reads none.
        """
        return unit(self.aligned("text", self._layer("text", self._tokens(x))))

    def _tokens(self, x: Tensor | list[str]) -> Tensor:
        if isinstance(x, Tensor):
            return x
        length = getattr(self.text.network, "context_length", None)
        if length is None:
            raise InputError("the text tower reads no text: it has no context_length; give its tensors")
        return build_tokenizer(self._clip_name, int(length))(x).to(self.device)

    def _layer(self, modality: str, x: Tensor) -> Tensor:
        layer = self._chosen_layer(modality)
        return layer_features(getattr(self, modality), x, layer, pad_id=self.pad_id)

    def _chosen_layer(self, modality: str) -> str:
        layer = self.layers[modality]
        if layer is None:
            raise InputError(f"the {modality} layer is not chosen yet: fit the model, or name {modality}_layer")
        return layer

    def aligned(self, modality: str, features: Tensor) -> Tensor:
        """Return what the head of a modality makes of frozen features: (B, D), not normalised.

        Args:
            modality: "image" or "text".
            features: features (B, D') of its layer.

        Raises:
            InputError: the head takes another width.
        """
        head: Any = getattr(self, f"{modality}_head")
        if features.shape[1:] != (head.in_dim,):
            raise InputError(
                f"the {modality} head takes features of width {head.in_dim}, got {tuple(features.shape)} from layer "
                f"{self.layers[modality]!r}: fit the model, or give {modality}_dim"
            )
        aligned: Tensor = head(features.to(next(head.parameters()).dtype))
        return aligned

    @property
    def spans_processes(self) -> bool:
        """Whether the losses have to gather the batches of several processes."""
        return self._trainer is not None and self.trainer.training and self.trainer.world_size > 1

    # -- fit -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Choose the layers, give the heads their widths, and put cached features in the place of the data."""
        # Lightning warns of modules in eval mode; the frozen towers are meant to be.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        if stage != "fit":
            return
        for modality in MODALITIES:
            getattr(self, modality).to(self.trainer.strategy.root_device)
        if None in self.layers.values() or None in self._widths.values():
            self._choose(self._pairs())
        if self.layer_cache is not None:
            self._cached = CachedLayers(
                self.layer_cache, self.trainer, towers={m: getattr(self, m) for m in MODALITIES},
                layers={m: str(layer) for m, layer in self.layers.items()}, pad_id=self.pad_id,
            )  # fmt: skip
            self.example_shape = self.example_shape or self._cached.example_shape

    def teardown(self, stage: str) -> None:
        """Give the data module its own data back."""
        cached = self.__dict__.pop("_cached", None)
        if cached is not None:
            cached.undo()

    def _pairs(self) -> Any:
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "train_eval_dataloader"):
            return data.train_eval_dataloader()
        self.trainer.fit_loop.setup_data()
        return self.trainer.train_dataloader

    def feature_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the frozen features (B, D) and (B, D') of all training pairs once, in every process alike.

        Raises:
            InputError: the data have no length.
        """
        loader = self._pairs()
        try:
            len(loader)
        except TypeError as error:
            raise InputError("all training pairs are read first: give data that have a length") from error
        with isolate_rng(), torch.no_grad():
            for batch in sample_batches(loader, sys.maxsize):
                features = self.features_of(move_data_to_device(batch, self.trainer.strategy.root_device))
                yield features["image"], features["text"]

    def _choose(self, loader: Any) -> None:
        given: dict[str, Any] = {f"{modality}_layer": layer for modality, layer in self.layers.items()}
        chosen, self.layer_scores = choose_layers(
            self.image, self.text, loader, pad_id=self.pad_id, **self._selection, **given
        )
        for modality, layer in zip(MODALITIES, chosen, strict=True):
            tower = getattr(self, modality)
            width = self._widths[modality] if layer == self.layers[modality] else None
            if width is None:
                width = layer_width(tower, loader, layer, modality=modality, pad_id=self.pad_id)
            if width != getattr(self, f"{modality}_head").in_dim:
                setattr(self, f"{modality}_head", build_head(self.head, width, self.embed_dim))
            self.layers[modality], self._widths[modality] = layer, width
        recorded = self._chosen()
        self._arguments.update(recorded)
        self.hparams.update(recorded)

    def _chosen(self) -> dict[str, Any]:
        """The arguments that say which layers were chosen."""
        widths = {f"{modality}_dim": width for modality, width in self._widths.items()}
        return {**{f"{modality}_layer": layer for modality, layer in self.layers.items()}, **widths}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the chosen layers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["zoo"]["layers"] = self._chosen()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other layers.

        Raises:
            InputError: the layers or the towers are not those of the checkpoint.
        """
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get("zoo", {}).get("layers", self._chosen())
        for name, value in self._chosen().items():
            if value is not None and value != stored[name]:
                raise InputError(
                    f"{name} is {value!r}, the checkpoint was trained with {stored[name]!r}: give that one"
                )

    def features_of(self, batch: Any) -> dict[str, Tensor]:
        """Return the frozen features (B, D') of the pairs of a batch by modality.

        Args:
            batch: see the module's docstring.

        Raises:
            InputError: a side is missing, or the sides differ in rows.
        """
        features = {}
        for modality in MODALITIES:
            found = self.frozen_rows(batch, modality, modality)
            if found is None:
                shown = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
                raise InputError(
                    f"a batch must be a dict with {modality!r} or '{modality}_features', got {shown}: use a data module of "
                    "pairs"
                )
            features[modality] = found
        if len(features["image"]) != len(features["text"]):
            raise InputError(
                f"a batch must be pairs, got {len(features['image'])} image and {len(features['text'])} text rows: rows "
                "without a partner go under 'image_only' or 'text_only'"
            )
        return features

    def frozen_rows(self, batch: Any, key: str, modality: str) -> Tensor | None:
        """Return the frozen features of one entry of a batch, or None if there is no such entry.

        Args:
            batch: see the module's docstring.
            key: the entry; ``<key>_features`` comes first.
            modality: the tower that reads it.
        """
        if not isinstance(batch, dict):
            return None
        ready: Tensor | None = batch.get(f"{key}_features")
        return ready if ready is not None or key not in batch else self._layer(modality, batch[key])

    def card_figures(self) -> dict[str, bytes]:
        """Return what the model card shows: ``"layers"``, the scores of all pairs of layers, where layers were chosen."""
        return {} if self.layer_scores is None else {"layers": self.layer_scores.png()}

    # -- evaluation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Embed the prompts of the classes with the heads as they are now."""
        self.evaluation.start(self.encode_text, getattr(self.trainer, "datamodule", None), self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the losses and update the metrics."""
        self.evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the split."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """See `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the losses and update the metrics."""
        self.evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the split."""
        self._log_metrics("test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the unit embeddings (B, D) of each modality that the batch has."""
        found = {modality: self.frozen_rows(batch, modality, modality) for modality in MODALITIES}
        return {m: unit(self.aligned(m, features)) for m, features in found.items() if features is not None}

    def evaluate(self, batch: Any, split: str) -> None:
        """Log the losses of a batch under ``split/`` and update `evaluation`.

        Args:
            batch: see the module's docstring.
            split: "val" or "test".
        """
        raise NotImplementedError

    def _log_metrics(self, split: str) -> None:
        found = self.evaluation.finish()
        for modality, module in self.neighbourhoods.items():
            metric = cast("NeighbourhoodTransfer", module)
            # NaN where a split has too few samples.
            found |= {f"{name}/{modality}": value for name, value in metric.compute().items() if not value.isnan()}
            metric.reset()
        # Every process has computed the value of all of them; the mean only says so to Lightning.
        self.log_dict({f"{split}/{name}": value for name, value in found.items()}, sync_dist=True)
