"""What is pushed holds no secret and no path of this machine; ordinary configurations are not taken for either."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hub_fixtures import call_python
from tests.hub_server import HubServer
from tests.stored import seeded_distillation
from zoo import publish, registry
from zoo.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")

_ALPHANUMERIC = string.ascii_letters + string.digits


def _letters(count: int, alphabet: str = _ALPHANUMERIC) -> str:
    return "".join(random.Random(count).choice(alphabet) for _ in range(count))


# The published shapes of tokens, with made-up contents.
TOKENS = [
    "hf_" + _letters(34), "api_org_" + _letters(34), "ghp_" + _letters(36), "gho_" + _letters(36),
    "github_pat_" + _letters(22) + "_" + _letters(59), "glpat-" + _letters(20), "sk-" + _letters(48),
    "sk-proj-" + _letters(40) + "_" + _letters(20), "sk-ant-api03-" + _letters(80), "sk_live_" + _letters(24),
    "gsk_" + _letters(52), "nvapi-" + _letters(64), "r8_" + _letters(37), "npm_" + _letters(36),
    "pypi-AgEIcHlwaS5vcmc" + _letters(60), "dckr_pat_" + _letters(27),
    "AKIA" + _letters(16, string.ascii_uppercase + string.digits), "ASIA" + _letters(16, string.ascii_uppercase),
    "AIza" + _letters(35), "ya29." + _letters(60), "SG." + _letters(22) + "." + _letters(43),
    "xoxb-123456789012-" + _letters(24), "xoxp-" + _letters(40), "https://me:" + _letters(12) + "@example.org/repo.git",
    "eyJ" + _letters(20) + ".eyJ" + _letters(40) + "." + _letters(43), "-----BEGIN RSA PRIVATE KEY-----\nMIIE",
    "-----BEGIN PRIVATE KEY-----", "-----BEGIN OPENSSH PRIVATE KEY-----",
]  # fmt: skip
SECRET_NAMES = [
    "token", "hf_token", "HF_TOKEN", "hfToken", "auth_token", "access-token", "password", "passwd", "db_password", "pwd",
    "passphrase", "secret", "client_secret", "api_key", "apikey", "apiKey", "API-KEY", "wandb_api_key", "access_key",
    "aws_secret_access_key", "secret_key", "private_key", "credentials", "bearer", "authorization", "tokens",
]  # fmt: skip
PATHS = [
    "/home/me/x", "/x", "~/x", "~me/x", "C:\\x", "C:/x", "\\\\host\\share", "file:///home/me/x", " /home/me",
    "/home/me/x\ny", "data=/home/me/x", "--root ~/x", "D:\\Users\\me",
]  # fmt: skip
HARMLESS = [
    ("num_tokens", 77), ("class_token", True), ("max_tokens", 4), ("tokenizer", "clip"), ("pool", "token"),
    ("key_dim", 64), ("monitor", "val/acc"), ("teacher", "./runs/nd-digits-teacher"), ("teacher", "hf://me/nd@v1"),
    ("student", "timm/vit_base_patch16_224.augreg_in21k"), ("student", "timm/hf-hub:timm/resnet18@abc"), ("text", "a / b"),
    ("sha", "66e79afb36586f1e8fa8b25f118831bbddeda7699962d7bea978940f0e318122"), ("note", "ask-and-answer-mask-risk-desk"),
    ("url", "https://example.org/data/home/x"), ("api_key", None), ("token", ""), ("passes", 3), ("dispatch", "x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored model to rewrite: `holding` puts things into it."""
    return tmp_path_factory.mktemp("publish")


def holding(folder: Path, args: Any = None, *, recipe: Any = None, card: str = "", **config: Any) -> Path:
    content = {"component": None, "args": args or {}, "run": None, "golden": None, **config}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "recipe.yaml").write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe or {}))
    (folder / "README.md").write_text(card)
    return folder


PLACES: list[Callable[[Path, str], Path]] = [
    lambda folder, text: holding(folder, {"a": text}),
    lambda folder, text: holding(folder, {"a": [{"b": text}]}),
    lambda folder, text: holding(folder, {text: 1}),
    lambda folder, text: holding(folder, run={"data": {"args": {"x": text}}}),
    lambda folder, text: holding(folder, recipe={"trainer": {"x": [text]}}),
]
_AROUND = st.sampled_from(["", " ", "\n", "x_", "key=", "'", "(", ":", "/", "é "])


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(TOKENS), st.sampled_from(PLACES), _AROUND, st.sampled_from(["", " ", "\n", '"', "é", ")"]))
def test_properties_no_token_passes_or_is_shown(
    folder: Path, token: str, place: Callable[[Path, str], Path], before: str, after: str
) -> None:
    with pytest.raises(InputError, match="looks like an access token") as caught:
        publish.refuse_private(place(folder, before + token + after))
    assert token not in str(caught.value)


@pytest.mark.parametrize("token", TOKENS)
def test_bad_token_in_texts(folder: Path, token: str) -> None:
    with pytest.raises(InputError, match=r"^README.md holds what looks like an access token"):
        publish.refuse_private(holding(folder, card=f"Use `{token}`."))
    with pytest.raises(InputError, match=r"^recipe.yaml holds what looks like an access token"):
        publish.refuse_private(holding(folder, recipe=f"# {token.splitlines()[0]}\ntrainer: {{}}"))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SECRET_NAMES), st.text("abcxyz019 -", min_size=1, max_size=12), st.integers(0, 3))
