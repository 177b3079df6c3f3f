"""The model card of a stored model: its README.md, from the paper sheet of the component and the facts of the run.

Nothing here needs torch, and what the card shows of the configuration is escaped, without secrets and without local paths.
"""

from __future__ import annotations

import keyword
import re
import threading
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from zoo.card_facts import Facts, Origin, read_facts
from zoo.card_figures import write_figures
from zoo.card_parts import digests, kept_parts, merge_metadata, merge_text
from zoo.card_text import code, fenced, inert, load_yaml, plain, public, to_yaml
from zoo.errors import InputError
from zoo.registry import Component

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

__all__ = ["render", "write_figures"]

_LIBRARY = "lightning-zoo"
_REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_FIGURE = re.compile(r"figures/[\w-][\w.-]*\.png", re.ASCII)
_METRIC_TYPES = {"acc": "accuracy"}  # the Hub's identifiers
_MAX_RECIPE = 1 << 16
# Two PushToHub render at once. Versions of huggingface_hub before 2 take a package for missing (here Jinja2) while another
# thread looks it up for the first time.
_rendering = threading.Lock()
_HERE = "path/to/this/folder"


def render(
    config: Mapping[str, Any],
    component: Component | None,
    *,
    recipe: str | None = None,
    repo_id: str | None = None,
    existing: str | None = None,
    figures: Sequence[str] = (),
) -> str:
    r"""Return the README.md of a stored model.

    Rendering twice changes nothing: ``render(…, existing=render(…)) == render(…)``.

    Args:
        config: content of ``config.json``, with the facts of the run under ``run``; every part may be missing. A metric that
            is not finite may be a number, a word such as ``"nan"``, or None.
        component: the sheet of the component; None for a class of the user's own and for plain weights.
        recipe: the configuration of the run as YAML text.
        repo_id: the repository on the Hub; None for a folder.
        existing: the README.md that is there. Text outside of the generated parts and metadata that people added or changed
            are kept; a card without generated parts comes first as a whole. Comments in the metadata are not kept.
        figures: names of figures relative to the card, as `write_figures` returns them.

    Returns:
        The text of the card, metadata included.

    Raises:
        InputError: the metadata of the existing card is not valid, a part of the configuration has a wrong type, or the name
            of a repository or a figure cannot be one.

    Example:
        >>> print(render({"component": None}, None, repo_id="me/x").partition("\n---\n")[0])
        ---
        library_name: lightning-zoo
        license: unknown
        tags:
        - lightning-zoo
        - pytorch-lightning
    """
    from huggingface_hub import ModelCard

    if repo_id is not None and not _REPO_ID.fullmatch(repo_id):
        raise InputError(f"repo_id must be a name such as me/model, got {repo_id!r}")
    facts = read_facts(config)
    kept = kept_parts(existing)
    ours = _metadata(facts, component, repo_id)
    generated = ours.to_dict()  # type: ignore[no-untyped-call]
    metadata = merge_metadata(kept, generated)
    template = (resources.files("zoo.cards") / "template.md").read_text(encoding="utf-8")
    values = {
        **_about(facts, component, repo_id),
        **_results(facts),
        **_training(facts, component, recipe, repo_id),
        "figures": [_figure(name) for name in figures],
        "license": _stated_license(metadata),
        "digests": digests(generated),
    }
    with _rendering:
        card = ModelCard.from_template(ours, template_str=template, **values)
    body = merge_text(kept, f"{card.text.rstrip()}\n")
    return f"---\n{to_yaml(metadata)}---\n{body}"


# -- metadata ------------------------------------------------------------------------------------------------------


def _metadata(facts: Facts, component: Component | None, repo_id: str | None) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    task = component.sheet.get("task") if component else None
    data_set = facts.data_sets[0] if facts.data_sets else plain(facts.data or "unknown")
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=data_set,
            dataset_name=plain(facts.data or "unknown"),
            dataset_split=plain(result.split),
            metric_type=_METRIC_TYPES.get(result.name, plain(result.name)),
            metric_name=plain(result.name),
            metric_value=result.value,
        )
        for result in facts.results
        if result.value is not None
    ]
    names = [plain(facts.component)] if facts.component else []
    return ModelCardData(
        library_name=_LIBRARY,
        pipeline_tag=task,
        license="unknown",
        tags=[_LIBRARY, "pytorch-lightning", *names],
        base_model=sorted({origin.repo for origin in facts.origins if origin.repo}) or None,
        datasets=facts.data_sets or None,
        model_name=plain(_name(facts, repo_id)) if results else None,
        eval_results=results or None,
    )


