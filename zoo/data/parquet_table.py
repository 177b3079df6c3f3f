"""Images and labels in the columns of parquet files, as Hugging Face `datasets` writes them."""

from __future__ import annotations

import glob
import io
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import numpy as np

from zoo.data.transforms import naming_image
from zoo.errors import InputError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ParquetTable", "parquet_files"]

_HUB = "hf://"
_HUB_NAME = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<path>[^@]+\.parquet)(@(?P<trailing>.+))?"
)


def _download(name: str) -> str:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    match = _HUB_NAME.fullmatch(name)
    if match is None or (match["revision"] and match["trailing"]):
        raise InputError(f"{name!r} is no Hub file; expected hf://datasets/owner/name/path.parquet[@revision]")
    revision = match["trailing"] or (unquote(match["revision"]) if match["revision"] else None)
    try:
        return huggingface_hub.hf_hub_download(match["repo"], match["path"], repo_type="dataset", revision=revision)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{name} cannot be had from the Hub: {error}") from error


def parquet_files(argument: str, names: str | Sequence[str]) -> list[str]:
    """Find the local files that names stand for, downloading those of the Hub.

    Args:
        argument: the argument that holds the names, for messages.
        names: paths, patterns with ``*``, or ``hf://datasets/owner/name/path.parquet[@revision]``; one or several.

    Returns:
        Paths; those of a pattern in sorted order.

    Raises:
        InputError: a file does not exist or cannot be downloaded, a pattern matches none, or there are no names.
    """
    files: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name.startswith(_HUB):
            files.append(_download(name))
        elif glob.has_magic(name) and not Path(name).exists():
            matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            if not matches:
                raise InputError(f"{argument}: no file matches {name!r}")
            files += matches
        elif Path(name).is_file():
            files.append(name)
        elif Path(name).is_dir():
            raise InputError(
                f"{argument}: {name!r} is a folder; name its files, for example {name.rstrip('/')}/*.parquet"
            )
        else:
            raise InputError(f"{argument}: there is no file {name!r}")
    if not files:
        raise InputError(f"{argument} must name at least one parquet file, got {names!r}")
    return files


class ParquetTable:
    """The image and label columns of some parquet files, one after the other.

    The encoded images stay in Arrow's memory as the files hold them, and each is decoded when it is asked for. Worker
    processes that are forked share that memory; to one that is spawned only the file names go, and it reads the files again.

    Args:
        files: paths of the files.
        image_column: column of encoded images (PNG, JPEG, …): binary, or a struct with a binary field ``bytes``.
        label_column: column of integers or strings.

    Raises:
        InputError: a file is no parquet file, or lacks a column, or the image column has another type, or there are no rows.
    """

    def __init__(self, files: Sequence[str], image_column: str, label_column: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files = list(files)
        self.image_column = image_column
        self.label_column = label_column
        self._chunks: list[Any] | None = None
        rows = []
        for file in self.files:
            try:
                schema, metadata = pq.read_schema(file), pq.read_metadata(file)
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(f"{file} is no readable parquet file: {error}") from error
            rows.append(metadata.num_rows)
            for column in (image_column, label_column):
                if column not in schema.names:
                    near = nearest(column, schema.names)
                    raise InputError(f"{file} has no column {column!r}.{near} It has: {', '.join(schema.names)}")
            self._image_field(schema, file)
        if sum(rows) == 0:
            raise InputError(f"{', '.join(self.files)}: no rows")
        self._ends = np.cumsum(rows).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": None}

    def _image_field(self, schema: Any, file: str) -> str:
        """Return the name of the column, or column.bytes for a struct."""
        from pyarrow import types

        kind, name = schema.field(self.image_column).type, self.image_column
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind, name = kind.field("bytes").type, f"{name}.bytes"
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise InputError(
                f"{file}: the image column {self.image_column!r} must be binary, or a struct with a binary field 'bytes'; "
                f"it is {schema.field(self.image_column).type}"
            )
        return name

    def place(self, row: int) -> str:
        """Say where a row is.

        Args:
            row: position in all files, from 0.

        Returns:
            Its file and its position there, from 0.
        """
        which = bisect_right(self._ends, row)
        return f"{self.files[which]}, row {row - (self._ends[which - 1] if which else 0)}"

    def _images(self) -> tuple[list[Any], list[int]]:
        if self._chunks is None:
            import pyarrow.parquet as pq

            self._chunks = []
            for file in self.files:
                parquet = pq.ParquetFile(file, memory_map=True)
                field = self._image_field(parquet.schema_arrow, file)
                column = parquet.read(columns=[field]).column(0)
                nested = field != self.image_column
                self._chunks += [chunk.field("bytes") if nested else chunk for chunk in column.chunks]
            self._chunk_ends = np.cumsum([len(chunk) for chunk in self._chunks]).tolist()
        return self._chunks, self._chunk_ends

    def read(self) -> None:
        """Read the encoded images into memory now, so that processes forked later share them."""
        self._images()

    def image(self, row: int) -> Image:
        """Decode one image.

        Args:
            row: position in all files, from 0.

        Returns:
            The image, mode RGB.

        Raises:
            InputError: the row holds no image, or one that cannot be decoded.
        """
        from PIL import Image

        chunks, ends = self._images()
        which = bisect_right(ends, row)
        value = chunks[which][row - (ends[which - 1] if which else 0)]
        if not value.is_valid:
            raise InputError(f"{self.place(row)}: the image column {self.image_column!r} holds no bytes")
        with naming_image(self.place, row):
            return Image.open(io.BytesIO(value.as_buffer())).convert("RGB")

    def labels(self) -> list[int] | list[str]:
        """Read the label column.

        Returns:
            A label for each row.

        Raises:
            InputError: a label is missing, or labels are neither integers nor strings.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq
        from pyarrow import types

        found: list[Any] = []
        for file in self.files:
            column = pq.ParquetFile(file).read(columns=[self.label_column]).column(0)
            if types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            kinds = (types.is_integer, types.is_string, types.is_large_string)
            if not any(check(column.type) for check in kinds) and not pa.types.is_null(column.type):
                raise InputError(
                    f"{file}: the label column {self.label_column!r} must hold integers or strings; it is {column.type}"
                )
            found += column.to_pylist()
        if None in found:
            raise InputError(f"{self.place(found.index(None))}: the label column {self.label_column!r} is null")
        if len({type(label) for label in found}) > 1:
            raise InputError(
                f"the label column {self.label_column!r} holds integers in one file and strings in another"
            )
        return found

    def declared_names(self) -> list[str] | None:
        """Return the class names that Hugging Face `datasets` wrote into the first file, None if there are none."""
        import pyarrow.parquet as pq

        text = (pq.read_schema(self.files[0]).metadata or {}).get(b"huggingface")
        if text is None:
            return None
        feature = json.loads(text).get("info", {}).get("features", {}).get(self.label_column, {})
        return cast("list[str] | None", feature.get("names"))
