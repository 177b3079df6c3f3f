"""Stored runs written by hand, and report pages read as a strict reader and as a browser would."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.model_cards import RECIPE, changed, replace
from zoo import publish, report

__all__ = ["HISTORY", "TAGS", "Element", "Page", "browse", "find_browser", "hostile", "page_of", "png", "store"]

VIEW = ["html", "head", "body", "header", "main", "footer", "section", "nav", "title", "meta", "link", "style"]
TEXT = ["h1", "h2", "h3", "h4", "h5", "h6", "p", "ul", "ol", "li", "a", "code", "pre", "em", "strong", "cite", "span"]
PARTS = ["dl", "dt", "dd", "details", "summary", "figure", "figcaption", "img", "div", "data", "blockquote", "hr", "br"]
TABLE = ["table", "caption", "thead", "tbody", "tr", "th", "td"]
DRAWING = ["svg", "g", "path", "circle", "text"]
TAGS = {*VIEW, *TEXT, *PARTS, *TABLE, *DRAWING}
HOSTILE = "</code></pre></details></style></title><script>alert('zoo-canary')</script><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "br", "img", "hr", "input", "col", "wbr"}
HISTORY = {
    "val/acc": [[0, 0.25], [1, 0.5], [2, 0.994413]],
    "train/loss": [[0, 2.5], [1, 1.25], [2, 0.5]],
    "val/loss": [[0, 2.0], [1, None], [2, 0.03]],
    "lr": [[0, 0.1], [1, 0.1], [2, 0.1]],
}


def png(width: int = 3, height: int = 2, shade: int = 90) -> bytes:
    """A grey PNG file, chunk by chunk."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + bytes([shade]) * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def store(
    folder: Path, changes: dict[str, Any] | None = None, *, recipe: str | None = RECIPE, drawn: bool = False
) -> Path:
    """A stored model as `zoo fit` leaves it, but for the weights; ``changes`` as `tests.model_cards.changed` takes them."""
    config = changed("run.history", HISTORY)
    for path, value in (changes or {}).items():
        replace(config, path, value)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config if drawn else {**config, "run": None}))
    (folder / "model.safetensors").write_bytes(b"weights")
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe)
    (folder / "figures").mkdir()
    (folder / "figures/saliency.png").write_bytes(png())
    publish.write_card(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Element:
    """One element: its tag, its attributes, and all text in it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    parents: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """A page, read by a parser that forgives nothing: each tag is closed, where it must be, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.open: list[Element] = []
        assert text.startswith("<!DOCTYPE html>\n")
        self.feed(text)
        self.close()
        assert [element.tag for element in self.open] == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert max(Counter(names).values(), default=1) == 1, (tag, names)
        element = Element(tag, {name: value or "" for name, value in attrs}, parents=[one.tag for one in self.open])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(element.tag == "svg" for element in self.open), tag
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def all(self, *tags: str) -> list[Element]:
        """The elements of these kinds, in the order of the page."""
        return [element for element in self.elements if element.tag in tags]

    @property
    def text(self) -> str:
        """What a reader sees, with blanks made one."""
        return " ".join(self.all("body")[0].text.split())

    def table(self, caption: str) -> list[list[str]]:
        """The rows of the table whose caption begins so."""
        rows: list[list[str]] = []
        inside = False
        for element in self.elements:
            if element.tag == "caption":
                inside = element.text.strip().startswith(caption)
            elif inside and element.tag == "tr":
                rows.append([])
            elif inside and element.tag in ("td", "th"):
                rows[-1].append(" ".join(element.text.split()))
        return rows


def find_browser() -> str | None:
    """A Chromium that can run without a display, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def browse(page: Path, folder: Path, *, width: int = 1280, dark: bool = False) -> tuple[str, list[str], Path]:
    """Open a page without network: the document as it is then, what went to the console, and a picture of it."""
    browser = find_browser()
    assert browser is not None
    folder.mkdir()
    picture = folder / "page.png"
    command = [
        browser, "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900", f"--blink-settings=preferredColorScheme={int(not dark)}",
        f"--screenshot={picture}", "--dump-dom", *(["--no-sandbox"] if os.geteuid() == 0 else []), page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=folder)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout, console, picture


def page_of(*folders: Path) -> Page:
    """The page of these runs, after what must hold for every page."""
    page = Page(report.render(folders))
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        assert element.tag in TAGS, element
        assert not [
            name for name in element.attributes if name.startswith("on") or name in ("style", "srcset", "action")
        ]
        for name in ("href", "src"):
            value = element.attributes.get(name, "#results")
            web = element.tag == "a" and re.match(r"https?://", value)
            assert web or value.startswith("data:") or value.removeprefix("#") in ids, element
        assert element.attributes.get("aria-labelledby", "results") in ids
    headings = [int(element.tag[1]) for element in page.elements if re.fullmatch("h[1-6]", element.tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(headings)), headings
    assert all(image.attributes["alt"] for image in page.all("img"))
    assert page.all("html")[0].attributes["lang"] == "en"
    outside_the_card = [table for table in page.all("table") if "details" not in table.parents]
    assert len(page.all("caption")) >= len(outside_the_card)
    assert "url(" not in page.all("style")[0].text
    assert "@import" not in page.all("style")[0].text
    return page


def hostile(folder: Path) -> Path:
    """A run all of whose texts are markup, with files that are not what they are called."""
    changes = {
        "run.metrics": {HOSTILE: {HOSTILE: 1.0}},
        "run.history": {HOSTILE: [[0, 1.0], [1, 2.0]]},
        "run.hardware": HOSTILE,
        "run.monitor": HOSTILE,
        "run.data": {"name": HOSTILE, "args": {HOSTILE: HOSTILE}, "splits": {HOSTILE: 3}},
        "args": {HOSTILE: HOSTILE, "student": HOSTILE},
        "supplied": {HOSTILE: HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "omitted": {HOSTILE: {"name": HOSTILE, "revision": HOSTILE, "sha256": HOSTILE}},
        "component": HOSTILE,
    }
    store(
        folder,
        changes,
        recipe=f"{json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}\nrequires: {{{json.dumps(HOSTILE)}: a}}\n",
    )
    (folder / "README.md").write_text(
        f"---\nlicense: {HOSTILE}\n---\n# {HOSTILE}\n{HOSTILE}\n\n<details>\n\n</details>\n\n</details>\n\n"
        f"<details><summary>never closed</summary>\n\n- <details><summary>b</summary>\n\n"
        "[a](javascript:alert(1)) [b](data:text/html,x) [c](//evil.example) [d](file:///etc/passwd) [e](http://good.example)"
        ' ![f](https://evil.example/x.png) ![g](figures/../x.png) ![h](javascript:x "a") <https://good.example/"onclick=x>\n'
        f"###### deep\n```html {HOSTILE}\n{HOSTILE}\n```\n| {HOSTILE} |\n|---|\n| <code>{HOSTILE}</code> |\n<!-- a --> b\n"
    )
    (folder / "figures/samples.png").write_text(HOSTILE)
    (folder / "figures/layers.png").write_bytes(png()[:-20])
    (folder / "figures/a.png").write_bytes(png(9000, 6000))
    (folder / "figures/robustness.png").write_bytes(b"\0" * ((4 << 20) + 1))
    (folder / "figures" / '"onerror=alert(1) .png').write_bytes(png())
    (folder / "figures/fine.png").write_bytes(png(5, 4))
    return folder
