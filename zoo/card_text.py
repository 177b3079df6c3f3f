"""Text of any origin made harmless for a model card: no HTML, no Markdown, no secrets, no paths of this machine.

What a run records may come from a repository that somebody else wrote. On a card it is shown in code spans, in fenced blocks
or as plain words, and never as markup.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import yaml

__all__ = ["HIDDEN", "code", "fenced", "inert", "load_yaml", "plain", "public", "to_yaml"]

HIDDEN = "(not shown)"
_MAX_LINE = 200
_MAX_DEPTH = 24
_SECRET_WORDS = frozenset({"auth", "credential", "credentials", "key", "passphrase", "passwd", "pwd"})
_SECRET_ENDS = ("accesskey", "apikey", "password", "passwords", "secret", "secrets", "token")
_SECRET_VALUES = re.compile(
    r"\b(?:hf_|gh[a-z]_|glpat-|sk-)[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=://)[^/\s@]+(?=@)|(?<=\bBearer )\S+"
)
_LOCAL_PATH = re.compile(r"(?:~?/|[A-Za-z]:[\\/]|\\\\|file:)(?=.)")
# What a code span holds, in a table too, without any escape.
_CODE = re.compile(r"[^\s`|<>&\\](?:[^\n`|<>&\\]*[^\s`|<>&\\])?")


def public(value: Any, name: str = "", *, depth: int = 0) -> Any:
    """Return a value as JSON data that may be shown to strangers.

    Values whose name says that they are secret, and strings that look like an access token, become `HIDDEN`; of an absolute
    path the last part is left; control characters and invisible formatting become U+FFFD.

    Args:
        value: JSON values; anything else is shown as its text.
        name: the name that the value has.
        depth: how deep the value lies; what lies deeper than 24 is left out.

    Example:
        >>> public({"lr": 0.1, "hub": {"api_key": "abc"}, "root": "/home/me/images"})
        {'lr': 0.1, 'hub': {'api_key': '(not shown)'}, 'root': '…/images'}
    """
    if _is_secret(name) and value is not None:
        return HIDDEN
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping | list | tuple) and depth >= _MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return {_public_text(str(key)): public(item, str(key), depth=depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item, depth=depth + 1) for item in value]
    return _public_text(str(value))


def _is_secret(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    return any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) for word in words)


def _public_text(text: str) -> str:
    text = _SECRET_VALUES.sub(HIDDEN, _visible(text))
    if _LOCAL_PATH.match(text):
        parts = [part for part in re.split(r"[\\/]", text) if part]
        return f"…/{parts[-1]}" if parts else text
    return text


def _visible(text: str) -> str:
    """Replace what has no shape of its own: control characters, bidirectional overrides, lone surrogates."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character)[0] != "C" else "\ufffd"
        for character in text.replace("\u2028", "\n").replace("\u2029", "\n")
    )


def _line(text: str) -> str:
    line = " ".join(_visible(text).split())
    return line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 1]}…"


def inert(text: str) -> str:
    """Return text as words of one line: whatever could be markup is written as a character reference.

    Args:
        text: any text; of more than 200 characters the first are shown.

    Example:
        >>> inert("nd-digits <b>")
        'nd-digits &#60;b&#62;'
    """
    return "".join(c if c.isalnum() or c in " ,;()'/-" else f"&#{ord(c)};" for c in _line(text))


def code(value: Any) -> str:
    """Return a value as a code span on one line, fit for a table.

    Args:
        value: anything; its text is shown.

    Example:
        >>> code("val/acc"), code("a|b")
        ('`val/acc`', '<code>a&#124;b</code>')
    """
    line = _line(str(value))
    return f"`{line}`" if _CODE.fullmatch(line) else f"<code>{inert(line)}</code>"


def plain(text: str) -> str:
    """Return text for the metadata of a card: letters, digits and a few signs, at most 100 characters.

    Args:
        text: any text.

    Example:
        >>> plain("<b>acc@1</b>")
        'b-acc@1-/b'
    """
    return re.sub(r"[^\w ./:@+=,()-]+", "-", _line(text)).strip(" -")[:100] or "unnamed"


def fenced(text: str, language: str) -> str:
    """Return a fenced code block that the text cannot leave.

    Args:
        text: the text; of an HTML comment in it the opening is broken, because comments delimit the generated parts.
        language: of the highlighting.
    """
    text = text.replace("<!--", "<! --").strip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


class _Loader(yaml.SafeLoader):
    """YAML as cards are read on the Hub: ``no`` and ``2024-01-01`` are words, without aliases and tags."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's name, filled below

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.YAMLError("it has aliases or tags, which are not used in a card")
        if self._depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {_MAX_DEPTH} levels")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes these line breaks as they are, and reads them back as others.
        style = '"' if any(character in data for character in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,300})", "-+0123456789"),
    # What PyYAML writes for a float, and no more: a word such as 1e-3 stays as it was typed.
    ("float", r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def load_yaml(text: str) -> Any:
    """Read YAML as data.

    Args:
        text: a YAML document.

    Raises:
        yaml.YAMLError: it is not valid, has aliases or tags, or is nested deeper than 24 levels.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader


def to_yaml(value: Any) -> str:
    """Return data as YAML in block style, keys in their order.

    Args:
        value: what `load_yaml` or `public` returned.
    """
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text
