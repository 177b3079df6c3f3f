"""Weights of LightningModules that are no component: stored as they are, put back whole or not at all."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from tests.stored import config_of, edit_tensors
from zoo import hub
from zoo.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


class Mine(pl.LightningModule):
    """Tied weights, layouts and dtypes of all kinds."""

    def __init__(self, width: int = 3, seed: int = 0, **others: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5)
        self.head.weight = self.embed.weight
        self.conv = nn.Conv2d(2, width, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(width)
        self.turned = nn.Parameter(torch.randn(width, 4).t())
        whole = torch.randn(2, width)
        self.register_buffer("first", whole[0])
        self.register_buffer("second", whole[1])
        self.register_buffer("mask", torch.rand(6) > 0.5)
        self.register_buffer("count", torch.randint(100, (2,), dtype=torch.int16))
        self.register_buffer("short", torch.randn(3).bfloat16())
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0, 2))
        self.register_buffer("scratch", torch.randn(3), persistent=False)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_identity_round_trip(tmp_path: Path) -> None:
    model, other = Mine(seed=1), Mine(seed=2)
    before = state(model)
    hub.save(model, tmp_path)
    assert zoo.load_weights(tmp_path, other) is other
    assert same(state(other), state(model))
    assert same(state(model), before)
    assert other.head.weight is other.embed.weight
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    stored = load_file(tmp_path / "model.safetensors")
    assert "head.weight" not in stored
    assert "scratch" not in stored
    assert stored["second"].dtype == torch.float32
    assert stored["count"].dtype == torch.int16


def test_snapshot_shares_no_memory(tmp_path: Path) -> None:
    model = Mine(seed=1)
    before = state(model)
    snapshot = hub.snapshot(model)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    snapshot.write(tmp_path)
    other = zoo.load_weights(tmp_path, Mine())
    assert same(state(other), before)


@pytest.mark.parametrize(("stored", "target"), [(True, False), (False, True), (True, True)])
def test_compiled_modules(tmp_path: Path, stored: bool, target: bool) -> None:
    """torch.compile's wrapper renames everything in it; nothing is compiled before the first call."""
    model, other = Mine(seed=1), Mine(seed=2)
    expected = state(model)
    for module, wrap in ((model, stored), (other, target)):
        if wrap:
            module.conv = torch.compile(module.conv)
    hub.save(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == expected.keys() - {"head.weight"}
    zoo.load_weights(tmp_path, torch.compile(other) if target else other)
    found = {name.replace("_orig_mod.", ""): value for name, value in state(other).items()}
    assert same({name: found[name] for name in expected}, expected)


def test_hyper_parameters_with_json_form_only(tmp_path: Path) -> None:
    Point = namedtuple("Point", "x y")
    others = {
        "net": nn.Linear(1, 1),
        "act": torch.relu,
        "anonymous": lambda x: x,
        "cls": nn.Linear,
        "nan": float("nan"),
        "path": Path("x"),
        "tensor": torch.zeros(2),
        "code": {"class_path": "os.system"},
        "deep": {"a": [{"_target_": "os.system"}]},
        "keys": {1: 2},
        "kept": {"a": [1, 2.5, None, True, "x"]},
        "point": Point(1, 2),
    }
    hub.save(Mine(**others), tmp_path)
    config = config_of(tmp_path)
    assert config["args"] == {"width": 3, "seed": 0, "kept": others["kept"], "point": [1, 2]}
    assert config["component"] is None
    assert config["supplied"] == {"module": f"{__name__}.Mine"}
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_module_without_hyper_parameters(tmp_path: Path) -> None:
    class Bare(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

    hub.save(Bare(), tmp_path)
    assert config_of(tmp_path)["args"] == {}
    with pytest.raises(InputError, match=r"plain weights of another LightningModule: zoo.load_weights"):
        zoo.from_pretrained(tmp_path)


def test_strict(tmp_path: Path) -> None:
    hub.save(Mine(seed=1), tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    edit_tensors(tmp_path, lambda tensors: tensors.update(more=torch.zeros(1)) or tensors.pop("turned"))
    other = Mine(seed=2)
    before = state(other)
    with pytest.raises(InputError, match=r"does not fit Mine: missing \['turned'\], unexpected \['more'\]"):
        zoo.load_weights(tmp_path, other)
    assert same(state(other), before)
    zoo.load_weights(tmp_path, other, strict=False)
    assert torch.equal(other.turned, before["turned"])
    assert torch.equal(other.embed.weight, expected["embed.weight"])


def test_floats_are_cast(tmp_path: Path) -> None:
    model = Mine(seed=1)
    hub.save(model, tmp_path)
    other = Mine(seed=2).double()
    zoo.load_weights(tmp_path, other)
    assert torch.equal(other.turned, model.turned.double())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("turned", torch.zeros(3, 4), r"turned has shape \(3, 4\), expected \(4, 3\)"),
        ("second", torch.zeros(1), r"second has shape \(1,\), expected \(3,\)"),
        ("second", torch.tensor([0.0, 1.0, float("nan")]), "second holds non-finite values"),
        ("second", torch.full((3,), 1e300, dtype=torch.float64), "second holds values beyond the range of torch.float32"),
        ("second", torch.zeros(3, dtype=torch.int32), "second has dtype torch.int32, expected torch.float32"),
        ("second", torch.zeros(3, dtype=torch.complex64), "second has dtype torch.complex64, expected torch.float32"),
        ("mask", torch.full((6,), 2, dtype=torch.int8), "mask has dtype torch.int8, expected torch.bool"),
        ("count", torch.full((2,), 2**40), "count has dtype torch.int64, expected torch.int16"),
        ("phase", torch.full((3,), float("inf"), dtype=torch.complex64), "phase holds non-finite values"),
        ("turned", torch.full((4, 3), float("-inf"), dtype=torch.float16), "turned holds non-finite values"),
        ("head.weight", torch.zeros(5, 3), "embed.weight and head.weight differ, and are one tensor in the module"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strict", [True, False])
def test_bad_tensors_leave_the_module(tmp_path: Path, name: str, value: Tensor, message: str, strict: bool) -> None:
    hub.save(Mine(seed=1), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: value}))
    other = Mine(seed=2)
    before = state(other)
    with pytest.raises(InputError, match=f"model.safetensors: {message}"):
        zoo.load_weights(tmp_path, other, strict=strict)
    assert same(state(other), before)


def test_bad_modules_to_fill(tmp_path: Path) -> None:
    hub.save(Mine(), tmp_path)
    with torch.device("meta"):
        empty = Mine()
    with pytest.raises(InputError, match="has no values of its own yet"):
        zoo.load_weights(tmp_path, empty)
    lazy = Mine()
    lazy.head = nn.LazyLinear(5)
    with pytest.raises(InputError, match=r"head.weight has no values of its own yet"):
        hub.save(lazy, tmp_path / "lazy")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="come from different saves"):
        zoo.load_weights(tmp_path, Mine())


def test_bad_state_to_store(tmp_path: Path) -> None:
    class Extra(Mine):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(InputError, match="_extra_state is no tensor but dict"):
        hub.save(Extra(), tmp_path)
    sparse = Mine()
    sparse.first = torch.eye(3).to_sparse()
    with pytest.raises(InputError, match="first has no values of its own yet, or is sparse"):
        hub.save(sparse, tmp_path)
    broken = Mine()
    broken.first.fill_(float("nan"))
    with pytest.raises(InputError, match="first holds non-finite values"):
        hub.save(broken, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
