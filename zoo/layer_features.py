"""One vector a sample out of every layer of a frozen encoder, from one pass over some samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from zoo.errors import InputError, nearest
from zoo.layer_outputs import eval_mode
from zoo.towers import Tower

__all__ = ["Pool", "block_names", "extract_layers", "pool_layer", "sample_batches"]

Pool = Literal["cls", "mean", "last"]
_POOLS = ("cls", "mean", "last")
_LISTS = (nn.Sequential, nn.ModuleList)
_INPUT = ":input"


def extract_layers(
    tower: Tower | nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str] | None = None,
    *,
    modality: str,
    pool: Pool | None = None,
    pad_id: int | None = None,
    prefix_tokens: int | None = None,
    max_samples: int = 5000,
    seed: int = 42,
) -> dict[str, Tensor]:
    """Run a frozen encoder over some samples and pool the output of every block to one vector a sample.

    Two encoders that are given the same loader and seed see the same samples in the same order: of a `DataLoader` over a
    data set with indices, `max_samples` at random, in ascending order and whatever its sampler, so that every process of a
    run sees the same ones; of anything else, the first ones. The data set has to give the same sample each time, as
    evaluation data sets do; the random generators are as before afterwards.

    The pass is made in eval mode, without gradients, on the device of the encoder; outputs are pooled at once, so that
    4 n D bytes a layer are kept.

    Source: the layer selection of STRUCTURE (arXiv 2506.16895), as the project's notes describe the released code, section
    4: the class token after every block of an image transformer, the mean over the tokens of a text after every block and
    in front of the first.

    Args:
        tower: the encoder: a tower, or a plain network.
        loader: batches; a dict of inputs by modality, inputs alone, or a tuple that begins with them.
        layers: names of modules, whose outputs are taken; a name that ends in ``:input`` stands for what goes into the
            module. None takes `block_names`, and for token numbers also the input of the first block.
        modality: key of the inputs in a batch that is a dict, such as "image" or "text".
        pool: what stands for a sample. Of tokens (B, L, D) the "cls" token, the first; the "mean" over the image's own
            tokens, or over those of a text that are no padding; or the "last" token of a text that is no padding, which is
            CLIP's. Of maps (B, C, H, W) the "mean" over all places. Vectors (B, D) are taken as they are. None takes "cls"
            for images of a network that has a class token, and else "mean".
        pad_id: the token number of padding; the network's own if omitted. Texts may be padded on either side.
        prefix_tokens: tokens in front of the image's; the network's own number if omitted.
        max_samples: how many samples at most, at least 1; all where there are no more.
        seed: chooses them.

    Returns:
        Features (n, D) by layer, float32, on the CPU.

    Raises:
        InputError: no such layer (the nearest are shown), one that the pass does not call or whose output cannot be pooled
            so, a batch without the modality, no samples, or an option out of range.

    Example:
        >>> from zoo import towers
        >>> tower = towers.create("zoo/resnet8", frozen=True)
        >>> features = extract_layers(tower, [torch.randn(4, 3, 16, 16)], modality="image")
        >>> {name: tuple(rows.shape) for name, rows in features.items()}
        {'layer1.0': (4, 16), 'layer2.0': (4, 32), 'layer3.0': (4, 64)}
    """
    if pool is not None and pool not in _POOLS:
        raise InputError(f"pool must be one of {', '.join(_POOLS)}, or None, got {pool!r}.{nearest(pool, _POOLS)}")
    if max_samples < 1:
        raise InputError(f"max_samples must be at least 1, got {max_samples}")
    network = tower.network if isinstance(tower, Tower) else tower
    parameter = next(network.parameters(), None)
    tap: _Tap | None = None
    count = 0
    with isolate_rng(), torch.no_grad(), eval_mode(tower), torch.compiler.set_stance("force_eager"):
        for batch in sample_batches(loader, max_samples, seed):
            x = _inputs(batch, modality)
            x = x if parameter is None else x.to(parameter.device)
            if tap is None:
                names = _default_names(network, x) if layers is None else layers
                tap = _Tap(network, names, pool, pad_id, prefix_tokens, device=torch.device("cpu"))
            tap.run(tower, x)
            count += len(x)
            if count >= max_samples:
                break
    if tap is None or count == 0:
        raise InputError("loader must give at least one sample, got none")
    return {name: torch.cat(parts)[:max_samples] for name, parts in tap.features.items()}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def pool_layer(tower: Tower | nn.Module, x: Tensor, layer: str, *, pad_id: int | None = None) -> Tensor:
    """Run an encoder on one batch and pool a layer to one vector a sample, as `extract_layers` does.

    Args:
        tower: the encoder, in eval mode.
        x: its inputs (B, …).
        layer: name of the layer, as for `extract_layers`.
        pad_id: as for `extract_layers`.

    Returns:
        Features (B, D), float32, where the layer's output is; with the graph that the pass records.

    Raises:
        InputError: as for `extract_layers`.
    """
    network = tower.network if isinstance(tower, Tower) else tower
    tap = _Tap(network, [layer], None, pad_id, None)
    with torch.compiler.set_stance("force_eager"):
        tap.run(tower, x)
    return tap.features[layer][0]


def block_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the blocks of a network: what its lists and sequences hold, except for single layers.

    Stages that hold a list of several blocks of one class are taken apart: ``layers.0.blocks.1`` and not ``layers.0`` of a
    Swin transformer, ``layer1.0`` and not ``layer1`` of a ResNet.

    Args:
        network: the network.

    Returns:
        Names as in ``named_modules()``, in the order in which the network holds them.

    Raises:
        InputError: there is none.

    Example:
        >>> from zoo import towers
        >>> block_names(towers.create("zoo/resnet8").network)
        ('layer1.0', 'layer2.0', 'layer3.0')
    """
    names = tuple(_blocks(network, ""))
    if not names:
        raise InputError(
            f"{type(network).__name__} holds no blocks in lists or sequences: name its layers; it has "
            f"{', '.join(name for name, _ in network.named_children()) or 'no modules'}"
        )
    return names


