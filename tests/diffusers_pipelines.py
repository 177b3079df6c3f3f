"""Tiny random pipelines of diffusers, stored as the real ones are; nothing is fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."
LENGTH = 12  # tokens of a caption
T5_LENGTH = 14
CAPTIONS = ["a cat, 2 dogs", "A Cat", "the dog sat on a mat in the sun and did not go", ""]


def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer over letters, with four merges."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(merge.replace(" ", "") for merge in merges), "!"]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {"model_max_length": LENGTH, "pad_token": pad, "tokenizer_class": "CLIPTokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer() -> Any:
    """T5's tokenizer over letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    letters = [*LETTERS, *LETTERS.upper()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((each, -3.0) for each in letters)]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


def clip_encoder(tokenizer: Any, *, projection: int | None, width: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=projection or 16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu" if projection is None else "gelu",
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def vae(latent_channels: int, *, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=0.18215 if shift is None else 1.5305,
        shift_factor=shift,
    )


def unet(*, xl: bool) -> Any:
    from diffusers import UNet2DConditionModel

    more: dict[str, Any] = {}
    if xl:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8 + 6 * 4,
        }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40 if xl else 16,
        attention_head_dim=8,
        norm_num_groups=4,
        **more,
    )


def stable_diffusion(folder: Path, work: Path) -> Any:
    """Stable Diffusion 1.5 in the small."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(work / "sd")
    pipeline = StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip_encoder(tokenizer, projection=None),
        tokenizer=tokenizer,
        unet=unet(xl=False),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def stable_diffusion_xl(folder: Path, work: Path) -> Any:
    """Stable Diffusion XL in the small; its second tokenizer pads with another token."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(1)
    tokenizers = [clip_tokenizer(work / "xl"), clip_tokenizer(work / "xl_2", pad="!")]
    pipeline = StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip_encoder(tokenizers[0], projection=None),
        text_encoder_2=clip_encoder(tokenizers[1], projection=8, width=24),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet(xl=True),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def stable_diffusion_3(folder: Path, work: Path, *, t5: bool = True) -> Any:
    """Stable Diffusion 3 in the small."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    tokenizers = [clip_tokenizer(work / f"sd3_{t5}"), clip_tokenizer(work / f"sd3_{t5}_2", pad="!")]
    third = t5_tokenizer() if t5 else None
    width = 64
    encoder = None
    if third is not None:
        encoder = T5EncoderModel(
            T5Config(vocab_size=len(third), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ).eval()  # a stored one is loaded without dropout
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=width,
            caption_projection_dim=16,
            pooled_projection_dim=8 + 12,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, shift=0.0609),
        text_encoder=clip_encoder(tokenizers[0], projection=8),
        text_encoder_2=clip_encoder(tokenizers[1], projection=12, width=24),
        text_encoder_3=encoder,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=third,
    )
    pipeline.save_pretrained(folder)
    return pipeline


MAKERS: dict[str, Callable[[Path, Path], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
}


def encoded(pipeline: Any, captions: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a pipeline tells its denoiser about captions, and what without them."""
    name = type(pipeline).__name__
    with torch.no_grad():
        if name == "StableDiffusionPipeline":
            both = pipeline.encode_prompt(captions, torch.device("cpu"), 1, do_classifier_free_guidance=True)
            return tuple({"encoder_hidden_states": each} for each in both)
        more = {"prompt_3": None, "max_sequence_length": T5_LENGTH} if name == "StableDiffusion3Pipeline" else {}
        text, null, pooled, null_pooled = pipeline.encode_prompt(captions, prompt_2=None, **more)
    if name == "StableDiffusion3Pipeline":
        return tuple(
            {"encoder_hidden_states": hidden, "pooled_projections": embeds}
            for hidden, embeds in ((text, pooled), (null, null_pooled))
        )
    ids = pipeline._get_add_time_ids((512, 512), (0, 0), (512, 512), text.dtype, text_encoder_projection_dim=8)
    ids = ids.repeat(len(captions), 1)
    return tuple(
        {"encoder_hidden_states": hidden, "text_embeds": embeds, "time_ids": ids}
        for hidden, embeds in ((text, pooled), (null, null_pooled))
    )


def encoded_text(pipeline: Any) -> dict[str, torch.Tensor]:
    return encoded(pipeline, CAPTIONS)[0]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def edited(source: Path, folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> str:
    """The name of a copy in which a JSON file is another."""
    shutil.copytree(source, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return f"diffusers/{folder}"