def test_properties_no_named_secret_passes_or_is_shown(folder: Path, name: str, value: str, shape: int) -> None:
    value = f"Q{value}Q"  # so that it stands in no other word of the message
    nested = [value, {"a": value}, [value], {"b": [{"c": value}]}][shape]
    for place in ({"args": {name: nested}}, {"recipe": {"trainer": {name: nested}}}, {"run": {name: nested}}):
        with pytest.raises(InputError, match="looks like a secret: remove it before pushing") as caught:
            publish.refuse_private(holding(folder, **place))
        assert value not in str(caught.value)
        assert name in str(caught.value)


def test_bad_password_of_digits(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^args.db_password looks like a secret"):
        publish.refuse_private(holding(folder, {"db_password": 1234}))


@pytest.mark.parametrize("path", PATHS)
def test_bad_absolute_path(folder: Path, path: str) -> None:
    for place, where in (
        ({"args": {"roots": [path]}}, r"^args.roots\[0\] is the path"),
        ({"recipe": {"data": {"init_args": {"root": path}}}}, r"^recipe.data.init_args.root is the path"),
        ({"run": {"data": {"args": {"root": path}}}}, r"^run.data.args.root is the path"),
    ):
        with pytest.raises(InputError, match=where):
            publish.refuse_private(holding(folder, **place))


def test_message_about_a_path_shows_no_token(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        publish.refuse_private(holding(folder, {"root": f"/home/me/{TOKENS[0]}"}))
    assert TOKENS[0] not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_ordinary_values_pass(folder: Path, name: str, value: Any) -> None:
    publish.refuse_private(holding(folder, {name: value}, recipe={"model": {name: value}}, run={name: value}))


@pytest.mark.parametrize("name", registry.recipes())
def test_recipes_and_models_of_the_zoo_pass(tmp_path: Path, name: str) -> None:
    text = registry.recipe_path(name).read_text()
    publish.refuse_private(seeded_distillation().save_pretrained(tmp_path, recipe=text))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "config.json cannot be read: it is damaged"),
        ("config.json", b"[1]", "config.json holds no configuration"),
        ("config.json", b"\xff", "config.json is no UTF-8 text"),
        ("recipe.yaml", b"a: [", "recipe.yaml cannot be read: it is damaged"),
        ("recipe.yaml", b"model: !!python/name:os.system", "recipe.yaml cannot be read: it is damaged"),
        ("recipe.yaml", b"- a", "recipe.yaml holds no configuration"),
        ("README.md", b"\xff", "README.md is no UTF-8 text"),
    ],
)
def test_bad_files(folder: Path, file: str, content: bytes, message: str) -> None:
    (holding(folder) / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        publish.refuse_private(folder)


def test_folder_with_other_files_is_sent_without_them(folder: Path, hub: HubServer, tmp_path: Path) -> None:
    """And no token is in what the client said, whatever the Hub answered."""
    seeded_distillation().save_pretrained(tmp_path / "m")
    for name in (".env", "id.key", "last.ckpt"):
        (tmp_path / "m" / name).write_text("SECRET=1")
    sent, refused, expired = call_python(push_twice, str(tmp_path / "m"), server=hub, home=tmp_path / "home")
    assert set(hub.files("me/publish")) == {"config.json", "model.safetensors", "README.md"} == set(sent)
    assert "the Hub refuses (403)" in refused
    assert "hf_local" not in refused + expired
    assert "hf_expired" not in refused + expired
    card = hub.files("me/publish")["README.md"].decode() + hub.files("me/publish")["config.json"].decode()
    assert "hf_local" not in card


def push_twice(folder: str) -> list[Any]:
    """Push where it is allowed, where it is not, and with a token that the Hub does not know."""
    from pathlib import Path

    import zoo
    from zoo import publish

    found: list[Any] = [list(publish.push_folder(Path(folder), "me/publish").files)]
    for repo_id, token in (("you/publish", None), ("me/publish", "hf_expired")):
        try:
            publish.push_folder(Path(folder), repo_id, token=token)
        except zoo.InputError as error:
            causes = [str(error), repr(error.__cause__), str(error.__cause__)]
            found.append("\n".join(causes))
        else:
            found.append("")
    return found


@pytest.mark.parametrize(
    ("active", "inert"),
    [
        ("<script>a()</script>", "&lt;script>a()&lt;/script>"),
        ("<SCRIPT src=x>", "&lt;SCRIPT src=x>"),
        ("<img src=x onerror=a()>", "&lt;img src=x onerror=a()>"),
        ('<img title=">" onload = "a()">', '&lt;img title=">" onload = "a()">'),
        ("<iframe src=x>", "&lt;iframe src=x>"),
        ("[x](javascript:a())", "[x](about:blank#a())"),
        ('<img src="figures/loss.png" alt="one = 1">', '<img src="figures/loss.png" alt="one = 1">'),
        ("a <b>bold</b> 1 < 2, and only = 1 <!-- note -->", "a <b>bold</b> 1 < 2, and only = 1 <!-- note -->"),
    ],
)
def test_scripts_of_an_older_card_become_text(tmp_path: Path, active: str, inert: str) -> None:
    seeded_distillation().save_pretrained(tmp_path)
    card = f"{(tmp_path / 'README.md').read_text()}\n## By hand\n\n{active}\n"
    publish.write_card(tmp_path, existing=card)
    assert f"\n{inert}\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zoo', "is no valid JSON, so it is damaged"),
        ("[]", "it has no zoo_format"),
        (" " * ((1 << 20) + 1), "is larger than"),
    ],
)
def test_bad_configuration_of_a_card(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        publish.write_card(tmp_path)
