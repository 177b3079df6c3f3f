"""`zoo new`: what it writes is clean and fails where something has to be written; the tutorial fills it in."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.doc_blocks import Block, read_blocks
from zoo.cli import main
from zoo.errors import InputError
from zoo.scaffold import KINDS, Paper, write_paper

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs/tutorials/new-component.md"
FOLDERS = ("callbacks", "cards", "lightning_modules")
# The longest names and the shortest: neither changes how a template is formatted.
NAMES = [("a_key_of_twenty_four_chr", "AClassWithAVeryLongNameOf32Lette"), ("q", "Q")]
TITLE = (
    'A Title That Is Long Enough to Be Broken: On Papers Whose Names Take Up More Than a Line, With "Quotes" and $signs'
)
SHORT = ["--trainer.max_epochs=1", "--data.train_samples=64", "--trainer.enable_progress_bar=false"]
# Runs pytest or `zoo` in one checkout after another; what the checkouts do not have of their own is imported once.
DRIVER = """
import json, os, sys, traceback
import hypothesis, lightning.pytorch, pytest, sklearn.datasets, timm, torchmetrics, torchvision

def run(folder, words):
    os.chdir(folder)
    sys.path.insert(0, folder)
    if words[0] != "zoo":
        return pytest.main(words)
    from zoo.cli import main
    return 2 * main(words[1:])

for folder, words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        status = 3
        try:
            status = run(folder, words)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, 1):  # tests may fail
        sys.exit(f"{words}: {status}")
