"""Which networks take soft tokens, and where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from zoo.architectures.tiny_mmdit import TinyMMDiT
from zoo.errors import InputError
from zoo.soft_tokens import SoftTokens, attach, detach, token_places, token_width
from zoo.token_places import network_of


@pytest.fixture(scope="module")
def network() -> TinyMMDiT:
    return TinyMMDiT(width=16, depth=3, heads=2, joint_attention_dim=12, pooled_projection_dim=6)


def test_places(network: TinyMMDiT) -> None:
    assert token_width(network) == 16
    assert token_places(network) == [f"transformer_blocks.{index}" for index in range(3)]
    assert token_places(TinyMMDiT(depth=7)) == [f"transformer_blocks.{index}" for index in range(5)]
    assert token_places(network, ["transformer_blocks.1", 0]) == ["transformer_blocks.1", "transformer_blocks.0"]
    assert token_places(network, "transformer_blocks") == token_places(network, [0, 1, 2])


def test_wrappers_are_looked_through(network: TinyMMDiT, tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        assert network_of(wrapped) is network
        with attach(torch.compile(wrapped, backend="eager"), SoftTokens(1, 4, 16)) as attachment:
            assert attachment.network is network
    finally:
        distributed.destroy_process_group()
    assert network_of(SimpleNamespace(transformer=None, unet=network)) is network


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "blocks must name at least one block, and each once"),
        ([0, "transformer_blocks.0"], "and each once"),
        ([3], r"blocks must be numbers in 0 … 2 or names, TinyMMDiT has 3 blocks"),
        ([-1], "got -1"),
        ("transformer_block.1", r"has no block 'transformer_block.1'.* Did you mean transformer_blocks.1"),
    ],
)
def test_bad_blocks(network: TinyMMDiT, blocks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attach(network, SoftTokens(1, 4, 16), blocks)


class _RotaryBlock(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tensor,
        joint_attention_kwargs: Any = None,
    ) -> Any:
        return encoder_hidden_states, hidden_states


class _Blocks(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, hidden_states: Tensor, timestep: Tensor, joint_attention_kwargs: Any = None) -> Tensor:
        return hidden_states


class _Unsized(TinyMMDiT):
    def __init__(self) -> None:
        super().__init__()
        self.context_embedder = nn.Identity()


def test_bad_networks() -> None:
    bank = SoftTokens(1, 4, 16)
    with pytest.raises(InputError, match=r"_Blocks cannot take soft tokens: .*rotary positions \(image_rotary_emb\)"):
        attach(_Blocks(_RotaryBlock()), bank)
    with pytest.raises(InputError, match="_Blocks is no network that soft tokens know"):
        attach(_Blocks(nn.Identity()), bank)
    with pytest.raises(InputError, match="Linear is no network that soft tokens know"):
        attach(nn.Linear(2, 2), bank)
    with pytest.raises(InputError, match="_Unsized does not say how wide its text is"):
        attach(_Unsized(), bank)
    with pytest.raises(InputError, match=r"denoiser must be a network, or a diffusers pipeline .* got str"):
        attach("stable-diffusion", bank)
    detach(nn.Linear(2, 2))
