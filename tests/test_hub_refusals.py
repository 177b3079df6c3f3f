"""Folders that are no stored model, broken ones, and hostile ones: one clear message each, and no harm."""

from __future__ import annotations

import json
import pickle
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import zoo
from tests.stored import config_of, edit_config, edit_tensors, seeded_distillation
from zoo.errors import InputError


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    seeded_distillation().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A stored distillation, to be tampered with."""
    for path in kept.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder: Path, **options: Any) -> Any:
    return zoo.from_pretrained(folder, **options)


def rebuild(tmp_path: Path, **args: Any) -> None:
    edit_config(tmp_path, lambda config: config["args"].update(args))


# -- folders -------------------------------------------------------------------------------------------------------


def test_bad_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is no folder with a stored model"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config.json is no folder with a stored model"):
        load(folder / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is no stored model: it has no config\.json"):
        load(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model.safetensors: it is not a whole stored model"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("", "config.json is not valid JSON"),
        ("\xff\xfe", "config.json is not valid JSON"),
        ("[1, 2]", "is no configuration of the zoo: it has no zoo_format"),
        ('{"model_type": "bert"}', "is no configuration of the zoo: it has no zoo_format"),
        ("null", "it has no zoo_format"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "nested too deeply"),
        ('{"zoo_format": 1, "args": {"lr": NaN}}', "the number NaN is not finite"),
        ('{"zoo_format": 1, "args": {"lr": -Infinity}}', "the number -Infinity is not finite"),
        ('{"zoo_format": 1, "args": {"lr": 1e999}}', "the number 1e999 is not finite"),
        ('{"zoo_format": ' + "9" * 5000 + "}", "config.json is not valid JSON"),
        (" " * (2**20 + 1), "is larger than 1048576 bytes"),
    ],
    ids=range(13),
)
def test_bad_config_text(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(extra=1), r"unknown key 'extra'"),
        (lambda c: c.update(arg={}), r"unknown key 'arg'. Did you mean args"),
        (lambda c: c.pop("golden"), r"golden is missing"),
        (lambda c: c.update(zoo_format=2), r"has zoo_format 2, this version of the zoo reads 1"),
        (lambda c: c.update(zoo_format="1"), r"has zoo_format '1'"),
        (lambda c: c.update(args=[]), r"args must be dict, got list"),
        (lambda c: c.update(component=["a"]), r"component must be str or null, got list"),
        (lambda c: c.update(component="NDDistilation"), r"no component named 'NDDistilation'. Did you mean NDDistillation"),
        (lambda c: c.update(component="os.system"), r"no component named 'os.system'"),
        (lambda c: c.update(component="zoo.lightning_modules.nd.NDDistillation"), r"no component named 'zoo.lightning"),
        (lambda c: c.update(weights={}), r"weights.sha256 must be 64 hexadecimal digits"),
        (lambda c: c.update(omitted={"teacher": 1}), r"omitted.teacher must be an object"),
        (lambda c: c["omitted"]["teacher"].update(sha256="x"), r"omitted.teacher.sha256 must be 64 hexadecimal digits"),
        (lambda c: c["omitted"]["teacher"].update(name={}), r"omitted.teacher.name must be str or null, got dict"),
        (lambda c: c["omitted"]["teacher"].pop("revision"), r"omitted.teacher.revision is missing"),
        (lambda c: c.update(supplied={"student": "a"}), r"supplied.student: NDDistillation takes no such module"),
        (lambda c: c.update(supplied={"other": "a.b"}), r"supplied.other: NDDistillation takes no such module"),
        (lambda c: c.update(supplied={"x": "\x1b[31m run this"}), r"supplied.x must be the name of a class"),
        (lambda c: c["args"].pop("student"), r"NDDistillation cannot be built from args .*missing.*'student'"),
        (lambda c: c["args"].update(students="x"), r"args.students: NDDistillation takes no such.*Did you mean student"),
        (lambda c: c["args"].update(lr="0.1"), r'args.lr must be float, got "0.1"'),
        (lambda c: c["args"].update(nd_reduction="sum"), r"args.nd_reduction must be .*'mean', 'class'.*got \"sum\""),
        (lambda c: c["args"].update(student=3), r"args.student must be str or dict, got 3"),
        (lambda c: c["args"].update(student="zoo/resnet9"), r"no architecture 'resnet9'"),
        (lambda c: c["args"].update(temperature=-1.0), r"temperature must be positive, got -1.0"),
        (lambda c: c["args"].update(student_options={"in_chan": 1}), r"takes no option 'in_chan'. Did you mean in_chans"),
        (lambda c: c["args"].update(student_options={"num_classes": 9}), r"student_options may not hold num_classes"),
        (lambda c: c["args"].update(student_options={"a": [{"class_path": "x"}]}), r"student_options.a\[0\].class_path"),
        (lambda c: c["args"].update(_target_="os.system"), r"config.args._target_ is refused"),
        (lambda c: c["versions"].update(_instantiator="x"), r"config.versions._instantiator is refused"),
        (lambda c: c["args"].update(student_options={"checkpoint_path": "x"}), r"option 'checkpoint_path' is refused"),
    ],
)  # fmt: skip
def test_bad_config(folder: Path, change: Any, message: str) -> None:
    edit_config(folder, change)
    with pytest.raises(InputError, match=message):
        load(folder)


GOLDEN: list[tuple[dict[str, Any], str]] = [
    ({"input_shape": [1, 1, 2**40, 8]}, r"golden.input_shape is an impossible shape"),
    ({"input_shape": [2**16] * 8}, r"golden.input_shape is an impossible shape"),
    ({"input_shape": [1] * 9}, r"golden.input_shape is an impossible shape"),
    ({"input_shape": [1, -1, 8, 8]}, r"golden.input_shape is an impossible shape"),
    ({"input_shape": [1, True, 8, 8]}, r"golden.input_shape is an impossible shape"),
    ({"input_shape": 3}, r"golden.input_shape is an impossible shape"),
    ({"input_shape": [2, 1, 8, 8]}, r"golden.input_shape is \[2, 1, 8, 8\], which this model does not take"),
    ({"input_shape": [1, 3, 8, 8]}, r"does not take an input of golden.input_shape \[1, 3, 8, 8\]"),
    ({"input_shape": [1]}, r"does not take an input of golden.input_shape \[1\]"),
    ({"output_shape": [1, 2**60]}, r"golden.output_shape is an impossible shape"),
    ({"output_shape": [1, 9], "output": [0.0] * 9}, r"differs from the one at storing by the shape \(1, 10\)"),
    ({"output": [0.0]}, r"golden.output must be 10 numbers"),
    ({"output": ["a"] * 10}, r"golden.output must be 10 numbers"),
    ({"output": [[0.0]] * 10}, r"golden.output must be 10 numbers"),
    ({"output": [1e30] * 10}, r"differs from the one at storing by up to 1e\+30"),
    ({"seed": -1}, r"golden.seed must be an integer"),
    ({"seed": 2**64}, r"golden.seed must be an integer"),
    ({"seed": "0"}, r"golden.seed must be an integer"),
    ({"more": 1}, r"golden must have the keys seed, input_shape"),
]


@pytest.mark.parametrize(("change", "message"), GOLDEN)
def test_bad_golden(folder: Path, change: dict[str, Any], message: str) -> None:
    edit_config(folder, lambda config: config["golden"].update(change))
    with pytest.raises(InputError, match=message):
        load(folder)
    for wrong in ([], "x", 1):
        edit_config(folder, lambda config, wrong=wrong: config.update(golden=wrong))
        with pytest.raises(InputError, match="golden must be dict or null"):
            load(folder)


def test_bad_weights_with_a_consistent_hash_are_caught_by_the_output(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["student.fc.weight"].mul_(1.5))
    with pytest.raises(InputError, match=r"output for the seeded input differs .*Pass verify=False"):
        load(folder)
    assert load(folder, verify=False).num_classes == 10


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [4 * 10**6, 10**12, 10**40])
def test_bad_sizes_take_no_memory(folder: Path, num_classes: int) -> None:
    """4 million classes would take 1 GB, which a machine has: shapes are compared before they are taken."""
    rebuild(folder, num_classes=num_classes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        InputError, match=rf"student.fc.* ask for \({num_classes},|resnet8' cannot be built.*{num_classes}"
    ):
        load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_bad_sizes_that_no_header_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher is not in the file, and with strict=False a missing tensor is not compared."""
    vit = {
        "teacher": "timm/vit_tiny_patch16_224",
        "teacher_options": {"embed_dim": 64, "num_heads": 4, "mlp_ratio": 1e9},
    }
    rebuild(folder, **vit)
    with pytest.raises(InputError, match=r"ask for .* GiB, and this machine has"):
        load(folder, for_training=True)
    rebuild(folder, teacher=None, num_classes=10**12)

    def drop(tensors: dict[str, Any]) -> None:
        del tensors["student.fc.weight"], tensors["student.fc.bias"]

    edit_tensors(folder, drop)
    with pytest.raises(InputError, match=r"ask for .* GiB, and this machine has"):
        load(folder, strict=False)

    monkeypatch.setattr("zoo.construction._MAX_MODULES", 200)
    rebuild(folder, student="timm/vit_tiny_patch16_224", student_options={"depth": 5000}, num_classes=10)
    with pytest.raises(InputError, match="ask for more than 200 modules"):
        load(folder)


