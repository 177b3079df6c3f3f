"""`zoo saliency`: overlays of stored classifiers and towers from image files; what is wrong is said in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from zoo.lightning_modules.classifier import Classifier

from tests.hub_fixtures import call_python
from tests.hub_server import HubServer
from tests.stored import edit_config
from zoo import from_pretrained
from zoo.cli import main
from zoo.combined_maps import combine_maps
from zoo.data import DigitsDataModule
from zoo.overlays import overlay
from zoo.saliency import METHODS, layer_maps, saliency
from zoo.saliency_command import Explained, explain
from zoo.saliency_inputs import Preparation, find_subject

NOTE = "nothing records how the inputs of"


def as_trained(config: dict[str, Any], name: str = "DigitsDataModule", **args: Any) -> None:
    """Write down which data a run used."""
    config["run"] = {"data": {"name": name, "args": args, "splits": {}}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored classifier of 8x8 digits, and three digits as PNG files, one of them in a folder further inside."""
    folder = tmp_path_factory.mktemp("saliency")
    torch.manual_seed(0)
    model = Classifier("zoo/resnet8", 10, student_options={"in_chans": 1})
    model.example_shape = (1, 8, 8)
    model.save_pretrained(folder / "model")
    edit_config(folder / "model", as_trained)
    (folder / "images/inside").mkdir(parents=True)
    pixels = load_digits().images
    for row, name in ((0, "a.png"), (1, "b.png"), (2, "inside/a.png")):
        Image.fromarray((pixels[row] * 255 / 16).astype(np.uint8)).save(folder / "images" / name)
    (folder / "images/notes.txt").write_text("no image")
    (folder / "broken.png").write_text("no image")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


