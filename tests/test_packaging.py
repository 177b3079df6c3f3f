"""The wheel: everything in it, nothing beside it, importable from elsewhere."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "zoo": "zoo",
    "lightning_modules": "zoo/lightning_modules",
    "callbacks": "zoo/callbacks",
    "cards": "zoo/cards",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder appears in the checkout, with the setuptools at hand."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".md", ".txt", ".html"} or path.name == "py.typed":
                expected.add(f"{package}/{path.relative_to(ROOT / folder)}")
    assert inside == expected


def test_every_public_name_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that sees the heavy packages but no editable installation."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    site = next(environment.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    # A plain path entry: .pth files behind it, such as the editable finder of this checkout, are not processed.
    (site / "heavy.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import zoo, importlib, pkgutil, sys\n"
        "assert zoo.__file__.startswith(sys.prefix), zoo.__file__\n"
        "for name in zoo.__all__: getattr(zoo, name)\n"
        "for module in pkgutil.walk_packages(zoo.__path__, 'zoo.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        assert importlib.import_module(module.name).__file__.startswith(sys.prefix), module.name\n"
        "from zoo import registry\n"
        "assert 'nd-digits' in registry.recipes() and registry.describe('NDDistillation').sheet['arxiv'] == '2305.17007'\n"
    )
    result = subprocess.run(
        [python, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    listed = subprocess.run(
        [environment / "bin" / "zoo", "list"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "NDDistillation" in listed.stdout, listed.stderr
