"""The stored format: what comes back is what was stored, to the bit, and nothing else has changed."""

from __future__ import annotations

import copy
import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from tests.fresh_processes import run_fresh
from tests.stored import config_of, seeded_distillation, tensors_of
from tests.training import digits, quick_trainer, small_distillation, small_network
from zoo import towers
from zoo.module import ZooModule


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype, name
        assert torch.equal(value, two[name]), name


@zoo.register(name="TestNetwork")
class Network(ZooModule):
    """A component of a user: any module, made by a function that is looked up by name."""

    deployable = "net"

    def __init__(self, kind: str, shape: tuple[int, ...] = (4,)) -> None:
        super().__init__()
        self.net = KINDS[kind]()
        self.example_shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Tied(nn.Module):
    """One matrix under two names, as in an auto-encoder, and a buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("again", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).relu()) * self.scale * self.again


class Slices(nn.Module):
    """Parameters that are parts of one storage, two of them the same part, and two that share a whole one."""

    def __init__(self) -> None:
        super().__init__()
        storage, whole = torch.randn(3, 4, 4), torch.randn(4, 4)
        self.whole, self.same = nn.Parameter(whole), nn.Parameter(whole)
        self.first, self.second = nn.Parameter(storage[0]), nn.Parameter(storage[1])
        self.alias = nn.Parameter(storage[1])
        self.turned = nn.Parameter(storage[2].t())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.whole @ self.same @ self.first @ self.second @ self.alias @ self.turned


class Positions(nn.Module):
    """A table that is not stored, an integer, a scalar, and a network in channels-last layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("table", torch.linspace(0, 1, 4).view(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + self.table).matmul(self.table.new_ones(6, 2)) * self.temperature


KINDS: dict[str, Any] = {"tied": Tied, "slices": Slices, "positions": Positions}


# -- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["zoo/resnet8", "zoo/resnet8x4"])
def test_round_trip_of_a_distillation(tmp_path: Path, teacher: str) -> None:
    """Student and class means come back; teacher and projector are neither stored nor built."""
    model = seeded_distillation(teacher=teacher, nd_weight=2.0)
    assert (model.projector is not None) == (teacher == "zoo/resnet8x4")
    assert model.save_pretrained(tmp_path) == tmp_path
    loaded = zoo.from_pretrained(tmp_path)
    assert type(loaded) is zoo.NDDistillation
    assert_equal(loaded.student, model.student)
    assert torch.equal(loaded.class_means, model.class_means)
    assert torch.equal(loaded.class_counts, model.class_counts)
    assert loaded.frozen_towers == {}
    assert loaded.projector is None
    assert loaded.nd_weight == 2.0
    assert loaded.hub_folder == tmp_path
    assert not any(module.training for module in loaded.modules())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), model.student.eval()(x))
    assert sorted(tensors_of(tmp_path)) == sorted(
        ["class_counts", "class_means", *(f"student.{k}" for k in model.student.state_dict())]
    )
    facts = config_of(tmp_path)["omitted"]["teacher"]
    fingerprint = towers.fingerprint(model.teacher.network)
    assert facts == {"name": teacher, "revision": None, "sha256": fingerprint, "training_only": True}


def test_round_trip_in_a_new_process(tmp_path: Path) -> None:
    model = zoo.Classifier("zoo/resnet8", 10, student_options={"in_chans": 1})
    model.example_shape = (1, 8, 8)
    model.save_pretrained(tmp_path)
    code = (
        f"import torch, zoo; torch.set_num_threads(1); model = zoo.from_pretrained({str(tmp_path)!r});"
        "print(type(model).__name__, zoo.towers.fingerprint(model),"
        "[v.hex() for v in model(torch.ones(1, 1, 8, 8))[0].tolist()])"
    )
    answer = run_fresh(code=code, environment=os.environ)
    assert answer.returncode == 0, answer.stderr
    with torch.no_grad():
        output = [value.hex() for value in model.eval()(torch.ones(1, 1, 8, 8))[0].tolist()]
    assert answer.stdout.strip() == f"Classifier {towers.fingerprint(model)} {output}"


