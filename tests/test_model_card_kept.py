"""What people wrote into a card survives the next rendering, and what a configuration says never becomes markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.hub_server.card import problems
from tests.model_cards import CONFIG, RECIPE, card_of, changed, metadata_of
from zoo.card_parts import kept_parts
from zoo.card_text import HIDDEN, fenced, load_yaml, public, to_yaml
from zoo.errors import InputError
from zoo.model_card import render

CARD = card_of()
FRONT, BODY = "---\n" + CARD.split("---\n")[1] + "---\n", CARD.split("---\n", 2)[2]
LIGHT = render({"component": "X"}, None)  # what is merged is the same for each card
OTHER = changed("run.metrics.val.acc", 0.25)

WRITTEN = st.text(st.characters(codec="utf-8"), max_size=200)
FRAGMENTS = st.lists(
    st.sampled_from(
        ["<!-- zoo:begin use -->", "<!-- zoo:end use -->", "<!--zoo:begin  results-->", "<!-- zoo:end limits -->", "\r\n",
         "<!-- zoo:begin gone -->", "<!-- zoo:end gone -->", "<!-- zoo:be", "gin use -->", "---\n", "\n---\n", "a: 1\n",
         "<!-- zoo:metadata 00000000 -->", "```\n", "text", "\n", "\ufeff", " "]
    ),
    max_size=12,
).map("".join)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3))


def test_rendering_twice_changes_nothing() -> None:
    assert card_of(existing=CARD) == CARD
    assert card_of(existing="\ufeff" + CARD) == CARD, "a byte order mark is no text"
    again = card_of(OTHER, existing=CARD)
    assert again != CARD
    assert again == card_of(OTHER), "of the older rendering nothing is left"


@settings(deadline=None, max_examples=15)
@given(before=WRITTEN, between=WRITTEN, after=WRITTEN)
def test_hand_written_text_is_kept(before: str, between: str, after: str) -> None:
    assume("<!--" not in before + between + after)
    middle = BODY.index("<!-- zoo:begin results -->")
    edited = FRONT + before + BODY[:middle] + between + BODY[middle:] + after
    again = card_of(OTHER, existing=edited)
    fresh = card_of(OTHER)
    split = fresh.index("<!-- zoo:begin results -->")
    front = len("---\n" + fresh.split("---\n")[1] + "---\n")
    assert again == fresh[:front] + before + fresh[front:split] + between + fresh[split:] + after
    assert card_of(OTHER, existing=again) == again


@settings(deadline=None, max_examples=15)
@given(text=WRITTEN)
def test_a_card_without_marks_is_kept_whole(text: str) -> None:
    assume("<!--" not in text and not text.removeprefix("\ufeff").lstrip().startswith("---"))
    card = card_of(existing=text)
    assert card.startswith(FRONT)
    if text.strip("\ufeff").strip():
        assert card[len(FRONT) :].startswith(text.removeprefix("\ufeff") + "\n\n<!-- zoo:begin about -->")
    assert card.endswith(BODY.lstrip())
    assert card_of(existing=card) == card


@settings(deadline=None, max_examples=20)
@given(before=FRAGMENTS, after=FRAGMENTS, share=st.floats(0, 1))
def test_any_card_settles_after_one_rendering(before: str, after: str, share: float) -> None:
    at = int(share * len(LIGHT))
    for existing in (before + after, LIGHT[:at] + before + LIGHT[at:], LIGHT[:at] + after):
        try:
            card = render({"component": "X"}, None, existing=existing)
        except InputError as error:
            assert "README.md" in str(error)  # noqa: PT017 - most examples raise nothing
            continue
        assert render({"component": "X"}, None, existing=card) == card
        assert sorted(kept_parts(card).blocks) == sorted(kept_parts(LIGHT).blocks)


@settings(deadline=None, max_examples=20)
@given(theirs=st.dictionaries(st.text(max_size=8), VALUES, max_size=3))
def test_metadata_that_people_added_is_kept(theirs: dict[str, Any]) -> None:
    ours = metadata_of(LIGHT)
    assume(not ours.keys() & theirs.keys())
    body = LIGHT.split("---\n", 2)[2]
    for existing in (f"---\n{to_yaml({**theirs, **ours})}---\n{body}", f"---\n{to_yaml(theirs)}---\nMine.\n"):
        card = render({"component": "X"}, None, existing=existing)
        assert load_yaml(re.split(r"^---\n", card, flags=re.MULTILINE)[1]) == {**ours, **theirs}
        assert render({"component": "X"}, None, existing=card) == card


def test_metadata_that_people_changed_is_kept() -> None:
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": "imagenet-1k", "name": "ImageNet"},
        "metrics": [{"type": "accuracy", "value": 0.7}],
        "source": {"name": "a paper", "url": "https://example.org"},
    }
    data = metadata_of(CARD)
    data["license"], data["language"] = "mit", "no"
    data["tags"].insert(0, "digits")
    data["model-index"][0]["results"].append(result)
    data["model-index"].append({"name": "another", "results": [result]})
    edited = f"---\n{to_yaml(data)}---\n{BODY}"
    card = card_of(OTHER, existing=edited)
    now = metadata_of(card)
    assert (now["license"], now["language"]) == ("mit", "no")
    assert now["tags"] == ["lightning-zoo", "pytorch-lightning", "NDDistillation", "digits"]
    own, another = now["model-index"]
    assert own["results"][2:] == another["results"] == [result]
    assert own["results"][0]["metrics"][0]["value"] == 0.25
    assert "- These weights: `mit`, as stated in the metadata of this card.\n" in card
    assert problems(card) == ([], [])
    # What was generated before and is not any more goes; what people added stays.
    gone = changed("run", None)
    gone["omitted"], gone["args"] = {}, {}
    bare = metadata_of(card_of(gone, existing=card))
    assert "base_model" not in bare
    assert "datasets" not in bare
    assert [len(model["results"]) for model in bare["model-index"]] == [1, 1]
    assert "pipeline_tag" not in metadata_of(render(CONFIG, None, existing=card))


def test_the_metadata_of_a_card_without_marks_is_kept() -> None:
    hand = "---\nlicense: cc-by-4.0\ntags: mine\ndate: 2024-01-01\nlibrary_name: timm\n---\n# Mine\n"
    card = card_of(existing=hand)
    data = metadata_of(card)
    assert (data["license"], data["date"], data["library_name"]) == ("cc-by-4.0", "2024-01-01", "timm")
    assert data["tags"][-1] == "mine"
    assert problems(card) == ([], [])


def test_blocks_that_went_come_back_and_moved_ones_stay() -> None:
    blocks = dict(re.findall(r"(?s)<!-- zoo:begin (\w+) -->(.*?)<!-- zoo:end \1 -->", BODY))

    def block(name: str, text: str = "old") -> str:
        return f"<!-- zoo:begin {name} -->{text}<!-- zoo:end {name} -->"

    existing = f"A\n{block('limits')}\nB\n{block('use')}\nC\n{block('removed')}\nD\n{block('use')}\nE\n"
    card = card_of(existing=existing)
    assert kept_parts(card).blocks == ["about", "limits", "reference", "use", "results", "training", "licence"]
    texts = [text.strip() for text in kept_parts(card).texts]
    assert [text for text in texts if text] == ["A", "B", "C\n\n\n\nD\n\n\n\nE"]
    assert all(block(name, text) in card for name, text in blocks.items())
    orphan = card_of(existing=CARD.replace("<!-- zoo:end results -->", ""))
    assert "| 0.9944 |" in "".join(kept_parts(orphan).texts), "what lost its end mark counts as hand-written"
    assert orphan.count("<!-- zoo:begin results -->") == 1
    crossed = card_of(existing="<!-- zoo:begin use -->\nMine.\n<!-- zoo:end results -->\n")
    assert kept_parts(crossed).texts[0].strip() == "Mine."


@pytest.mark.parametrize(
    "metadata",
    ["a: [1", "a: &x 1\nb: *x", "a: !!python/object/apply:os.system [true]", "a: " + "[" * 50 + "]" * 50, "model-index: x",
     "model-index: [{name: x}]", "a: \x07"],
)  # fmt: skip
def test_bad_metadata(metadata: str) -> None:
    with pytest.raises(InputError, match=r"README.md: .*mend it or delete it"):
        card_of(existing=f"---\n{metadata}\n---\n# Mine\n")


def test_text_between_two_rules_is_no_metadata() -> None:
    text = "---\nOnce upon a time\n---\nthe end\n"
    assert card_of(existing=text)[len(FRONT) :].startswith(text)


# -- nothing becomes markup ----------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "a `b` | <img src=x onerror=alert(1)>", "```\n</details>\n\n# Owned\n", "``` `` ` ````````",
    "[x](javascript:alert(1))", "![x](https://evil.example/x.png)", "<https://evil.example>", "<!-- zoo:end results -->",
    "<!-- zoo:begin use -->\n", "<!--", "--><b>", "\n---\nlicense: mit\n---\n", "{{ 7 * 7 }}{% for %}",
    "a\u202eb\ud800\x00c", "&lt;script&gt;&#60;b&#62;", "\n\n    code\n\n> quote\n- list\n1. one\n",
    "|---|\n| a | b |\n", "**b** _i_ ~~s~~ \\", "$x$", "yes", "1e-3", "null", ": - ? [ { # & * ! | > ' \" % @",
    "é ß 漢字 🙂", "", " ", "\t", "x" * 5000,
]  # fmt: skip


class Elements(HTMLParser):
    """Elements of a page with their attributes, code aside: it is written as a span or as an element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "code":
            self.found.append((tag, attrs))

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", "" if "metadata" in data else data))


