"""`zoo report`: one page that says what the run says, runs nothing, loads nothing, and takes nothing on trust."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.model_cards import CONFIG, RECIPE
from tests.report_pages import HISTORY, page_of, store
from zoo import report
from zoo.cli import main
from zoo.errors import InputError


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return its one line."""
    assert main(["report", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored model with all that a run can leave."""
    return store(tmp_path_factory.mktemp("report") / "nd-digits", drawn=True)


@pytest.fixture(scope="module")
def control(run: Path) -> Path:
    """Its control: one argument differs, and with it the results."""
    changes = {"args.nd_weight": 0, "run.metrics.test.acc": 0.97, "run.metrics.val": {"loss": "nan"}}
    return store(run.parent / "control", changes)


def test_page_says_what_the_run_says(run: Path) -> None:
    page = page_of(run)
    assert page.all("h1")[0].text == "nd-digits"
    for text in (
        "NDDistillation", "Yuzhu Wang", "Improving Knowledge Distillation via Regularizing Feature Direction and Norm",
        "arXiv 2305.17007", "(seed 3)", "val/acc chose the weights", "CPU, 2 threads", "1 h 2 min", "32-true",
        "lightning-zoo 0.1.0, torch 2.14.0", "ParquetImagesDataModule, train 1,259, val 179, test 359 samples",
        "zoo fit --config path/to/nd-digits", "--model.nd_weight 0", "zoo report path/to/nd-digits runs/control",
        "./runs/teacher", "seed_everything: 0", "batch_size: 64", "date of the run", "The idea",
    ):  # fmt: skip
        assert text in page.text, text
    assert page.table("Final metrics") == [
        ["metric", "val 179 samples", "test 359 samples"],
        ["acc", "0.9944", "0.9861"],
        ["loss", "0.03", "not measured"],
    ]
    metrics = CONFIG["run"]["metrics"]
    exact = sorted(float(element.attributes["value"]) for element in page.all("data"))
    assert exact == sorted(value for split in metrics.values() for value in split.values())
    names = ["config.json", "model.safetensors", "recipe.yaml", "README.md"]
    names += [f"figures/{name}.png" for name in ("loss", "metrics", "saliency")]
    contents = [(run / name).read_bytes() for name in names]
    assert page.table("Files")[1:] == [
        [name, f"{len(content):,}", hashlib.sha256(content).hexdigest()]
        for name, content in zip(names, contents, strict=True)
    ]
    assert page.table("Networks")[1] == ["teacher", "timm/resnet34.a1_in1k", "not recorded", "ab" * 32]


@pytest.mark.filterwarnings("ignore")
def test_page_of_a_run_of_zoo_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data.train_samples", "64", "--trainer.max_epochs", "2", "--trainer.num_sanity_val_steps", "0"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    assert main(["fit", "--config", "nd-digits-teacher", *words, *quiet]) == 0
    capsys.readouterr()
    assert main(["report", "runs/nd-digits-teacher"]) == 0
    assert capsys.readouterr().out == "runs/nd-digits-teacher/report.html\n"
    page = page_of(Path("runs/nd-digits-teacher"))
    config = json.loads(Path("runs/nd-digits-teacher/config.json").read_text())
    metrics = config["run"]["metrics"]
    shown = {row[0]: dict(zip(("val", "test"), row[1:], strict=True)) for row in page.table("Final metrics")[1:]}
    assert shown == {
        name: {split: f"{metrics[split][name]:.4g}" for split in ("val", "test")} for name in metrics["val"]
    }
    lasts = {row[0]: row[-1] for row in page.table("Finite values")[1:]}
    assert lasts == {name: f"{points[-1][1]:.5g}" for name, points in config["run"]["history"].items()}
    assert lasts.keys() == {"train/loss", "val/acc", "val/loss"}
    assert "max_epochs: 2" in page.text
    assert "README.md, as it lies in the folder Classifier" in page.text


def test_curves_are_the_logged_values(run: Path) -> None:
    page = page_of(run)
    assert page.table("Finite values")[1:] == [
        ["lr", "3", "0.1", "0.1", "0.1", "0.1"],
        ["train/loss", "3", "2.5", "0.5", "2.5", "0.5"],
        ["val/acc", "3", "0.25", "0.25", "0.99441", "0.99441"],
        ["val/loss", "2", "2", "0.03", "2", "0.03"],
    ]
    panels = [element for element in page.all("figcaption") if element.attributes == {}]
    assert [panel.text for panel in panels[:3]] == ["loss", "acc", "lr"]
    said = [element.text for element in page.all("title") if "svg" in element.parents]
    expected = {
        f"{split if slash else 'no split'}, epoch {epoch}: {value:.6g}"
        for name, points in HISTORY.items()
        for epoch, value in points
        if value is not None
        for split, slash, _ in [name.partition("/")]
    }
    assert set(said) == expected
    assert len(said) == 11


def test_runs_are_compared_with_the_first(run: Path, control: Path) -> None:
    page = page_of(run, control)
    assert page.all("h1")[0].text == "nd-digits against control"
    assert page.table("Final metrics") == [
        ["metric", "nd-digits", "control"],
        ["val 179 samples"],
        ["acc", "0.9944", "not measured"],
        ["loss", "0.03", "not finite"],
        ["test 359 samples"],
        ["acc", "0.9861", "0.97-0.01607"],
    ]
    assert page.table("Options") == [["option", "nd-digits", "control"], ["model.nd_weight", "2.0", "0"]]
    assert "One option differs: model.nd_weight. What differs in the results is due to it or to chance" in page.text
    assert [row[1] for row in page.table("The runs")[1:]] == ["NDDistillation", "NDDistillation control: nd_weight: 0"]
    for drawing in page.all("svg")[2:]:  # two in the key
        assert "nd-digits: " in drawing.attributes["aria-label"]
        assert "control: " in drawing.attributes["aria-label"]
    assert page.text.count("The idea") == 1


def test_runs_that_differ_in_more_say_so(run: Path, tmp_path: Path) -> None:
    changes = {
        "run.seed": 4,
        "args.student_options": {"in_chans": 3},
        "versions.torch": "2.11.0",
        "run.data.args.batch_size": 32,
        "run.steps": 800,
    }
    other = store(tmp_path / "nd-digits", changes, recipe=RECIPE + "trainer: {callbacks: [{class_path: A}]}\n")
    page = page_of(run, other)
    names = ["nd-digits (1)", "nd-digits (2)"]
    assert page.table("Options") == [
        ["option", *names],
        ["model.student_options.in_chans", "1", "3"],
        ["data.batch_size", "64", "32"],
        ["seed", "3", "4"],
        ["trainer.callbacks[0].class_path", "not set", "A"],
        ["steps", "400", "800"],
        ["version of torch", "2.14.0", "2.11.0"],
    ]
    assert "3 options differ and the seed, so no difference in the results can be put down to one" in page.text
    alike = store(tmp_path / "alike", {"run.seed": 4}, recipe=None)
    page = page_of(run, alike)
    assert (
        "The runs were configured alike, but for the seed. Options of the trainer were not compared: alike" in page.text
    )


def test_same_folder_gives_same_bytes_without_torch(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "elsewhere" / "nd-digits")
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))
    code = (
        "import sys\nfrom zoo.cli import main\n"
        f"assert main(['report', {str(copy)!r}]) == 0\n"
        "print([name for name in ('torch', 'lightning', 'timm') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == [f"{copy}/report.html", "[]"]
    assert (copy / "report.html").read_text(encoding="utf-8") == report.render([run])
    assert sorted(path.name for path in copy.iterdir()) == sorted(
        [*(path.name for path in run.iterdir()), "report.html"]
    )


@pytest.mark.parametrize(
    ("changes", "without", "said"),
    [
        ({"run": None}, "recipe.yaml", "No result was recorded with these weights."),
        ({"run": None}, "recipe.yaml", "No recipe was stored with these weights."),
        ({"run": None}, "recipe.yaml", "so the run cannot be repeated from this folder alone"),
        (
            {"run": None},
            "README.md",
            "seed, epochs, optimizer steps, time, hardware, precision,",
        ),
        ({"run.history": {}}, "README.md", "No curves were recorded with this model, and there is no metrics.csv."),
        ({"run.history": {"a": [[0, None]]}}, "README.md", "There is no README.md: `zoo card` renders one."),
        ({}, "model.safetensors", "model.safetensors is missing, so this folder cannot be loaded."),
        ({}, "figures/saliency.png", "Neither the component nor a callback of the run has drawn figures."),
        ({"component": None}, "recipe.yaml", "The class is not recorded"),
        ({"component": "Mine"}, "recipe.yaml", "The component is no part of this zoo, so it has no sheet: Mine"),
        ({"args.nd_weight": 0}, "recipe.yaml", "the control: nd_weight: 0"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, changes: dict[str, Any], without: str, said: str) -> None:
    folder = store(tmp_path / "run", changes)
    (folder / without).unlink()
    assert said in page_of(folder).text


def test_files_that_cannot_be_shown_are_said(tmp_path: Path) -> None:
    folder = store(tmp_path / "run")
    (folder / "recipe.yaml").write_text("a: &b [1]\nc: *b")
    (folder / "README.md").write_bytes(b"\xff\xfe\0")
    page = page_of(folder)
    assert "recipe.yaml is no plain YAML." in page.text
    assert "README.md is no UTF-8 text." in page.text
    (folder / "recipe.yaml").write_text("just words")
    (folder / "README.md").write_text("a" * ((1 << 17) + 1))
    page = page_of(folder)
    assert "recipe.yaml holds no configuration." in page.text
    assert "README.md has 131,073 bytes, of at most 131,072 that a report shows." in page.text


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no folder; `zoo pull OWNER/NAME FOLDER`" in refused(["me/nd-digits"], capsys)
    told = refused([str(run.parent)], capsys)
    assert "Did you mean" in told
    assert str(run) in told
    (tmp_path / "config.json").write_text("{}")
    assert "it has no zoo_format. `zoo fit` stores models" in refused([str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "is no valid JSON, so it is damaged: store the model anew" in refused([str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text(" " * (1 << 20) + "{}")
    assert "is larger than 1048576 bytes" in refused([str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text('{"zoo_format": 1, "run": {"history": [1]}}')
    assert "run.history must be an object, got list" in refused([str(tmp_path)], capsys)
    assert "is given twice" in refused([str(run), f"{run}/."], capsys)
    assert "at most 8 runs" in refused([str(run)] * 9, capsys)
    assert "--out must be a file that ends in .html" in refused([str(run), "--out", str(run / "config.json")], capsys)
    (tmp_path / "out.html").mkdir()
    assert "name another place with --out" in refused([str(run), "--out", str(tmp_path / "out.html")], capsys)
    assert "name another place with --out" in refused([str(run), "--out", str(tmp_path / "config.json/a.html")], capsys)
    assert "`zoo report --help` shows the options" in refused([], capsys)
    assert not (run / "report.html").exists()


def test_page_replaces_an_older_one_at_one_stroke(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/page.HTML"
    assert report.write([run], out) == out
    before = out.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="no folder"):
        report.write([tmp_path / "nothing"], out)
    assert report.write([run], out).read_text(encoding="utf-8") == before
    assert [path.name for path in out.parent.iterdir()] == ["page.HTML"]