def test_stored_again_it_is_the_same_to_the_byte(tmp_path: Path) -> None:
    """What was not built at load is still known: the teacher, and its fingerprint."""
    seeded_distillation(teacher=small_network("zoo/resnet8x4")).save_pretrained(tmp_path / "a")
    zoo.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert config_of(tmp_path / "b")["omitted"]["teacher"]["training_only"]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_of_any_tensors(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    shape = (3, 8, 8) if kind == "positions" else (4,)
    model = Network(kind, shape).to(dtype)
    x = torch.randn(2, *shape, dtype=dtype)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    loaded = Network.from_pretrained(tmp_path)
    assert_equal(loaded, model)
    assert torch.equal(loaded(x), expected)
    assert {buffer.dtype for buffer in loaded.buffers()} == {buffer.dtype for buffer in model.buffers()}


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    Network("tied").save_pretrained(tmp_path)
    assert sorted(tensors_of(tmp_path)) == ["net.encoder.bias", "net.encoder.weight", "net.scale"]
    loaded = Network.from_pretrained(tmp_path)
    assert loaded.net.decoder.weight is loaded.net.encoder.weight
    assert loaded.net.again is loaded.net.scale


def test_part_of_a_storage_is_stored_without_the_rest(tmp_path: Path) -> None:
    model = seeded_distillation()
    model.student.fc.bias = nn.Parameter(torch.zeros(10**6)[:10])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 10**6
    assert torch.equal(zoo.from_pretrained(tmp_path).student.fc.bias, torch.zeros(10))


def test_mixed_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    model = seeded_distillation()
    model.student.layer1.to(torch.bfloat16)
    model.example_shape = None
    model.save_pretrained(tmp_path)
    assert_equal(zoo.from_pretrained(tmp_path).student, model.student)


def test_compiled_network_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    model = seeded_distillation()
    plain = model.student
    model.student = torch.compile(plain, backend="eager")
    model.example_shape = None
    model.save_pretrained(tmp_path)
    assert_equal(zoo.from_pretrained(tmp_path).student, plain)


def test_class_means_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = small_network()
    model = small_distillation(teacher=teacher, warmup_epochs=0)
    quick_trainer(max_steps=2).fit(model, digits(train_samples=64, batch_size=32))
    model.save_pretrained(tmp_path)
    loaded = zoo.from_pretrained(tmp_path, for_training=True, teacher=teacher)
    assert loaded.training  # fit keeps the mode it finds
    assert not loaded.teacher.network.training

    def again(*args: Any, **options: Any) -> None:
        raise AssertionError("class means were computed a second time")

    monkeypatch.setattr("zoo.lightning_modules.nd.compute_class_means", again)
    quick_trainer(max_steps=1).fit(loaded, digits(train_samples=64, batch_size=32))
    assert torch.equal(loaded.class_means, model.class_means)
    assert not torch.equal(loaded.student.fc.weight, model.student.fc.weight)


def test_teacher_of_a_run_in_bf16_is_recognised(tmp_path: Path) -> None:
    """The run casts its teacher; the fingerprint is of the weights that were given."""
    teacher = small_network()
    given = copy.deepcopy(teacher)
    model = small_distillation(teacher=teacher, warmup_epochs=0)
    quick_trainer(max_steps=1, precision="bf16-true").fit(model, digits(train_samples=32, batch_size=32))
    assert next(model.teacher.parameters()).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = zoo.from_pretrained(tmp_path, for_training=True, teacher=given)
    assert next(loaded.student.parameters()).dtype == torch.bfloat16
    with pytest.raises(zoo.InputError, match=r"the teacher \(a module\) is not the one"):
        zoo.from_pretrained(tmp_path, for_training=True, teacher=model.teacher.network)


# -- side effects --------------------------------------------------------------------------------------------------


def test_save_and_load_leave_the_random_generators(tmp_path: Path) -> None:
    model = seeded_distillation(teacher="zoo/resnet8x4")

    def state() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002

    before = state()
    model.save_pretrained(tmp_path)
    assert state() == before
    zoo.from_pretrained(tmp_path)
    zoo.from_pretrained(tmp_path, for_training=True, teacher=model.teacher.network)
    assert state() == before


def test_save_leaves_modes_gradients_and_values(tmp_path: Path) -> None:
    model = seeded_distillation(teacher="zoo/resnet8x4").train()
    model.student.layer2.eval()
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: p.grad.clone() for name, p in model.student.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.student.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_options_that_change_later_are_stored_as_they_were_given(tmp_path: Path) -> None:
    options = {"in_chans": 1}
    model = zoo.Classifier("zoo/resnet8", student_options=options)
    options["in_chans"] = 3
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["args"]["student_options"] == {"in_chans": 1}
    zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        seeded_distillation().save_pretrained(tmp_path / "model", recipe="x: 1\n")
    finally:
        os.umask(before)
    for name in ("config.json", "model.safetensors", "recipe.yaml"):
        assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == mode, name


def test_recipe_and_card(tmp_path: Path) -> None:
    model = seeded_distillation()
    (tmp_path / "README.md").write_text("by hand")
    model.save_pretrained(tmp_path, recipe="model: x\n")
    assert (tmp_path / "recipe.yaml").read_text() == "model: x\n"
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (tmp_path / "README.md").read_text()
    assert card.index("by hand") < card.index("zoo:begin"), "what was written by hand stays, above what is generated"


def test_map_location(tmp_path: Path) -> None:
    seeded_distillation().save_pretrained(tmp_path)
    for location in ("meta", torch.device("meta")):
        loaded = zoo.from_pretrained(tmp_path, map_location=location)
        assert all(tensor.device.type == "meta" for tensor in loaded.state_dict().values())


# -- golden output -------------------------------------------------------------------------------------------------


def test_golden_output_is_that_of_the_seeded_input(tmp_path: Path) -> None:
    model = seeded_distillation()
    model.save_pretrained(tmp_path)
    golden = config_of(tmp_path)["golden"]
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(golden["seed"]))
    with torch.no_grad():
        assert golden["output"] == model.student.eval()(x)[0].tolist()
    assert (golden["input_shape"], golden["output_shape"]) == ([1, 1, 8, 8], [1, 10])


def test_no_golden_output_where_the_input_is_not_known_or_too_large(tmp_path: Path) -> None:
    model = seeded_distillation()
    for shape in (None, (1, 2048, 2049)):
        model.example_shape = shape
        model.save_pretrained(tmp_path)
        assert config_of(tmp_path)["golden"] is None
        assert zoo.from_pretrained(tmp_path).example_shape is None


def test_config_is_one_flat_json_file(tmp_path: Path) -> None:
    seeded_distillation().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert list(config) == [
        "zoo_format", "component", "versions", "args", "supplied", "omitted", "weights", "golden", "run",
    ]  # fmt: skip
    assert config["weights"] == {"sha256": towers.fingerprint(tensors_of(tmp_path))}
