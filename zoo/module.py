"""`ZooModule`: a LightningModule whose configuration survives, and which is stored and loaded safely."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo import hub, transport
from zoo.arguments import Supplied, capture, encode
from zoo.errors import InputError
from zoo.towers import Tower, has_public_weights, self_contained

__all__ = ["ZooModule"]


class ZooModule(pl.LightningModule):
    """A LightningModule that can be stored as data and built again from its name.

    A subclass takes JSON values, tower names, dataclasses of those, and ready modules; it calls ``super().__init__()``
    first. What was passed is recorded by itself: ``hparams`` holds the part that JSON can hold, Lightning checkpoints
    carry it, and `save_pretrained` writes it.

    Attributes:
        deployable: name of the attribute that is the plain network for inference.
        training_only: names of the attributes that only training needs, and of the constructor arguments that are set to
            None when a stored model is loaded for inference. Their tensors are not stored.
        evaluated_with: which of `training_only` evaluation needs as well: ``zoo test`` builds them.
        sized_by_file: names of buffers that may be None after construction and take their shape from the stored file.
        stored_towers: names of the constructor arguments that may be a frozen tower which is stored with the model, because
            its weights have no public name.
        example_shape: shape of one input, (C, H, W) for images; recorded from the first batch, used for the golden output.
        hub_folder: the folder that the model was loaded from, if it was.
        hub_commit: the commit on the Hub that it was loaded from, if it was.
        run_facts: facts of the run that made it, for the card (see `zoo.run_facts.collect`).
        run_figures: what was drawn in that run, for the card (see `zoo.run_facts.figures`).
    """

    deployable: ClassVar[str] = ""
    training_only: ClassVar[tuple[str, ...]] = ()
    evaluated_with: ClassVar[tuple[str, ...]] = ()
    sized_by_file: ClassVar[tuple[str, ...]] = ()
    stored_towers: ClassVar[tuple[str, ...]] = ()

    example_shape: tuple[int, ...] | None = None
    hub_folder: Path | None = None
    hub_commit: str | None = None
    run_facts: dict[str, Any] | None = None
    run_figures: Mapping[str, bytes] = MappingProxyType({})

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a name that the class itself uses."""
        super().__init_subclass__(**options)
        if cls.deployable == "network":
            raise InputError(
                f"{cls.__name__}.deployable must not be 'network', which ZooModule defines: name it otherwise"
            )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the arguments of the call; `__init__` sees them unchanged."""
        self = super().__new__(cls)
        object.__setattr__(self, "_arguments", capture(cls, args, kwargs))
        object.__setattr__(self, "_frozen_towers", {})
        object.__setattr__(self, "_unbuilt_towers", {})
        return self

    def __init__(self) -> None:
        super().__init__()
        arguments: dict[str, Any] = self._arguments
        kept = {}
        for name in {self.deployable, *self.stored_towers} & arguments.keys():
            # The place of a stored model may not exist where this one is loaded, and its weights are stored here.
            if name == self.deployable or not has_public_weights(arguments[name]):
                arguments[name] = self_contained(arguments[name])
        for name, value in arguments.items():
            if isinstance(value, Supplied):
                continue
            try:
                kept[name] = encode(name, value)
            except InputError:
                # Training works with any argument; saving refuses this one by name.
                continue
        # What is stored is what was passed, even if a dict of options is changed later.
        arguments.update(kept)
        if kept:
            self.save_hyperparameters(kept)

    # -- frozen towers ---------------------------------------------------------------------------------------------

    def attach_frozen(self, name: str, tower: Tower) -> None:
        """Hold a frozen tower outside the module tree: it moves and casts with the module, and that is all.

        It is absent from ``parameters()``, from the optimizer, from ``state_dict()`` and from what DDP wraps, and
        ``train()`` does not reach it.

        Args:
            name: the attribute by which it is reached.
            tower: a frozen tower.
        """
        assert tower.frozen
        self._frozen_towers[name] = tower

    @property
    def frozen_towers(self) -> dict[str, Tower]:
        """The towers that `attach_frozen` holds, by attribute."""
        return dict(self._frozen_towers)

    def __getattr__(self, name: str) -> Any:
        towers = self.__dict__.get("_frozen_towers", {})
        return towers[name] if name in towers else super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for tower in self._frozen_towers.values():
            tower._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    # -- stored format ---------------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        """The plain network for inference, without anything of the zoo or of Lightning."""
        network: nn.Module = getattr(self, self.deployable)
        return network

    def save_pretrained(self, directory: str | Path, *, recipe: str | None = None) -> Path:
        """Store the model in a folder; an older one there is replaced at one stroke, or stays whole if this fails.

        Every process of a distributed run may call it; the first one writes.

        Args:
            directory: the folder, created if needed.
            recipe: the LightningCLI configuration of the run as YAML text, stored beside.

        Returns:
            The folder.

        Raises:
            InputError: an argument has no JSON form, a tensor holds non-finite values, the arguments do not build this
                model, or the class is not registered.
        """
        folder = Path(directory)
        first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        return hub.save(self, folder, recipe=recipe) if first else folder

    def push_to_hub(self, repo_id: str, *, recipe: str | None = None, **options: Any) -> transport.Push:
        """Store the model on the Hub, in one commit, with its card.

        Args:
            repo_id: ``owner/name``; it is created if needed.
            recipe: the LightningCLI configuration of the run as YAML text, stored beside.
            **options: ``branch``, ``private``, ``token``, ``create_pr``, ``message``, ``tag``, ``dry_run``; see
                `zoo.transport.push`.

        Returns:
            What was sent, or would be.

        Raises:
            InputError: the model cannot be stored, holds what looks like a secret, or the Hub refuses.
        """
        return hub.push(self, repo_id, recipe=recipe, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        for_training: bool = False,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        verify: bool = True,
        **overrides: Any,
    ) -> Self:
        """Load a stored model of this class; see `zoo.hub.from_pretrained`."""
        model = hub.from_pretrained(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            expected=cls,
            for_training=for_training,
            map_location=map_location,
            strict=strict,
            verify=verify,
            **overrides,
        )
        assert isinstance(model, cls)
        return model

    def example_input(self, generator: torch.Generator) -> Tensor | None:
        """Return one seeded input for the golden output, (1, …), or None if the shape of the inputs is not known."""
        if self.example_shape is None:
            return None
        return torch.randn(1, *self.example_shape, generator=generator)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the component's name, the frozen towers' fingerprints and the state of the random generators."""
        checkpoint["zoo"] = {
            "component": type(self).__name__,
            "towers": hub.tower_facts(self),
            "random": _random_state(),
            "example_shape": list(self.example_shape) if self.example_shape else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the frozen towers with those of the checkpoint, and keep the random state for the start of training.

        Raises:
            InputError: a frozen tower differs from the one the checkpoint was trained with.
        """
        stored = checkpoint.get("zoo", {})
        hub.check_towers(self, stored.get("towers", {}))
        shape = stored.get("example_shape")
        self.example_shape = tuple(shape) if shape else None
        self._resumed_random: dict[str, Any] | None = stored.get("random")

    def on_train_start(self) -> None:
        """Continue the random sequence of the checkpoint, so that a resumed run equals an uninterrupted one.

        The checkpoint has that of the first process. The others keep theirs: the same sequence would give all of them the
        same augmentations.
        """
        state = self.__dict__.pop("_resumed_random", None)
        if state is not None and self.global_rank == 0:
            _restore_random_state(state)


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - Lightning seeds this one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (kind, torch.tensor(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
