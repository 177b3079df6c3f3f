"""A stored model's folder made fit for others to see: its card, and nothing in it that should stay at home. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from zoo import registry, storage, transport
from zoo.card_parts import kept_parts
from zoo.errors import InputError

__all__ = ["push_folder", "read_config", "read_text", "refuse_private", "write_card"]

# A number or a switch by such a name is a count or an option (num_tokens, class_token); of a password it may be all.
_SECRET_NAME = re.compile(
    r"(^|[_-])(token|secret|pass(word|wd|phrase)|pwd|pat|(api|access|private|secret|account|auth|encryption|signing)[_-]?key"
    r"|credential|bearer|authorization)s?$"
)
_PASSWORD = re.compile(r"(^|[_-])(pass(word|wd|phrase)|pwd|secret|credential)s?$")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|sk-[\w-]{20,}|[sr]k_(live|test)_[A-Za-z0-9]{16,}|gsk_[A-Za-z0-9]{20,}|nvapi-[\w-]{20,}"
    r"|r8_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{20,}|pypi-[\w-]{20,}|dckr_pat_[\w-]{16,}|A(KIA|SIA)[0-9A-Z]{16}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|xox[abeprs]-[A-Za-z0-9-]{10,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|\w+://[^\s/:@]+:[^\s/@]+@"
)
_ABSOLUTE = re.compile(r"\s*(/|~|[A-Za-z]:[\\/]|\\\\|file://).+", re.DOTALL)
_HOME = re.compile(r"(?<![\w.])(/(home|Users)/[\w.-]|/root/|~/|[A-Za-z]:[\\/]+Users[\\/])")


# What a page runs or loads by itself. The Hub takes it out of a card; other readers of a folder may not.
_ACTIVE = re.compile(
    r"<(?=\s*/?\s*(script|iframe|object|embed|applet|base|meta|link|form)\b"
    r"|[a-z][^<]*?[\s/\"']on(abort|animation\w*|begin|blur|change|click|drag\w*|error|focus\w*|input|key\w*|load\w*|message"
    r"|mouse\w*|page\w*|pointer\w*|resize|scroll\w*|select\w*|submit|toggle|touch\w*|transition\w*|unload|wheel)\s*=)",
    re.IGNORECASE,
)
_MAX_CONFIG = 1 << 20  # bytes of a configuration; what can be stored
_SCRIPT_LINK = re.compile(r"\b(java|vb)script:", re.IGNORECASE)


def read_text(folder: Path, name: str) -> str | None:
    """Return a text file of the version that counts, or None."""
    path = storage.locate(folder, name) if folder.is_dir() else None
    try:
        return None if path is None else path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a stored model as it was written, without torch and without the checks of a load.

    Args:
        folder: the folder, such as ``zoo fit`` leaves in ``trainer.default_root_dir``.

    Raises:
        InputError: nothing is stored there, or its ``config.json`` is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; `zoo pull OWNER/NAME FOLDER` copies a stored model from the Hub")
    path = storage.locate(folder, "config.json")
    if path is None:
        inside = sorted(found.parent.as_posix() for found in folder.glob("*/config.json"))[:3]
        hint = f" Did you mean {', '.join(inside)}?" if inside else ""
        raise InputError(
            f"{folder} is no stored model: it has no config.json.{hint} `zoo fit` stores one in trainer.default_root_dir"
        )
    if path.stat().st_size > _MAX_CONFIG:
        raise InputError(f"{path} is larger than {_MAX_CONFIG} bytes: it is no configuration of the zoo")
    try:
        config = json.loads(read_text(folder, "config.json") or "")
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no valid JSON, so it is damaged: store the model anew ({error})") from error
    if not isinstance(config, dict) or "zoo_format" not in config:
        raise InputError(
            f"{path} is no configuration of the zoo: it has no zoo_format. `zoo fit` stores models that it has"
        )
    return config


def write_card(
    folder: Path, *, existing: str | None = None, repo_id: str | None = None, source: Path | None = None
) -> None:
    """Write README.md and the curves into a folder; the card shows them and the figures that the model is stored with.

    Args:
        folder: where they are written.
        existing: a card whose hand-written parts are kept, with scripts in them made plain text.
        repo_id: the repository that the card is for; None for a local folder.
        source: the folder of the stored model; ``folder`` itself if omitted.
    """
    from zoo import model_card

    origin = source or folder
    config = read_config(origin)
    name = config.get("component")
    component = registry.describe(name) if name in registry.components() else None
    history = (config.get("run") or {}).get("history") or {}
    figures = model_card.write_figures(history, folder)
    figures += [name for name in storage.DRAWN if storage.locate(origin, name) is not None]
    recipe = read_text(origin, "recipe.yaml")
    if existing is not None:
        existing = _SCRIPT_LINK.sub("about:blank#", _ACTIVE.sub("&lt;", existing))
    text = model_card.render(config, component, recipe=recipe, repo_id=repo_id, existing=existing, figures=figures)
    (folder / "README.md").write_text(text, encoding="utf-8")


def refuse_private(folder: Path) -> None:
    """Refuse to publish what looks like a secret or names a path of this machine.

    Args:
        folder: the folder of a stored model; its configuration, recipe and card are read.

    Raises:
        InputError: something was found; the message gives its place, never the value of a secret.
    """
    config = _parsed(folder, "config.json", json.loads)
    recipe = _parsed(folder, "recipe.yaml", yaml.safe_load)
    found = [leaf for key, value in config.items() if key != "golden" for leaf in _leaves(value, (key,))]
    found += _leaves(recipe, ("recipe",))
    # Secrets come first: no message about a path shows one.
    for names, value in found:
        if any(_SECRET_VALUE.search(text) for text in (*names, value) if isinstance(text, str)):
            where = "recipe.yaml" if names[0] == "recipe" else "config.json"
            raise InputError(
                f"{where} holds what looks like an access token or a private key: remove it before pushing"
            )
        if _is_secret(names, value):
            raise InputError(f"{_shown(names)} looks like a secret: remove it before pushing")
    for name in ("config.json", "recipe.yaml", "README.md"):
        if _SECRET_VALUE.search(read_text(folder, name) or ""):
            raise InputError(f"{name} holds what looks like an access token or a private key: remove it before pushing")
    for names, value in found:
        if any(isinstance(text, str) and _is_local(text) for text in (*names, value)):
            raise InputError(
                f"{_shown(names)} is the path {value!r} of this machine: use a relative one before pushing"
            )


def _parsed(folder: Path, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    text = read_text(folder, name) or "{}"
    try:
        found = parse(text) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{folder / name} cannot be read: it is damaged; store the model anew") from error
    if not isinstance(found, dict):
        raise InputError(f"{folder / name} holds no configuration: store the model anew")
    return found


def _is_secret(names: tuple[Any, ...], value: Any) -> bool:
    """Whether a value stands below a name that secrets have; numbers and switches only below those of passwords."""
    if value is None or value == "" or isinstance(value, bool):
        return False
    pattern = _SECRET_NAME if isinstance(value, str) else _PASSWORD
    return any(isinstance(name, str) and pattern.search(_CAMEL.sub("_", name).lower()) for name in names)


def _is_local(text: str) -> bool:
    return _ABSOLUTE.fullmatch(text) is not None or _HOME.search(text) is not None


def _shown(names: tuple[Any, ...]) -> str:
    shown = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    return shown.removeprefix(".")


def push_folder(folder: Path | str, repo_id: str, **options: Any) -> transport.Push:
    """Send the folder of a stored model to the Hub, in one commit.

    Args:
        folder: the folder.
        repo_id: ``owner/name``; it is created if needed.
        **options: ``branch``, ``private``, ``token``, ``create_pr``, ``message``, ``tag``, ``dry_run``; see
            `zoo.transport.push`.

    Returns:
        What was sent, or would be.

    Raises:
        InputError: nothing is stored there, it holds what should not be published, or the Hub refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder with a stored model")
    refuse_private(folder)

    def prepare(stored: Path, remote: str | None, scratch: Path) -> None:
        local = read_text(stored, "README.md")
        by_hand = local is not None and any(text.strip() for text in kept_parts(local).texts)
        write_card(scratch, existing=local if by_hand or remote is None else remote, repo_id=repo_id, source=stored)

    return transport.push(folder, repo_id, prepare=prepare, **options)


def _leaves(value: Any, names: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*names, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*names, index))
    else:
        yield names, value
