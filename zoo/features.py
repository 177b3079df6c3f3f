"""Features out of a network that was not written to give them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import InputError, nearest

__all__ = ["FeatureTap", "KeptHooks", "OutputTap", "require_tokens"]


class KeptHooks:
    """Hooks on a network that are there for one call, or for all from `install` on.

    Whoever derives from it says what they are: ``_register`` fills ``_handles`` and sets ``_installed``.

    Args:
        network: the network, which is not changed.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        # A flag of its own: a compiled step may read it, the handles it may not.
        self._installed = False
        self._handles: list[Any] = []

    def _register(self) -> None:
        raise NotImplementedError

    def install(self) -> None:
        """Keep the hooks between calls, so that a compiled training step need not register them."""
        if self._installed:
            return
        if any(module._compiled_call_impl is not None for module in self.network.modules()):
            # Code that was compiled without the hooks does not look for them.
            torch.compiler.reset()
        self._register()

    def remove(self) -> None:
        """Take the hooks away; the network is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._installed = False


class FeatureTap(KeptHooks):
    """The input of a network's classifier, captured while the network runs once.

    This is the penultimate vector of the papers: a forward pre-hook on the classifier sees it in any timm or torchvision
    model without an edited ``forward``. Networks with two classifiers (distilled DeiT, LeViT) give the mean of both
    inputs, a list of classifiers over several branches (CrossViT) the inputs side by side, maps (B, D, H, W) in front of a
    convolutional classifier their spatial mean: what timm's ``forward_head(…, pre_logits=True)`` returns.

    Args:
        network: a network that returns logits.
        heads: names of its classifier modules; found by timm's ``get_classifier`` or else as the last linear or
            convolutional layer if omitted.

    Attributes:
        network: see above.
        heads: the names of the classifier modules.

    Raises:
        InputError: there is no such module, or none that looks like a classifier.
    """

    def __init__(self, network: nn.Module, heads: tuple[str, ...] = ()) -> None:
        super().__init__(network)
        groups = tuple((head,) for head in heads) or _find_heads(network)
        self.heads = tuple(head for group in groups for head in group)
        self._branches = len(groups[0])
        names = dict(network.named_modules())
        for head in self.heads:
            if not head or head not in names:
                raise InputError(f"{type(network).__name__} has no module {head!r}.{nearest(head, names)}")
        self._inputs: dict[int, Tensor] = {}
        self._listening = False

    @property
    def dim(self) -> int:
        """Width D of the features."""
        widths = [self._width(head, 0, "in_features", "in_channels") for head in self.heads[: self._branches]]
        return sum(widths)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self._width(self.heads[0], -1, "out_features", "out_channels")

    def _width(self, head: str, layer: int, *attributes: str) -> int:
        layers = [m for m in self.network.get_submodule(head).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if not layers:
            raise InputError(
                f"classifier {head!r} of {type(self.network).__name__} has no linear layer whose width could be read; give "
                "the name of a linear layer as the head"
            )
        return next(int(getattr(layers[layer], name)) for name in attributes if hasattr(layers[layer], name))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network once; without `install` a compiled network runs eagerly.

        Args:
            x: input of the network, (B, …).

        Returns:
            Features (B, D) at the input of the classifier, and logits (B, K).

        Raises:
            InputError: the classifier was not called, its input is no vector or map, or the network did not return a
                tensor.
        """
        return self._run(x) if self._installed else self._run_once(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._register()
        try:
            with torch.compiler.set_stance("force_eager"):
                return self._run(x)
        finally:
            self.remove()

    def _register(self) -> None:
        self._handles = [
            self.network.get_submodule(head).register_forward_pre_hook(partial(self._capture, index))
            for index, head in enumerate(self.heads)
        ]
        self._installed = True

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._listening = True
        try:
            logits = self.network(x)
            inputs = self._inputs
        finally:
            self._inputs = {}
            self._listening = False
        if not isinstance(logits, Tensor):
            raise InputError(f"{type(self.network).__name__} returned {type(logits).__name__}, expected logits (B, K)")
        vectors = []
        for index, head in enumerate(self.heads):
            if index not in inputs:
                raise InputError(f"classifier {head!r} was not called in the forward pass; name another head")
            vectors.append(self._vector(inputs[index], head))
        size = self._branches
        parts = [torch.cat(vectors[i : i + size], 1) for i in range(0, len(vectors), size)] if size > 1 else vectors
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0), logits

    def _vector(self, value: Tensor, head: str) -> Tensor:
        layers = [m for m in self.network.get_submodule(head).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if value.ndim == 4 and layers and isinstance(layers[0], nn.Conv2d):
            return value.mean((2, 3))
        if value.ndim != 2:
            raise InputError(
                f"the input of classifier {head!r} has shape {tuple(value.shape)}, expected (B, D), or (B, D, H, W) in "
                "front of a convolution; name another head"
            )
        return value

    def _capture(self, index: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._listening:
            self._inputs[index] = args[0]


class OutputTap:
    """The output of a network that returns embeddings, with the interface of `FeatureTap`.

    Args:
        network: a network with an attribute ``output_dim``.

    Raises:
        InputError: ``output_dim`` is no positive integer.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.heads: tuple[str, ...] = ()
        dim: Any = network.output_dim
        if not isinstance(dim, int) or dim < 1:
            raise InputError(f"output_dim of {type(network).__name__} must be a positive integer, got {dim!r}")
        self.dim = dim

    @property
    def num_classes(self) -> int:
        """There is none.

        Raises:
            InputError: always.
        """
        raise InputError(f"{type(self.network).__name__} returns embeddings and has no classifier")

    def install(self) -> None:
        """Do nothing: the output needs no hook."""

    def remove(self) -> None:
        """Do nothing: the output needs no hook."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network once.

        Args:
            x: input of the network, (B, …).

        Returns:
            The embeddings (B, D), twice.

        Raises:
            InputError: the network reads no texts of this length, or did not return one vector of width ``output_dim`` per
                sample.
        """
        require_tokens(self.network, x)
        output = self.network(x)
        if not isinstance(output, Tensor) or output.shape != (len(x), self.dim):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"{type(self.network).__name__} returned {shape}, expected embeddings ({len(x)}, {self.dim}): its "
                "output_dim is the width of what it returns"
            )
        return output, output


def require_tokens(network: nn.Module, x: Tensor) -> None:
    """Refuse texts of a length that a text network does not read; inputs of other networks pass.

    Args:
        network: a network; one that reads text has a ``context_length``.
        x: its inputs; texts are token numbers (B, L).

    Raises:
        InputError: L is greater than ``context_length``, or less where the network reads no shorter texts.
    """
    length = getattr(network, "context_length", None)
    if not length or x.is_floating_point() or x.ndim != 2 or x.shape[1] == length:
        return
    # open_clip's text side adds a causal mask of its full length, except where it masks padding as well.
    mask, masks_padding = getattr(network, "attn_mask", None), getattr(network, "use_pad_mask", False)
    exact = isinstance(mask, Tensor) and not masks_padding
    if exact or x.shape[1] > length:
        raise InputError(
            f"{type(network).__name__} reads texts of {'' if exact else 'at most '}{length} tokens, got {x.shape[1]}: set "
            f"context_length of the data to {length}, or tokenize with the tower's tokenizer"
        )


def _find_heads(network: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the classifiers: one a branch in a group, several groups where the network has several opinions."""
    names = {id(module): name for name, module in network.named_modules()}
    classifier = getattr(network, "get_classifier", None)
    if callable(classifier):
        found = classifier()
        groups = []
        for group in found if isinstance(found, tuple | list) else (found,):
            modules = list(group) if isinstance(group, nn.ModuleList) else [group]
            named = [names[id(m)] for m in modules if id(m) in names and not isinstance(m, nn.Identity)]
            groups.append(tuple(named))
        if not all(groups):
            raise InputError(f"{type(network).__name__} has no classifier: build it with num_classes, or name the head")
        return tuple(groups)
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d) and name]
    if not layers:
        raise InputError(f"{type(network).__name__} has no linear layer that could be its classifier; name the head")
    return ((layers[-1],),)
