"""Every recipe, and every command in a recipe's header, parses against the real signatures; pairs are those of the papers.

Nothing is instantiated by parsing, so no weights are fetched and no data read. Networks are built on the meta device.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule

import zoo
from zoo import registry, towers, training
from zoo.cli import main
from zoo.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")

RECIPES = registry.recipes()
# The pairs of arXiv 2305.17007, and the teachers that are trained for them.
ND = [name for name in RECIPES if re.match(r"nd-(cifar|imagenet)", name)]
PAIRS = [name for name in ND if name.count("-") == 3]
COMMAND = re.compile(r"zoo fit --config [^`]+")

# The headers of the other pairs have the same commands; `make test-thorough` parses them all.
USUAL = [name for name in RECIPES if name not in ND] + [
    "nd-cifar100-resnet32x4-resnet8x4",
    "nd-imagenet-resnet34-resnet18",
]
HEADERS = [name if name in USUAL else pytest.param(name, marks=pytest.mark.thorough) for name in RECIPES]

Parse = Callable[[list[str]], Namespace]


def content(name: str) -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load(registry.recipe_path(name).read_text(encoding="utf-8"))
    return recipe


def header(name: str) -> list[str]:
    """The lines in front of the configuration, without their ``#``."""
    lines = registry.recipe_path(name).read_text(encoding="utf-8").splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def commands(name: str) -> list[list[str]]:
    """The options behind each ``zoo fit`` in the header."""
    found = [COMMAND.search(line) for line in header(name)]
    return [shlex.split(match[0])[2:] for match in found if match]


