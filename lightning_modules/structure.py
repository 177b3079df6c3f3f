"""STRUCTURE: two frozen encoders joined by small heads, from few pairs, that keep each encoder's neighbourhoods.

Gröger, Wen, Le, Brbić: With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You, NeurIPS 2025, arXiv
2506.16895 v2. Against contrastive training of two heads, the pair of layers that feeds them is chosen by mutual k nearest
neighbours, and each head pays for neighbours that it moves::

    A_m = head_m(X_m)                                    X_m: frozen features of the chosen layer, m = image, text
    L   = base(A_1, A_2) + lambda_t (R_S(X_1, A_1) + R_S(X_2, A_2)) / 2       lambda_t = lambda min(1, t / warmup)

base is CLIP at a fixed temperature, or SigLIP, or CSA: heads that begin as the canonical correlation of all training pairs
(`zoo.canonical_correlation`) and are refined by -0.01 / D sum_i cos(A_1i, A_2i). R_S is `zoo.losses.structure_loss` at the
same temperature; t counts optimizer steps from 0. Read: the authors' code, through the project's notes (its canonical
correlation directly), and the abstract; not the paper's equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from zoo.alignment_heads import HeadName
from zoo.canonical_correlation import CanonicalHead, PairMoments, fit_heads, pair_moments, whiten_heads
from zoo.errors import InputError, require_choice
from zoo.losses import clip_loss, siglip_loss
from zoo.losses.ranks import sum_over_ranks
from zoo.losses.structure import structure_loss, structure_statistics
from zoo.pair_evaluation import unit
from zoo.two_heads import MODALITIES, TwoHeadModule

__all__ = ["StructureAlignment"]

_PERIOD = 50  # epochs from the highest to the lowest learning rate of the released schedule
_CSA_SHARE = 0.01  # of the correlation in the released refinement
_CHOICES = {
    "base": ("clip", "siglip", "csa"), "schedule": ("released", "cosine", "constant"),
    "head": ("linear", "low_rank_released", "low_rank", "mlp"),
    "level_weights": ("none", "inverse"), "divergence": ("released", "js"),
    "centering": ("mean", "none", "standard", "before"),
}  # fmt: skip


class StructureAlignment(TwoHeadModule):
    """Align two frozen towers with heads that keep their neighbourhoods.

    A batch is a dict: "image" and "text", inputs of the towers, or "image_features" and "text_features", what the chosen
    layers said; "label" and "id" where the data have them. Rows without a partner may come as "image_only" and "text_only"
    (or "image_only_features" and "text_only_features"): they join the regulariser alone. Precomputed features of no named
    tower are the inputs of a tower ``zoo/features``. Under several processes the losses span all of their batches.

    Only the heads train, and only they are stored, with the towers whose weights have no public name. At the start of fit,
    layers that are not named are chosen (`layer_scores` keeps the scores) and recorded with the model.

    With ``base="csa"`` a fit begins with one pass over all training pairs that sets the linear heads in closed form; another
    fit begins anew. After each epoch, before it is validated, the directions are scaled to variance 1 again and weighted by
    their correlations. The release has a temperature of 0.2 here, no warm-up, and 10 epochs
    of Adam at 5e-4: ``structure_temperature=0.2, warmup_steps=0, lr=5e-4, weight_decay=0.0, schedule="constant"``.

    Logged: ``train/loss``; ``train/base_loss`` and ``train/structure_loss`` (mean of both modalities), unweighted;
    ``train/structure_weight``; every ``log_every_n_steps`` steps ``structure/{modality}/diagonal_mass`` and
    ``…/effective_neighbours``, which say whether the temperature suits the encoder. In validation ``val/base_loss``,
    ``val/structure_loss`` and ``val/loss``, at the full weight in every epoch; ``val/retrieval/{a}_to_{b}/r{k}`` and
    ``…/median_rank``; ``val/structure/{modality}``, the rank correlation of the cosines of embeddings and frozen features;
    ``val/trustworthiness/{modality}`` and ``val/continuity/{modality}``, over at most 2,000 samples of a split that has more
    than twice ``kept_neighbours``; and ``val/zero_shot/{name}`` where the data module has ``zero_shot_prompts()``. The same
    under ``test/``.

    Args:
        image: the image tower: a tower name, or a module.
        text: the text tower.
        image_layer: name of the layer whose output, pooled, feeds the head; ``"features"`` is the tower's own output. Chosen
            at the start of fit if omitted.
        text_layer: the same for the text tower.
        image_dim: width of that layer; looked up at the start of fit if omitted.
        text_dim: the same for the text tower.
        layer_choice: how layers are chosen: ``"select"``, the pair of blocks with the highest mutual kNN score, or
            ``"last"``, the last blocks.
        neighbours: k of the choice: a number, or ``"rice"``, ``"sqrt"`` or ``"sturges"``.
        selection_samples: pairs that the choice is made from, at most.
        head: ``"linear"``, ``"low_rank_released"`` (the paper's MLP, whose branch is dead as released), ``"low_rank"`` or
            ``"mlp"``.
        embed_dim: width of the common space.
        image_options: options for the builder of a named tower.
        text_options: the same for the text tower.
        base: ``"clip"``; ``"siglip"`` with a learned scale and bias; or ``"csa"``, canonical correlation, with
            ``head="linear"``.
        canonical_ridge: of ``"csa"``: share of the mean variance that is added to the variance of each direction of the
            features; 0 is the release's. With fewer pairs than dimensions only a ridge tells directions apart.
        canonical_power: of ``"csa"``: a direction counts by this power of its correlation. 1 is CSA's similarity but for the
            lengths of the embeddings, 0 is STRUCTURE's release.
        structure_weight: lambda, the weight of the regulariser after the warm-up; 0 is the control.
        warmup_steps: optimizer steps over which it grows from 0.
        temperature: of CLIP, fixed, and of the regulariser.
        structure_temperature: of the regulariser, if it is to be another.
        levels: longest random walk of the regulariser, at least 1.
        level_weights: weights of its levels, ``"none"`` or ``"inverse"``.
        divergence: ``"released"`` (the authors' code) or ``"js"`` (the paper's words).
        centering: ``"mean"``, ``"none"``, ``"standard"`` or ``"before"``.
        margin: divergence in nats that costs nothing.
        use_only_unimodal: where a batch has rows without a partner, regularise with them alone.
        layer_cache: folder for the features of the chosen layers, written at the first fit: training then neither runs the
            towers nor reads their inputs. It shows each training sample as evaluation does, unaugmented and with one
            caption. The data module must be one of the zoo's. Without it the towers run in each step.
        pad_id: token number of padding, where the text tower does not know it.
        k: the k of the retrieval metrics.
        kept_neighbours: k of trustworthiness and continuity in evaluation, which take time quadratic in up to 2,000 samples;
            None for neither. The paper's k are 100 and 1,000.
        chunk_size: tile of the losses; the engines choose if omitted.
        lr: learning rate of the default optimizer, AdamW.
        weight_decay: its weight decay; biases, gates and scales have none.
        schedule: of the learning rate: ``"released"``, a cosine that falls for 50 epochs and rises for 50; ``"cosine"``, to
            0 over the run; ``"constant"``.

    Raises:
        InputError: a tower cannot be built, or a value is out of range.

    Example:
        >>> model = StructureAlignment(
        ...     "zoo/resnet8", "zoo/text_transformer", image_layer="features", text_layer="features",
        ...     text_options={"width": 32, "vocab_size": 100}, embed_dim=16,
        ... )
        >>> model.encode_image(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        image: str | dict[str, Any] | nn.Module,
        text: str | dict[str, Any] | nn.Module,
        *,
        image_layer: str | None = None,
        text_layer: str | None = None,
        image_dim: int | None = None,
        text_dim: int | None = None,
        layer_choice: Literal["select", "last"] = "select",
        neighbours: int | Literal["rice", "sqrt", "sturges"] = "rice",
        selection_samples: int = 5000,
        head: HeadName = "linear",
        embed_dim: int = 512,
        image_options: dict[str, Any] | None = None,
        text_options: dict[str, Any] | None = None,
        base: Literal["clip", "siglip", "csa"] = "clip",
        canonical_ridge: float = 0.01,
        canonical_power: float = 1.0,
        structure_weight: float = 10.0,
        warmup_steps: int = 1000,
        temperature: float = 0.05,
        structure_temperature: float | None = None,
        levels: int = 1,
        level_weights: Literal["none", "inverse"] = "none",
        divergence: Literal["released", "js"] = "released",
        centering: Literal["mean", "none", "standard", "before"] = "mean",
        margin: float = 0.0,
        use_only_unimodal: bool = False,
        layer_cache: str | None = None,
        pad_id: int | None = None,
        k: Sequence[int] = (1, 5, 10),
        kept_neighbours: int | None = 10,
        chunk_size: int | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        schedule: Literal["released", "cosine", "constant"] = "released",
    ) -> None:
        if base == "csa" and head != "linear":
            raise InputError(f"base='csa' gives linear maps: head must be 'linear', got {head!r}")
        super().__init__(
            image=image, text=text, image_layer=image_layer, text_layer=text_layer, image_dim=image_dim, text_dim=text_dim,
            layer_choice=layer_choice, neighbours=neighbours, selection_samples=selection_samples,
            head="canonical" if base == "csa" else head, embed_dim=embed_dim, image_options=image_options,
            text_options=text_options, layer_cache=layer_cache, pad_id=pad_id, k=k, kept_neighbours=kept_neighbours,
        )  # fmt: skip
        _check(
            structure_weight=structure_weight, warmup_steps=warmup_steps, temperature=temperature, margin=margin,
            structure_temperature=structure_temperature, levels=levels, canonical_ridge=canonical_ridge,
            canonical_power=canonical_power,
        )  # fmt: skip
        _check_choices(
            base=base,
            head=head,
            schedule=schedule,
            level_weights=level_weights,
            divergence=divergence,
            centering=centering,
        )
        self.base = base
        self._canonical: dict[str, Any] = {"ridge": canonical_ridge, "power": canonical_power}
        self._moments: PairMoments | None = None
        self.structure_weight = structure_weight
        self.warmup_steps = warmup_steps
        self.temperature = temperature
        self.structure_options: dict[str, Any] = {
            "temperature": temperature if structure_temperature is None else structure_temperature, "levels": levels,
            "level_weights": level_weights, "divergence": divergence, "centering": centering, "margin": margin,
            "chunk_size": chunk_size,
        }  # fmt: skip
        self.use_only_unimodal = use_only_unimodal
        self.chunk_size = chunk_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule = schedule
        if base == "siglip":
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
            self.bias = nn.Parameter(torch.tensor(-10.0))

    # -- losses ----------------------------------------------------------------------------------------------------

    def base_loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the base loss of unit embeddings (B, D) of pairs: contrastive in nats, or that of ``"csa"``."""
        if self.base == "csa":
            total = -(image * text).sum() / self.embed_dim
            return _CSA_SHARE * (sum_over_ranks(total) if self.spans_processes else total)
        given: dict[str, Any] = {"gather": self.spans_processes, "chunk_size": self.chunk_size}
        if self.base == "clip":
            return clip_loss(image, text, scale=1 / self.temperature, **given)
        return siglip_loss(image, text, scale=self.log_scale.exp(), bias=self.bias, **given)

    def regulariser(self, features: dict[str, Tensor], aligned: dict[str, Tensor]) -> Tensor:
        """Return R_S, the mean of both modalities, in nats."""
        frozen = features
        if self.base == "csa":
            # Its heads see centred features, and so does the release's regulariser.
            frozen = {m: head.centred(features[m]) for m, head in zip(MODALITIES, self._canonical_heads, strict=True)}
        losses = [
            structure_loss(frozen[m], aligned[m], gather=self.spans_processes, **self.structure_options)
            for m in MODALITIES
        ]
        return (losses[0] + losses[1]) / 2

    def weight_at(self, step: int) -> float:
        """Return lambda_t.

        Args:
            step: optimizer steps so far.
        """
        return self.structure_weight * (min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0)

    # -- canonical correlation -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Choose the layers, see `TwoHeadModule`, and set the heads of ``"csa"``.

        Raises:
            InputError: ``"csa"`` over data of unknown length, or over fewer than two pairs.
        """
        super().setup(stage)
        if stage == "fit" and self.base == "csa":
            moments = pair_moments(self.feature_pairs())
            # Each process has seen all pairs, but may have rounded otherwise.
            self._moments = self.trainer.strategy.broadcast(moments)
            fit_heads(self._canonical_heads, self._moments, **self._canonical)

    def teardown(self, stage: str) -> None:
        """Undo what `setup` did to the data."""
        super().teardown(stage)
        self._moments = None

    def on_validation_epoch_start(self) -> None:
        """Scale the directions of ``"csa"`` and embed the prompts of the classes with the heads as they are now."""
        self._whiten()
        super().on_validation_epoch_start()

    def on_train_epoch_end(self) -> None:
        """Scale the directions of ``"csa"``."""
        self._whiten()

    def _whiten(self) -> None:
        if self._moments is not None:
            whiten_heads(self._canonical_heads, self._moments, **self._canonical)

    @property
    def _canonical_heads(self) -> tuple[CanonicalHead, CanonicalHead]:
        return cast("CanonicalHead", self.image_head), cast("CanonicalHead", self.text_head)

    # -- fit -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch; see the class for what a batch is."""
        features, aligned, base = self._base(batch)
        if self.example_shape is None and "image" in batch:
            self.example_shape = tuple(batch["image"].shape[1:])
        weight, loss, rows = self.weight_at(self.global_step), base, len(features["image"])
        logged: dict[str, Any] = {"train/base_loss": base, "train/structure_weight": weight}
        if weight > 0:
            self._add_unpaired(batch, features, aligned)
            structure = self.regulariser(features, aligned)
            loss = base + weight * structure
            logged["train/structure_loss"] = structure
            self._log_statistics(features)
        self.log_dict({"train/loss": loss, **logged}, batch_size=rows)
        return loss

    def _base(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        features = self.features_of(batch)
        aligned = {modality: self.aligned(modality, rows) for modality, rows in features.items()}
        return features, aligned, self.base_loss(unit(aligned["image"]), unit(aligned["text"]))

    def _add_unpaired(self, batch: Any, features: dict[str, Tensor], aligned: dict[str, Tensor]) -> None:
        for modality in MODALITIES:
            extra = self.frozen_rows(batch, f"{modality}_only", modality)
            if extra is None:
                continue
            head = self.aligned(modality, extra)
            kept = not self.use_only_unimodal
            features[modality] = torch.cat([features[modality], extra]) if kept else extra
            aligned[modality] = torch.cat([aligned[modality], head]) if kept else head

    def _log_statistics(self, features: dict[str, Tensor]) -> None:
        if self.global_step % max(1, getattr(self.trainer, "log_every_n_steps", 50)):
            return
        for modality, rows in features.items():
            found = structure_statistics(
                rows, temperature=self.structure_options["temperature"], centering=self.structure_options["centering"],
                gather=self.spans_processes, chunk_size=self.chunk_size,
            )  # fmt: skip
            self.log_dict({f"structure/{modality}/{name}": v for name, v in found.items()}, batch_size=len(rows))

    def evaluate(self, batch: Any, split: str) -> None:
        """Log the losses of a batch, the regulariser at its full weight, and update the metrics."""
        features, aligned, base = self._base(batch)
        structure = self.regulariser(features, aligned)
        losses = {"loss": base + self.structure_weight * structure, "base_loss": base, "structure_loss": structure}
        rows = len(features["image"])
        self.log_dict({f"{split}/{name}": v for name, v in losses.items()}, sync_dist=True, batch_size=rows)
        embeddings = {modality: unit(rows) for modality, rows in aligned.items()}
        kept = {f"structure/{modality}": (embeddings[modality], features[modality]) for modality in MODALITIES}
        self.evaluation.update(embeddings, kept, ids=batch.get("id"), labels=batch.get("label"))
        for modality, metric in self.neighbourhoods.items():
            cast("Any", metric).update(embeddings[modality], features[modality], batch.get("id"))

    def configure_optimizers(self) -> Any:
        """Return AdamW and the schedule, per step.

        LightningCLI's ``optimizer`` and ``lr_scheduler`` take its place when given.

        Raises:
            InputError: a cosine over a run without an end.
        """
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in learned if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr, betas=(0.9, 0.95))
        if self.schedule == "constant":
            return optimizer
        total = self.trainer.estimated_stepping_batches
        if self.schedule == "released":
            steps = self.trainer.num_training_batches / max(1, self.trainer.accumulate_grad_batches)
            total = _PERIOD * math.ceil(steps) if math.isfinite(steps) else math.inf
        if not math.isfinite(total):
            raise InputError(
                f"schedule={self.schedule!r} needs a run of known length: set max_steps or max_epochs over data with a "
                "length, or schedule='constant'"
            )

        def factor(step: int) -> float:
            return 0.5 * (1.0 + math.cos(math.pi * step / max(1, int(total))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _check(**numbers: Any) -> None:
    rules: dict[str, tuple[bool, str]] = {
        "structure_weight": (0 <= numbers["structure_weight"] < math.inf, "finite and not negative"),
        "warmup_steps": (numbers["warmup_steps"] >= 0, "at least 0"),
        "temperature": (0 < numbers["temperature"] < math.inf, "positive"),
        "structure_temperature": (
            numbers["structure_temperature"] is None or 0 < numbers["structure_temperature"] < math.inf,
            "positive or None",
        ),
        "levels": (numbers["levels"] >= 1, "at least 1"),
        "margin": (0 <= numbers["margin"] < math.inf, "finite and not negative"),
        "canonical_ridge": (0 <= numbers["canonical_ridge"] < math.inf, "finite and not negative"),
        "canonical_power": (0 <= numbers["canonical_power"] < math.inf, "finite and not negative"),
    }
    for name, (good, rule) in rules.items():
        if not good:
            raise InputError(f"{name} must be {rule}, got {numbers[name]}")


def _check_choices(**chosen: str) -> None:
    for name, value in chosen.items():
        require_choice(name, value, _CHOICES[name])
