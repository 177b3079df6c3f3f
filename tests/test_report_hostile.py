"""A report of a folder that somebody else made: whatever it holds is text, and the browser has nothing to run or to load."""

from __future__ import annotations

import base64
import html
import json
import re
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.report_pages import TAGS, Page, browse, find_browser, hostile, page_of, png, store
from zoo import report
from zoo.report_card import to_html

CALM = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])

PIECES = [
    "# ", "## ", "###### ", "- ", "> ", "1. ", "    ", "\n", "\n\n", "| a | b |\n|---|---|\n", "| c ", "```", "`",
    "*", "**", "~~", "_", "[a](", "http://a.b)", "javascript:b)", "![", "](figures/a.png)", "](figures/s.png)",
    "](http://a.b)", "<http://a.b>", "&#60;", "<details>", "</details>", "<summary>", "</summary>",
    "<details><summary>x</summary>", "<code>", "</code>", "<!--", "-->", "<b>", "<script>", "text", "---\n",
    "<a href='x' onclick='y'>", "\\", "\0", "\u202e", "[r]: http://a.b\n", "[r]", "<!-- zoo:begin use -->",
]  # fmt: skip
PROBE = """<script>
addEventListener("load", () => {
  const count = (what) => document.querySelectorAll(what).length;
  document.title = JSON.stringify({
    images: [...document.images].map((image) => [image.naturalWidth, image.naturalHeight]),
    headings: count("h2"), tables: count("table"), wide: document.documentElement.scrollWidth,
    drawn: [...document.querySelectorAll(".panel svg")].every((one) => one.getBBox().width > 200),
    loaded: performance.getEntriesByType("resource").map((one) => one.name).filter((name) => !name.startsWith("data:")),
    back: getComputedStyle(document.body).backgroundColor,
  });
  console.error("zoo-probe");
});
</script></body>"""


def test_whatever_the_folder_holds_is_text(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "<img src=x onerror=alert(1)>")
    page = page_of(folder)
    assert page.text.count("<script>alert('zoo-canary')</script>") > 20
    assert page.all("h1")[0].text == "<img src=x onerror=alert(1)>"
    links = [element.attributes["href"] for element in page.all("a") if not element.attributes["href"].startswith("#")]
    assert links == ["http://good.example", "https://good.example/%22onclick=x"]
    # Of the images in the card none is known; what can be shown are the two that are whole.
    images = [(image.attributes["width"], image.attributes["height"]) for image in page.all("img")]
    assert images == [("3", "2"), ("5", "4")]
    for said in (
        "figures/samples.png is not shown: it is no PNG image that can be read",
        "figures/layers.png is not shown: it is no PNG",
        "figures/robustness.png is not shown: it has 4,194,305 bytes",
        "figures/a.png is not shown: it has 9000 x 6000 pixels",
        "zoo fit --config 'path/to/<img src=x onerror=alert(1)>'",
    ):
        assert said in page.text, said
    page_of(folder, store(tmp_path / "other"))