def test_bad_model_that_contains_itself(folder: Path) -> None:
    rebuild(folder, student=str(folder), student_options=None)
    with pytest.raises(InputError, match="recursion"):
        load(folder)


# -- tensors -------------------------------------------------------------------------------------------------------


def header_of(size: int, header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", size or len(text)) + text + data


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_bad_tensor_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    one = {"student.fc.bias": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}
    lie = {"student.fc.bias": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}}
    overlap = {**one, "student.fc.weight": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}
    bomb = pickle.dumps(Bomb(folder / "exploded"))
    broken = {
        "truncated": whole[:-100],
        "header only": whole[:500],
        "empty": b"",
        "longer": whole + b"\0" * 8,
        "pickle": bomb,
        "no size": header_of(2**62, one),
        "lie": header_of(0, lie, b"\0" * 40),
        "shape": header_of(0, {"student.fc.bias": {**one["student.fc.bias"], "shape": [11]}}, b"\0" * 40),
        "overlap": header_of(0, overlap, b"\0" * 40),
        "no json": struct.pack("<Q", 8) + b"not json",
    }
    for name, content in broken.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"model.safetensors is no whole safetensors file \(.*\); store or pull"):
            load(folder)
        assert not (folder / "exploded").exists(), name
    torch.save({"a": Bomb(folder / "exploded")}, path)
    with pytest.raises(InputError, match="is no whole safetensors file"):
        load(folder)
    assert not (folder / "exploded").exists()
    path.write_bytes(whole)
    assert load(folder).num_classes == 10


