"""Networks by name: timm, torchvision, open_clip, the zoo's own architectures, and stored zoo models.

==============================================  =====================================================================
name                                            network
==============================================  =====================================================================
``timm/resnet18``                               random weights (a bare architecture), as in timm
``timm/resnet18.a1_in1k``                       those weights
``timm/hf-hub:org/name@revision``               a timm model on the Hub
``torchvision/resnet50``                        random weights
``torchvision/resnet50/IMAGENET1K_V2``          those weights
``open_clip/ViT-B-32``                          one side of a CLIP model, random weights; ``modality`` says which
``open_clip/ViT-B-32/laion2b_s34b_b79k``        those weights
``zoo/resnet20``                                our architectures (``zoo.architectures``), random weights
``./runs/nd-digits``, ``/models/nd-digits``     the deployable network of a stored zoo model (a path begins with . or /)
``hf://owner/name@revision``                    the same from the Hub
a dict                                          the architecture of a stored model's network, as `self_contained` gives it
an ``nn.Module``                                itself
==============================================  =====================================================================

A tower that is created with ``embedding=True`` gives embeddings: the output of a network that has an attribute
``output_dim`` (both sides of open_clip's models, stored contrastive models, your own encoders), and the input of the
classifier of any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import InputError, nearest
from zoo.features import FeatureTap, OutputTap, require_tokens
from zoo.named_networks import build, has_public_weights, has_weights, is_stored
from zoo.open_clip_networks import build_tokenizer, build_transform

__all__ = [
    "Tower",
    "create",
    "fingerprint",
    "has_public_weights",
    "has_weights",
    "self_contained",
    "tower_options",
    "without_weights",
]

# Which towers get random weights whatever their name says: those that are trained (a stored file fills them), or all of
# them (shapes are looked at on the meta device).
_Skip = Literal["none", "trained", "all"]
_Name = TypeVar("_Name", str, dict[str, Any], nn.Module)
_skip: ContextVar[_Skip] = ContextVar("skip", default="none")


class Tower(nn.Module):
    """A network with its features, its width and its origin.

    Args:
        network: the plain network.
        name: the name it was created by, or None for a module that was given ready.
        frozen: keep it in eval mode through ``train()``, without gradients for its parameters.
        heads: names of the classifier modules, found if omitted.
        revision: the revision of its weights, where the name carries one.
        embedding: take the output of the network for its features, where the network has an ``output_dim``.

    Attributes:
        network: the plain network.
        name: see above.
        frozen: see above.
        revision: see above.
        tap: gives features and logits of ``network`` in one pass.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str | None = None,
        frozen: bool = False,
        heads: tuple[str, ...] = (),
        revision: str | None = None,
        embedding: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.frozen = frozen
        self.revision = revision
        whole = embedding and not heads and getattr(network, "output_dim", None) is not None
        self.tap: FeatureTap | OutputTap = OutputTap(network) if whole else FeatureTap(network, heads)
        if frozen:
            network.requires_grad_(requires_grad=False)
        self.train(self.training)

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return self.tap.dim

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.tap.num_classes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights of a frozen network as they were given, before any cast; see `fingerprint`."""
        assert self.frozen, "the weights of a network that is trained change"
        return fingerprint(self.network)

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """The evaluation transform of the weights: image -> (C, H, W).

        Raises:
            InputError: nothing records how the inputs of this network are prepared.
        """
        return _evaluation_transform(self)

    @property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """The tokenizer of a text network: texts -> token numbers (B, context_length), int64.

        Raises:
            InputError: the network has no ``context_length``, so it reads no text.
        """
        length = getattr(self.network, "context_length", None)
        if length is None:
            raise InputError(f"{self.name or type(self.network).__name__} reads no text: it has no context_length")
        clip = self.name if self.name and self.name.startswith("open_clip/") else None
        return build_tokenizer(clip, int(length))

    def train(self, mode: bool = True) -> Tower:
        """Set training mode, except for a frozen network, which stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tower:
        # A run in bf16 casts the network; its weights have to be known by what they were before.
        tensors = {tensor.dtype: tensor for tensor in self.network.state_dict().values() if not tensor.is_meta}
        if self.frozen and any(fn(tensor.new_empty(0)).dtype != dtype for dtype, tensor in tensors.items()):
            _ = self.fingerprint
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) of the network."""
        output: Tensor = self.network(self._cast(x))
        return output

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, D) and logits (B, K) from one pass."""
        return self.tap(self._cast(x))

    def features(self, x: Tensor) -> Tensor:
        """Return the features (B, D): the input of the classifier."""
        return self.tap(self._cast(x))[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def layers(self, x: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Return the outputs of named modules from one pass, which runs eagerly.

        Args:
            x: input of the network.
            names: module names as in ``named_modules()``.

        Raises:
            InputError: no such module (the nearest names are shown), or one that the pass does not call.
        """
        modules = dict(self.network.named_modules())
        outputs: dict[str, Tensor] = {}
        handles = []
        for name in names:
            if name not in modules:
                raise InputError(f"{type(self.network).__name__} has no module {name!r}.{nearest(name, modules)}")
        try:
            for name in names:
                keep = _Keep(outputs, name)
                handles.append(modules[name].register_forward_hook(keep))
            with torch.compiler.set_stance("force_eager"):
                self.network(self._cast(x))
        finally:
            for handle in handles:
                handle.remove()
        for name in names:
            if name not in outputs:
                raise InputError(f"{name!r} was not called in the forward pass of {type(self.network).__name__}")
        return outputs

    def _cast(self, x: Tensor) -> Tensor:
        require_tokens(self.network, x)
        if not self.frozen or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return x
        parameter = next(self.network.parameters(), None)
        return x if parameter is None else x.to(parameter.dtype)


class _Keep:
    """A forward hook that keeps the output of one module under its name."""

    def __init__(self, outputs: dict[str, Tensor], name: str) -> None:
        self.outputs = outputs
        self.name = name

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        self.outputs[self.name] = output


def create(
    name: str | dict[str, Any] | nn.Module,
    *,
    frozen: bool = False,
    num_classes: int | None = None,
    head: str | None = None,
    embedding: bool = False,
    modality: str | None = None,
    **options: Any,
) -> Tower:
    """Build a tower by name, or wrap a module.

    Args:
        name: a tower name (see the table above) or a ready network.
        frozen: see `Tower`.
        num_classes: size of the classifier; with weights that have another size the classifier starts at random, as in
            timm. Without it the network keeps its own.
        head: name of the classifier module, found if omitted.
        embedding: see `Tower`.
        modality: ``"image"`` or ``"text"``: the side of an open_clip model.
        **options: passed to the builder, such as ``in_chans=1`` or ``drop_path_rate=0.1`` for timm.

    Returns:
        The tower, in training mode unless frozen.

    Raises:
        InputError: an unknown name (the nearest are shown), an option that the builder does not take, weights that cannot
            be fetched, or a module whose classifier has another size.

    Example:
        >>> tower = create("zoo/resnet8", num_classes=10)
        >>> tower.dim, tower.num_classes
        (64, 10)
    """
    heads = (head,) if head else ()
    if isinstance(name, Tower):
        name = name.network
    if isinstance(name, nn.Module):
        if options:
            raise InputError(f"options {sorted(options)} cannot be applied to a network that is built already")
        tower = Tower(name, frozen=frozen, heads=heads, embedding=embedding)
        _require_classes(tower, num_classes, type(name).__name__)
        return tower
    if isinstance(name, dict):
        return _create_described(
            name, options, frozen=frozen, heads=heads, num_classes=num_classes, embedding=embedding
        )
    if not isinstance(name, str):
        raise InputError(f"a tower is a name or an nn.Module, got {type(name).__name__}")
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes must be positive, got {num_classes}")
    weights = _skip.get() == "none" or (frozen and _skip.get() == "trained")
    network = build(name, num_classes, options, weights=weights, modality=modality)
    revision = name.rpartition("@")[2] if "@" in name else None
    tower = Tower(network, name=name, frozen=frozen, heads=heads, revision=revision, embedding=embedding)
    _require_classes(tower, num_classes, name)
    return tower


def _create_described(
    description: dict[str, Any], options: dict[str, Any], *, num_classes: int | None, **given: Any
) -> Tower:
    from zoo import hub

    if options:
        raise InputError(f"options {sorted(options)} cannot be applied to the network of a stored model")
    tower = Tower(hub.build_network(description), **given)
    _require_classes(tower, num_classes, f"the network of {description['source']}")
    return tower


def self_contained(name: _Name) -> _Name | dict[str, Any]:
    """Return a tower argument as a stored model may hold it, for a network whose weights are stored with that model.

    The place of a stored model becomes a description of its architecture, which can be built where that place does not
    exist; everything else stays.

    Args:
        name: a tower argument.

    Example:
        >>> self_contained("zoo/resnet8")
        'zoo/resnet8'
    """
    from zoo import hub

    return hub.describe_network(name) if isinstance(name, str) and is_stored(name) else name


@contextmanager
def without_weights(towers: Literal["trained", "all"]) -> Iterator[None]:
    """Build architectures only: names with weights give random ones, because stored weights will take their place.

    Args:
        towers: ``"trained"`` still fetches the weights of frozen towers, ``"all"`` fetches none.
    """
    token = _skip.set(towers)
    try:
        yield
    finally:
        _skip.reset(token)


def tower_options(argument: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """Return the options of a named network, without those that have an argument of their own.

    Args:
        argument: the argument that holds them, for the error message.
        options: what was given.

    Raises:
        InputError: ``num_classes``, ``head`` or ``frozen`` stands among them.
    """
    taken = sorted({"num_classes", "head", "frozen", "embedding", "modality"} & (options or {}).keys())
    if taken:
        raise InputError(f"{argument} may not hold {', '.join(taken)}: the module has arguments of its own for that")
    return options or {}


def fingerprint(network: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a network's state: names, dtypes, shapes and values of parameters and persistent buffers.

    Args:
        network: a module, or a state dict; entries that are no tensors do not count.

    Returns:
        64 hexadecimal digits; equal for equal weights on any device.
    """
    state = network.state_dict() if isinstance(network, nn.Module) else network
    digest = hashlib.sha256()
    for key in sorted(key for key, value in state.items() if isinstance(value, Tensor)):
        tensor = state[key].detach().to("cpu").contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(np.asarray(tensor.reshape(-1).view(torch.uint8)).data)
    return digest.hexdigest()


def _require_classes(tower: Tower, num_classes: int | None, name: str) -> None:
    if num_classes is not None and tower.num_classes != num_classes:
        raise InputError(
            f"{name} has a classifier of {tower.num_classes} classes, expected {num_classes}: replace its head, or change "
            "num_classes"
        )


def _evaluation_transform(tower: Tower) -> Callable[[Any], Tensor]:
    name = tower.name or ""
    if name.startswith("timm/"):
        from timm.data import create_transform, resolve_model_data_config  # type: ignore[attr-defined]

        config = resolve_model_data_config(tower.network)  # type: ignore[no-untyped-call]
        return create_transform(**config)  # type: ignore[no-any-return]
    if name.startswith("open_clip/") and hasattr(tower.network, "preprocess_cfg"):
        return build_transform(tower.network)
    if name.startswith("torchvision/") and has_weights(name):
        from torchvision import models

        _, architecture, tag = name.split("/")
        return models.get_model_weights(architecture)[tag].transforms()  # type: ignore[no-any-return]
    raise InputError(f"nothing records how the inputs of {name or type(tower.network).__name__} are prepared")
