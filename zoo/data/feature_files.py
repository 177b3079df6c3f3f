"""Rows of numbers in npy and safetensors files that stay on disk until they are asked for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from zoo.data.splits import Indices
from zoo.errors import InputError, nearest

__all__ = ["FeatureFile", "read_integers"]

_CHUNK = 1 << 24  # numbers that `FeatureFile.check` looks at in one go


def _open_npy(path: str) -> Tensor:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is no readable npy file of numbers: {error}") from error
    if not isinstance(values, np.ndarray):
        raise InputError(f"{path} is an archive of arrays; store one array with numpy.save")
    if not values.dtype.isnative or values.dtype.kind not in "fiu":
        raise InputError(f"{path} must hold numbers in this machine's byte order; its dtype is {values.dtype.str}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes into these tensors
        return torch.from_numpy(values)


def _open_safetensors(path: str, tensor: str | None, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # maps the file; a tensor is a view of the mapping
            names = sorted(file.keys())
            chosen = tensor or (names[0] if len(names) == 1 else name)
            if chosen not in names:
                remedy = f"{nearest(chosen, names)} It has: {', '.join(names)}" if names else " It is empty"
                raise InputError(f"{path} has no tensor {chosen!r}.{remedy}; choose with tensors={{{name!r}: …}}")
            return cast("Tensor", file.get_tensor(chosen))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no readable safetensors file: {error}") from error


def _open(path: str, tensor: str | None, name: str) -> Tensor:
    if not Path(path).is_file():
        raise InputError(f"{name}: there is no file {path!r}")
    if path.endswith(".npy"):
        if tensor is not None:
            raise InputError(f"tensors names {tensor!r} for {name!r}, but {path} is an npy file and has no names")
        return _open_npy(path)
    if path.endswith(".safetensors"):
        return _open_safetensors(path, tensor, name)
    raise InputError(f"{name}: {path!r} must be an .npy or .safetensors file")


class FeatureFile:
    """A matrix of features, one sample a row, that is read from disk by the row.

    The file is mapped into memory: rows occupy memory only while the system has nothing better to do with it, and processes
    share them. A pickled copy maps the file again.

    Args:
        path: file that ends in .npy or .safetensors, with a matrix (N, D) of float16, bfloat16, float32 or float64.
        name: what the features are of, for messages; also the tensor to take if the file has several.
        tensor: name of the tensor in a safetensors file; None takes the only one, or else ``name``.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: str, name: str, *, tensor: str | None = None) -> None:
        self.path = path
        self.name = name
        self.tensor = tensor
        values = self._values()
        if values.ndim != 2 or 0 in values.shape:
            raise InputError(f"{name}: {path} must hold a matrix (N, D), got shape {tuple(values.shape)}")
        if not values.is_floating_point():
            raise InputError(f"{name}: {path} must hold floating-point features, got {values.dtype}")
        self.dim = int(values.shape[1])
        self._rows = int(values.shape[0])

    def __len__(self) -> int:
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    _mapped: Tensor | None = None

    def _values(self) -> Tensor:
        if self._mapped is None:
            self._mapped = _open(self.path, self.tensor, self.name)
        return self._mapped

    def read(self, rows: Indices) -> Tensor:
        """Return some rows as float32.

        Args:
            rows: positions (B,), each below N.

        Returns:
            A new tensor (B, D).
        """
        return self._values()[torch.from_numpy(rows)].float()

    def check(self) -> None:
        """Look at every row once, some 64 MB at a time; rows that are all zero get a warning that counts them.

        Raises:
            InputError: a row has a number that is not finite, also as float32.
        """
        values, zeros, first = self._values(), 0, -1
        step = max(1, _CHUNK // self.dim)
        for start in range(0, len(self), step):
            part = values[start : start + step].float()
            wrong = (~part.isfinite().all(1)).nonzero().flatten()
            if len(wrong):
                raise InputError(
                    f"{self.name}: {self.path} has rows that are not finite, the first is row {start + int(wrong[0])} "
                    f"({len(wrong)} in rows {start} … {start + len(part) - 1}); compute them again, or leave them out"
                )
            empty = (~part.any(1)).nonzero().flatten()
            if len(empty):
                first = start + int(empty[0]) if zeros == 0 else first
                zeros += len(empty)
        if zeros:
            warnings.warn(
                f"{self.name}: {zeros} of {len(self)} rows of {self.path} are all zero, the first is row {first}; "
                "they have no direction, and their cosine with everything is 0",
                stacklevel=2,
            )


def read_integers(path: str, name: str, *, least: int = 0) -> Indices:
    """Read a vector of whole numbers into memory.

    Args:
        path: file that ends in .npy or .safetensors.
        name: what the numbers are, for messages; also the tensor to take if a file has several.
        least: smallest number that is allowed.

    Returns:
        The numbers (N,), int64.

    Raises:
        InputError: the file cannot be read, or holds something else or smaller numbers.
    """
    values = _open(path, None, name)
    if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise InputError(
            f"{name}: {path} must hold a vector (N,) of whole numbers, got {values.dtype} with shape {tuple(values.shape)}"
        )
    numbers: Indices = values.long().numpy().copy()  # that does not hold on to the file
    if len(numbers) and numbers.min() < least:
        raise InputError(f"{name}: {path} must hold numbers of at least {least}, got {numbers.min()}")
    return numbers
