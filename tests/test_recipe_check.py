"""What a recipe from the Hub may say: all that the zoo's own say, and nothing that runs code or writes elsewhere."""

from __future__ import annotations

import inspect
import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo import registry
from zoo.cli import main
from zoo.errors import InputError
from zoo.recipe_check import check_recipe

pytestmark = pytest.mark.filterwarnings("ignore")


def base() -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load(registry.recipe_path("nd-digits").read_text())
    return recipe


def put(recipe: dict[str, Any], where: str, value: Any) -> None:
    """Set ``a/b/c`` in a nested dict."""
    *groups, last = where.split("/")
    for group in groups:
        recipe = recipe.setdefault(group, {})
    recipe[last] = value


@pytest.mark.parametrize("name", registry.recipes())
def test_recipes_of_the_zoo_pass(name: str) -> None:
    text = registry.recipe_path(name).read_text()
    assert check_recipe(text, "me/x") == yaml.safe_load(text)


def test_recipe_of_a_run_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    words = ["--trainer.max_epochs=1", "--data.train_samples=64", *quiet]
    assert main(["fit", "--config", "nd-digits-teacher", *words]) == 0
    recipe = check_recipe((tmp_path / "runs/nd-digits-teacher/recipe.yaml").read_text(), "me/x")
    assert recipe["data"]["init_args"]["train_samples"] == 64


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("model", "Classifier"),
        ("model/class_path", "zoo.lightning_modules.NDDistillation"),
        ("model/class_path", "zoo.lightning_modules.nd.NDDistillation"),
        ("model/init_args/student", "timm/vit_base_patch16_224.augreg_in21k"),
        ("model/init_args/teacher", "hf://me/nd-digits@v1.0"),
        (
            "data",
            {"class_path": "ParquetImagesDataModule", "init_args": {"train": ["train.parquet", "data/b.parquet"]}},
        ),
        ("data/init_args/class_names", ["cat", "mrs. dog", "a: b"]),
        ("optimizer", "AdamW"),
        (
            "lr_scheduler",
            {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitor": "val/acc"}},
        ),
        ("lr_scheduler", {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.1, "total_steps": 10}}),
        ("trainer/callbacks", None),
        ("trainer/callbacks", "ModelSummary"),
        (
            "trainer/callbacks",
            [{"class_path": "ModelCheckpoint", "init_args": {"filename": "{epoch:02d}-{val/acc:.2f}"}}],
        ),
        (
            "trainer/callbacks",
            [{"class_path": "NormGradSaliency", "init_args": {"layers": ["layer3.0", "net.blocks.1:input"]}}],
        ),
        ("trainer/callbacks", [{"class_path": "NDRegularizer", "init_args": {"student_layer": "model.avgpool"}}]),
        ("trainer/callbacks", [{"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 2}}}]),
        ("trainer/logger", False),
        ("trainer/logger", [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}]),
        ("trainer/strategy", "ddp"),
        ("trainer/profiler", "simple"),
        ("trainer/max_time", "00:01:00:00"),
        ("seed_everything", True),
        ("weights_only", None),
    ],
)
def test_what_a_run_needs_passes(where: str, value: Any) -> None:
    recipe = base()
    put(recipe, where, value)
    assert check_recipe(yaml.safe_dump(recipe), "me/x") == recipe


def test_arguments_that_name_layers_are_text() -> None:
    """They may hold dots, so none of them may be of a type for which jsonargparse imports what stands before a dot."""
    found = set()
    for name in registry.components():
        for argument, parameter in inspect.signature(getattr(zoo, name)).parameters.items():
            if re.fullmatch(r"(\w+_)?layers?", argument):
                words = set(re.findall(r"\w+", str(parameter.annotation)))
                assert words <= {"Literal", "None", "Sequence", "last", "int", "list", "select", "str"}, (
                    name,
                    argument,
                )
                found.add(argument)
    assert {"layers", "student_layer", "frozen_layer"} <= found