"""


def copy(names: tuple[str, ...], folder: Path) -> Path:
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def small_checkout(folder: Path) -> Path:
    """The files that `zoo new` looks at, and the names of those that ruff looks for to sort imports."""
    names = ("CHANGELOG.md", "mkdocs.yml", "pyproject.toml", "zoo/__init__.py", "zoo/losses", "zoo/recipes")
    copy((*FOLDERS, *names), folder)
    for name in ("tests/losses", "tests/lightning_modules", "tests/callbacks"):
        (folder / name).mkdir(parents=True)
    for name in ("zoo/errors", "zoo/evaluation", "zoo/towers", "tests/training", "tests/auxiliary_runs"):
        (folder / f"{name}.py").touch()
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout to write into."""
    return small_checkout(tmp_path / "checkout")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that every test leaves as it was."""
    return small_checkout(tmp_path_factory.mktemp("scaffold") / "checkout")


def whole_checkout(folder: Path) -> Path:
    """All that is needed to import and test the zoo in a folder that is not installed."""
    copy((*FOLDERS, "CHANGELOG.md", "mkdocs.yml", "pyproject.toml", "tests", "zoo"), folder)
    for name in FOLDERS:
        (folder / "zoo" / name).symlink_to(folder / name)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("names", NAMES, ids=["long", "short"])
@pytest.mark.parametrize("kind", KINDS)
def test_code_is_clean_whatever_the_names(kind: str, names: tuple[str, str], checkout: Path) -> None:
    pytest.importorskip("ruff")
    written, changed = write_paper(Paper(*names, kind, TITLE, "1701.06548"), checkout)
    files = [path for path in (*written, *changed) if path.suffix == ".py"]
    for command in (["check"], ["format", "--check"]):
        words = [sys.executable, "-m", "ruff", *command, "--no-cache", *files]
        result = subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout
    text = "".join((checkout / path).read_text(encoding="utf-8") for path in written)
    assert not re.search(r"\$(key|cls|loss|\{)", text)
    assert TITLE in " ".join(text.split())
    sheet = (checkout / f"cards/{names[0]}.md").read_text(encoding="utf-8")
    assert yaml.safe_load(sheet.split("---\n")[1])["title"] == TITLE


@pytest.mark.parametrize("kind", KINDS)
def test_shared_files_get_their_line_and_nothing_else(
    kind: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(checkout)
    assert main(["new", "confidence_penalty", "--kind", kind, "--arxiv", "1701.06548", "--root", str(checkout)]) == 0
    shown, after = capsys.readouterr().out, content(checkout)
    package = "lightning_modules" if kind == "module" else "callbacks"
    lines = {
        "zoo/__init__.py": [f'    "ConfidencePenalty": "zoo.{package}.confidence_penalty",'],
        "CHANGELOG.md": [
            "- `ConfidencePenalty` (arXiv 1701.06548): FILL IN the title; recipe `confidence_penalty-digits`."
        ],
        "mkdocs.yml": ["      - ConfidencePenalty: components/confidence_penalty.md"],
    }
    if kind != "callback":
        line = "from zoo.losses.confidence_penalty import confidence_penalty_loss"
        lines["zoo/losses/__init__.py"] = [line, '    "confidence_penalty_loss",']
    assert {name for name, text in before.items() if after[name] != text} == lines.keys()
    for name, added in lines.items():
        new = after[name].splitlines()
        assert [line for line in new if line in added] == added
        assert [line for line in new if line not in added] == before[name].splitlines()
        assert f"  {name}\n" in shown
    table = [line for line in after["zoo/__init__.py"].splitlines() if '": "zoo.' in line]
    place = table.index(lines["zoo/__init__.py"][0])
    assert '"Classifier"' in table[place - 1]
    assert '"DigitsCaptionsDataModule"' in table[place + 1]
    for name in after.keys() - before.keys():
        assert f"  {name}\n" in shown
        assert "FILL IN" in after[name] or name.startswith(f"tests/{package}/")


def test_last_name_goes_to_the_end(checkout: Path) -> None:
    write_paper(Paper("zz", "Zz"), checkout)
    after = content(checkout)
    assert '": "zoo.module",\n    "Zz": "zoo.lightning_modules.zz",\n    "from_pretrained"' in after["zoo/__init__.py"]
    losses = after["zoo/losses/__init__.py"]
    assert re.search(r"\nfrom zoo\.losses\.structure import .*\nfrom zoo\.losses\.zz import zz_loss\n\n", losses)
    assert losses.endswith('    "zz_loss",\n]\n')


def test_paper_without_title_number_and_site(checkout: Path) -> None:
    (checkout / "mkdocs.yml").unlink()
    written, changed = write_paper(Paper("q", kind="loss-callback"), checkout)
    assert Path("mkdocs.yml") not in changed
    sheet = (checkout / "cards/q.md").read_text(encoding="utf-8")
    assert 'title: "FILL IN the title"\n' in sheet
    assert "arxiv" not in sheet
    assert not [path for path in written if "arXiv" in (checkout / path).read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nd"], "'nd' is taken, there is zoo/losses/nd.py, lightning_modules/nd.py"),
        (["push_to_hub", "--kind", "callback"], "'push_to_hub' is taken, there is callbacks/push_to_hub.py"),
        (["contracts"], "'contracts' is taken, there is zoo/losses/contracts.py: choose another key"),
        (["cm", "--class", "CM3"], "CM3 is taken, zoo/__init__.py has it in _LAZY: choose another name"),
        (["kd", "--class", "Other"], "kd_loss is taken, zoo/losses/__init__.py has it in __all__"),
        (["confidence-penalty"], "the key must be a Python name in small letters"),
        (["class"], "the key must be a Python name in small letters"),
        (["../nd"], "the key must be a Python name in small letters"),
        (["q" * 25], "the key must have at most 24 letters, got 25"),
        (["q", "--class", "lower"], "--class must be a Python name in capitalised words, such as CM3, got 'lower'"),
        (["q", "--class", "None"], "--class must be a Python name"),
        (["q", "--class", "Q" * 33], "--class must have at most 32 letters, got 33"),
        (
            ["q", "--kind", "modul"],
            "one of module, loss-callback, callback, got 'modul'. Did you mean module?",
        ),
        (["q", "--arxiv", "cs/0112017"], "--arxiv must be a number such as 2305.17007, got 'cs/0112017'"),
        (["q", "--title", "two\nlines"], "--title must be one line of plain text"),
        (["q", "--title", r"\alpha"], "--title must be one line of plain text without a backslash"),
        (["q", "--titel", "x"], "unrecognized arguments: --titel x; `zoo new --help` shows the options"),
        ([], "the following arguments are required: key"),
    ],
)
def test_bad_input_writes_nothing(
    words: list[str], message: str, untouched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(untouched)
    assert main(["new", *words, "--root", str(untouched)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("zoo new: ")
    assert message in error
    assert content(untouched) == before


def test_bad_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "callbacks").mkdir()
    assert main(["new", "q", "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is no checkout of the zoo, it has no CHANGELOG.md, cards, " in error
    assert [path.name for path in tmp_path.iterdir()] == ["callbacks"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("CHANGELOG.md", "# Changelog\n", "CHANGELOG.md has no part 'Added' under 'Unreleased'"),
        ("mkdocs.yml", "nav: []\n", r"mkdocs.yml has no page of a component in its navigation"),
        ("zoo/__init__.py", "_LAZY = None\n", "zoo/__init__.py has no table _LAZY"),
        ("zoo/losses/__init__.py", '__all__ = [\n    "a",\n]\n', "zoo/losses/__init__.py imports no loss"),
    ],
)
def test_bad_shared_file_writes_nothing(file: str, text: str, message: str, checkout: Path) -> None:
    (checkout / file).write_text(text)
    before = content(checkout)
    with pytest.raises(InputError, match=message):
        write_paper(Paper("q"), checkout)
    assert content(checkout) == before


@pytest.mark.parametrize("broken", [OSError(28, "No space left on device", "q.md"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("written", [0, 5, 9])
def test_all_is_written_or_nothing(
    broken: BaseException, written: int, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of a run that ends after some files, folders of its own and half a file included."""
    before, folders = content(untouched), {path for path in untouched.rglob("*") if path.is_dir()}
    replace, calls = Path.replace, iter(range(100))

    def failing(self: Path, target: Any) -> Path:
        if next(calls) == written:
            raise broken
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    expected = InputError if isinstance(broken, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="nothing is written: No space left" if expected is InputError else None):
        write_paper(Paper("q"), untouched)
    assert content(untouched) == before
    assert {path for path in untouched.rglob("*") if path.is_dir()} == folders


