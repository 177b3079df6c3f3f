"""What the networks for small images share: the check of their sizes, the initialisation, the channel shuffle."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.errors import InputError

__all__ = ["ChannelShuffle", "check_counts", "initialise_convolutions"]


def check_counts(*, num_classes: int, in_chans: int) -> None:
    """Refuse a classifier without classes and images without channels.

    Args:
        num_classes: should be at least 1.
        in_chans: should be at least 1.

    Raises:
        InputError: one is not.
    """
    if num_classes < 1 or in_chans < 1:
        raise InputError(f"num_classes and in_chans must be positive, got {num_classes} and {in_chans}")


def initialise_convolutions(network: nn.Module) -> None:
    """Draw every convolution from a normal distribution of variance 2 / fan-out (He et al. 2015), without groups.

    Args:
        network: its convolutions are overwritten.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ChannelShuffle(nn.Module):
    """Deal the channels of ``groups`` groups out in turn, so that the next grouped convolution sees all of them.

    Args:
        groups: number of groups, a divisor of the number of channels.

    Example:
        >>> import torch
        >>> ChannelShuffle(2)(torch.arange(6).view(1, 6, 1, 1)).flatten().tolist()
        [0, 3, 1, 4, 2, 5]
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same channels in another order."""
        batch, channels, height, width = x.shape
        grouped = x.reshape(batch, self.groups, channels // self.groups, height, width)
        return grouped.transpose(1, 2).reshape(batch, channels, height, width)
