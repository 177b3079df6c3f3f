"""Stored models on the Hub: the unpatched client against the Hub on loopback, each client in a fresh process and cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fresh_processes import run_fresh
from tests.hub_fixtures import client_environment, run_python
from tests.hub_server import HubServer
from tests.training import small_distillation, small_network

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored NDDistillation with a recipe."""
    torch.manual_seed(0)
    model = small_distillation()
    model.example_shape = (1, 8, 8)
    folder = tmp_path_factory.mktemp("stored") / "nd"
    recipe = Path("zoo/recipes/nd-digits.yaml")
    text = (Path(__file__).parents[1] / recipe).read_text()
    return model.save_pretrained(folder, recipe=text)


def zoo(words: list[str], hub: HubServer, home: Path, *, token: str | None = "hf_local", cwd: Path | None = None):
    """Run a zoo command in a process of its own against the server."""
    environment = client_environment(hub, home=home, token=token)
    return run_fresh(module="zoo", words=words, environment=environment, cwd=cwd)


def test_push_pull_show_and_load_are_bit_identical(hub: HubServer, run: Path, tmp_path: Path) -> None:
    pushed = zoo(["push", str(run), "me/nd", "--json", "--tag", "v1"], hub, tmp_path / "a")
    assert pushed.returncode == 0, pushed.stderr
    answer = json.loads(pushed.stdout)
    assert answer["changed"]
    assert answer["commit"] == hub.head("me/nd")
    assert {"config.json", "model.safetensors", "recipe.yaml", "README.md"} == set(hub.files("me/nd"))
    assert hub.files("me/nd")["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert b'zoo.from_pretrained("me/nd")' in hub.files("me/nd")["README.md"]

    again = zoo(["push", str(run), "me/nd", "--json"], hub, tmp_path / "b")
    assert not json.loads(again.stdout)["changed"]
    assert hub.head("me/nd") == answer["commit"], "a push that changes nothing makes no commit"

    pulled = zoo(["pull", "hf://me/nd@v1", str(tmp_path / "pulled")], hub, tmp_path / "c")
    assert pulled.returncode == 0, pulled.stderr
    for name in ("config.json", "model.safetensors", "recipe.yaml"):
        assert (tmp_path / "pulled" / name).read_bytes() == (run / name).read_bytes()

    shown = zoo(["show", "me/nd"], hub, tmp_path / "d")
    assert json.loads(shown.stdout)["component"] == "NDDistillation"
    code = (
        "import json, hashlib, zoo\n"
        "from zoo.towers import fingerprint\n"
        "a = zoo.from_pretrained('me/nd')\n"
        f"b = zoo.NDDistillation.from_pretrained('me/nd', revision={answer['commit']!r})\n"
        "print(json.dumps([fingerprint(a.network), fingerprint(b.network), a.hub_commit, b.hub_commit]))"
    )
    first, second, commit, pinned = run_python(code, server=hub, home=tmp_path / "e")
    from zoo.towers import fingerprint

    weights = {
        k.removeprefix("student."): v for k, v in load_file(run / "model.safetensors").items() if "student." in k
    }
    assert first == second == fingerprint(weights)
    assert commit == pinned == answer["commit"]


def test_push_from_python_with_pull_request_branch_and_private(hub: HubServer, run: Path, tmp_path: Path) -> None:
    code = (
        "import json, zoo\n"
        f"model = zoo.from_pretrained({str(run)!r})\n"
        "one = model.push_to_hub('me/hidden', private=True)\n"
        "model.student.fc.bias.data.add_(1)\n"
        "pull = model.push_to_hub('me/hidden', create_pr=True, message='Shift')\n"
        "branch = model.push_to_hub('me/hidden', branch='next')\n"
        "dry = model.push_to_hub('me/never', dry_run=True)\n"
        "print(json.dumps([one.commit, pull.url, branch.commit, dry.commit, dry.files]))"
    )
    first, url, branch, dry, files = run_python(code, server=hub, home=tmp_path / "a")
    assert hub.head("me/hidden") == first != branch
    assert "discussions" in url or "pr" in url
    assert dry is None
    assert files["model.safetensors"] == (run / "model.safetensors").stat().st_size
    refused = zoo(["show", "me/hidden"], hub, tmp_path / "b", token=None)
    assert refused.returncode == 2
    assert "no repository me/hidden that this token can see" in refused.stderr
    assert zoo(["show", "me/hidden"], hub, tmp_path / "c").returncode == 0
    assert zoo(["show", "me/never"], hub, tmp_path / "d").returncode == 2


@pytest.mark.thorough
def test_token_of_the_login(hub: HubServer, run: Path, tmp_path: Path) -> None:
    """Without HF_TOKEN the client's stored login counts, and without either nothing is sent."""
    nobody = zoo(["push", str(run), "me/login"], hub, tmp_path / "nobody", token=None)
    assert nobody.returncode == 2
    assert "HF_TOKEN" in nobody.stderr
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text("hf_local")
    pushed = zoo(["push", str(run), "me/login"], hub, tmp_path / "home", token=None)
    assert pushed.returncode == 0, pushed.stderr
    assert "hf_local" not in pushed.stdout + pushed.stderr


@pytest.mark.thorough
def test_dry_run_and_card_send_nothing(hub: HubServer, run: Path, tmp_path: Path) -> None:
    listed = zoo(["push", str(run), "me/dry", "--dry-run"], hub, tmp_path / "a")
    assert listed.returncode == 0, listed.stderr
    assert "bytes  model.safetensors" in listed.stdout
    assert "would be sent to me/dry" in listed.stdout
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "model.safetensors", "recipe.yaml"):
        (tmp_path / "copy" / name).write_bytes((run / name).read_bytes())
    assert zoo(["card", str(tmp_path / "copy")], hub, tmp_path / "b").returncode == 0
    assert (tmp_path / "copy/README.md").read_text() == (run / "README.md").read_text()
    assert not hub.requests("POST|PUT", ".*")


