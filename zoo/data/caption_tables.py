"""Images and captions that a table lists: CSV, TSV, parquet, or a data set of Hugging Face `datasets`."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.data.caption_images import HubImages, PathImages, PlacedImages
from zoo.data.parquet_table import ParquetTable, parquet_files
from zoo.data.splits import Indices
from zoo.errors import InputError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CaptionTable", "Columns", "hub_table", "read_table", "table_files"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table.

    Attributes:
        image: names of files, or encoded images.
        caption: texts, or lists of texts.
        label: classes, whole numbers; None if there are none.
    """

    image: str
    caption: str
    label: str | None = None

    def require(self, names: Sequence[str], table: str) -> None:
        """Refuse a table that lacks one.

        Args:
            names: the columns that there are.
            table: the table, for the message.

        Raises:
            InputError: it does.
        """
        for column in (self.image, self.caption, self.label):
            if column is not None and column not in names:
                raise InputError(
                    f"{table} has no column {column!r}.{nearest(column, names)} It has: {', '.join(names)}"
                )


def table_files(argument: str, names: str | Sequence[str]) -> list[str]:
    """Find the local files that names stand for, downloading parquet files of the Hub.

    Args:
        argument: the argument that holds the names, for messages.
        names: CSV, TSV or parquet files: paths, patterns with ``*``, or, for parquet, ``hf://datasets/…``; one or several.

    Returns:
        Paths; those of a pattern in sorted order.

    Raises:
        InputError: a file does not exist or cannot be downloaded, or a pattern matches none.
    """
    files: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name.endswith(".parquet") or name.startswith("hf://"):
            files += parquet_files(argument, name)
            continue
        matches = sorted(glob.glob(name)) if glob.has_magic(name) and not Path(name).exists() else [name]  # noqa: PTH207
        if not matches or not Path(matches[0]).is_file():
            raise InputError(f"{argument}: there is no file {name!r}")
        files += matches
    return files


class CaptionTable:
    """Images by position, each with its captions; picklable.

    Args:
        images: decodes an image, given its number.
        owners: number of the image of each caption (M,), in any order; images without one are left out.
        captions: the captions (M,), an array of pyarrow.
        labels: class of each image by its number, or None.
        skipped: rows that were left out because their image or caption is missing.
    """

    def __init__(
        self, images: PlacedImages, owners: Indices, captions: Any, labels: Indices | None, *, skipped: int = 0
    ) -> None:
        self._images = images
        self._captions = captions
        self._labels = labels
        self._order = np.argsort(owners, kind="stable")
        self._rows, self._starts, self._counts = np.unique(owners[self._order], return_index=True, return_counts=True)
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, row: int) -> Image:
        """Decode an image, mode RGB.

        Args:
            row: its position, from 0.

        Raises:
            InputError: it cannot be decoded.
        """
        return self._images.image(int(self._rows[row]))

    def captions(self, row: int) -> list[str]:
        """Return the captions of an image, at least one, none of them blank.

        Args:
            row: its position, from 0.
        """
        chosen = self._order[self._starts[row] : self._starts[row] + self._counts[row]]
        return [self._captions[int(each)].as_py().strip() for each in chosen]

    def caption_counts(self, rows: Indices) -> Indices:
        """Return how many captions images have.

        Args:
            rows: their positions (B,).
        """
        return np.asarray(self._counts[rows], dtype=np.int64)

    def place(self, row: int) -> str:
        """Say where an image is.

        Args:
            row: its position, from 0.
        """
        return self._images.place(int(self._rows[row]))

    def label(self, row: int) -> int | None:
        """Return the class of an image; None without labels.

        Args:
            row: its position, from 0.
        """
        return None if self._labels is None else int(self._labels[self._rows[row]])


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _delimited(file: str, columns: Columns) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter=_DELIMITERS[Path(file).suffix], newlines_in_values=True)
    kinds = {columns.image: pa.large_string(), columns.caption: pa.large_string()}
    if columns.label is not None:
        kinds[columns.label] = pa.int64()
    try:
        with csv.open_csv(file, parse_options=parse) as reader:
            columns.require(reader.schema.names, file)
        convert = csv.ConvertOptions(include_columns=list(kinds), column_types=kinds)
        return csv.read_csv(file, parse_options=parse, convert_options=convert)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is no readable table with the delimiter {parse.delimiter!r}: {error}") from error