def test_policy_of_the_page_forbids_scripts_and_loading(tmp_path: Path) -> None:
    (policy,) = [meta for meta in page_of(store(tmp_path / "run")).all("meta") if meta.attributes.get("http-equiv")]
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\na: 1\n---\n# T\ntext", "<h3>T</h3>\n<p>text</p>\n"),
        ("### deep first\n# then", "<h3>deep first</h3>\n<h3>then</h3>\n"),
        ("<!-- zoo:begin use -->\n# T\n- a\n<!-- zoo:end use -->", "<h3>T</h3>\n<ul>\n<li>a\n</li>\n</ul>\n"),
        ("/home/me/x `a` <b>", "<p>/home/me/x <code>a</code> &lt;b&gt;</p>\n"),
        ("<code>a&#124;&#60;b</code>", "<p><code>a|&lt;b</code></p>\n"),
        ("a\u202eb hf_" + "a" * 20, "<p>a\ufffdb (not shown)</p>\n"),
        (
            "<details>\n<summary>x & y</summary>\n\na\n\n</details>\n\n</details>",
            "<details>\n<summary>x &amp; y</summary>\n<p>a</p>\n</details>\n<p>&lt;/details&gt;</p>\n",
        ),
        ("![a *b*](figures/a.png)", '<p><img src="data:image/png;base64,AA" alt="a b"></p>\n'),
        ("![s](figures/s.png)", '<p><a href="#figure-1">Figure: s</a></p>\n'),
        ("[![s](figures/s.png)](http://a.b)", '<span class="absent">[image: s]</span></a></p>\n'),
        ("![x](http://a.b/c.png)", '<p><span class="absent">[image: x]</span></p>\n'),
        (
            "[a](recipe.yaml) [b](HTTPS://a.b)",
            '<p>a <a href="HTTPS://a.b" rel="noopener noreferrer nofollow">b</a></p>\n',
        ),
    ],
)
def test_card_as_html(text: str, expected: str) -> None:
    images = {"figures/a.png": "data:image/png;base64,AA", "figures/s.png": "#figure-1"}
    found = to_html(text, level=2, images=images)
    assert found.endswith(expected)
    assert found == expected or text.startswith("[!")


@CALM
@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
def test_any_card_becomes_whole_elements_of_known_kinds(text: str) -> None:
    images = {"figures/a.png": "data:image/png;base64,AA", "figures/s.png": "#figure-1"}
    page = Page(f"<!DOCTYPE html>\n<body>{to_html(text, level=2, images=images)}</body>")
    for element in page.elements:
        assert element.tag in {*TAGS, "s"}
        assert element.attributes.keys() <= {
            "href",
            "rel",
            "src",
            "alt",
            "class",
            "role",
            "aria-label",
            "tabindex",
            "start",
        }
        assert element.attributes.get("href", "#figure-1") in ("#figure-1", "http://a.b")
        assert element.tag != "a" or "a" not in element.parents


@pytest.mark.skipif(find_browser() is None, reason="needs chromium or Google Chrome: apt-get install chromium")
def test_page_in_a_browser_without_network(tmp_path: Path) -> None:
    """As it is, nothing goes to the console; without its policy, a probe in it finds the images whole and nothing loaded."""
    folder = hostile(tmp_path / "hostile")
    (folder / "figures/fine.png").write_bytes(png(600, 100))
    runs = [store(tmp_path / "run", drawn=True), store(tmp_path / "control", {"args.nd_weight": 0}), folder]
    path = report.write(runs, tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    seen, console, picture = browse(path, tmp_path / "plain")
    assert console == []
    assert seen.count("<h2") == text.count("<h2")
    assert seen.count("<table") == text.count("<table")
    with Image.open(picture) as image:
        assert image.size == (1280, 900)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    seen, console, _ = browse(probed, tmp_path / "forbidden")
    assert "Content Security Policy" in console[0]  # a script that got in would not run
    assert "zoo-probe" not in "".join(console)
    probed.write_text(re.sub("<meta http-equiv[^>]*>", "", probed.read_text(encoding="utf-8")), encoding="utf-8")
    seen, console, picture = browse(probed, tmp_path / "probed", width=500, dark=True)
    assert ["zoo-probe" in line for line in console] == [True], console
    found = json.loads(html.unescape(re.findall("<title>(.*?)</title>", seen)[0]))
    images = [base64.b64decode(uri) for uri in re.findall('src="data:image/png;base64,([^"]*)"', text)]
    assert found["images"] == [list(Image.open(BytesIO(content)).size) for content in images]
    assert [600, 100] in found["images"]
    assert found["wide"] <= 500  # nothing is wider than the window
    assert (found["loaded"], found["drawn"]) == ([], True)
    assert (found["headings"], found["tables"]) == (text.count("<h2"), text.count("<table"))
    assert found["back"] == "rgb(18, 22, 27)"
