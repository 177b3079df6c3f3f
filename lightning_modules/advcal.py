"""Adversarial calibration: a small head behind each frozen encoder, trained on attacked inputs against fixed class centres.

A labelled reconstruction from the abstract of Liao, Ren, Mei, Zheng: Adversarial Robustness for Unified Multi-Modal Encoders
via Efficient Calibration, arXiv 2505.11895 v1, 2025. No equation of the paper was read and no official code was found; what
the abstract does not say is ours, and no default here is the paper's. With z = unit(f_m(x)) of a frozen encoder and
y = unit(A_m z + b_m) behind the head of its modality, x' the attacked input, c_k the centres of the classes::

    ce   - log softmax_k(s pool <y(x'), c_k>)[label]       l2   ||y(x') - z(x)||^2
    nce  - log softmax_j(<y(x'_i), z_j> / t)[i]
    L = objective + beta (||y(x) - z(x)||^2 + KL(p(z(x)) || p(y(x'))))        p = softmax(s pool <., c>)

A head behind an encoder that is not robust cannot be expected to resist an attacker who knows it: what counts is the
accuracy when the attack goes through the head ("full"), and it is always logged beside that of attacks on the bare
encoder ("backbone").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from zoo.attack_cache import CachedAttacks
from zoo.attack_plan import AttackPlan, eps_label
from zoo.calibration_attacks import (
    Range,
    TrainingAttack,
    by_modality,
    generator_of,
    modality_samples,
    require_modalities,
)
from zoo.calibration_cross_modal import ModalityView
from zoo.calibration_evaluation import CalibrationEvaluation
from zoo.calibration_heads import CalibrationHead
from zoo.calibration_objective import CalibrationObjective, objective_weights
from zoo.errors import InputError, require_choice
from zoo.frozen_encoders import FrozenEncodersModule
from zoo.losses.advcal import clean_adversarial_l2
from zoo.losses.centres import Pool
from zoo.one_cycle import one_cycle
from zoo.robustness import RobustnessTrial, undisturbed_networks

__all__ = ["AdversarialCalibration"]

AttackName = Literal["auto", "ce", "dlr", "repel", "l2", "cos"]
# Streams of random numbers: the attacks of training, those of the cache, those of evaluation, those between modalities.
_TRAIN, _CACHE, _EVAL, _ACROSS = 1, 2, 3, 4


class AdversarialCalibration(FrozenEncodersModule):
    """Train a head behind each frozen encoder on attacked inputs, against fixed class centres.

    Reconstructed from the abstract of arXiv 2505.11895 v1; no equation of the paper was read.

    A batch is a dict: inputs by modality, all or some of them, and "label"; or a dict of pairs (inputs, labels) by modality,
    as Lightning's CombinedLoader joins several data sets; or such a pair, for a single modality. Inputs lie in the valid
    range of their modality, within which they are attacked. The loss is the mean over the modalities of the batch; under
    several processes ``nce`` compares with the clean embeddings of all.

    Only the heads train. They, the class centres and the encoders whose weights have no public name are stored; the text
    tower is not. Encoders may be modules, such as the trunks of Bind models: ``from_pretrained(…, encoders={…})`` asks for
    them again, all of them.

    Logged: ``train/loss``, and unweighted ``train/{objective}``, ``train/identity`` and ``train/divergence`` (the
    regulariser); ``train/displacement``, the squared distance that the attack moved embeddings by before the head. In
    validation, means over the modalities, and where there are several ``val/{modality}/…``: ``val/clean`` and
    ``val/clean_without_head``, top-1 accuracy; ``val/drift``, mean ||y(x) - z(x)||^2; ``val/adversarial/full``, right when
    clean and under every attack through head and encoder; ``val/adversarial/backbone``, the same under attacks on the bare
    encoder; ``val/adversarial/noise``, under random signs of the same size. Choose models by ``val/adversarial/full``.
    Between several modalities, of the samples that are attacked: ``val/retrieval/r1`` and ``r5``, whether a thing of the
    same class is among the nearest of another modality; ``val/agreement/clean``, in paired batches, whether both predict the
    same class; ``val/retrieval/attacked_r1``, ``attacked_r5`` and ``val/agreement/attacked``, the same when PGD drives the
    embedding of the one away, behind its head. All under ``test/`` as well; and ``val/trainable_share``.

    Args:
        encoders: the frozen encoder of each modality, by the modality's key in a batch: tower names, or modules with
            ``output_dim``. All share one space.
        encoder_options: options for the builders of named encoders, by modality.
        text: the text tower that makes the class centres from prompts. It must share the encoders' space.
        text_options: options for its builder.
        class_names: names of the classes, in the order of the labels; those of the data module if omitted.
        templates: by modality, prompts with ``{}`` where the name of the class goes; "a photo of a {}" and the like if
            omitted.
        centres: the class centres, in place of prompts: lists (K, D), or K lists of vectors, or a dict of those by modality;
            or a ``.npy`` or ``.safetensors`` file.
        centre_sha256: SHA-256 of the centres by modality. Recorded when they are made; other centres are refused then.
        head: ``"linear"``, an affine map that starts as the identity, or ``"residual_mlp"``.
        head_width: width inside ``residual_mlp``; that of the embeddings if omitted.
        objective: ``"ce"``, ``"l2"`` or ``"nce"``; a dict of weights sums several.
        regulariser_weight: beta; 0 is the control.
        clean_identity: let the regulariser hold the head to the identity on clean inputs. Without it only attacked inputs
            train, as the abstract has it, and clean embeddings drift.
        target: what the attacks of training go through: ``"backbone"``, the bare encoder, or ``"full"``, encoder and head as
            it is at that step.
        cache_attacks: with ``"backbone"``, attack each training sample once, before training, and keep the embeddings: the
            heads then train in seconds. The data module must be one of the zoo's; samples are those of evaluation,
            unaugmented.
        attack: loss of these attacks: ``"ce"``, ``"dlr"``, ``"repel"`` (labels), ``"l2"``, ``"cos"`` (clean embeddings), or
            ``"auto"``: ``"ce"`` where the objective has it, else ``"l2"``.
        eps: radius of all attacks, a share of the valid range: 4/255 is 4/255 of an image in [0, 1]. A dict by modality
            gives each its own.
        step_size: length of a step in training, a share of the valid range; a dict as for ``eps``.
        steps: steps of an attack in training.
        valid_range: by modality, the lowest and the highest value of an input, numbers or one for each channel; [0, 1] if
            omitted. Normalised images have ((0 - mean) / std, (1 - mean) / std).
        micro_batch: samples that an attack takes at a time; all of the batch if omitted. Fewer need less memory, with the
            same result.
        eval_attacks: attacks of evaluation, such as ``"pgd-ce"`` and ``"apgd-dlr"``; see `zoo.attack_plan`.
        eval_steps: their steps, each a quarter of the radius for PGD.
        eval_samples: how many samples of each modality and process are attacked in an evaluation, at most.
        scale: factor of the cosines in logits.
        pool: how several centres of a class count: ``"mean_centre"``, ``"mean_sim"``, ``"max"``, ``"lse"`` or ``"lme"``; see
            `zoo.losses.pooled_similarities`.
        temperature: of ``nce``.
        symmetric: take both directions in ``nce``.
        same_class_negatives: let samples of one class be negatives of each other in ``nce``.
        chunk_size: tile of ``nce``; the engine chooses if omitted.
        max_trainable_share: refuse heads with a larger share of all parameters, such as 0.01; any if omitted.
        seed: number of the random starts.
        lr: highest learning rate of the default optimizer, AdamW, which grows in the first tenth of the run and then falls
            as a cosine (OneCycle).
        weight_decay: its weight decay.

    Raises:
        InputError: an encoder cannot be built, the widths differ, or a value is out of range.

    Example:
        >>> model = AdversarialCalibration(
        ...     {"image": "zoo/resnet8"}, encoder_options={"image": {"in_chans": 1}}, centres=torch.eye(10, 64).tolist()
        ... )
        >>> model.logits("image", torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        encoders: dict[str, str | dict[str, Any] | nn.Module],
        *,
        encoder_options: dict[str, dict[str, Any]] | None = None,
        text: str | dict[str, Any] | nn.Module | None = None,
        text_options: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        templates: dict[str, list[str]] | None = None,
        centres: str | list[Any] | dict[str, Any] | None = None,
        centre_sha256: dict[str, str] | None = None,
        head: CalibrationHead = "linear",
        head_width: int | None = None,
        objective: Literal["ce", "l2", "nce"] | dict[str, float] = "l2",
        regulariser_weight: float = 0.1,
        clean_identity: bool = True,
        target: Literal["backbone", "full"] = "backbone",
        cache_attacks: bool = True,
        attack: AttackName = "auto",
        eps: float | dict[str, float] = 4 / 255,
        step_size: float | dict[str, float] = 1 / 255,
        steps: int = 10,
        valid_range: dict[str, list[float | list[float]]] | None = None,
        micro_batch: int | None = None,
        eval_attacks: Sequence[str] = ("pgd-ce",),
        eval_steps: int = 20,
        eval_samples: int = 256,
        scale: float = 100.0,
        pool: Pool = "mean_centre",
        temperature: float = 0.07,
        symmetric: bool = False,
        same_class_negatives: bool = True,
        chunk_size: int | None = None,
        max_trainable_share: float | None = None,
        seed: int = 0,
        lr: float = 3e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        require_choice("target", target, ("backbone", "full"))
        require_choice("attack", attack, get_args(AttackName))
        require_choice("pool", pool, get_args(Pool))
        for name, value in (("steps", steps), ("eval_samples", eval_samples)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        objectives = CalibrationObjective(
            objective_weights(objective), regulariser_weight, clean_identity, scale, pool, temperature, symmetric,
            same_class_negatives, chunk_size,
        )  # fmt: skip
        super().__init__(
            encoders, encoder_options=encoder_options, text=text, text_options=text_options, class_names=class_names,
            templates=templates, centres=centres, centre_sha256=centre_sha256, head=head, head_width=head_width,
            scale=scale, pool=pool, max_trainable_share=max_trainable_share,
        )  # fmt: skip
        self.objective = objectives
        self.target = target
        self.cache_attacks = cache_attacks
        self.attack = ("ce" if "ce" in objectives.weights else "l2") if attack == "auto" else attack
        self.seed = seed
        self.lr = lr
        self.weight_decay = weight_decay
        radii, lengths = (
            by_modality(name, value, self.modalities) for name, value in (("eps", eps), ("step_size", step_size))
        )
        require_modalities("valid_range", valid_range or {}, self.modalities)
        self.attacks = {
            name: TrainingAttack(self.attack, radii[name], lengths[name], steps, _range(name, valid_range), micro_batch)
            for name in self.modalities
        }
        # Refuses what no evaluation could use, before a run begins; also where this is built on the meta device.
        self._eval_options: dict[str, Any] = {
            "attacks": tuple(eval_attacks), "steps": eval_steps, "micro_batch": micro_batch,
        }  # fmt: skip
        with torch.device("cpu"):
            for name in self.modalities:
                AttackPlan(eps=(radii[name],), **self._eval_options)
        self.evaluation = CalibrationEvaluation(self.modalities, eval_samples)

    # -- fit -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Make the centres, and with cached attacks attack the training data."""
        super().setup(stage)
        if stage == "fit" and self.target == "backbone" and self.cache_attacks:
            device = self.trainer.strategy.root_device
            self.to(device)
            self._cached = CachedAttacks(
                self.trainer, modalities=self.modalities, pair=self._cached_pair, device=device
            )
            self.example_shape = self.example_shape or self._cached.example_shape

    def teardown(self, stage: str) -> None:
        """Give the data module its own data back."""
        cached = self.__dict__.pop("_cached", None)
        if cached is not None:
            cached.undo()
        super().teardown(stage)

    def _cached_pair(self, modality: str, x: Tensor, labels: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        return self.attacked_pair(modality, x, labels, (self.seed, _CACHE, self.modalities.index(modality), number))

    def attacked_pair(
        self, modality: str, x: Tensor, labels: Tensor | None, key: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the unit embeddings (B, D) of clean and of attacked inputs, constants.

        Args:
            modality: their modality.
            x: inputs (B, …).
            labels: classes (B,), where the attack needs them.
            key: integers that the random starts depend on.
        """
        full = self.target == "full"
        with torch.no_grad():
            clean = self.embed(modality, x)
        attacked = self.attacks[modality].run(
            x,
            labels,
            embed=partial(self.encode if full else self.embed, modality),
            classify=partial(self.logits, modality, calibrated=full),
            clean=clean,
            generator=generator_of(x.device, key),
        )
        with torch.no_grad():
            return clean, self.embed(modality, attacked)

    @property
    def spans_processes(self) -> bool:
        """Whether ``nce`` has to gather the batches of several processes."""
        return self._trainer is not None and self.trainer.training and self.trainer.world_size > 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch; see the class for what a batch is."""
        if isinstance(batch, dict) and "attacked" in batch:
            pairs = {m: (batch["clean"][m], batch["attacked"][m], batch.get("label")) for m in batch["clean"]}
        else:
            pairs = self._attacked_batch(batch, batch_idx)
        found = {modality: self.terms(modality, *pair) for modality, pair in pairs.items()}
        terms = {key: torch.stack([each[key] for each in found.values()]).mean() for key in next(iter(found.values()))}
        loss = self.objective.total(terms)
        with torch.no_grad():
            terms["displacement"] = torch.stack([clean_adversarial_l2(b, a) for a, b, _ in pairs.values()]).mean()
        rows = max(len(clean) for clean, _, _ in pairs.values())
        self.log_dict({"train/loss": loss, **{f"train/{k}": v for k, v in terms.items()}}, batch_size=rows)
        return loss

    def _attacked_batch(self, batch: Any, batch_idx: int) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        found = {}
        for modality, (x, labels) in modality_samples(batch, self.modalities).items():
            place = self.modalities.index(modality)
            if self.example_shape is None and place == 0:
                self.example_shape = tuple(x.shape[1:])
            key = (self.seed, _TRAIN, place, self.global_rank, self.current_epoch, batch_idx)
            found[modality] = (*self.attacked_pair(modality, x, labels, key), labels)
        return found

    def terms(self, modality: str, clean: Tensor, attacked: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the terms of the loss, unweighted; see `zoo.calibration_objective.CalibrationObjective.terms`."""
        head: Any = self.heads[modality]
        return self.objective.terms(
            head, clean, attacked, labels, self.class_centres(modality), gather=self.spans_processes
        )

    def configure_optimizers(self) -> Any:
        """Return AdamW and, per step, one cycle of the learning rate.

        LightningCLI's ``optimizer`` and ``lr_scheduler`` take its place when given.

        Raises:
            InputError: a run without an end.
        """
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise InputError(
                "one cycle needs a run of known length: set max_steps, or max_epochs over data with a length"
            )
        optimizer = torch.optim.AdamW(self.heads.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(one_cycle, total=int(total)))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    # -- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics."""
        self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the split."""
        self._log_metrics("val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics."""
        self._evaluate(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the split."""
        self._log_metrics("test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the unit embeddings (B, D) behind the head of each modality that the batch has."""
        return {m: self.encode(m, x) for m, (x, _) in modality_samples(batch, self.modalities).items()}

    def _evaluate(self, batch: Any, batch_idx: int) -> None:
        views: dict[str, ModalityView] = {}
        for modality, (x, labels) in modality_samples(batch, self.modalities).items():
            if labels is None:
                raise InputError("evaluation needs labels: give batches with 'label'")
            clean = self.embed(modality, x)
            moved = self.heads[modality](clean)
            classes = self.similarities(modality, moved).argmax(1)
            verdicts = {
                "clean": classes == labels,
                "clean_without_head": self.similarities(modality, clean).argmax(1) == labels,
            }
            chosen = slice(min(len(x), self.evaluation.left(modality)))
            if chosen.stop:
                verdicts |= self._attacked_verdicts(modality, x[chosen], labels[chosen], batch_idx)
                if self.evaluation.across is not None:
                    attacked = self._driven_away(modality, x[chosen], moved[chosen], batch_idx)
                    turned = self.similarities(modality, attacked).argmax(1)
                    views[modality] = ModalityView(moved[chosen], attacked, classes[chosen], turned, labels[chosen])
            self.evaluation.update(modality, verdicts, (moved - clean).square().sum(1))
        self.evaluation.compare(views, paired=isinstance(batch, dict) and "label" in batch)

    def _driven_away(self, modality: str, x: Tensor, clean: Tensor, batch_idx: int) -> Tensor:
        encode, generator = partial(self.encode, modality), self._generator(_ACROSS, modality, x, batch_idx)
        steps = self._eval_options["steps"]
        return self.attacks[modality].driven_away(x, clean, encode=encode, steps=steps, generator=generator)

    def _generator(self, stream: int, modality: str, x: Tensor, batch_idx: int) -> torch.Generator:
        return generator_of(x.device, (self.seed, stream, self.modalities.index(modality), self.global_rank, batch_idx))

    def _attacked_verdicts(self, modality: str, x: Tensor, labels: Tensor, batch_idx: int) -> dict[str, Tensor]:
        attack = self.attacks[modality]
        generator = self._generator(_EVAL, modality, x, batch_idx)
        with undisturbed_networks(x.device):
            # Copies, because what inference mode made has no gradient.
            x, labels = x.clone(), labels.clone()
            plan = AttackPlan(eps=(attack.eps,), valid_range=attack.bounds(x), **self._eval_options)
            trial = RobustnessTrial(
                partial(self.logits, modality), plan, embedding=partial(self.encode, modality),
                surrogate=partial(self.logits, modality, calibrated=False),
                surrogate_embedding=partial(self.embed, modality),
            )  # fmt: skip
            found = trial.verdicts(x, labels, generator=generator)
        label = eps_label(attack.eps)
        kinds = {"full": "adaptive", "backbone": "transfer", "noise": "noise"}
        return {f"adversarial/{name}": found[f"{kind}_{label}"] for name, kind in kinds.items()}

    def _log_metrics(self, split: str) -> None:
        found: dict[str, Any] = {**self.evaluation.finish(), "trainable_share": self.trainable_share}
        # Every process has computed the value of all of them; the mean only says so to Lightning.
        self.log_dict({f"{split}/{name}": value for name, value in found.items()}, sync_dist=True)


def _range(modality: str, given: Mapping[str, Sequence[float | list[float]]] | None) -> Range:
    bounds = (given or {}).get(modality, (0.0, 1.0))
    if len(bounds) != 2:
        raise InputError(f"valid_range must be two bounds a modality, the lower one first, got {bounds} for {modality}")
    return bounds[0], bounds[1]
