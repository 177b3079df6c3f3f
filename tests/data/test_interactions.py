"""Interactions from every format, with their features."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from tests.data.interaction_files import FEATURES, ROWS, rows_of, write_mmrec
from zoo import run_facts
from zoo.data import MultimodalInteractionsDataModule, item_features
from zoo.errors import InputError

NAMES = ("train", "val", "test")


def expected(split: str, user: str = "{}", item: str = "{}") -> list[tuple[str, str]]:
    return [(user.format(u), item.format(i)) for u, i, _, label in ROWS if NAMES[label] == split]


def table(**columns: list[Any]) -> pa.Table:
    users, items, times, labels = zip(*ROWS, strict=True)
    made = {
        "who": [f"u{u}" for u in users],
        "what": [f"i{i}" for i in items],
        "when": list(times),
        "part": list(labels),
    }
    return pa.table({**made, **columns})


OWN = {"user_column": "who", "item_column": "what", "time_column": "when", "split_column": "part"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mmrec(tmp_path)
    return tmp_path


@pytest.fixture
def own(folder: Path) -> dict[str, Any]:
    """Arguments for tables of one's own: features by row, with ids in another order."""
    (folder / "toy.inter").unlink()
    np.save(folder / "by_id.npy", FEATURES["image"][[2, 0, 3, 1]])
    (folder / "ids.txt").write_text("i2\ni0\ni3\ni1\n")
    return {
        "feature_files": {"image": str(folder / "by_id.npy")},
        "feature_ids": {"image": str(folder / "ids.txt")},
        **OWN,
    }


def module(source: Path | str, **options: Any) -> MultimodalInteractionsDataModule:
    data = MultimodalInteractionsDataModule(str(source), **options)
    data.setup()
    return data


def test_mmrec_folder(folder):
    data = module(folder)
    assert (data.num_users, data.num_items) == (3, 4)
    assert data.user_ids == ["0", "1", "2"]
    assert list(data.features) == ["image", "text"]
    for name, values in FEATURES.items():
        assert torch.equal(data.features[name], torch.from_numpy(values).float())
        assert data.present[name].all()
    for split in NAMES:
        assert rows_of(data, split) == expected(split)
        assert data.interactions[split].dtype == torch.int64
        assert len(getattr(data.splits, split)) == len(expected(split))
    assert data.sha256["toy.inter"] == hashlib.sha256((folder / "toy.inter").read_bytes()).hexdigest()
    assert list(data.sha256) == ["toy.inter", "image_feat.npy", "text_feat.npy"]
    assert module(folder, sha256=data.sha256).sha256 == data.sha256
    facts = run_facts._arguments(data)
    assert facts["sha256"] == data.sha256
    assert facts["source"] == folder.name
    assert str(folder) not in str(facts)


def test_mmrec_names_of_the_numbers(folder):
    (folder / "u_id_mapping.csv").write_text("user_id\tuserID\nC\t2\nA\t0\nB\t1\n")
    (folder / "i_id_mapping.csv").write_text("asin\titemID\n" + "".join(f"B{i}\t{i}\n" for i in range(4)))
    data = module(folder)
    assert data.user_ids == ["A", "B", "C"]
    assert rows_of(data, "train")[0] == ("A", "B0")
    # A rule of our own numbers them anew, and the features go along.
    again = module(folder, split="leave_one_out")
    assert again.item_ids == ["B0", "B1", "B2", "B3"]
    assert "u_id_mapping.csv" in again.sha256
    reversed_rows = write_mmrec(folder, ROWS[::-1])
    turned = module(reversed_rows, split="leave_one_out")
    assert turned.item_ids == ["B3", "B0", "B2", "B1"]
    assert torch.equal(turned.features["text"], data.features["text"][[3, 0, 2, 1]])


def test_recbole_file(own, folder):
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"u{u}\ti{i}\t5\t{t}" for u, i, t, _ in ROWS]
    (folder / "toy.inter").write_text("\n".join(lines) + "\n")
    files = {key: own[key] for key in ("feature_files", "feature_ids")}
    data = module(folder / "toy.inter", split="leave_one_out", **files)
    assert data.item_ids == ["i0", "i1", "i2", "i3"]
    assert torch.equal(data.features["image"], torch.from_numpy(FEATURES["image"]).float())
    assert rows_of(data, "test") == [("u0", "i2"), ("u1", "i3")]  # user 2 has two interactions
    assert rows_of(data, "val") == [("u0", "i0"), ("u1", "i2")]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_own_tables(own, folder, suffix):
    path = folder / f"toy.{suffix}"
    if suffix == "parquet":
        pq.write_table(table(part=[NAMES[row[3]] for row in ROWS]), path)
    else:
        pc.write_csv(table(), path, pc.WriteOptions(delimiter="," if suffix == "csv" else "\t"))
    data = module(path, **own)
    for split in NAMES:
        assert rows_of(data, split) == expected(split, "u{}", "i{}")
    assert torch.equal(data.features["image"], torch.from_numpy(FEATURES["image"]).float())


