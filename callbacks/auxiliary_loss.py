"""A loss that is added to the training step of any LightningModule: the base of the callbacks that regularise.

In the order of a fit: before the strategy wraps the module, `AuxiliaryLoss.build` makes what the loss trains, and it joins
the module, so that DDP reduces its gradients; once the optimizer is made, its parameters join that; then forward hooks
listen to the named layers, and the bound ``training_step`` on the instance is wrapped. The class of the module is not
touched, and all of it goes at the end of fit and after an exception.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from zoo.data.draws import random_words
from zoo.errors import InputError, nearest
from zoo.layer_outputs import named_layers
from zoo.module_patch import Attachment, ModulePatch, Tap, patch_of

__all__ = ["AuxiliaryLoss"]


class AuxiliaryLoss(pl.Callback, ABC):
    """Add ``weight · ramp · loss`` to what the user's ``training_step`` returns, a tensor or a dict with ``loss``.

    Gradient scaling, accumulation, clipping and DDP see one loss: the weights are those of a training step that adds it by
    hand, to the bit. A skipped step (None) stays skipped. With ``weight=0`` nothing is built, wrapped or drawn.

    A subclass gives `loss`, and `build` where it has something to train. That part belongs to the callback: a checkpoint has
    it in the callback's state, never in the module's ``state_dict()``. During fit it is a submodule of the user's module all
    the same, because DDP has to see it. The user's ``configure_optimizers`` does not see it; afterwards its parameters join
    the optimizer's group of the highest learning rate (the first of equals), whose options and schedule they share. It
    starts anew at each fit, unless ``ckpt_path`` brings it.

    `loss` has a random stream of its own, a function of seed, batch and process: dropout in it shifts nobody else's random
    numbers, and a resumed run draws the same.

    A layer that is called several times in a step gives the output of its last call; the loss sees what operations in place
    make of it later (a ReLU behind a batch norm). Layers are listened to inside the training step only. Refused: manual
    optimisation, sharded strategies, a ``training_step`` that takes ``dataloader_iter``.

    Args:
        layers: names of modules of the LightningModule whose outputs the loss needs, as in ``named_modules()``, without the
            ``_orig_mod`` of torch.compile.
        weight: weight of the loss after the ramp, at least 0.
        warmup_steps: the weight grows linearly from 0 over so many optimizer steps, counted from 0.

    Raises:
        InputError: a value is out of range; at the start of fit: no such layer (the nearest are shown), or something of the
            list above; in a step: a layer was not called, gave no tensor, or the step returned something else.

    Example:
        >>> class SmallFeatures(AuxiliaryLoss):
        ...     def loss(self, features, batch, pl_module):
        ...         return features["hidden"].square().mean()
        >>> SmallFeatures(["hidden"], weight=2.0, warmup_steps=4).weight_at(step=1, epoch=0)
        0.5
    """

    #: The loss is logged as ``train/<log_name>``, unweighted; a second callback of the name as ``train/<log_name>_2``.
    log_name = "auxiliary"

    def __init__(self, layers: Sequence[str], weight: float = 1.0, *, warmup_steps: int = 0) -> None:
        if not 0 <= weight < math.inf:
            raise InputError(f"weight must be finite and not negative, got {weight}")
        if warmup_steps < 0:
            raise InputError(f"warmup_steps must not be negative, got {warmup_steps}")
        self.layers = tuple(layers)
        self.weight = weight
        self.warmup_steps = warmup_steps
        self.label = self.log_name
        self._attachment: Attachment | None = None
        self._attached = False
        self._seed = 0
        self._default_dtype = torch.float32
        self.tap = Tap()
        self._handles: list[Any] = []

    # -- what a subclass gives -------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, features: dict[str, Tensor], batch: Any, pl_module: pl.LightningModule) -> Tensor:
        """Return the unweighted loss of one batch, a scalar; runs inside the training step, under its autocast.

        Args:
            features: the outputs of the layers by name, with their graph.
            batch: what ``training_step`` was given.
            pl_module: the user's module.
        """

    def build(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module | None:
        """Return what the loss trains, or None; called once a fit on the CPU, after ``setup`` and ``configure_model``.

        The random generators are as before afterwards.

        Args:
            trainer: the trainer that is about to fit.
            pl_module: the user's module, whose layers exist.
        """
        return None

    def weight_at(self, step: int, epoch: int) -> float:
        """Return the weight of the loss.

        Args:
            step: optimizer steps made so far.
            epoch: epochs finished so far.
        """
        return self.weight * min(1.0, step / self.warmup_steps) if self.warmup_steps else self.weight

    # -- state -----------------------------------------------------------------------------------------------------

    @property
    def part(self) -> nn.Module | None:
        """What `build` returned in the last fit, trained."""
        return None if self._attachment is None else self._attachment.part

    @property
    def state_key(self) -> str:
        """Two callbacks of a class may stand side by side if they listen to different layers."""
        return self._generate_state_key(layers=list(self.layers))

    def state_dict(self) -> dict[str, Any]:
        """Return the values of the trained part and the seed of the random stream; empty with ``weight=0``."""
        if self.weight == 0:
            return {}
        return {"seed": self._seed, "part": None if self.part is None else dict(self.part.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; outside of fit there is nothing to continue.

        Raises:
            InputError: the checkpoint's part is not the one of this run.
        """
        if not self._attached:
            return
        self._seed = state_dict["seed"]
        stored, own = state_dict["part"] or {}, {} if self.part is None else self.part.state_dict()
        if {name: value.shape for name, value in stored.items()} != {name: value.shape for name, value in own.items()}:
            raise InputError(
                f"{type(self).__name__} has another trained part in the checkpoint ({_shapes(stored)}) than in this run "
                f"({_shapes(own)}): resume with the arguments and layers that the checkpoint was written with"
            )
        if self.part is not None:
            self.part.load_state_dict(stored)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint whose optimizer has no place for the trained part.

        Raises:
            InputError: the checkpoint was written without this callback.
        """
        if self._attached and self.part is not None and self.state_key not in checkpoint["callbacks"]:
            raise InputError(
                f"the checkpoint was written without this {type(self).__name__} ({self.state_key}), so its optimizer has "
                "no state for what the callback trains: load the weights into the module and fit without ckpt_path"
            )

    # -- life ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask to be called when the layers of the module exist and before the strategy wraps it."""
        if stage != "fit" or self.weight == 0:
            return
        if not isinstance(trainer.strategy, pl.strategies.DDPStrategy | pl.strategies.SingleDeviceStrategy):
            raise InputError(
                f"{type(self).__name__} cannot add its loss under {type(trainer.strategy).__name__}: use DDP or one device"
            )
        self._default_dtype = torch.get_default_dtype()
        kin = [one for one in _callbacks(trainer) if isinstance(one, AuxiliaryLoss) and one.log_name == self.log_name]
        place = kin.index(self) + 1
        self.label = self.log_name if place == 1 else f"{self.log_name}_{place}"
        (patch_of(pl_module) or ModulePatch(pl_module)).losses.append(self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Join the optimizer, listen to the layers, wrap the training step."""
        if not self._attached:
            return
        self._join_optimizer(trainer)
        # Only now: the strategy may have replaced modules (SyncBatchNorm).
        found = self._find_layers(pl_module)
        compiled = any(module._compiled_call_impl is not None for module in pl_module.modules())
        if compiled or any("_orig_mod" in name for name, _ in pl_module.named_modules()):
            # Code that was compiled without the hooks does not look for them.
            torch.compiler.reset()
        for name, module in found.items():
            self._handles.append(module.register_forward_hook(functools.partial(self.tap.keep, name)))
        patch = patch_of(pl_module)
        assert patch is not None
        patch.wrap_training_step()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the user's module as it was."""
        self.detach(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the user's module as it was."""
        self.detach(pl_module)

    def detach(self, pl_module: pl.LightningModule) -> None:
        """Take hooks, wrappers and the trained part off the user's module; without effect where there are none."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._attached = False
        patch = patch_of(pl_module)
        if patch is not None and self in patch.losses:
            patch.losses.remove(self)
            if self._attachment is not None:
                pl_module._modules.pop(self._attachment.name, None)
            if not patch.losses:
                patch.remove()

    # -- steps -----------------------------------------------------------------------------------------------------

    def attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the module and put the trained part into it; Lightning's contexts for new layers do not reach in here."""
        if self._attached:
            return
        name = type(self).__name__
        if not pl_module.automatic_optimization:
            raise InputError(
                f"{name} adds its loss to what training_step returns, and under manual optimisation nobody uses that: use "
                "automatic optimisation, or call the loss function in your training_step"
            )
        if "dataloader_iter" in inspect.signature(inspect.unwrap(pl_module.training_step)).parameters:
            raise InputError(f"{name} needs the batch: training_step must take (batch, batch_idx), not dataloader_iter")
        self._find_layers(pl_module)
        self._seed = torch.initial_seed()
        inherited = torch.get_default_dtype()
        torch.set_default_dtype(self._default_dtype)
        try:
            with isolate_rng(), torch.device("cpu"):
                part = self.build(trainer, pl_module)
        finally:
            torch.set_default_dtype(inherited)
        self._attached = True
        self._attachment = None
        if part is None:
            return
        if any(isinstance(other, pl.callbacks.WeightAveraging) for other in _callbacks(trainer)):
            raise InputError(
                f"{name} trains a part of its own here, which WeightAveraging would mistake for the module's: average the "
                "weights of saved checkpoints, or use layers of equal width"
            )
        self._attachment = Attachment(f"auxiliary_{self.label}", part)
        pl_module.add_module(self._attachment.name, self._attachment)

    def _find_layers(self, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        names = named_layers(pl_module)
        for name in self.layers:
            if name not in names:
                raise InputError(
                    f"{type(pl_module).__name__} has no layer {name!r} for {type(self).__name__}.{nearest(name, names)} "
                    "named_modules() lists them"
                )
        return {name: names[name] for name in self.layers}

    def _join_optimizer(self, trainer: pl.Trainer) -> None:
        if self._attachment is None:
            return
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "consolidate_state_dict"):
                raise InputError(f"{type(self).__name__} cannot add parameters to a sharded {type(optimizer).__name__}")
            # A group that is extended, not a new one: whatever a scheduler keeps of each group, it keeps of this one.
            group = max(optimizer.param_groups, key=lambda one: float(one.get("initial_lr", one.get("lr", 0))))
            known = {id(parameter) for one in optimizer.param_groups for parameter in one["params"]}
            for name, parameter in self._attachment.named_parameters():
                if parameter.requires_grad and id(parameter) not in known:
                    group["params"].append(parameter)
                    if "param_names" in group:
                        group["param_names"].append(f"{self._attachment.name}.{name}")

    def add(self, pl_module: pl.LightningModule, result: Any, batch: Any, outputs: dict[str, Any]) -> Any:
        """Return the result of the step with the weighted loss in it."""
        if result is None:
            return None
        total = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(total, Tensor):
            what = (
                f"{type(result).__name__} with loss={total!r}" if isinstance(result, Mapping) else type(result).__name__
            )
            raise InputError(
                f"{type(self).__name__} needs a training_step that returns a tensor, a dict with a tensor under 'loss', or "
                f"None, got {what}"
            )
        self._check_outputs(pl_module, outputs)
        trainer = pl_module.trainer
        with self._random_stream(trainer, pl_module.device):
            loss = self.loss(outputs, batch, pl_module)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise InputError(f"{type(self).__name__}.loss must return a scalar tensor, got {loss!r}")
        size = len(outputs[self.layers[0]]) if self.layers else 1
        pl_module.log(f"train/{self.label}", loss, batch_size=size)
        total = total + self.weight_at(trainer.global_step, trainer.current_epoch) * loss
        return {**result, "loss": total} if isinstance(result, Mapping) else total

    def _check_outputs(self, pl_module: pl.LightningModule, outputs: dict[str, Any]) -> None:
        for name in self.layers:
            if name not in outputs:
                raise InputError(
                    f"layer {name!r} was not called in the training_step of {type(pl_module).__name__}: "
                    f"{type(self).__name__} needs a layer that the step runs"
                )
            if not isinstance(outputs[name], Tensor) or not outputs[name].ndim:
                raise InputError(
                    f"layer {name!r} returned {type(outputs[name]).__name__}, expected a tensor of a batch; name a layer "
                    "inside or behind it"
                )

    @contextmanager
    def _random_stream(self, trainer: pl.Trainer, device: torch.device) -> Iterator[None]:
        on_gpu = device.type == "cuda"
        on_cpu_before, on_gpu_before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
        key = (self._seed, trainer.global_rank, *self.state_key.encode())
        seed = int(random_words(key, [trainer.fit_loop.total_batch_idx])[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(on_cpu_before)
            if on_gpu_before is not None:
                torch.cuda.set_rng_state(on_gpu_before, device)


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _shapes(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in state.items()) or "none"
