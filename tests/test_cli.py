"""The `zoo` command: recipes train, store, load and test; bad input gives one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import zoo
from tests.fresh_processes import run_fresh
from zoo import registry
from zoo.cli import main

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMALL = [*QUIET, "--data.train_samples", "64", "--trainer.max_epochs", "1", "--trainer.num_sanity_val_steps", "0"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `zoo fit --config nd-digits` has run once, the teacher included."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "nd-digits-teacher", *SMALL]) == 0
        assert main(["fit", "--config", "nd-digits", *SMALL]) == 0
    return folder


@pytest.fixture
def inside(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(runs)
    return runs


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("fit", "validate", "test", "predict", "list", "show", "demo"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == zoo.__version__


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["NDDistillation"]["sheet"]["arxiv"] == "2305.17007"
    assert "nd-digits" in rows["NDDistillation"]["recipes"]
    assert main(["list"]) == 0
    assert "NDDistillation" in capsys.readouterr().out


def test_show_component_and_stored_model(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "NDDistillation", "--json"]) == 0
    options = {option["name"]: option for option in json.loads(capsys.readouterr().out)["options"]}
    assert options["nd_weight"]["default"] == "1.0"
    assert options["student"]["default"] is None
    assert all(option["meaning"] for option in options.values())
    assert main(["show", "NDDistillation"]) == 0
    assert main(["show", "runs/nd-digits"]) == 0


def test_fit_stores_what_loads_and_tests_to_the_last_digit(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = inside / "runs/nd-digits"
    assert {"config.json", "model.safetensors", "recipe.yaml"} <= {path.name for path in folder.iterdir()}
    model = zoo.from_pretrained(folder)
    assert type(model).__name__ == "NDDistillation"
    assert int(model.class_counts.sum()) == 64
    best = next(folder.glob("lightning_logs/*/checkpoints/*.ckpt"))
    weights = torch.load(best, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    capsys.readouterr()
    assert main(["test", "--config", "runs/nd-digits", *QUIET]) == 0
    assert "test/acc" in capsys.readouterr().out


def test_recipe_of_a_run_trains_again_to_the_same_weights(inside: Path) -> None:
    again = ["--trainer.default_root_dir", "runs/again", *QUIET]
    assert main(["fit", "--config", "runs/nd-digits", *again]) == 0
    first, second = (load_file(f"runs/{name}/model.safetensors") for name in ("nd-digits", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fit_control(inside: Path) -> None:
    words = ["--model.nd_weight", "0", "--trainer.default_root_dir", "runs/kd"]
    assert main(["fit", "--config", "nd-digits", *SMALL, *words]) == 0
    config = json.loads(Path("runs/kd/config.json").read_text())
    assert config["args"]["nd_weight"] == 0.0
    assert "class_means" not in load_file("runs/kd/model.safetensors")


def test_fit_by_class_path_and_optimizer_from_yaml(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(registry.recipe_path("nd-digits").read_text())
    config["model"]["class_path"] = "zoo.lightning_modules.NDDistillation"
    config["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 0.0}}
    config["trainer"]["default_root_dir"] = "runs/frozen"
    del config["lr_scheduler"]
    Path("own.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "own.yaml", *SMALL]) == 0
    # With a learning rate of 0 the weights are those of the start: the YAML's optimizer was used.
    torch.manual_seed(0)
    start = zoo.NDDistillation(**config["model"]["init_args"])
    stored = zoo.from_pretrained("runs/frozen")
    assert torch.equal(stored.student.fc.weight, start.student.fc.weight)


def test_validate_and_predict(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--config", "nd-digits", *QUIET]) == 0
    assert "val/acc" in capsys.readouterr().out
    assert main(["predict", "--config", "nd-digits", *QUIET]) == 0
    written = load_file("runs/nd-digits/predictions.safetensors")
    assert written["logits"].shape == (359, 10)
    assert torch.equal(written["prediction"], written["logits"].argmax(1))


def test_evaluation_needs_no_teacher(inside: Path) -> None:
    Path("runs/nd-digits-teacher").rename("runs/elsewhere")
    try:
        assert main(["test", "--config", "runs/nd-digits", *QUIET]) == 0
    finally:
        Path("runs/elsewhere").rename("runs/nd-digits-teacher")


def test_resume_by_ckpt_path_warns_of_each_difference(inside: Path) -> None:
    checkpoint = str(next(Path("runs/nd-digits").glob("lightning_logs/*/checkpoints/*.ckpt")))
    words = ["--ckpt_path", checkpoint, "--model.temperature", "2", "--trainer.default_root_dir", "runs/resumed"]
    with pytest.warns(UserWarning, match="trained with temperature=4.0, going on with temperature=2.0"):
        assert main(["fit", "--config", "nd-digits", *SMALL, *words, "--trainer.max_epochs", "2"]) == 0
    assert json.loads(Path("runs/resumed/config.json").read_text())["args"]["temperature"] == 2.0


@pytest.mark.thorough
def test_required_model_is_trained_first(tmp_path: Path) -> None:
    """In a fresh folder one command makes the teacher and then the student (a process of its own, as a user runs it)."""
    words = ["fit", "--config", "nd-digits", *SMALL]
    result = run_fresh(module="zoo", words=words, environment=os.environ, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/nd-digits-teacher/config.json").is_file()
    assert (tmp_path / "runs/nd-digits/config.json").is_file()


def test_required_model_that_no_option_names_is_not_trained(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    words = ["fit", "--config", "nd-digits", *SMALL, "--model.teacher"]
    assert main([*words, str(inside / "runs/nd-digits-teacher")]) == 0
    assert not started
    assert main([*words, "./runs/x/../nd-digits-teacher"]) == 2  # `run` has made none
    assert [command[5] for command in started] == ["nd-digits-teacher"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return its one line."""
    capsys.readouterr()
    assert main(words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zoo ")]
    assert len(error) == 1
    return error[0]


FIT = ["fit", "--config", "nd-digits", *SMALL]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fti"], "no such command. Did you mean fit?"),
        (["list", "--jsn"], "unrecognized arguments: --jsn"),
        (["show", "NDDistilation"], "no component named 'NDDistilation'. Did you mean NDDistillation?"),
        (["show", "."], "is no stored model: it has no config.json"),
        (["fit", "--config", "nd-digts"], "no recipe named 'nd-digts' and no such file. Did you mean nd-digits"),
        (["fit", "--config=nd-digts"], "no recipe named 'nd-digts'"),
        (["fit", "--config", "none.yaml"], "--config none.yaml: no such file"),
        (["fit", "--config", "."], "--config .: the folder has no recipe.yaml"),
        ([*FIT, "--model.nd_wieght", "3"], "no option 'nd_wieght'. Did you mean nd_weight"),
        ([*FIT, "--model.nd_weight", "abc"], "\"nd_weight\": Expected a <class 'float'>. Got value: abc"),
        ([*FIT, "--model", "NDDistilation"], "no class named 'NDDistilation'. Did you mean NDDistillation?"),
        ([*FIT, "--data", "DigitDataModule"], "no class named 'DigitDataModule'. Did you mean DigitsDataModule"),
        ([*FIT, "--modl.nd_weight", "3"], "no option 'modl.nd_weight'. Did you mean model"),
        ([*FIT, "--model.temperature", "-1"], "temperature must be positive, got -1.0"),
        ([*FIT, "--model.student", "timm/resnet81"], "timm has no architecture 'resnet81'. Did you mean resnet18"),
        ([*FIT, "--model.student", "tim/resnet18"], "a name begins with timm/, torchvision/, zoo/"),
        ([*FIT, "--model.num_classes", "7"], "the teacher has 10 classes and the student 7"),
        ([*FIT, "--model.teacher", "./runs/none"], "./runs/none is no folder with a stored model"),
        ([*FIT, "--requires", "{runs/x: nd-digts}"], "no recipe named 'nd-digts'"),
        ([*FIT, "--data.batch_size", "0"], "batch_size must be at least 1, got 0"),
        ([*FIT, "--ckpt_path", "runs/nd-digits/config.json"], "is no Lightning checkpoint"),
        (
            ["test", *FIT[1:], "--trainer.default_root_dir", "runs/none"],
            "nothing is stored in runs/none: run `zoo fit`",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    inside: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(words, capsys)


def test_bad_yaml_key(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: dict[str, Any] = yaml.safe_load(registry.recipe_path("nd-digits").read_text())
    config["model"]["init_args"]["nd_wieght"] = 1.0
    Path("typo.yaml").write_text(yaml.safe_dump(config))
    assert "nd_wieght" in refused(["fit", "--config", "typo.yaml", *SMALL], capsys)
    config["model"]["init_args"].pop("nd_wieght")
    config["trainr"] = {"max_epochs": 1}
    Path("typo.yaml").write_text(yaml.safe_dump(config))
    assert "no option 'trainr.max_epochs'. Did you mean trainer" in refused(["fit", "--config", "typo.yaml"], capsys)


def test_bad_checkpoint_that_names_code(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LightningCLI would import and call what a checkpoint nests in its hyper-parameters; the zoo refuses it unread."""
    poison = {"student": {"class_path": "os.system", "init_args": {"command": "touch harmed"}}}
    torch.save({"state_dict": {}, "hyper_parameters": poison}, "poison.ckpt")
    assert "hyper_parameters.student.class_path is refused" in refused([*FIT, "--ckpt_path", "poison.ckpt"], capsys)
    assert not Path("harmed").exists()


def test_bad_checkpoint_of_another_component(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(next(Path("runs/nd-digits-teacher").glob("lightning_logs/*/checkpoints/*.ckpt")))
    message = refused([*FIT, "--ckpt_path", checkpoint], capsys)
    assert "the checkpoint is of a Classifier, the configuration asks for zoo.NDDistillation" in message


def test_bad_run_leaves_the_stored_model(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("runs/nd-digits/model.safetensors").read_bytes()
    refused([*FIT, "--model.num_classes", "7"], capsys)
    assert Path("runs/nd-digits/model.safetensors").read_bytes() == before


def test_a_class_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``python -m``; behind all else on the path, so that a file called torch.py does no harm."""
    (tmp_path / "users_own.py").write_text(
        "import zoo\n\n\n@zoo.register(name='UsersOwn')\nclass Mine(zoo.Classifier):\n"
        "    def __init__(self, width: int = 8):\n"
        "        super().__init__('zoo/resnet8', 10, student_options={'in_chans': 1})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    words = ["--model", "users_own.Mine", "--data", "DigitsDataModule", "--trainer.logger", "false", *SMALL]
    assert main(["fit", *words, "--trainer.limit_train_batches", "1"]) == 0
    assert sys.path[-1] == str(tmp_path)
