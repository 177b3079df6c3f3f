"""The README and the site: blocks of code run or are held against what there is, and the site builds without a warning."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import util
from pathlib import Path

import pytest
from PIL import Image

from tests.doc_blocks import check_block, needs_hub, read_blocks, run_page, zoo_words
from tests.hub_fixtures import run_python
from tests.hub_server import HubServer
from zoo import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages that have a test of their own, of more than that they run.
ELSEWHERE = {"docs/recommender.md", "docs/tutorials/new-component.md"}
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
}
LANGUAGES = {name: {block.language for block in read_blocks(path)} for name, path in PAGES.items()}
PYTHON = [name for name, found in LANGUAGES.items() if "python" in found and name not in ELSEWHERE]
TUTORIALS = [name for name in PYTHON if name.startswith("docs/tutorials/")]
BASH = [name for name, found in LANGUAGES.items() if "bash" in found]
COMMANDS = [name for name in BASH if name.startswith("docs/components/")]

pytestmark = pytest.mark.filterwarnings("ignore")


def run(name: str, folder: Path, hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    """Run a page with its commands; one that speaks to the Hub in a process that sees the Hub of the tests."""
    Image.new("L", (8, 8), 128).save(folder / "photo.png")  # the reader's
    if not needs_hub(PAGES[name]):
        patch.chdir(folder)
        run_page(PAGES[name])
        return
    code = f"""
import contextlib, sys, warnings
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from tests.doc_blocks import run_page
with contextlib.redirect_stdout(sys.stderr):
    run_page(Path({str(PAGES[name])!r}))
"""
    run_python(code, server=hub, home=folder)


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_runs_from_top_to_bottom(
    name: str, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(name, tmp_path, hub, monkeypatch)


@pytest.mark.parametrize("name", [name for name in PYTHON if name not in TUTORIALS])
def test_python_blocks_run_one_after_the_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(PAGES[name], commands=False)
    if name == "README.md":
        assert Path("runs/mine/config.json").is_file()


@pytest.mark.thorough
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_of_a_component_run(
    name: str, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(name, tmp_path, hub, monkeypatch)


@pytest.mark.parametrize("name", BASH)
def test_commands_exist(name: str) -> None:
    for block in read_blocks(PAGES[name]):
        if block.language == "bash":
            check_block(block, PAGES[name])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zoo fitt --config nd-digits", "zoo fitt"),
        ("zoo fit --config nd-digit", "no configuration 'nd-digit'"),
        ("zoo fit --config nd-digits --model.nd_wait 0", "the model has no 'nd_wait'"),
        ("zoo fit --config nd-digits --data.image_size=9 --data.colour=1", "the data have no 'colour'"),
        ("zoo fit --config nd-digits \\\n    --trainer.epochs 1  # a comment", "the trainer has no 'epochs'"),
        ("zoo fit --config nd-digits --modle.nd_weight 0", "no option '--modle.nd_weight'"),
        ("python -m zoo push runs/a me/a --tags v1", "push"),
        ("make demonstration", "no such target"),
        ("python benchmarks/nd_tabel.py", "nd_tabel"),
        ("python benchmarks/nd_table.py --presets cpu", "presets"),
        ("python -m tests.hub_servers", "hub_servers"),
        ("pip install lightning-zoo[everything]", "no such extra"),
        ("curl example.org", "not known here"),
    ],
)
def test_checks_find_what_does_not_exist(line: str, message: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text\n\n```bash\n{line}\n```\n")
    (block,) = read_blocks(page)
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_block(block, page)


def test_blocks_are_read_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '````markdown\n```python\n1 / 0\n```\n````\n- in a list\n\n  ```python title="m.py"\n  a = 1\n  ```\n\n'
        "```python\nfrom m import a\nb = a + 1\n```\n```text\nno code\n```\n"
    )
    assert [(block.language, block.title, block.line) for block in read_blocks(page)] == [
        ("markdown", "", 1), ("python", "m.py", 8), ("python", "", 12), ("text", "", 16),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_page(page)["b"] == 2
    assert "m" not in sys.modules
    # What is not there, or has to be downloaded, is not run; the names are held against what there is all the same.
    page.write_text(
        "```bash\nzoo fit --config my.yaml\nzoo fit --config nd-cifar100-resnet32x4-resnet8x4\nmake demo\n```\n"
    )
    run_page(page)
    assert not Path("runs").exists()
    page.write_text("\n\n```python\n\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(page)
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno) == (page, 4)  # the line of the page, from 0
    page.write_text("```pyhton\n1\n```\n")
    with pytest.raises(AssertionError, match="'pyhton'"):
        read_blocks(page)
    assert zoo_words(["python", "-m", "zoo", "list"]) == zoo_words(["zoo", "list"]) == ["list"]


# -- the site ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built; a warning is an error, a page that the navigation lacks one of them."""
    if util.find_spec("mkdocs") is None or util.find_spec("mkdocstrings_handlers") is None:
        pytest.skip("needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    # Not `--quiet`: it hides the warnings from `--strict` as well.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag != "a":
            self.addresses += [
                value for key in ("src", "href", "srcset", "data", "poster") if (value := named.get(key))
            ]


def test_site_needs_no_other_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        assert not [address for address in Loaded(page).addresses if re.match(r"(\w+:)?//", address)], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(\w+:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_each_component_has_a_page_with_its_sheet_and_its_options(site: Path) -> None:
    for name in registry.components():
        component = registry.describe(name)
        page = re.sub(r"<[^>]+>", "", (site / f"components/{component.stem}.html").read_text(encoding="utf-8"))
        assert f"Status: {component.sheet['status']}" in page, name
        for heading in ("Deviations", "Known limits"):
            assert re.search(rf"^{heading}", page, flags=re.MULTILINE), (name, heading)
        for option in registry.options(name):
            assert re.search(rf"\b{option.name}\b", page), (name, option.name)


def test_site_has_nothing_of_its_making(site: Path) -> None:
    assert not list(site.rglob("*.py"))
    assert "<!-- sheet" not in (site / "components/nd.html").read_text(encoding="utf-8")
    found = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    assert any("cwcl_loss" in entry["title"] for entry in found["docs"])
