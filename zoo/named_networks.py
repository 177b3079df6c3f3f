"""Plain networks by tower name, built from timm, torchvision, open_clip, the zoo or a folder; `zoo.towers` has the table.

Names and options may come from a stored configuration, so what they can do is bounded: options that choose files, devices
or another kind of network are refused, and so are numbers that no architecture has.
"""

from __future__ import annotations

import http.client
import inspect
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zoo.errors import InputError, nearest
from zoo.features import FeatureTap
from zoo.open_clip_networks import build_side

__all__ = ["BUILD_ERRORS", "build", "has_public_weights", "has_weights", "is_stored", "reason"]

# What constructors raise when they are given values that they cannot use.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
_MAX_OPTION = 1 << 20
# Names that begin with "pretrained" or "weights" are refused as well.
_REFUSED = frozenset(
    {
        "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cls", "features_only", "no_jit",
        "out_indices", "progress", "pruned", "scriptable",
    }
)  # fmt: skip
# What torchvision changes in an architecture when weights are asked for; stored weights need the same architecture.
_WITH_WEIGHTS = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}

_Options = dict[str, Any]


def build(
    name: str,
    num_classes: int | None,
    options: Mapping[str, Any],
    *,
    weights: bool,
    modality: str | None = None,
) -> nn.Module:
    """Build a network.

    Args:
        name: a tower name.
        num_classes: size of the classifier; None keeps the network's own.
        options: keyword arguments of the builder.
        weights: fetch the weights that the name stands for; otherwise random ones in the same architecture.
        modality: the side of a network that has several.

    Raises:
        InputError: an unknown name (the nearest are shown), an option that cannot be used, or weights that cannot be
            fetched.
    """
    if is_stored(name):
        return _build_stored(name, num_classes, options, weights)
    family, _, architecture = name.partition("/")
    families = (*_BUILDERS, "open_clip")
    if family not in families or not architecture:
        raise InputError(
            f"no tower named {name!r}: a name begins with {', '.join(f'{key}/' for key in families)} or is the path of a "
            f"stored model, beginning with . or /.{nearest(family, families)}"
        )
    _check_options(name, options)
    if family == "open_clip":
        if num_classes is not None:
            raise InputError(
                f"{name!r} has no classifier, so num_classes={num_classes} cannot be met: it gives embeddings"
            )
        return _construct(name, lambda given: build_side(name, modality, given, weights=weights), dict(options))
    if num_classes is not None:
        options = {**options, "num_classes": num_classes}
    return _BUILDERS[family](name, dict(options), weights)


def has_weights(name: object) -> bool:
    """Whether a tower name stands for given weights, so that the same name builds the same network again."""
    if not isinstance(name, str):
        return False
    if is_stored(name):
        return True
    family, _, rest = name.partition("/")
    return (family == "timm" and ("." in rest or rest.startswith("hf-hub:"))) or (
        family in ("torchvision", "open_clip") and "/" in rest
    )


def has_public_weights(name: object) -> bool:
    """Whether a tower name stands for weights that others can fetch by it: any with weights but a folder of this machine."""
    return has_weights(name) and not str(name).startswith((".", "/", "~"))


def is_stored(name: str) -> bool:
    """Whether a tower name is the place of a stored zoo model."""
    return name.startswith((".", "/", "~", "hf://"))


def reason(error: BaseException) -> str:
    """Return the kind and the first line of an error; torch's go on with the stack of its C++ code."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def _build_timm(name: str, options: _Options, weights: bool) -> nn.Module:
    import timm

    model = name.removeprefix("timm/")
    if model.startswith("hf-hub:"):
        return _construct(name, lambda given: timm.create_model(model, pretrained=weights, **given), options)
    architecture, dot, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise InputError(f"timm has no architecture {architecture!r}.{nearest(architecture, timm.list_models())}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(architecture)]
    if dot and tag not in tags:
        raise InputError(f"timm has no weights {tag!r} for {architecture!r}.{nearest(tag, tags)}")
    pretrained = bool(tag) and weights
    return _construct(name, lambda given: timm.create_model(model, pretrained=pretrained, **given), options)


def _build_torchvision(name: str, options: _Options, weights: bool) -> nn.Module:
    from torchvision import models

    architecture, slash, tag = name.removeprefix("torchvision/").partition("/")
    classifiers = models.list_models(module=models)
    if architecture not in classifiers:
        raise InputError(f"torchvision has no classifier {architecture!r}.{nearest(architecture, classifiers)}")
    known = models.get_model_weights(architecture).__members__
    if slash and tag not in known:
        raise InputError(f"torchvision has no weights {tag!r} for {architecture!r}.{nearest(tag, known)}")
    if not tag or not weights:
        options = {**(_WITH_WEIGHTS.get(architecture, {}) if tag else {}), **options}
        with _ValuesOnCpu() if architecture.startswith("regnet") else nullcontext():
            return _construct(name, lambda given: models.get_model(architecture, weights=None, **given), options)
    num_classes = options.pop("num_classes", None)
    network = _construct(name, lambda given: models.get_model(architecture, weights=known[tag], **given), options)
    _resize_classifier(network, num_classes)
    return network


class _ValuesOnCpu(TorchFunctionMode):
    """RegNet computes its widths with small tensors whose values it reads, and the meta device has no values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: _Options | None = None
    ) -> Any:
        if func in (torch.arange, torch.tensor):
            kwargs = {"device": "cpu", **(kwargs or {})}
        return func(*args, **(kwargs or {}))


