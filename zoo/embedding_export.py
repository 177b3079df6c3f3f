"""Embeddings of users and items in a file, for search engines outside of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from zoo.errors import InputError

__all__ = ["write_embeddings"]

_SUFFIXES = (".npz", ".parquet")


def write_embeddings(
    path: str | Path,
    *,
    users: Tensor,
    items: Tensor,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
    measure: Literal["ip", "cos"],
) -> Path:
    """Write embeddings, their ids, and the measure by which they are to be compared.

    ``.npz`` holds the arrays ``users`` (U, d), ``items`` (I, d), ``user_ids``, ``item_ids`` and ``measure``, and is read
    with ``allow_pickle=False``. ``.parquet`` has a row for each user and item with the columns ``kind`` (``"user"`` or
    ``"item"``), ``id`` and ``embedding``; ``measure`` is in the schema's metadata.

    Args:
        path: the file; its suffix says which.
        users: (U, d), float32.
        items: (I, d), float32.
        user_ids: U names.
        item_ids: I names.
        measure: ``"ip"``, the inner product, or ``"cos"``, the cosine.

    Returns:
        The path.

    Raises:
        InputError: another suffix, or a folder that does not exist.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise InputError(f"path must end in {' or '.join(_SUFFIXES)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise InputError(f"path must lie in a folder that exists, {path.parent} does not")
    tables = [rows.detach().float().cpu().numpy() for rows in (users, items)]
    if path.suffix == ".npz":
        np.savez(
            path, users=tables[0], items=tables[1], user_ids=np.array(user_ids), item_ids=np.array(item_ids),
            measure=np.array(measure),
        )  # fmt: skip
        return path
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = tables[0].shape[1]
    table = pa.table(
        {
            "kind": ["user"] * len(user_ids) + ["item"] * len(item_ids),
            "id": [*user_ids, *item_ids],
            "embedding": pa.FixedSizeListArray.from_arrays(np.concatenate(tables).ravel(), width),
        }
    )
    pq.write_table(table.replace_schema_metadata({"measure": measure}), path)
    return path