def test_bad_weights_of_another_save(folder: Path) -> None:
    torch.manual_seed(9)
    other = seeded_distillation()
    with torch.no_grad():
        other.student.fc.bias.add_(1)
    other.save_pretrained(folder / "other")
    (folder / "model.safetensors").write_bytes((folder / "other" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"config.json and model.safetensors come from different saves"):
        load(folder)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")  # no hash at all
    with pytest.raises(InputError, match="come from different saves"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("student.fc.bias", torch.zeros(11), r"student.fc.bias has shape \(11,\), but .* config.json ask for \(10,\)"),
        ("student.fc.bias", torch.zeros(1, 10), r"student.fc.bias has shape \(1, 10\)"),
        ("student.fc.bias", torch.full((10,), float("nan")), r"student.fc.bias holds non-finite values"),
        ("student.fc.bias", torch.full((10,), float("inf")).half(), r"student.fc.bias holds non-finite values"),
        ("student.bn1.running_var", torch.full((16,), float("-inf")), r"bn1.running_var holds non-finite values"),
        ("class_means", torch.full((10, 64), float("nan")), r"class_means holds non-finite values"),
        ("student.fc.bias", torch.zeros(10, dtype=torch.int32), r"fc.bias has dtype torch.int32, expected torch.float32"),
        ("student.bn1.num_batches_tracked", torch.tensor(0.5), r"tracked has dtype torch.float32, expected torch.int64"),
        ("student.fc.bias", torch.zeros(10).to(torch.float8_e4m3fn), r"fc.bias has dtype torch.float8_e4m3fn"),
        ("student.fc.bias", torch.zeros(10, dtype=torch.complex64), r"fc.bias has dtype torch.complex64"),
        ("student.more", torch.zeros(1), r"unexpected \['student.more'\]"),
        ("projector.linear.weight", torch.zeros(1), r"unexpected \['projector.linear.weight'\]"),
        ("teacher.conv1.weight", torch.zeros(1), r"unexpected \['teacher.conv1.weight'\]"),
    ],
)  # fmt: skip
def test_bad_tensor(folder: Path, name: str, value: torch.Tensor, message: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: value}))
    with pytest.raises(InputError, match=f"model.safetensors.*{message}"):
        load(folder)


def test_nothing_in_the_folder_changes_by_a_refused_load(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(extra=1))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError):
        load(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert config_of(folder)["extra"] == 1
