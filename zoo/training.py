"""``zoo fit``, ``validate``, ``test`` and ``predict``: LightningCLI with the zoo's names, recipes and stored models.

What is added to LightningCLI: components and data modules by short name; recipes by name; a run's best model is stored in
``trainer.default_root_dir``; ``requires`` trains a stored model that a recipe builds on when it is not there yet; a
checkpoint never changes the configuration; and errors are one line.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from safetensors.torch import save_file

import zoo
from zoo import recipe_check, registry, run_facts, storage, transport
from zoo.arguments import refuse_code
from zoo.errors import InputError, nearest
from zoo.module import ZooModule

__all__ = ["ZooCLI", "run"]

_DATA = "zoo.data"
_GROUPS = ("trainer", "model", "data", "optimizer", "lr_scheduler")


def run(command: str, words: list[str]) -> None:
    """Run a LightningCLI subcommand.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        words: its options.

    Raises:
        InputError: an option, a name, a file or a value that cannot be used.
    """
    _import_names()
    # Behind all else, so that a user's own module is found and hides nothing.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    words = _resolve_configs(words)
    warnings.filterwarnings("ignore", message=".*configure_optimizers` will be overridden by.*")
    # LightningCLI reads sys.argv for its own warning only; the words come from here.
    sys.argv = [sys.argv[0]]
    try:
        _run_cli(command, words)
    except ValueError as error:
        raise _first_input_error(error) or error from error


def _run_cli(command: str, words: list[str]) -> None:
    ZooCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=ZooParser,
        parser_kwargs={"prog": "zoo"},
        load_from_checkpoint_support=False,
        seed_everything_default=0,
        args=[command, *words],
    )


def _first_input_error(error: BaseException) -> InputError | None:
    """Return the `InputError` of a constructor that jsonargparse reports as a value of a wrong type."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    return cause


class ZooParser(LightningArgumentParser):
    """A parser whose errors are one line with the nearest names."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what argparse would print with the whole usage.

        Raises:
            InputError: always.
        """
        raise InputError(_explain(message)) from ex


