"""The parts of a Stable Diffusion pipeline in the layout of diffusers: found, checked and loaded one by one.

A folder (or a repository of the Hub) holds ``model_index.json`` and a folder for each part. Of that file only the name of
the pipeline and the names of the parts' classes are read, and both must be among those below: nothing in a repository
chooses code. Weights are read from safetensors files and from nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.errors import InputError, nearest, require_choice
from zoo.named_networks import BUILD_ERRORS, reason

__all__ = ["FAMILIES", "Family", "PipelineFolder", "find_pipeline", "library"]

_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_TEXT_BYTES = 1 << 20
# No width, length or number of layers of these networks is larger; memory for more is asked for before shapes are compared.
_MAX_NUMBER = 1 << 20
# Keys by which a configuration would choose code: remote classes, kernels of the Hub, libraries of quantisation.
_CODE_KEYS = frozenset(
    {
        "_attn_implementation", "_attn_implementation_internal", "attn_implementation", "auto_map",
        "experts_implementation", "quantization_config",
    }
)  # fmt: skip
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Family:
    """What a pipeline consists of.

    Attributes:
        denoiser: name of the part that denoises.
        parts: classes that each part with weights or tokens may have; the first is the one that is loaded.
        encoders: names of the text encoders, in the order in which their outputs are joined; a tokenizer has the name of
            its encoder with "tokenizer" in place of "text_encoder".
        optional: encoders that may be missing.
        scheduler: class of the scheduler; None takes any that has a table of noise levels.
    """

    denoiser: str
    parts: Mapping[str, tuple[str, ...]]
    encoders: tuple[str, ...]
    optional: tuple[str, ...] = ()
    scheduler: str | None = None


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        denoiser="unet",
        parts={
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL",),
            "text_encoder": ("CLIPTextModel",),
            "tokenizer": _CLIP_TOKENIZERS,
        },
        encoders=("text_encoder",),
    ),
    "StableDiffusionXLPipeline": Family(
        denoiser="unet",
        parts={
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL",),
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "tokenizer": _CLIP_TOKENIZERS,
            "tokenizer_2": _CLIP_TOKENIZERS,
        },
        encoders=("text_encoder", "text_encoder_2"),
    ),
    "StableDiffusion3Pipeline": Family(
        denoiser="transformer",
        parts={
            "transformer": ("SD3Transformer2DModel",),
            "vae": ("AutoencoderKL",),
            "text_encoder": ("CLIPTextModelWithProjection",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "text_encoder_3": ("T5EncoderModel",),
            "tokenizer": _CLIP_TOKENIZERS,
            "tokenizer_2": _CLIP_TOKENIZERS,
            "tokenizer_3": _T5_TOKENIZERS,
        },
        encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        optional=("text_encoder_3",),
        scheduler="FlowMatchEulerDiscreteScheduler",
    ),
}
"""The pipelines that can be loaded, by the name of their class."""


def library(name: str) -> Any:
    """Import diffusers or transformers.

    Args:
        name: the module.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"the package {error.name} is needed for diffusion pipelines: pip install 'lightning-zoo[diffusion]'"
        ) from error


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline on the disk.

    Attributes:
        name: what it was asked for by, without the revision.
        folder: where it lies.
        commit: hash of the commit, None for a local folder.
        index: the content of model_index.json.
        pipeline: name of the pipeline's class, a key of `FAMILIES`.
    """

    name: str
    folder: Path
    commit: str | None
    index: dict[str, Any]
    pipeline: str

    @property
    def family(self) -> Family:
        """What the pipeline consists of."""
        return FAMILIES[self.pipeline]

    @cached_property
    def revision(self) -> str:
        """What the encoders are: the commit, or ``sha256:`` of all files of VAE, text encoders and tokenizers.

        Raises:
            InputError: a local folder lacks one of those parts.
        """
        return self.commit if self.commit is not None else f"sha256:{self._digest()}"

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for part in sorted(self.family.parts.keys() - {self.family.denoiser}):
            if not self.has(part):
                continue
            if not (self.folder / part).is_dir():
                raise InputError(
                    f"{self.name} has no folder {part!r}, which is needed to tell its encoders from others"
                )
            for path in sorted((self.folder / part).iterdir()):
                with path.open("rb") as file:
                    digest.update(f"{part}/{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
        return digest.hexdigest()

    def has(self, part: str) -> bool:
        """Whether model_index.json names a class for a part.

        Args:
            part: its name.
        """
        entry = self.index.get(part)
        return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)

    def check(self) -> None:
        """Refuse a pipeline whose parts are not of the classes that the zoo loads.

        Raises:
            InputError: a part is missing, or of another class.
        """
        for part, classes in self.family.parts.items():
            if not self.has(part):
                if part.replace("tokenizer", "text_encoder") in self.family.optional:
                    continue
                raise InputError(f"{self.name}: model_index.json names no {part}, which {self.pipeline} has")
            module, cls = self.index[part]
            if module not in ("diffusers", "transformers") or cls not in classes:
                raise InputError(
                    f"{self.name}: {part} is a {module}.{cls}, and only {' or '.join(classes)} is loaded: a repository may "
                    "not choose code"
                )
        scheduler = self.index.get("scheduler")
        asked = self.family.scheduler
        if not isinstance(scheduler, list) or (asked is not None and scheduler[1:] != [asked]):
            raise InputError(
                f"{self.name}: {self.pipeline} needs the scheduler {asked or 'of its training'}, got {scheduler}"
            )

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """Read the configuration of a part.

        Args:
            part: its name.
            file: name of the file.

        Raises:
            InputError: it is missing, no JSON, or chooses code.
        """
        config = _read_json(self.folder / part / file, self.name)
        for key, value in _items(config):
            if key in _CODE_KEYS:
                raise InputError(f"{self.name}: {part}/{file} has the key {key!r}, which chooses code: refused")
            if isinstance(value, int) and abs(value) > _MAX_NUMBER:
                raise InputError(f"{self.name}: {part}/{file} has {key} = {value}, more than {_MAX_NUMBER}: refused")
        return config

    def load(self, part: str, dtype: str) -> nn.Module:
        """Load a part with weights: frozen, in eval mode.

        Args:
            part: its name.
            dtype: "float32", "bfloat16" or "float16".

        Raises:
            InputError: it has no safetensors files, or they do not fit.
        """
        require_choice("torch_dtype", dtype, _DTYPES)
        self.config(part)
        if not any((self.folder / part).glob("*.safetensors")):
            raise InputError(
                f"{self.name}: {part} has no .safetensors file, and pickled weights (.bin, .ckpt) could run code: store it "
                "with save_pretrained(…, safe_serialization=True), or choose a repository that has them"
            )
        module = "diffusers" if part in (self.family.denoiser, "vae") else "transformers"
        cls = getattr(library(module), self.family.parts[part][0])
        options: dict[str, Any] = {_dtype_argument(module): _DTYPES[dtype]}
        if module == "diffusers":  # its own default asks for accelerate, in a warning
            options["low_cpu_mem_usage"] = library("diffusers.utils").is_accelerate_available()
        network, info = self._from_pretrained(part, cls, options)
        if info["missing_keys"]:
            raise InputError(f"{self.name}: the weights of {part} lack {sorted(info['missing_keys'])[:4]}")
        network.requires_grad_(requires_grad=False)
        return network.eval()

    def _from_pretrained(self, part: str, cls: Any, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        from safetensors import SafetensorError

        try:
            found: tuple[nn.Module, dict[str, Any]] = cls.from_pretrained(
                self.folder / part, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
        except (*BUILD_ERRORS, OSError, SafetensorError) as error:
            raise InputError(f"{self.name}: {part} cannot be loaded: {reason(error)}") from error
        return found

    def tokenizer(self, part: str) -> Any:
        """Load a tokenizer.

        Args:
            part: its name.

        Raises:
            InputError: its files are missing or damaged.
        """
        if (self.folder / part / "tokenizer_config.json").is_file():
            self._check_tokenizer(part)
        transformers = library("transformers")
        try:
            return getattr(transformers, self.family.parts[part][0]).from_pretrained(
                self.folder / part, local_files_only=True
            )
        except (*BUILD_ERRORS, OSError, ImportError) as error:
            raise InputError(f"{self.name}: {part} cannot be loaded: {reason(error)}") from error

    def _check_tokenizer(self, part: str) -> None:
        config = _read_json(self.folder / part / "tokenizer_config.json", self.name)
        if "auto_map" in config:
            raise InputError(f"{self.name}: {part} has the key 'auto_map', which chooses code: refused")


def _dtype_argument(module: str) -> str:
    """Name of the argument for the type of the weights: transformers renamed it in 4.56, diffusers did not."""
    if module == "diffusers":
        return "torch_dtype"
    numbers = library("transformers").__version__.split(".")[:2]
    return "dtype" if tuple(int(number) for number in numbers) >= (4, 56) else "torch_dtype"


def find_pipeline(name: str, *, denoiser_only: bool = False) -> PipelineFolder:
    """Find a pipeline by name, downloading what is needed of it.

    Args:
        name: ``diffusers/OWNER/REPO``, ``diffusers/OWNER/REPO@revision``, or ``diffusers/`` in front of the path of a
            folder, which begins with . or / or ~.
        denoiser_only: only the denoiser is needed.

    Raises:
        InputError: no such folder or repository, or a pipeline that the zoo does not load (the nearest is shown).
    """
    family, _, place = name.partition("/")
    if family != "diffusers" or not place:
        raise InputError(f"a pipeline is named diffusers/OWNER/REPO@revision or diffusers/./folder, got {name!r}")
    if place.startswith((".", "/", "~")):
        folder = Path(place).expanduser()
        if not (folder / "model_index.json").is_file():
            raise InputError(f"{name!r}: there is no pipeline in {place}, it would have a file model_index.json")
        return _opened(name, folder, None)
    repository, _, revision = place.partition("@")
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise InputError(f"{name!r}: {repository!r} is no OWNER/REPO of the Hub; a folder's path begins with . or /")
    first = _download(repository, revision or None, ["model_index.json"])
    found = _opened(f"diffusers/{repository}", first, first.name)
    parts = [found.family.denoiser] if denoiser_only else [part for part in found.family.parts if found.has(part)]
    folder = _download(repository, first.name, [*_patterns(parts), "scheduler/*.json"])
    return PipelineFolder(found.name, folder, folder.name, found.index, found.pipeline)


def _patterns(parts: list[str]) -> list[str]:
    """Files of a part, without other variants such as ``model.fp16.safetensors`` and without pickles."""
    names = ["*.json", "*.txt", "*.model"]
    for stem in ("model", "diffusion_pytorch_model"):
        names += [f"{stem}.safetensors", f"{stem}-*.safetensors"]
    return [f"{part}/{name}" for part in parts for name in names]


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    from zoo.hub_client import Source, limit_silence, readable_errors

    with readable_errors(Source(repository, revision)):
        limit_silence()
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def _opened(name: str, folder: Path, commit: str | None) -> PipelineFolder:
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{name} is no pipeline of diffusers: it has no model_index.json")
    index = _read_json(folder / "model_index.json", name)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(
            f"{name} is a {pipeline}, which is not supported.{nearest(str(pipeline), FAMILIES)} Known are {known}"
        )
    found = PipelineFolder(name, folder, commit, index, pipeline)
    found.check()
    return found


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_TEXT_BYTES + 1)
        content = json.loads(raw) if len(raw) <= _MAX_TEXT_BYTES else None
    except OSError as error:
        raise InputError(f"{name}: {path.parent.name}/{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: {path.parent.name}/{path.name} is no JSON") from error
    if not isinstance(content, dict):
        raise InputError(f"{name}: {path.parent.name}/{path.name} is no configuration")
    return content


def _items(config: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of a configuration, inner ones too; items of lists have the key of their list."""
    pairs = config.items() if isinstance(config, dict) else [("", value) for value in config]
    for key, value in pairs:
        if isinstance(value, dict | list):
            yield key, None
            yield from ((inner or key, found) for inner, found in _items(value))
        else:
            yield key, value