def _parquet(file: str, columns: Columns) -> Any:
    """Return the table, without the images if it holds them encoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        columns.require(schema.names, file)
        wanted = [columns.caption, *([columns.label] if columns.label else [])]
        if _is_text(schema.field(columns.image).type):
            wanted.append(columns.image)
        return pq.read_table(file, columns=wanted)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is no readable parquet file: {error}") from error


def _unified(table: Any) -> Any:
    """Make texts large strings and lists of texts large lists of those, so that tables can be joined."""
    import pyarrow as pa
    from pyarrow import types

    texts, lists = pa.large_string(), pa.large_list(pa.large_string())
    for number, field in enumerate(table.schema):
        kind = field.type
        nested = types.is_list(kind) or types.is_large_list(kind)
        target = texts if _is_text(kind) else lists if nested and _is_text(kind.value_type) else kind
        table = table.set_column(number, field.name, table.column(number).cast(target))
    return table.replace_schema_metadata(None)


def _captions(table: Any, column: str, place: Callable[[int], str]) -> tuple[Indices, Any]:
    """Return the row and the text of every caption; blank ones are null, and a row without any has one that is null."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import types

    values = table.column(column).combine_chunks()
    owners = np.arange(len(values))
    if types.is_large_list(values.type):
        counts = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
        lonely = np.flatnonzero(counts == 0)
        parents = pc.list_parent_indices(values).to_numpy(zero_copy_only=False).astype(np.int64)
        owners = np.concatenate([parents, lonely])
        values = pa.concat_arrays([pc.list_flatten(values), pa.nulls(len(lonely), pa.large_string())])
    elif not _is_text(values.type):
        raise InputError(
            f"{place(0)}: the caption column {column!r} must hold texts or lists of texts; it is {values.type}"
        )
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), fill_value=True)
    return owners, pc.if_else(blank, pa.scalar(None, pa.large_string()), values)


def _labels(table: Any, column: str | None, place: Callable[[int], str]) -> Indices | None:
    from pyarrow import types

    if column is None:
        return None
    values = table.column(column)
    if not types.is_integer(values.type) or values.null_count:
        raise InputError(f"{place(0)}: the label column {column!r} must hold a whole number in every row")
    labels = np.asarray(values.to_numpy(), dtype=np.int64)
    if labels.min() < 0:
        row = int(np.flatnonzero(labels < 0)[0])
        raise InputError(f"{place(row)}: the label must be at least 0, got {labels[row]}")
    return labels


