"""Features of items that a network computes from images or texts, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.data.caption_images import PathImages
from zoo.data.input_digests import digest
from zoo.data.item_features import FeatureSource
from zoo.errors import InputError, nearest

__all__ = ["TowerFeatures"]

_FORMAT = 1
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class TowerFeatures(NamedTuple):
    """One modality of a table of items, and the network that reads it.

    Images are files below the folder of the table. The features are those of `zoo.towers.create(name, embedding=True)` in
    eval mode: for open_clip the embedding of the image or text, for timm the input of the classifier. They are computed
    once and then read from the cache, whose name is a hash of the table, the column, the size and time of each image, and
    the tower. A tower without weights of its own starts at random, from one seed.
    """

    name: str  # the modality
    table: str  # .csv, .tsv or .parquet with a row for each item
    column: str  # of texts, or of names of images
    id_column: str
    tower: str
    modality: str = "image"  # what the column holds: "image" or "text"
    batch_size: int = 64
    cache: str | None = None  # folder of the cache; None takes .features beside the table

    def source(self, *, progress: bool = True) -> FeatureSource:
        """Read the features from the cache, or compute and keep them.

        Args:
            progress: show a bar while they are computed.

        Raises:
            InputError: the table cannot be read or lacks a column, an image cannot be decoded, or the tower cannot be built
                or reads something else.
        """
        from safetensors.torch import load_file, save

        ids, contents = self._read()
        path = (
            Path(self.cache or Path(self.table).parent / ".features")
            / f"{self.name}-{self._key(contents)[:32]}.safetensors"
        )
        if path.is_file():
            return FeatureSource(self.name, str(path), load_file(path)["features"], ids)
        features = self._compute(contents, progress=progress)
        building = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            building.write_bytes(save({"features": features}))
            building.replace(path)  # at once, so that a reader sees a whole file or none
        except OSError as error:
            raise InputError(
                f"the features of {self.name} cannot be kept in {path.parent}: {error}; set cache"
            ) from error
        return FeatureSource(self.name, str(path), features, ids)

    def _read(self) -> tuple[list[str], list[str]]:
        """Return the ids and contents of the rows that have both."""
        import pyarrow as pa
        import pyarrow.csv as pc
        import pyarrow.parquet as pq

        suffix, kinds = Path(self.table).suffix, {each: pa.large_string() for each in (self.id_column, self.column)}
        if suffix not in (*_DELIMITERS, ".parquet"):
            raise InputError(f"{self.name}: a tower reads a .csv, .tsv or .parquet table, got {self.table!r}")
        try:
            if suffix == ".parquet":
                table = pq.read_table(self.table)
            else:
                parse = pc.ParseOptions(delimiter=_DELIMITERS[suffix], newlines_in_values=True)
                table = pc.read_csv(
                    self.table, parse_options=parse, convert_options=pc.ConvertOptions(column_types=kinds)
                )
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{self.name}: {self.table} is no readable table: {error}") from error
        for column in kinds:
            if column not in table.column_names:
                raise InputError(
                    f"{self.name}: {self.table} has no column {column!r}.{nearest(column, table.column_names)} It has: "
                    f"{', '.join(table.column_names)}; choose with feature_fields and item_column"
                )
        columns = [table.column(each).cast(pa.large_string()).to_pylist() for each in kinds]
        rows = [(each, content) for each, content in zip(*columns, strict=True) if each and content and content.strip()]
        if not rows:
            raise InputError(f"{self.name}: {self.table} has no row with both {self.id_column!r} and {self.column!r}")
        ids = [each for each, _ in rows]
        if len(set(ids)) != len(ids):
            raise InputError(f"{self.name}: {self.table} has an item twice; keep one row of each")
        return ids, [content for _, content in rows]

    def _images(self, names: list[str]) -> PathImages:
        import pyarrow as pa

        return PathImages(str(Path(self.table).parent), pa.array(names, pa.large_string()))

    def _key(self, contents: list[str]) -> str:
        facts: dict[str, Any] = {"format": _FORMAT, "table": digest(self.table), "tower": self.tower}
        facts |= {"column": self.column, "ids": self.id_column, "modality": self.modality}
        if self.modality == "image":
            images = self._images(contents)
            try:
                stats = [Path(images.place(row)).stat() for row in range(len(contents))]
            except OSError as error:
                raise InputError(
                    f"{self.name}: the image {error.filename!r} cannot be read: {error.strerror}"
                ) from error
            facts["images"] = [[each.st_size, each.st_mtime_ns] for each in stats]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _compute(self, contents: list[str], *, progress: bool) -> Tensor:
        from tqdm.auto import tqdm

        from zoo import towers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tower = towers.create(self.tower, frozen=True, embedding=True, modality=self._side())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tower.to(device)
        if self.modality == "text":
            tokenizer = tower.tokenizer

            def prepared(start: int) -> Tensor:
                return tokenizer(contents[start : start + self.batch_size])
        else:
            transform, images = tower.transform, self._images(contents)

            def prepared(start: int) -> Tensor:
                rows = range(start, min(start + self.batch_size, len(contents)))
                return torch.stack([transform(images.image(row)) for row in rows])

        parts = []
        starts = range(0, len(contents), self.batch_size)
        for start in tqdm(starts, desc=f"features of {self.name}", leave=False, disable=not progress):
            with torch.inference_mode():
                parts.append(tower.features(prepared(start).to(device)).float().cpu())
        return torch.cat(parts)

    def _side(self) -> str | None:
        """Return the side of a network that has several."""
        return self.modality if self.tower.startswith("open_clip/") else None