def _stated_license(metadata: Mapping[Any, Any]) -> str:
    stated = metadata.get("license")
    if stated in (None, "unknown"):
        return ""
    name = metadata.get("license_name")
    return code(stated) + (f" ({code(name)})" if name else "")


# -- what it is and how to load it ---------------------------------------------------------------------------------


def _name(facts: Facts, repo_id: str | None) -> str:
    return repo_id.rpartition("/")[2] if repo_id else facts.component or "Stored model"


def _about(facts: Facts, component: Component | None, repo_id: str | None) -> dict[str, Any]:
    intro, headings, rest = component.text.partition("\n## ") if component else ("", "", "")
    sheet = component.sheet if component else {}
    citation = str(sheet.get("citation") or "").strip()
    return {
        "title": inert(_name(facts, repo_id)),
        "component": code(facts.component) if facts.component else "",
        "sheet": {**sheet, "verified": str(sheet.get("verified", "nothing")).strip().rstrip(".")}
        if component
        else None,
        "intro": intro.strip(),
        "limits": re.sub(r"(?m)^## ", "### ", f"{headings}{rest}".strip()),
        "citation": fenced(citation, "bibtex") if citation else "",
        "snippet": fenced("\n".join(_snippet(facts, component, repo_id)), "python"),
        "supplied": [{"name": code(name), "type_name": code(facts.supplied[name])} for name in _to_be_supplied(facts)],
        "input_shape": code(facts.input_shape) if facts.input_shape else "",
        "versions": ", ".join(f"{inert(name)} {code(version)}" for name, version in facts.versions.items()),
        "sha256": code(facts.sha256) if facts.sha256 else "",
    }


def _to_be_supplied(facts: Facts) -> list[str]:
    """Return the parts without which the model cannot be loaded for inference."""
    training_only = {origin.part for origin in facts.origins if origin.training_only}
    return [name for name in facts.supplied if name not in training_only]


def _snippet(facts: Facts, component: Component | None, repo_id: str | None) -> list[str]:
    source = f'"{repo_id}"' if repo_id else '"."'
    pin = '  # revision="…" pins one commit' if repo_id else "  # in this folder"
    if facts.component is None:
        return [
            "import zoo",
            "",
            "module = build_module()  # yours: the LightningModule that was trained, built as for the training",
            f"zoo.load_weights({source}, module){pin}",
        ]
    lines = ["import torch"] if facts.input_shape and facts.args.get("trained_modality") != "text" else []
    lines.append("import zoo")
    if component is None:
        lines.append("import your_module  # the one that defines the class, under @zoo.register")
    lines.append("")
    arguments = [source]
    for name in _to_be_supplied(facts):
        if name.isidentifier() and not keyword.iskeyword(name):
            type_name = re.sub(r"[^\w.]", "", facts.supplied[name], flags=re.ASCII)
            lines.append(f"{name} = build_{name}()  # yours: the {type_name} that the model was trained with")
            arguments.append(f"{name}={name}")
    lines.append(f"model = zoo.from_pretrained({', '.join(arguments)}){pin}")
    if component is not None:
        lines.append("network = model.network  # the plain network, nothing of the zoo around it")
    modalities = [facts.args.get(f"{side}_modality") for side in ("trained", "frozen")]
    if "text" in modalities or {"image", "text", "head"} <= facts.args.keys():
        lines.append('texts = model.encode_text(["a text", "another"])  # unit vectors, one a text')
    if facts.input_shape and modalities[0] != "text":
        lines.append(f"output = model(torch.randn({', '.join(map(str, facts.input_shape))}))")
    return lines


# -- results -------------------------------------------------------------------------------------------------------


def _results(facts: Facts) -> dict[str, Any]:
    monitor = facts.run.get("monitor")
    chosen_on = str(monitor).partition("/")[0] if monitor else ""
    rows = [
        {
            "split": code(result.split),
            "samples": "" if result.samples is None else str(result.samples),
            "name": code(result.name),
            "value": "not finite" if result.value is None else f"{result.value:.4g}",
        }
        for result in facts.results
    ]
    return {
        "results": rows,
        "not_finite": ", ".join(
            code(f"{result.split}/{result.name}") for result in facts.results if result.value is None
        ),
        "seed": code(facts.run["seed"]) if "seed" in facts.run else "",
        "monitor": code(monitor) if monitor else "",
        "optimistic": code(chosen_on) if any(result.split == chosen_on for result in facts.results) else "",
    }


