"""Model cards: what they say, that people's parts survive, that nothing from a configuration becomes markup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from zoo.lightning_modules.nd import NDDistillation

from tests.hub_fixtures import call_python, hub, hub_server  # noqa: F401 - fixtures
from tests.hub_server import HubServer
from tests.hub_server.card import problems
from tests.model_cards import CONFIG, RECIPE, card_of, changed, metadata_of, sheet
from zoo import model_card, registry
from zoo.errors import InputError
from zoo.model_card import render
from zoo.module import ZooModule


def snippet_of(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


def test_golden_metadata() -> None:
    """The form of model-index is the Hub's: task, data set and metrics, one entry a split."""

    def index(split: str, *metrics: tuple[str, str, float]) -> dict[str, Any]:
        return {
            "task": {"type": "image-classification"},
            "dataset": {"type": "uoft-cs/cifar10", "name": "ParquetImagesDataModule", "split": split},
            "metrics": [{"type": kind, "name": name, "value": value} for kind, name, value in metrics],
        }

    results = [
        index("val", ("accuracy", "acc", 0.994413), ("loss", "loss", 0.03)),
        index("test", ("accuracy", "acc", 0.98607)),
    ]
    assert metadata_of(card_of()) == {
        "library_name": "lightning-zoo",
        "pipeline_tag": "image-classification",
        "license": "unknown",
        "tags": ["lightning-zoo", "pytorch-lightning", "NDDistillation"],
        "base_model": ["timm/resnet34.a1_in1k"],
        "datasets": ["uoft-cs/cifar10"],
        "model-index": [{"name": "nd-digits", "results": results}],
    }


def test_golden_text() -> None:
    card = card_of(figures=["figures/loss.png"])
    assert re.findall(r"^##? (.*)$", card, re.MULTILINE) == [
        "nd-digits", "How to load it", "Results", "Training", "Licence", "Deviations and limits", "Reference",
    ]  # fmt: skip
    for line in (
        "| `val` | 179 | `acc` | 0.9944 |",
        "| `test` | 359 | `acc` | 0.9861 |",
        "These are the results of a single run (seed `3`). A single run has no spread: a small difference from another one "
        "may be chance. `val/acc` chose these weights among the epochs, so the results on `val` are optimistic.",
        "zoo fit --config hf://me/nd-digits",
        "zoo fit --config hf://me/nd-digits --model.nd_weight 0 --trainer.default_root_dir runs/control",
        "It needs `./runs/teacher`; `zoo fit` trains what is missing first.",
        "![loss](figures/loss.png)",
        "- Time: `1 h 2 min`",
        "- Hardware: `CPU, 2 threads`",
        f"| `teacher` | `timm/resnet34.a1_in1k` | training | not recorded | `{'ab' * 32}` |",
        "- `teacher`, `timm/resnet34.a1_in1k`: unknown to this card, see https://huggingface.co/timm/resnet34.a1_in1k.",
        "- `student`, `zoo/resnet8`: began from random weights, so there is nothing to inherit.",
        "- The training data: unknown, see https://huggingface.co/datasets/uoft-cs/cifar10.",
        "- Stored with lightning-zoo `0.1.0`, torch `2.14.0`",
    ):
        assert f"{line}\n" in card, line
    component = sheet()
    assert component.sheet["citation"].strip() in card
    assert component.sheet["verified"].strip() in card
    assert component.text.rpartition("## Known limits")[2].strip() in card
    assert "not recorded: " not in card.lower().replace("| not recorded", "")
    # No number but those of the run, of its configuration and of the sheet.
    known = (
        json.dumps(CONFIG)
        + RECIPE
        + repr(component)
        + "0.9944 0.9861 1 h 2 min 0.1.0 nd_weight: 0 (1, 1, 8, 8) 2305.17007"
    )
    shown = re.sub(r"<!-- zoo:metadata.*", "", card.partition("<!-- zoo:begin about")[2])
    assert {n for n in re.findall(r"(?<![\w.])\d[\d.]*", shown) if n.rstrip(".") not in known} == set()


def test_the_control_says_that_it_is_one() -> None:
    card = card_of(changed("args.nd_weight", 0))
    assert "This run is the control of `NDDistillation` itself: `nd_weight: 0`." in card
    assert "runs/control" not in card