@pytest.mark.thorough
def test_hand_written_parts_of_the_card_survive(hub: HubServer, run: Path, tmp_path: Path) -> None:
    assert zoo(["push", str(run), "me/card"], hub, tmp_path / "a").returncode == 0
    card = hub.files("me/card")["README.md"].decode()
    hub.plant("me/card", {"README.md": (card + "\nWritten on the Hub by hand.\n").encode()})
    assert zoo(["push", str(run), "me/card", "--message", "again"], hub, tmp_path / "b").returncode == 0
    assert "Written on the Hub by hand." in hub.files("me/card")["README.md"].decode()


def test_train_again_from_the_recipe_on_the_hub(hub: HubServer, run: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "runs/nd-digits-teacher"
    from zoo.lightning_modules.classifier import Classifier

    Classifier("zoo/resnet20", 10, student_options={"in_chans": 1}).save_pretrained(teacher)
    assert zoo(["push", str(run), "me/recipe", "--tag", "v1"], hub, tmp_path / "a").returncode == 0
    words = ["fit", "--config", "hf://me/recipe@v1", "--trainer.max_epochs=1", "--data.train_samples=64"]
    fitted = zoo([*words, "--trainer.enable_progress_bar=false"], hub, tmp_path / "b", cwd=tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    config = json.loads((tmp_path / "runs/nd-digits/config.json").read_text())
    assert config["run"]["data"]["splits"] == {"train": 64, "val": 179, "test": 359}
    assert set(config["run"]["metrics"]) == {"val", "test"}


@pytest.mark.thorough
def test_offline_from_the_cache(hub: HubServer, run: Path, tmp_path: Path) -> None:
    assert zoo(["push", str(run), "me/cached"], hub, tmp_path / "a").returncode == 0
    code = "import json, zoo; m = zoo.from_pretrained('me/cached'); print(json.dumps(m.hub_commit))"
    commit = run_python(code, server=hub, home=tmp_path / "b")
    offline = {"HF_HUB_OFFLINE": "1"}
    assert run_python(code, server=hub, home=tmp_path / "b", extra_env=offline) == commit
    failing = code.replace("m = zoo", "\ntry: m = zoo").replace("; print", "\nexcept zoo.InputError as e: m = e\nprint")
    failing = failing.replace("m.hub_commit", "str(m)")
    assert "not in the cache" in run_python(failing, server=hub, home=tmp_path / "c", extra_env=offline)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["pull", "me/none", "x"], "no repository me/none", marks=pytest.mark.thorough),
        (["pull", "hf://me/there@nowhere", "x"], "me/there has no revision 'nowhere'"),
        (["show", "me/pickles"], "has no config.json. It has model.ckpt: the zoo reads no pickled files"),
        pytest.param(
            ["push", "nothing", "me/x"], "nothing is no folder with a stored model", marks=pytest.mark.thorough
        ),
        (["push", "RUN", "you/x"], "the Hub refuses (403)"),
        pytest.param(["fit", "--config", "hf://me/there"], "it has no recipe.yaml", marks=pytest.mark.thorough),
    ],
)
def test_bad_requests_are_one_line(hub: HubServer, run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    hub.plant("me/there", {"config.json": b"{}"})
    hub.plant("me/pickles", {"model.ckpt": b"\x80\x04."})
    result = zoo([word.replace("RUN", str(run)) for word in words], hub, tmp_path / "home", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert "hf_local" not in result.stderr + result.stdout


def test_plain_weights_of_any_module(hub: HubServer, tmp_path: Path) -> None:
    code = (
        "import json, torch, lightning as L, zoo\n"
        "class Mine(L.LightningModule):\n"
        "    def __init__(self, width=3, act=torch.relu):\n"
        "        super().__init__(); self.save_hyperparameters(); self.net = torch.nn.Linear(2, width)\n"
        "a = Mine(); zoo.hub.push(a, 'me/mine'); b = Mine()\n"
        "zoo.load_weights('me/mine', b)\n"
        "same = torch.equal(a.net.weight, b.net.weight)\n"
        "try: zoo.from_pretrained('me/mine')\n"
        "except zoo.InputError as error: said = str(error)\n"
        "try: zoo.load_weights('me/mine', Mine(width=4))\n"
        "except zoo.InputError as error: shape = str(error)\n"
        "print(json.dumps([same, said, shape]))"
    )
    same, said, shape = run_python(code, server=hub, home=tmp_path)
    assert same
    assert "zoo.load_weights" in said
    assert "net.bias has shape (3,), expected (4,)" in shape
    assert json.loads(hub.files("me/mine")["config.json"])["args"] == {"width": 3}


@pytest.mark.parametrize(
    ("args", "recipe", "message"),
    [
        ({"teacher": "/home/me/teacher"}, None, "args.teacher is the path '/home/me/teacher' of this machine"),
        ({"student_options": {"api_key": "x"}}, None, "args.student_options.api_key looks like a secret"),
        ({}, "trainer: {logger: {init_args: {password: x}}}", "recipe.trainer.logger.init_args.password looks like"),
        ({}, "data: {root: ~/images}", "recipe.data.root is the path '~/images'"),
        ({}, "note: hf_AbCdEfGhIjKlMnOpQrStUvWx", "recipe.yaml holds what looks like an access token"),
    ],
)
def test_bad_secrets_and_paths_are_not_pushed(
    run: Path, tmp_path: Path, args: dict[str, object], recipe: str | None, message: str
) -> None:
    from zoo import publish
    from zoo.errors import InputError

    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["args"] |= args
    (tmp_path / "config.json").write_text(json.dumps(config))
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        publish.push_folder(tmp_path, "me/x")


@pytest.mark.thorough
def test_stored_network_is_a_tower_by_hub_name(hub: HubServer, run: Path, tmp_path: Path) -> None:
    assert zoo(["push", str(run), "me/tower"], hub, tmp_path / "a").returncode == 0
    code = (
        "import json, zoo\n"
        "from zoo.towers import create, fingerprint\n"
        "tower = create('hf://me/tower', frozen=True)\n"
        "print(json.dumps(fingerprint(tower.network)))"
    )
    expected = small_network()
    expected.load_state_dict(
        {k.removeprefix("student."): v for k, v in load_file(run / "model.safetensors").items() if "student." in k}
    )
    from zoo.towers import fingerprint

    assert run_python(code, server=hub, home=tmp_path / "b") == fingerprint(expected)
