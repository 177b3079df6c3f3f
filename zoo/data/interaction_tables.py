"""Who has interacted with what, read from MMRec's and RecBole's files, CSV, TSV and parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zoo.data.parquet_table import parquet_files
from zoo.data.splits import Indices
from zoo.errors import InputError, nearest

__all__ = [
    "SPLITS",
    "InteractionColumns",
    "InteractionTable",
    "interaction_file",
    "read_interactions",
]

SPLITS = ("train", "val", "test")
"""The splits in the order of MMRec's ``x_label``: 0, 1, 2."""

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
_LABELS = {"0": 0, "train": 0, "1": 1, "val": 1, "valid": 1, "validation": 1, "2": 2, "test": 2}
_DEFAULTS = {
    "user": ("userID", "user_id"),
    "item": ("itemID", "item_id"),
    "time": ("timestamp",),
    "split": ("x_label",),
}


@dataclass(frozen=True)
class InteractionColumns:
    """Names of the columns of a table; None takes MMRec's or RecBole's, and for time and split none if they are absent.

    Attributes:
        user: ids of users.
        item: ids of items.
        time: numbers or dates.
        split: 0, 1, 2, or train, val (valid, validation), test.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    split: str | None = None

    def found(self, names: Sequence[str], table: str) -> dict[str, str]:
        """Find the columns of a table.

        Args:
            names: its columns.
            table: the table, for messages.

        Returns:
            The column of "user", "item" and, where there are such, "time" and "split".

        Raises:
            InputError: it lacks one that was named, or those of users or items.
        """
        chosen = {}
        for part, defaults in _DEFAULTS.items():
            given = getattr(self, part)
            known = [name for name in ((given,) if given else defaults) if name in names]
            if known:
                chosen[part] = known[0]
            elif given or part in ("user", "item"):
                wanted = repr(given) if given else " or ".join(defaults)
                raise InputError(
                    f"{table} has no column {wanted} of the {part}.{nearest(given or defaults[0], names)} It has: "
                    f"{', '.join(names)}; name it with {part}_column"
                )
        return chosen


@dataclass(frozen=True)
class InteractionTable:
    """Interactions by row; users and items are numbers into the lists of their ids.

    Attributes:
        users: (N,).
        items: (N,).
        user_ids: id of each user.
        item_ids: id of each item.
        times: when (N,), float64, or None.
        labels: number of the split in `SPLITS` (N,), or None.
        numbered: the numbers are those of the file, as in MMRec's; otherwise they are in the order of first appearance.
        incomplete: rows that were left out because the user, the item or the time is empty.
    """

    users: Indices
    items: Indices
    user_ids: list[str]
    item_ids: list[str]
    times: npt.NDArray[np.float64] | None = None
    labels: Indices | None = None
    numbered: bool = False
    incomplete: int = 0

    def take(self, rows: Indices) -> InteractionTable:
        """Keep some rows; users and items that are left without one are gone, the others are numbered anew.

        Args:
            rows: positions, in the order that decides about the numbers.
        """
        users, user_ids = _by_appearance(self.users[rows], self.user_ids)
        items, item_ids = _by_appearance(self.items[rows], self.item_ids)
        return InteractionTable(
            users=users,
            items=items,
            user_ids=user_ids,
            item_ids=item_ids,
            times=None if self.times is None else self.times[rows],
            labels=None if self.labels is None else self.labels[rows],
        )


def _by_appearance(codes: Indices, ids: Sequence[str]) -> tuple[Indices, list[str]]:
    found, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[inverse], [ids[code] for code in found[order]]


def interaction_file(source: str) -> str:
    """Find the file of interactions that a source stands for.

    Args:
        source: an .inter, .csv, .tsv or .parquet file, or a folder with one .inter file.

    Raises:
        InputError: there is no such file, or a folder has none or several.
    """
    if Path(source).is_dir():
        found = sorted(Path(source).glob("*.inter"))
        if len(found) != 1:
            names = f"several: {', '.join(path.name for path in found)}; name one" if found else "none"
            raise InputError(f"source: the folder {source!r} must have one .inter file, it has {names}")
        return str(found[0])
    if source.endswith(".parquet"):
        return parquet_files("source", source)[0]
    if not Path(source).is_file():
        raise InputError(f"source: there is no folder or file {source!r}")
    if Path(source).suffix not in _DELIMITERS:
        raise InputError(f"source must be a folder, or an .inter, .csv, .tsv or .parquet file, got {source!r}")
    return source


def read_interactions(file: str, columns: InteractionColumns) -> InteractionTable:
    """Read a table of interactions.

    In an .inter file without types in its header, as MMRec writes them, ids are whole numbers from 0 that number users
    and items: there are as many as the highest says. In all other files ids are texts.

    Args:
        file: an .inter, .csv, .tsv or .parquet file. ``name:type`` in the header is RecBole's.
        columns: the columns to read.

    Raises:
        InputError: the file cannot be read, lacks a column or a row, or a column holds something else.
    """
    table, names, typed = _open(file, columns)
    if len(table) == 0:
        raise InputError(f"{file} has no rows")
    values = {part: table.column(number).combine_chunks() for number, part in enumerate(names)}
    times = _times(values["time"], file) if "time" in values else None
    users, items = _texts(values["user"]), _texts(values["item"])
    filled = users.is_valid().to_numpy(zero_copy_only=False) & items.is_valid().to_numpy(zero_copy_only=False)
    if times is not None:
        filled &= ~np.isnan(times)
    numbered = file.endswith(".inter") and not typed
    if numbered and not filled.all():
        raise InputError(f"{file}: row {int(np.flatnonzero(~filled)[0])} lacks its user, item or time")
    if not filled.any():
        raise InputError(f"{file}: every row lacks its user, item or time")
    labels = _labels(values["split"], file) if "split" in values else None
    code = _numbers if numbered else _codes
    user_codes, user_ids = code(users, filled, f"{file}: the user")
    item_codes, item_ids = code(items, filled, f"{file}: the item")
    return InteractionTable(
        users=user_codes,
        items=item_codes,
        user_ids=user_ids,
        item_ids=item_ids,
        times=None if times is None else times[filled],
        labels=None if labels is None else labels[filled],
        numbered=numbered,
        incomplete=int((~filled).sum()),
    )


def _open(file: str, columns: InteractionColumns) -> tuple[Any, list[str], bool]:
    """Return the columns that there are, what each of them is, and whether the header has types."""
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    try:
        if file.endswith(".parquet"):
            names = pq.read_schema(file).names
            found = columns.found(names, file)
            return pq.read_table(file, columns=list(found.values())).select(list(found.values())), list(found), False
        suffix = Path(file).suffix
        parse = pc.ParseOptions(delimiter=_DELIMITERS[suffix], quote_char=False if suffix == ".inter" else '"')
        with pc.open_csv(file, parse_options=parse) as reader:
            header = reader.schema.names
        typed = suffix == ".inter" and any(":" in name for name in header)
        full = {name.partition(":")[0] if typed else name: name for name in header}
        found = {part: full[name] for part, name in columns.found(list(full), file).items()}
        kinds = {name: pa.large_string() for part, name in found.items() if part != "time"}
        convert = pc.ConvertOptions(
            include_columns=list(found.values()), column_types=kinds, strings_can_be_null=True, null_values=[""]
        )
        return pc.read_csv(file, parse_options=parse, convert_options=convert), list(found), typed
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is no readable table of interactions: {error}") from error


def _texts(values: Any) -> Any:
    """Return ids as texts, empty ones null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = values.cast(pa.large_string())
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.large_string()), texts)


