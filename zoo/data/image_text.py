"""Images with captions from tables, tar shards or the Hub, for contrastive training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from zoo.data.caption_pairs import CaptionSource, ImageTextPairs
from zoo.data.caption_tables import CaptionTable, Columns, hub_table, read_table, table_files
from zoo.data.loading import Batch, ResumableLoader, SplitDataModule, Splits
from zoo.data.splits import Indices, stratified_split
from zoo.data.tar_shards import ShardShuffle, TarShards, shard_files
from zoo.data.text import OpenClipTokens
from zoo.data.transforms import IMAGENET_MEAN, IMAGENET_STD, timm_transform
from zoo.errors import InputError, require_choice

__all__ = ["ImageTextDataModule"]

_KINDS = {".csv": "table", ".tsv": "table", ".parquet": "table", ".tar": "tar"}
# What open_clip trains and evaluates with: captions speak of colours and of left and right.
_TRAIN = {"scale": (0.9, 1.0), "hflip": 0.0, "color_jitter": None, "interpolation": "bicubic"}
_EVAL = {"crop_pct": 1.0, "interpolation": "bicubic"}


class ImageTextDataModule(SplitDataModule):
    r"""Images with captions: from tables, from tar shards in webdataset's layout, or from the Hub.

    A batch is a dict: "image" (B, 3, H, W), "text" (B, L), the tokens of a caption, "id" (B,), the number of the image in
    its source, and "label" (B,) with ``label_column``. An image with several captions comes once an epoch in training, with
    one of them drawn; in evaluation it comes with each.

    - **Tables** (.csv, .tsv, .parquet, also ``hf://datasets/owner/name/path.parquet``): a column names files below ``root``
      or, in parquet, holds encoded images, the other holds a caption or a list of captions. Rows that name one file are
      captions of one image.
    - **Shards** (.tar, ``shards-{0000..0099}.tar``): ``0001.jpg`` (or jpeg, png, webp) beside ``0001.txt``, or ``0001.json``
      with a field for the caption. They are local and not compressed. Their headers are read first, some 15,000 members a
      second: half an hour for 12 million samples. ``index_dir`` keeps what was found, so that this happens once. A process
      needs some 70 bytes of memory a sample. An epoch mixes ``shuffle_shards`` shards at a time, and each process reads its
      own shards.
    - **Hub data sets** by Hugging Face `datasets` (``pip install 'lightning-zoo[datasets]'``): ``hub_dataset``; then
      ``train``, ``val`` and ``test`` name its splits.

    Whatever the source, a run resumed in the middle of an epoch goes on with the batch that it would have seen next, and all
    processes have equally many batches.

    Args:
        train: table, shards or pattern with ``*``, or a list of those of one kind; or the split of ``hub_dataset``.
        val: the same for the validation split; None takes ``val_share`` of the training images.
        test: the same for the test split; None if there is none.
        hub_dataset: data set of the Hub, owner/name, to be read by `datasets`.
        hub_config: its configuration, if it has several.
        hub_revision: its commit, branch or tag.
        root: folder of the images that a table names; None takes the folder of the table. Names cannot lead out of it.
        image_column: column of the images. Shards have none.
        caption_column: column of the captions, ``caption`` by default. In shards, the field of the JSON member; by default
            the text is taken and, where there is none, the field ``caption``.
        label_column: column (in shards: field of the JSON member, or ``cls`` for the member of that ending) of the classes,
            whole numbers; None if there are none.
        class_names: name of each class in the order of the labels, for evaluation by prompts.
        tokenizer: a model of open_clip, whose tokenizer is used.
        context_length: tokens of a caption, that of the text tower; longer captions are cut. None takes the model's.
        image_size: side of the images in pixels that the model sees.
        eval_captions: in evaluation, "all" captions of each image (one item each) or the "first".
        on_error: what to do about an image or caption that is missing or cannot be decoded: "raise" an error that names it,
            or "skip" it, with warnings that count. In training the next sample that can be read takes the place of a
            skipped one, so that batches stay full.
        index_dir: folder for the indexes of shards, for the next run; None keeps none.
        shuffle_shards: shards that are mixed at a time, at least 1.
        batch_size: pairs in a batch and process, at least 1.
        num_workers: processes that decode the images; 0 decodes in the training process.
        val_share: share of the training images for validation, in [0, 1), if ``val`` is None.
        split_seed: number of the split.
        seed: number of the training order, of the augmentations and of the choice of captions.
        mean: mean of each channel in [0, 1], as the image tower expects it; ImageNet's by default.
        std: standard deviation of each channel; ImageNet's by default.
        train_transform: options of timm's training transform. Without others, a crop of 90 to 100 % of the image and neither
            flips nor colour jitter, as open_clip trains.
        eval_transform: options of timm's evaluation transform; by default the whole short side, bicubic.
        drop_last: leave out a last training batch that is not full.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Raises:
        InputError: an argument is out of its range or an option unknown. When the data are read: a file or column is missing
            or holds something else; with ``on_error="raise"``, the batch of a sample that cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (40, 30)).save(folder / "cat.png")
        >>> _ = (folder / "train.csv").write_text("image,caption\ncat.png,a cat\ncat.png,a small cat\n")
        >>> data = ImageTextDataModule(str(folder / "train.csv"), image_size=32, context_length=8)
        >>> batch = next(iter(data.train_dataloader()))
        >>> {name: tuple(value.shape) for name, value in batch.items()}
        {'image': (1, 3, 32, 32), 'text': (1, 8), 'id': (1,)}
        >>> next(iter(data.train_eval_dataloader()))["text"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        train: str | list[str],
        *,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        hub_dataset: str | None = None,
        hub_config: str | None = None,
        hub_revision: str | None = None,
        root: str | None = None,
        image_column: str = "image",
        caption_column: str | None = None,
        label_column: str | None = None,
        class_names: list[str] | None = None,
        tokenizer: str = "ViT-B-32",
        context_length: int | None = None,
        image_size: int = 224,
        eval_captions: Literal["all", "first"] = "all",
        on_error: Literal["raise", "skip"] = "raise",
        index_dir: str | None = None,
        shuffle_shards: int = 16,
        batch_size: int = 64,
        num_workers: int = 0,
        val_share: float = 0.0,
        split_seed: int = 0,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        train_transform: dict[str, Any] | None = None,
        eval_transform: dict[str, Any] | None = None,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last, pin_memory=pin_memory
        )
        for name, value, known in (
            ("eval_captions", eval_captions, ("all", "first")),
            ("on_error", on_error, ("raise", "skip")),
        ):
            require_choice(name, value, known)
        if shuffle_shards < 1:
            raise InputError(f"shuffle_shards must be at least 1, got {shuffle_shards}")
        self.names = {"train": train, "val": val, "test": test}
        self.hub_dataset = hub_dataset
        self.hub_config = hub_config
        self.hub_revision = hub_revision
        self.root = root
        self.image_column = image_column
        self.caption_column = caption_column
        self.label_column = label_column
        self.tokenize = OpenClipTokens(tokenizer, context_length)
        self.eval_captions = eval_captions
        self.skip = on_error == "skip"
        self.index_dir = index_dir
        self.shuffle_shards = shuffle_shards
        self.val_share = val_share
        self.split_seed = split_seed
        self.mean = list(mean)
        self.std = list(std)
        normal = {"mean": mean, "std": std}
        self._train_transform = timm_transform(
            image_size, train=True, **normal, options={**_TRAIN, **(train_transform or {})}
        )
        self._eval_transform = timm_transform(
            image_size, train=False, **normal, options={**_EVAL, **(eval_transform or {})}
        )
        self._class_names = class_names or []

    @property
    def class_names(self) -> list[str]:
        """Name of each class in the order of the labels, as given; empty if none were."""
        return list(self._class_names)

    def prepare_data(self) -> None:
        """Download what is on the Hub, and index the shards if ``index_dir`` keeps it; in one process only."""
        for argument, names in self.names.items():
            if names is None:
                continue
            if self._kind(argument, names) != "tar":
                self._source(argument, names) if self.hub_dataset else table_files(argument, names)
            elif self.index_dir is not None:
                self._source(argument, names)

    def _kind(self, argument: str, names: str | list[str]) -> str:
        """Return "hub", "tar" or "table"."""
        if self.hub_dataset is not None:
            return "hub"
        kinds = set()
        for name in [names] if isinstance(names, str) else names:
            kind = "table" if name.startswith("hf://") else _KINDS.get(Path(name).suffix)
            if kind is None:
                raise InputError(f"{argument}: {name!r} must end in {', '.join(_KINDS)}")
            kinds.add(kind)
        if len(kinds) != 1:
            raise InputError(f"{argument} must name tables or shards, and not both, got {names!r}")
        return kinds.pop()

    def _source(self, argument: str, names: str | list[str]) -> CaptionTable | TarShards:
        kind = self._kind(argument, names)
        if kind == "tar":
            return TarShards(
                shard_files(argument, names),
                caption_field=self.caption_column,
                label_field=self.label_column,
                index_dir=self.index_dir,
            )
        columns = Columns(self.image_column, self.caption_column or "caption", self.label_column)
        if kind == "table":
            table = read_table(table_files(argument, names), columns, root=self.root, skip=self.skip)
        elif self.hub_dataset is not None and isinstance(names, str):
            options = {"config": self.hub_config, "revision": self.hub_revision}
            table = hub_table(self.hub_dataset, names, columns, skip=self.skip, **options)
        else:
            raise InputError(f"{argument} must name one split of {self.hub_dataset}, got {names!r}")
        if table.skipped:
            warnings.warn(f"{argument}: {table.skipped} rows without an image or a caption were skipped", stacklevel=2)
        return table

    def _load(self) -> Splits:
        self.tokenize.load()
        train = self.names["train"]
        assert train is not None
        source = self._source("train", train)
        held_out, rest = np.arange(0), np.arange(len(source))
        if self.names["val"] is None:
            shares = {"val_share": self.val_share}
            held_out, rest = stratified_split(np.zeros(len(source)), shares, seed=self.split_seed)

        def own(argument: str) -> ImageTextPairs | None:
            names = self.names[argument]
            if names is None:
                return None
            other = self._source(argument, names)
            return self._pairs(other, np.arange(len(other)))

        return Splits(
            train=self._pairs(source, rest, train=True),
            train_eval=self._pairs(source, rest),
            val=self._pairs(source, held_out) if len(held_out) else own("val"),
            test=own("test"),
        )

    def _pairs(self, source: CaptionSource, rows: Indices, *, train: bool = False) -> ImageTextPairs:
        return ImageTextPairs(
            source,
            rows,
            self._train_transform if train else self._eval_transform,
            self.tokenize,
            seed=self.seed if train else None,
            every_caption=self.eval_captions == "all",
            skip=self.skip,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training split, shuffled (shards: some at a time), under the training transform.

        Raises:
            InputError: ``drop_last`` leaves no batch.
        """
        loader = super().train_dataloader()
        data: Any = self.splits.train
        if not isinstance(data.source, TarShards):
            return loader
        shards = data.source.shard_of[data.rows]
        sampler = ShardShuffle(shards, window=self.shuffle_shards, **self._process(), seed=self.seed)
        return self._loader(ResumableLoader, data, sampler)
