"""What every component gets for free: it is discovered here, nobody has to list it.

A LightningModule of the zoo must have a sheet, a recipe that instantiates and trains, documented arguments, a stored round
trip to the bit, and a training step that moves what it should. The example of each component is its first ``*-digits``
or ``*-synthetic`` recipe, shortened.
"""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from tests.training import quick_trainer
from zoo import registry
from zoo.cli import main
from zoo.interaction_model import InteractionModel
from zoo.module import ZooModule

COMPONENTS = registry.components()
MODULES = [name for name in COMPONENTS if registry.describe(name).kind == "LightningModule"]
SHORT = [
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_epochs=1",
    "--data.train_samples=64", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
]  # fmt: skip
# Recipes that need no download have one of these in their names.
OFFLINE = ("digits", "synthetic")

pytestmark = pytest.mark.filterwarnings("ignore")


def recipe_of(name: str) -> str:
    """The first offline recipe, on the digits or on synthetic data, whose model is this component."""
    for recipe in registry.recipes():
        content = yaml.safe_load(registry.recipe_path(recipe).read_text())
        if content["model"]["class_path"].rpartition(".")[2] == name and any(word in recipe for word in OFFLINE):
            return recipe
    raise AssertionError(f"{name} has no offline recipe, *-digits or *-synthetic")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the recipe of each component has run for an epoch on 64 images, what it requires included."""
    folder = tmp_path_factory.mktemp("conformance")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def train(recipe: str) -> None:
            content = yaml.safe_load(registry.recipe_path(recipe).read_text())
            for needed, maker in content.get("requires", {}).items():
                if not Path(needed, "config.json").exists():
                    train(maker)
            assert main(["fit", "--config", recipe, *SHORT]) == 0

        for name in MODULES:
            if not Path("runs", recipe_of(name), "config.json").exists():
                train(recipe_of(name))
    return folder


@pytest.fixture
def built(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a component from the arguments of its recipe."""
    monkeypatch.chdir(trained)

    def build(name: str) -> ZooModule:
        content = yaml.safe_load(registry.recipe_path(recipe_of(name)).read_text())
        torch.manual_seed(0)
        return registry.component_class(name)(**content["model"]["init_args"])  # type: ignore[no-any-return]

    return build


def data_of(name: str) -> Any:
    """A small part of the data of a component's recipe."""
    data = yaml.safe_load(registry.recipe_path(recipe_of(name)).read_text())["data"]
    return getattr(zoo, data["class_path"])(**{**data["init_args"], "train_samples": 64, "batch_size": 32})


@pytest.mark.parametrize("name", COMPONENTS)
def test_sheet(name: str) -> None:
    component = registry.describe(name)
    needed = {"title", "about", "authors", "status", "task", "licence", "verified", "against", "citation"}
    assert needed <= component.sheet.keys()
    assert component.sheet["status"] in {"stable", "experimental", "reconstruction"}
    for section in ("## Deviations", "## Known limits"):
        assert section in component.text


@pytest.mark.parametrize("name", COMPONENTS)
def test_documented_arguments_are_the_signature(name: str) -> None:
    cls = registry.component_class(name)
    signature = inspect.signature(cls).parameters
    options = registry.options(name)
    assert [option.name for option in options] == list(signature)
    assert all(option.meaning for option in options), [option.name for option in options if not option.meaning]
    assert all(option.annotation for option in options)
    assert not any(p.kind is p.VAR_KEYWORD for p in signature.values()), "arguments must be named to be stored"


@pytest.mark.parametrize("recipe", registry.recipes())
def test_recipe_opens_with_what_it_is_and_its_command(recipe: str) -> None:
    head = [line for line in registry.recipe_path(recipe).read_text().splitlines() if line.startswith("#")]
    assert any(f"zoo fit --config {recipe}" in line for line in head)
    assert any("Expected" in line for line in head)


@pytest.mark.parametrize("name", MODULES)
def test_stored_round_trip_is_bit_equal(
    trained: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(trained)
    first = zoo.from_pretrained(f"runs/{recipe_of(name)}")
    first.save_pretrained(tmp_path)
    second = zoo.from_pretrained(tmp_path)
    assert type(first) is type(second) is registry.component_class(name)
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not any(module.training for module in second.modules())
    # Stored anew without a change, the files are the same to the byte.
    files = ("model.safetensors", "config.json")
    written = [(tmp_path / file).read_bytes() for file in files]
    second.save_pretrained(tmp_path)
    assert [(tmp_path / file).read_bytes() for file in files] == written


@pytest.mark.parametrize("name", MODULES)
def test_one_step_moves_the_trainable_parameters_and_only_those(built: Any, name: str) -> None:
    model, data = built(name), data_of(name)
    # A recommender has no parameters before it knows its users and items.
    if isinstance(model, InteractionModel):
        model.attach(data)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    frozen = {key: tower.network.state_dict() for key, tower in model.frozen_towers.items()}
    frozen = {key: {k: v.clone() for k, v in state.items()} for key, state in frozen.items()}
    quick_trainer(max_steps=2).fit(model, data)
    for key, value in model.named_parameters():
        assert torch.equal(before[key], value) != value.requires_grad, key
    for key, tower in model.frozen_towers.items():
        assert all(torch.equal(frozen[key][k], v) for k, v in tower.network.state_dict().items())


@pytest.mark.parametrize("name", MODULES)
def test_pickle(built: Any, name: str) -> None:
    model = built(name)
    copy = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(v, copy.state_dict()[k]) for k, v in model.state_dict().items())
    assert dict(copy.hparams) == dict(model.hparams)
    assert copy.frozen_towers.keys() == model.frozen_towers.keys()


@pytest.mark.parametrize("name", MODULES)
def test_checkpoint_resumes(built: Any, name: str, tmp_path: Path) -> None:
    model = built(name)
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, data_of(name))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = registry.component_class(name).load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in model.state_dict().items())
    quick_trainer(max_epochs=2).fit(resumed, data_of(name), ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)
    before = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert not all(torch.equal(value, before[key]) for key, value in resumed.named_parameters() if key in before)


@pytest.mark.parametrize("name", [name for name in MODULES if registry.component_class(name).evaluated_with])
def test_stored_run_is_evaluated_with_what_it_needs(trained: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    shown = [word for word in SHORT if "max_epochs" not in word]
    assert main(["test", "--config", f"runs/{recipe_of(name)}", *shown]) == 0
