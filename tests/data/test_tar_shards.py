"""Samples in tar files: the index, the errors, and the order."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.captioned import pack, png
from zoo.data.tar_shards import ShardShuffle, TarShards, shard_files
from zoo.errors import InputError


def test_members_belong_together_by_name(tmp_path):
    first = pack(
        tmp_path / "a.tar",
        {
            "x/0001.PNG": png(1),
            "x/0001.txt": b" one\n",
            "x/0001.seg.png": png(9),
            "x/0001.json": b'{"caption": "no", "class": 3}',
            "y/0001.txt": "zwei, größer".encode(),
            "y/0001.png": png(2),
            "y/0001.cls": b"7\n",
            "README": b"?",
            "stats.json": b"{}",
        },
    )
    second = pack(tmp_path / "b.tar", {"3.jpg": png(3), "3.json": b'{"caption": ["three", " ", "drei"]}'})
    shards = TarShards([first, second])
    assert len(shards) == 3
    assert shards.shard_of.tolist() == [0, 0, 1]
    assert [shards.captions(row) for row in range(3)] == [["one"], ["zwei, größer"], ["three", "drei"]]
    assert [shards.image(row).getpixel((0, 0))[0] for row in range(3)] == [1, 2, 3]
    assert shards.caption_counts(np.array([2, 0])).tolist() == [2, 1]
    assert shards.place(1) == f"{first}, y/0001.png"
    assert shards.label(0) is None
    assert TarShards([first, second], caption_field="caption").captions(0) == ["no"]
    assert TarShards([first], label_field="class").label(0) == 3
    assert TarShards([first], label_field="cls").label(1) == 7
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.captions(2) == ["three", "drei"]


def test_a_second_image_of_a_name_is_another_sample(tmp_path):
    shards = TarShards([pack(tmp_path / "a.tar", {"1.png": png(1), "1.txt": b"one", "1.jpg": png(2)})])
    assert len(shards) == 2
    assert shards.image(0).getpixel((0, 0))[0] == 1
    with pytest.raises(InputError, match=r"a.tar, 1.jpg: the sample has no json member"):
        shards.captions(1)


def test_long_names_and_every_tar_format(tmp_path):
    name = "very/" * 40 + "long" * 30
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        short = name if form != tarfile.USTAR_FORMAT else "d" * 90 + "/" + "n" * 90
        shards = TarShards([pack(tmp_path / "a.tar", {f"{short}.png": png(5), f"{short}.txt": b"five"}, format=form)])
        assert shards.captions(0) == ["five"]
        assert shards.image(0).size == (8, 6)


def test_index_is_kept_and_follows_the_shard(tmp_path):
    kept = tmp_path / "index"
    path = pack(tmp_path / "a.tar", {"1.png": png(1), "1.txt": b"one"})
    first = TarShards([path], index_dir=str(kept))
    [file] = kept.iterdir()
    stamp = file.stat().st_mtime_ns
    assert TarShards([path], index_dir=str(kept)).captions(0) == first.captions(0) == ["one"]
    assert file.stat().st_mtime_ns == stamp
    pack(tmp_path / "a.tar", {"1.png": png(1), "1.txt": b"two", "2.png": png(2), "2.txt": b"3"})
    again = TarShards([path], index_dir=str(kept))
    assert [again.captions(row) for row in range(2)] == [["two"], ["3"]]
    file.write_bytes(b"x")
    with pytest.raises(InputError, match=r"npy is no readable index of .*a.tar: .*; delete it"):
        TarShards([path], index_dir=str(kept))


def test_shard_files(tmp_path):
    names = [f"s-{number:02}.tar" for number in range(8, 12)]
    for name in names:
        (tmp_path / name).touch()
    assert shard_files("train", f"{tmp_path}/s-{{08..11}}.tar") == [f"{tmp_path}/{name}" for name in names]
    assert shard_files("train", [f"{tmp_path}/s-1*.tar", f"{tmp_path}/s-08.tar"]) == [
        f"{tmp_path}/{name}" for name in ("s-10.tar", "s-11.tar", "s-08.tar")
    ]
    (tmp_path / "t-1-2.tar").touch()
    assert shard_files("train", f"{tmp_path}/t-{{1..1}}-{{2..2}}.tar") == [f"{tmp_path}/t-1-2.tar"]
    for match, name in (
        (r"train: there is no shard '.*s-12.tar'", f"{tmp_path}/s-{{08..12}}.tar"),
        (r"train: there is no shard '.*x\*.tar'", f"{tmp_path}/x*.tar"),
        (r"\{9..8\} must count upwards", "s-{9..8}.tar"),
        (r"over at most a million", "s-{0..99999999999}.tar"),
        ("shards must be local files", "pipe:curl https://example.org/a.tar"),
        ("shards must be local files", "s3://bucket/a.tar"),
    ):
        with pytest.raises(InputError, match=match):
            shard_files("train", name)
    with pytest.raises(InputError, match="train must name at least one shard"):
        shard_files("train", [])


def test_bad_files(tmp_path):
    members = {f"{number}.{ending}": png(number) * 50 for number in range(9) for ending in ("png", "txt")}
    whole = Path(pack(tmp_path / "a.tar", members)).read_bytes()

    def message(match: str, content: bytes) -> None:
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(InputError, match=match):
            TarShards([str(tmp_path / "bad.tar")])

    message("bad.tar is no readable tar file", b"x" * 2000)
    message("bad.tar is no readable tar file", b"")
    message("bad.tar: 0.txt is cut off; copy the shard again", whole[:5000])
    second = whole.index(b"4.png")
    message(f"bad.tar is damaged at byte {second}", whole[: second + 148] + b"999999" + whole[second + 154 :])
    message(f"bad.tar is damaged at byte {second}", whole[: second + 200])  # cut off in the middle of a header
    last = whole.index(b"8.txt") + 512
    message("bad.tar: 8.txt is cut off", whole[: last + 10])
    ignored = Path(pack(tmp_path / "i.tar", {"1.png": png(1), "README": b"x" * 5000})).read_bytes()
    message("bad.tar is no readable tar file: unexpected end of data", ignored[:4000])
    message("a compressed one must be unpacked", gzip.compress(whole))
    with pytest.raises(InputError, match=r"b.tar: no samples; expected members such as"):
        TarShards([pack(tmp_path / "b.tar", {"README": b"x"})])


def test_bad_samples(tmp_path):
    path = pack(
        tmp_path / "a.tar",
        {
            "0.png": b"x",
            "0.txt": b" ",
            "1.txt": b"\xff\xfe",
            "1.json": b'{"n": 1, "c": 5, "f": 1.5}',
            "2.png": png(1),
            "3.png": png(1),
            "3.json": b"[" * 100000,
            "4.png": png(1),
            "4.json": b"[]",
        },
    )
    shards = TarShards([path])
    with pytest.raises(InputError, match=r"a.tar, 0.png: the image cannot be decoded"):
        shards.image(0)
    with pytest.raises(InputError, match=r"a.tar, 0.png: the caption is empty"):
        shards.captions(0)
    with pytest.raises(InputError, match=r"a.tar, 1.txt: the sample has no image"):
        shards.image(1)
    with pytest.raises(InputError, match=r"a.tar, 1.txt: the caption is no UTF-8 text"):
        shards.captions(1)
    with pytest.raises(InputError, match=r"a.tar, 2.png: the sample has no json member"):
        shards.captions(2)
    with pytest.raises(InputError, match=r"a.tar, 3.png: the json member cannot be read"):
        shards.captions(3)
    with pytest.raises(InputError, match=r"a.tar, 4.png: the json member has no field 'caption'"):
        shards.captions(4)
    assert shards.caption_counts(np.arange(5)).tolist() == [1] * 5
    with pytest.raises(InputError, match="the caption must be a text or a list of texts, got 5"):
        TarShards([path], caption_field="c").captions(1)
    assert TarShards([path], label_field="n").label(1) == 1
    with pytest.raises(InputError, match=r"the label must be a whole number of at least 0, got 1\.5"):
        TarShards([path], label_field="f").label(1)
    with pytest.raises(InputError, match="the sample has no cls member"):
        TarShards([path], label_field="cls").label(1)
    Path(path).write_bytes(Path(path).read_bytes()[:600])
    with pytest.raises(InputError, match="shorter than it was"):
        shards.image(4)


def test_nothing_but_plain_files_is_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("1.png", tarfile.SYMTYPE), ("1.txt", tarfile.LNKTYPE), ("2.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with pytest.raises(InputError, match="no samples"):
        TarShards([str(tmp_path / "a.tar")])


def test_json_with_huge_numbers_is_no_label(tmp_path):
    path = pack(tmp_path / "a.tar", {"1.png": png(1), "1.json": json.dumps({"n": "x" * 10**4}).encode()})
    with pytest.raises(InputError, match="the label must be a whole number") as caught:
        TarShards([path], label_field="n").label(0)
    assert len(str(caught.value)) < 300


COUNTS = [5, 0, 7, 3, 6, 4]
SHARD_OF = np.repeat(np.arange(6), COUNTS)


def order(epoch: int = 0, **options: Any) -> list[int]:
    sampler = ShardShuffle(SHARD_OF, **{"window": 2, **options})
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    assert {draw.epoch for draw in drawn} == {epoch}
    return [int(draw) for draw in drawn]


@pytest.mark.parametrize("window", [1, 2, 6, 100])
def test_order_is_a_shuffle_that_walks_through_the_shards(window):
    orders = [order(epoch, window=window, seed=3) for epoch in range(5)]
    assert all(sorted(each) == list(range(25)) for each in orders)
    assert len({tuple(each) for each in orders}) == 5
    assert order(2, window=window, seed=3) == orders[2]
    assert order(0, window=window, seed=4) not in orders
    for each in orders:  # a shard that has been left behind does not come again
        shards = SHARD_OF[each]
        spans = [np.flatnonzero(shards == shard) for shard in range(6)]
        open_at_once = max(sum(span[0] <= at <= span[-1] for span in spans if len(span)) for at in range(25))
        assert open_at_once <= window


def test_a_window_is_mixed():
    first = [order(epoch, window=6)[0] for epoch in range(400)]
    assert len(set(first)) == 25  # any sample may be the first
    assert max(first.count(index) for index in range(25)) < 40


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_take_equal_stretches(world):
    parts = [order(1, num_replicas=world, rank=rank) for rank in range(world)]
    joint = [index for part in parts for index in part]
    assert {len(part) for part in parts} == {-(-25 // world)}
    assert joint[:25] == order(1)
    assert joint[25:] == order(1)[: len(joint) - 25]  # filled up from the beginning


@pytest.mark.parametrize("rank", [0, 1])
def test_skipping_goes_on_where_it_was(rank):
    whole = order(3, num_replicas=2, rank=rank)
    for skip in (1, 6, 12, 13):
        sampler = ShardShuffle(SHARD_OF, window=2, num_replicas=2, rank=rank)
        sampler.set_epoch(3)
        sampler.skip = skip
        assert list(sampler) == whole[skip:]
        assert list(sampler) == whole  # only once
