"""Stable Diffusion's parts as a backbone: equal to the pipelines of diffusers, on tiny random ones, and strict about files.

All tests that import diffusers' pipelines are here: the import takes seconds.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from tests import diffusers_pipelines as tiny
from tests.diffusers_pipelines import CAPTIONS, MAKERS, edited, encoded, encoded_text, same
from tests.hub_fixtures import call_python
from tests.hub_server import HubServer
from tests.latent_parts import TEXTS, pairs
from zoo import diffusers_parts
from zoo.data.latent_captions import LatentCaptionsDataModule
from zoo.denoisers import Epsilon, Flow
from zoo.diffusers_backbone import DiffusersBackbone, load_backbone
from zoo.diffusers_parts import find_pipeline
from zoo.errors import InputError
from zoo.latent_cache import cache_latents

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

T5 = {"max_sequence_length": tiny.T5_LENGTH}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """A pipeline of each kind, and the folder that it is stored in."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: (make(root / name, root / "tokens"), root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def backbones(stored: dict[str, tuple[Any, Path]]) -> dict[str, DiffusersBackbone]:
    return {name: load_backbone(f"diffusers/{folder}", **T5) for name, (_, folder) in stored.items()}


@pytest.fixture(params=MAKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_conditions_are_those_of_the_pipeline(stored: Any, backbones: Any, kind: str) -> None:
    """Short, with capitals, cut off, empty: bit for bit. The empty one alone is a batch of one, which rounds otherwise."""
    text, null = encoded(stored[kind][0], CAPTIONS)
    assert same(backbones[kind].condition(CAPTIONS), text)
    torch.testing.assert_close(backbones[kind].null_condition(len(CAPTIONS)), null)
    assert not same(text, {name: value.flip(0) for name, value in text.items()})


def test_latents_are_those_of_the_vae(stored: Any, backbones: Any, kind: str) -> None:
    vae, backbone = stored[kind][0].vae, backbones[kind]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        found = vae.encode(images).latent_dist
        shift = vae.config.shift_factor or 0.0
        sample = (found.sample(torch.Generator().manual_seed(3)) - shift) * vae.config.scaling_factor
        decoded = vae.decode(sample / vae.config.scaling_factor + shift).sample
    latents = backbone.latents(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(latents, sample)
    torch.testing.assert_close(backbone.images(latents), decoded)
    mean, deviation = backbone.posterior(images)
    torch.testing.assert_close(mean, (found.mode() - shift) * vae.config.scaling_factor)
    torch.testing.assert_close(deviation, found.std * vae.config.scaling_factor)
    assert not torch.equal(backbone.latents(images), backbone.latents(images))


def test_process_is_that_of_the_scheduler(stored: Any, backbones: Any) -> None:
    assert isinstance(backbones["sd3"].process, Flow)
    for kind, prediction in (("sd", "epsilon"), ("sdxl", "v")):
        process, scheduler = backbones[kind].process, stored[kind][0].scheduler
        assert isinstance(process, Epsilon)
        assert process.prediction == prediction
        assert torch.equal(process.alphas_cumprod, scheduler.alphas_cumprod)


def test_denoiser_is_called_as_in_the_pipeline(stored: Any, backbones: Any, kind: str) -> None:
    pipeline, backbone = stored[kind][0], backbones[kind]
    noisy, time, text = torch.randn(4, 4, 8, 8), torch.tensor([3.0, 200.0, 500.0, 999.0]), encoded_text(pipeline)
    with torch.no_grad():
        found = backbone.process.predict(backbone.denoiser, noisy, time, backbone.condition(CAPTIONS))
        if kind == "sd3":
            expected = pipeline.transformer(hidden_states=noisy, timestep=time, **text).sample
        else:
            hidden = text.pop("encoder_hidden_states")
            expected = pipeline.unet(noisy, time, hidden, added_cond_kwargs=text).sample
    assert torch.equal(found, expected)


def test_backbone_is_frozen_and_stays_in_eval_mode(backbones: Any, kind: str) -> None:
    backbone = backbones[kind].train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(value.requires_grad for value in backbone.condition(["a cat"]).values())


def test_tokens_of_open_clip_are_read_as_captions(backbones: Any, kind: str) -> None:
    """open_clip fills up with zeros; T5 gets the text without capitals."""
    backbone = backbones[kind]
    tokenizer = backbone.prompts.tokenizers[0]
    captions = ["a cat", "the dog", "the dog sat on a mat in the sun"]
    tokens = torch.zeros(3, 20, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids = tokenizer(caption).input_ids
        tokens[row, : len(ids)] = torch.tensor(ids[:20])
    tokens[2, 19] = tokenizer.eos_token_id
    found = backbone.condition(tokens)
    whole = backbone.condition(captions)
    for name, value in whole.items():
        assert torch.equal(found[name][:2], value[:2]), name
    clip = tiny.LENGTH
    assert torch.equal(found["encoder_hidden_states"][2, :clip], whole["encoder_hidden_states"][2, :clip])
    assert same(backbone.condition(tokens[:2, :8]), {name: value[:2] for name, value in whole.items()})
    for bad in (tokens[:, 1:], tokens[0], torch.zeros(1, 4, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"tokens .* of CLIP's vocabulary, from 81 to 82"):
            backbone.condition(bad)


def test_stable_diffusion_3_without_t5(stored: Any, backbones: Any, tmp_path: Path) -> None:
    """Not stored, or left out: zeros in its place, as in the pipeline."""
    pipeline = tiny.stable_diffusion_3(tmp_path / "sd3", tmp_path / "tokens", t5=False)
    without = load_backbone(f"diffusers/{tmp_path}/sd3", **T5)
    assert same(without.condition(CAPTIONS), encoded_text(pipeline))
    left_out = load_backbone(f"diffusers/{stored['sd3'][1]}", t5=False, **T5)
    assert without.identity["options"] == left_out.identity["options"]
    hidden = left_out.condition(CAPTIONS)["encoder_hidden_states"]
    clip = backbones["sd3"].condition(CAPTIONS)["encoder_hidden_states"][:, : tiny.LENGTH]
    assert torch.equal(hidden[:, : tiny.LENGTH], clip)
    assert not hidden[:, tiny.LENGTH :].any()
    assert hidden.shape[1] == tiny.LENGTH + tiny.T5_LENGTH


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(stored: Any, backbones: Any, dtype: torch.dtype) -> None:
    """The VAE of XL stays in float32 where float16 overflows; autocast changes nothing."""
    backbone = load_backbone(f"diffusers/{stored['sdxl'][1]}", torch_dtype=str(dtype).removeprefix("torch."))
    kinds = {part: next(getattr(backbone, part).parameters()).dtype for part in ("denoiser", "prompts", "vae")}
    assert kinds == {"denoiser": dtype, "prompts": dtype, "vae": torch.float32 if dtype == torch.float16 else dtype}
    found, whole = backbone.condition(CAPTIONS), backbones["sdxl"].condition(CAPTIONS)
    torch.testing.assert_close(
        found["encoder_hidden_states"].float(), whole["encoder_hidden_states"], atol=0.1, rtol=0.1
    )
    images = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(backbone.condition(CAPTIONS), found)
        assert torch.equal(backbone.posterior(images)[0], backbone.posterior(images)[0])
        assert same(backbones["sdxl"].condition(CAPTIONS), whole)
    assert backbone.latents(images).dtype == torch.float32


def test_denoiser_alone(stored: Any, backbones: Any, tmp_path: Path) -> None:
    """From a folder that has nothing else, and with the revision of the encoders where they are beside it."""
    alone = shutil.copytree(stored["sd"][1], tmp_path / "alone")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(alone / part)
    backbone = load_backbone(f"diffusers/{alone}", denoiser_only=True)
    assert {name.partition(".")[0] for name, _ in backbone.named_parameters()} == {"denoiser"}
    for call in (lambda: backbone.condition(["a"]), lambda: backbone.latents(torch.zeros(1, 3, 8, 8))):
        with pytest.raises(InputError, match="was loaded with denoiser_only"):
            call()
    with pytest.raises(InputError, match="has no folder 'text_encoder', which is needed to tell its encoders"):
        _ = backbone.revision
    beside = load_backbone(f"diffusers/{stored['sd'][1]}", denoiser_only=True, gradient_checkpointing=True)
    assert beside.denoiser.is_gradient_checkpointing
    assert not backbone.denoiser.is_gradient_checkpointing
    assert beside.revision == backbones["sd"].revision
    assert beside.revision.startswith("sha256:")
    assert beside.revision != backbones["sdxl"].revision


def test_soft_tokens_train_and_go_onto_the_pipeline(stored: Any, kind: str, tmp_path: Path) -> None:
    pipeline, folder = stored[kind]
    torch.manual_seed(0)
    model = zoo.SoftREPA(
        f"diffusers/{folder}", backbone_options=T5, tokens=2, blocks=None if kind != "sd3" else [0], temperature=1.0,
        start="bos" if kind == "sd" else "normal", init_std=0.5,
    )  # fmt: skip
    model.log_dict = lambda *_, **__: None
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with model.attach(model.backbone.network.denoiser):
        model.training_step({"image": images, "text": CAPTIONS[:2]}, 0).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.bank.parameters())
    assert float(model.bank.base.grad.norm()) > 0
    model.save_pretrained(tmp_path)
    loaded = zoo.SoftREPA.from_pretrained(tmp_path)

    def drawn() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(CAPTIONS[0], num_inference_steps=2, output_type="latent", generator=generator).images

    pipeline.set_progress_bar_config(disable=True)
    plain = drawn()
    with loaded.attach(pipeline):
        assert not torch.allclose(drawn(), plain)
    assert torch.equal(drawn(), plain)


def test_images_in_other_units_or_shapes(backbones: Any) -> None:
    backbone = backbones["sd"]
    with pytest.raises(
        InputError, match=r"in \[-1, 1\], and the largest value is 2.6: give the data module mean and std"
    ):
        backbone.latents(torch.full((1, 3, 8, 8), 2.6))
    for shape in ((1, 1, 8, 8), (1, 3, 7, 8), (3, 8, 8)):
        with pytest.raises(InputError, match=r"must have shape \(B, 3, H, W\) with sides that are multiples of 2"):
            backbone.latents(torch.zeros(shape))


def test_cached_conditions_are_those_of_the_backbone(backbones: Any, stored: Any, kind: str, tmp_path: Path) -> None:
    """Whatever the type of the weights, the encoders are the same ones."""
    backbone = backbones[kind]
    cache = cache_latents(backbone, pairs(), tmp_path, progress=False, shard_size=4)["train"]
    data = LatentCaptionsDataModule(str(tmp_path / "train"), batch_size=7)
    batch = next(iter(data.train_eval_dataloader()))
    found = backbone.condition([texts[0].strip() for texts in TEXTS])
    assert batch.keys() == {"latents", "id", "caption_id", *found}
    for name, value in found.items():
        half = value if name == "time_ids" or value[0].numel() <= 64 else value.half()
        # Another size of the batch may round otherwise.
        torch.testing.assert_close(batch[name], half.float(), atol=2e-3, rtol=2e-3)
    mean, _ = backbone.posterior(torch.stack([image for image, _ in pairs()]))
    torch.testing.assert_close(batch["latents"], mean, atol=2e-3, rtol=2e-3)
    data.check_backbone(backbone)
    data.check_backbone(load_backbone(f"diffusers/{stored[kind][1]}", denoiser_only=True))
    data.check_backbone(load_backbone(f"diffusers/{stored[kind][1]}", torch_dtype="bfloat16", **T5))
    with torch.no_grad():
        told = {name: batch[name] for name in found}
        assert backbone.process.predict(backbone.denoiser, batch["latents"], 500.0, told).shape == mean.shape
    if kind == "sd3":
        numbers = sum(rows * width for rows, width in cache.index.fields["encoder_hidden_states"].blocks)
        assert numbers == tiny.LENGTH * (16 + 24) + tiny.T5_LENGTH * 64
        other = load_backbone(f"diffusers/{stored[kind][1]}")
        with pytest.raises(InputError, match=r"max_sequence_length=14, t5=True\), and the backbone is .*=256"):
            data.check_backbone(other)


def test_cache_without_t5_holds_no_zeros(stored: Any, tmp_path: Path) -> None:
    backbone = load_backbone(f"diffusers/{stored['sd3'][1]}", t5=False)
    cache = cache_latents(backbone, pairs()[:1], tmp_path, progress=False)["train"]
    assert cache.bytes_per_caption < 2 * tiny.LENGTH * (16 + 24) + 4 * 20 + 400
    hidden = cache.condition(np.array([2, 0]))["encoder_hidden_states"]
    whole = backbone.condition(["the cat", "a cat"])["encoder_hidden_states"]
    torch.testing.assert_close(hidden, whole, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("file", "entry", "match"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipelin"}, "Did you mean StableDiffusionPipeline?"),
        ("model_index.json", {"_class_name": ["x"]}, "is a .*, which is not supported"),
        ("model_index.json", {"unet": ["my_code", "UNet2DConditionModel"]}, "unet is a my_code.UNet2DConditionModel"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "only AutoencoderKL is loaded: a repository"),
        ("model_index.json", {"text_encoder": [None, None]}, "names no text_encoder, which StableDiffusionPipeline has"),
        ("model_index.json", {"scheduler": None}, "needs the scheduler of its training, got None"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "the key 'auto_map', which chooses code"),
        ("text_encoder/config.json", {"_attn_implementation": "evil/kernel"}, "_attn_implementation', which chooses code"),
        ("unet/config.json", {"quantization_config": {"quant_method": "x"}}, "'quantization_config', which chooses code"),
        ("unet/config.json", {"block_out_channels": [8, 10**9]}, "block_out_channels = 1000000000, more than"),
        ("unet/config.json", {"block_out_channels": [8, 24]}, "unet cannot be loaded: "),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": "evil.Evil"}}, "tokenizer has the key 'auto_map"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean or latents_std is not supported"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "must have 1000 steps, got 500"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type must be epsilon or v_pred"),
    ],
)  # fmt: skip
def test_bad_configuration(stored: Any, tmp_path: Path, file: str, entry: dict[str, Any], match: str) -> None:
    name = edited(stored["sd"][1], tmp_path / "copy", file, lambda content: content.update(entry))
    with pytest.raises(InputError, match=match):
        load_backbone(name)


def test_bad_scheduler_of_stable_diffusion_3(stored: Any, tmp_path: Path) -> None:
    entry = {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    name = edited(stored["sd3"][1], tmp_path / "copy", "model_index.json", lambda content: content.update(entry))
    with pytest.raises(InputError, match="needs the scheduler FlowMatchEulerDiscreteScheduler, got"):
        load_backbone(name)


def test_bad_weights(stored: Any, tmp_path: Path) -> None:
    """Pickles are not read, nothing stays random, and damaged files are said to be."""
    folder = shutil.copytree(stored["sd"][1], tmp_path / "copy")
    weights = folder / "text_encoder/model.safetensors"
    tensors = load_file(weights)
    missing = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    save_file({name: value for name, value in tensors.items() if name != missing}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"the weights of text_encoder lack .*final_layer_norm.weight"):
        load_backbone(f"diffusers/{folder}")
    weights.write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="text_encoder cannot be loaded"):
        load_backbone(f"diffusers/{folder}")
    weights.unlink()
    torch.save(tensors, folder / "text_encoder/pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"text_encoder has no .safetensors file, and pickled weights .* could run code"
    ):
        load_backbone(f"diffusers/{folder}")
    (folder / "unet/config.json").write_text("{")
    with pytest.raises(InputError, match=r"unet/config.json is no JSON"):
        load_backbone(f"diffusers/{folder}")
    (folder / "unet/config.json").unlink()
    with pytest.raises(InputError, match=r"unet/config.json cannot be read: No such file"):
        load_backbone(f"diffusers/{folder}")


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("sd15", {}, r"named diffusers/OWNER/REPO@revision or diffusers/./folder, got 'sd15'"),
        ("diffusers/", {}, "a pipeline is named diffusers/OWNER/REPO@revision"),
        ("diffusers/sd15", {}, "'sd15' is no OWNER/REPO of the Hub; a folder's path begins with"),
        ("diffusers/a/..", {}, "is no OWNER/REPO of the Hub"),
        ("diffusers/./nowhere", {}, "there is no pipeline in ./nowhere, it would have a file model_index.json"),
        ("diffusers/./x", {"image_size": 0}, "image_size must be at least 1, got 0"),
        ("diffusers/./x", {"max_sequence_length": 513}, "max_sequence_length must be in 1 … 512, got 513"),
    ],
)
def test_bad_names_and_options(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_backbone(name, **options)


def test_bad_dtype(stored: Any) -> None:
    with pytest.raises(
        InputError, match=r"torch_dtype must be one of float32, bfloat16, float16, got .bfloat.. Did you"
    ):
        load_backbone(f"diffusers/{stored['sd'][1]}", torch_dtype="bfloat")


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_bad_installation(stored: Any, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def without(name: str) -> Any:
        if name == missing:
            raise ModuleNotFoundError(name=missing)
        return importlib.import_module(name)

    monkeypatch.setattr(diffusers_parts, "import_module", without)
    with pytest.raises(
        InputError, match=rf"the package {missing} is needed .* pip install 'lightning-zoo\[diffusion\]'"
    ):
        load_backbone(f"diffusers/{stored['sd'][1]}")


def _find(place: str) -> dict[str, list[Any]]:
    """In a fresh process: what is downloaded for the denoiser alone, then for all of it."""
    from huggingface_hub import HfApi

    from zoo.diffusers_parts import find_pipeline

    api = HfApi()
    api.create_repo("me/tiny-sd")
    first = api.upload_folder(repo_id="me/tiny-sd", folder_path=place).oid
    api.upload_file(path_or_fileobj=b"pickle", path_in_repo="unet/diffusion_pytorch_model.bin", repo_id="me/tiny-sd")
    found = {}
    for name, denoiser_only in ((f"diffusers/me/tiny-sd@{first}", True), ("diffusers/me/tiny-sd", False)):
        folder = find_pipeline(name, denoiser_only=denoiser_only)
        files = sorted(str(path.relative_to(folder.folder)) for path in folder.folder.rglob("*") if path.is_file())
        found[name.partition("@")[0] + f" {denoiser_only}"] = [folder.name, folder.revision == first, files]
    try:
        find_pipeline("diffusers/me/tiny-sd@nothing")
    except ValueError as error:
        found["unknown"] = [str(error)]
    return found


def test_repository_is_pinned_and_only_what_is_needed_is_fetched(hub: HubServer, stored: Any, tmp_path: Path) -> None:
    place = shutil.copytree(stored["sd"][1], tmp_path / "sd")
    for extra in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors"):
        (place / "unet" / extra).write_bytes(b"another variant")
    (place / "vae/code.py").write_text("raise SystemExit")
    found = call_python(_find, str(place), server=hub)
    shared = ["model_index.json", "scheduler/scheduler_config.json"]
    denoiser = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    name, pinned, files = found["diffusers/me/tiny-sd True"]
    assert (name, pinned, files) == ("diffusers/me/tiny-sd", True, [*shared, *denoiser])
    name, pinned, files = found["diffusers/me/tiny-sd False"]
    assert (name, pinned) == ("diffusers/me/tiny-sd", False)
    encoders = ["text_encoder/config.json", "text_encoder/model.safetensors"]
    encoders += ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
    vae = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert files == [*shared, *encoders, *denoiser, *vae]
    assert found["unknown"] == ["me/tiny-sd has no revision 'nothing'"]


def test_local_pipeline_is_found_without_its_libraries(stored: Any) -> None:
    found = find_pipeline(f"diffusers/{stored['sd3'][1]}")
    assert (found.pipeline, found.commit) == ("StableDiffusion3Pipeline", None)
