"""Soft text tokens in front of the text, in the blocks of a frozen text-to-image network.

SoftREPA (Lee et al., "Aligning Text to Image in Diffusion Models is Easier Than You Think", NeurIPS 2025,
arXiv:2503.08250) trains tokens for each block and each of 100 ranges of time; the network and its code stay as they are. A
token of block k at time t is ``base[k] + offset[bucket(t), k]``. In a joint block, as Stable Diffusion 3 has them, the
tokens are in the text while the block runs, and what the block makes of them is dropped; in a U-Net they are more of the
text that the cross-attention reads. Text has no positions inside the attention, so that the place in the sequence does not
matter, and ours stand in front.

Ours against the authors' code: hooks on the unmodified diffusers classes in place of copies of them, every token begins
elsewhere (equal ones would have equal gradients for ever), and the mask of the text grows with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.losses.contracts import require_number
from zoo.token_places import network_of, parameters_of, text_blocks, token_places, token_width

__all__ = ["Attachment", "SoftTokens", "attach", "detach", "token_places", "token_width"]

# Under this name the tokens of a pass travel through the network's own arguments to the blocks.
_ENTRY = "soft_tokens"
_LAST_STEP = 999


class SoftTokens(nn.Module):
    """Tokens for each layer, and an offset for each layer and range of time that all tokens of the layer share.

    Args:
        depth: for how many blocks; 1 is a bank that all blocks share.
        tokens: how many a layer has.
        width: how wide the text is inside the network (`token_width`).
        buckets: into how many ranges of equal length the times 0 … 999 are divided; 0 for tokens that are the same at all
            times.
        init_std: both parameters begin as normal numbers of this deviation, each token with its own.

    Attributes:
        base: the tokens (depth, tokens, width), in float32.
        offset: (buckets, depth, width), or None.

    Raises:
        InputError: a number is no count, or `init_std` is negative or not finite.

    Example:
        >>> bank = SoftTokens(depth=2, tokens=4, width=8)
        >>> bank(torch.tensor([0.0, 500.0, 1000.0])).shape
        torch.Size([3, 2, 4, 8])
    """

    def __init__(self, depth: int, tokens: int, width: int, buckets: int = 100, *, init_std: float = 0.02) -> None:
        super().__init__()
        for name, value in {"depth": depth, "tokens": tokens, "width": width, "buckets": buckets}.items():
            least = 0 if name == "buckets" else 1
            if not isinstance(value, int) or value < least or (name == "buckets" and value > _LAST_STEP + 1):
                most = f" and at most {_LAST_STEP + 1}" if name == "buckets" else ""
                raise InputError(f"{name} must be a whole number of at least {least}{most}, got {value!r}")
        require_number("init_std", init_std, positive=False)
        self.depth = depth
        self.tokens = tokens
        self.width = width
        self.buckets = buckets
        self.base = nn.Parameter(torch.randn(depth, tokens, width) * init_std)
        self.offset = nn.Parameter(torch.randn(buckets, depth, width) * init_std) if buckets else None

    @torch.no_grad()
    def start_at(self, embedding: Tensor) -> None:
        """Add an embedding to every token, which the initial deviation keeps apart.

        The paper's tokens of Stable Diffusion 1.5 begin at the embedding that the text encoder gives to the first token of
        the empty prompt.

        Args:
            embedding: what is added, (width,) or another shape that broadcasts to (depth, tokens, width).

        Raises:
            InputError: the shape does not broadcast.

        Example:
            >>> bank = SoftTokens(1, 2, 3, init_std=0.0)
            >>> bank.start_at(torch.tensor([1.0, 2.0, 3.0]))
            >>> bank.base[0].tolist()
            [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
        """
        if embedding.ndim > 3 or any(
            size not in (1, whole) for size, whole in zip(embedding.shape[::-1], self.base.shape[::-1], strict=False)
        ):
            raise InputError(
                f"embedding must be of shape ({self.width},), or one that broadcasts to {tuple(self.base.shape)}, got "
                f"{tuple(embedding.shape)}"
            )
        self.base.add_(embedding.to(self.base))

    def bucket(self, timestep: Tensor | float) -> Tensor:
        """Return the range that each time is in, ``min(trunc(t), 999)`` divided into `buckets` parts.

        Args:
            timestep: times on the scale 0 … 1000, one or (B,); smaller and larger ones count as the ends.

        Returns:
            (B,) whole numbers in 0 … `buckets` - 1.

        Example:
            >>> SoftTokens(1, 1, 1).bucket(torch.tensor([9.99, 10.0, 850.0, 1000.0])).tolist()
            [0, 1, 85, 99]
        """
        step = torch.as_tensor(timestep, device=self.base.device).reshape(-1).clamp(0, _LAST_STEP).long()
        return step * self.buckets // (_LAST_STEP + 1)

    def forward(self, timestep: Tensor | float) -> Tensor:
        """Return the tokens at given times.

        Args:
            timestep: times on the scale 0 … 1000, one or (B,), of any type and on any device.

        Returns:
            (B, depth, tokens, width), with B = 1 for one time, in the type of the parameters and on their device.
        """
        if self.offset is None:
            return self.base.expand(torch.as_tensor(timestep).numel(), -1, -1, -1)
        rows = F.embedding(self.bucket(timestep), self.offset.flatten(1))
        return self.base + rows.view(len(rows), self.depth, 1, self.width)

    def extra_repr(self) -> str:
        """Return the sizes, for the printed form."""
        return f"depth={self.depth}, tokens={self.tokens}, width={self.width}, buckets={self.buckets}"


class _Argument:
    """One argument of a call, which may be given by keyword or by position."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.position = parameters_of(module).index(name)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[self.position] if self.position < len(args) else kwargs.get(self.name)

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


# The hooks are objects of classes at the top of the module, so that a network that has them can be copied and pickled.
class _Supply:
    """In front of the network: compute the tokens of this pass once and let them travel with its arguments.

    State outside of them would be that of the latest pass, when checkpointing runs a block again during the backward pass.
    """

    def __init__(self, attachment: Attachment, network: nn.Module, extras: str) -> None:
        self.attachment = attachment
        self.timestep = _Argument(network, "timestep")
        self.extras = _Argument(network, extras)

    def __call__(self, _network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = self.attachment.bank(self.timestep.given(args, kwargs))
        return self.extras.put(args, kwargs, {**(self.extras.given(args, kwargs) or {}), _ENTRY: tokens})


class _Insert:
    """In front of each block: take the tokens out of the arguments, and put those of its layer in front of the text.

    A block without a layer only loses the entry, which the attention inside would not understand.
    """

    def __init__(self, block: nn.Module, extras: str, layer: int | None) -> None:
        self.extras = _Argument(block, extras)
        self.layer = layer
        self.text = _Argument(block, "encoder_hidden_states")
        masked = "encoder_attention_mask" in parameters_of(block)
        self.mask = _Argument(block, "encoder_attention_mask") if masked else None

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The dict is not changed: checkpointing calls the block with it a second time.
        extras = dict(self.extras.given(args, kwargs) or {})
        tokens = extras.pop(_ENTRY, None)
        args, kwargs = self.extras.put(args, kwargs, extras or None)
        if self.layer is None:
            return args, kwargs
        if tokens is None:
            raise InputError(
                f"{type(block).__name__} has soft tokens, and its network was not called as a whole: call the network "
                "itself and not its forward or a block of it, or detach() the tokens first"
            )
        text = self.text.given(args, kwargs)
        # With an image prompt (IP-Adapter) the text comes in a tuple, in front of the images.
        first = text[0] if isinstance(text, tuple) else text
        longer = _in_front(first, tokens[:, self.layer])
        args, kwargs = self.text.put(args, kwargs, (longer, *text[1:]) if isinstance(text, tuple) else longer)
        bias = None if self.mask is None else self.mask.given(args, kwargs)
        if self.mask is not None and bias is not None:
            # It is added to the scores of the attention: 0 lets a token through.
            args, kwargs = self.mask.put(args, kwargs, F.pad(bias, (tokens.shape[2], 0)))
        return args, kwargs


class _Strip:
    """Behind a joint block: drop what it made of the tokens; the last block gives no text back."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        text, *rest = output
        return output if text is None else (text[:, self.count :], *rest)


def _in_front(text: Tensor, tokens: Tensor) -> Tensor:
    if len(tokens) not in (1, len(text)):
        raise InputError(f"timestep must be one time, or one for each of the {len(text)} texts, got {len(tokens)}")
    return torch.cat([tokens.to(text).expand(len(text), -1, -1), text], dim=1)


class Attachment:
    """Soft tokens on a network, as `attach` made it; leaving it as a context takes them off.

    Attributes:
        network: the network that has the tokens.
        bank: the tokens.
        places: the names of the blocks, one for each layer of the bank unless they share one.
    """

    def __init__(self, network: nn.Module, bank: SoftTokens, places: list[str]) -> None:
        self.network = network
        self.bank = bank
        self.places = places
        found = text_blocks(network)
        supply = _Supply(self, network, found.extras)
        self._handles = [network.register_forward_pre_hook(supply, with_kwargs=True)]
        for name in found.names:
            block = network.get_submodule(name)
            layer = (places.index(name) if bank.depth > 1 else 0) if name in places else None
            insert = _Insert(block, found.extras, layer)
            self._handles.append(block.register_forward_pre_hook(insert, with_kwargs=True))
            if found.joint and layer is not None:
                self._handles.append(block.register_forward_hook(_Strip(bank.tokens)))
        _forget_compiled()

    def detach(self) -> None:
        """Take the tokens off, after which the network is what it was; a second time has no effect."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            _forget_compiled()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()


def attach(denoiser: Any, bank: SoftTokens, blocks: str | Sequence[int | str] | None = None) -> Attachment:
    """Put soft tokens into a network until `Attachment.detach`, or the end of a ``with``.

    The network's code, parameters, modes and state dict stay as they are, and the bank stays outside of it, so that storing
    the network or adapters of it (LoRA) is not affected. Tokens are computed once for each call of the network, from its
    ``timestep``, and take the type and the device of the text. In sampling with guidance both branches have them, as in the
    paper. Gradients must be let through the network for the tokens to get theirs: no `torch.no_grad` around it, freeze its
    parameters with ``requires_grad_(False)``. Gradient checkpointing works with ``use_reentrant=False``, which is the
    default of diffusers. A deep copy or a pickle of the network has a copy of the bank; `detach` takes it off there.

    `torch.compile` does not watch hooks: attaching and detaching make it forget what it compiled, all of it, so that the
    next call compiles again.

    Args:
        denoiser: an SD3Transformer2DModel, a UNet2DConditionModel, a network that is called as one of them, one of these
            compiled or in DistributedDataParallel, or a diffusers pipeline around it.
        bank: the tokens, with one layer for each block, or one layer that all share.
        blocks: which blocks, as `token_places` takes them; the paper's choice if omitted.

    Raises:
        InputError: the architecture cannot take soft tokens, it has some, or the bank does not fit it.

    Example:
        >>> from zoo.architectures.tiny_mmdit import TinyMMDiT
        >>> network = TinyMMDiT()
        >>> bank = SoftTokens(depth=2, tokens=4, width=token_width(network))
        >>> with attach(network, bank, blocks=[0, 1]) as attachment:
        ...     attachment.places
        ['transformer_blocks.0', 'transformer_blocks.1']
    """
    network = network_of(denoiser)
    places = token_places(network, blocks)
    width = token_width(network)
    if bank.width != width:
        raise InputError(
            f"bank must be as wide as the text inside {type(network).__name__}, {width}, got {bank.width}; make it with "
            "width=token_width(denoiser)"
        )
    if bank.depth not in (1, len(places)):
        raise InputError(
            f"bank must have one layer for each of {len(places)} blocks ({', '.join(places)}), or 1 that they share, got "
            f"{bank.depth}; name as many blocks with blocks=, or make another bank"
        )
    if _attachment_of(network) is not None:
        raise InputError(
            f"{type(network).__name__} has soft tokens already: take them off with the attachment's detach(), or with "
            "zoo.soft_tokens.detach(denoiser)"
        )
    return Attachment(network, bank, places)


def detach(denoiser: Any) -> None:
    """Take the soft tokens off a network, whoever put them there; without effect where there are none.

    Args:
        denoiser: what `attach` was given, or a copy of it.

    Raises:
        InputError: it is neither a network nor a diffusers pipeline.
    """
    attachment = _attachment_of(network_of(denoiser))
    if attachment is not None:
        attachment.detach()


def _attachment_of(network: nn.Module) -> Attachment | None:
    supplies = (hook for hook in network._forward_pre_hooks.values() if isinstance(hook, _Supply))
    return next((supply.attachment for supply in supplies), None)


def _forget_compiled() -> None:
    # What is compiled has the hooks inside that were there then, and no guard on them. Who never compiled has no dynamo.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
