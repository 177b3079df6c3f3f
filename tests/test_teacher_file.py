"""The file of a teacher cache: whole or not there, mapped and not read, the same from any number of processes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.teachers import SAMPLES, build, loader, teacher
from zoo.errors import InputError
from zoo.teacher_cache import TeacherCache
from zoo.teacher_file import building, commit, partial_path
from zoo.towers import Tower


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher.safetensors"


def break_at(tower: Tower, batch: int, failure: Any) -> Tower:
    """Let the pass over the data fail at a batch."""
    count = 0
    whole = tower.features_and_logits

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        if count > batch:
            failure()
        return whole(x)

    tower.features_and_logits = counted
    return tower


def test_any_safetensors_reader_reads_it(path):
    cache = build(path)
    tensors = safetensors.torch.load_file(path)
    rows = torch.arange(SAMPLES)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "labels": (SAMPLES,),
        "features": (SAMPLES, 64),
        "logits": (SAMPLES, 10),
    }
    assert torch.equal(tensors["features"], cache.lookup(rows)[0])
    assert torch.equal(tensors["logits"], cache.lookup(rows, tensors["labels"])[1])
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert (facts["teacher"], facts["samples"], facts["sha256"]) == ("zoo/resnet8", SAMPLES, teacher().fingerprint)


def test_the_file_is_mapped_and_not_read(path, monkeypatch):
    small = build(path)
    huge = replace(small.facts, samples=1 << 22, dim=4096)  # 64 GiB of zeros, none of which is on the disk
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 40))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with building(path, huge):
        commit(path, huge)
    assert path.stat().st_size > 1 << 36
    cache = TeacherCache.open(path)
    features, _ = cache.lookup(torch.randint(1 << 22, (256,)))
    assert features.shape == (256, 4096)
    assert features.any().item() is False
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 << (20 if sys.platform == "darwin" else 10)


# -- crashes --------------------------------------------------------------------------------------------------------


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_build_that_fails_leaves_nothing(path):
    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(path, break_at(teacher(), 2, interrupt), loader(), progress=False)
    assert list(path.parent.iterdir()) == []


def test_an_older_cache_stays_until_the_new_one_is_whole(path):
    older = build(path).path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(path, break_at(teacher(1), 2, interrupt), loader(), progress=False)
    assert path.read_bytes() == older
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    opened = TeacherCache.open(path)
    TeacherCache.build(path, teacher(1), loader(), progress=False)
    opened.check_teacher(teacher())  # what was opened before stays whole
    assert not torch.equal(opened.lookup(torch.arange(9))[1], TeacherCache.open(path).lookup(torch.arange(9))[1])


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_build_that_is_killed_leaves_nothing_usable(tmp_path, path):
    if os.fork() == 0:
        try:
            TeacherCache.build(path, break_at(teacher(), 2, lambda: os._exit(7)), loader(), progress=False)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
    assert partial_path(path).exists()
    assert not path.exists()
    with pytest.raises(InputError, match="is no teacher cache, or damaged"):
        TeacherCache.open(partial_path(path))
    shutil.copy(partial_path(path), path)
    with pytest.raises(InputError, match="is no teacher cache, or damaged"):
        TeacherCache.open(path)
    path.unlink()
    rebuilt = build(path)
    assert not partial_path(path).exists()
    assert path.read_bytes() == build(tmp_path / "other").path.read_bytes()
    rebuilt.check_data(loader())


def test_two_builders_do_not_mix(path):
    facts = build(path).facts
    with building(path, facts), pytest.raises(InputError, match="another run is building the teacher cache"):
        build(path)
    build(path).check_data(loader())


# -- processes ------------------------------------------------------------------------------------------------------


def build_here(rank: int, world: int, path: Path) -> Any:
    broken = teacher()
    if rank == 1:
        with torch.no_grad():
            next(broken.network.parameters()).fill_(float("nan"))
    with pytest.raises(InputError) as raised:
        TeacherCache.build(path.with_name("broken"), broken, loader(), progress=False)
    cache = TeacherCache.build(path, teacher(), loader(), progress=False)
    return str(raised.value), cache.class_means()


def test_two_processes_equal_one(two_processes, tmp_path, path):
    one = build(tmp_path / "one")
    (first, _), (second, _) = two = two_processes(build_here, path)
    assert path.read_bytes() == one.path.read_bytes()
    for _, (means, counts) in two:
        torch.testing.assert_close(means, one.class_means()[0])
        assert torch.equal(counts, one.class_means()[1])
    # What fails in one process fails in all, and leaves nothing.
    assert first.startswith(
        "the teacher cache could not be built in process 1: the teacher's features for sample 40 do"
    )
    assert second.startswith(
        "the teacher's features for sample 40 do not fit into float32 (the largest is nan): the teacher"
    )
    assert not list(tmp_path.glob("*broken*"))


# -- refused files --------------------------------------------------------------------------------------------------


def test_bad_files(path):
    raw = build(path).path.read_bytes()
    foreign = safetensors.torch.save({"weight": torch.zeros(3)}, {"format": "pt"})
    for content, message in (
        (raw[:-1], r"teacher\.safetensors is not whole: it has \d+ bytes, expected \d+"),
        (raw + b"\0", "is not whole"),
        (raw[:100], "is no teacher cache, or damaged"),
        (b"", "is no teacher cache, or damaged"),
        (b"\xff" * 4000, "is no teacher cache, or damaged"),
        (foreign, "is no teacher cache, or damaged"),
        (raw.replace(b"zoo-teacher-cache-1", b"zoo-teacher-cache-2"), "has format 'zoo-teacher-cache-2', this version"),
        (raw.replace(b'"shape":[150,64]', b'"shape":[149,64]'), "its header is not what the zoo writes"),
        (raw.replace(rb"\"samples\"", rb"\"simples\""), "its header is not what the zoo writes"),
        (raw.replace(rb"\"samples\": 150", rb"\"samples\": 999"), "its header is not what the zoo writes"),
    ):
        assert content != raw
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            TeacherCache.open(path)


def test_bad_paths(tmp_path):
    with pytest.raises(InputError, match="nowhere cannot be read as a teacher cache: No such file"):
        TeacherCache.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot be read as a teacher cache: Is a directory"):
        TeacherCache.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the teacher cache .*file/cache cannot be written"):
        build(tmp_path / "file" / "cache")
    assert build(tmp_path / "new" / "folder" / "cache").path.is_file()


def test_bad_full_disk(path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"takes .* GiB, and the disk has 9.31e-07 free: .*dtype='float16'"):
        build(path)
    assert list(path.parent.iterdir()) == []


def test_bad_values_for_float16(path):
    tower = teacher()
    with torch.no_grad():
        tower.network.get_submodule(tower.tap.heads[0]).weight.mul_(1e6)
    with pytest.raises(
        InputError,
        match=r"logits for sample 0 do not fit into float16 \(the largest is \d.*\): dtype=.float32. holds it",
    ):
        TeacherCache.build(path, tower, loader(), dtype="float16", progress=False)
    assert TeacherCache.build(path, tower, loader(), progress=False).lookup(torch.tensor([0]))[1].abs().max() > 65504
