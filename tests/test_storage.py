"""A crash at any step of a save leaves the old version or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from zoo import storage
from zoo.errors import InputError

OLD = {"config.json": "old", "model.safetensors": "old weights", "recipe.yaml": "old recipe"}
NEW = {"config.json": "new", "model.safetensors": "new weights"}
NEWER = {
    "config.json": "newer", "model.safetensors": "newer weights", "recipe.yaml": "newer recipe", "figures/loss.png": "png",
}  # fmt: skip
# Everything by which `write` changes a disk; each is also what a disk can refuse.
STEPS = ["fsync", "mkdir", "open", "rename", "replace", "rmdir", "unlink"]


class CrashError(Exception):
    """The process would be dead here."""


def filler(files: dict[str, str]) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            # Through os.open, which the tests count, in two halves.
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, text[:2].encode())
            os.fsync(descriptor)
            os.write(descriptor, text[2:].encode())
            os.close(descriptor)

    return fill


def read(folder: Path) -> dict[str, str]:
    found = {name: storage.locate(folder, name) for name in storage.FILES}
    return {name: path.read_text() for name, path in found.items() if path is not None}


def visible(folder: Path) -> dict[str, str]:
    """Files by their path, and folders of ours that should be gone."""
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    return files | {path.name: "<folder>" for path in folder.iterdir() if path.is_dir() and path.name != "figures"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An old version, a card written by hand, and a file that is none of ours."""
    folder = tmp_path / "deep" / "model"
    storage.write(folder, filler(OLD))
    (folder / "README.md").write_text("by hand")
    (folder / "notes.txt").write_text("mine")
    return folder


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int, *, once: bool) -> list[str]:
    """Make the given filesystem call fail, and all that follow unless ``once``: a dead process cleans nothing up."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == step or (len(calls) > step and not once):
                raise (OSError(28, "No space left on device") if once else CrashError)
            return real(*args, **options)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    # The clean-up of a dead process does not happen; shutil holds functions of its own from os.
    rmtree = shutil.rmtree

    def remove(*args: Any, **options: Any) -> None:
        if len(calls) < step or once:
            rmtree(*args, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    return calls


@pytest.mark.parametrize("once", [False, True], ids=["crash", "error"])
@pytest.mark.parametrize("card", [None, "new card"])
def test_crash_at_every_step_leaves_a_whole_version(folder: Path, once: bool, card: str | None) -> None:
    new = NEW if card is None else {**NEW, "README.md": card}
    before = {**OLD, "README.md": "by hand"}
    after = {**NEW, "README.md": card or "by hand"}
    seen = set()
    for step in count(1):
        with pytest.MonkeyPatch.context() as patch:
            calls = crash_at(patch, step, once=once)
            with contextlib.suppress(CrashError, OSError):
                storage.write(folder, filler(new))
        found = read(folder)
        assert found in (before, after), (step, calls[step - 1 :])
        if len(calls) < step:
            break
        seen.add((calls[step - 1], found == after))
        # The next save finishes what was left, and nothing of the failed one stays.
        storage.write(folder, filler(NEWER))
        assert visible(folder) == {**NEWER, "README.md": found["README.md"], "notes.txt": "mine"}, step
        storage.write(folder, filler(OLD))
        (folder / "README.md").write_text("by hand")
    assert visible(folder) == {**after, "notes.txt": "mine"}
    assert step > 15
    assert {("rename", False), ("replace", True), ("unlink", True), ("rmdir", True), ("fsync", False)} <= seen


def test_save_without_recipe_or_card(folder: Path) -> None:
    storage.write(folder, filler(NEW))
    assert visible(folder) == {**NEW, "README.md": "by hand", "notes.txt": "mine"}
    assert storage.locate(folder, "recipe.yaml") is None


def test_reader_sees_a_committed_version_that_is_not_moved_yet(folder: Path) -> None:
    """The old recipe is not part of the new version, though it still lies there; its card does."""
    committed = folder / ".saved"
    committed.mkdir()
    filler(NEW)(committed)
    assert read(folder) == {**OLD, "README.md": "by hand"}  # without the manifest it does not count
    (committed / "manifest.json").write_text('["config.json", "model.safetensors"]')
    assert read(folder) == {**NEW, "README.md": "by hand"}


def test_bad_fill_leaves_everything_as_it_was(folder: Path) -> None:
    before = visible(folder)

    def fail(staging: Path) -> None:
        (staging / "config.json").write_text("half")
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        storage.write(folder, fail)
    assert visible(folder) == before
    with pytest.raises(AssertionError, match="other"):
        storage.write(folder, lambda staging: (staging / "other").touch())
    assert visible(folder) == before


def test_bad_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("precious")
    with pytest.raises(InputError, match="taken is a file, expected a folder to save into"):
        storage.write(tmp_path / "taken", filler(NEW))
    assert (tmp_path / "taken").read_text() == "precious"


@pytest.mark.parametrize(
    "manifest",
    ['["../../outside.txt"]', '["/etc/hostname"]', '["config.json", 3]', '{"config.json": 1}', "[", "null", "[" * 5000],
)
def test_bad_manifest_moves_nothing(folder: Path, manifest: str) -> None:
    """A folder from elsewhere may hold a `.saved` of its own: it must not move files in or out."""
    (folder.parent.parent / "outside.txt").write_text("outside")
    (folder / ".saved").mkdir()
    (folder / ".saved" / "manifest.json").write_text(manifest)
    before = visible(folder)
    for action in (lambda: storage.write(folder, filler(NEW)), lambda: storage.locate(folder, "config.json")):
        with pytest.raises(InputError, match=r"manifest\.json is not what a save leaves behind: delete .*\.saved"):
            action()
    assert visible(folder) == before
    assert (folder.parent.parent / "outside.txt").read_text() == "outside"


KILLED = """
import os, signal, sys
from pathlib import Path
from zoo import storage
calls, step = 0, int(sys.argv[2])
def deadly(real):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return call
def fill(folder):
    (folder / "config.json").write_text("new")
    (folder / "model.safetensors").write_text("new weights")
for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
    setattr(os, name, deadly(getattr(os, name)))
storage.write(Path(sys.argv[1]), fill)
"""


# mkdir twice, fsync of three files, their folder, rename, fsync of the folder, unlink, replace twice, fsync, unlink, rmdir
@pytest.mark.parametrize(("step", "new"), [(4, False), (7, False), (8, True), (10, True), (11, True), (13, True)])
def test_killed_process(folder: Path, step: int, new: bool) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(step)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert read(folder) == {**(NEW if new else OLD), "README.md": "by hand"}
    storage.write(folder, filler(NEWER))
    assert visible(folder) == {**NEWER, "README.md": "by hand", "notes.txt": "mine"}
