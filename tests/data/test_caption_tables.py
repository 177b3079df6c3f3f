"""Tables of captions: their forms, their mistakes, and data sets of the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.captioned import IMAGES, SMALL, encoded, same, tokens, whole, write_lists, write_table
from zoo.data.image_text import ImageTextDataModule
from zoo.errors import InputError


def test_tables_of_other_forms(tmp_path):
    table = write_table(tmp_path)
    expected = whole(ImageTextDataModule(table, **SMALL).train_eval_dataloader())
    rows = pq.ParquetFile(write_lists(tmp_path, nested=True)).read()
    assert same(whole(ImageTextDataModule(f"{tmp_path}/*.parquet", **SMALL).train_eval_dataloader()), expected)
    other = tmp_path / "other"
    other.mkdir()
    names = [f"{number}.png" for number in range(IMAGES)]
    by_name = rows.set_column(0, "file", pa.array(names).dictionary_encode()).rename_columns(["file", "title", "kind"])
    pq.write_table(by_name.slice(0, 5), other / "a.parquet")
    pq.write_table(by_name.slice(5), other / "b.parquet")
    options: dict[str, Any] = {"image_column": "file", "caption_column": "title", "root": str(tmp_path), **SMALL}
    files = [str(other / "a.parquet"), str(other / "b.parquet")]
    assert same(whole(ImageTextDataModule(files, **options).train_eval_dataloader()), expected)
    lines = Path(table).read_text().replace('"', "").replace(",", "\t")
    (other / "c.tsv").write_text(lines)
    assert same(
        whole(ImageTextDataModule(str(other / "c.tsv"), root=str(tmp_path), **SMALL).train_eval_dataloader()), expected
    )


def test_captions_that_look_like_numbers_and_have_line_breaks(tmp_path):
    write_table(tmp_path)
    (tmp_path / "x.csv").write_text('caption,image\n3,0.png\nNA,1.png\n"two\nlines",2.png\n')
    batch = whole(ImageTextDataModule(str(tmp_path / "x.csv"), **SMALL).train_eval_dataloader())
    assert torch.equal(batch["text"], tokens(["3", "NA", "two lines"]))


@pytest.mark.parametrize("row", ["0.png,", ",a cat", '0.png,"  "'])
def test_bad_rows_are_named_or_skipped(tmp_path, row):
    write_table(tmp_path)
    (tmp_path / "x.csv").write_text(f"image,caption\n1.png,one\n{row}\n2.png,two\n")
    with pytest.raises(InputError, match=r"x.csv, row 1: the image or a caption is empty; on_error='skip'"):
        ImageTextDataModule(str(tmp_path / "x.csv"), **SMALL).setup()
    data = ImageTextDataModule(str(tmp_path / "x.csv"), on_error="skip", **SMALL)
    with pytest.warns(UserWarning, match="train: 1 rows without an image or a caption were skipped"):
        data.setup()
    assert torch.equal(whole(data.train_eval_dataloader())["text"], tokens(["one", "two"]))


def test_bad_lists_of_captions(tmp_path):
    captions = [["a"], None, [], ["b", None, " "]]
    pq.write_table(pa.table({"image": [encoded(0)] * 4, "caption": captions}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x.parquet, row 1: the image or a caption is empty"):
        ImageTextDataModule(str(tmp_path / "x.parquet"), **SMALL).setup()
    data = ImageTextDataModule(str(tmp_path / "x.parquet"), on_error="skip", **SMALL)
    with pytest.warns(UserWarning, match="train: 3 rows"):
        data.setup()
    assert torch.equal(whole(data.train_eval_dataloader())["text"], tokens(["a", "b"]))


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "a/../../secret.png", "..", "a/b/../../../root2/x"]
)
def test_bad_names_that_lead_out_of_root(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(0))
    (root / "x.csv").write_text(f"image,caption\n{name},a\n")
    with pytest.raises(InputError, match=r"the image '.*' lies outside of root="):
        ImageTextDataModule(str(root / "x.csv"), **SMALL).setup()


def test_names_below_root(tmp_path):
    (tmp_path / "a..b").mkdir()
    (tmp_path / "a..b" / "x.png").write_bytes(encoded(0))
    names = ["a..b/x.png", "q/../a..b/x.png", f"{tmp_path}/a..b/x.png"]
    (tmp_path / "x.csv").write_text("image,caption\n" + "".join(f"{name},a\n" for name in names))
    batch = whole(ImageTextDataModule(str(tmp_path / "x.csv"), **SMALL).train_eval_dataloader())
    assert len(batch["id"]) == 3
    assert torch.equal(batch["image"][0], batch["image"][2])


def test_bad_tables(tmp_path):
    table = write_table(tmp_path)

    def message(match: str, name: str | list[str] = table, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            ImageTextDataModule(name, **{**SMALL, **options}).setup()

    message(r"no column 'images'. Did you mean image.* It has: image, caption, kind", image_column="images")
    message("there is no file", f"{tmp_path}/absent.csv")
    message("there is no file", f"{tmp_path}/absent*.csv")
    message(r"must end in .csv, .tsv, .parquet, .tar", f"{tmp_path}/s.tar.gz")
    message("must name tables or shards, and not both", [table, "s.tar"])
    message("train.csv is no readable table", label_column="caption")
    (tmp_path / "x.csv").write_text("image,caption\n")
    message("x.csv: no rows", f"{tmp_path}/x.csv")
    (tmp_path / "x.csv").write_text("image,caption\na,b,c\n")
    message("x.csv is no readable table with the delimiter ','", f"{tmp_path}/x.csv")
    (tmp_path / "x.csv").write_text("image,caption,kind\na,b,-1\n")
    message("x.csv, row 0: the label must be at least 0, got -1", f"{tmp_path}/x.csv", label_column="kind")
    (tmp_path / "x.parquet").write_bytes(b"x")
    message("x.parquet is no readable parquet file", f"{tmp_path}/x.parquet")
    pq.write_table(pa.table({"image": ["a"], "caption": [1]}), tmp_path / "x.parquet")
    message("the caption column 'caption' must hold texts or lists of texts; it is int64", f"{tmp_path}/x.parquet")
    pq.write_table(pa.table({"image": [3], "caption": ["x"]}), tmp_path / "x.parquet")
    message("the image column 'image' must be binary", f"{tmp_path}/x.parquet")
    pq.write_table(pa.table({"image": ["a"], "caption": [["x"]]}), tmp_path / "x.parquet")
    message("differ in their columns", [f"{tmp_path}/x.parquet", table])
    data = ImageTextDataModule(table, root=str(tmp_path / "elsewhere"), **SMALL)
    with pytest.raises(InputError, match=r"elsewhere/\d+.png: the image cannot be decoded: .*No such file"):
        next(iter(data.train_dataloader()))


class _HubData:
    """What `datasets.Dataset` does of what we ask it for."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def select_columns(self, names: list[str]) -> _HubData:
        return _HubData({name: self.columns[name] for name in names})

    def with_format(self, kind: str) -> _HubData:
        assert kind == "arrow"
        return self

    def cast_column(self, name: str, feature: Any) -> _HubData:
        assert feature == "not decoded"
        return self

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return pa.table(self.columns)
        return {name: values[key] for name, values in self.columns.items()}