class ParsingCLI(training.ZooCLI):
    """The zoo's command line up to the configuration."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(scope="module")
def parse() -> Iterator[Parse]:
    """Parse the options of ``zoo fit``; the parser is built once, and each command parsed once."""
    training._import_names()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["zoo"])
        cli = ParsingCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=training.ZooParser,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            args=["fit", *training._resolve_configs(["--config", "nd-digits"])],
        )

        done: dict[tuple[str, ...], Namespace] = {}

        def run(words: list[str]) -> Namespace:
            if tuple(words) not in done:
                done[tuple(words)] = cli.parser.parse_args(["fit", *training._resolve_configs(words)]).fit
            return done[tuple(words)]

        yield run


def plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses(parse: Parse, name: str) -> None:
    parsed, written = parse(["--config", name]), content(name)
    for group in ("model", "data"):
        assert parsed[group].class_path.rpartition(".")[2] == written[group]["class_path"].rpartition(".")[2]
        for option, value in written[group].get("init_args", {}).items():
            assert plain(parsed[group].init_args[option]) == value, f"{group}.{option}"


@pytest.mark.parametrize("name", HEADERS)
def test_commands_of_the_header_parse(parse: Parse, name: str) -> None:
    found = commands(name)
    assert ["--config", name] in found
    for words in found:
        parsed = parse(words)
        for option, value in zip(words[::2], words[1::2], strict=True):
            group, _, key = option.removeprefix("--").partition(".")
            if group in ("model", "data"):
                assert parsed[group].init_args[key] == yaml.safe_load(value), words


@pytest.mark.parametrize("name", HEADERS)
def test_runs_of_a_recipe_have_folders_of_their_own(parse: Parse, name: str) -> None:
    folders = [parse(words).trainer.default_root_dir for words in commands(name) if words[:2] == ["--config", name]]
    assert len(folders) == len(set(folders)), folders


def test_bad_option_does_not_parse(parse: Parse) -> None:
    """The parser of these tests does check."""
    with pytest.raises(InputError, match="no option 'dkd_gamma'"):
        parse(["--config", "nd-digits", "--model.dkd_gamma", "1"])
    with pytest.raises(InputError, match="warmup_epochs"):
        parse(["--config", "nd-digits", "--model.warmup_epochs", "soon"])


def named(value: Any) -> list[Any]:
    """The values of an argument, those inside of a dict too."""
    return [inner for item in value.values() for inner in named(item)] if isinstance(value, dict) else [value]


@pytest.mark.parametrize("name", [name for name in RECIPES if content(name).get("requires")])
def test_required_model_is_what_its_recipe_makes(name: str) -> None:
    """The folder is where the other recipe stores; the networks agree on classes and on how images are prepared."""
    ours = content(name)
    for folder, maker in ours["requires"].items():
        theirs = content(maker)
        assert Path(folder) == Path(theirs["trainer"]["default_root_dir"])
        assert folder in named(ours["model"]["init_args"])
        if "num_classes" not in ours["model"]["init_args"]:
            continue  # two towers have no classes, and read the images beside captions
        assert ours["model"]["init_args"].get("num_classes") == theirs["model"]["init_args"].get("num_classes")
        assert ours["data"]["class_path"] == theirs["data"]["class_path"]
        mine, other = (dict(recipe["data"].get("init_args", {})) for recipe in (ours, theirs))
        assert {**mine, "batch_size": None} == {**other, "batch_size": None}


@pytest.mark.parametrize("name", ND)
def test_data_module_takes_its_arguments(name: str) -> None:
    """Also those that a signature cannot check: options of the transforms, ranges."""
    data = content(name)["data"]
    module = getattr(zoo, data["class_path"])(**data["init_args"])
    assert module.batch_size == data["init_args"]["batch_size"]


@pytest.mark.parametrize("name", ND)
def test_optimizer_and_schedule(name: str) -> None:
    """SGD, the learning rate a tenth at three epochs that the run reaches."""
    recipe = content(name)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], **recipe["optimizer"]["init_args"])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, **recipe["lr_scheduler"]["init_args"])
    assert recipe["optimizer"]["class_path"].endswith(".SGD")
    assert recipe["lr_scheduler"]["class_path"].endswith(".MultiStepLR")
    rates = []
    for _ in range(recipe["trainer"]["max_epochs"]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    lr = recipe["optimizer"]["init_args"]["lr"]
    imagenet = name.startswith("nd-imagenet")
    epochs, drops = (100, [30, 60, 90]) if imagenet else (240, [150, 180, 210])
    assert rates == pytest.approx([lr * 0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(epochs)])


# Settings of the authors' scripts, as the specification has them: KD++ kappa / lambda | DKD++ alpha / beta / lambda |
# DIST++ kappa / lambda | ReviewKD++ kappa / lambda. ImageNet has no DIST++.
CIFAR100 = """
resnet56-resnet20        | 1.0 / 2.0 | 2.5 / 4.0 / 3.5 | 2.0 / 1.0 | 1.2 / 1.0
resnet32x4-resnet8x4     | 3.5 / 2.0 | 2.0 / 8.0 / 0.5 | 1.5 / 4.0 | 8.0 / 1.0
wrn40_2-wrn40_1          | 1.0 / 1.5 | 1.0 / 6.0 / 1.0 | 2.5 / 3.0 | 5.0 / 4.0
resnet50-mobilenetv2     | 3.0 / 0.5 | 0.5 / 8.0 / 1.0 | 7.0 / 1.0 | 6.0 / 2.0
resnet32x4-shufflenetv1  | 2.5 / 1.5 | 0.5 / 8.0 / 4.0 | 2.5 / 3.0 | 7.0 / 1.0
resnet32x4-shufflenetv2  | 4.0 / 0.5 | 0.5 / 6.0 / 0.5 | 3.0 / 4.0 | 8.0 / 1.5
"""
IMAGENET = """
resnet34-resnet18        | 2.5 / 1.0 | 0.8 / 0.5 / 1.0 | - | 1.0 / 3.0
resnet50-resnet18        | 4.0 / 1.0 | 0.6 / 0.5 / 2.0 | - | 3.0 / 2.0
resnet101-resnet18       | 3.5 / 4.0 | 0.8 / 0.5 / 1.0 | - | 3.0 / 1.0
resnet152-resnet18       | 4.0 / 2.0 | 1.0 / 1.0 / 1.0 | - | 3.0 / 1.0
resnet50-mobilenetv1     | 4.0 / 1.0 | 0.8 / 1.0 / 1.0 | - | 8.0 / 4.0
vit_small-resnet18       | 1.5 / 1.0 | 1.0 / 1.0 / 2.0 | - | -
vit_base-resnet18        | 2.0 / 1.0 | 1.4 / 0.5 / 2.0 | - | -
"""
# Width of the features (section 1.4 of the specification), by the name in the recipe.
WIDTHS = {
    "resnet56": 64, "resnet20": 64, "resnet32x4": 256, "resnet8x4": 256, "wrn40_2": 128, "wrn40_1": 64, "resnet50": 2048,
    "mobilenetv2": 1280, "shufflenetv1": 960, "shufflenetv2": 1024, "resnet34": 512, "resnet18": 512, "resnet101": 2048,
    "resnet152": 2048, "mobilenetv1": 1024, "vit_small": 384, "vit_base": 768,
}  # fmt: skip


def settings() -> dict[str, list[list[float]]]:
    """Recipe -> the four groups of weights, empty where there are none."""
    table = {"cifar100": CIFAR100, "imagenet": IMAGENET, "cifar10": CIFAR100.strip().splitlines()[0]}
    found = {}
    for data, rows in table.items():
        for row in rows.strip().splitlines():
            pair, *cells = (cell.strip() for cell in row.split("|"))
            groups = [[float(n) for n in cell.split("/")] if cell != "-" else [] for cell in cells]
            found[f"nd-{data}-{pair}"] = groups
    return found


def test_every_pair_has_a_recipe() -> None:
    assert sorted(settings()) == PAIRS


@pytest.mark.parametrize("name", PAIRS)
def test_golden_settings_of_the_scripts(parse: Parse, name: str) -> None:
    kd, dkd, dist, review = settings()[name]
    imagenet = name.startswith("nd-imagenet")
    runs: dict[tuple[str, bool], Any] = {}
    for words in commands(name):
        model = parse(words).model.init_args
        runs[model.base, model.nd_weight == 0] = model
        assert model.ce_weight == 1
        assert model.temperature == (1 if imagenet else 4)
        assert model.warmup_epochs == (5 if imagenet else 20)
        assert model.nd_warmup_epochs == (5 if imagenet and model.base == "dkd" else 0)
    assert runs.keys() == {
        ("kd", False), ("kd", True), ("dkd", False), *([("dist", False)] if dist else []),
        *([("review_kd", False)] if review else []),
    }  # fmt: skip
    assert [runs["kd", False].kd_weight, runs["kd", False].nd_weight] == kd
    assert runs["kd", True].kd_weight == kd[0]
    model = runs["dkd", False]
    assert [model.dkd_alpha, model.dkd_beta, model.nd_weight] == dkd
    assert model.kd_weight == 1
    for base, expected in (("dist", dist), ("review_kd", review)):
        if expected:
            assert [runs[base, False].kd_weight, runs[base, False].nd_weight] == expected


@pytest.mark.parametrize("name", PAIRS)
def test_golden_training_of_the_scripts(name: str) -> None:
    recipe = content(name)
    optimizer, student = recipe["optimizer"]["init_args"], name.rpartition("-")[2]
    imagenet = name.startswith("nd-imagenet")
    assert recipe["data"]["init_args"]["batch_size"] == (512 if imagenet else 128)
    small = student.startswith(("shufflenet", "mobilenetv2"))
    lr, decay = (0.2, 1e-4) if imagenet else (0.02 if small else 0.1, 5e-4)
    assert optimizer == {"lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": decay}


@pytest.mark.parametrize("name", PAIRS)
def test_networks_exist_with_the_widths_of_the_paper(name: str) -> None:
    """Names and weights are known; the header tells whether there is a projector."""
    arguments = content(name)["model"]["init_args"]
    teacher, student = name.split("-")[2:]
    named = arguments["teacher"]
    if named.startswith("."):
        named = content(Path(named).name)["model"]["init_args"]["student"]
    else:
        assert towers.has_weights(named)
    with torch.device("meta"), towers.without_weights("all"):
        dims = [
            towers.create(network, num_classes=arguments["num_classes"]).dim
            for network in (named, arguments["student"])
        ]
    assert dims == [WIDTHS[teacher], WIDTHS[student]]
    said = " ".join(header(name))
    assert ("so no projector" if dims[0] == dims[1] else "so with a projector") in said


# Not those that repeat the networks or the stages of another pair.
REVIEWED = [name for name in PAIRS if settings()[name][3] and "cifar10-" not in name and "resnet101" not in name]


@pytest.mark.parametrize("name", REVIEWED)
def test_review_kd_compares_every_stage(parse: Parse, name: str) -> None:
    """Three stages on CIFAR, four where both networks have four; the maps in front of the teacher's last ReLUs."""
    words = next(words for words in commands(name) if "review_kd" in words)
    arguments = {key: plain(value) for key, value in parse(words).model.init_args.items()}
    if arguments["teacher"].startswith("."):
        arguments["teacher"] = content(Path(arguments["teacher"]).name)["model"]["init_args"]["student"]
    with torch.device("meta"), towers.without_weights("all"):
        model = zoo.NDDistillation(**arguments)
    levels = 3 if name.partition("-")[2].startswith("cifar") and "mobilenetv2" not in name else 4
    assert len(model.student_stages.names) == len(model.teacher_stages.names) == levels
    assert all(layer.endswith(":input") for layer in model.teacher_stages.names)
    # The last stage of the student is as wide as its features, but for networks with a wider convolution behind it.
    wide = {"mobilenetv2": 160, "shufflenetv2": 464}
    student = name.rpartition("-")[2]
    assert model.student_stages.channels[-1] == wide.get(student, WIDTHS[student])
    assert model.teacher_stages.channels[-1] == WIDTHS[name.split("-")[2]]


def test_cifar10_pair_trains_from_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher and student for one epoch on images of noise, one a class, from files that the user names."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def image(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for split in ("train", "test"):
        table = pa.table({"img": [image(index) for index in range(10)], "label": list(range(10))})
        pq.write_table(table, f"data/cifar10-{split}.parquet")
    quick = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "nd-cifar10-resnet56", *quick]) == 0
    assert main(["fit", "--config", "nd-cifar10-resnet56-resnet20", *quick]) == 0
    model = zoo.from_pretrained("runs/nd-cifar10-resnet56-resnet20")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert int(model.class_counts.sum()) == 10
