"""What people wrote into a model card, told apart from what was generated, and put together with a new rendering.

Generated text lies between ``<!-- zoo:begin NAME -->`` and ``<!-- zoo:end NAME -->``; everything outside is hand-written.
Generated metadata is known by short digests of its items, which the card carries in a comment: an item that is not among
them was added or edited by a person.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

from zoo.card_text import load_yaml
from zoo.errors import InputError

__all__ = ["Kept", "digests", "kept_parts", "merge_metadata", "merge_text"]

_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"<!-- *zoo:(begin|end) +([a-z]+) *-->")
_BLOCK = re.compile(r"<!-- zoo:begin (\w+) -->.*?<!-- zoo:end \1 -->", re.DOTALL)
_RECORD = re.compile(r"<!-- zoo:metadata((?: [0-9a-f]{8})*) -->")
_INDEX = "model-index"


@dataclass(frozen=True)
class Kept:
    """An existing card, taken apart.

    Attributes:
        metadata: the whole front matter.
        generated: digests of the items of the metadata that were generated.
        texts: what people wrote: before the first generated block, between blocks, after the last; one more than blocks.
        blocks: names of the generated blocks, in the order of the card.
    """

    metadata: dict[Any, Any]
    generated: frozenset[str]
    texts: list[str]
    blocks: list[str]


def kept_parts(existing: str | None) -> Kept:
    r"""Take a card apart.

    A marker without its partner is dropped, and the text around it counts as hand-written.

    Args:
        existing: the text of the README.md, or None if there is none.

    Raises:
        InputError: the front matter is not valid YAML.

    Example:
        >>> kept_parts("Mine.\n<!-- zoo:begin use -->\n…\n<!-- zoo:end use -->\nMine too.").texts
        ['Mine.\n', '\nMine too.']
    """
    metadata, body = _front_matter((existing or "").removeprefix("\ufeff"))
    texts, blocks, inner = _split(body)
    record = _RECORD.search(inner)
    return Kept(metadata, frozenset(record[1].split() if record else ()), texts, blocks)


def _front_matter(card: str) -> tuple[dict[Any, Any], str]:
    found = _FRONT.match(card)
    if found is None:
        return {}, card
    try:
        metadata = load_yaml(found[1])
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"README.md: the metadata between the first two --- lines is not plain YAML ({reason}), so it cannot be kept: "
            "mend it or delete it"
        ) from error
    if metadata is not None and not isinstance(metadata, dict):
        return {}, card  # a text between two rules
    return metadata or {}, card[found.end() :]


def _split(body: str) -> tuple[list[str], list[str], str]:
    """Return the texts around the blocks, the names of the blocks, and what lies in them."""
    texts, blocks, inner = [], [], ""
    at, opened = 0, None
    for marker in _MARKER.finditer(body):
        if marker[1] == "begin":
            opened = marker
        elif opened is not None and opened[2] == marker[2]:
            texts.append(_without_markers(body[at : opened.start()]))
            blocks.append(opened[2])
            inner += body[opened.end() : marker.start()]
            at, opened = marker.end(), None
    return [*texts, _without_markers(body[at:])], blocks, inner


def _without_markers(text: str) -> str:
    # A line break in its place, so that what is left and right of it cannot join to another marker.
    return _MARKER.sub("\n", text)


# -- text ----------------------------------------------------------------------------------------------------------


def merge_text(kept: Kept, generated: str) -> str:
    """Return the body of a card: newly generated blocks where the old ones were, hand-written text as it was.

    Blocks that the old card lacks come after their predecessor in the new one; blocks that are no longer generated go. A
    card without blocks is hand-written as a whole and comes first.

    Args:
        kept: the existing card.
        generated: the body of the new one, blocks with their markers.
    """
    new = {found[1]: found[0] for found in _BLOCK.finditer(generated)}
    order = list(new)
    # Each block that stays, with the text before it.
    placed: list[tuple[str, str]] = []
    text = kept.texts[0]
    for name, after in zip(kept.blocks, kept.texts[1:], strict=True):
        if name in new and name not in dict(placed):
            placed.append((name, text))
            text = after
        else:
            text = _joined(text, after)
    if not placed:
        return generated if not text.strip() else f"{text}\n\n{generated.lstrip()}"
    for position, name in enumerate(order):
        names = [known for known, _ in placed]
        if name in names:
            continue
        if position == 0:
            placed[:1] = [(name, placed[0][1]), (placed[0][0], "\n\n")]
        else:
            placed.insert(names.index(order[position - 1]) + 1, (name, "\n\n"))
    return "".join(before + new[name] for name, before in placed) + text


def _joined(before: str, after: str) -> str:
    if not before.strip() and not after.strip():
        return "\n\n"
    return f"{before}\n\n{after}"


# -- metadata ------------------------------------------------------------------------------------------------------


def merge_metadata(kept: Kept, generated: dict[str, Any]) -> dict[Any, Any]:
    """Return the metadata of a card: what was generated, and what people added or changed.

    A value that people set wins. To a generated list, and to the results of the model-index, theirs are appended. What was
    generated for the old card and is not generated any more goes.

    Args:
        kept: the existing card.
        generated: the metadata of the new one.

    Raises:
        InputError: the existing model-index is not what the Hub takes.
    """
    theirs = {}
    for key, value in kept.metadata.items():
        if key == _INDEX:
            own = _own_results(kept)
            if own:
                theirs[key] = own
        elif isinstance(value, list) or isinstance(generated.get(key), list):
            items = value if isinstance(value, list) else [value]
            own = [item for item in items if _digest(key, item) not in kept.generated]
            if own or not items:
                theirs[key] = own
        elif _digest(key, value) not in kept.generated:
            theirs[key] = value
    merged: dict[Any, Any] = dict(generated)
    for key, value in theirs.items():
        if key == _INDEX:
            merged[key] = _merged_index(generated.get(key, []), value)
        elif isinstance(generated.get(key), list):
            merged[key] = [*generated[key], *(item for item in value if item not in generated[key])]
        else:
            merged[key] = value
    return merged


def digests(generated: dict[str, Any]) -> list[str]:
    """Return a digest of each item of generated metadata: values, items of lists, results of the model-index.

    Args:
        generated: the metadata.
    """
    items: list[tuple[str, Any]] = []
    for key, value in generated.items():
        if key == _INDEX:
            items += [(key, result) for model in value for result in model["results"]]
        elif isinstance(value, list):
            items += [(key, item) for item in value]
        else:
            items.append((key, value))
    return [_digest(key, item) for key, item in items]


def _digest(key: Any, item: Any) -> str:
    return hashlib.sha256(json.dumps([key, item]).encode()).hexdigest()[:8]


def _own_results(kept: Kept) -> list[dict[str, Any]]:
    """Return the models of the existing index with the results that people added."""
    index = kept.metadata[_INDEX]
    models = []
    for model in index if isinstance(index, list) else [None]:
        if not isinstance(model, dict) or not isinstance(model.get("results"), list):
            raise InputError(
                "README.md: model-index must be a list of models with name and results: mend it or delete it"
            )
        own = [result for result in model["results"] if _digest(_INDEX, result) not in kept.generated]
        if own:
            models.append({**model, "results": own})
    return models


def _merged_index(generated: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged = [{**model, "results": [*model["results"]]} for model in generated]
    for model in theirs:
        same = next((ours for ours in merged if ours["name"] == model.get("name")), None)
        if same is None:
            merged.append(model)
        else:
            same["results"] += [result for result in model["results"] if result not in same["results"]]
    return merged
