"""Recipes chained through stored models: nd-digits, cwcl-digits, structure-digits, advcal-digits.

The recipes' own requirements are run by tests/test_conformance.py. Here each model is built on the one before, by its
place: the last one attacks the image encoder that STRUCTURE has aligned.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo import model_card, towers
from zoo.cli import main
from zoo.errors import InputError
from zoo.metrics import class_embeddings, class_prompts

pytestmark = pytest.mark.filterwarnings("ignore")

CHAIN = ("nd-digits-teacher", "nd-digits", "cwcl-digits", "structure-digits", "advcal-digits")
SHORT = [
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=1", "--data.train_samples=64",
]  # fmt: skip
# The layer whose features have a gradient, so that the aligned encoder can be attacked.
OPTIONS = {
    "structure-digits": ["--model.image_layer=features", "--model.text_layer=features"],
    "advcal-digits": [
        "--model.encoders", "{image: ./runs/structure-digits}", "--model.text", "null",
        "--model.centres", "centres.safetensors", "--model.templates", "null",
        "--model.valid_range", "{image: [-0.8125, 1.848]}", "--model.eps", "{image: 0.125}",
        "--model.step_size", "{image: 0.03125}",
    ],
}  # fmt: skip
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which each recipe of the chain has run for an epoch, from a teacher that was not trained."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # The curves of the cards take longer to draw than such a run to make.
        patch.setattr(model_card, "write_figures", lambda history, folder: [])
        torch.manual_seed(0)
        zoo.Classifier("zoo/resnet20", 10, student_options={"in_chans": 1}).save_pretrained(f"runs/{CHAIN[0]}")
        for recipe in CHAIN[1:]:
            if recipe == "advcal-digits":
                aligned = zoo.from_pretrained("runs/structure-digits")
                prompts = class_prompts(NAMES, ["a {}", "this number is a {}"])
                save_file({"centres": class_embeddings(aligned.encode_text, prompts)}, "centres.safetensors")
                # The recipe's other encoder, which it would train first, has no part in the chain.
                shutil.copytree("runs/cwcl-digits", "runs/cwcl-digits-profile")
            once = ["--trainer.max_epochs=1", "--trainer.limit_test_batches=0"]
            assert main(["fit", "--config", recipe, *SHORT, *once, *OPTIONS.get(recipe, [])]) == 0, recipe
    return folder


@pytest.fixture
def here(chained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(chained)
    return chained


def config(recipe: str) -> Any:
    return json.loads(Path("runs", recipe, "config.json").read_text())


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("here")
def test_each_names_the_one_before() -> None:
    digest = {recipe: config(recipe)["weights"]["sha256"] for recipe in CHAIN}
    teacher = zoo.from_pretrained("runs/nd-digits-teacher")
    omitted = config("nd-digits")["omitted"]["teacher"]
    assert omitted["name"] == "./runs/nd-digits-teacher"
    assert omitted["sha256"] == towers.fingerprint(teacher.network)
    assert config("cwcl-digits")["args"]["frozen"]["sha256"] == digest["nd-digits"]
    structure = config("structure-digits")["args"]
    assert structure["image"]["sha256"] == digest["nd-digits"]
    assert structure["text"]["sha256"] == digest["cwcl-digits"]
    encoder = config("advcal-digits")["args"]["encoders"]["image"]
    assert encoder["sha256"] == digest["structure-digits"]
    assert encoder["args"]["image"]["sha256"] == digest["nd-digits"]


@pytest.mark.usefixtures("here")
def test_each_computes_with_the_weights_of_the_one_before() -> None:
    nd, structure, advcal = (
        zoo.from_pretrained(f"runs/{recipe}") for recipe in ("nd-digits", "structure-digits", "advcal-digits")
    )
    x = images()
    with torch.no_grad():
        features = towers.create(nd.network, frozen=True).features(x)
        torch.testing.assert_close(structure.image.features(x), features)
        torch.testing.assert_close(advcal.embed("image", x), structure.encode_image(x))
        torch.testing.assert_close(advcal.network(x), advcal(x))
        tower = towers.create("./runs/structure-digits", frozen=True, embedding=True)
        torch.testing.assert_close(tower.features(x), structure.encode_image(x))
    assert not torch.equal(advcal(x), structure.encode_image(x))


@pytest.mark.usefixtures("here")
def test_the_last_is_tested() -> None:
    assert main(["test", "--config", "runs/advcal-digits", *SHORT, "--trainer.limit_test_batches=1"]) == 0


def test_a_changed_first_model(here: Path) -> None:
    """A stored model carries what it needs to run; what was left out is not replaced by something else."""
    x = images()
    last = zoo.from_pretrained("runs/advcal-digits")(x)
    for recipe in CHAIN[:2]:
        changed = zoo.from_pretrained(f"runs/{recipe}")
        with torch.no_grad():
            next(changed.parameters()).add_(1)
        changed.save_pretrained(here / "runs" / recipe)
    assert torch.equal(zoo.from_pretrained("runs/advcal-digits")(x), last)
    with pytest.raises(
        InputError, match=r"the teacher \(\./runs/nd-digits-teacher\) is not the one this model was trained"
    ):
        zoo.from_pretrained("runs/nd-digits", for_training=True)
