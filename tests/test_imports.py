"""What importing costs and touches: no torch before a name is used, no cycles between folders, no foreign modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAVY = "[m for m in ('torch', 'lightning', 'timm', 'torchvision', 'numpy', 'jsonargparse') if m in sys.modules]"


@pytest.mark.parametrize(
    "code",
    [
        "import zoo",
        "import zoo; dir(zoo); zoo.InputError; zoo.register",
        "from zoo.cli import main; main(['--help'])",
        "from zoo.cli import main; main(['list'])",
        "from zoo.cli import main; main(['list', '--json'])",
        "from zoo.cli import main; main(['show', 'NDDistillation'])",
    ],
)
def test_no_torch_until_a_name_is_used(code: str, tmp_path: Path) -> None:
    assert python(f"import sys\n{code}\nprint({HEAVY})", tmp_path).splitlines()[-1] == "[]"


def test_a_users_own_callbacks_module_does_no_harm(tmp_path: Path) -> None:
    """The folders of this repository are called `callbacks` and `lightning_modules`; those names stay the user's."""
    for name in ("callbacks", "lightning_modules", "cards"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    code = (
        "import callbacks, lightning_modules, cards, zoo\n"
        "assert callbacks.MINE and lightning_modules.MINE and cards.MINE\n"
        "assert zoo.NDDistillation.__module__ == 'zoo.lightning_modules.nd'\n"
        "import zoo.callbacks\n"
        "print(zoo.registry.describe('NDDistillation').stem)"
    )
    (tmp_path / "script.py").write_text(code)
    result = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "nd"


def imported(path: Path) -> set[str]:
    """Absolute names of what a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


def test_import_rule() -> None:
    """zoo/ imports neither folder; the folders do not import each other; nothing uses their bare names."""
    forbidden = {
        "zoo": ("zoo.lightning_modules", "zoo.callbacks"),
        "lightning_modules": ("zoo.callbacks",),
        "callbacks": ("zoo.lightning_modules",),
    }
    for folder, prefixes in forbidden.items():
        for path in (ROOT / folder).rglob("*.py"):
            for name in imported(path):
                assert not name.startswith((*prefixes, "callbacks", "lightning_modules", "pytorch_lightning")), (
                    path,
                    name,
                )


def test_every_public_name_is_what_the_table_says() -> None:
    for name in zoo.__all__:
        value = getattr(zoo, name)
        if name in zoo._LAZY:
            assert value.__module__ == zoo._LAZY[name], name


def test_bad_attribute_shows_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'NDDistilation'. Did you mean NDDistillation"):
        zoo.NDDistilation  # noqa: B018 - the access is the test
