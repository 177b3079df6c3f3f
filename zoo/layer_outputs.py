"""Layers of a user's LightningModule by name, and their outputs for an example, before training begins."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from zoo.errors import InputError

__all__ = ["eval_mode", "example_batch", "layer_output", "named_layers"]


def named_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside a module by name, without the ``_orig_mod`` that torch.compile puts between.

    Args:
        module: the module; it is not in the result itself.

    Example:
        >>> list(named_layers(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten())))
        ['0', '1']
    """
    named = module.named_modules(remove_duplicate=False)
    layers = {".".join(part for part in name.split(".") if part != "_orig_mod"): layer for name, layer in named}
    layers.pop("")
    return layers


def example_batch(trainer: pl.Trainer, remedy: str) -> Any:
    """Return a batch of two training samples, with the module's own batch transfer, on the CPU.

    The data set is indexed and the loader not iterated, so that no sampler moves on. Augmentations draw random numbers; the
    caller puts the generators back.

    Args:
        trainer: a trainer that is about to fit, whose module and data module are set up.
        remedy: what the user can give in place of the example, for the error message.

    Raises:
        InputError: the training data are no single DataLoader over a data set with indices, or empty.
    """
    loader = trainer.fit_loop._data_source.dataloader()
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(
            f"no example can be taken from the training data ({type(loader).__name__} over {type(dataset).__name__}) "
            f"without using it up: give {remedy}"
        )
    if len(dataset) == 0:
        raise InputError("the training data set is empty: there is nothing to train on")
    samples: Subset[Any] = Subset(dataset, [0, min(1, len(dataset) - 1)])
    size = None if loader.batch_sampler is None else len(samples)
    batch = next(iter(DataLoader(samples, batch_size=size, collate_fn=loader.collate_fn)))
    return trainer.strategy.batch_to_device(batch, torch.device("cpu"))


@torch.no_grad()
def layer_output(pl_module: pl.LightningModule, name: str, x: Any, remedy: str) -> Tensor:
    """Return what a layer makes of an input, from a pass in eval mode that leaves the module as it was.

    The module's own ``forward`` is tried first, then the networks around the layer from the outside in, until the layer was
    called.

    Args:
        pl_module: the module.
        name: the layer, as in `named_layers`.
        x: input of the network; cast to the type of the module's parameters.
        remedy: what the user can give in place of the pass, for the error message.

    Raises:
        InputError: none of them called the layer, or it gave no tensor.
    """
    layers = named_layers(pl_module)
    parameter = next(pl_module.parameters(), None)
    if parameter is not None and isinstance(x, Tensor):
        x = x.to(parameter.device, parameter.dtype if x.is_floating_point() else None)
    parts = name.split(".")
    # The layer itself only if nothing stands around it: inside a network it takes something else.
    around = [layers[".".join(parts[:depth])] for depth in range(1, max(len(parts), 2))]
    networks = [pl_module, *around] if is_overridden("forward", pl_module) else around
    outputs: list[Any] = []
    handle = layers[name].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with eval_mode(pl_module), torch.compiler.set_stance("force_eager"), _Note(name, remedy):
            for network in networks:
                if not outputs and _takes_one(network):
                    network(x)
    finally:
        handle.remove()
    if not outputs or not isinstance(outputs[-1], Tensor):
        what = f"gave {type(outputs[-1]).__name__}, no tensor" if outputs else "was not called"
        raise InputError(f"layer {name!r} {what}, when {type(pl_module).__name__} was run on an example: give {remedy}")
    return outputs[-1]


def _takes_one(network: nn.Module) -> bool:
    try:
        inspect.signature(network.forward).bind(None)
    except TypeError:
        return False
    return type(network).forward is not nn.Module.forward


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module and all inside it into eval mode, and each back into its own.

    Args:
        module: the module.
    """
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


class _Note:
    """Says beside an error of the user's network why it was run."""

    def __init__(self, name: str, remedy: str) -> None:
        self.text = f"the network was run on an example to see the width of layer {name!r}; give {remedy} to do without"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            error.add_note(self.text)