def test_origins_are_named_with_where_their_licence_is() -> None:
    names = {
        "timm/hf-hub:org/net@abc": "https://huggingface.co/org/net",
        "hf://me/teacher@abc": "https://huggingface.co/me/teacher",
        "torchvision/resnet50/IMAGENET1K_V2": "https://pytorch.org/vision/stable/models.html",
        "open_clip/ViT-B-32/laion2b_s34b_b79k": "https://github.com/mlfoundations/open_clip",
        "./runs/teacher": "the card of that model",
    }
    for name, see in names.items():
        card = card_of(changed("args.student", name))
        assert f"- `student`, `{name}`: unknown to this card, see {see}.\n" in card
        expected = ["timm/resnet34.a1_in1k"] + [see.removeprefix("https://huggingface.co/")] * ("huggingface" in see)
        assert metadata_of(card)["base_model"] == sorted(expected)
    for name in ("timm/resnet34", "torchvision/resnet50", "open_clip/ViT-B-32"):
        assert f"- `student`, `{name}`: began from random weights" in card_of(changed("args.student", name))
    # A path is a network only where a network is expected.
    assert "`root`" not in card_of(changed("args", {"root": "./data"}))


# -- what loads it -------------------------------------------------------------------------------------------------


def run_snippet(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    scope = dict(names)
    exec(snippet_of(card), scope)
    return scope


def test_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"in_chans": 1}
    model = NDDistillation("zoo/resnet8", "zoo/resnet8", 10, student_options=options, teacher_options=options)
    model.example_shape = (1, 8, 8)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scope = run_snippet(render(config, sheet()), tmp_path, monkeypatch)
    assert scope["output"].shape == (1, 10)
    assert torch.equal(next(scope["network"].parameters()), next(model.student.parameters()))


def test_snippet_asks_for_what_is_supplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

    NDDistillation(network(), network(), 10).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["supplied"].keys() == {"student", "teacher"}
    card = render(config, sheet())
    assert "teacher=" not in snippet_of(card), "inference needs no teacher"
    scope = run_snippet(card, tmp_path, monkeypatch, build_student=network)
    assert isinstance(scope["model"].student, nn.Sequential)
    assert "- `student`, a module that was given ready: unknown" in card


def test_snippet_of_a_users_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(ZooModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 2)

    monkeypatch.setattr(registry, "_registered", {"Mine": Mine})
    monkeypatch.setitem(sys.modules, "your_module", ModuleType("your_module"))
    Mine(3).save_pretrained(tmp_path)
    card = render(json.loads((tmp_path / "config.json").read_text()), None)
    assert run_snippet(card, tmp_path, monkeypatch)["model"].layer.in_features == 3
    assert "a class of its author's own" in card
    assert "pipeline_tag" not in metadata_of(card)
    assert problems(card) == ([], [])


def test_plain_weights() -> None:
    card = render({"component": None, "run": {"metrics": {"val": {"acc": 0.5}}}}, None, repo_id="me/x")
    assert 'zoo.load_weights("me/x", module)' in snippet_of(card)
    assert metadata_of(card)["model-index"][0]["results"][0]["task"] == {"type": "other"}
    assert problems(card) == ([], [])


# -- missing and bad facts -----------------------------------------------------------------------------------------

PARTS = [
    *(key for key in CONFIG if key != "component"), *(f"run.{key}" for key in CONFIG["run"]), "args.nd_weight",
    "run.data.name", "run.data.args", "run.data.splits", "run.metrics.val", "omitted.teacher.revision",
]  # fmt: skip


@pytest.mark.parametrize("value", [..., None])
@pytest.mark.parametrize("part", PARTS)
def test_missing_facts(part: str, value: Any) -> None:
    config = changed(part, value)
    card = card_of(config, recipe=None)
    assert problems(card) == ([], [])
    assert "None" not in card.replace("None:", "")
    assert card_of(config, recipe=None, existing=card) == card


def test_nothing_is_known() -> None:
    card = render({}, None)
    for line in (
        "No result was recorded with these weights.",
        "No recipe was stored with these weights",
        "- Not recorded: seed, epochs, optimizer steps, time, hardware, precision",
        "Which data the model was trained on, and how they were prepared, was not recorded.",
        "- These weights: unknown.",
    ):
        assert line in card
    assert "model-index" not in metadata_of(card)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "-Infinity", None, 10**400])