def sample_batches(loader: Iterable[Any], max_samples: int, seed: int = 42) -> Iterable[Any]:
    """Return a loader of some samples at random, in ascending order.

    What is no `DataLoader` over a data set with indices stays as it is.

    Args:
        loader: batches.
        max_samples: how many samples at most.
        seed: chooses them.
    """
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        return loader
    samples = len(loader.dataset)  # type: ignore[arg-type]
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    rows = order[:max_samples].sort().values.tolist()
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 256
    return DataLoader(
        loader.dataset,
        batch_sampler=[rows[start : start + size] for start in range(0, len(rows), size)],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
    )


class _Tap:
    """Hooks that pool what named modules return, and the rows of all batches so far."""

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        pool: Pool | None,
        pad_id: int | None,
        prefix_tokens: int | None,
        *,
        device: torch.device | None = None,
    ) -> None:
        if isinstance(names, str) or not names:
            raise InputError(f"layers must be a list of module names, at least one, got {names!r}")
        modules = dict(network.named_modules())
        for name in names:
            if name.removesuffix(_INPUT) not in modules:
                raise InputError(f"{type(network).__name__} has no module {name!r}.{nearest(name, modules)}")
        self.network = network
        self.pool = pool
        self.pad_id = pad_id
        self.device = device
        self.prefix = _prefix_tokens(network) if prefix_tokens is None else prefix_tokens
        self.features: dict[str, list[Tensor]] = {name: [] for name in names}
        self._now: dict[str, Tensor] = {}

    def run(self, tower: nn.Module, x: Tensor) -> None:
        mask = None if x.is_floating_point() else x != self._padding()
        handles = []
        try:
            for name in self.features:
                module = self.network.get_submodule(name.removesuffix(_INPUT))
                if name.endswith(_INPUT):
                    handles.append(module.register_forward_pre_hook(partial(self._before, name, len(x), mask)))
                else:
                    handles.append(module.register_forward_hook(partial(self._after, name, len(x), mask)))
            tower(x)
        finally:
            for handle in handles:
                handle.remove()
        pooled, self._now = self._now, {}
        for name, parts in self.features.items():
            if name not in pooled:
                raise InputError(
                    f"{name!r} was not called in the forward pass of {type(self.network).__name__}; name other layers"
                )
            parts.append(pooled[name])

    def _before(self, name: str, rows: int, mask: Tensor | None, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._keep(name, rows, mask, module, args[0] if args else None)

    def _after(
        self, name: str, rows: int, mask: Tensor | None, module: nn.Module, _args: tuple[Any, ...], output: Any
    ) -> None:
        self._keep(name, rows, mask, module, output)

    def _keep(self, name: str, rows: int, mask: Tensor | None, module: nn.Module, value: Any) -> None:
        # Blocks of Hugging Face's encoders return tuples that begin with the hidden state.
        value = value[0] if isinstance(value, tuple) and value else value
        if not isinstance(value, Tensor) or value.ndim not in (2, 3, 4):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name!r} gave {found}, expected (B, D), tokens (B, L, D) or maps (B, C, H, W)")
        if value.ndim == 3 and not _batch_first(module):
            value = value.transpose(0, 1)
        if value.ndim == 4:
            pooled = self._pool_map(name, value)
        elif value.ndim == 3:
            pooled = self._pool_image(name, value) if mask is None else self._pool_text(name, value, mask)
        else:
            pooled = value
        if len(pooled) != rows:
            raise InputError(f"{name!r} gave {len(pooled)} rows for {rows} samples; name another layer")
        # A copy: a view would keep the whole output, and change with it.
        self._now[name] = pooled.to(self.device or pooled.device, torch.float32, copy=True)

    def _pool_map(self, name: str, value: Tensor) -> Tensor:
        if self.pool in ("cls", "last"):
            raise InputError(
                f"{name!r} gives maps, which have no tokens: pool must be 'mean' or None, got {self.pool!r}"
            )
        return value.float().mean((1, 2) if _channels_last(self.network, name) else (2, 3))

    def _pool_image(self, name: str, value: Tensor) -> Tensor:
        inner = _inner(self.network)
        # Networks that add the class token late (CaiT, XCiT) have nothing but patches in their first blocks.
        late = getattr(getattr(inner, "patch_embed", None), "num_patches", None) == value.shape[1]
        prefix = 0 if late else self.prefix
        has_class = prefix > 0 and _has_class_token(inner)
        if self.pool == "last" or (self.pool == "cls" and not has_class):
            rule = "only texts have a last token" if self.pool == "last" else f"{name!r} has no class token"
            raise InputError(f"pool={self.pool!r}: {rule}; give pool='mean', or prefix_tokens")
        return value[:, 0] if has_class and self.pool != "mean" else value[:, prefix:].float().mean(1)

    def _pool_text(self, name: str, value: Tensor, mask: Tensor) -> Tensor:
        if value.shape[1] == mask.shape[1] + 1:  # CoCa's text side appends a class token
            mask = F.pad(mask, (0, 1), value=False)
        if value.shape[:2] != mask.shape:
            raise InputError(
                f"{name!r} gives {tuple(value.shape[:2])} tokens for texts of {tuple(mask.shape)}; name another layer"
            )
        if self.pool == "cls":
            return value[:, 0]
        if self.pool == "last":
            places = torch.arange(mask.shape[1], device=mask.device)
            return value[torch.arange(len(value), device=value.device), (places * mask).argmax(1)]
        weights = mask.unsqueeze(2)
        # Padding may hold anything: it is left out before it is added.
        total = value.float().masked_fill(weights.logical_not(), 0).sum(1)
        return total / weights.sum(1).clamp_min(1)

    def _padding(self) -> int:
        config = getattr(self.network, "config", None)
        for candidate in (self.pad_id, getattr(self.network, "pad_id", None), getattr(config, "pad_token_id", None)):
            if candidate is not None:
                return int(candidate)
        raise InputError(
            f"{type(self.network).__name__} does not say which token is padding: give pad_id, or -1 if there is none"
        )


