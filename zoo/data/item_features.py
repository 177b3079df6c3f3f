"""Features of items from files, by row or by id, in the order of the items of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from zoo.data.feature_files import FeatureFile
from zoo.data.splits import Indices
from zoo.errors import InputError, nearest

__all__ = ["FeatureSource", "MissingRule", "align_features", "read_feature_source"]

MissingRule = Literal["allow", "error"]

_IDS = ("ids", "id", "item_id")
_PART = 1 << 22  # numbers that are read in one go


@dataclass(frozen=True)
class FeatureSource:
    """Features by row, and the item of each row.

    Attributes:
        name: the modality.
        path: the file, for messages.
        values: (rows, D), or the file to read them from.
        ids: id of the item of each row; None: row r is item number r.
    """

    name: str
    path: str
    values: Tensor | FeatureFile
    ids: list[str] | None = None

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return self.values.dim if isinstance(self.values, FeatureFile) else self.values.shape[1]

    def read(self, rows: Indices) -> Tensor:
        """Return some rows as a new float32 tensor (B, D).

        Args:
            rows: their numbers (B,).
        """
        if isinstance(self.values, FeatureFile):
            return self.values.read(rows)
        return self.values[torch.from_numpy(rows)].float()


def read_feature_source(
    name: str, path: str, *, field: str | None = None, ids: str | None = None, id_column: str = "item_id"
) -> FeatureSource:
    """Open the features of one modality.

    Args:
        name: the modality.
        path: .npy or .safetensors: a matrix by row; .npz: a matrix, and ids if an array is called ids, id or item_id;
            .parquet: a column of lists of numbers, by id.
        field: the array, tensor or column to read; None takes the only one, or that of the modality's name.
        ids: file with the id of each row, for a matrix by row: .npy, or a text with one a line.
        id_column: column of the ids in a parquet file.

    Raises:
        InputError: the file cannot be read or holds something else, or there is not one id for each row.
    """
    if not Path(path).is_file():
        raise InputError(f"feature_files[{name!r}]: there is no file {path!r}")
    suffix = Path(path).suffix
    found: list[str] | None = None
    values: Tensor | FeatureFile
    if suffix in (".npy", ".safetensors"):
        values = FeatureFile(path, name, tensor=field)
    elif suffix == ".npz":
        values, found = _from_npz(name, path, field)
    elif suffix == ".parquet":
        values, found = _from_parquet(name, path, field or name, id_column)
    else:
        raise InputError(f"feature_files[{name!r}] must be an .npy, .npz, .safetensors or .parquet file, got {path!r}")
    if ids is not None:
        if found is not None:
            raise InputError(f"feature_ids[{name!r}]: {path} has ids of its own; leave out the other ones")
        found = _read_ids(ids)
    if found is not None:
        _check_ids(name, path, found, len(values))
    return FeatureSource(name, path, values, found)


def _check_ids(name: str, path: str, ids: list[str], rows: int) -> None:
    if len(ids) != rows:
        raise InputError(f"{name}: {path} has {rows} rows of features, but there are {len(ids)} ids")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(each for each in ids if each in seen or seen.add(each))  # type: ignore[func-returns-value]
        raise InputError(f"{name}: {path} has the item {twice!r} twice; keep one row of each")


def _matrix(name: str, path: str, values: Any) -> Tensor:
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind != "f":
        raise InputError(
            f"{name}: {path} must hold floating-point features (N, D), got {values.dtype} of shape {values.shape}"
        )
    return torch.from_numpy(np.ascontiguousarray(values))


def _from_npz(name: str, path: str, field: str | None) -> tuple[Tensor, list[str] | None]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {each: archive[each] for each in archive.files}
    except (OSError, ValueError, EOFError, AttributeError) as error:  # the last for an npy file of that name
        raise InputError(f"{name}: {path} is no readable npz file of numbers and texts: {error}") from error
    names = [each for each in arrays if each not in _IDS]
    chosen = field or (names[0] if len(names) == 1 else name)
    if chosen not in names:
        raise InputError(
            f"{name}: {path} has no array {chosen!r}.{nearest(chosen, names)} It has: {', '.join(names)}; choose with "
            f"feature_fields={{{name!r}: …}}"
        )
    keys = next((arrays[each] for each in _IDS if each in arrays), None)
    return _matrix(name, path, arrays[chosen]), None if keys is None else [str(key) for key in keys.tolist()]


def _from_parquet(name: str, path: str, field: str, id_column: str) -> tuple[Tensor, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import types

    try:
        schema = pq.read_schema(path)
        for column in (id_column, field):
            if column not in schema.names:
                raise InputError(
                    f"{name}: {path} has no column {column!r}.{nearest(column, schema.names)} It has: "
                    f"{', '.join(schema.names)}; choose with feature_fields={{{name!r}: …}} and item_column"
                )
        table = pq.read_table(path, columns=[id_column, field])
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{name}: {path} is no readable parquet file: {error}") from error
    column = table.column(field).combine_chunks()
    kind = column.type
    nested = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not nested or not types.is_floating(kind.value_type):
        raise InputError(
            f"{name}: the column {field!r} of {path} must hold lists of floating-point numbers, it is {kind}"
        )
    filled = column.is_valid()  # an item without a list lacks this modality
    column, keys = column.filter(filled), table.column(id_column).combine_chunks().filter(filled)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if len(column) == 0 or len(flat) % len(column) or len(set(column.value_lengths().to_pylist())) > 1:
        raise InputError(
            f"{name}: the lists in the column {field!r} of {path} must have one length, at least 1, in all rows"
        )
    return _matrix(name, path, flat.reshape(len(column), -1)), keys.cast(pa.large_string()).to_pylist()


def _read_ids(path: str) -> list[str]:
    if not Path(path).is_file():
        raise InputError(f"feature_ids: there is no file {path!r}")
    if not path.endswith(".npy"):
        return Path(path).read_text(encoding="utf-8").splitlines()
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"feature_ids: {path} is no readable npy file of ids: {error}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise InputError(f"feature_ids: {path} must hold a vector of texts or whole numbers, got {ids.dtype}")
    return [str(each) for each in ids.tolist()]


def _rows(source: FeatureSource, item_ids: Sequence[str]) -> Indices:
    """Return the row of each item, -1 where there is none."""
    if source.ids is not None:
        place = {each: row for row, each in enumerate(source.ids)}
        return np.array([place.get(each, -1) for each in item_ids], dtype=np.int64)
    wrong = next((each for each in item_ids if not (each.isascii() and each.isdigit())), None)
    if wrong is not None:
        raise InputError(
            f"{source.name}: {source.path} has its features by row, so ids of items must be the numbers of the rows; got "
            f"{wrong!r}. Name the id of each row with feature_ids={{{source.name!r}: …}}"
        )
    rows = np.array([int(each) for each in item_ids], dtype=np.int64)
    if len(rows) and rows.max() >= len(source.values):
        raise InputError(
            f"{source.name}: {source.path} has {len(source.values)} rows, but items go up to number {rows.max()}: row r "
            "must be item r"
        )
    return rows


def align_features(
    source: FeatureSource, item_ids: Sequence[str], *, missing: MissingRule = "allow"
) -> tuple[Tensor, Tensor]:
    """Bring features into the order of the items.

    An item lacks the modality if it has no row, or one that is all zero.

    Args:
        source: the features.
        item_ids: id of each item (I,); where the source has no ids, its row.
        missing: whether items may lack the modality.

    Returns:
        Features (I, D) in float32, zero where they are missing, and which items have them (I,), bool.

    Raises:
        InputError: features are not finite in float32, an item lacks them and must not, or all items lack them.
    """
    rows = _rows(source, item_ids)
    features = torch.zeros(len(rows), source.dim)
    finite, present = torch.ones(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.bool)
    # By parts: a file in float64 is never in memory as a whole.
    for places in np.array_split(np.flatnonzero(rows >= 0), max(1, len(rows) * source.dim // _PART)):
        part, where = source.read(rows[places]), torch.from_numpy(places)
        features[where], finite[where], present[where] = part, part.isfinite().all(1), part.any(1)
    wrong = (~finite).nonzero().flatten().tolist()
    if wrong:
        raise InputError(
            f"{source.name}: {source.path} has features that are not finite for {len(wrong)} items, the first is "
            f"{item_ids[wrong[0]]!r} (row {rows[wrong[0]]}); compute them again, or make such rows zero: they then count as "
            "missing"
        )
    if not present.any():
        raise InputError(
            f"{source.name}: {source.path} has no features for any of the {len(item_ids)} items; look at the ids"
        )
    lacking = (~present).nonzero().flatten().tolist()
    if lacking and missing == "error":
        raise InputError(
            f"{source.name}: {len(lacking)} items have no features in {source.path}, or only zeros, the first is "
            f"{item_ids[lacking[0]]!r}; missing='allow' takes them as items without this modality"
        )
    return features, present