def elements(card: str) -> list[tuple[str, Any]]:
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])
    return Elements(page).found


def filled(text: str, suffix: str = "") -> dict[str, Any]:
    """A configuration with the same text at every place that takes any."""
    name = text + suffix
    return {
        "component": name,
        "versions": {name: text},
        "args": {f"a{name}": text, "list": [text, {text: text}]},
        "supplied": {},
        "omitted": {name: {"name": text, "revision": text, "sha256": text or "0", "training_only": False}},
        "weights": {"sha256": text or "0"},
        "run": {
            "data": {"name": name, "args": {text: text}, "splits": {name: 3}},
            "metrics": {name: {name: 0.5}},
            "seed": text, "epochs": text, "steps": text, "hardware": text, "precision": text, "monitor": f"m{text}",
        },
    }  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(text: str) -> None:
    def card(content: str) -> str:
        recipe = to_yaml({"requires": {f"x{content}": "b"}, "model": content})
        return render(filled(content, "z"), None, recipe=recipe)

    hostile = card(text)
    hostile.encode()
    assert elements(hostile) == elements(card("harmless"))
    assert problems(hostile) == ([], [])
    assert metadata_of(hostile)["license"] == "unknown"
    assert not re.search(r"[<>]", hostile.split("---\n")[1])
    assert "49" not in hostile.partition("<!-- zoo:metadata")[0], "a template is not run twice"
    assert render(filled(text, "z"), None, existing=hostile) == render(filled(text, "z"), None)


