"""A repository that means harm: one line that names the field, and nothing imported, executed or written elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.hub_fixtures import call_python
from tests.hub_server import HubServer
from tests.stored import seeded_distillation
from zoo import registry
from zoo.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")

_EVIL = """
import os, pathlib
pathlib.Path(os.environ["HARM"], "imported").touch()
from torch import nn
class Evil(nn.Module): pass
def make(*args, **options): pathlib.Path(os.environ["HARM"], "called").touch()
"""
_CODE = {"class_path": "evilmod.Evil", "init_args": {}}


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def header(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 40


def args(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["args"].update(changes)


# name -> change of config.json, and what the message holds
CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "class-path": (args(student=_CODE), "config.args.student.class_path is refused"),
    "target": (args(_target_="os.system"), "config.args._target_ is refused"),
    "instantiator": (lambda c: c["versions"].update(_instantiator="evilmod.make"), "versions._instantiator is refused"),
    "nested": (args(student_options={"a": [{"b": _CODE}]}), "config.args.student_options.a[0].b.class_path is refused"),
    "os-system": (lambda c: c.update(component="os.system"), "no component named 'os.system'"),
    "eval": (lambda c: c.update(component="builtins.eval"), "no component named 'builtins.eval'"),
    "evilmod": (lambda c: c.update(component="evilmod.Evil"), "no component named 'evilmod.Evil'"),
    "supplied": (lambda c: c.update(supplied={"student": "evilmod.Evil"}), "supplied.student: NDDistillation takes no"),
    "no-such-key": (args(pretrained_from="x"), "args.pretrained_from: NDDistillation takes no such argument"),
    "huge-int": (args(num_classes=10**12), "config.json ask for"),
    "other-shape": (args(num_classes=11), "student.fc.bias has shape (10,), but the arguments in config.json ask for"),
}
_BIAS = {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}

# name -> recipe as text or change of nd-digits-teacher, and what the message holds
RECIPES: dict[str, tuple[str | Callable[[dict[str, Any]], Any], str]] = {
    "model-class": (lambda r: r["model"].update(class_path="os.system"), "model.class_path 'os.system' is refused"),
    "callback": (
        lambda r: r["trainer"].update(callbacks=[{"class_path": "evilmod.Evil"}]),
        "trainer.callbacks[0].class_path 'evilmod.Evil' is refused",
    ),
    "student": (lambda r: r["model"]["init_args"].update(student=_CODE), "model.init_args.student.class_path is refused"),
    "student-text": (
        lambda r: r["model"]["init_args"].update(student=json.dumps(_CODE)),
        "model.init_args.student.class_path is refused",
    ),
    "student-file": (
        lambda r: r["model"]["init_args"].update(student="./config.json"),
        "model.init_args.student './config.json' is refused",
    ),
    "strategy-text": (
        lambda r: r["trainer"].update(strategy="{class_path: evilmod.Evil}"),
        "trainer.strategy.class_path is refused",
    ),
    "strategy-key": (
        lambda r: r["trainer"].update({"strategy.class_path": "evilmod.Evil"}),
        "trainer has the key 'strategy.class_path', which is no option",
    ),
    "plugins": (lambda r: r["trainer"].update(plugins=[_CODE]), "trainer.plugins[0].class_path is refused"),
    "lambda": (
        lambda r: r.update(lr_scheduler={"class_path": "LambdaLR", "init_args": {"lr_lambda": "os.system"}}),
        "lr_scheduler.class_path 'LambdaLR' is refused",
    ),
    "scale": (
        lambda r: r.update(lr_scheduler={"class_path": "CyclicLR", "init_args": {"scale_fn": "evilmod.make"}}),
        "lr_scheduler.init_args.scale_fn 'evilmod.make' is refused",
    ),
    "tag": ("model: !!python/object/apply:os.system ['touch harmed']", "recipe.yaml is no plain YAML"),
    "ckpt": (lambda r: r.update(ckpt_path="model.ckpt"), "names a checkpoint (ckpt_path)"),
    "laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]", "the alias *a is refused"),
    "outside": (lambda r: r["trainer"].update(default_root_dir="../x"), "trainer.default_root_dir '../x' points outside"),
    "requires": (lambda r: r.update(requires={"/tmp/x": "nd-digits"}), "requires./tmp/x points outside"),
    "sends": (
        lambda r: r["trainer"].update(callbacks=[{"class_path": "PushToHub", "init_args": {"repo_id": "you/x"}}]),
        "trainer.callbacks[0].class_path PushToHub is refused",
    ),
}  # fmt: skip


def visit(configs: list[str], others: list[str], recipes: list[str]) -> dict[str, Any]:
    """Use each repository in every way, in the process of a client."""
    import contextlib
    import io
    import os
    import resource
    import sys
    from pathlib import Path

    import torch

    import zoo
    from zoo.cli import main

    def command(*words: str) -> list[Any]:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main(list(words))
        return [code, errors.getvalue()]

    def load(repo: str) -> list[str]:
        said = []
        for use in (zoo.from_pretrained, lambda name: zoo.load_weights(name, torch.nn.Linear(2, 2))):
            try:
                use(repo)
            except zoo.InputError as error:
                said.append(str(error))
            else:
                said.append("")
        return said

    torch.set_num_threads(1)
    load("hostile/good")  # what is imported once does not count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {"load": {}, "pull": {}, "show": {}, "fit": {}}
    for name in [*configs, *others]:
        found["load"][name] = load(f"hostile/{name}")
        found["pull"][name] = command("pull", f"hostile/{name}", f"pulled/{name}")
        found["show"][name] = command("show", f"hostile/{name}")
    found["mebibytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for name in recipes:
        found["fit"][name] = command("fit", "--config", f"hf://hostile/{name}")
    found["evil"] = "evilmod" in sys.modules
    found["here"] = sorted(path.name for path in Path.cwd().iterdir())
    found["pulled"] = sorted({name for _, _, names in os.walk("pulled") for name in names})
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a client must not touch, its own home and the module that must not be imported."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("harm", "path", "home"):
        (folder / name).mkdir()
    (folder / "path/evilmod.py").write_text(_EVIL)
    return folder


@pytest.fixture(scope="module")
def found(hub_server: HubServer, place: Path) -> dict[str, Any]:
    """What a client met in all repositories, one process for all of them."""
    stored = seeded_distillation().save_pretrained(place / "good")
    good = {name: (stored / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub_server.plant("hostile/good", good)
    for name, (change, _) in CONFIGS.items():
        config = json.loads(good["config.json"])
        change(config)
        hub_server.plant(f"hostile/{name}", {**good, "config.json": json.dumps(config).encode()})
    bomb = pickle.dumps(Bomb(place / "harm/unpickled"))
    beside = {"model.ckpt": bomb, "pytorch_model.bin": bomb, "evil.py": _EVIL.encode()}
    other = seeded_distillation(temperature=2.0)
    other.student.fc.bias.data.add_(1)
    foreign = (other.save_pretrained(place / "other") / "model.safetensors").read_bytes()
    absolute = str(place / "harm/absolute")
    planted: dict[str, dict[str, bytes]] = {
        "pickle": {**good, "model.safetensors": bomb},
        "lie": {**good, "model.safetensors": header({"student.fc.bias": _BIAS})},
        "beside": {**good, **beside},
        "only-ckpt": beside,
        "names": {**good, "../../../escaped": b"x", absolute: b"x", "figures/../../../escaped": b"x"},
        "huge-config": {**good, "config.json": b" " * (2**20 + 1)},
        "huge-recipe": {**good, "recipe.yaml": b"#" * (2**20 + 1)},
        "mixed": {**good, "model.safetensors": foreign},
    }
    for name, files in planted.items():
        hub_server.plant(f"hostile/{name}", files)
    base = yaml.safe_load(registry.recipe_path("nd-digits-teacher").read_text())
    for name, (recipe, _) in RECIPES.items():
        text = recipe
        if not isinstance(recipe, str):
            changed = json.loads(json.dumps(base))
            recipe(changed)
            text = yaml.safe_dump(changed)
        hub_server.plant(f"hostile/recipe-{name}", {"recipe.yaml": str(text).encode(), "config.json": b"{}"})
    paths = os.pathsep.join(filter(None, [str(place / "path"), os.environ.get("PYTHONPATH")]))
    found: dict[str, Any] = call_python(
        visit,
        list(CONFIGS),
        list(planted),
        [*(f"recipe-{name}" for name in RECIPES), "huge-recipe"],
        server=hub_server,
        home=place / "home",
        extra_env={"PYTHONPATH": paths, "HARM": str(place / "harm")},
    )
    found["asked"] = [request.path for request in hub_server.requests("GET|HEAD", "/hostile/")]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_configuration_is_refused_by_field(found: dict[str, Any], name: str) -> None:
    assert CONFIGS[name][1] in found["load"][name][0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pickle", "model.safetensors is no whole safetensors file"),
        ("lie", "model.safetensors is no whole safetensors file"),
        ("mixed", "config.json and model.safetensors come from different saves"),
        ("only-ckpt", "has no config.json, model.safetensors. It has model.ckpt, pytorch_model.bin: the zoo reads no"),
        ("huge-config", "config.json has 1048577 bytes, more than 1048576: refused"),
        ("beside", ""),
        ("names", ""),
        ("huge-recipe", ""),
    ],
)
def test_bad_files(found: dict[str, Any], name: str, message: str) -> None:
    assert message in found["load"][name][0] if message else found["load"][name][0] == ""
    # Of a good file the weights do not fit the layer: so far they were read, and by name.
    assert (message or "model.safetensors does not fit Linear") in found["load"][name][1]


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipe_is_one_line_and_exit_code_2(found: dict[str, Any], name: str) -> None:
    code, errors = found["fit"][f"recipe-{name}"]
    assert code == 2
    assert RECIPES[name][1] in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_large_texts_are_not_downloaded(found: dict[str, Any]) -> None:
    assert "recipe.yaml has 1048577 bytes" in found["fit"]["huge-recipe"][1]
    assert found["fit"]["huge-recipe"][0] == found["show"]["huge-config"][0] == found["pull"]["huge-config"][0] == 2
    assert "config.json has 1048577 bytes" in found["show"]["huge-config"][1]
    assert not [path for path in found["asked"] if "/huge-config/resolve/" in path and "config.json" in path]
    assert not [path for path in found["asked"] if "/huge-recipe/resolve/" in path and "recipe.yaml" in path]


def test_files_are_asked_for_by_name_only(found: dict[str, Any]) -> None:
    fetched = {path.partition("?")[0].rpartition("/")[2] for path in found["asked"] if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors", "recipe.yaml"}
    assert set(found["pulled"]) <= {"config.json", "model.safetensors", "recipe.yaml"}
    assert found["pull"]["beside"][0] == found["pull"]["names"][0] == 0


def test_nothing_is_imported_executed_or_written_elsewhere(found: dict[str, Any], place: Path) -> None:
    assert not found["evil"]
    assert not list((place / "harm").iterdir())
    assert not list(place.rglob("*escaped*"))
    assert set(found["here"]) <= {
        "hub",
        "pulled",
        "xet",
        "logs",
    }  # the cache and what was pulled: the home is the folder
    assert {path.name for path in place.iterdir()} == {"harm", "path", "home", "good", "other"}


def test_memory_stays_bounded(found: dict[str, Any]) -> None:
    assert found["mebibytes"] < 200


@pytest.mark.parametrize("form", ["pickle", "zip", "hyper_parameters", "state_dict"])
def test_bad_checkpoint_with_a_payload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """Lightning unpickles all of a file that it has by URL; the zoo reads tensors and plain values, or nothing."""
    monkeypatch.chdir(tmp_path)
    bomb = Bomb(tmp_path / "exploded")
    if form == "pickle":
        (tmp_path / "a.ckpt").write_bytes(pickle.dumps({"state_dict": bomb}))
    else:
        whole: dict[str, Any] = {"state_dict": {}, "hyper_parameters": {}}
        content = bomb if form == "zip" else {**whole, form: {"student": bomb}}
        torch.save(content, tmp_path / "a.ckpt")
    assert main(["fit", "--config", "nd-digits-teacher", "--ckpt_path", "a.ckpt", "--trainer.max_epochs=1"]) == 2
    assert "zoo fit: a.ckpt is no Lightning checkpoint that can be read safely" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def push_over(folder: str) -> str:
    """Push over a repository whose card was written by others."""
    from pathlib import Path

    from zoo import publish

    return str(publish.push_folder(Path(folder), "me/hostile-card").commit)


def test_script_in_a_card_is_inert_after_a_push(hub_server: HubServer, found: dict[str, Any], place: Path) -> None:
    card = "---\nlicense: mit\n---\n# Mine\n<script>steal()</script>\n<img src=x onerror=steal()>\n"
    hub_server.plant("me/hostile-card", {"README.md": card.encode()})
    call_python(push_over, str(place / "good"), server=hub_server, home=place / "home")
    pushed = hub_server.files("me/hostile-card")["README.md"].decode()
    assert "<script>" not in pushed
    assert "<img src=x onerror" not in pushed
    assert "&lt;script>steal()" in pushed, "what was written by hand stays, as text"