def test_dates_and_incomplete_rows(own, folder):
    users, items = [f"u{u}" for u in (0, 0, 0, 0)], ["i0", "i1", "i2", None]
    dates = pa.array([3, 1, 2, 4], pa.date32())
    pq.write_table(pa.table({"who": users, "what": items, "when": dates}), folder / "toy.parquet")
    with pytest.warns(UserWarning, match="1 interactions lack a user, an item or a time"):
        data = module(folder / "toy.parquet", split="leave_one_out", **{**own, "split_column": None})
    assert rows_of(data, "test") == [("u0", "i0")]
    assert rows_of(data, "val") == [("u0", "i2")]


def test_features_in_every_file_format(own, folder):
    values = FEATURES["text"][[2, 0, 3, 1]]
    ids = ["i2", "i0", "i3", "i1"]
    save_file({"vectors": torch.from_numpy(values), "more": torch.ones(4, 1)}, folder / "t.safetensors")
    np.savez(folder / "t.npz", vectors=values, ids=np.array(ids))
    pq.write_table(pa.table({"what": [*ids, "i9"], "vectors": [*values.tolist(), None]}), folder / "t.parquet")
    np.save(folder / "ids.npy", np.array(ids))
    pc.write_csv(table(), folder / "toy.csv")
    names = {"a": "t.safetensors", "b": "t.npz", "c": "t.parquet"}
    data = module(
        folder / "toy.csv",
        feature_files={name: str(folder / file) for name, file in names.items()},
        feature_fields=dict.fromkeys(names, "vectors"),
        feature_ids={"a": str(folder / "ids.npy")},
        **OWN,
    )
    assert list(data.features) == ["a", "b", "c"]
    for name in names:
        assert torch.equal(data.features[name], torch.from_numpy(FEATURES["text"]))
        assert data.features[name].dtype == torch.float32


@pytest.mark.parametrize("part", [1, 1 << 22])  # numbers that are read in one go
def test_items_without_a_modality(own, folder, part, monkeypatch):
    monkeypatch.setattr(item_features, "_PART", part)
    pc.write_csv(table(), folder / "toy.csv")
    (folder / "ids.txt").write_text("i2\ni0\ni7\ni1\n")  # i3 has no row
    np.save(folder / "by_id.npy", np.array([[1.0, 2], [0, 0], [5, 6], [7, 8]]))  # that of i0 is zero
    data = module(folder / "toy.csv", **own)
    assert data.present["image"].tolist() == [False, True, True, False]
    assert data.features["image"].tolist() == [[0, 0], [7, 8], [1, 2], [0, 0]]
    with pytest.raises(InputError, match=r"image: 2 items have no features in .*, or only zeros, the first is 'i0'"):
        module(folder / "toy.csv", missing="error", **own)


def test_gaps(folder):
    write_mmrec(folder, [(u if u < 2 else 3, i, t, x) for u, i, t, x in ROWS])
    with pytest.raises(
        InputError, match="1 numbers of users below the highest, 3, have no interaction, the first is 2"
    ):
        module(folder)
    data = module(folder, gaps="allow")
    assert (data.num_users, data.num_items) == (4, 4)
    write_mmrec(folder, [row for row in ROWS if row[1] != 3])
    with pytest.raises(InputError, match=r"image: .* has 4 rows for 3 items, .* one for each; gaps='allow'"):
        module(folder)
    data = module(folder, gaps="allow")
    assert (data.num_items, data.item_ids[3]) == (4, "3")
    write_mmrec(folder, [*ROWS, (0, 5, 1, 0)])
    with pytest.raises(
        InputError, match="1 numbers of items below the highest, 5, have no interaction, the first is 4"
    ):
        module(folder)
    with pytest.raises(InputError, match=r"image: .* has 4 rows for 6 items, .* there must be one for each$"):
        module(folder, gaps="allow")