@settings(deadline=None, max_examples=15)
@given(text=st.text(max_size=60))
def test_any_text_is_inert(text: str) -> None:
    card = render(filled(text, "z"), None)
    assert elements(card) == elements(render(filled("harmless", "z"), None))
    assert problems(card) == ([], [])


def test_fences_hold() -> None:
    for text in ("```\n# Owned", "````yaml\n```\n````", "~~~\n`", "a\n\n```` x\n"):
        page = MarkdownIt("commonmark").render(fenced(text, "yaml"))
        assert page.count("<") == 4
        assert page.startswith('<pre><code class="language-yaml">')


def test_names_of_supplied_parts_are_inert() -> None:
    config = {"component": "X", "supplied": {"a;import os": "torch.nn.Linear", "b": "x.<locals>.Y\n1/0"}}
    card = render(config, None)
    assert 'from_pretrained(".", b=b)' in card
    assert "# yours: the x.locals.Y10 that" in card


def test_secrets_and_local_paths_are_not_shown() -> None:
    secret = "Zx9Qm4Lw"
    token = "hf_" + "aB3" * 10
    config = json.loads(json.dumps(CONFIG))
    config["args"] = {
        "api_key": secret,
        "logger": {"WANDB_TOKEN": secret, "authToken": [secret]},
        "url": f"https://me:{secret}@x.org",
    }
    config["run"]["data"]["args"] = {
        "root": f"/home/{secret}/images",
        "password": secret,
        "windows": f"C:\\{secret}\\images",
    }
    config["run"]["hardware"] = f"CPU {token}"
    config["omitted"]["teacher"]["name"] = f"~/{secret}/teacher"
    recipe = f"trainer: {{logger: {{init_args: {{apiKey: {secret}, name: {token}, save_dir: /root/{secret}/logs}}}}}}\n"
    card = card_of(config, recipe=recipe)
    assert secret not in card
    assert token not in card
    assert card.count(HIDDEN) == 8
    assert card.count("…/images") == 2
    assert "`…/teacher`" in card
    kept = {"tokenizer": "x", "key_dim": "hidden as well", "monkey": 1, "max_steps": 3}
    assert public(kept) == {**kept, "key_dim": HIDDEN}


def test_recipes_that_cannot_be_shown_are_named_only() -> None:
    for recipe in ("a: [1", "just words", "a: " + "x" * 70_000, "a: &b 1\nc: *b"):
        card = card_of(recipe=recipe)
        assert "The configuration of the run is `recipe.yaml`." in card
        assert "<summary>recipe.yaml" not in card
    assert "<summary>recipe.yaml" in card_of(recipe=RECIPE)
