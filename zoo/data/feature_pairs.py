"""Pairs of features that were computed before, such as those of frozen towers: training without the towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.draws import random_words
from zoo.data.feature_files import FeatureFile, read_integers
from zoo.data.loading import SplitDataModule, Splits, epoch_of
from zoo.data.splits import Indices, stratified_split
from zoo.data.text import PairBatch
from zoo.errors import InputError, nearest

__all__ = ["FeaturePairs", "FeaturePairsDataModule"]

_LABEL = "label"
_RESERVED = (_LABEL, "id")
_PAIRS = 3  # the stream of random numbers that chooses one pair of several


class _Table:
    """The files of one split source: the pairs 0 … N-1 and which row of each file a pair takes.

    Attributes:
        files: the features by their names.
        rows: rows (N,) of the files that have an index; elsewhere pair n takes row n.
        labels: class of each pair (N,), or None.
        ids: which thing each pair shows (N,): its row in the first file with an index, otherwise its own number.
    """

    def __init__(
        self, argument: str, features: Mapping[str, str], index: Mapping[str, str], tensors: Mapping[str, str]
    ) -> None:
        for name in index:
            if name not in features or name == _LABEL:
                raise InputError(
                    f"{argument}: there is an index for {name!r}, which is no feature.{_near(name, features)}"
                )
        self.files = {
            name: FeatureFile(path, name, tensor=tensors.get(name)) for name, path in features.items() if name != _LABEL
        }
        self.rows = {name: read_integers(path, f"the index of {name}") for name, path in index.items()}
        self.labels = read_integers(features[_LABEL], _LABEL) if _LABEL in features else None
        counts = {name: len(file) for name, file in self.files.items() if name not in index}
        counts |= {f"the index of {name}": len(rows) for name, rows in self.rows.items()}
        if self.labels is not None:
            counts[_LABEL] = len(self.labels)
        if len(set(counts.values())) > 1:
            raise InputError(
                f"{argument}: as many rows are needed of everything, got "
                + ", ".join(f"{count} of {name}" for name, count in counts.items())
                + "; files in which several pairs share a row need an index"
            )
        for name, rows in self.rows.items():
            if len(rows) and rows.max() >= len(self.files[name]):
                raise InputError(
                    f"{argument}: the index of {name} goes up to row {rows.max()}, but {self.files[name].path} has "
                    f"{len(self.files[name])} rows"
                )
        self.size = next(iter(counts.values()))
        if self.size == 0:
            raise InputError(f"{argument}: there are no pairs")
        self.ids = next(iter(self.rows.values()), np.arange(self.size))

    def check(self) -> None:
        for file in self.files.values():
            file.check()


def _near(name: str, features: Mapping[str, str]) -> str:
    known = [each for each in features if each != _LABEL]
    return f"{nearest(name, known)} The features are {', '.join(known)}"


class FeaturePairs(Dataset[Any]):
    """Some pairs of a table, read by the batch.

    Args:
        table: the files.
        pairs: which pairs (N,).
        one_per: rows (of all pairs of the table) of which each epoch takes one pair; None takes every pair.
        seed: number of that choice, which depends on (seed, epoch, index) alone.
    """

    def __init__(self, table: _Table, pairs: Indices, *, one_per: Indices | None = None, seed: int = 0) -> None:
        self.table = table
        self.seed = seed
        self.pairs = pairs
        self._counts: Indices | None = None
        if one_per is not None:
            groups = one_per[pairs]
            order = np.argsort(groups, kind="stable")
            self.pairs = pairs[order]
            self._starts, self._counts = np.unique(groups[order], return_index=True, return_counts=True)[1:]

    def __len__(self) -> int:
        return len(self.pairs if self._counts is None else self._counts)

    def __getitem__(self, index: int) -> PairBatch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> PairBatch:
        positions = np.array(indices, dtype=np.int64)
        if self._counts is not None:
            words = random_words((_PAIRS, self.seed, epoch_of(indices)), positions)
            choice = (words >> np.uint64(1)).astype(np.int64) % self._counts[positions]
            positions = self._starts[positions] + choice
        pairs, table = self.pairs[positions], self.table
        batch: dict[str, Tensor] = {
            name: file.read(table.rows[name][pairs] if name in table.rows else pairs)
            for name, file in table.files.items()
        }
        if table.labels is not None:
            batch[_LABEL] = torch.from_numpy(table.labels[pairs])
        batch["id"] = torch.from_numpy(table.ids[pairs])
        return batch


class FeaturePairsDataModule(SplitDataModule):
    """Pairs of precomputed features from npy or safetensors files, whose n-th rows belong together.

    A batch is a dict: float32 features (B, D) under each name of ``features``, "label" (B,) if there are labels, and "id"
    (B,), the number of the pair, or of the thing that several pairs share. The files are mapped into memory, so they may be
    larger than it; float16 on disk halves them.

    Args:
        features: file of each modality by its name, at least two: ``{"image": "image.npy", "text": "text.safetensors"}``.
            Weight features (CWCL's r) are one more under a name of their own. "label" names a vector of classes (whole
            numbers), and is no modality.
        index: for a file in which several pairs share a row, a vector that says which row each pair takes:
            ``{"image": "image_of_caption.npy"}`` for five captions of each image. "id" is that row, for the first of
            several.
        tensors: tensor in a safetensors file by the name of its modality; without it, the only one or that of that name.
        val: the files of the validation split, with the same names; None takes a part of the training pairs.
        val_index: their index, where they need one.
        test: the same for the test split.
        test_index: their index, where they need one.
        one_per: name in ``index``: an epoch of training takes one pair, another each time, of each row of that file, so
            that no image is twice in a batch. Evaluation goes over all pairs.
        class_names: name of each class in the order of the labels; None numbers them.
        check: look at all features once before training: numbers that are not finite are an error, rows that are all zero
            a warning. It reads the files once; False saves that.
        batch_size: pairs in a batch and process, at least 1.
        num_workers: processes that read the data; 0 reads in the training process.
        val_share: share of the training pairs for validation, in [0, 1), if ``val`` is None. Pairs with one id stay
            together, and every class has its share.
        test_share: the same for the test.
        split_seed: number of the split.
        seed: number of the training order and of the choice for ``one_per``.
        drop_last: leave out a last training batch that is not full.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Raises:
        InputError: an argument is out of its range. When the data are read: a file is missing or holds something else,
            or their lengths or widths do not fit.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> np.save(f"{folder}/image.npy", np.ones((10, 4), np.float16))
        >>> np.save(f"{folder}/text.npy", np.ones((10, 3), np.float32))
        >>> files = {"image": f"{folder}/image.npy", "text": f"{folder}/text.npy"}
        >>> data = FeaturePairsDataModule(features=files, batch_size=8)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["image"].shape, batch["image"].dtype, batch["text"].shape
        (torch.Size([8, 4]), torch.float32, torch.Size([8, 3]))
    """

    def __init__(
        self,
        *,
        features: dict[str, str],
        index: dict[str, str] | None = None,
        tensors: dict[str, str] | None = None,
        val: dict[str, str] | None = None,
        val_index: dict[str, str] | None = None,
        test: dict[str, str] | None = None,
        test_index: dict[str, str] | None = None,
        one_per: str | None = None,
        class_names: list[str] | None = None,
        check: bool = True,
        batch_size: int = 1024,
        num_workers: int = 0,
        val_share: float = 0.1,
        test_share: float = 0.0,
        split_seed: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last, pin_memory=pin_memory
        )
        modalities = [name for name in features if name not in _RESERVED]
        if len(modalities) < 2 or "id" in features:
            raise InputError(
                f"features must name at least two modalities, apart from 'label', and none 'id', got {list(features)}"
            )
        for name in tensors or {}:
            if name not in modalities:
                raise InputError(f"tensors has {name!r}, which is no feature.{_near(name, features)}")
        if one_per is not None and one_per not in (index or {}):
            raise InputError(f"one_per must be a name in index, got {one_per!r}; index has {list(index or {})}")
        self.features = features
        self.index = index or {}
        self.tensors = tensors or {}
        self.own_files = {"val": (val, val_index or {}), "test": (test, test_index or {})}
        for argument, (files, rows) in self.own_files.items():
            self._check_names(argument, files, rows)
        self.one_per = one_per
        self.check = check
        self.shares = {"val_share": val_share, "test_share": test_share}
        self.split_seed = split_seed
        self._class_names = class_names
        self._table: _Table | None = None

    def _check_names(self, argument: str, files: dict[str, str] | None, rows: dict[str, str]) -> None:
        if files is None:
            if rows:
                raise InputError(f"{argument}_index needs {argument}, the files that it belongs to")
        elif files.keys() != self.features.keys():
            raise InputError(f"{argument} must have the names of features, {list(self.features)}, got {list(files)}")

    @property
    def class_names(self) -> list[str]:
        """Name of each class in the order of the labels; empty without labels."""
        if self._class_names is not None:
            return list(self._class_names)
        labels = self._training().labels
        return [] if labels is None else [str(number) for number in range(int(labels.max()) + 1)]

    @property
    def dims(self) -> dict[str, int]:
        """Width D of the features of each modality."""
        return {name: file.dim for name, file in self._training().files.items()}

    def _training(self) -> _Table:
        if self._table is None:
            self._table = _Table("features", self.features, self.index, self.tensors)
        return self._table

    def _load(self) -> Splits:
        table = self._training()
        own: dict[str, FeaturePairs | None] = {}
        for argument, (files, rows) in self.own_files.items():
            own[argument] = None if files is None else self._own(argument, files, rows)
        self._check_labels("features", table)
        if self.check:
            table.check()
        shares = {name: share for name, share in self.shares.items() if own[name.removesuffix("_share")] is None}
        *parts, rest = self._split(table, shares)
        held_out = {name.removesuffix("_share"): part for name, part in zip(shares, parts, strict=True)}

        def evaluation(argument: str) -> FeaturePairs | None:
            part = held_out.get(argument, ())
            return FeaturePairs(table, np.asarray(part)) if len(part) else own[argument]

        one_per = None if self.one_per is None else table.rows[self.one_per]
        return Splits(
            train=FeaturePairs(table, rest, one_per=one_per, seed=self.seed),
            train_eval=FeaturePairs(table, rest),
            val=evaluation("val"),
            test=evaluation("test"),
        )

    def _own(self, argument: str, files: dict[str, str], rows: dict[str, str]) -> FeaturePairs:
        table = _Table(argument, files, rows, self.tensors)
        self._check_labels(argument, table)
        for name, file in table.files.items():
            if file.dim != self.dims[name]:
                raise InputError(
                    f"{argument}: {file.path} has {file.dim} features a row, in training {name!r} has {self.dims[name]}"
                )
        if self.check:
            table.check()
        return FeaturePairs(table, np.arange(table.size))

    def _check_labels(self, argument: str, table: _Table) -> None:
        if table.labels is not None and table.labels.max() >= self.num_classes:
            raise InputError(
                f"{argument}: label {table.labels.max()} is outside 0 … {self.num_classes - 1}, the {self.num_classes} "
                "classes"
            )

    def _split(self, table: _Table, shares: Mapping[str, float]) -> list[Indices]:
        """Split the pairs by their ids, each id in the class of its first pair."""
        _, first, group = np.unique(table.ids, return_index=True, return_inverse=True)
        labels: Any = np.zeros(len(first)) if table.labels is None else table.labels[first]
        parts = stratified_split(labels, shares, seed=self.split_seed)
        which = np.empty(len(first), dtype=np.int64)
        for number, part in enumerate(parts):
            which[part] = number
        return [np.flatnonzero(which[group] == number) for number in range(len(parts))]