def _named_images(table: Any, column: str, root: str) -> tuple[PathImages, Indices]:
    """Return the images that a column names, each once, and the number of that of each row; -1 where it is empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = table.column(column).combine_chunks()
    names = pc.if_else(pc.equal(names, ""), pa.scalar(None, pa.large_string()), names).dictionary_encode()
    codes = pc.fill_null(names.indices, -1).to_numpy(zero_copy_only=False)
    return PathImages(root, names.dictionary), codes.astype(np.int64)


def _assembled(
    table: Any,
    columns: Columns,
    images: PlacedImages,
    codes: Indices,
    place: Callable[[int], str],
    *,
    skip: bool,
) -> CaptionTable:
    """Join captions, labels and images; ``codes`` is the number of the image of each row, -1 where it has none."""
    import pyarrow as pa

    owners, captions = _captions(table, columns.caption, place)
    labels = _labels(table, columns.label, place)
    good = captions.is_valid().to_numpy(zero_copy_only=False) & (codes[owners] >= 0)
    bad = np.unique(owners[~good])
    if len(bad) and not skip:
        raise InputError(f"{place(int(bad[0]))}: the image or a caption is empty; on_error='skip' leaves such rows out")
    if not good.any():
        raise InputError(f"{place(0)}: no row has both an image and a caption")
    if labels is not None:  # of several rows with one image, the first decides
        by_image = np.empty(codes.max() + 1, dtype=np.int64)
        by_image[codes[codes >= 0][::-1]] = labels[codes >= 0][::-1]
        labels = by_image
    return CaptionTable(images, codes[owners[good]], captions.filter(pa.array(good)), labels, skipped=len(bad))


def read_table(files: Sequence[str], columns: Columns, *, root: str | None = None, skip: bool = False) -> CaptionTable:
    """Read tables of images and captions.

    Rows that name the same file are captions of one image.

    Args:
        files: CSV, TSV and parquet files.
        columns: the columns to read. In parquet files, images may be encoded (PNG, JPEG, …) instead of named.
        root: folder of the images that are named; None takes that of the first table.
        skip: leave out rows without an image or a caption instead of raising.

    Raises:
        InputError: a file cannot be read or lacks a column, a column holds something else, a name leads out of ``root``, or
            a row is empty.
    """
    import pyarrow as pa

    tables = [
        _unified(_parquet(file, columns) if file.endswith(".parquet") else _delimited(file, columns)) for file in files
    ]
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise InputError(f"{files[0]} and the files beside it differ in their columns: {error}") from error
    if len(table) == 0:
        raise InputError(f"{', '.join(files[:3])}: no rows")
    ends = np.cumsum([len(each) for each in tables]).tolist()

    def place(row: int) -> str:
        which = bisect_right(ends, row)
        return f"{files[which]}, row {row - (ends[which - 1] if which else 0)}"

    if columns.image in table.column_names:
        folder = str(Path(files[0]).parent) if root is None else root
        images, codes = _named_images(table, columns.image, folder)
        return _assembled(table, columns, images, codes, place, skip=skip)
    encoded = ParquetTable(files, columns.image, columns.caption)
    encoded.read()
    return _assembled(table, columns, encoded, np.arange(len(table)), place, skip=skip)


def hub_table(
    name: str,
    split: str,
    columns: Columns,
    *,
    config: str | None = None,
    revision: str | None = None,
    skip: bool = False,
) -> CaptionTable:
    """Read a split of a data set by Hugging Face `datasets`, an optional dependency.

    Args:
        name: the data set, owner/name.
        split: its split, such as ``train`` or ``train[:90%]``.
        columns: the columns to read.
        config: its configuration, if it has several.
        revision: commit, branch or tag.
        skip: leave out rows without a caption instead of raising.

    Raises:
        InputError: `datasets` is not installed, the data set cannot be had, or a column is missing or holds something else.
    """
    try:
        datasets: Any = import_module("datasets")
    except ModuleNotFoundError as error:
        raise InputError(
            f"hub_dataset needs the package {error.name}: pip install 'lightning-zoo[datasets]'. Parquet files of the Hub "
            "can be read without it: train='hf://datasets/owner/name/path.parquet'"
        ) from error
    try:
        data = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # not found, no network; unknown configuration or split
        raise InputError(f"hub_dataset {name!r}, split {split!r} cannot be had: {error}") from error
    source = f"{name}, split {split}"
    columns.require(data.column_names, source)
    wanted = [columns.caption, *([columns.label] if columns.label else [])]
    table = _unified(data.select_columns(wanted).with_format("arrow")[:])
    if len(table) == 0:
        raise InputError(f"{source}: no rows")
    images = HubImages(data.cast_column(columns.image, datasets.Image(decode=False)), columns.image, source)
    return _assembled(table, columns, images, np.arange(len(table)), images.place, skip=skip)
