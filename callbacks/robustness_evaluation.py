"""Accuracy under attack during validation and test, and whether it can be believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from zoo import towers
from zoo.attack_plan import AttackPlan
from zoo.attacked_networks import InputSpace, callable_member
from zoo.attacked_networks import class_centres as unit_centres
from zoo.data.draws import random_words
from zoo.errors import InputError
from zoo.image_logging import log_image
from zoo.labelled_batch import labelled_batch
from zoo.losses.contracts import require_number
from zoo.metrics.robustness import RobustAccuracy
from zoo.pixel_units import PixelUnits, find_normalisation
from zoo.robustness import RobustnessTrial, undisturbed_networks
from zoo.robustness_checks import find_flaws, robustness_figure

__all__ = ["RobustnessEvaluation"]

# How many samples are attacked before training, to find mistakes in the arguments.
_REHEARSAL = 2


@dataclass
class _Run:
    """One evaluation.

    Attributes:
        split: ``"val"`` or ``"test"``.
        plan: its attacks.
        rehearsal: whether it only looks for mistakes.
        metric: the counts of this process.
        share: how many samples this process attacks; None for all.
        seen: how many it has.
        space: where its attacks are made, once there is a batch.
        trial: the attacks, once there is a batch.
    """

    split: str
    plan: AttackPlan
    rehearsal: bool
    metric: RobustAccuracy
    share: int | None
    seen: int = 0
    space: InputSpace | None = None
    trial: RobustnessTrial | None = None


class RobustnessEvaluation(pl.Callback):
    """Attack the first samples of the validation and the test data, and log how many stay right.

    For any LightningModule that classifies, by logits or by the nearest of some class centres. The module is judged as it
    is: in eval mode, eagerly, without autocast; its gradients, modes and hooks and all random numbers are as before
    afterwards, so that a run gives the same weights with and without the callback. Of several validation loaders the first
    one counts. Under DDP each process attacks its share of ``max_samples``, and counts are added over processes.

    Logged, ``val`` being ``test`` in a test: ``val/robust/clean``, and for each radius, such as 2/255,
    ``val/robust/adaptive_2_255`` (the attacks see the module), ``val/robust/noise_2_255`` (random noise of that size) and,
    with a surrogate, ``val/robust/transfer_2_255`` (the attacks see the surrogate). Each is the share of samples that are
    right, without attack and under all of its attacks. The curve over the radius goes to the logger and to the model card.

    Radii and the valid range are those of pixels in [0, 1] if the inputs are normalised and the normalisation is known: by
    ``mean`` and ``std``, or those of the data module, or the transform of a tower with weights inside the module. Else they
    apply to the inputs as they are.

    What a sound evaluation does not show is warned of, each thing once: accuracy that grows with the radius or with the
    steps, attacks that do not raise their loss or leave samples right where everything is allowed, noise or the surrogate's
    attacks doing more harm than attacks on the module itself, answers that change from one call to the next. See
    `zoo.robustness_checks.find_flaws`. Before training, two samples are attacked, if the trainer has sanity validation
    steps, so that mistakes in the arguments show at once.

    Args:
        eps: radii, ascending, as shares of the valid range.
        attacks: names from `zoo.attack_plan.ATTACKS`, such as ``"pgd-ce"``, ``"apgd-dlr"``, ``"pgd-l2"``; see
            `zoo.attack_plan.AttackPlan`.
        every_n_epochs: evaluate in every so many epochs of fit, counted from 1; ``trainer.validate`` and ``test`` always do.
        max_samples: how many samples to attack at most, over all processes; None takes all.
        steps: gradient steps of each attack; 10 show a trend, report numbers of 100.
        restarts: random starts of each attack.
        norm: ``"linf"`` or ``"l2"``.
        valid_range: lowest and highest value of an input before normalisation.
        mean: mean of each channel that was subtracted; ``[0.0]`` with ``std`` ``[1.0]`` says that nothing was.
        std: standard deviation of each channel that was divided by.
        forward: what gives logits (B, K), or embeddings (B, D) with ``class_centres``: name of a method, or a function of
            module and inputs; ``module(x)`` if omitted.
        class_centres: embeddings (K, D) of the classes: a tensor, or name of an attribute or method of the module that has
            them at validation. Logits are ``scale`` times the cosines, and the attacks ``l2`` and ``cos`` move unit
            embeddings.
        scale: of the cosines, positive.
        surrogate: what transfer attacks see, with outputs as those of ``forward``: a tower name with weights, a module, or
            name of an attribute of the module, such as its frozen encoder. No transfer attacks if omitted.
        surrogate_options: options for the builder of a named surrogate, such as ``{in_chans: 1}``.
        check_samples: on how many samples of each process the checks are made that need attacks of their own; 0 makes none.
        micro_batch: samples that are attacked at a time, a batch if omitted.
        batch_to_input: batch -> inputs; the first item of a batch ``(x, y)`` if omitted.
        batch_to_target: batch -> labels (B,), or soft labels (B, K) of which the largest counts; the second item if omitted.
        name: stands in the logged names; two of these callbacks in one trainer need two names.
        seed: of the random starts and the noise, which are the same at each evaluation.

    Raises:
        InputError: a value is out of range; at the start: sharded strategies, or a surrogate that cannot be had; in
            validation: a batch without inputs and labels, inputs outside of the valid range, or no logits or embeddings.

    Example:
        >>> callback = RobustnessEvaluation(eps=(0.1, 0.2), attacks=("pgd-ce", "pgd-dlr"), max_samples=100)
        >>> callback.card_figures()
        {}
    """

    def __init__(
        self,
        eps: Sequence[float] = (2 / 255, 4 / 255),
        attacks: Sequence[str] = ("pgd-ce", "apgd-dlr"),
        *,
        every_n_epochs: int = 1,
        max_samples: int | None = 256,
        steps: int = 10,
        restarts: int = 1,
        norm: Literal["linf", "l2"] = "linf",
        valid_range: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        forward: str | Callable[[pl.LightningModule, Tensor], Tensor] | None = None,
        class_centres: str | Tensor | None = None,
        scale: float = 100.0,
        surrogate: str | nn.Module | None = None,
        surrogate_options: dict[str, Any] | None = None,
        check_samples: int = 64,
        micro_batch: int | None = None,
        batch_to_input: Callable[[Any], Tensor] | None = None,
        batch_to_target: Callable[[Any], Tensor] | None = None,
        name: str = "robust",
        seed: int = 0,
    ) -> None:
        self.valid_range = (float(valid_range[0]), float(valid_range[1]))
        self.plan = AttackPlan(tuple(eps), tuple(attacks), steps, restarts, norm, self.valid_range, micro_batch)
        for option, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("max_samples", max_samples, 1),
            ("check_samples", check_samples, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"{option} must be at least {least}, got {value}")
        if (mean is None) != (std is None):
            raise InputError("mean and std belong together: give both or neither")
        require_number("scale", scale, positive=True)
        if not name.isidentifier():
            raise InputError(f"name must be letters, digits and '_', got {name!r}")
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.units = None if mean is None or std is None else PixelUnits(mean, std)
        self.forward = forward
        self.class_centres = class_centres
        self.scale = scale
        self.surrogate = surrogate
        self.surrogate_options = towers.tower_options("surrogate_options", surrogate_options)
        self.check_samples = check_samples
        self.batch_to_input = batch_to_input
        self.batch_to_target = batch_to_target
        self.name = name
        self.seed = seed
        self.results: dict[str, dict[str, Any]] = {}
        self._warned: set[str] = set()
        self._surrogate: nn.Module | None = None
        self._home: torch.device | None = None
        self._run: _Run | None = None
        self._told = False

    # -- state -----------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Two of these callbacks may stand side by side if they have different names."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the last results, for the card of a resumed run, and what was warned of."""
        return {"results": self.results, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.results = state_dict["results"]
        self._warned = set(state_dict["warned"])

    def card_figures(self) -> dict[str, bytes]:
        """Return the curve of the last evaluation, that of the test if there was one, as PNG; nothing before."""
        result = self.results.get("test") or self.results.get("val")
        if result is None:
            return {}
        return {"robustness": robustness_figure(result["shares"], result["radii"], title=result["title"])}

    # -- life ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit, and build the surrogate if it is a tower.

        Raises:
            InputError: a sharded strategy, or a tower that cannot be built or has random weights.
        """
        if not isinstance(trainer.strategy, pl.strategies.DDPStrategy | pl.strategies.SingleDeviceStrategy):
            raise InputError(
                f"RobustnessEvaluation cannot attack a module under {type(trainer.strategy).__name__}: use DDP or one device"
            )
        if stage == "fit":
            self.results, self._warned = {}, set()
        if isinstance(self.surrogate, nn.Module):
            self._surrogate = self.surrogate
        elif self.surrogate is not None and _is_tower(self.surrogate) and self._surrogate is None:
            if not towers.has_weights(self.surrogate):
                raise InputError(
                    f"surrogate must be a tower with weights, and {self.surrogate!r} has random ones: give another name or "
                    "a module"
                )
            embedding = self.class_centres is not None
            modality = "image" if self.surrogate.startswith("open_clip/") else None
            with isolate_rng():
                self._surrogate = towers.create(
                    self.surrogate, frozen=True, embedding=embedding, modality=modality, **self.surrogate_options
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look up what the arguments name in the module.

        Raises:
            InputError: there is no such method or network.
        """
        self._outputs(pl_module)
        self._surrogate_outputs(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an evaluation, if it is due."""
        epoch = trainer.current_epoch + 1
        if trainer.sanity_checking or trainer.state.fn != "fit" or epoch % self.every_n_epochs == 0:
            self._start(trainer, pl_module, "val")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an evaluation."""
        self._start(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attack a batch, as long as there are samples to take, before the module can change it in place."""
        if dataloader_idx == 0:
            self._take(trainer, pl_module, batch, batch_idx)

    on_test_batch_start = on_validation_batch_start

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was found."""
        self._finish(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the surrogate back to where it was."""
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Forget an evaluation that did not come to its end, and put the surrogate back."""
        self._leave()

    # -- steps -----------------------------------------------------------------------------------------------------

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        rehearsal = bool(trainer.sanity_checking)
        plan = dataclasses.replace(self.plan, steps=1) if rehearsal else self.plan
        conditions = plan.conditions(surrogate=self.surrogate is not None, checks=self.check_samples > 0)
        metric = RobustAccuracy(conditions).to(pl_module.device)
        # torchmetrics warns where nothing was counted, and a process may have no sample.
        metric.update({})
        limit = _REHEARSAL if rehearsal else self.max_samples
        share = None if limit is None else -(-(limit - trainer.global_rank) // trainer.world_size)
        if self._surrogate is not None:
            if self._home is None:
                self._home = next((one.device for one in self._surrogate.parameters()), torch.device("cpu"))
            self._surrogate.to(pl_module.device)
        self._run = _Run(split, plan, rehearsal, metric, share)

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        run = self._run
        left = None if run is None or run.share is None else run.share - run.seen
        if run is None or (left is not None and left <= 0):
            return
        x, targets = labelled_batch(batch, self.batch_to_input, self.batch_to_target)
        x, targets = x[:left], targets[:left]
        if not len(x):
            return
        seed = int(random_words((self.seed, trainer.global_rank), [batch_idx])[0] >> 1)
        with undisturbed_networks(x.device, pl_module, self._surrogate):
            # Clones: what inference mode made cannot be recorded.
            x, labels = x.detach().clone(), (targets.argmax(1) if targets.ndim == 2 else targets).clone()
            if run.space is None or run.trial is None:
                run.space = self._space(trainer, pl_module)
                run.trial = self._trial(pl_module, run, x.dtype)
            verdicts = run.trial.verdicts(
                run.space.enter(x),
                labels,
                generator=torch.Generator(x.device).manual_seed(seed),
                checks=max(0, self.check_samples - run.seen),
            )
            run.metric.update(verdicts)
        run.seen += len(x)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run, self._run = self._run, None
        if run is None or run.rehearsal:
            return
        values, samples = run.metric.compute(), run.metric.samples
        shares = {condition: float(value) for condition, value in values.items() if samples[condition]}
        if "clean" not in shares:
            return
        results = {name: share for name, share in shares.items() if not name.startswith("check_")}
        title = f"{run.split}: {samples['clean']} samples, {self.plan.norm}, {self.plan.steps} steps"
        self.results[run.split] = {"shares": results, "radii": self.plan.radii, "title": title}
        pl_module.log_dict(
            {f"{run.split}/{self.name}/{name}": share for name, share in results.items()},
            sync_dist=trainer.world_size > 1,  # the same in each; Lightning warns without
        )
        for finding in find_flaws(shares, samples, self.plan.radii):
            if finding.name not in self._warned:
                self._warned.add(finding.name)
                rank_zero_warn(f"RobustnessEvaluation, {run.split}: {finding.message}")
        if trainer.is_global_zero:
            figure = robustness_figure(results, self.plan.radii, title=title)
            log_image(trainer, f"{run.split}/{self.name}/curve", figure, step=trainer.global_step)

    def _leave(self) -> None:
        self._run = None
        if self._surrogate is not None and self._home is not None:
            self._surrogate.to(self._home)
            self._home = None

    # -- networks --------------------------------------------------------------------------------------------------

    def _space(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> InputSpace:
        """Return where the attacks are made, and tell once whose normalisation is undone."""
        units, source = self.units, ""
        if units is None:
            units, source = find_normalisation(trainer, pl_module) or (None, "")
        if units is not None and source and not self._told:
            self._told = True
            rank_zero_info(
                f"RobustnessEvaluation attacks pixels before their normalisation, mean {units.mean} and std {units.std} "
                f"according to {source}"
            )
        return InputSpace(units, self.valid_range)

    def _trial(self, pl_module: pl.LightningModule, run: _Run, dtype: torch.dtype) -> RobustnessTrial:
        """Return the attacks on the module, for inputs of this type."""
        assert run.space is not None
        centres = None
        if self.class_centres is not None:
            wide = torch.float64 if pl_module.dtype == torch.float64 else torch.float32
            centres = unit_centres(pl_module, self.class_centres, wide).to(pl_module.device)
        logits, embedding = run.space.classifier(self._outputs(pl_module), dtype, centres, self.scale)
        outputs = self._surrogate_outputs(pl_module)
        if outputs is None:
            return RobustnessTrial(logits, run.plan, embedding=embedding)
        parameters = outputs.parameters() if isinstance(outputs, nn.Module) else ()
        dtype = next((one.dtype for one in parameters if one.is_floating_point()), dtype)
        other, moved = run.space.classifier(outputs, dtype, centres, self.scale)
        return RobustnessTrial(logits, run.plan, embedding=embedding, surrogate=other, surrogate_embedding=moved)

    def _outputs(self, pl_module: pl.LightningModule) -> Callable[[Tensor], Any]:
        if self.forward is None:
            return pl_module
        if isinstance(self.forward, str):
            return callable_member(pl_module, self.forward, "forward")
        return partial(self.forward, pl_module)

    def _surrogate_outputs(self, pl_module: pl.LightningModule) -> Callable[[Tensor], Any] | None:
        if self.surrogate is None:
            return None
        network: Callable[[Tensor], Any] | None = self._surrogate
        if network is None:
            assert isinstance(self.surrogate, str)
            network = callable_member(pl_module, self.surrogate, "surrogate")
        if isinstance(network, towers.Tower) and self.class_centres is not None:
            return network.features
        return network


def _is_tower(name: str) -> bool:
    """Whether a name is that of a tower and not of an attribute."""
    return "/" in name or name.startswith((".", "~"))