def test_no_paper_is_half_written() -> None:
    """What `zoo new` leaves to be written has been, in every file of the tree."""
    own = {ROOT / "zoo/scaffold.py", Path(__file__), TUTORIAL}
    for folder in (*FOLDERS, "zoo", "tests", "docs"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in {".py", ".md", ".yaml"} and path not in own:
                assert "FILL" + " IN" not in path.read_text(encoding="utf-8"), path


def run_driver(phases: list[tuple[Path, list[str]]]) -> str:
    own = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = {**os.environ, **own}
    words = [sys.executable, "-c", DRIVER, json.dumps([(str(folder), words) for folder, words in phases])]
    result = subprocess.run(
        words, cwd=phases[0][0], env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def pytest_words(folder: Path, *words: str) -> list[str]:
    return [f"--junitxml={folder / 'results.xml'}", "-q", "-p", "no:cacheprovider", *words]


def results(folder: Path) -> dict[str, str]:
    """Test -> why it failed; empty if it passed."""
    found = {}
    for case in ElementTree.parse(folder / "results.xml").getroot().iter("testcase"):
        failed = [entry.get("message", "") for entry in case if entry.tag in ("failure", "error")]
        found[f"{case.get('classname')}::{case.get('name')}"] = failed[0] if failed else ""
    return found


def commands(start: str) -> list[list[str]]:
    """The commands of the tutorial that begin so, without their comments."""
    shell = [block.text for block in read_blocks(TUTORIAL) if block.language in ("bash", "console")]
    return [shlex.split(line, comments=True) for line in "".join(shell).splitlines() if line.startswith(start)]


def blocks() -> dict[str, Block]:
    return {block.title: block for block in read_blocks(TUTORIAL) if block.title}


def without_torch(folder: Path, words: list[str]) -> str:
    """Run `zoo new` of a checkout, and return what it printed."""
    code = (
        "import sys; from zoo.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(status or str([m for m in ('torch', 'lightning', 'numpy', 'jsonargparse') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "", done.stderr
    return done.stdout


@pytest.fixture
def papers(tmp_path: Path) -> Callable[..., Path]:
    """Make a checkout with the paper of the tutorial, of any kind, filled in or not."""

    def make(kind: str = "loss-callback", *, filled: bool) -> Path:
        folder = whole_checkout(tmp_path / f"{kind}-{'filled' if filled else 'empty'}")
        (command,) = commands("zoo new")
        command[command.index("--kind") + 1] = kind
        shown = without_torch(folder, command[1:])
        assert "make check" in shown
        for name, block in blocks().items() if filled else ():
            if kind == "loss-callback" or "losses" in name:
                (folder / name).write_text(block.text, encoding="utf-8")
        return folder

    return make


def test_tutorial_ends_in_a_tested_paper(papers: Callable[..., Path]) -> None:
    """What `zoo new` writes fails and says why; with the tutorial's files it passes, and the recipe trains and stores."""
    first, second = papers(filled=False), papers(filled=True)
    written = {name for name in content(first) if "confidence_penalty" in name}
    assert written - {"tests/callbacks/test_confidence_penalty.py"} == set(blocks())
    assert not [name for name in written if "FILL IN" in (second / name).read_text(encoding="utf-8")]
    own = commands("python -m pytest")[0][3:]
    assert sorted(own) == [f"tests/{name}/test_confidence_penalty.py" for name in ("callbacks", "losses")]
    shared = [f"tests/test_{name}.py" for name in ("conformance", "doctests")]
    shown = run_driver([
        (first, pytest_words(first, *own)),
        (second, pytest_words(second, *own, *shared, "-k", "confidence_penalty or ConfidencePenalty")),
        (second, [*commands("zoo fit")[0], *SHORT]),
    ])  # fmt: skip
    failed = {name.rpartition("::")[2]: why for name, why in results(first).items() if why}
    assert all("FILL IN" in why for why in failed.values()), failed
    passed = {name.rpartition("::")[2] for name, why in results(first).items() if not why}
    assert passed == {"test_bad_input", "test_bad_arguments", "test_weight_zero_is_the_run_without_it"}
    assert {"test_golden", "test_identity_formula", "test_gradcheck", "test_degenerate[nan]"} < failed.keys()
    after = results(second)
    assert not any(after.values()), (shown, after)
    assert len([name for name in after if "test_confidence_penalty" in name]) > len(results(first))
    for name in ("test_sheet[ConfidencePenalty]", "test_examples[zoo.losses.confidence_penalty]"):
        assert any(name in test for test in after), name
    assert (second / "runs/confidence_penalty-digits/config.json").is_file()


@pytest.mark.thorough
def test_recipe_of_the_tutorial_parses_and_its_control_trains(papers: Callable[..., Path]) -> None:
    folder = papers(filled=True)
    control = commands("zoo fit")[1]
    assert f"# Control: {shlex.join(control)}\n" in blocks()["zoo/recipes/confidence_penalty-digits.yaml"].text
    run_driver([
        (folder, pytest_words(folder, "tests/test_recipes.py", "-k", "confidence_penalty")),
        (folder, [*control, *SHORT]),
    ])  # fmt: skip
    assert len(results(folder)) == 3
    assert not any(results(folder).values())
    assert (folder / "runs/confidence_penalty-digits-control/config.json").is_file()


@pytest.mark.thorough
def test_other_kinds_fail_until_they_are_filled_in(papers: Callable[..., Path]) -> None:
    """A module passes with the loss of the tutorial; a callback asks for what it does."""
    empty, callback = papers("module", filled=False), papers("callback", filled=False)
    module = papers("module", filled=True)
    # The conformance of a module trains every module of the zoo first: that is for `make check`.
    tests = [f"tests/{name}/test_confidence_penalty.py" for name in ("losses", "lightning_modules", "callbacks")]
    run_driver([
        (empty, pytest_words(empty, *tests[:2])),
        (callback, pytest_words(callback, tests[2])),
        (module, pytest_words(module, *tests[:2], "tests/test_doctests.py", "-k", "confidence_penalty")),
        (module, [*commands("zoo fit")[0], *SHORT]),
    ])  # fmt: skip
    for folder, harmless in ((empty, {"test_bad_input", "test_bad_arguments"}), (callback, {"test_bad_arguments"})):
        found = {name.rpartition("::")[2]: why for name, why in results(folder).items()}
        assert {name for name, why in found.items() if not why} == harmless
        assert all("FILL IN" in why for why in found.values() if why), found
    assert not any(results(module).values()), results(module)
    config = json.loads((module / "runs/confidence_penalty-digits/config.json").read_text(encoding="utf-8"))
    assert config["component"] == "ConfidencePenalty"