class ZooCLI(LightningCLI):
    """LightningCLI for the zoo; see the top of this file."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``requires``: stored models that a run builds on."""
        parser.add_argument(
            "--requires",
            type=dict[str, str],
            default={},
            help="stored models this run builds on, folder: recipe; named but missing ones are trained first (fit only)",
        )

    @property
    def _options(self) -> Namespace:
        options: Namespace = self.config[self.config["subcommand"]]
        return options

    def _parse_ckpt_path(self) -> None:
        """Check a checkpoint against the configuration; Lightning would let it choose class and values silently.

        Raises:
            InputError: it is no checkpoint, names code to import, or belongs to another component.
        """
        path = self._options.get("ckpt_path")
        if not path or not Path(path).is_file():
            return
        checkpoint = _read_checkpoint(Path(path))
        stored = checkpoint.get("hyper_parameters", {})
        refuse_code(_as_plain(stored), "hyper_parameters")
        model = self._options.model
        component = checkpoint.get("zoo", {}).get("component")
        if component and model.class_path.rpartition(".")[2] != component:
            raise InputError(
                f"--ckpt_path: the checkpoint is of a {component}, the configuration asks for {model.class_path}"
            )
        asked = model.init_args.as_dict() if "init_args" in model else {}
        for name in sorted(stored.keys() & asked.keys()):
            if _as_plain(asked[name]) != _as_plain(stored[name]):
                rank_zero_warn(
                    f"--ckpt_path: trained with {name}={stored[name]!r}, going on with {name}={asked[name]!r}"
                )

    def before_instantiate_classes(self) -> None:
        """Name the run's folder, train what it requires, and leave out the teacher where only evaluation is asked for."""
        options = self._options
        if options.trainer.default_root_dir is None:
            options.trainer.default_root_dir = f"runs/{options.model.class_path.rpartition('.')[2].lower()}"
        if self.config["subcommand"] == "fit":
            _train_required(options.requires, _texts(_as_plain([options.get("model"), options.get("data")])))
            return
        component = options.model.class_path.rpartition(".")[2]
        if options.get("ckpt_path") is None and component in registry.components():
            cls = registry.component_class(component)
            for name in getattr(cls, "training_only", ()):
                if name in options.model.init_args and name not in getattr(cls, "evaluated_with", ()):
                    options.model.init_args[name] = None

    def before_fit(self) -> None:
        """Note the curves and the time, for the card."""
        self.curves = _Curves()
        vars(self.trainer)["callbacks"].append(self.curves)

    def after_fit(self) -> None:
        """Store the best model of the run, or the last where no metric was monitored, with its results, in its folder."""
        if not isinstance(self.model, ZooModule) or self._options.trainer.fast_dev_run:
            return
        best = self.trainer.strategy.broadcast(getattr(self.trainer.checkpoint_callback, "best_model_path", ""))
        if best:
            self.model.load_state_dict(_read_checkpoint(Path(best))["state_dict"])
        facts = run_facts.collect(
            self.trainer,
            metrics={},
            seconds=self.curves.seconds,
            seed=self._options.seed_everything if type(self._options.seed_everything) is int else None,
            monitor=getattr(self.trainer.checkpoint_callback, "monitor", None),
            history=self.curves.history,
        )
        self.model.run_facts = {**facts, "metrics": self._results()}
        self.model.run_figures = run_facts.figures(self.trainer)
        self._store()

    def _results(self) -> dict[str, dict[str, Any]]:
        """Return the metrics of the weights that are stored, on the splits that there are."""
        found: dict[str, Any] = {}
        silent = {"model": self.model, "datamodule": self.datamodule, "verbose": False}
        if getattr(self.trainer, "num_val_batches", None) and sum(self.trainer.num_val_batches):
            found |= self.trainer.validate(**silent)[0]
        if getattr(getattr(self.datamodule, "splits", None), "test", None) is not None:
            # Nothing at all with `limit_test_batches=0`.
            found |= dict(*self.trainer.test(**silent)[:1])
        return run_facts.by_split(found)

    @rank_zero_only
    def _store(self) -> None:
        config = self.config["fit"].clone()
        config["ckpt_path"] = None
        callbacks = config.trainer.callbacks
        if isinstance(callbacks, list):  # whoever trains again does not push to this run's repository
            config.trainer.callbacks = [c for c in callbacks if not c.class_path.endswith("PushToHub")]
        if Path(str(config.trainer.default_root_dir)).is_absolute():  # a path of this machine is no part of a recipe
            config.trainer.default_root_dir = f"runs/{Path(config.trainer.default_root_dir).name}"
        recipe = self._parser("fit").dump(config, skip_none=False)
        folder = self.model.save_pretrained(self.trainer.default_root_dir, recipe=recipe)
        shown = _relative(folder)
        rank_zero_info(
            f"stored in {shown}: zoo.from_pretrained({str(shown)!r}) loads it, `zoo test --config {shown}` tests it"
        )

    def before_validate(self) -> None:
        """Take the weights of the run's stored model unless a checkpoint is named."""
        self._take_stored()

    def before_test(self) -> None:
        """Take the weights of the run's stored model unless a checkpoint is named."""
        self._take_stored()

    def before_predict(self) -> None:
        """Take the weights of the run's stored model unless a checkpoint is named."""
        self._take_stored()

    def _take_stored(self) -> None:
        if self._options.get("ckpt_path") is not None or not isinstance(self.model, ZooModule):
            return
        folder = Path(self.trainer.default_root_dir)
        if storage.locate(folder, "config.json") is None:
            raise InputError(
                f"nothing is stored in {_relative(folder)}: run `zoo fit` with this configuration first, or name a "
                "checkpoint with --ckpt_path"
            )
        cls = type(self.model)
        self.model = cls.from_pretrained(folder, for_training=bool(cls.evaluated_with)).eval()
        rank_zero_info(f"the model stored in {_relative(folder)}")

    def predict(self, **options: Any) -> None:
        """Predict and write what `predict_step` returned, joined over batches, to ``predictions.safetensors``."""
        batches = self.trainer.predict(**options) or []
        if not batches or not isinstance(batches[0], dict):
            rank_zero_warn("predict_step returned no dictionaries of tensors: nothing is written")
            return
        joined = {key: torch.cat([batch[key] for batch in batches]).contiguous() for key in batches[0]}
        suffix = f".rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.default_root_dir, f"predictions{suffix}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(joined, path)
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in joined.items())
        rank_zero_info(f"{_relative(path)}: {shapes}")


class _Curves(Callback):
    """The logged metrics of each epoch, and how long fit took."""

    def __init__(self) -> None:
        self.history: dict[str, list[list[float]]] = {}
        self.seconds = 0.0
        self._start = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            if math.isfinite(float(value)):
                self.history.setdefault(name, []).append([trainer.current_epoch, float(value)])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.monotonic() - self._start


def _import_names() -> None:
    """Import components and data modules, so that their short names are known."""
    for name in registry.components():
        registry.component_class(name)
    for name in zoo._names_in(_DATA):
        getattr(zoo, name)


