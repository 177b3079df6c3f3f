"""The table of components in README.md, from the sheets in cards/ and the recipes: ``python docs/component_table.py``.

The text between the two markers is replaced; ``--check`` only says whether it is current.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zoo import registry

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- components: made by `make table` -->\n", "<!-- end of components -->"
COLUMNS = ("component", "paper", "kind", "verified against", "our result, with its control", "recipe")


def table() -> str:
    """Return the table in Markdown, one row a component, a paper's components one below the other."""
    found = sorted(map(registry.describe, registry.components()), key=lambda component: component.stem)
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(row, found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def row(component: registry.Component) -> tuple[str, ...]:
    """Return the cells of a component, from its sheet."""
    sheet = component.sheet
    paper = f"{sheet['title']}: {sheet['about']}"
    if sheet.get("arxiv"):
        paper = f"[{sheet['title']}](https://arxiv.org/abs/{sheet['arxiv']}), {sheet['venue']}: {sheet['about']}"
    result = sheet.get("result")
    shown = f"{result['found']} ([more](docs/results/{result['page']}.md))" if result else ""
    return (
        f"[`{component.name}`](docs/components/{component.stem}.md)",
        paper,
        component.kind,
        sheet["against"],
        shown,
        f"`{component.recipes[0]}`" if (component := offline(component)).recipes else "",
    )


def offline(component: registry.Component) -> registry.Component:
    """Return the component with the recipe that needs no download in front."""
    own = f"{component.stem}-digits", f"{component.stem}-synthetic"
    recipes = sorted(component.recipes, key=lambda name: name not in own)
    return registry.Component(**{**vars(component), "recipes": tuple(recipes)})


def filled(text: str) -> str:
    """Return ``text`` with the table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"README.md has lost the markers {BEGIN.strip()} and {END}")
    return f"{before}{begin}\n{table()}\n{end}{after}"


def main() -> None:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description="Write the table of components into README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the table is not current")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    if check:
        sys.exit(0 if filled(text) == text else "README.md: the table of components is not current; run `make table`")
    README.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
