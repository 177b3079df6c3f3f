"""What a piece of code holds at most in one tensor: the measure of functions that must never hold a whole matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["LargestTensor"]


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation within its block returns.

    Attributes:
        numel: that size, in numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_iter(result) if isinstance(leaf, Tensor))])
        return result
