"""Interactions of users and items, and features of the items, from files: what multimodal recommenders train on."""

from __future__ import annotations

import warnings
from pathlib import Path

from zoo.data.id_names import read_id_names
from zoo.data.input_digests import checked_digests
from zoo.data.interaction_loading import Interactions, InteractionsDataModule, UntrainedRule, split_pairs
from zoo.data.interaction_preparation import GapRule, RepeatRule, require_numbers, split_table
from zoo.data.interaction_splits import SplitRule
from zoo.data.interaction_tables import (
    InteractionColumns,
    InteractionTable,
    interaction_file,
    read_interactions,
)
from zoo.data.item_features import FeatureSource, MissingRule, align_features, read_feature_source
from zoo.data.item_towers import TowerFeatures
from zoo.errors import InputError, nearest

__all__ = ["MultimodalInteractionsDataModule"]

_FEATURES = "_feat.npy"
_ITEM, _USER_NAMES, _ITEM_NAMES = "item_id", "u_id_mapping.csv", "i_id_mapping.csv"


class MultimodalInteractionsDataModule(InteractionsDataModule):
    """Interactions with one or more modalities of item features, for training on pairs and ranking among all items.

    ``source`` is one of
    - a folder of MMRec: ``name.inter`` with numbers from 0 as ids, whose column ``x_label`` is the split, and files
      ``image_feat.npy``, ``text_feat.npy``, … whose row i is item i; ids from ``u_id_mapping.csv`` and
      ``i_id_mapping.csv`` if they are there;
    - an .inter file of RecBole, whose header has types (``user_id:token``);
    - a CSV, TSV or parquet file.

    After ``setup()``: ``num_users``, ``num_items``; ``user_ids`` and ``item_ids``, the ids of the files by number;
    ``features``, ``{modality: (I, D)}`` float32, and ``present``, ``{modality: (I,)}`` bool, in the order of
    ``feature_files``; ``interactions``, ``{"train", "val", "test"}`` with
    (2, N) int64 each; ``sha256``. Training batches are dicts of ``user``, ``positive``, ``negative``, (B,) each with B at
    least 2. Batches of evaluation are dicts of ``user`` (B,) and ``held_out``, a `zoo.interaction_graph.PairLists`; each
    user once over all processes. See `zoo.data.interaction_loading` for the rules.

    A split of our own drops rows without a user, an item or (where there is the column) a time, then exact duplicates, then
    all that is outside of the k-core, numbers users and items in the order of their first appearance, and splits.

    Args:
        source: folder or file, see above.
        feature_files: file of each modality, see `zoo.data.item_features.read_feature_source`: .npy, .npz, .safetensors or
            .parquet; for a modality of a tower a table of items, .csv, .tsv or .parquet. None takes all ``*_feat.npy`` of
            the folder in the order of their names. By row means that item r has row r: its id is that number.
        feature_fields: array, tensor or column of a modality; None takes the only one, or that of the modality's name.
        feature_ids: for a file by row, a file with the id of each row: .npy, or a text with one a line.
        image_towers: tower of modalities whose column in ``feature_files`` names images below the table's folder, such as
            ``{"image": "timm/vit_base_patch16_224.augreg_in21k"}``.
        text_towers: the same for columns of texts, such as ``{"text": "open_clip/ViT-B-32/laion2b_s34b_b79k"}``.
        feature_cache: folder for the towers' features; None takes ``.features`` beside the table of items.
        missing: whether an item may lack a modality, because it has no row or one of zeros.
        user_column: column of the users; None takes ``userID`` or ``user_id``.
        item_column: column of the items, also in tables of features; None takes ``itemID`` or ``item_id``.
        time_column: column of the time, numbers or dates; None takes ``timestamp`` if there is one.
        split_column: column of the split; None takes ``x_label`` if there is one.
        split: rule of a split of our own, instead of the file's: ``"random"`` (about 8 : 1 : 1 for each user, MMRec's),
            ``"temporal"`` (8 : 1 : 1 by time over all) or ``"leave_one_out"`` (each user's last two). None takes the file's.
        split_seed: number of the random split and of the choice for ``train_samples``.
        k_core: with a rule, keep users and items with at least so many interactions, repeated until all have; 0 keeps all.
            MMRec's sets have 5.
        duplicates: what a user and an item that meet several times are: an error, or the ``"first"`` counts (of a file's
            split: the training one).
        gaps: in files with numbers as ids, whether a number without an interaction, or a row of features behind the last
            number, is an error or a user or item of its own.
        untrained: users in validation or test without a training interaction: left out there with a warning, or an error.
        train_samples: keep so many training interactions; None keeps all. Validation and test keep the users who train.
        sha256: expected SHA-256 of input files by name. The attribute holds those of all input files once they are read.
        progress: show a bar while a tower computes features.
        batch_size: interactions in a training batch and process, at least 2.
        eval_batch_size: users in a batch of evaluation and process, at least 1.
        seed: number of the training order and of the negatives.
        num_workers: processes that read the data; 0 is fastest, the data are in memory.
        drop_last: leave out a last training batch that is not full; one of a single row is always left out.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Raises:
        InputError: an argument is out of its range. When the data are read: a file is missing or holds something else, or
            the checks above fail.

    Example:
        >>> import tempfile
        >>> from zoo.data.synthetic_interactions import synthetic_interactions
        >>> folder = tempfile.mkdtemp()
        >>> synthetic_interactions(num_users=30, num_items=40, seed=0).write(folder)
        >>> data = MultimodalInteractionsDataModule(folder, batch_size=16)
        >>> {name: matrix.shape for name, matrix in data.features.items()}
        {'image': torch.Size([40, 64]), 'text': torch.Size([40, 32])}
        >>> {name: rows.shape for name, rows in next(iter(data.train_dataloader())).items()}
        {'user': torch.Size([16]), 'positive': torch.Size([16]), 'negative': torch.Size([16])}
    """

    def __init__(
        self,
        source: str,
        *,
        feature_files: dict[str, str] | None = None,
        feature_fields: dict[str, str] | None = None,
        feature_ids: dict[str, str] | None = None,
        image_towers: dict[str, str] | None = None,
        text_towers: dict[str, str] | None = None,
        feature_cache: str | None = None,
        missing: MissingRule = "allow",
        user_column: str | None = None,
        item_column: str | None = None,
        time_column: str | None = None,
        split_column: str | None = None,
        split: SplitRule | None = None,
        split_seed: int = 0,
        k_core: int = 0,
        duplicates: RepeatRule = "error",
        gaps: GapRule = "error",
        untrained: UntrainedRule = "drop",
        train_samples: int | None = None,
        sha256: dict[str, str] | None = None,
        progress: bool = True,
        batch_size: int = 2048,
        eval_batch_size: int = 4096,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )
        choices = {
            "missing": (missing, ("allow", "error")),
            "split": (split, (None, "random", "temporal", "leave_one_out")),
            "duplicates": (duplicates, ("error", "first")),
            "gaps": (gaps, ("error", "allow")),
            "untrained": (untrained, ("drop", "error")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if k_core < 0 or (k_core and split is None):
            raise InputError(f"k_core must be at least 0, and 0 without a rule in split, got {k_core}")
        self.source = source
        self._given_files = feature_files
        self._found_files: dict[str, str] = {}
        # As the card shows them: without their folders.
        self.feature_files = feature_files and {name: Path(path).name for name, path in feature_files.items()}
        self.feature_ids = {name: Path(path).name for name, path in (feature_ids or {}).items()}
        self.feature_fields = feature_fields or {}
        self._feature_ids = feature_ids or {}
        self.image_towers = image_towers or {}
        self.text_towers = text_towers or {}
        self.feature_cache = feature_cache
        self.missing: MissingRule = missing
        self.user_column = user_column
        self.item_column = item_column
        self.time_column = time_column
        self.split_column = split_column
        self.split: SplitRule | None = split
        self.split_seed = split_seed
        self.k_core = k_core
        self.duplicates: RepeatRule = duplicates
        self.gaps: GapRule = gaps
        self.untrained: UntrainedRule = untrained
        self.train_samples = train_samples
        self.sha256 = dict(sha256 or {})
        self.progress = progress

    def prepare_data(self) -> None:
        """Compute the features of towers that are not in the cache; Lightning calls it in one process of a machine."""
        for tower in self._towers().values():
            tower.source(progress=self.progress)

    @property
    def _files(self) -> dict[str, str]:
        """The file of each modality, looked for at the first use: a recipe may be read where its data are not."""
        if not self._found_files:
            given = self._given_files
            if given is None and Path(self.source).is_dir():
                found = sorted(Path(self.source).glob(f"*{_FEATURES}"))
                given = {path.name.removesuffix(_FEATURES): str(path) for path in found}
            if not given:
                interaction_file(self.source)  # which is missing, more often than the features alone
                raise InputError("feature_files must name a file for at least one modality: {'image': 'image.npy'}")
            self._check_modalities(given)
            self._found_files = dict(given)
        return self._found_files

    def _check_modalities(self, files: dict[str, str]) -> None:
        for argument in ("feature_fields", "feature_ids", "image_towers", "text_towers"):
            for name in getattr(self, argument):
                if name not in files:
                    raise InputError(
                        f"{argument} has {name!r}, which is none of feature_files.{nearest(name, files)} They are: "
                        f"{', '.join(files)}"
                    )
        for name in (*self.image_towers, *self.text_towers):
            if name in self._feature_ids or (name in self.image_towers and name in self.text_towers):
                raise InputError(f"{name!r} must have either one tower or feature_ids")

    def _towers(self) -> dict[str, TowerFeatures]:
        both = {name: ("image", tower) for name, tower in self.image_towers.items()}
        both |= {name: ("text", tower) for name, tower in self.text_towers.items()}
        return {
            name: TowerFeatures(
                name=name,
                table=self._files[name],
                column=self.feature_fields.get(name, name),
                id_column=self.item_column or _ITEM,
                tower=tower,
                modality=modality,
                cache=self.feature_cache,
            )
            for name, (modality, tower) in both.items()
        }

    def _sources(self) -> dict[str, FeatureSource]:
        towers = self._towers()
        return {
            name: towers[name].source(progress=self.progress)
            if name in towers
            else read_feature_source(
                name,
                path,
                field=self.feature_fields.get(name),
                ids=self._feature_ids.get(name),
                id_column=self.item_column or _ITEM,
            )
            for name, path in self._files.items()
        }

    def _read(self) -> Interactions:
        file = interaction_file(self.source)
        beside = [path for path in map(Path(file).with_name, (_USER_NAMES, _ITEM_NAMES)) if path.is_file()]
        given = [path for path in (*self._files.values(), *self._feature_ids.values()) if Path(path).is_file()]
        self.sha256 = checked_digests([file, *beside, *given], self.sha256)
        columns = InteractionColumns(self.user_column, self.item_column, self.time_column, self.split_column)
        whole = read_interactions(file, columns)
        table, labels = split_table(whole, self.split, k=self.k_core, seed=self.split_seed, repeats=self.duplicates)
        pairs, lacking = split_pairs(
            table.users,
            table.items,
            labels,
            train_samples=self.train_samples,
            split_seed=self.split_seed,
            untrained=self.untrained,
        )
        if lacking and self.train_samples is None:
            warnings.warn(
                f"{lacking} users have interactions in validation or test, but none in training: they are left out there",
                stacklevel=2,
            )
        sources = self._sources()
        rows = self._items(table, sources)
        user_ids, item_ids = table.user_ids, rows
        if whole.numbered:
            user_ids = _named(user_ids, Path(file).with_name(_USER_NAMES), len(whole.user_ids))
            item_ids = _named(rows, Path(file).with_name(_ITEM_NAMES), max(len(whole.item_ids), len(rows)))
        features, present = {}, {}
        for name, source in sources.items():
            ids = rows if source.ids is None else item_ids
            features[name], present[name] = align_features(source, ids, missing=self.missing)
        return Interactions(pairs=pairs, features=features, present=present, user_ids=user_ids, item_ids=item_ids)

    def _items(self, table: InteractionTable, sources: dict[str, FeatureSource]) -> list[str]:
        """Return the ids of the items; where they are numbers of rows, as many as there are rows."""
        if not table.numbered:
            return table.item_ids
        if self.gaps == "error":
            require_numbers(table)
        count = len(table.item_ids)
        by_row = {name: source for name, source in sources.items() if source.ids is None}
        for name, source in by_row.items():
            rows = len(source.values)
            if rows < count or (rows > count and self.gaps == "error"):
                remedy = "; gaps='allow' takes rows behind the last as items of their own" if rows > count else ""
                raise InputError(
                    f"{name}: {source.path} has {rows} rows for {count} items, which are numbered up to {count - 1}: there "
                    f"must be one for each{remedy}"
                )
        return [str(number) for number in range(max([count, *(len(source.values) for source in by_row.values())]))]


def _named(numbers: list[str], file: Path, count: int) -> list[str]:
    """Return the ids that a file gives to numbers; the numbers if there is no file."""
    if not file.is_file():
        return numbers
    names = read_id_names(str(file), count)
    return [names[int(number)] for number in numbers]
