"""A model that began as another stored model, or holds its network frozen, is whole without that other folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests.stored import config_of, edit_config, seeded_distillation
from zoo import towers
from zoo.errors import InputError
from zoo.module import ZooModule


@zoo.register(name="TestFrozenEncoder")
class FrozenEncoder(ZooModule):
    """A component of a user: a frozen network that is stored when its weights have no public name."""

    deployable = "head"
    stored_towers = ("frozen",)

    def __init__(self, frozen: str | dict[str, Any] | nn.Module) -> None:
        super().__init__()
        tower = towers.create(frozen, frozen=True, embedding=True)
        if towers.has_public_weights(frozen):
            self.attach_frozen("frozen", tower)
        else:
            self.frozen = tower
        self.head = nn.Linear(tower.dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen.features(x))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    folder = tmp_path / "nd"
    return seeded_distillation().save_pretrained(folder)


def test_a_student_that_began_as_a_stored_model(stored: Path, tmp_path: Path) -> None:
    model = zoo.Classifier(str(stored))
    model.example_shape = (1, 8, 8)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.eval()(x), zoo.from_pretrained(stored)(x))
    folder = model.save_pretrained(tmp_path / "classifier")
    shutil.rmtree(stored)
    again = zoo.from_pretrained(folder)
    assert torch.equal(again(x), model(x))
    described = config_of(folder)["args"]["student"]
    assert described["component"] == "NDDistillation"
    assert described["args"]["teacher"] is None
    assert described["source"] == "nd", "the path itself says too much of the machine"
    # Stored once more, it is the same.
    assert (again.save_pretrained(tmp_path / "again") / "config.json").read_text() == (
        folder / "config.json"
    ).read_text()
    # And a third model may begin from that one.
    assert zoo.Classifier(str(folder)).student.fc.out_features == 10


def test_a_frozen_network_without_a_public_name_is_stored(stored: Path, tmp_path: Path) -> None:
    model = FrozenEncoder(str(stored))
    model.example_shape = (1, 8, 8)
    assert not model.train().frozen.network.training
    folder = model.save_pretrained(tmp_path / "frozen")
    sha256 = config_of(stored)["weights"]["sha256"]
    shutil.rmtree(stored)
    again = zoo.from_pretrained(folder)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), model.eval()(x))
    assert not any(parameter.requires_grad for parameter in again.frozen.parameters())
    assert "NDDistillation nd" in (folder / "README.md").read_text()
    assert config_of(folder)["args"]["frozen"]["sha256"] == sha256
    assert config_of(folder)["omitted"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("component"), "component is missing or wrong"),
        (lambda d: d.update(component="os.system"), "no component named 'os.system'"),
        (lambda d: d.update(extra=1), "extra is missing or wrong"),
        (lambda d: d["args"].update(student={"class_path": "os.system"}), "may not choose code"),
        (lambda d: d["args"].update(studnet=1), "takes no such argument"),
    ],
)
def test_bad_description(stored: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = FrozenEncoder(str(stored)).save_pretrained(tmp_path / "frozen")
    edit_config(folder, lambda config: change(config["args"]["frozen"]))
    with pytest.raises(InputError, match=message):
        zoo.from_pretrained(folder)


def test_a_supplied_network_has_no_description(tmp_path: Path) -> None:
    folder = zoo.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"\['student'\] were ready modules when it was stored"):
        towers.self_contained(str(folder))
