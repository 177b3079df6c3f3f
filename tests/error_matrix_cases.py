"""A stand-in for a denoiser with soft tokens, and the number of bytes that autograd keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.error_matrix import Contrast, contrast
from zoo.losses import softrepa_loss

__all__ = ["EXACT", "MODES", "SmallDenoiser", "gradient_of", "kept_bytes", "linear_errors", "plain", "run"]

MODES = ["full", "rows", "two_pass"]
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}


class SmallDenoiser:
    """Two layers with a soft token each, in front of frozen weights; errors of pairs of images and captions."""

    def __init__(self, rows: int = 4, columns: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 0.5) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        self.images, self.texts, self.weights = draw(rows, 6), draw(columns, 6), draw(2, 6, 6)
        self.target = (self.images - self.texts[:rows]).tanh() if rows <= columns else draw(rows, 6)
        self.tokens = [draw(6, scale=0.3).requires_grad_() for _ in range(2)]
        self.calls: list[int] = []

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        self.calls.append(len(image))
        hidden = self.images[image] - self.texts[text]
        for weight, token in zip(self.weights, self.tokens, strict=True):
            hidden = hidden + 0.3 * torch.tanh((hidden + token) @ weight)
        return (hidden - self.target[image]).square().mean(1)


def plain(denoiser: SmallDenoiser, **options: Any) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Loss, errors and gradient of one graph over all pairs."""
    rows, columns = len(denoiser.images), len(denoiser.texts)
    image, text = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).unbind(1)
    errors = denoiser(image, text).view(rows, columns)
    loss = softrepa_loss(errors, **options)
    gradient = torch.autograd.grad(loss, denoiser.tokens)
    denoiser.calls.clear()
    return loss.detach(), errors.detach(), gradient


def run(denoiser: SmallDenoiser, **options: Any) -> Contrast:
    sizes = {"rows": len(denoiser.images), "columns": len(denoiser.texts)}
    return contrast(denoiser, parameters=denoiser.tokens, **sizes, **options)


def gradient_of(loss: Tensor, denoiser: SmallDenoiser) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, denoiser.tokens)


class _Kept:
    """What autograd keeps of one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def kept_bytes() -> Iterator[dict[str, int]]:
    """Bytes saved for backward passes: how many there are, and how many there were at most."""
    count = {"now": 0, "most": 0}

    def forget(size: int) -> None:
        count["now"] -= size

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        size = tensor.numel() * tensor.element_size()
        count["now"] += size
        count["most"] = max(count.values())
        weakref.finalize(kept, forget, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield count


def linear_errors(weight: Tensor, images: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """Errors of one layer whose weight is trained, which autocast keeps a copy of."""
    hidden = F.linear(images[image], weight)
    return (hidden.float() - images[text]).square().mean(1)
