"""Facts of a run for the model card: what was trained on what, with which result. Nothing here is estimated."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from zoo import storage
from zoo.arguments import encode
from zoo.errors import InputError

__all__ = ["by_split", "collect", "figures"]


def collect(
    trainer: pl.Trainer,
    *,
    metrics: Mapping[str, Mapping[str, float]],
    seconds: float | None = None,
    seed: int | None = None,
    monitor: str | None = None,
    history: Mapping[str, list[list[float]]] | None = None,
) -> dict[str, Any]:
    """Return the facts of a run, as `zoo.model_card.render` takes them.

    Args:
        trainer: the trainer after, or during, fit.
        metrics: results by split, then metric.
        seconds: duration of the fit.
        seed: what the run was seeded with.
        monitor: the metric that chose the weights.
        history: curves: metric -> [[epoch, value], …].
    """
    data = getattr(trainer, "datamodule", None)
    facts: dict[str, Any] = {
        "metrics": {split: {name: _number(value) for name, value in found.items()} for split, found in metrics.items()},
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "precision": str(trainer.precision),
        "hardware": _hardware(trainer),
        "history": {name: points for name, points in (history or {}).items() if points},
    }
    if data is not None:
        facts["data"] = {"name": type(data).__name__, "args": _arguments(data), "splits": _splits(data)}
    optional = {"seconds": None if seconds is None else round(seconds, 1), "seed": seed, "monitor": monitor}
    return {**facts, **{name: value for name, value in optional.items() if value is not None}}


def figures(trainer: pl.Trainer) -> dict[str, bytes]:
    """Return what the module and the callbacks of a run have drawn for the card.

    Whoever has a method ``card_figures() -> dict[str, bytes]`` is asked, the module first. It returns PNG files by name:
    ``"layers"``, ``"robustness"``, ``"saliency"`` or ``"samples"``. Where several draw under one name, the later ones are
    numbered, and the card shows the first four.

    Args:
        trainer: the trainer during, or after, fit.

    Returns:
        PNG files by their place in the stored format, such as ``"figures/saliency.png"``.

    Raises:
        InputError: a name that the stored format does not have.
    """
    found: dict[str, bytes] = {}
    for source in (trainer.lightning_module, *trainer.callbacks):  # type: ignore[attr-defined] # no such hint there
        draw = getattr(source, "card_figures", None)
        for name, png in (draw() if draw is not None else {}).items():
            places = [file for file in storage.DRAWN if re.fullmatch(rf"figures/{re.escape(name)}(_\d)?\.png", file)]
            if not places:
                known = ", ".join(Path(file).stem for file in storage.DRAWN if "_" not in file)
                raise InputError(f"{type(source).__name__}.card_figures() may return {known}, got {name!r}")
            for file in places:
                if file not in found:
                    found[file] = png
                    break
    return found


def by_split(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Sort logged metrics such as ``val/acc`` by their split; those of training steps are left out.

    Example:
        >>> by_split({"val/acc": 0.5, "train/loss": 1.0})
        {'val': {'acc': 0.5}}
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        split, _, metric = name.partition("/")
        if metric and split in ("val", "test"):
            found.setdefault(split, {})[metric] = float(value)
    return found


def _number(value: float) -> float | str:
    # JSON has no NaN: the card says in words what was not finite.
    return float(value) if torch.isfinite(torch.tensor(float(value))) else str(float(value))


def _hardware(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name


def _arguments(data: Any) -> dict[str, Any]:
    """Return the data module's arguments as far as it keeps them under their names and JSON has them."""
    import inspect

    found = {}
    for name in inspect.signature(type(data)).parameters:
        if not hasattr(data, name):
            continue
        try:
            value = getattr(data, name)
            # Where data lie on this machine is nobody's business: the last part of a path says what they are.
            local = isinstance(value, Path) or (isinstance(value, str) and Path(value).expanduser().is_absolute())
            found[name] = Path(value).name if local else encode(name, value)
        except InputError:
            continue
    return found


def _splits(data: Any) -> dict[str, int]:
    splits = getattr(data, "splits", None)
    if splits is None:
        return {}
    parts = {name: getattr(splits, name, None) for name in ("train", "val", "test")}
    return {name: len(part) for name, part in parts.items() if isinstance(part, Sized)}
