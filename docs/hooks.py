"""What the site adds to mkdocs: sheets in pages, links that leave the folder, and folders that are packages of ``zoo``.

A line ``<!-- sheet: STEM -->`` in a page stands for parts of ``cards/STEM.md``: status, what was verified, deviations, known
limits, and the citation.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from zoo import registry

ROOT = Path(__file__).resolve().parents[1]
# Pages that lie at the top of the checkout, where a visitor of the repository looks for them.
TOP = ("CHANGELOG.md", "CONTRIBUTING.md")
SHEET = re.compile(r"^<!-- sheet: (\w+) -->$", flags=re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^ *`{3,}[^`\n]*\n.*?^ *`{3,}[ \t]*$)", flags=re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of ``docs``."""
    for name in TOP:
        files.append(File.generated(config, name.lower(), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Put sheets in their places, and lead links that leave ``docs`` to where their target is on the site."""
    source = Path(str(page.file.abs_src_path)).resolve()
    docs = Path(config.docs_dir).resolve()

    def target(found: re.Match[str]) -> str:
        label, address = found.groups()
        return _link(label, address, source, docs, here=docs / page.file.src_uri)

    parts = FENCE.split(markdown)
    parts[::2] = [SHEET.sub(lambda found: sheet(found[1]), LINK.sub(target, prose)) for prose in parts[::2]]
    return "".join(parts)


def sheet(stem: str) -> str:
    """Return the parts of a sheet as Markdown.

    Args:
        stem: the component's, such as ``nd`` for ``cards/nd.md``.
    """
    known = {component.stem: component for component in map(registry.describe, registry.components())}
    component = known[stem]
    facts = component.sheet
    verified = str(facts["verified"]).strip()
    parts = [f'!!! info "Status: {facts["status"]}"\n    What was checked: {verified}.']
    for heading in ("Deviations", "Known limits"):
        text = _section(component.text, heading)
        if text:
            parts.append(f"## {heading}\n\n{text}")
    if facts["citation"].strip():
        parts.append(f"## Citation\n\n```bibtex\n{facts['citation'].strip()}\n```")
    return "\n\n".join(parts)


def _section(text: str, heading: str) -> str:
    """Return what stands under a heading of the second level, without it; empty if there is none."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def _link(label: str, address: str, source: Path, docs: Path, *, here: Path) -> str:
    """Return a link as the site needs it; what is no part of the site becomes plain text."""
    parts = urlsplit(address)
    if parts.scheme or not parts.path:
        return f"[{label}]({address})"
    target = (source.parent / parts.path).resolve()
    if target.parent == ROOT / "cards":
        target = docs / "components" / target.name
    elif target.parent == ROOT and target.name in TOP:
        target = docs / target.name.lower()
    if not target.is_relative_to(docs):
        return label
    fragment = f"#{parts.fragment}" if parts.fragment else ""
    return f"[{label}]({Path(os.path.relpath(target, here.parent)).as_posix()}{fragment})"


class MappedFolders(griffe.Extension):
    """Shows griffe the packages that lie beside ``zoo`` and are installed in it, as ``pyproject.toml`` maps them.

    Docstrings are written for readers of the source too: ``::`` in front of an indented block is no Markdown, and our
    ``Example:`` is what griffe knows as ``Examples:``.
    """

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Add the mapped folders to the package."""
        if pkg.path != "zoo":
            return
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        for name, folder in settings["tool"]["setuptools"]["package-dir"].items():
            if name != "zoo":
                self._add(pkg, name.removeprefix("zoo."), ROOT / folder, loader)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Write the docstring as Markdown."""
        if obj.docstring is not None:
            text = re.sub(r"::(?=\n\n +)", ":", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)

    def _add(self, parent: griffe.Module, name: str, folder: Path, loader: griffe.GriffeLoader) -> None:
        package = self._visit(parent, name, folder / "__init__.py", loader)
        for path in sorted(folder.glob("*.py")):
            if path.stem != "__init__":
                self._visit(package, path.stem, path, loader)

    @staticmethod
    def _visit(parent: griffe.Module, name: str, path: Path, loader: griffe.GriffeLoader) -> griffe.Module:
        module = griffe.visit(
            name,
            filepath=path,
            code=path.read_text(encoding="utf-8"),
            extensions=loader.extensions,
            parent=parent,
            docstring_parser=loader.docstring_parser,
            docstring_options=loader.docstring_options,
            lines_collection=loader.lines_collection,
            modules_collection=loader.modules_collection,
        )
        parent.set_member(name, module)
        return module
