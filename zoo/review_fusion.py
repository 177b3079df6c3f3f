"""The fusion of ReviewKD: a student's maps, each enriched by the deeper ones, at the teacher's widths and sizes.

Chen, Liu, Zhao, Jia: "Distilling Knowledge via Knowledge Review" (CVPR 2021, arXiv 2104.09044), "ABF". Training only: the
student itself is not changed. From deep to shallow, with x a student map and r what the deeper level passed up:

    x = BN(conv1x1(x))                                       to the common width
    (a, b) = sigmoid(conv1x1([x, up(r)]))                    two maps of weights; not at the deepest level
    r = a x + b up(r)                                        resized to the teacher's size, passed up
    output = BN(conv3x3(r))                                  to the teacher's width

Resizing is to the nearest pixel. Read: the project's notes on the authors' release, and mdistiller's port of it, from
which come the order of the last two steps (resized before it is passed up and before the 3x3 convolution) and the
initialisation (the convolutions with batch norm uniform as Kaiming's with a = 1, that of the weights PyTorch's own).
Difference: sizes come from the maps themselves and not from a table, so they need not be square.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError

__all__ = ["ReviewFusion"]


class ReviewFusion(nn.Module):
    """Fuse student maps from deep to shallow and give each the teacher's number of channels and its size.

    Batch norm over one value per channel (a batch of one at a map of one pixel) or none has no variance: it normalises
    with the running statistics and leaves them as they are.

    Args:
        student_channels: channels of the student's maps, shallow to deep.
        teacher_channels: channels of the teacher's maps, shallow to deep, equally many.
        mid_channels: common width inside; the deepest student map's, at most 512, if omitted.

    Raises:
        InputError: no level, different numbers of levels, or a count that is not positive.

    Example:
        >>> fusion = ReviewFusion([16, 32], [64, 128])
        >>> maps = [torch.zeros(2, 16, 8, 8), torch.zeros(2, 32, 4, 4)]
        >>> [tuple(fused.shape) for fused in fusion(maps, [(14, 14), (7, 7)])]
        [(2, 64, 14, 14), (2, 128, 7, 7)]
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, mid_channels: int | None = None
    ) -> None:
        super().__init__()
        if not student_channels or len(student_channels) != len(teacher_channels):
            raise InputError(
                "student_channels and teacher_channels must be equally many, at least one, got "
                f"{len(student_channels)} and {len(teacher_channels)}; leave out the shallowest of the longer one"
            )
        mid = min(512, student_channels[-1]) if mid_channels is None else mid_channels
        for name, counts in (
            ("student_channels", student_channels),
            ("teacher_channels", teacher_channels),
            ("mid_channels", [mid]),
        ):
            if min(counts) < 1:
                raise InputError(f"{name} must be positive, got {min(counts)}")
        deepest = len(student_channels) - 1
        self.levels = nn.ModuleList(
            _Level(own, mid, other, fuse=index < deepest)
            for index, (own, other) in enumerate(zip(student_channels, teacher_channels, strict=True))
        )

    def forward(self, maps: Sequence[Tensor], sizes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """Return the fused maps, shallow to deep, to be compared with the teacher's.

        Args:
            maps: the student's maps (B, C, H, W), shallow to deep; a vector (B, C) is a map of one pixel.
            sizes: height and width of the teacher's maps, ``[m.shape[2:] for m in teacher_maps]``; an empty size is that
                of a vector. The student's own if omitted.

        Returns:
            One map (B, teacher channels, H, W) for each level, or a vector (B, teacher channels) where the size is empty.

        Raises:
            InputError: wrong numbers of maps or sizes, of dimensions or of channels, or a map where the teacher has a
                vector.
        """
        sizes = [m.shape[2:] for m in maps] if sizes is None else sizes
        self._check(maps, sizes)
        outputs: list[Tensor] = []
        residual: Tensor | None = None
        for level, x, size in zip(reversed(self.levels), reversed(maps), reversed(sizes), strict=True):
            height, width = size or (1, 1)
            residual, output = level(x if x.ndim == 4 else x[:, :, None, None], residual, (height, width))
            outputs.append(output if size else output.flatten(1))
        return outputs[::-1]

    def _check(self, maps: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> None:
        if len(maps) != len(self.levels) or len(sizes) != len(self.levels):
            raise InputError(
                f"maps and sizes must be {len(self.levels)}, one a level, got {len(maps)} and {len(sizes)}"
            )
        for index, (x, size, level) in enumerate(zip(maps, sizes, self.levels, strict=True)):
            assert isinstance(level, _Level)
            if x.ndim not in (2, 4) or x.shape[1] != level.in_channels:
                raise InputError(
                    f"maps[{index}] must be (B, {level.in_channels}, H, W) or (B, {level.in_channels}), got shape "
                    f"{tuple(x.shape)}"
                )
            if len(size) not in (0, 2):
                raise InputError(f"sizes[{index}] must be (H, W), or () for a vector, got {tuple(size)}")
            if not size and x.ndim == 4:
                raise InputError(
                    f"maps[{index}] has {x.shape[2]} x {x.shape[3]} pixels and the teacher a vector; give the student's "
                    "pooled vector (B, C) there"
                )


class _Level(nn.Module):
    """One level: to the common width, fused with the deeper levels, to the teacher's width."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, fuse: bool) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.reduce = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(mid_channels)
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None
        self.expand = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        self.expand_norm = nn.BatchNorm2d(out_channels)
        for convolution in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, x: Tensor, residual: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return what is passed up, (B, mid_channels, H, W), and the output, (B, out_channels, H, W)."""
        x = _normalise(self.reduce_norm, self.reduce(x))
        if self.attention is not None:
            assert residual is not None
            residual = _resize(residual, (x.shape[2], x.shape[3]))
            weights = self.attention(torch.cat([x, residual], 1)).sigmoid()
            x = x * weights[:, :1] + residual * weights[:, 1:]
        x = _resize(x, size)
        return x, _normalise(self.expand_norm, self.expand(x))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size, mode="nearest")


def _normalise(norm: nn.Module, x: Tensor) -> Tensor:
    # Lightning may have put a SyncBatchNorm in the place of the BatchNorm2d.
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    if x.shape[0] * x.shape[2] * x.shape[3] > 1:
        normalised: Tensor = norm(x)
        return normalised
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps)