def test_repeated_pairs(folder):
    rows = [(0, 2, 1, 2), *ROWS, (1, 1, 1, 0), (1, 1, 6, 0)]
    source = write_mmrec(folder, rows)
    with pytest.raises(InputError, match=r"3 interactions repeat .* user '.', item '.'; duplicates='first'"):
        module(source)
    data = module(source, duplicates="first")
    assert rows_of(data, "train") == expected("train")
    assert rows_of(data, "val") == expected("val")  # before the test's
    with pytest.raises(InputError, match="2 interactions repeat a pair of user and item, the first is row 3: user '0'"):
        module(source, split="random")  # the exact duplicate (1, 1, 1) is out by then
    assert module(source, split="random", duplicates="first").interactions["train"].shape == (2, 4)


def test_users_who_do_not_train(folder):
    source = write_mmrec(folder, [row if row[0] != 2 else (*row[:3], 2) for row in ROWS])
    with pytest.warns(UserWarning, match="1 users have interactions in validation or test, but none in training"):
        data = module(source)
    assert rows_of(data, "test") == [("1", "3")]
    assert data.num_users == 3
    with pytest.raises(InputError, match=r"1 users .* none in training, the first is number 2; untrained='drop'"):
        module(source, untrained="error")
    with pytest.raises(InputError, match="no interaction is for training"):
        module(write_mmrec(folder, [(*row[:3], 1) for row in ROWS]))


def test_train_samples_are_nested(folder):
    kept = [set(rows_of(module(folder, train_samples=count), "train")) for count in (2, 4, 5)]
    assert [len(rows) for rows in kept] == [2, 4, 5]
    assert kept[0] < kept[1] < kept[2]
    with pytest.raises(InputError, match="train_samples must lie between 2 and the 5 training interactions, got 6"):
        module(folder, train_samples=6)


def test_bad_features(folder):
    image = folder / "image_feat.npy"
    wrong = FEATURES["image"].copy()
    wrong[2, 1] = np.nan
    np.save(image, wrong)
    with pytest.raises(InputError, match=r"image: .* not finite for 1 items, the first is '2' \(row 2\)"):
        module(folder)
    np.save(image, np.full((4, 2), 1e300))  # not in float32
    with pytest.raises(InputError, match="not finite for 4 items"):
        module(folder)
    np.save(image, np.zeros((4, 2)))
    with pytest.raises(InputError, match=r"image: .* has no features for any of the 4 items"):
        module(folder)
    np.save(image, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(InputError, match="no readable npy file"):
        module(folder)
    with pytest.raises(InputError, match=r"feature_files\['x'\]: there is no file"):
        module(folder, feature_files={"x": str(folder / "none.npy")})
    with pytest.raises(InputError, match=r"must be an .npy, .npz, .safetensors or .parquet file, got .*toy.inter"):
        module(folder, feature_files={"x": str(folder / "toy.inter")})


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ("i0\ni1\ni2", "has 4 rows of features, but there are 3 ids"),
        ("i0\ni1\ni2\ni1", "has the item 'i1' twice"),
        (None, "by row, so ids of items must be the numbers of the rows; got 'i0'"),
    ],
)
def test_bad_feature_ids(own, folder, ids, match):
    pc.write_csv(table(), folder / "toy.csv")
    if ids is None:
        own.pop("feature_ids")
    else:
        (folder / "ids.txt").write_text(ids)
    with pytest.raises(InputError, match=match):
        module(folder / "toy.csv", **own)


