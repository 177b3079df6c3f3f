"""Markdown of a card as HTML that can do nothing: no HTML of its own, no images but given ones, links only to the web."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup

from zoo.card_parts import _FRONT
from zoo.card_text import public

__all__ = ["to_html"]

# What the generated parts of a card write as HTML, and nothing around it.
_FOLD = re.compile(r"<details>\s*<summary>([^<>]*)</summary>")
_WEB = re.compile(r"https?://[^\s/?#]+", re.IGNORECASE)
_LOWEST = 6


def to_html(text: str, *, level: int, images: Mapping[str, str] | None = None) -> Markup:
    r"""Return Markdown as HTML.

    HTML in the text is shown as text, except for comments, which go, and for the folded blocks and code spans that generated
    cards write. Metadata at the top goes.

    Args:
        text: Markdown, as of a README.md.
        level: of the heading above it, from 1; its own headings come below, without leaving out a level.
        images: where the images are that may be shown: a ``data:`` URI, or ``#id`` of a place of the page that shows it,
            by the name that the text gives. Of others the alternative text is left.

    Example:
        >>> to_html("# A\n[b](javascript:c) <b>", level=1)
        Markup('<h2>A</h2>\n<p>[b](javascript:c) &lt;b&gt;</p>\n')
    """
    front = _FRONT.match(text)
    # A line break in front: a text that begins with a path is no path.
    body = public("\n" + (text[front.end() :] if front else text))
    parser = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable(["table", "strikethrough"])
    writer = _Writer(parser, level, images or {})
    tokens = list(writer.blocks(parser.parse(body)))
    return Markup(RendererHTML(parser).render(tokens, parser.options, {}))  # noqa: S704 - every text in it is escaped


class _Writer:
    """Replaces tokens by others; only what it makes itself is written as HTML."""

    def __init__(self, parser: MarkdownIt, level: int, images: Mapping[str, str]) -> None:
        self._parser = parser
        self._level = self._last = level
        self._images = images

    def blocks(self, tokens: Sequence[Token]) -> Iterator[Token]:
        open_folds = 0
        index = 0
        while index < len(tokens):
            token = tokens[index]
            raw = self._raw(tokens[index : index + 2])
            index += 3 if raw is not None else 1
            fold = _FOLD.fullmatch(raw or "")
            if fold:
                open_folds += 1
                yield _html(f"<details>\n<summary>{escape(fold[1].strip())}</summary>\n")
            elif raw == "</details>" and open_folds:
                open_folds -= 1
                yield _html("</details>\n")
            elif raw == "":
                continue  # nothing but comments
            elif raw is not None:
                yield from map(self._block, tokens[index - 3 : index])
            elif token.type == "table_open":
                yield _html('<div class="scroll" role="region" aria-label="table" tabindex="0">')
                yield token
            elif token.type == "table_close":
                yield token
                yield _html("</div>\n")
            else:
                yield self._block(token)
        yield _html("</details>\n" * open_folds)

    def _raw(self, pair: Sequence[Token]) -> str | None:
        """Return the text of a paragraph that lies in nothing else, without comments; None if it is something else."""
        if len(pair) == 2 and pair[0].type == "paragraph_open" and pair[0].level == 0:
            return _without_comments(pair[1].content).strip()
        return None

    def _block(self, token: Token) -> Token:
        if token.type == "heading_open":
            self._last = min(self._level + int(token.tag[1]), self._last + 1, _LOWEST)
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{self._last}"
        if token.type == "inline":
            token.children = list(self._inline(token.children or []))
        return token

    def _inline(self, children: Sequence[Token]) -> Iterator[Token]:
        links: list[bool] = []
        for token in children:
            if token.type == "link_open":
                links.append(_is_web(str(token.attrGet("href"))))
                token.attrSet("rel", "noopener noreferrer nofollow")
            kept = links[-1] if links else True
            if token.type == "text":
                yield from _text(token)
            elif token.type == "image":
                yield _html(self._image(token, linked=any(links)), "html_inline")
            elif token.type not in ("link_open", "link_close") or kept:
                yield token
            if token.type == "link_close":
                links.pop()

    def _image(self, token: Token, *, linked: bool) -> str:
        alt = escape(RendererHTML(self._parser).renderInlineAsText(token.children, self._parser.options, {}))
        source = self._images.get(str(token.attrGet("src")), "")
        if source.startswith("data:image/png;base64,"):
            return f'<img src="{escape(source)}" alt="{alt}">'
        if source.startswith("#") and not linked:
            return f'<a href="{escape(source)}">Figure: {alt}</a>'
        return f'<span class="absent">[image: {alt}]</span>'


def _text(token: Token) -> Iterator[Token]:
    """Split a text at its comments, which go, and at the code spans that a card writes as HTML."""
    for before, inside in _enclosed(_without_comments(token.content), "<code>", "</code>"):
        yield _plain(before)
        if inside is not None:
            span = Token("code_inline", "code", 0)
            span.content = inside
            yield span


def _without_comments(text: str) -> str:
    return "".join(before for before, _ in _enclosed(text, "<!--", "-->"))


def _enclosed(text: str, opening: str, closing: str) -> Iterator[tuple[str, str | None]]:
    """Yield each text before an opening and what is enclosed, and at last the rest; in time linear in the length."""
    at = 0
    while True:
        start = text.find(opening, at)
        end = text.find(closing, start + len(opening)) if start >= 0 else -1
        if end < 0:
            yield text[at:], None
            return
        yield text[at:start], text[start + len(opening) : end]
        at = end + len(closing)


def _plain(text: str) -> Token:
    token = Token("text", "", 0)
    token.content = text
    return token


def _html(text: str, kind: str = "html_block") -> Token:
    token = Token(kind, "", 0)
    token.content = text
    return token


def _is_web(address: str) -> bool:
    return _WEB.match(address) is not None
