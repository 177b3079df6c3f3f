"""Tiny random networks of diffusers, and their passes with soft tokens as loops over the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.soft_tokens import SoftTokens

BATCH, LENGTH, WIDTH = 2, 5, 12
SD3: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 4,
    "num_attention_heads": 2, "joint_attention_dim": WIDTH, "caption_projection_dim": 8, "pooled_projection_dim": 6,
    "pos_embed_max_size": 8, "out_channels": 4,
}  # fmt: skip
UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
    "cross_attention_dim": WIDTH, "norm_num_groups": 4, "attention_head_dim": 4,
}  # fmt: skip
CROSSED_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
CROSSED_LAST = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 + 6 * 4,
}  # fmt: skip


def _sd3(**options: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**SD3, **options)


def _unet(options: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET, **options)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "sd3": _sd3,
    "sd3.5": lambda: _sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "sd1": lambda: _unet(CROSSED_FIRST),
    "sdxl": lambda: _unet(CROSSED_LAST),
}
JOINT, CROSSED = ("sd3", "sd3.5"), ("sd1", "sdxl")
KINDS = (*JOINT, *CROSSED)


def condition_of(kind: str, seed: int = 0, length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder_hidden_states": (BATCH, length, WIDTH)}
    if kind in JOINT:
        shapes["pooled_projections"] = (BATCH, 6)
    elif kind == "sdxl":
        shapes |= {"text_embeds": (BATCH, 6), "time_ids": (BATCH, 6)}
    return {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}


def noisy_of(seed: int = 0) -> Tensor:
    return torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


Tokens = Callable[[int], Tensor]


def tokens_by_hand(bank: SoftTokens, times: list[float]) -> Tokens:
    def of(layer: int) -> Tensor:
        rows = [bank.base[layer] + bank.offset[int(min(time, 999)) // 10, layer] for time in times]
        return torch.stack(rows).double()

    return of


def sd3_by_hand(
    model: Any, noisy: Tensor, times: list[float], condition: dict[str, Tensor], places: list[int], of: Tokens
) -> Tensor:
    image = model.pos_embed(noisy)
    temb = model.time_text_embed(torch.tensor(times), condition["pooled_projections"])
    text = model.context_embedder(condition["encoder_hidden_states"])
    length = text.shape[1]
    for index, block in enumerate(model.transformer_blocks):
        if index in places:
            text = torch.cat([of(places.index(index)), text], 1)
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        text = None if text is None else text[:, -length:]
    image = model.proj_out(model.norm_out(image, temb)).unflatten(1, (4, 4)).unflatten(3, (2, 2, 4))
    return torch.einsum("bhwpqc->bchpwq", image).flatten(4).flatten(2, 3)


def unet_by_hand(
    model: Any, noisy: Tensor, times: list[float], condition: dict[str, Tensor], places: list[str], of: Tokens
) -> Tensor:
    temb = model.time_embedding(model.time_proj(torch.tensor(times)).double())
    if "time_ids" in condition:
        sizes = model.add_time_proj(condition["time_ids"].flatten()).reshape(len(noisy), -1).double()
        temb = temb + model.add_embedding(torch.cat([condition["text_embeds"], sizes], 1))
    text = condition["encoder_hidden_states"]

    def told(name: str) -> dict[str, Tensor]:
        if not getattr(model.get_submodule(name), "has_cross_attention", False):
            return {}
        # At the end, where ours stand in front: the place in the sequence does not matter.
        return {"encoder_hidden_states": torch.cat([text, of(0)], 1) if name in places else text}

    image = model.conv_in(noisy)
    kept = [image]
    for index, block in enumerate(model.down_blocks):
        image, more = block(image, temb, **told(f"down_blocks.{index}"))
        kept += more
    image = model.mid_block(image, temb, **told("mid_block"))
    for index, block in enumerate(model.up_blocks):
        count = len(block.resnets)
        image = block(image, tuple(kept[-count:]), temb, **told(f"up_blocks.{index}"))
        kept = kept[:-count]
    return model.conv_out(model.conv_act(model.conv_norm_out(image)))