def test_hub_data_set(monkeypatch, tmp_path):
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> _HubData:
        calls.append((name, config, split, revision))
        if split == "absent":
            raise ValueError("Unknown split")
        rows = pq.read_table(write_lists(tmp_path, nested=True)).to_pydict()
        return _HubData(rows)

    fake: Any = ModuleType("datasets")
    fake.load_dataset = load_dataset
    fake.Image = lambda *, decode: "decoded" if decode else "not decoded"
    monkeypatch.setitem(sys.modules, "datasets", fake)
    options: dict[str, Any] = {"hub_dataset": "me/pets", "hub_revision": "abc", "label_column": "kind", **SMALL}
    batch = whole(ImageTextDataModule("train", **options).train_eval_dataloader())
    expected = ImageTextDataModule(write_table(tmp_path), label_column="kind", **SMALL).train_eval_dataloader()
    assert same(batch, whole(expected))
    assert calls == [("me/pets", None, "train", "abc")]
    with pytest.raises(InputError, match="hub_dataset 'me/pets', split 'absent' cannot be had: Unknown split"):
        ImageTextDataModule("absent", **options).setup()
    with pytest.raises(InputError, match="train must name one split of me/pets"):
        ImageTextDataModule(["a", "b"], **options).setup()


def test_bad_hub_data_set_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hub_dataset needs .*pip install 'lightning-zoo\[datasets\]'"):
        ImageTextDataModule("train", hub_dataset="me/pets", **SMALL).setup()