def _resolve_configs(words: list[str]) -> list[str]:
    """Replace recipe names and folders of stored models behind ``--config`` by the files they stand for."""
    resolved = []
    expect = False
    for word in words:
        option, equals, value = word.partition("=")
        if expect:
            resolved.append(_config_file(word))
        elif option in ("--config", "-c") and equals:
            resolved.append(f"{option}={_config_file(value)}")
        else:
            resolved.append(word)
        expect = word in ("--config", "-c")
    return resolved


def _config_file(name: str) -> str:
    if name.startswith("hf://"):
        return _fetched_recipe(name)
    path = Path(name)
    if path.is_dir():
        recipe = storage.locate(path, "recipe.yaml")
        if recipe is None:
            raise InputError(f"--config {name}: the folder has no recipe.yaml")
        return str(recipe)
    if path.is_file() or name.lstrip().startswith("{"):
        return name
    if path.suffix in (".yaml", ".yml", ".json"):
        raise InputError(f"--config {name}: no such file")
    return str(registry.recipe_path(name))


def _fetched_recipe(name: str) -> str:
    """Fetch the recipe of a stored model, and use it only if nothing in it can run code."""
    source = transport.parse_source(name)
    assert isinstance(source, transport.Source)
    folder, commit = transport.fetch(source, ("recipe.yaml",))
    path = folder / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source.repo_id}@{commit[:8]}: recipe.yaml is no text: {error}") from error
    recipe_check.check_recipe(text, f"{source.repo_id}@{commit[:8]}")
    rank_zero_info(f"the recipe of {source.repo_id} at commit {commit}")
    return str(path)


def _train_required(requires: dict[str, str], named: list[str]) -> None:
    """Train each stored model that is missing, in a process of its own; none that the options no longer name."""
    used = {os.path.normpath(name) for name in named}
    for folder, recipe in requires.items():
        registry.recipe_path(recipe)
        if os.path.normpath(folder) not in used:
            continue
        if storage.locate(Path(folder), "config.json") is None and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            rank_zero_info(f"{folder} is needed and not there yet: zoo fit --config {recipe}")
            command = [sys.executable, "-m", "zoo", "fit", "--config", recipe, "--trainer.default_root_dir", folder]
            if subprocess.run(command, check=False).returncode:  # noqa: S603 - our own command, a checked recipe name
                raise InputError(f"{folder} could not be made: `zoo fit --config {recipe}` failed")


def _read_checkpoint(path: Path) -> dict[str, Any]:
    import pickle

    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} is no Lightning checkpoint that can be read safely: {str(error).splitlines()[0][:200]}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(f"{path} is no Lightning checkpoint: it has no state_dict")
    return checkpoint


def _as_plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    return [_as_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> list[str]:
    """Return all text in plain options."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for item in items for text in _texts(item)]


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _explain(message: str) -> str:
    """Turn jsonargparse's message into one line, with the nearest names for a mistyped class or option."""
    text = " ".join(line.strip(" -") for line in message.splitlines() if line.strip())
    if "Did you mean" in text:  # a nested parser has explained itself already
        return re.sub(r"^.*Errors: (no option .*?)(?: Expected a | Given value ).*$", r"\1", text)
    for pattern in (r"Expected a dot import path string: ([^\s.]+)", r"Import path ([\w.]+) does not correspond"):
        found = re.search(pattern, text)
        if found:
            known = [*registry.components(), *zoo._names_in(_DATA)]
            return f"no class named {found[1]!r}.{nearest(found[1], known)} A class of your own needs its dotted path"
    for pattern in (
        r"[Oo]ption '([\w.]+)'(?: is not accepted|$)",
        r"Key '([\w.]+)' is not expected",
        r"arguments?: --([\w.]+)",
    ):
        found = re.search(pattern, text)
        if found:
            return f"no option {found[1]!r}.{_nearest_option(found[1])}"
    text = text.partition(" Given value type:")[0].removesuffix(" Expected a <class 'NoneType'>")
    return re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: ", "", text)


def _nearest_option(name: str) -> str:
    """Compare the part of an option that is wrong: its group where there is no such group, else its last word."""
    group, _, leaf = name.partition(".")
    if leaf and group not in _GROUPS:
        return nearest(group, _GROUPS)
    names = [*_GROUPS, "seed_everything", "requires", "ckpt_path", *inspect.signature(Trainer).parameters]
    names += [option.name for component in registry.components() for option in registry.options(component)]
    return nearest(name.rpartition(".")[2], names)
