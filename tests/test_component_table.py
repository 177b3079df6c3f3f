"""The README's table of components: made from the sheets, and its numbers are those of the results' pages."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from zoo import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WITH_RESULTS = [name for name in registry.components() if registry.describe(name).sheet.get("result")]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("component_table", ROOT / "docs/component_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_is_current(made: ModuleType) -> None:
    assert made.filled(README) == README, "run `make table`"


def test_lost_markers_are_told(made: ModuleType) -> None:
    with pytest.raises(SystemExit, match="lost the markers"):
        made.filled(README.replace(made.END, ""))


def test_every_component_has_a_row_with_its_recipe(made: ModuleType) -> None:
    rows = made.table().splitlines()[2:]
    assert len(rows) == len(registry.components())
    for name in registry.components():
        (row,) = (row for row in rows if row.startswith(f"| [`{name}`]"))
        if registry.describe(name).recipes:
            assert any(f"| `{recipe}` |" in row for recipe in registry.recipes())


def test_every_module_of_a_paper_has_a_result(made: ModuleType) -> None:
    without = {name for name in registry.components() if name not in WITH_RESULTS}
    modules = {name for name in without if registry.describe(name).kind == "LightningModule"}
    assert modules == {"Classifier"}  # no paper; its figures are the controls of NDDistillation


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_numbers_are_those_of_the_results_page(name: str) -> None:
    result = registry.describe(name).sheet["result"]
    page = (ROOT / f"docs/results/{result['page']}.md").read_text(encoding="utf-8")
    numbers = re.findall(r"[+-]?\d+\.\d+(?: ± \d+\.\d+)?", result["found"])
    assert numbers
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", page), f"{number} is not in {result['page']}.md"