def _inputs(batch: Any, modality: str) -> Tensor:
    if isinstance(batch, Mapping):
        if modality not in batch:
            names = sorted(map(str, batch))
            raise InputError(
                f"modality must be a key of the batch, {', '.join(names)}, got {modality!r}.{nearest(modality, names)}"
            )
        batch = batch[modality]
    value = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(value, Tensor):
        raise InputError(f"loader must give tensors, or dicts or tuples of them, got {type(value).__name__}")
    return value


def _default_names(network: nn.Module, x: Tensor) -> tuple[str, ...]:
    names = block_names(network)
    return names if x.is_floating_point() else (f"{names[0]}{_INPUT}", *names)


def _blocks(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        held = type(module) in _LISTS and type(child) not in _LISTS and any(True for _ in child.children())
        if held and not any(_several_blocks(inner) for inner in child.modules()):
            yield f"{prefix}{name}"
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _several_blocks(module: nn.Module) -> bool:
    members = list(module.children())
    alike = len({type(member) for member in members}) == 1 and len(members) > 1
    return type(module) in _LISTS and alike and type(members[0]) not in _LISTS and any(members[0].children())


def _batch_first(module: nn.Module) -> bool:
    attention = next((part for part in module.modules() if isinstance(part, nn.MultiheadAttention)), None)
    return attention is None or attention.batch_first


def _inner(network: nn.Module) -> Any:
    """The network inside open_clip's wrapper of timm's."""
    return getattr(network, "trunk", network)


def _channels_last(network: nn.Module, name: str) -> bool:
    from torchvision.models import SwinTransformer

    if isinstance(network, SwinTransformer):
        return name.startswith(("features", "norm"))
    return getattr(_inner(network), "output_fmt", None) == "NHWC"


def _prefix_tokens(network: nn.Module) -> int:
    """Tokens in front of the image's: timm says so, torchvision's and open_clip's transformers have a class token."""
    inner = _inner(network)
    own = getattr(inner, "num_prefix_tokens", None)
    return int(own) if own is not None else int(hasattr(inner, "class_token") or hasattr(inner, "class_embedding"))


def _has_class_token(inner: Any) -> bool:
    return bool(getattr(inner, "has_class_token", getattr(inner, "cls_token", True) is not None))
