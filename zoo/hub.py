"""The stored format: a folder with ``config.json``, ``model.safetensors`` and a recipe, written and read as data.

Nothing that is read chooses code or relaxes a check: the component and the towers are looked up by name in registries, keys
and types are checked against the constructor, shapes are compared with the file's header on the meta device before memory
is taken, values must be finite, and a seeded output must come out as it did when the model was stored.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from zoo import golden, plain_weights, publish, storage, transport
from zoo.arguments import Supplied, decode, encode, parameter_names
from zoo.errors import InputError, nearest
from zoo.named_networks import BUILD_ERRORS, reason
from zoo.registry import component_class, component_name
from zoo.stored_config import FORMAT, dump_config, read_config
from zoo.stored_tensors import (
    check_values,
    compare_shapes,
    fill_tensors,
    is_finite,
    open_tensors,
    require_memory,
    stored_tensors,
)
from zoo.towers import fingerprint, has_weights, without_weights

if TYPE_CHECKING:
    from zoo.module import ZooModule

__all__ = [
    "Snapshot",
    "check_towers",
    "from_pretrained",
    "load_network",
    "load_weights",
    "push",
    "read_config",
    "save",
    "snapshot",
    "tower_facts",
]

_PACKAGES = ("lightning-zoo", "torch", "lightning", "timm", "torchvision")
# Far above any network; a stored configuration may not ask for a depth whose modules alone fill the memory.
_MAX_MODULES = 1 << 16


# -- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment, ready to be written; it shares no memory with the model unless it was taken so.

    Attributes:
        config: the configuration without the hash of the weights.
        tensors: the tensors to store, on the CPU.
        recipe: the LightningCLI configuration of the run as YAML text.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    recipe: str | None = None

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
            publish.write_card(staging, existing=publish.read_text(folder, "README.md"))

        storage.write(folder, fill)
        return folder


def snapshot(
    model: pl.LightningModule, *, recipe: str | None = None, run: dict[str, Any] | None = None, copy: bool = True
) -> Snapshot:
    """Take what is to be stored of a model.

    Args:
        model: a `ZooModule`, or any LightningModule, of which the plain weights and the JSON hyper-parameters are taken.
        recipe: the LightningCLI configuration of the run as YAML text.
        run: facts of the run for the card; see `run_facts`.
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
    return Snapshot(config, tensors, recipe)


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


