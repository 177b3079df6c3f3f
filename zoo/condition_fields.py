"""How the condition of a caption is stored: the blocks of it that are not zero, in half precision.

Stable Diffusion 3 fills CLIP's hidden states up with zeros to the width of T5, and puts zeros in the place of a T5 that is
not there. Those are known beforehand, so they are left out, and the condition comes back bit for bit but for the type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import InputError

__all__ = ["DTYPES", "Field", "to_storage"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types of many numbers, by name."""
_STORED = {**DTYPES, "float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
_SMALL = 64  # numbers of a caption that are few enough to stay in float32


@dataclass(frozen=True)
class Field:
    """How one tensor of a condition is stored.

    Attributes:
        shape: its shape without the batch.
        dtype: in which type it is stored.
        blocks: for a shape (L, D), rows and width of each block, from top to bottom; all else is zero. Empty: all of it.
    """

    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, name: str, value: Tensor, blocks: tuple[tuple[int, int], ...], dtype: str) -> Field:
        """Lay out a tensor (B, …).

        Args:
            name: the tensor's name, for the error message.
            value: an example.
            blocks: see above.
            dtype: type of its numbers, if they are many.

        Raises:
            InputError: the cache has no room for this type, or the blocks do not fit the shape.
        """
        shape = tuple(value.shape[1:])
        kind = str(value.dtype).removeprefix("torch.")
        if value.is_floating_point():
            kind = dtype if value[0].numel() > _SMALL else "float32"
        if kind not in _STORED:
            raise InputError(f"the condition {name!r} is {value.dtype}, and a cache holds {', '.join(_STORED)}")
        fits = len(shape) == 2 and sum(rows for rows, _ in blocks) == shape[0] and any(width for _, width in blocks)
        if blocks and not fits:
            raise InputError(f"the blocks {blocks} of the condition {name!r} do not fit its shape {shape}")
        return cls(shape, kind, blocks)

    def pack(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Return what is stored of a tensor (B, …), by the names in the file.

        Args:
            name: the tensor's name.
            value: the tensor.

        Raises:
            InputError: it has another shape, is not zero where it should be, or does not fit into its type.
        """
        if tuple(value.shape[1:]) != self.shape:
            raise InputError(f"the condition {name!r} has shape {tuple(value.shape[1:])}, before it was {self.shape}")
        pieces = {}
        for piece, (rows, width) in self._pieces(name).items():
            if width is not None and bool(value[:, rows, width:].any()):
                raise InputError(
                    f"the condition {name!r} has numbers beyond its block {rows.start}:{rows.stop}, 0:{width}"
                )
            pieces[piece] = to_storage(value if width is None else value[:, rows, :width], self.dtype, name)
        return {piece: stored for piece, stored in pieces.items() if stored.numel()}

    def unpack(self, name: str, pieces: Mapping[str, Tensor]) -> Tensor:
        """Return a tensor (B, …) from what `pack` gave; float32 if it is floating point.

        Args:
            name: the tensor's name.
            pieces: the rows of each piece.
        """
        if not self.blocks:
            return _working(pieces[name])
        some = next(pieces[piece] for piece in self._pieces(name) if piece in pieces)
        value = torch.zeros(len(some), *self.shape, dtype=_working(some[:0]).dtype)
        for piece, (rows, width) in self._pieces(name).items():
            if piece in pieces:
                value[:, rows, :width] = pieces[piece]
        return value

    def names(self, name: str) -> list[str]:
        """Return the names of the pieces in a file.

        Args:
            name: the tensor's name.
        """
        return [piece for piece, (_, width) in self._pieces(name).items() if width != 0]

    def _pieces(self, name: str) -> dict[str, tuple[slice, int | None]]:
        if not self.blocks:
            return {name: (slice(None), None)}
        pieces, start = dict[str, tuple[slice, int | None]](), 0
        for number, (rows, width) in enumerate(self.blocks):
            pieces[f"{name}.{number}"] = (slice(start, start + rows), width)
            start += rows
        return pieces


def _working(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value.clone()


def to_storage(value: Tensor, dtype: str, name: str) -> Tensor:
    """Return a tensor on the CPU in the type of the file, with a storage of its own.

    Args:
        value: the tensor.
        dtype: name of the type.
        name: what it is, for the error message.

    Raises:
        InputError: a number is not finite in that type.
    """
    stored = value.detach().to("cpu", _STORED[dtype]).clone(memory_format=torch.contiguous_format)
    if stored.is_floating_point() and not bool(stored.isfinite().all()):
        finite = bool(value.isfinite().all())
        remedy = (
            "dtype='bfloat16' holds it"
            if finite and dtype == "float16"
            else "the encoder overflows; load it in float32"
        )
        raise InputError(f"{name} has numbers up to {float(value.abs().max()):.3g} that {dtype} cannot hold: {remedy}")
    return stored