EVIL = {"class_path": "evil.Class"}


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model/class_path", "os.system", "model.class_path 'os.system' is refused"),
        ("model/class_path", "evil.NDDistillation", "model.class_path 'evil.NDDistillation' is refused"),
        ("model/class_path", ["a"], "model.class_path names no class"),
        ("model", "./more.yaml", "model.class_path './more.yaml' is refused"),
        ("model", [EVIL], "model.class_path names no class"),
        ("model/dict_kwargs", {}, "model has keys besides class_path and init_args: ['dict_kwargs']"),
        ("model/init_args", json.dumps({"student": EVIL}), "model.init_args must hold options"),
        ("model/init_args/student", EVIL, "model.init_args.student.class_path is refused"),
        ("model/init_args/student_options", {"a": [{"b": EVIL}]}, "student_options.a[0].b.class_path is refused"),
        ("model/init_args/student_options", {"_target_": "x"}, "student_options._target_ is refused"),
        ("model/init_args/student_options", {"_instantiator": "x"}, "student_options._instantiator is refused"),
        ("model/init_args/student", "{class_path: evil.Class}", "model.init_args.student.class_path is refused"),
        ("model/init_args/student", "class_path: evil.Class", "model.init_args.student.class_path is refused"),
        ("model/init_args/student", '{"class\\x5fpath": "evil.Class"}', "model.init_args.student.class_path is refused"),
        ("model/init_args/student", "[&a {}, *a]", "could be more configuration"),
        ("model/init_args/student", "!!python/name:os.system", "could be more configuration"),
        ("model/init_args/student", "evil.Class", "model.init_args.student 'evil.Class' is refused: it could be the path"),
        ("model/init_args/student", "evil.Class\n", "could be the path of something to import"),
        ("model/init_args/student", " evil.x-y", "could be the path of something to import"),
        ("model/init_args/student", "évil.x", "could be the path of something to import"),
        ("model/init_args/student", "evil.csv", "could be the path of something to import"),
        ("model/init_args/student", "./more.YAML", "could be a file with more configuration"),
        ("model/init_args/student", "a/model.safetensors", "could be a file with more configuration"),
        ("model/init_args/student", "a/../../b", "points outside the current folder"),
        ("model/init_args/student.class_path", "evil.Class", "has the key 'student.class_path', which is no option"),
        ("model/init_args/num_classes", 10**12, "model.init_args.num_classes is larger than 4294967296"),
        ("model/init_args/lr", float("inf"), "model.init_args.lr is larger than"),
        ("data/class_path", "evil.DigitsDataModule", "data.class_path 'evil.DigitsDataModule' is refused"),
        ("data/init_args/root", "/etc", "data.init_args.root '/etc' points outside"),
        ("data/init_args/root", "s3://bucket/x", "points outside the current folder"),
        ("data/init_args/root", "~/images", "points outside the current folder"),
        ("data/init_args/root", "C:\\Users", "points outside the current folder"),
        ("data/init_args/collate", "os.system", "data.init_args.collate 'os.system' is refused"),
        ("optimizer/class_path", "torch.optim.os", "optimizer.class_path 'torch.optim.os' is refused"),
        ("optimizer/class_path", "torch.optim.lr_scheduler.StepLR", "is refused: only classes of torch.optim that"),
        ("optimizer/class_path", "evil.SGD", "optimizer.class_path 'evil.SGD' is refused"),
        ("optimizer/class_path", "Evil", "optimizer.class_path 'Evil' is refused"),
        ("lr_scheduler/class_path", "LambdaLR", "lr_scheduler.class_path 'LambdaLR' is refused"),
        ("lr_scheduler/init_args/lr_lambda", "os.system", "lr_scheduler.init_args.lr_lambda 'os.system' is refused"),
        ("trainer", [EVIL], "trainer must hold options"),
        ("trainer/callbacks", EVIL, "trainer.callbacks[0].class_path 'evil.Class' is refused"),
        ("trainer/callbacks", ["evil.ModelCheckpoint"], "trainer.callbacks[0].class_path 'evil.ModelCheckpoint' is"),
        ("trainer/callbacks+", EVIL, "trainer has the key 'callbacks+', which is no option"),
        (
            "trainer/callbacks",
            [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "/tmp/x"}}],
            "trainer.callbacks[0].init_args.dirpath '/tmp/x' points outside",
        ),
        (
            "trainer/callbacks",
            [{"class_path": "BackboneFinetuning", "init_args": {"lambda_func": "os.system"}}],
            "trainer.callbacks[0].init_args.lambda_func 'os.system' is refused",
        ),
        ("trainer/callbacks", [{"class_path": "zoo.PushToHub"}], "trainer.callbacks[0].class_path PushToHub is refused"),
        ("trainer/logger", [EVIL], "trainer.logger[0].class_path 'evil.Class' is refused"),
        ("trainer/logger", "WandbLogger", "trainer.logger[0].class_path 'WandbLogger' is refused"),
        ("trainer/strategy", EVIL, "trainer.strategy.class_path is refused"),
        ("trainer/strategy", "{class_path: evil.Class}", "trainer.strategy.class_path is refused"),
        ("trainer/strategy.class_path", "evil.Class", "trainer has the key 'strategy.class_path', which is no option"),
        ("trainer/plugins", [EVIL], "trainer.plugins[0].class_path is refused"),
        ("trainer/plugins", "./config.json", "trainer.plugins './config.json' is refused"),
        ("trainer/profiler", EVIL, "trainer.profiler.class_path is refused"),
        ("trainer/default_root_dir", "/tmp/x", "trainer.default_root_dir '/tmp/x' points outside"),
        ("trainer/default_root_dir", "a/../../x", "trainer.default_root_dir 'a/../../x' points outside"),
        ("trainer/default_root_dir", "gs://b/x", "trainer.default_root_dir 'gs://b/x' points outside"),
        ("requires", {"runs/x": "evil"}, "requires.runs/x names 'evil', which is no recipe of the zoo"),
        ("requires", {"runs/x": ["nd-digits"]}, "requires.runs/x names ['nd-digits'], which is no recipe"),
        ("requires", {"~/x": "nd-digits"}, "requires.~/x points outside"),
        ("requires", {"a/../../x": "nd-digits"}, "requires.a/../../x points outside"),
        ("requires", ["nd-digits"], "requires must map folders to recipes"),
        ("ckpt_path", "last", "names a checkpoint (ckpt_path)"),
        ("weights_only", False, "weights_only False is refused"),
        ("seed_everything", "os.system", "seed_everything must be a number"),
        ("config", "more.yaml", "has keys that no recipe has: ['config']"),
        ("trainer.strategy", EVIL, "has keys that no recipe has: ['trainer.strategy']"),
    ],
)  # fmt: skip
def test_bad_recipe_is_refused_by_key(where: str, value: Any, message: str) -> None:
    recipe = base()
    put(recipe, where, value)
    with pytest.raises(InputError) as caught:
        check_recipe(yaml.safe_dump(recipe), "me/x@01234567")
    assert message in str(caught.value)
    assert str(caught.value).startswith("me/x@01234567: ")


