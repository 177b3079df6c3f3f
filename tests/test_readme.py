"""Every code block of the README runs, and every command in it exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from zoo import cli, registry

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "runs/mine/config.json").is_file()


def test_commands_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    seen = set()
    for line in "\n".join(blocks("bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["zoo"]:
            assert words[1] in cli._COMMANDS, line
            if "--config" not in words:
                continue
            name = words[words.index("--config") + 1]
            assert name.startswith(("runs/", "hf://")) or name == "my.yaml" or name in registry.recipes(), line
        elif words[:1] == ["make"]:
            assert f"\n{words[1]}:" in makefile, line
        seen.update(words[:1])
    assert seen == {"zoo", "make", "pip", "python", "export"}


def test_components_and_recipes_are_in_the_table() -> None:
    for name in registry.components():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        if registry.describe(name).recipes:
            assert any(f"`{recipe}`" in row for recipe in registry.recipes())