def _times(values: Any, file: str) -> npt.NDArray[np.float64]:
    import pyarrow as pa
    from pyarrow import types

    kind = values.type
    if types.is_date(kind):
        values = values.cast(pa.timestamp("s"))
    if types.is_temporal(kind):
        values = values.cast(pa.int64())
    elif not (types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)):
        raise InputError(f"{file}: the time must be numbers or dates, its column has the type {kind}")
    return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)


def _labels(values: Any, file: str) -> Indices:
    import pyarrow as pa

    encoded = values.cast(pa.large_string()).dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    wrong = [text for text in texts if text not in _LABELS]
    if wrong or encoded.null_count:
        raise InputError(
            f"{file}: the split must be 0, 1, 2 or train, val, test in every row, got {wrong[0] if wrong else 'nothing'!r}"
        )
    labels: Indices = np.array([_LABELS[text] for text in texts], dtype=np.int64)[encoded.indices.to_numpy()]
    return labels


def _codes(values: Any, filled: npt.NDArray[np.bool_], _what: str) -> tuple[Indices, list[str]]:
    import pyarrow as pa

    encoded = values.filter(pa.array(filled)).dictionary_encode()  # in the order of first appearance
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _numbers(values: Any, _filled: npt.NDArray[np.bool_], what: str) -> tuple[Indices, list[str]]:
    import pyarrow as pa

    try:
        numbers = values.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise InputError(f"{what} must be a whole number from 0, as in MMRec's files: {error}") from error
    if numbers.min() < 0:
        raise InputError(f"{what} must be a whole number from 0, got {numbers.min()}")
    if numbers.max() >= 10 * len(numbers) + 1000:
        raise InputError(
            f"{what} numbers go up to {numbers.max()} in {len(numbers)} rows: they are ids and no numbers; write the table "
            "as CSV, or give its header RecBole's types"
        )
    return numbers.astype(np.int64), [str(number) for number in range(int(numbers.max()) + 1)]