def test_bad_archives_and_columns(own, folder):
    pc.write_csv(table(), folder / "toy.csv")
    np.savez(folder / "t.npz", vector=np.ones((4, 2)), other=np.ones(3), ids=np.arange(4))
    pq.write_table(pa.table({"what": ["i0", "i1"], "v": [[1.0], [1.0, 2.0]], "w": [1, 2]}), folder / "t.parquet")
    cases = [
        ("t.npz", "vectr", None, "has no array 'vectr'. Did you mean vector"),
        ("t.npz", "other", None, r"must hold floating-point features \(N, D\), got float64 of shape \(3,\)"),
        ("t.npz", "vector", "ids.txt", "has ids of its own"),
        ("t.parquet", "x", None, "has no column 'x'"),
        ("t.parquet", "v", None, "must have one length"),
        ("t.parquet", "w", None, "must hold lists of floating-point numbers, it is int64"),
        ("by_id.npy", None, "none.txt", "feature_ids: there is no file"),
        ("by_id.npy", None, "by_id.npy", "vector of texts or whole numbers, got float64"),
    ]
    for file, field, ids, match in cases:
        with pytest.raises(InputError, match=match):
            module(
                folder / "toy.csv",
                feature_files={"m": str(folder / file)},
                feature_fields={"m": field} if field else None,
                feature_ids={"m": str(folder / ids)} if ids else None,
                **OWN,
            )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("userID\titemID\tx_label\n", "toy.inter has no rows"),
        ("user\titemID\tx_label\n0\t0\t0\n", "no column userID or user_id of the user"),
        ("userID\titemID\tx_label\n0\t0\t3\n", "the split must be 0, 1, 2 or train, val, test in every row, got '3'"),
        ("userID\titemID\tx_label\n0\t0\t\n", "in every row, got 'nothing'"),
        ("userID\titemID\tx_label\nA\t0\t0\n", "the user must be a whole number from 0, as in MMRec's"),
        ("userID\titemID\tx_label\n0\t-1\t0\n", "the item must be a whole number from 0, got -1"),
        ("userID\titemID\tx_label\n0\t99999\t0\n", "the item numbers go up to 99999 in 1 rows: they are ids"),
        ("userID\titemID\tx_label\n\t1\t0\n", "row 0 lacks its user, item or time"),
        ("userID\titemID\n0\t0\n", "no column of the split: choose split='random'"),
        (
            "userID\titemID\ttimestamp\n0\t0\tnoon\n",
            "the time must be numbers or dates, its column has the type string",
        ),
        ("userID\titemID\tx_label\n0\t0\t0\t0\n", "no readable table of interactions"),
        ("user_id:token\titem_id:token\n\ta\n", "every row lacks its user, item or time"),
    ],
)
def test_bad_tables(folder, text, match):
    (folder / "toy.inter").write_text(text)
    with pytest.raises(InputError, match=match):
        module(folder)


def test_bad_sources(folder):
    image = {"feature_files": {"image": str(folder / "image_feat.npy")}}
    with pytest.raises(InputError, match=r"source: there is no folder or file '.*none.inter'"):
        module(folder / "none.inter", **image)
    absent = MultimodalInteractionsDataModule(str(folder / "absent"))  # as a recipe whose data are elsewhere
    with pytest.raises(InputError, match=r"source: there is no folder or file '.*absent'"):
        absent.setup()
    with pytest.raises(InputError, match=r"source must be a folder, or an .inter, .csv, .tsv or .parquet file"):
        module(folder / "image_feat.npy", **image)
    with pytest.raises(InputError, match="feature_files must name a file for at least one modality"):
        module(folder / "toy.inter")
    (folder / "more.inter").write_text("")
    with pytest.raises(InputError, match=r"must have one .inter file, it has several: more.inter, toy.inter"):
        module(folder)
    for file in ("more.inter", "toy.inter"):
        (folder / file).unlink()
    with pytest.raises(InputError, match=r"must have one .inter file, it has none"):
        module(folder)


def test_bad_mapping(folder):
    mapping = folder / "u_id_mapping.csv"
    for text, match in (
        ("user_id\tuserID\na\t0\nb\t1\n", "each of the numbers 0 … 2 once; it lacks number 2"),
        ("user_id\tuserID\na\t0\nb\t1\na\t2\n", "it names a number or an id twice"),
        ("user_id\tnumber\na\t0\n", "must have two columns, one of them userID or itemID"),
        ("user_id\tuserID\na\tb\n", "no readable table of ids"),
    ):
        mapping.write_text(text)
        with pytest.raises(InputError, match=match):
            module(folder)


def test_bad_sha256(folder):
    with pytest.raises(InputError, match=r"toy.inter has SHA-256 .*, but sha256 expects 00: it is another file"):
        module(folder, sha256={"toy.inter": "00"})
    with pytest.raises(InputError, match=r"sha256 names 'toy.iter', which is no input. Did you mean toy.inter"):
        module(folder, sha256={"toy.iter": "00"})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k_core": 5}, "k_core must be at least 0, and 0 without a rule in split, got 5"),
        ({"split": "randm"}, "split must be one of None, random, temporal, leave_one_out, got 'randm'"),
        ({"missing": "no"}, "missing must be one of allow, error"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        (
            {"feature_fields": {"imag": "x"}},
            "feature_fields has 'imag', which is none of feature_files. Did you mean image",
        ),
        ({"image_towers": {"image": "a"}, "text_towers": {"image": "b"}}, "'image' must have either one tower"),
        ({"split": "random", "k_core": 9}, "no part in which users and items have 9 each; lower k_core"),
    ],
)
def test_bad_options(folder, options, match):
    with pytest.raises(InputError, match=match):
        module(folder, **options)
