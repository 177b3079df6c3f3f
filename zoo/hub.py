"""The stored format: a folder with ``config.json``, ``model.safetensors`` and a recipe, written and read as data.

Nothing that is read chooses code or relaxes a check: the component and the towers are looked up by name in registries, keys
and types are checked against the constructor, shapes are compared with the file's header on the meta device before memory
is taken, values must be finite, and a seeded output must come out as it did when the model was stored. This file reads;
`zoo.storing` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoo import golden, plain_weights, storage, transport
from zoo.arguments import Supplied, decode, parameter_names
from zoo.construction import construct
from zoo.errors import InputError, nearest
from zoo.registry import component_class
from zoo.stored_config import read_config
from zoo.stored_tensors import check_values, compare_shapes, fill_tensors, open_tensors, require_memory
from zoo.storing import Snapshot, push, save, snapshot, tower_facts
from zoo.towers import has_weights

if TYPE_CHECKING:
    from zoo.module import ZooModule

__all__ = [
    "Snapshot",
    "build_network",
    "check_towers",
    "describe_network",
    "from_pretrained",
    "load_network",
    "load_weights",
    "push",
    "read_config",
    "save",
    "snapshot",
    "tower_facts",
]


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
    weights = _locate_weights(folder, config)
    with open_tensors(weights) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    shell = construct(cls, arguments, meta=True)
    compare_shapes(shell, shapes, "model.safetensors", strict=strict)
    require_memory(shell)
    check_values(shell, weights)
    model = construct(cls, arguments, meta=False)
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
    with open_tensors(_locate_weights(folder, config)) as file:
        plain_weights.put(module, file, strict=strict)
    return module


def load_network(name: str) -> nn.Module:
    """Return the deployable network of a stored model with its weights, for `zoo.towers`.

    Args:
        name: the place of the stored model.
    """
    return from_pretrained(name).network


def describe_network(name: str) -> dict[str, Any]:
    """Return what builds the architecture of a stored model's network, so that another file can hold it.

    Args:
        name: the place of the stored model.

    Returns:
        JSON values: ``component`` and ``args`` as in its configuration, without what only training needs; ``source``, the
        last part of its place; ``sha256`` of its weights.

    Raises:
        InputError: it is no stored model, or a part of it was a ready module.
    """
    config = read_config(transport.resolve(name)[0])
    cls = _expected_class(config, None)
    needed = config["supplied"].keys() - set(cls.training_only)
    if needed:
        raise InputError(
            f"{name}: {sorted(needed)} were ready modules when it was stored; give the network as a module"
        )
    args = {key: None if key in cls.training_only else value for key, value in config["args"].items()}
    source = name.rstrip("/") if name.startswith("hf://") else Path(name).name
    return {
        "component": config["component"], "args": args, "source": source, "sha256": config["weights"]["sha256"],
    }  # fmt: skip


def build_network(description: Mapping[str, Any]) -> nn.Module:
    """Return the network of a description with random weights.

    Args:
        description: what `describe_network` returned; it may come from a stored configuration, so it is checked.

    Raises:
        InputError: it describes no component's network.
    """
    kinds = {"component": str, "args": dict, "source": str, "sha256": str}
    for key in (*description, *kinds):
        if key not in kinds or not isinstance(description.get(key), kinds[key]):
            raise InputError(f"the description of a network must have {', '.join(kinds)}; {key} is missing or wrong")
    cls = _expected_class(dict(description), None)
    arguments = decode(cls, description["args"])
    return construct(cls, arguments, meta=torch.get_default_device().type == "meta").network


def _locate_weights(folder: Path, config: dict[str, Any]) -> Path:
    """Return the weights' file, once it is known to be of the same save as the configuration."""
    weights = storage.locate(folder, "model.safetensors")
    if weights is None:
        raise InputError(f"{folder} has no model.safetensors: it is not a whole stored model")
    with open_tensors(weights) as file:
        if (file.metadata() or {}).get("sha256") != config["weights"]["sha256"]:
            raise InputError(
                f"{folder}: config.json and model.safetensors come from different saves; store or pull it anew"
            )
    return weights


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


def check_towers(model: ZooModule, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the frozen towers of a model with recorded fingerprints.

    Args:
        model: a model with its towers.
        facts: what `tower_facts` returned when it was stored.

    Raises:
        InputError: a tower's weights differ.
    """
    for attribute, ours in tower_facts(model).items():
        recorded = facts.get(attribute)
        if recorded is None or recorded["sha256"] == ours["sha256"]:
            continue
        remedy = f"pass {attribute}=… with the network that was used"
        if ours["name"] is not None and not has_weights(ours["name"]):
            remedy = (
                f"{ours['name']!r} is a bare architecture with random weights, so it never comes out the same: {remedy}"
            )
        raise InputError(
            f"the {attribute} ({ours['name'] or 'a module'}) is not the one this model was trained with: its weights have "
            f"SHA-256 {ours['sha256'][:12]}…, expected {recorded['sha256'][:12]}…; {remedy}"
        )
