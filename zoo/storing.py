"""Writing the stored format: a snapshot of a model, taken at one moment and written at one stroke."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from safetensors.torch import save_file
from torch import Tensor

from zoo import golden, plain_weights, publish, storage, transport
from zoo.arguments import Supplied, decode, encode
from zoo.construction import construct
from zoo.errors import InputError
from zoo.registry import component_name
from zoo.stored_config import FORMAT, dump_config
from zoo.stored_tensors import compare_shapes, is_finite, stored_tensors
from zoo.towers import fingerprint

if TYPE_CHECKING:
    from zoo.module import ZooModule

__all__ = ["Snapshot", "push", "save", "snapshot", "tower_facts"]

_PACKAGES = ("lightning-zoo", "torch", "lightning", "timm", "torchvision")


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment, ready to be written; it shares no memory with the model unless it was taken so.

    Attributes:
        config: the configuration without the hash of the weights.
        tensors: the tensors to store, on the CPU.
        recipe: the LightningCLI configuration of the run as YAML text.
        figures: what the component and the callbacks have drawn for the card, as `zoo.run_facts.figures` returns it.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    recipe: str | None = None
    figures: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Store it in a folder, at one stroke, with a model card; needs neither the model nor the main thread.

        Args:
            folder: the folder, created if needed; files that are not part of the format stay.

        Returns:
            The folder.

        Raises:
            InputError: the arguments are too large; what was stored before is untouched.
        """
        digest = fingerprint(self.tensors)
        text = dump_config({**self.config, "weights": {"sha256": digest}})

        def fill(staging: Path) -> None:
            (staging / "config.json").write_text(text, encoding="utf-8")
            # One key: safetensors writes several in a random order, and equal models must be equal files.
            save_file(self.tensors, staging / "model.safetensors", metadata={"sha256": digest})
            # safetensors lets the owner alone read it; the umask decides, as for any other file.
            shutil.copymode(staging / "config.json", staging / "model.safetensors")
            if self.recipe is not None:
                (staging / "recipe.yaml").write_text(self.recipe, encoding="utf-8")
            for name, png in self.figures.items():
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_bytes(png)
            publish.write_card(staging, existing=publish.read_text(folder, "README.md"))

        storage.write(folder, fill)
        return folder


def snapshot(
    model: pl.LightningModule,
    *,
    recipe: str | None = None,
    run: dict[str, Any] | None = None,
    figures: Mapping[str, bytes] | None = None,
    copy: bool = True,
) -> Snapshot:
    """Take what is to be stored of a model.

    Args:
        model: a `ZooModule`, or any LightningModule, of which the plain weights and the JSON hyper-parameters are taken.
        recipe: the LightningCLI configuration of the run as YAML text.
        run: facts of the run for the card; see `run_facts`.
        figures: figures for the card by file, as `zoo.run_facts.figures` returns them; those that the model carries if
            omitted.
        copy: copy the tensors, so that training can go on before they are written.

    Raises:
        InputError: an argument has no JSON form or not the annotated type, a tensor is not finite, the arguments do not
            build this model (a layer was exchanged), or the class is not registered.
    """
    from zoo.module import ZooModule

    if isinstance(model, ZooModule):
        config, tensors = _take_component(model)
    else:
        config, tensors = plain_weights.take(model)
        _require_finite(tensors)
    config = {"zoo_format": FORMAT, "versions": _versions(), **config, "run": run if run is not None else config["run"]}
    if copy:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if figures is None:
        figures = model.run_figures if isinstance(model, ZooModule) else {}
    return Snapshot(config, tensors, recipe, figures)


def _take_component(model: ZooModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    args = {name: encode(name, v) for name, v in model._arguments.items() if not isinstance(v, Supplied)}
    supplied = {name: v.type_name for name, v in model._arguments.items() if isinstance(v, Supplied)}
    config = {"component": component_name(type(model)), "args": args, "supplied": supplied}
    tensors = stored_tensors(model)
    _require_finite(tensors)
    # What was proven once for these arguments and shapes need not be built again at every version of a run.
    proven = json.dumps([args, supplied, {name: list(tensor.shape) for name, tensor in tensors.items()}])
    if model.__dict__.get("_proven_loadable") != proven:
        _require_loadable(type(model), args, supplied, tensors)
        model.__dict__["_proven_loadable"] = proven
    return {**config, "omitted": tower_facts(model), "golden": golden.record(model), "run": model.run_facts}, tensors


def _require_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(f"{name} holds non-finite values: the model is not stored, and what was stored stays")


def save(
    model: pl.LightningModule, folder: Path, *, recipe: str | None = None, run: dict[str, Any] | None = None
) -> Path:
    """Store a model in a folder, at one stroke.

    Args:
        model: the model; its mode, its gradients and the random generators are as before afterwards.
        folder: the folder, created if needed; files that are not part of the format stay.
        recipe: the LightningCLI configuration of the run as YAML text.
        run: facts of the run for the card; those that the model was loaded with if omitted.

    Returns:
        The folder.

    Raises:
        InputError: see `snapshot` and `Snapshot.write`; what was stored before is untouched.
    """
    return snapshot(model, recipe=recipe, run=run, copy=False).write(folder)


def push(
    model_or_folder: pl.LightningModule | str | Path, repo_id: str, *, recipe: str | None = None, **options: Any
) -> transport.Push:
    """Send a model, or a stored model's folder, to the Hub.

    Args:
        model_or_folder: the model, or the folder of a stored one.
        repo_id: ``owner/name``; it is created if needed.
        recipe: see `save`; for a model only.
        **options: see `zoo.publish.push_folder`.

    Returns:
        What was sent.

    Raises:
        InputError: the model cannot be stored, holds what looks like a secret, or the Hub refuses.
    """
    if isinstance(model_or_folder, str | Path):
        return publish.push_folder(Path(model_or_folder), repo_id, **options)
    with tempfile.TemporaryDirectory(prefix="zoo-store-") as folder:
        save(model_or_folder, Path(folder), recipe=recipe)
        return publish.push_folder(Path(folder), repo_id, **options)


def tower_facts(model: ZooModule) -> dict[str, dict[str, Any]]:
    """Return name, revision and fingerprint of each frozen tower that is not stored with the model.

    Of a tower that only training needs and that was not built at load, this is what the stored configuration said.
    """
    attached = {
        attribute: {
            "name": tower.name,
            "revision": tower.revision,
            "sha256": tower.fingerprint,
            "training_only": attribute in model.training_only,
        }
        for attribute, tower in model.frozen_towers.items()
    }
    return {**model._unbuilt_towers, **attached}


def _require_loadable(
    cls: type[ZooModule], args: dict[str, Any], supplied: dict[str, str], tensors: dict[str, Tensor]
) -> None:
    """Refuse to store what could not be loaded, while the model is still in memory."""
    arguments = decode(cls, args)
    for name in cls.training_only:
        if name in args or name in supplied:
            arguments[name] = None
    if supplied.keys() - cls.training_only:
        return  # the network that will be supplied is not known
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    compare_shapes(construct(cls, arguments, meta=True), shapes, "the model to be stored")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
