"""The metadata of a card, read without PyYAML.

The subset of YAML 1.2 that cards use: mappings and sequences in blocks or in brackets, plain and quoted scalars (over
several lines too), literal and folded blocks, comments. What lies outside it (tags, anchors, aliases, complex keys,
duplicate keys, tabs) is an error, never a guess. Dates stay strings and ``yes``/``no`` are strings, as in YAML 1.2.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["CardError", "front_matter", "parse_yaml"]

_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_QUOTED = r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\''
_PLAIN = r"""(?:[^\s\-?:,\[\]{}#&*!|>'"%@`]|[-?:](?=\S))(?:[^:#]|:(?=\S)|(?<=\S)#)*?"""
_KEY = re.compile(rf"({_QUOTED}|{_PLAIN})\s*:(?=\s|$)", re.ASCII)
_DASH = re.compile(r"-(\s|$)", re.ASCII)
_INT = re.compile(r"[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_ESCAPES = {
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "\t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", "e": "\x1b",
    " ": " ", '"': '"', "/": "/", "\\": "\\", "N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029",
}  # fmt: skip


class CardError(ValueError):
    """Metadata that is not the YAML of a card."""


def front_matter(content: str) -> dict[str, Any] | None:
    """Return the metadata between the two ``---`` at the top of a card, None if there is none."""
    found = _FRONT.match(content)
    if found is None:
        return None
    value = parse_yaml(found[1])
    if value is None:
        return None
    if not isinstance(value, dict):
        raise CardError("the metadata must be a mapping")
    return value


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document of the subset."""
    reader = _Reader(text)
    value = reader.node(0)
    if (line := reader.peek()) is not None:
        raise CardError(f"unexpected text: {line[1]!r}")
    return value


class _Reader:
    """A recursive descent over lines; ``at`` is the next line to read."""

    def __init__(self, text: str) -> None:
        self.lines = re.split(r"\r\n|\n|\r", text)
        self.at = 0

    def peek(self) -> tuple[int, str] | None:
        """Return indentation and text of the next line that says something."""
        while self.at < len(self.lines):
            line = self.lines[self.at]
            text = line.lstrip(" ")
            if text.startswith("\t"):
                raise CardError(f"a tab indents line {self.at + 1}")
            if text.strip(" \t") and not text.startswith("#"):
                return len(line) - len(text), text.rstrip(" \t")
            self.at += 1
        return None

    def node(self, least: int) -> Any:
        """Read the value that begins at the next line, None if that is indented by less than ``least``."""
        line = self.peek()
        if line is None or line[0] < least:
            return None
        indent, text = line
        if _DASH.match(text):
            return self.sequence(indent)
        if _KEY.match(text):
            return self.mapping(indent)
        self.at += 1
        return self.inline(text, indent - 1)

    def sequence(self, indent: int) -> list[Any]:
        items = []
        while (line := self.peek()) is not None and line[0] == indent and _DASH.match(line[1]):
            rest = line[1][1:].lstrip(" ")
            if not rest or rest.startswith("#"):
                self.at += 1
                items.append(self.node(indent + 1))
            elif rest[0] in "|>":
                self.at += 1
                items.append(self.block(rest, indent))
            else:  # the item continues as a node that is indented by the dash
                column = indent + len(line[1]) - len(rest)
                self.lines[self.at] = " " * column + rest
                items.append(self.node(column))
        return items

    def mapping(self, indent: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while (line := self.peek()) is not None and line[0] == indent and (found := _KEY.match(line[1])):
            key = _unquoted(found[1]) if found[1][0] in "\"'" else found[1]
            if key in values:
                raise CardError(f"the key {key!r} is there twice")
            rest = line[1][found.end() :].strip(" \t")
            self.at += 1
            if not rest or rest.startswith("#"):
                below = self.peek()
                dashed = below is not None and below[0] == indent and _DASH.match(below[1])
                values[key] = self.sequence(indent) if dashed else self.node(indent + 1)
            elif rest[0] in "|>":
                values[key] = self.block(rest, indent)
            else:
                values[key] = self.inline(rest, indent)
        if line is not None and line[0] > indent:
            raise CardError(f"line {self.at + 1} is indented too far: {line[1]!r}")
        return values

    def block(self, header: str, indent: int) -> str:
        """Read a literal (``|``) or folded (``>``) block."""
        found = re.fullmatch(r"([|>])([-+]?)(\d?)([-+]?)\s*(#.*)?", header)
        if found is None:
            raise CardError(f"cannot read the block header {header!r}")
        lines: list[str] = []
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if line.strip(" \t") and len(line) - len(line.lstrip(" ")) <= indent:
                break
            lines.append(line)
            self.at += 1
        widths = [len(line) - len(line.lstrip(" ")) for line in lines if line.strip(" \t")]
        width = indent + int(found[3]) if found[3] else (widths or [0])[0]
        text = "\n".join(line[width:] for line in lines)
        body, chomp = text.rstrip("\n"), found[2] or found[4]
        if found[1] == ">":
            body = _fold_block(body)
        return body + {"-": "", "": "\n" if body else "", "+": text[len(text.rstrip("\n")) :] + "\n"}[chomp]

    def inline(self, text: str, indent: int) -> Any:
        """Read a scalar or a bracket that begins with ``text``; lines indented by more than ``indent`` continue it."""
        if text[0] in "&*!%@`" or _is_complex_key(text):
            raise CardError(f"tags, anchors, aliases and complex keys are not served: {text!r}")
        if text[0] not in "\"'[{":
            text = _fold(self._continued(text, indent))
            if _DASH.match(text) or ": " in text or text.endswith(":"):
                raise CardError(f"a mapping or a sequence begins inside a scalar: {text!r}")
            return _scalar(text)
        while True:
            try:
                value, end = _flow(text, 0)
                break
            except EOFError:
                if self.at >= len(self.lines):
                    raise CardError(f"unclosed {text[0]}: {text[:60]!r}") from None
                text += "\n" + self.lines[self.at].strip(" \t")
                self.at += 1
        if re.fullmatch(r"[ \t]*|[ \t]+#.*", text[end:]) is None:
            raise CardError(f"unexpected text after a value: {text[end:]!r}")
        return value

    def _continued(self, text: str, indent: int) -> str:
        """Return a plain scalar with the lines that continue it; a comment ends it."""
        lines = [_uncommented(text)]
        while lines[-1] == text.strip(" \t") and (line := self._peek_raw()) is not None and line[0] > indent:
            text = line[1]
            lines += [""] * line[2] + [_uncommented(text)]
            self.at += line[2] + 1
        return "\n".join(lines)

    def _peek_raw(self) -> tuple[int, str, int] | None:
        """Return indentation and text of the next line that is not blank, and the number of blank lines before it."""
        for blank, line in enumerate(self.lines[self.at :]):
            if line.strip(" \t"):
                return len(line) - len(line.lstrip(" ")), line.strip(" \t"), blank
        return None


def _is_complex_key(text: str) -> bool:
    return re.match(r"\?([ \t]|$)", text) is not None


def _uncommented(text: str) -> str:
    return re.split(r"(?:^|[ \t])#", text, maxsplit=1)[0].strip(" \t")


def _fold(text: str) -> str:
    """Join lines: one line break becomes a space, n + 1 become n."""
    return re.sub(r"[ \t]*\n[ \t]*(?:\n[ \t]*)*", lambda found: "\n" * (found[0].count("\n") - 1) or " ", text)


def _fold_block(text: str) -> str:
    """Fold a block: as :func:`_fold`, but lines that are indented further keep their breaks."""
    first, *rest = text.split("\n")
    result, previous, breaks = first, first, 0
    for line in rest:
        breaks += 1
        if line:
            verbatim = not previous or " " in (previous[0], line[0])
            result += ("\n" * breaks if verbatim else "\n" * (breaks - 1) or " ") + line
            previous, breaks = line, 0
    return result


def _scalar(text: str) -> Any:
    """Resolve a plain scalar by the core schema of YAML 1.2."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _flow(text: str, at: int) -> tuple[Any, int]:
    """Read one value inside brackets or quotes at ``at`` and return it with where it ends; EOFError if it does not."""
    at = _skip(text, at)
    if text[at] in "[{":
        return _bracket(text, at)
    if text[at] in "\"'":
        found = re.compile(_QUOTED, re.DOTALL).match(text, at)
        if found is None:
            raise EOFError
        return _unquoted(found[0]), found.end()
    found = re.compile(r"(?:[^,\[\]{}:#\n]|:(?![\s,\[\]{}]|$)|(?<=\S)#)+", re.ASCII).match(text, at)
    if found is None or found[0][0] in "&*!%@`|>":
        raise CardError(f"cannot read {text[at:][:40]!r}")
    return _scalar(found[0].strip(" \t")), found.end()


def _bracket(text: str, at: int) -> tuple[Any, int]:
    closing, pairs, items, at = "]}"[text[at] == "{"], text[at] == "{", [], _skip(text, at + 1)
    while text[at] != closing:
        key, at = _flow(text, at)
        value, at = key, _skip(text, at)
        if pairs and text[at] == ":":
            value, at = _flow(text, at + 1)
            at = _skip(text, at)
        elif pairs:
            value = None
        items.append((str(key), value))
        if text[at] == ",":
            at = _skip(text, at + 1)
        elif text[at] != closing:
            raise CardError(f"expected , or {closing} at {text[at:][:40]!r}")
    return (dict(items) if pairs else [value for _, value in items]), at + 1


def _skip(text: str, at: int) -> int:
    """Step over white space and comments."""
    at += len(re.compile(r"(?:\s|(?<=\s)#[^\n]*)*", re.ASCII).match(text, at)[0])  # type: ignore[index]
    if at >= len(text):
        raise EOFError
    return at


def _unquoted(text: str) -> str:
    inner = text[1:-1]
    if text[0] == "'":
        return _fold(inner).replace("''", "'")

    def replaced(found: re.Match[str]) -> str:
        escape = found[1]
        if escape is None:
            return _fold(found[0])
        if escape[0] in "xuU":
            return chr(int(escape[1:], 16))
        if escape[0] == "\n":
            return ""
        if escape not in _ESCAPES:
            raise CardError(f"unknown escape \\{escape}")
        return _ESCAPES[escape]

    pattern = r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|\n[ \t]*|.)|[ \t]*\n[ \t\n]*"
    return re.sub(pattern, replaced, inner)
