"""Modules that are supplied by name, teachers, overrides, classes of a user, and what a save refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from tests.stored import config_of, edit_config, edit_tensors, seeded_distillation, tensors_of
from tests.training import digits, quick_trainer, small_network
from zoo import towers
from zoo.errors import InputError
from zoo.evaluation import ClassificationModule
from zoo.module import ZooModule


def own_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


@pytest.fixture
def supplied(tmp_path: Path) -> zoo.NDDistillation:
    """A stored distillation whose student and teacher were modules."""
    model = seeded_distillation(student=own_network(), teacher=small_network())
    model.save_pretrained(tmp_path)
    return model


# -- supplied modules ----------------------------------------------------------------------------------------------


def test_supplied_student(supplied: zoo.NDDistillation, tmp_path: Path) -> None:
    kind = "torch.nn.modules.container.Sequential"
    assert config_of(tmp_path)["supplied"] == {"student": kind, "teacher": "zoo.architectures.cifar_resnet.CifarResNet"}
    student = own_network()
    loaded = zoo.from_pretrained(tmp_path, student=student)
    assert loaded.student is student
    assert torch.equal(student[1].weight, supplied.student[1].weight)
    assert torch.equal(loaded.class_means, supplied.class_means)
    # Stored once more, both are asked for again.
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["supplied"] == config_of(tmp_path)["supplied"]


def test_bad_supplied_student_is_missing(supplied: zoo.NDDistillation, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'student' was a ready module \(torch.nn.*Sequential\) when.*pass student=your_module"
    ):
        zoo.from_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"'teacher' was a ready module \(zoo.*CifarResNet\).*pass teacher=your_module"
    ):
        zoo.from_pretrained(tmp_path, for_training=True, student=own_network())


def test_bad_supplied_student_of_another_shape_stays_as_it_is(supplied: zoo.NDDistillation, tmp_path: Path) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 13), nn.ReLU(), nn.Linear(13, 10))
    before = other[1].weight.clone()
    with pytest.raises(InputError, match=r"student.1.bias has shape \(12,\), but .* ask for \(13,\)"):
        zoo.from_pretrained(tmp_path, student=other)
    edit_tensors(tmp_path, lambda tensors: tensors["student.3.weight"].fill_(float("nan")))
    good = own_network()
    values = good[1].weight.clone()
    with pytest.raises(InputError, match=r"student.3.weight holds non-finite values"):
        zoo.from_pretrained(tmp_path, student=good)
    assert torch.equal(other[1].weight, before)
    assert torch.equal(good[1].weight, values)


def test_bad_supplied_student_that_computes_something_else(supplied: zoo.NDDistillation, tmp_path: Path) -> None:
    """The same shapes, another activation: only the output tells."""
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    with pytest.raises(InputError, match=r"output for the seeded input differs.*or a module that was supplied"):
        zoo.from_pretrained(tmp_path, student=other)
    assert zoo.from_pretrained(tmp_path, student=other, verify=False).student is other


# -- training again ------------------------------------------------------------------------------------------------


def test_for_training_with_a_module(supplied: zoo.NDDistillation, tmp_path: Path) -> None:
    teacher = supplied.teacher.network
    loaded = zoo.from_pretrained(tmp_path, for_training=True, student=own_network(), teacher=teacher)
    assert loaded.teacher.network is teacher
    assert loaded.projector is not None
    assert loaded.training
    assert not teacher.training
    quick_trainer(max_steps=1).fit(loaded, digits(train_samples=32, batch_size=32))


def test_for_training_with_a_stored_teacher(tmp_path: Path) -> None:
    """A teacher that was trained here is found by the path of its folder, and known by its weights."""
    teacher = zoo.Classifier("zoo/resnet8x4", 10, student_options={"in_chans": 1})
    teacher.save_pretrained(tmp_path / "teacher")
    name = str(tmp_path / "teacher")
    torch.manual_seed(1)
    model = zoo.NDDistillation("zoo/resnet8", name, 10, student_options={"in_chans": 1})
    model.save_pretrained(tmp_path / "student")
    loaded = zoo.from_pretrained(tmp_path / "student", for_training=True)
    assert loaded.teacher.name == name
    assert towers.fingerprint(loaded.teacher.network) == towers.fingerprint(teacher.student)
    assert loaded.projector is not None
    # For inference the teacher need not exist.
    (tmp_path / "teacher").rename(tmp_path / "gone")
    assert zoo.from_pretrained(tmp_path / "student").frozen_towers == {}
    with pytest.raises(InputError, match="teacher is no folder with a stored model"):
        zoo.from_pretrained(tmp_path / "student", for_training=True)
    # Another model in its place is noticed.
    zoo.Classifier("zoo/resnet8x4", 10, student_options={"in_chans": 1}).save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match=rf"the teacher \({name}\) is not the one.*SHA-256 .*expected"):
        zoo.from_pretrained(tmp_path / "student", for_training=True)


def test_for_training_after_the_model_was_stored_again(tmp_path: Path) -> None:
    model = seeded_distillation(teacher="zoo/resnet8x4")
    model.save_pretrained(tmp_path / "a")
    zoo.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    loaded = zoo.from_pretrained(tmp_path / "b", for_training=True, teacher=model.teacher.network)
    assert loaded.teacher.fingerprint == model.teacher.fingerprint
    assert torch.equal(loaded.class_means, model.class_means)


def test_bad_teacher(tmp_path: Path) -> None:
    seeded_distillation().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the teacher \(zoo/resnet8\) is not.*random weights.*pass teacher=…"):
        zoo.from_pretrained(tmp_path, for_training=True)
    with pytest.raises(InputError, match=r"the teacher \(a module\) is not the one this model was trained with"):
        zoo.from_pretrained(tmp_path, for_training=True, teacher=small_network())
    with pytest.raises(InputError, match=r"teacher=… is used in training only: pass for_training=True as well"):
        zoo.from_pretrained(tmp_path, teacher=small_network())
    edit_config(tmp_path, lambda config: config["omitted"].clear())
    with pytest.raises(InputError, match=r"config.json records no fingerprint in omitted for \['teacher'\]"):
        zoo.from_pretrained(tmp_path, for_training=True)


# -- overrides, strictness, classes --------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    seeded_distillation().save_pretrained(tmp_path)
    loaded = zoo.from_pretrained(tmp_path, lr=0.5, nd_weight=3.0)
    assert (loaded.lr, loaded.nd_weight) == (0.5, 3.0)
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["args"]["lr"] == 0.5
    with pytest.raises(InputError, match=r"NDDistillation takes no argument 'nd_wieght'. Did you mean nd_weight"):
        zoo.from_pretrained(tmp_path, nd_wieght=3.0)
    with pytest.raises(InputError, match=r"student.fc.* has shape \(10,.*ask for \(7,"):
        zoo.from_pretrained(tmp_path, num_classes=7)
    with pytest.raises(InputError, match=r"nd_weight must not be negative, got -1"):
        zoo.from_pretrained(tmp_path, nd_weight=-1)


def test_strict_lists_what_differs(tmp_path: Path) -> None:
    model = seeded_distillation()
    model.save_pretrained(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["student.extra"] = tensors.pop("student.conv1.weight")

    edit_tensors(tmp_path, change)
    with pytest.raises(InputError, match=r"missing \['student.conv1.weight'\], unexpected \['student.extra'\]"):
        zoo.from_pretrained(tmp_path)
    loaded = zoo.from_pretrained(tmp_path, strict=False, verify=False)
    assert torch.equal(loaded.student.fc.weight, model.student.fc.weight)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"student.fc.bias": torch.zeros(11)}))
    with pytest.raises(InputError, match=r"student.fc.bias has shape \(11,\), but .* ask for \(10,\)"):
        zoo.from_pretrained(tmp_path, strict=False, verify=False)


def test_class_is_found_by_name_and_checked(tmp_path: Path) -> None:
    seeded_distillation().save_pretrained(tmp_path)
    for cls in (ZooModule, ClassificationModule, zoo.NDDistillation):
        assert type(cls.from_pretrained(tmp_path)) is zoo.NDDistillation
    with pytest.raises(InputError, match="the stored model is a NDDistillation, expected a Classifier"):
        zoo.Classifier.from_pretrained(tmp_path)


class Unregistered(ZooModule):
    deployable = "net"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Linear(width, 2)
        self.example_shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@zoo.register(name="TestRegistered")
class Registered(Unregistered):
    def __init__(self, depth: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth


def test_classes_of_a_user(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Unregistered is not registered; put @zoo.register above the class"):
        Unregistered(4).save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    model = Registered(depth=2, width=4)
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["component"] == "TestRegistered"
    assert config_of(tmp_path)["args"] == {"depth": 2, "width": 4}
    loaded = zoo.from_pretrained(tmp_path)
    assert type(loaded) is Registered
    assert torch.equal(loaded.net.weight, model.net.weight)
    edit_config(tmp_path, lambda config: config.update(component="TestRegisterd"))
    with pytest.raises(InputError, match=r"no component named 'TestRegisterd'. Did you mean TestRegistered"):
        zoo.from_pretrained(tmp_path)


# -- what a save refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.student.fc.weight.data.fill_(float("inf")), "student.fc.weight holds non-finite values"),
        (lambda m: m.class_means.fill_(float("nan")), "class_means holds non-finite values"),
        (lambda m: m.student.fc.weight.data.fill_(3e38), "output for a seeded input is not finite"),
        (lambda m: setattr(m.student, "fc", nn.Linear(64, 7)), r"fc.bias has shape \(7,\), but .* ask for \(10,\)"),
        (lambda m: m.student.add_module("more", nn.Linear(1, 1)), r"unexpected \['student.more.bias'"),
        (lambda m: setattr(m.student, "bn1", nn.Identity()), r"missing \['student.bn1.bias'"),
        (lambda m: m._arguments.update(lr="0.1"), r'args.lr must be float, got "0.1"'),
        (lambda m: m._arguments.update(warmup_epochs=True), r"args.warmup_epochs must be int, got true"),
        (lambda m: m._arguments.update(base={1, 2}), r"argument 'base' cannot be stored: builtins.set"),
        (lambda m: m._arguments.update(lr=float("nan")), r"argument 'lr' is nan, and JSON has no such number"),
        (lambda m: m._arguments.update(more=1), r"args.more: NDDistillation takes no such argument"),
        (lambda m: m._arguments.update(student_options={"class_path": "os.system"}), r"class_path is refused"),
        (lambda m: m._arguments.update(student_head="x" * 2**20), r"at most 1048576 can be stored|no module"),
    ],
)
def test_bad_save_keeps_what_was_stored(tmp_path: Path, change: Any, message: str) -> None:
    model = seeded_distillation()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(model)
    with pytest.raises(InputError, match=message):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_save_of_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None: ...

    model = seeded_distillation(student=nn.Sequential(nn.Flatten(), Extra(64, 10)))
    with pytest.raises(InputError, match=r"student.1._extra_state is no tensor but dict"):
        model.save_pretrained(tmp_path)


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded_distillation()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, written in ((1, False), (0, True)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert model.save_pretrained(tmp_path / "model") == tmp_path / "model"
        assert (tmp_path / "model").exists() == written


def test_tensors_that_only_training_needs_are_not_stored(tmp_path: Path) -> None:
    model = seeded_distillation(teacher="zoo/resnet8x4")
    assert any(name.startswith("projector.") for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert {name.partition(".")[0] for name in tensors_of(tmp_path)} == {"student", "class_means", "class_counts"}


def test_resume_continues_the_random_sequence_of_the_first_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes with the state of one would draw the same augmentations."""
    model = seeded_distillation(nd_weight=0.0)
    checkpoint: dict[str, Any] = {}
    torch.manual_seed(1)
    model.on_save_checkpoint(checkpoint)
    expected = torch.rand(3)
    for rank in (0, 1):
        torch.manual_seed(2)
        other = torch.rand(3)
        torch.manual_seed(2)
        model.on_load_checkpoint(checkpoint)
        monkeypatch.setattr(type(model), "global_rank", rank)
        model.on_train_start()
        assert torch.equal(torch.rand(3), expected if rank == 0 else other)


def test_bad_name_of_the_deployable_network() -> None:
    with pytest.raises(InputError, match=r"Mine.deployable must not be 'network'"):
        type("Mine", (ZooModule,), {"deployable": "network"})