def pixels_of(file: str | Path) -> Any:
    """The pixels of an image file as an array."""
    with Image.open(file) as image:
        return np.asarray(image)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return its one line."""
    capsys.readouterr()
    assert main(["saliency", *words]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zoo ")]
    return error


def test_command_draws_what_the_function_gives(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file, independently: the file's pixels normalised by hand, the map of `saliency`, the overlay of it."""
    assert main(["saliency", "model", "images", "--layers", "layer2", "--out", "out", "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [row["image"] for row in rows] == ["images/a.png", "images/b.png", "images/inside/a.png"]
    assert shown.err == ""
    network = from_pretrained("model").network
    digits = DigitsDataModule()
    for row in rows:
        x = torch.from_numpy(pixels_of(row["image"]).astype(np.float32) / 255).view(1, 1, 8, 8)
        x = (x - digits.mean[0]) / digits.std[0]
        logits = network(x)[0].detach()
        assert row["class"] == int(logits.argmax())
        assert row["score"] == pytest.approx(float(logits.max()), rel=1e-5)
        assert row["probability"] == pytest.approx(float(logits.softmax(0).max()), rel=1e-5)
        assert row["layers"] == ["layer2"]
        expected = overlay(x[0], saliency(network, x, layers="layer2")[0])
        drawn = pixels_of(row["file"])
        assert drawn.shape == (224, 224, 3)  # 28 times 8 pixels
        assert abs(drawn[::28, ::28].astype(int) - expected.astype(int)).max() <= 1
    assert rows[2]["file"] == f"out/inside/a-class{rows[2]['class']}.png"


def test_stages_are_the_default_and_are_combined(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--classes", "predicted, 3", "--method", "selective", "--combine", "sum", "--out", "out"]
    assert main(["saliency", "model", "images/a.png", *words]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "layers layer1, layer2, layer3: out/a-class" in first
    assert "images/a.png: class 3, score " in second
    subject = find_subject("model", Preparation(), print)
    x = subject.prepare(Image.fromarray(pixels_of("images/a.png"))).unsqueeze(0)
    names = ["layer1", "layer2", "layer3"]
    found = layer_maps(subject.network, x, 3, layers=names, method="selective")
    whole = combine_maps(list(found.maps.values()), mode="sum", size=(8, 8))
    drawn = pixels_of("out/a-class3.png")[::28, ::28]
    assert abs(drawn.astype(int) - overlay(x[0], whole[0]).astype(int)).max() <= 1


def test_meta_step_changes_map_and_score(inside: Path) -> None:
    plain, stepped = (
        explain("model", ["images/a.png"], out=f"out-{lr}", layers=["layer2"], classes=[3], meta_lr=lr)[0]
        for lr in (None, 0.1)
    )
    assert stepped.score > plain.score, "the step goes towards the class"
    assert Path(plain.file).read_bytes() != Path(stepped.file).read_bytes()


def test_more_images_than_a_batch_and_taken_names(inside: Path, tmp_path: Path) -> None:
    for row in range(17):
        (tmp_path / str(row)).mkdir()
        Image.fromarray(np.full((8, 8), 10 * row, np.uint8)).save(tmp_path / str(row) / "same.png")
    files = [tmp_path / str(row) / "same.png" for row in range(17)]
    found = explain("model", files, out=tmp_path / "out", layers=["layer1"], classes=[0])
    assert [one.image for one in found] == [str(file) for file in files]
    assert Path(found[0].file).name == "same-class0.png"
    assert Path(found[16].file).name == "same-17-class0.png"
    alone = explain("model", files[16:], out=tmp_path / "alone", layers=["layer1"], classes=[0])
    assert alone[0].score == pytest.approx(found[16].score, rel=1e-5)


def test_timm_tower_and_its_own_preparation(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A photograph of another shape is cut and resized as timm's configuration of the architecture says."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 4), dtype=np.uint8), "RGBA").save("photo.png")
    words = ["timm/test_resnet", "photo.png", "--layers", "layer3", "--method", "gradcam", "--out", "out"]
    assert main(["saliency", *words]) == 0
    shown = capsys.readouterr()
    assert "note: 'timm/test_resnet' is a bare architecture: its weights are random" in shown.err
    assert pixels_of(shown.out.strip().rpartition(": ")[2]).shape == (160, 160, 3)


def test_class_blind_layer_is_told_once(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["saliency", "model", "images", "--layers", "layer3", "--classes", "1,2", "--out", "out"]) == 0
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: 'layer3': the gradient is the same at every place")


def test_constant_map_is_told(inside: Path) -> None:
    notes: list[str] = []
    explain(
        "model", ["images/a.png"], out="out", layers=["layer3"], method="gradient_sum", classes=[4], note=notes.append
    )
    assert "images/a.png: the map of class 4 is constant, nothing is laid over" in notes


def change_data(name: str, **args: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: as_trained(config, name, **args)


@pytest.mark.parametrize(
    ("change", "mean", "std", "told"),
    [
        (change_data("DigitsDataModule"), 0.3054, 0.3759, ""),
        (change_data("TheirData", mean=[0.5], std=[0.25]), 0.5, 0.25, ""),
        (change_data("TheirData", mean=[0.5], std=[0.0]), 0.0, 1.0, NOTE),
        (change_data("TheirData", mean=["x"], std=[1.0]), 0.0, 1.0, NOTE),
        (lambda config: config.update(run=None), 0.0, 1.0, NOTE),
        (lambda config: config.update(run={"data": ["x"]}), 0.0, 1.0, NOTE),
    ],
)
def test_normalised_as_recorded(
    inside: Path, change: Callable[[dict[str, Any]], None], mean: float, std: float, told: str
) -> None:
    edit_config(Path("model"), change)
    notes: list[str] = []
    try:
        subject = find_subject("model", Preparation(), notes.append)
    finally:
        edit_config(Path("model"), as_trained)
    assert "".join(notes).startswith(told)
    assert bool(notes) == bool(told)
    wide = Image.fromarray(np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None], 8, 0))  # 16 x 8: the middle is taken
    expected = (torch.arange(40, 120, 10) / 255 - mean) / std
    torch.testing.assert_close(subject.prepare(wide), expected.expand(1, 8, 8))


def test_colour_images_go_through_the_transform_of_their_run(tmp_path: Path) -> None:
    from zoo.data.transforms import timm_transform

    model = Classifier("zoo/resnet8", 4)
    model.example_shape = (3, 16, 16)
    model.save_pretrained(tmp_path)
    mean, std, options = [0.5, 0.4, 0.3], [0.2, 0.2, 0.1], {"crop_pct": 0.5, "interpolation": "bicubic"}
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 44, 3), dtype=np.uint8))
    edit_config(tmp_path, change_data("ImageFolderDataModule", mean=mean, std=std, eval_transform=options))
    prepare = find_subject(str(tmp_path), Preparation(), print).prepare
    expected = timm_transform(16, train=False, mean=mean, std=std, options=options)(photo)
    assert torch.equal(prepare(photo), expected)
    assert not torch.equal(find_subject(str(tmp_path), Preparation(mean=mean, std=std), print).prepare(photo), expected)
    edit_config(tmp_path, change_data("ImageFolderDataModule", mean=mean, std=std, eval_transform={"crop_pct": 1e-9}))
    with pytest.raises(ValueError, match=r"eval_transform in config\.json cannot be used"):
        find_subject(str(tmp_path), Preparation(), print)


def test_user_says_how_images_are_prepared(inside: Path) -> None:
    notes: list[str] = []
    found = explain(
        "zoo/resnet8", ["images/a.png"], out="out", preparation=Preparation(32, (0.5,), (0.5,)), note=notes.append
    )
    assert isinstance(found[0], Explained)
    assert pixels_of(found[0].file).shape == (224, 224, 3)
    assert [note for note in notes if NOTE in note] == []
    subject = find_subject("model", Preparation(mean=(0.5,), std=(0.25,)), notes.append)
    pixels = pixels_of("images/b.png")
    expected = (torch.from_numpy(pixels.astype(np.float32) / 255) - 0.5) / 0.25
    torch.testing.assert_close(subject.prepare(Image.fromarray(pixels))[0], expected)


def push_and_explain(folder: str) -> list[float]:
    """Push the model and explain by its names; in a process of its own, which sees the Hub."""
    from pathlib import Path

    from zoo import publish
    from zoo.saliency_command import explain

    publish.push_folder(Path(folder, "model"), "me/saliency")
    sources = ("me/saliency", "hf://me/saliency@main", f"{folder}/model")
    options = {"out": f"{folder}/out", "layers": ["layer2"]}
    return [explain(source, [f"{folder}/images/a.png"], **options)[0].score for source in sources]


@pytest.mark.thorough
def test_from_the_hub(work: Path, hub: HubServer) -> None:
    scores = call_python(push_and_explain, str(work), server=hub)
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "images/a.png", "--layers", "layr3"], "has no layer 'layr3'. Did you mean layer3"),
        (["model", "images/a.png", "--method", "normgrd"], "Did you mean normgrad"),
        (["model", "images/a.png", "--classes", "10"], "--classes must be 0 … 9 or predicted, got 10"),
        (["model", "images/a.png", "--classes", "first"], "numbers of classes or 'predicted', got 'first'"),
        (["model", "images/a.png", "--device", "abacus"], "--device abacus cannot be used"),
        (["model", "images/a.png", "--opacity", "2"], "opacity must be in 0 … 1, got 2.0"),
        (["model", "images/a.png", "--combine", "mean"], "invalid choice: 'mean'"),
        (["model", "images/a.png", "--mean", "a,b"], "expected numbers separated by commas, got 'a,b'"),
        (["model", "images/a.png", "--mean", "0.5"], "--mean and --std must be given together"),
        (
            ["model", "images/a.png", "--mean", "0.5,0.5", "--std", "1"],
            "--mean must be one number, or one a channel, 1",
        ),
        (["model", "images/a.png", "--mean", "0.5", "--std", "0"], "--std must be positive"),
        (["model", "images/a.png", "--image-size", "0"], "--image-size must be at least 1, got 0"),
        (["model", "broken.png"], "broken.png: the image cannot be decoded"),
        (["model", "images/c.png"], "images/c.png: no such image file or folder"),
        (["model", "model"], "model: the folder holds no image file"),
        (["images", "images/a.png"], "images is no stored model: it has no config.json"),
        (["./nothing", "images/a.png"], "./nothing is no folder with a stored model"),
        (["resnet18", "images/a.png"], "'resnet18' is no folder with a stored model. A model on the Hub is owner/name"),
        (["timm/resnet81", "images/a.png"], "timm has no architecture 'resnet81'. Did you mean resnet18"),
        (["open_clip/ViT-B-32", "images/a.png"], "gives embeddings and no classes"),
        (["zoo/resnet8", "images/a.png"], "give --image-size, --mean and --std"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    inside: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused([*words, "--out", "out"], capsys)


def test_bad_out_and_deep_pixels(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out broken.png cannot be a folder" in refused(["model", "images/a.png", "--out", "broken.png"], capsys)
    assert "the following arguments are required: --out" in refused(["model", "images/a.png"], capsys)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save("deep.png")
    assert "deep.png: pixels of more than 8 bits" in refused(["model", "deep.png", "--out", "out"], capsys)


def test_bad_stored_model_without_classes(tmp_path: Path, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.lightning_modules.clip import CLIP

    options = {"width": 32, "vocab_size": 100, "context_length": 8}
    CLIP("zoo/text_transformer", "zoo/resnet8", trained_options=options, locked=False).save_pretrained(tmp_path)
    assert "holds a CLIP, which gives no classes" in refused([str(tmp_path), "images/a.png", "--out", "out"], capsys)


def test_help_names_every_method_and_needs_no_torch() -> None:
    code = (
        "import sys\nfrom zoo.cli import main\n"
        "try:\n    main(['saliency', '--help'])\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(method in result.stdout for method in METHODS)
