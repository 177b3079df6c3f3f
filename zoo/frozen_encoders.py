"""Frozen encoders of any number of modalities, a head behind each, and fixed centres of classes in their common space."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from zoo import towers
from zoo.arguments import Supplied
from zoo.calibration_attacks import require_modalities
from zoo.calibration_heads import CalibratedEncoder, CalibrationHead, build_calibration_head
from zoo.class_centers import Centers, center_digests, embed_prompts, read_centers, templates_of
from zoo.errors import InputError
from zoo.losses.centers import Pool, pooled_similarities
from zoo.metrics import class_prompts
from zoo.module import ZooModule
from zoo.pair_evaluation import unit

__all__ = ["FrozenEncodersModule"]

_KEPT = "encoder"


class FrozenEncodersModule(ZooModule):
    """Frozen encoders, heads and class centres; a subclass says what the heads learn.

    Stored are the heads, the centres, and the encoders whose weights have no public name. The text tower makes the centres
    at the first use and is neither stored nor built at load.

    Args:
        encoders: the frozen encoder of each modality: tower names, or modules.
        encoder_options: options for the builders of named towers, by modality.
        text: the text tower that makes the centres, if they are not given.
        text_options: options for its builder.
        classes: names of the classes; those of the data module if None.
        templates: prompts of each modality with ``{}`` for the name; see `zoo.class_centers.TEMPLATES`.
        centers: the centres in place of prompts; see `zoo.class_centers.read_centers`.
        center_sha256: their hashes by modality, recorded when they are made; others are refused.
        head: see `zoo.calibration_heads`.
        head_width: width inside ``residual_mlp``.
        scale: factor of the cosines in logits.
        pool: how several centres of a class count; see `zoo.losses.centers`.
        max_trainable_share: refuse heads with a larger share of all parameters; any if None.

    Attributes:
        modalities: their names, in order.
        heads: the heads by modality.
        centers: unit vectors (P, K, M, D), None before the first use; see `zoo.class_centers`.
        center_mask: which there are (P, K, M).
    """

    deployable = "heads"
    training_only = ("text",)
    sized_by_file = ("centers", "center_mask")

    centers: Tensor | None
    center_mask: Tensor | None

    def __init__(
        self,
        encoders: Mapping[str, str | dict[str, Any] | nn.Module],
        *,
        encoder_options: Mapping[str, dict[str, Any]] | None,
        text: str | dict[str, Any] | nn.Module | None,
        text_options: dict[str, Any] | None,
        classes: Sequence[str] | None,
        templates: Mapping[str, Sequence[str]] | None,
        centers: str | Sequence[Any] | Mapping[str, Any] | None,
        center_sha256: Mapping[str, str] | None,
        head: CalibrationHead,
        head_width: int | None,
        scale: float,
        pool: Pool,
        max_trainable_share: float | None,
    ) -> None:
        super().__init__()
        if not encoders:
            raise InputError("encoders must name at least one modality, such as {'image': 'timm/resnet18.a1_in1k'}")
        self.modalities = list(encoders)
        for argument, given in (("encoder_options", encoder_options), ("templates", templates)):
            require_modalities(argument, given or {}, self.modalities)
        self.classes = None if classes is None else list(classes)
        self.templates = templates
        self.center_sha256 = dict(center_sha256) if center_sha256 else None
        self.scale = scale
        self.pool = pool
        self._describe(encoders)
        self.encoders = nn.ModuleDict()
        for modality, name in encoders.items():
            self._add_encoder(modality, name, (encoder_options or {}).get(modality))
        widths = {modality: self.encoder(modality).dim for modality in self.modalities}
        if len(set(widths.values())) > 1:
            raise InputError(f"encoders must share one space, and are of different widths: {widths}")
        self.heads = nn.ModuleDict({m: build_calibration_head(head, width, head_width) for m, width in widths.items()})
        self.register_buffer("centers", None)
        self.register_buffer("center_mask", None)
        if centers is not None:
            self._take_centers(read_centers(centers, self.modalities))
        if text is not None:
            options = towers.tower_options("text_options", text_options)
            tower = towers.create(text, frozen=True, embedding=True, modality="text", **options)
            self.attach_frozen("text", tower)
        self._check_share(max_trainable_share)

    def _describe(self, encoders: Mapping[str, Any]) -> None:
        """Record the encoders as a stored model may hold them: modules are supplied again, folders are described."""
        # The values of the centres are stored as tensors, and where they came from is no part of the model.
        self._arguments.pop("centers", None)
        self.hparams.pop("centers", None)
        if any(isinstance(value, nn.Module) for value in encoders.values()):
            self._arguments["encoders"] = Supplied("dict")
            return
        described = {
            name: value if towers.has_public_weights(value) else towers.self_contained(value)
            for name, value in encoders.items()
        }
        self._record(encoders=described)

    def _record(self, **arguments: Any) -> None:
        self._arguments.update(arguments)
        self.hparams.update(arguments)

    def _add_encoder(self, modality: str, name: Any, options: dict[str, Any] | None) -> None:
        given = towers.tower_options(f"encoder_options[{modality!r}]", options)
        tower = towers.create(name, frozen=True, embedding=True, modality=modality, **given)
        if towers.has_public_weights(name):
            self.attach_frozen(f"{modality}_{_KEPT}", tower)
        else:
            self.encoders[modality] = tower

    # -- embeddings ------------------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        """The encoder of the first modality with its head: inputs -> unit embeddings."""
        first = self.modalities[0]
        return CalibratedEncoder(self.encoder(first), self.heads[first])

    def encoder(self, modality: str) -> towers.Tower:
        """Return the frozen encoder of a modality."""
        kept = f"{modality}_{_KEPT}"
        tower = self.frozen_towers[kept] if kept in self.frozen_towers else self.encoders[modality]
        assert isinstance(tower, towers.Tower)
        return tower

    def embed(self, modality: str, x: Tensor) -> Tensor:
        """Return the unit embeddings (B, D) of the frozen encoder, float32, with a gradient if the inputs have one."""
        return unit(self.encoder(modality).features(x))

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """Return the unit embeddings (B, D) behind the head, float32.

        Args:
            modality: one of `modalities`.
            x: inputs (B, …) of its encoder.

        Raises:
            InputError: there is no such modality.
        """
        require_modalities("modality", {modality: None}, self.modalities)
        embeddings: Tensor = self.heads[modality](self.embed(modality, x))
        return embeddings

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit embeddings (B, D) behind the head of inputs of the first modality."""
        return self.encode(self.modalities[0], x)

    def class_centers(self, modality: str) -> Centers:
        """Return the centres of a modality: vectors (K, M, D) and mask (K, M).

        Raises:
            InputError: there are none yet.
        """
        if self.centers is None or self.center_mask is None:
            raise InputError("there are no class centres yet: fit or validate the model, or give centers=…")
        place = self.modalities.index(modality)
        return Centers(self.centers[place], self.center_mask[place])

    def similarities(self, modality: str, embeddings: Tensor) -> Tensor:
        """Return the cosines (B, K) of embeddings (B, D) with the classes."""
        centers = self.class_centers(modality)
        return pooled_similarities(embeddings, centers.vectors, pool=self.pool, mask=centers.mask)

    def logits(self, modality: str, x: Tensor, *, calibrated: bool = True) -> Tensor:
        """Return the logits (B, K) of inputs, with the head or of the bare encoder."""
        embeddings = self.encode(modality, x) if calibrated else self.embed(modality, x)
        return self.scale * self.similarities(modality, embeddings)

    # -- what is trained -------------------------------------------------------------------------------------------

    @property
    def trainable_share(self) -> float:
        """The share of the heads in all parameters, encoders included."""
        ours = _count(self.heads)
        return ours / (ours + sum(_count(self.encoder(modality)) for modality in self.modalities))

    def _check_share(self, bound: float | None) -> None:
        if bound is not None and self.trainable_share > bound:
            raise InputError(
                f"the heads are {self.trainable_share:.2%} of all parameters, and max_trainable_share is {bound}: choose a "
                "smaller head, or leave the bound out"
            )

    # -- centres ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Keep the feature hooks for the run, and make the centres if there are none.

        Raises:
            InputError: nothing says what the classes are, or the centres are not those that the model was trained with.
        """
        # Lightning warns of modules in eval mode; the frozen encoders are meant to be.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        for modality in self.modalities:
            self.encoder(modality).tap.install()
        share = self.trainable_share
        paper = "" if share < 0.01 else "; the paper's bound of 1 % needs larger encoders or a smaller head"
        rank_zero_info(f"the heads train {_count(self.heads):,} parameters, {share:.2%} of all{paper}")
        if self.centers is None or self.center_mask is None:
            self._make_centers(getattr(self.trainer, "datamodule", None))
        elif self.centers.dtype == torch.float32:  # a cast changes what is hashed
            self._check_digests(Centers(self.centers, self.center_mask))

    def teardown(self, stage: str) -> None:
        """Take the feature hooks away."""
        for modality in self.modalities:
            self.encoder(modality).tap.remove()

    def _make_centers(self, data: Any) -> None:
        classes = self.classes if self.classes is not None else getattr(data, "class_names", None)
        if "text" not in self.frozen_towers or classes is None:
            raise InputError(
                "the classes need centres: give text=… (a text tower) with classes=[…] or a data module that has "
                "class_names, or give centers=…"
            )
        text: towers.Tower = self.text.to(self.trainer.strategy.root_device)
        device = self.trainer.strategy.root_device
        prompts = [class_prompts(classes, templates_of(modality, self.templates)) for modality in self.modalities]
        self._take_centers(embed_prompts(lambda texts: text.features(text.tokenizer(texts).to(device)), prompts))

    def _take_centers(self, found: Centers) -> None:
        width = self.encoder(self.modalities[0]).dim
        if found.vectors.shape[-1] != width:
            raise InputError(
                f"centers must be as wide as the embeddings, {width}, got {found.vectors.shape[-1]}: encoders and centres "
                "must share one space"
            )
        digests = self._check_digests(found)
        self.center_sha256 = digests
        self._record(center_sha256=digests)
        self.centers, self.center_mask = found.vectors, found.mask

    def _check_digests(self, found: Centers) -> dict[str, str]:
        digests = center_digests(found, self.modalities)
        if self.center_sha256 is not None and self.center_sha256 != digests:
            raise InputError(
                "the class centres are not those that this model was trained with: "
                f"{_short(digests)} now, expected {_short(self.center_sha256)}; give the same classes, templates and text "
                "tower, or leave center_sha256 out"
            )
        return digests

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the centres, or refuse those of other classes.

        Raises:
            InputError: the towers or the centres are not those of the checkpoint.
        """
        super().on_load_checkpoint(checkpoint)
        for name in self.sized_by_file:
            stored = checkpoint["state_dict"].get(name)
            ours: Tensor | None = getattr(self, name)
            if stored is None:
                continue
            if ours is None:
                setattr(self, name, torch.zeros_like(stored))
            elif ours.shape != stored.shape or not torch.equal(ours.to(stored), stored):
                raise InputError(
                    "the class centres are not those of the checkpoint: give the same classes, templates and text tower"
                )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _short(digests: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {digest[:8]}…" for name, digest in digests.items())
