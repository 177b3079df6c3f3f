"""The features of two frozen layers over a data module's pairs, once, on the disk.

A folder holds ``train`` and ``val``, each with ``image.npy`` and ``text.npy`` (N, D) float32, ``id.npy`` and ``label.npy``
where the data have them, and ``facts.json``: which layers of which weights, and what the data looked like. The arrays are
mapped into memory, so they may be larger than it. A split is built under a hidden name and counts with one rename; a folder
of other layers, weights or data is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.loading import SplitDataModule
from zoo.data.text import PairBatch
from zoo.errors import InputError
from zoo.frozen_layers import layer_features
from zoo.towers import Tower

__all__ = ["CachedLayers", "CachedPairs"]

_FORMAT = "zoo-layer-cache-1"
_PROBES = 32
_MODALITIES = ("image", "text")


@dataclass(frozen=True)
class _Source:
    """What a split of a cache is made from."""

    pairs: Any
    data: SplitDataModule
    towers: Mapping[str, Tower]
    layers: Mapping[str, str]
    pad_id: int | None

    def rows(self, batch: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
        """The arrays' rows of one batch."""
        found: dict[str, npt.NDArray[Any]] = {}
        for modality in _MODALITIES:
            tower, layer = self.towers[modality], self.layers[modality]
            parameter = next(tower.parameters(), None)
            x = batch[modality] if parameter is None else batch[modality].to(parameter.device)
            rows = layer_features(tower, x, layer, pad_id=self.pad_id).float().cpu()
            if not bool(rows.isfinite().all()):
                raise InputError(f"the {modality} layer {layer!r} gives numbers that are not finite")
            found[modality] = rows.numpy()
        return found | {name: batch[name].numpy() for name in ("id", "label") if name in batch}


class CachedPairs(Dataset[Any]):
    """The features of a split, read by the batch: "image_features", "text_features", "id" and "label".

    Args:
        folder: a split of a cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, npt.NDArray[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map is a copy of the whole file.
        return {**self.__dict__, "_arrays": None}

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The mapped arrays by the key of a batch."""
        if self._arrays is None:
            self._arrays = {
                f"{path.stem}_features" if path.stem in _MODALITIES else path.stem: np.load(path, mmap_mode="r")
                for path in sorted(self.folder.glob("*.npy"))
            }
        return self._arrays

    def __len__(self) -> int:
        return len(self.arrays["image_features"])

    def __getitem__(self, index: int) -> PairBatch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> PairBatch:
        rows = np.array(indices, dtype=np.int64)
        return {name: torch.from_numpy(np.asarray(array[rows])) for name, array in self.arrays.items()}


class CachedLayers:
    """Puts cached features in the place of a data module's training and validation pairs, until `undo`.

    Training then sees each sample as evaluation does: unaugmented, with one caption. Order, batches and processes are those
    of the data module. The first process writes what is missing while the others wait.

    Args:
        folder: the cache; splits that are missing are written.
        trainer: the trainer that is about to fit.
        towers: the frozen towers of "image" and "text".
        layers: their layers.
        pad_id: see `zoo.frozen_layers.layer_features`.

    Raises:
        InputError: the data module is none of the zoo's or has no pairs, the folder holds other layers, weights or data, or
            cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        trainer: Trainer,
        *,
        towers: Mapping[str, Tower],
        layers: Mapping[str, str],
        pad_id: int | None = None,
    ) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, SplitDataModule) or data.with_index:
            raise InputError(
                f"layer_cache needs one of the zoo's data modules of pairs, without with_index, got {type(data).__name__}: "
                "leave layer_cache out, or compute the features beforehand and give FeaturePairsDataModule"
            )
        self.data = data
        self._own = data.splits
        found: dict[str, CachedPairs] = {}
        for split, pairs in (("train", self._own.train_eval), ("val", self._own.val)):
            if pairs is None:
                continue
            place = Path(folder).absolute() / split
            failure: str | None = None
            if trainer.is_global_zero:
                try:
                    _prepare(place, _Source(pairs, data, towers, layers, pad_id))
                except (InputError, OSError) as error:
                    failure = str(error)
            failure = trainer.strategy.broadcast(failure)
            if failure is not None:
                raise InputError(f"the layer cache {place}: {failure}")
            found[split] = CachedPairs(place)
        data._splits = replace(self._own, train=found["train"], train_eval=found["train"], val=found.get("val"))

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one image as the tower takes it."""
        pairs: Any = self._own.train_eval
        return tuple(pairs.__getitems__([0])["image"].shape[1:])

    def undo(self) -> None:
        """Give the data module its own data back."""
        self.data._splits = self._own


def _prepare(place: Path, source: _Source) -> None:
    with isolate_rng():
        facts = {
            "format": _FORMAT,
            "layers": dict(source.layers),
            "towers": {modality: tower.fingerprint for modality, tower in source.towers.items()},
            "pad_id": source.pad_id,
            "samples": len(source.pairs),
            "data": _digest(source.pairs),
        }
        if not place.exists():
            _build(place, source, facts)
            return
    try:
        stored = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("facts.json is damaged: delete the folder, and it is built anew") from error
    for name, value in facts.items():
        known = stored.get(name) if isinstance(stored, dict) else None
        if known != value:
            raise InputError(f"it was made with other {name}: {known}, now {value}; give another folder, or delete it")


def _digest(pairs: Any) -> str:
    """A hash of samples all over the data; they have to be the same each time."""
    rows = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), _PROBES)).round().astype(int)).tolist()
    digests = []
    for _ in range(2):
        # Plain numbers, as in evaluation: with those of an epoch, captions and views may change.
        batch = pairs.__getitems__(rows)
        if not isinstance(batch, dict) or not all(modality in batch for modality in _MODALITIES):
            shown = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
            raise InputError(f"the data must give dicts with 'image' and 'text', got {shown}")
        digest = hashlib.sha256()
        for name in sorted(batch):
            value = batch[name].contiguous()
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(np.asarray(value.reshape(-1).view(torch.uint8)).data)
        digests.append(digest.hexdigest())
    if digests[0] != digests[1]:
        raise InputError("the data are not the same each time, so their features cannot be kept: leave layer_cache out")
    return digests[0]


def _build(place: Path, source: _Source, facts: dict[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        pairs, size = source.pairs, source.data.batch_size
        starts = range(0, len(pairs), size)
        loader: DataLoader[Any] = DataLoader(
            pairs,
            batch_sampler=[list(range(start, min(start + size, len(pairs)))) for start in starts],
            num_workers=source.data.num_workers,
            collate_fn=_as_is,
        )
        arrays: dict[str, npt.NDArray[Any]] = {}
        for start, batch in zip(starts, loader, strict=True):
            for name, rows in source.rows(batch).items():
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        partial / f"{name}.npy", mode="w+", dtype=rows.dtype, shape=(len(pairs), *rows.shape[1:])
                    )
                arrays[name][start : start + len(rows)] = rows
        for array in arrays.values():
            cast("np.memmap[Any, Any]", array).flush()
        (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _as_is(batch: Any) -> Any:
    return batch