def _resize_classifier(network: nn.Module, num_classes: int | None) -> None:
    """Put a random classifier of another size in the place of the last layer, as timm does."""
    tap = FeatureTap(network)
    if num_classes is None or num_classes == tap.num_classes:
        return
    old = network.get_submodule(tap.heads[0])
    bias = old.bias is not None
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        assert old.kernel_size == (1, 1)
        new = nn.Conv2d(old.in_channels, num_classes, 1, bias=bias)
    else:
        new = nn.Linear(tap.dim, num_classes, bias=bias)
    parent, _, leaf = tap.heads[0].rpartition(".")
    setattr(network.get_submodule(parent), leaf, new)


def _build_zoo(name: str, options: _Options, _weights: bool) -> nn.Module:
    from zoo.architectures import ARCHITECTURES

    architecture = name.removeprefix("zoo/")
    if architecture not in ARCHITECTURES:
        raise InputError(f"the zoo has no architecture {architecture!r}.{nearest(architecture, ARCHITECTURES)}")
    return _construct(name, lambda given: ARCHITECTURES[architecture](**given), options)


def _build_stored(name: str, num_classes: int | None, options: Mapping[str, Any], weights: bool) -> nn.Module:
    from zoo import hub

    if options:
        raise InputError(f"options {sorted(options)} cannot be applied to the stored model {name!r}")
    network = hub.load_network(name) if weights else hub.build_network(hub.describe_network(name))
    if num_classes is not None and FeatureTap(network).num_classes != num_classes:
        raise InputError(
            f"the stored model {name!r} has {FeatureTap(network).num_classes} classes, expected {num_classes}"
        )
    return network


_BUILDERS: dict[str, Callable[[str, _Options, bool], nn.Module]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "zoo": _build_zoo,
}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if option in _REFUSED or option.startswith(("pretrained", "weights")):
            raise InputError(
                f"option {option!r} is refused for {name!r}: it chooses files, a device or another kind of network. Build "
                "the network yourself and give the module"
            )
        _check_size(name, option, value)


def _check_size(name: str, option: str, value: Any) -> None:
    if isinstance(value, int) and abs(value) > _MAX_OPTION:
        raise InputError(f"option {option!r} of {name!r} must be at most {_MAX_OPTION}, got {value}")
    if isinstance(value, list | tuple):
        for item in value:
            _check_size(name, option, item)
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_size(name, f"{option}.{key}", item)


def _construct(name: str, builder: Callable[[_Options], nn.Module], options: _Options) -> nn.Module:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        with _tensors_only():
            return builder(options)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(f"the weights of {name!r} are refused: a pickle that holds more than tensors") from error
    except (OSError, http.client.HTTPException, httpx.HTTPError) as error:
        raise InputError(
            f"the weights of {name!r} could not be fetched ({reason(error)}). Connect to the network once so that they are "
            "cached, give a name without weights, or give a module"
        ) from error
    except BUILD_ERRORS as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is not None and unknown[1] in options:
            raise InputError(
                f"{name!r} takes no option {unknown[1]!r}.{nearest(unknown[1], _option_names(builder))}"
            ) from error
        raise InputError(f"{name!r} cannot be built with the options {options}: {reason(error)}") from error


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let ``torch.load`` read tensors and no code, whatever a library asks for: older timm would unpickle anything."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _option_names(builder: Callable[[_Options], nn.Module]) -> list[str]:
    with torch.device("meta"):
        network = builder({})
    return list(inspect.signature(type(network).__init__).parameters)[1:]
