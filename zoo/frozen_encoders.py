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
from zoo.class_centres import Centres, centre_digests, embed_prompts, read_centres, templates_of
from zoo.errors import InputError
from zoo.losses.centres import Pool, pooled_similarities
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
        class_names: names of the classes; those of the data module if omitted.
        templates: prompts of each modality with ``{}`` for the name; see `zoo.class_centres.TEMPLATES`.
        centres: the centres in place of prompts; see `zoo.class_centres.read_centres`.
        centre_sha256: their hashes by modality, recorded when they are made; others are refused.
        head: see `zoo.calibration_heads`.
        head_width: width inside ``residual_mlp``.
        scale: factor of the cosines in logits.
        pool: how several centres of a class count; see `zoo.losses.centres`.
        max_trainable_share: refuse heads with a larger share of all parameters; any if omitted.

    Attributes:
        modalities: their names, in order.
        heads: the heads by modality.
        centres: unit vectors (P, K, M, D), None before the first use; see `zoo.class_centres`.
        centre_mask: which there are (P, K, M).
    """

    deployable = "heads"
    training_only = ("text",)
    sized_by_file = ("centres", "centre_mask")

    centres: Tensor | None
    centre_mask: Tensor | None

    def __init__(
        self,
        encoders: Mapping[str, str | dict[str, Any] | nn.Module],
        *,
        encoder_options: Mapping[str, dict[str, Any]] | None,
        text: str | dict[str, Any] | nn.Module | None,
        text_options: dict[str, Any] | None,
        class_names: Sequence[str] | None,
        templates: Mapping[str, Sequence[str]] | None,
        centres: str | Sequence[Any] | Mapping[str, Any] | None,
        centre_sha256: Mapping[str, str] | None,
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
        self.class_names = None if class_names is None else list(class_names)
        self.templates = templates
        self.centre_sha256 = dict(centre_sha256) if centre_sha256 else None
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
        self.register_buffer("centres", None)
        self.register_buffer("centre_mask", None)
        if centres is not None:
            self._take_centres(read_centres(centres, self.modalities))
        if text is not None:
            options = towers.tower_options("text_options", text_options)
            tower = towers.create(text, frozen=True, embedding=True, modality="text", **options)
            self.attach_frozen("text", tower)
        self._check_share(max_trainable_share)

    def _describe(self, encoders: Mapping[str, Any]) -> None:
        """Record the encoders as a stored model may hold them: modules are supplied again, folders are described."""
        # The values of the centres are stored as tensors, and where they came from is no part of the model.
        self._arguments.pop("centres", None)
        self.hparams.pop("centres", None)
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

    def class_centres(self, modality: str) -> Centres:
        """Return the centres of a modality: vectors (K, M, D) and mask (K, M).

        Raises:
            InputError: there are none yet.
        """
        if self.centres is None or self.centre_mask is None:
            raise InputError("there are no class centres yet: fit or validate the model, or give centres=…")
        place = self.modalities.index(modality)
        return Centres(self.centres[place], self.centre_mask[place])

    def similarities(self, modality: str, embeddings: Tensor) -> Tensor:
        """Return the cosines (B, K) of embeddings (B, D) with the classes."""
        centres = self.class_centres(modality)
        return pooled_similarities(embeddings, centres.vectors, pool=self.pool, mask=centres.mask)

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
        if self.centres is None or self.centre_mask is None:
            self._make_centres(getattr(self.trainer, "datamodule", None))
        elif self.centres.dtype == torch.float32:  # a cast changes what is hashed
            self._check_digests(Centres(self.centres, self.centre_mask))

    def teardown(self, stage: str) -> None:
        """Take the feature hooks away."""
        for modality in self.modalities:
            self.encoder(modality).tap.remove()

    def _make_centres(self, data: Any) -> None:
        class_names = self.class_names if self.class_names is not None else getattr(data, "class_names", None)
        if "text" not in self.frozen_towers or class_names is None:
            raise InputError(
                "the classes need centres: give text=… (a text tower) with class_names=[…] or a data module that has "
                "class_names, or give centres=…"
            )
        text: towers.Tower = self.text.to(self.trainer.strategy.root_device)
        device = self.trainer.strategy.root_device
        prompts = [class_prompts(class_names, templates_of(modality, self.templates)) for modality in self.modalities]
        self._take_centres(embed_prompts(lambda texts: text.features(text.tokenizer(texts).to(device)), prompts))

    def _take_centres(self, found: Centres) -> None:
        width = self.encoder(self.modalities[0]).dim
        if found.vectors.shape[-1] != width:
            raise InputError(
                f"centres must be as wide as the embeddings, {width}, got {found.vectors.shape[-1]}: encoders and centres "
                "must share one space"
            )
        digests = self._check_digests(found)
        self.centre_sha256 = digests
        self._record(centre_sha256=digests)
        self.centres, self.centre_mask = found.vectors, found.mask

    def _check_digests(self, found: Centres) -> dict[str, str]:
        digests = centre_digests(found, self.modalities)
        if self.centre_sha256 is not None and self.centre_sha256 != digests:
            raise InputError(
                "the class centres are not those that this model was trained with: "
                f"{_short(digests)} now, expected {_short(self.centre_sha256)}; give the same classes, templates and text "
                "tower, or leave centre_sha256 out"
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
