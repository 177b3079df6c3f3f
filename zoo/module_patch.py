"""What callbacks put on a user's LightningModule during fit, so that it can be taken off in any order."""

from __future__ import annotations

import functools
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from torch import nn

__all__ = ["Attachment", "ModulePatch", "StepLoss", "Tap", "patch_of"]


class Tap:
    """Keeps the outputs of layers while it listens.

    Attributes:
        listening: whether outputs are kept.
    """

    def __init__(self) -> None:
        self.listening = False
        self._outputs: dict[str, Any] = {}

    def keep(self, name: str, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Take the output of a layer; a forward hook once the name is bound."""
        if self.listening:
            self._outputs[name] = output

    def take(self) -> dict[str, Any]:
        """Return the outputs by name, keep none of them, and listen no more."""
        outputs, self._outputs = self._outputs, {}
        self.listening = False
        return outputs


class Attachment(nn.Module):
    """A part that has its parameters inside a user's module, and no place in the module's state.

    Args:
        name: its attribute in the user's module.
        part: what is trained.

    Example:
        >>> module = torch.nn.Linear(1, 1)
        >>> module.extra = Attachment("extra", torch.nn.Linear(1, 1))
        >>> len(list(module.parameters())), list(module.state_dict())
        (4, ['weight', 'bias'])
    """

    def __init__(self, name: str, part: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.part = part
        self.register_load_state_dict_post_hook(_expect_nothing)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Add nothing to the state of the module around."""
        return {} if destination is None else destination


def _expect_nothing(attachment: Attachment, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if f"{attachment.name}.part." not in key]


class StepLoss(Protocol):
    """What a `ModulePatch` asks of a callback that adds a loss."""

    tap: Tap

    def attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put what is trained into the module, before the strategy wraps it."""

    def add(self, pl_module: pl.LightningModule, result: Any, batch: Any, outputs: dict[str, Any]) -> Any:
        """Return the result of a training step with the loss in it."""


class ModulePatch:
    """The wrapped methods of one module, shared by all callbacks on it.

    ``configure_model`` is followed by `StepLoss.attach`, ``configure_optimizers`` does not see the attachments, and from
    `wrap_training_step` on, what ``training_step`` returns goes through `StepLoss.add`. Bound methods on the instance are
    wrapped; its class is not touched.

    Args:
        module: the user's module, which has none yet (`patch_of`).

    Attributes:
        losses: the callbacks, in the order of the trainer.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.losses: list[StepLoss] = []
        self._module = module
        self._methods: dict[str, tuple[Any, Any]] = {}
        configure_model, configure_optimizers = module.configure_model, module.configure_optimizers

        # Without functools.wraps, so that Lightning calls it on a module that has none of its own.
        def attach() -> None:
            configure_model()
            for loss in tuple(self.losses):
                loss.attach(module.trainer, module)

        @functools.wraps(configure_optimizers)
        def without_attachments() -> Any:
            hidden = {name: child for name, child in module.named_children() if isinstance(child, Attachment)}
            for name in hidden:
                module._modules.pop(name)
            try:
                return configure_optimizers()
            finally:
                module._modules.update(hidden)

        self._put("configure_model", attach)
        self._put("configure_optimizers", without_attachments)
        _patches[module] = self

    def wrap_training_step(self) -> None:
        """Let the losses into the training step; without effect when they are."""
        if "training_step" in self._methods:
            return
        original = self._module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            for loss in self.losses:
                loss.tap.listening = True
            try:
                result = original(*args, **kwargs)
            finally:
                taken = [(loss, loss.tap.take()) for loss in self.losses]
            batch = args[0] if args else kwargs["batch"]
            for loss, outputs in taken:
                result = loss.add(self._module, result, batch, outputs)
            return result

        # Lightning unwraps once, to see how many arguments a step takes.
        training_step.__wrapped__ = getattr(original, "__wrapped__", original)
        self._put("training_step", training_step)

    def remove(self) -> None:
        """Put back the methods as they were."""
        for name, (ours, before) in self._methods.items():
            # Somebody may have wrapped ours again; with no losses it only passes through.
            if vars(self._module).get(name) is ours:
                delattr(self._module, name)
                if before is not None:
                    setattr(self._module, name, before)
        _patches.pop(self._module, None)

    def _put(self, name: str, method: Any) -> None:
        self._methods[name] = (method, vars(self._module).get(name))
        setattr(self._module, name, method)


_patches: WeakKeyDictionary[pl.LightningModule, ModulePatch] = WeakKeyDictionary()


def patch_of(module: pl.LightningModule) -> ModulePatch | None:
    """Return what stands on a module, or None.

    Args:
        module: a user's module.
    """
    return _patches.get(module)