def check_towers(model: ZooModule, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the frozen towers of a model with recorded fingerprints.

    Args:
        model: a model with its towers.
        facts: what `tower_facts` returned when it was stored.

    Raises:
        InputError: a tower's weights differ.
    """
    for attribute, tower in model.frozen_towers.items():
        recorded = facts.get(attribute)
        if recorded is None or recorded["sha256"] == tower.fingerprint:
            continue
        remedy = f"pass {attribute}=… with the network that was used"
        if tower.name is not None and not has_weights(tower.name):
            remedy = (
                f"{tower.name!r} is a bare architecture with random weights, so it never comes out the same: {remedy}"
            )
        raise InputError(
            f"the {attribute} ({tower.name or 'a module'}) is not the one this model was trained with: its weights have "
            f"SHA-256 {tower.fingerprint[:12]}…, expected {recorded['sha256'][:12]}…; {remedy}"
        )


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
    compare_shapes(_build(cls, arguments, meta=True), shapes, "the model to be stored")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# -- reading -------------------------------------------------------------------------------------------------------


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    expected: type[ZooModule] | None = None,
    for_training: bool = False,
    map_location: str | torch.device = "cpu",
    strict: bool = True,
    verify: bool = True,
    **overrides: Any,
) -> ZooModule:
    """Load a stored model; its class is found by the component's name.

    Args:
        source: the folder of a stored model, a repository on the Hub (``owner/name``), or ``hf://owner/name@revision``. A
            folder by that name comes first.
        revision: branch, tag or commit on the Hub; the head of the default branch if omitted.
        token: a token, None for the one of the environment or the login, False for none.
        cache_dir: the cache of huggingface_hub, its own if omitted.
        local_files_only: use what is cached and ask nobody.
        expected: the class that it must be, or a base of it.
        for_training: build the parts that only training needs as well (a teacher, a projector), and compare the
            fingerprints of frozen towers.
        map_location: the device of the loaded model.
        strict: refuse missing and unexpected tensors; shapes, dtypes and finite values are checked in any case.
        verify: compare the output for a seeded input with the one at storing.
        **overrides: constructor arguments that replace the stored ones; a part that was a ready module when the model was
            stored is given here.

    Returns:
        The model in the stored dtype, in eval mode, or with ``for_training`` in training mode.

    Raises:
        InputError: the folder is no stored model, or anything in it is not what it must be; the message names it.
    """
    folder, commit = transport.resolve(
        source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    config = read_config(folder)
    cls = _expected_class(config, expected)
    arguments = _arguments(cls, config, overrides, for_training=for_training)
    weights = storage.locate(folder, "model.safetensors")
    if weights is None:
        raise InputError(f"{folder} has no model.safetensors: it is not a whole stored model")
    with open_tensors(weights) as file:
        if (file.metadata() or {}).get("sha256") != config["weights"]["sha256"]:
            raise InputError(
                f"{folder}: config.json and model.safetensors come from different saves; store or pull it anew"
            )
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    shell = _build(cls, arguments, meta=True)
    compare_shapes(shell, shapes, "model.safetensors", strict=strict)
    require_memory(shell)
    check_values(shell, weights)
    model = _build(cls, arguments, meta=False)
    fill_tensors(model, weights)
    unknown = model.frozen_towers.keys() - config["omitted"].keys() - overrides.keys()
    if unknown:
        raise InputError(f"{folder}: config.json records no fingerprint in omitted for {sorted(unknown)}")
    check_towers(model, config["omitted"])
    if not for_training:
        _remember_unbuilt(model, config)
    if config["golden"] is not None:
        model.example_shape = tuple(config["golden"]["input_shape"][1:])
        if verify and not (overrides.keys() - set(cls.training_only)) & config["args"].keys():
            golden.compare(model, config["golden"], str(folder))
    model.hub_folder = folder
    model.hub_commit = commit
    model.run_facts = config["run"]
    return model.to(map_location).train(for_training)


def load_weights(source: str | Path, module: nn.Module, *, strict: bool = True, **options: Any) -> nn.Module:
    """Put stored weights into a module that is built already; no class is looked up.

    Args:
        source: see `from_pretrained`.
        module: the module: the one whose weights were stored.
        strict: refuse missing and unexpected tensors; shapes, dtypes and finite values are checked in any case.
        **options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``; see `from_pretrained`.

    Returns:
        The module, in the mode that it had.

    Raises:
        InputError: the weights do not fit; the module is as before then.
    """
    folder, _ = transport.resolve(source, **options)
    config = read_config(folder)
    weights = storage.locate(folder, "model.safetensors")
    if weights is None:
        raise InputError(f"{folder} has no model.safetensors: it is not a whole stored model")
    with open_tensors(weights) as file:
        if (file.metadata() or {}).get("sha256") != config["weights"]["sha256"]:
            raise InputError(
                f"{folder}: config.json and model.safetensors come from different saves; store or pull it anew"
            )
        plain_weights.put(module, file, strict=strict)
    return module


def load_network(name: str, *, weights: bool = True) -> nn.Module:
    """Return the deployable network of a stored model, for `zoo.towers`.

    Args:
        name: the path of its folder.
        weights: load its weights; otherwise the architecture with random ones.
    """
    if weights:
        return from_pretrained(name).network
    config = read_config(transport.resolve(name)[0])
    cls = _expected_class(config, None)
    return _build(cls, _arguments(cls, config, {}, for_training=False), meta=False).network


def _expected_class(config: dict[str, Any], expected: type[ZooModule] | None) -> type[ZooModule]:
    from zoo.module import ZooModule

    if config["component"] is None:
        raise InputError(
            "the folder holds plain weights of another LightningModule: zoo.load_weights(source, module) takes them"
        )
    cls = component_class(config["component"])
    base = expected or ZooModule
    if not issubclass(cls, base):
        raise InputError(f"the stored model is a {config['component']}, expected a {base.__name__}")
    assert issubclass(cls, ZooModule)
    return cls


def _arguments(
    cls: type[ZooModule], config: dict[str, Any], overrides: dict[str, Any], *, for_training: bool
) -> dict[str, Any]:
    _check_names(cls, config, overrides, for_training=for_training)
    arguments = decode(cls, config["args"]) | overrides
    for name, value in overrides.items():
        # The options of a network that was built by name are not those of the module that takes its place.
        if isinstance(value, nn.Module) and f"{name}_options" in config["args"] and f"{name}_options" not in overrides:
            arguments[f"{name}_options"] = None
    for name, type_name in config["supplied"].items():
        unneeded = name in cls.training_only and not for_training
        if name not in overrides and not unneeded:
            raise InputError(
                f"{name!r} was a ready module ({type_name}) when this model was stored: pass {name}=your_module"
            )
    if not for_training:
        for name in cls.training_only:
            if name in config["args"] or name in config["supplied"]:
                arguments[name] = None
    return arguments


def _check_names(
    cls: type[ZooModule], config: dict[str, Any], overrides: dict[str, Any], *, for_training: bool
) -> None:
    names = parameter_names(cls)
    for name in overrides:
        if name not in names:
            raise InputError(f"{cls.__name__} takes no argument {name!r}.{nearest(name, names)}")
        if name in cls.training_only and not for_training:
            raise InputError(f"{name}=… is used in training only: pass for_training=True as well, or leave it out")
    for name in config["supplied"]:
        if name not in names or name in config["args"]:
            raise InputError(f"supplied.{name}: {cls.__name__} takes no such module.{nearest(name, names)}")


def _remember_unbuilt(model: ZooModule, config: dict[str, Any]) -> None:
    """Keep what the configuration says of the parts that were not built, so that the model can be stored again."""
    for name in model.training_only:
        if name in config["args"]:
            model._arguments[name] = config["args"][name]
        if name in config["supplied"]:
            model._arguments[name] = Supplied(config["supplied"][name])
    model._unbuilt_towers.update({name: facts for name, facts in config["omitted"].items() if facts["training_only"]})


def _build(cls: type[ZooModule], arguments: dict[str, Any], *, meta: bool) -> ZooModule:
    """Construct without touching the global random state; on the meta device no memory is taken."""
    device = torch.device("meta") if meta else nullcontext()
    try:
        with isolate_rng(include_cuda=False), without_weights("all" if meta else "trained"), _bounded(), device:
            return cls(**arguments)
    except InputError:
        raise
    except BUILD_ERRORS as error:
        shown = {name: value for name, value in arguments.items() if not isinstance(value, nn.Module)}
        raise InputError(f"{cls.__name__} cannot be built from args {str(shown)[:500]}: {reason(error)}") from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop a construction that makes more modules than any network has."""
    count = 0

    def count_module(_module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise InputError(f"the arguments in config.json ask for more than {_MAX_MODULES} modules")

    handle = register_module_module_registration_hook(count_module)
    try:
        yield
    finally:
        handle.remove()