LAUGHS = "a: &a0 [x]\n" + "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no configuration"),
        ("[1]", "is no configuration"),
        ("a: [", "is no plain YAML"),
        ("model: !!python/object/apply:os.system [touch harmed]", "is no plain YAML"),
        ("model: !!python/name:os.system", "is no plain YAML"),
        ("model: &m {class_path: Classifier}\ndata: *m", r"the alias \*m is refused"),
        (LAUGHS, r"the alias \*a0 is refused"),
        ("model: &m [*m]", r"the alias \*m is refused"),
        ("model: " + "[" * 20_000, "nested too deeply"),
        ("seed_everything: " + "9" * 5000, "is no plain YAML"),
        ("seed_everything: 2001-99-99", "is no plain YAML"),
        ("model: {class_path: Classifier, init_args: {a: 2001-01-01}}", "init_args.a is a date, which no option takes"),
        ("model: {class_path: Classifier, init_args: {a: !!binary aGk=}}", "init_args.a is a bytes"),
        ("a: 1" + ":1" * 30_000 + ".5", "is no plain YAML"),
        ("model: \0", "is no plain YAML"),
        ("? [a]\n: 1", "is no plain YAML"),
        ("1: 2", r"keys that no recipe has: \['1'\]"),
        ("#" * 65_537, "has 65537 characters, more than 65536"),
        ("--- {}\n--- {}", "is no plain YAML"),
    ],
    ids=range(19),
)
def test_bad_text(text: str, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=message):
        check_recipe(text, "me/x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


_NAMES = st.sampled_from(["a", "init_args", "callbacks", "student", "class_path", "_target_"])
_LEAVES = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=8), st.just("evil.Class"), st.just(EVIL))
_TREES = st.recursive(_LEAVES, lambda t: st.lists(t, max_size=3) | st.dictionaries(_NAMES, t, max_size=3), max_leaves=8)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["model", "data", "trainer", "optimizer", "lr_scheduler", "requires"]), _TREES)
def test_properties_any_tree_is_checked_or_refused(key: str, tree: Any) -> None:
    """No input makes the check itself fail, and none that passes names a class of others."""
    text = json.dumps({key: tree})
    try:
        recipe = check_recipe(text, "me/x")
    except InputError:
        return
    assert "evil.Class" not in json.dumps(recipe)