def test_not_finite_metrics_stay_out_of_the_metadata(value: Any) -> None:
    card = card_of(changed("run.metrics.val.loss", value))
    assert "| `val` | 179 | `loss` | not finite |\n" in card
    assert "Not finite, and therefore not in the metadata of this card: `val/loss`." in card
    metrics = metadata_of(card)["model-index"][0]["results"][0]["metrics"]
    assert [metric["name"] for metric in metrics] == ["acc"]
    assert problems(card) == ([], [])
    only = changed("run.metrics", {"val": {"loss": value}})
    assert "model-index" not in metadata_of(card_of(only))


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("run", [], r"run must be an object, got list"),
        ("run.metrics", 1, r"run.metrics must be an object, got int"),
        ("run.metrics.val", [0.5], r"run.metrics.val must be an object"),
        ("run.metrics.val.acc", "high", r"run.metrics.val.acc must be a number, got str"),
        ("run.metrics.val.acc", True, r"run.metrics.val.acc must be a number, got bool"),
        ("run.metrics.val.acc", torch.tensor(0.5), r"run.metrics.val.acc must be a number, got Tensor"),
        ("run.data", "digits", r"run.data must be an object, got str"),
        ("run.data.splits.val", -1, r"run.data.splits.val must be a number of samples, got '-1'"),
        ("run.seconds", "long", r"run.seconds must be a time in seconds, got 'long'"),
        ("omitted.teacher", 1, r"omitted.teacher must be an object"),
        ("args", [], r"args must be an object"),
    ],
)
def test_bad_facts(part: str, value: Any, match: str) -> None:
    *parents, last = part.split(".")
    config = json.loads(json.dumps(CONFIG))
    target = config
    for key in parents:
        target = target[key]
    target[last] = value
    with pytest.raises(InputError, match=match):
        card_of(config)


def test_bad_names() -> None:
    for repo_id in ("me/x/y", "../x", "me/x y", 'me/x")', ""):
        with pytest.raises(InputError, match="repo_id must be a name"):
            card_of(repo_id=repo_id)
    for figure in ("/etc/x.png", "figures/../x.png", "figures/x.svg", "figures/a)b.png"):
        with pytest.raises(InputError, match="a figure must be a file"):
            card_of(figures=[figure])


# -- the Hub, and what it costs ------------------------------------------------------------------------------------


def push_cards(cards: list[str]) -> list[Any]:
    import huggingface_hub
    from huggingface_hub import HfApi, ModelCard

    api = HfApi()
    api.create_repo("me/cards")
    found = []
    for card in cards:
        if int(huggingface_hub.__version__.partition(".")[0]) >= 2:  # 1.x asks huggingface.co
            ModelCard(card).validate()
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/cards")
        data = api.model_info("me/cards").card_data
        results = (data.eval_results if data else None) or []
        found.append([str(ModelCard(card)) == card, [result.metric_value for result in results]])
    return found


def test_the_hub_takes_each_card(hub: HubServer) -> None:  # noqa: F811 - the fixture
    baseline = render(changed("component", "Classifier"), registry.describe("Classifier"))
    cards = [card_of(), card_of(changed("run", None)), baseline, render({"component": None}, None)]
    values = [0.994413, 0.03, 0.98607]
    assert call_python(push_cards, cards, server=hub) == [[True, values], [True, []], [True, values], [True, []]]


def test_two_threads_do_not_render_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from_template, alone = ModelCard.from_template, []

    def watched(*args: Any, **kwargs: Any) -> ModelCard:
        alone.append(not model_card._rendering.acquire(blocking=False))
        card: ModelCard = from_template(*args, **kwargs)
        return card

    monkeypatch.setattr(ModelCard, "from_template", watched)
    render({"component": None}, None)
    assert alone == [True]


def test_rendering_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code = (
        "import json, sys; from zoo import registry; from zoo.model_card import render\n"
        "config = json.load(open('config.json'))\n"
        "assert '# NDDistillation' in render(config, registry.describe('NDDistillation'), recipe='a: 1')\n"
        "print([m for m in ('torch', 'lightning', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stdout.strip() == "[]", result.stderr