def _control(facts: Facts, component: Component | None, fit: str) -> dict[str, Any] | None:
    """Return what the sheet names as the control: the arguments that switch the method off."""
    settings = component.sheet.get("control") if component else None
    if not settings:
        return None
    options = "".join(f" --model.{name} {value}" for name, value in settings.items())
    command = f"{fit}{options} --trainer.default_root_dir runs/control"
    return {
        "setting": " and ".join(code(f"{name}: {value}") for name, value in settings.items()),
        "is_this": all(name in facts.args and facts.args[name] == value for name, value in settings.items()),
        "command": fenced(command, "bash") if fit else "",
    }


def _figure(name: str) -> dict[str, str]:
    if not _FIGURE.fullmatch(name):
        raise InputError(f"a figure must be a file such as figures/loss.png, got {name!r}")
    return {"path": name, "alt": inert(name.removeprefix("figures/").removesuffix(".png"))}


# -- training ------------------------------------------------------------------------------------------------------


def _training(facts: Facts, component: Component | None, recipe: str | None, repo_id: str | None) -> dict[str, Any]:
    fit = f"zoo fit --config hf://{repo_id}" if repo_id else f"zoo fit --config {_HERE}"
    content = _read_recipe(recipe)
    requires = content.get("requires")
    return {
        "command": fenced(fit, "bash") if recipe is not None else "",
        "on_hub": repo_id is not None,
        "control": _control(facts, component, fit if recipe is not None else ""),
        "recipe": fenced(to_yaml(content), "yaml") if content else "",
        "requires": ", ".join(map(code, requires)) if isinstance(requires, dict) else "",
        **_run(facts),
        "arguments": fenced(to_yaml(facts.args), "yaml") if facts.args else "",
        "data": _data(facts),
        "data_sets": ", ".join(f"https://huggingface.co/datasets/{name}" for name in facts.data_sets),
        "towers": [_tower(origin) for origin in facts.origins if origin.sha256],
        "origins": [_licence_of(origin) for origin in facts.origins],
    }


def _read_recipe(recipe: str | None) -> dict[str, Any]:
    """Return a recipe as it may be shown, or nothing if it cannot be read; the file itself is beside the card."""
    if recipe is None or len(recipe) > _MAX_RECIPE:
        return {}
    try:
        content = load_yaml(recipe)
    except yaml.YAMLError:
        return {}
    shown: dict[str, Any] = public(content) if isinstance(content, dict) else {}
    return shown


def _run(facts: Facts) -> dict[str, Any]:
    labels = {
        "seed": "Seed",
        "epochs": "Epochs",
        "steps": "Optimizer steps",
        "seconds": "Time",
        "hardware": "Hardware",
        "precision": "Precision",
    }
    run = {**facts.run}
    if "seconds" in run:
        run["seconds"] = _duration(run["seconds"])
    missing = [label.lower() for name, label in labels.items() if name not in run]
    return {
        "run": [{"label": label, "value": code(run[name])} for name, label in labels.items() if name in run],
        "not_recorded": ", ".join(missing),
    }


def _duration(seconds: Any) -> str:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
        raise InputError(f"run.seconds must be a time in seconds, got {str(seconds)[:80]!r}")
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _data(facts: Facts) -> dict[str, str] | None:
    if facts.data is None:
        return None
    splits = ", ".join(f"{code(name)} {size}" for name, size in facts.splits.items())
    return {
        "name": code(facts.data),
        "splits": f"{splits} samples" if splits else "",
        "args": fenced(to_yaml(facts.data_args), "yaml") if facts.data_args else "",
    }


def _tower(origin: Origin) -> dict[str, str]:
    return {
        "part": code(origin.part),
        "name": "a ready module" if origin.name is None else code(origin.name),
        "need": "training" if origin.training_only else "training and inference",
        "revision": "not recorded" if origin.revision is None else code(origin.revision),
        "sha256": code(origin.sha256),
    }


def _licence_of(origin: Origin) -> str:
    part = code(origin.part)
    if origin.name is None:
        return f"{part}, a module that was given ready: unknown, ask whoever trained this model."
    if origin.random:
        return f"{part}, {code(origin.name)}: began from random weights, so there is nothing to inherit."
    return f"{part}, {code(origin.name)}: unknown to this card, see {origin.see}."
