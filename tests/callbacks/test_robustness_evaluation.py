"""RobustnessEvaluation: the worst case of a linear network, out of somebody else's validation, which it does not disturb."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from zoo.callbacks.robustness_evaluation import RobustnessEvaluation

import zoo
from tests.robust_networks import Linear, direction, margins, samples
from zoo.errors import InputError

EPS = 0.01
MEAN, STD = 0.4, 0.3


class Plain(pl.LightningModule):
    """A linear classifier of normalised images, with dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Linear(0)
        self.drop = nn.Dropout(0.3)
        self.frozen = Linear(5).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(self.drop(x) * STD + MEAN)
        return logits

    def backbone(self, x: Tensor) -> Tensor:
        logits: Tensor = self.frozen(x * STD + MEAN)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        batch[0].zero_()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(count: int = 40, **options: Any) -> DataLoader[Any]:
    x, labels = samples(count)
    return DataLoader(TensorDataset((x - MEAN) / STD, labels), batch_size=16, **options)


def evaluation(**options: Any) -> RobustnessEvaluation:
    defaults: dict[str, Any] = {"eps": (EPS, 2 * EPS), "attacks": ("pgd-ce",), "mean": [MEAN], "std": [STD]}
    return RobustnessEvaluation(**{**defaults, **options})


def trainer(*callbacks: pl.Callback, folder: Path | None = None, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def logged(run: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items() if "/robust" in name}


def worst(count: int, eps: float) -> float:
    """The share of the first samples that nothing within the radius can turn."""
    x, labels = (value[:count] for value in samples(40))
    return float((margins(Linear(0), x, labels, eps * direction(Linear(0)).abs().sum()) > 0).float().mean())


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_numbers_are_those_of_a_linear_network(precision: Any, tmp_path: Path) -> None:
    callback = evaluation(surrogate="backbone", max_samples=None)
    run = trainer(callback, precision=precision)
    run.validate(Plain(), loader(), verbose=False)
    found = logged(run)
    x, labels = samples()
    across = (direction(Linear(0)) * direction(Linear(5)).sign()).sum()
    assert found == pytest.approx(
        {
            "val/robust/clean": worst(40, 0.0),
            "val/robust/adaptive_0.01": worst(40, EPS),
            "val/robust/adaptive_0.02": worst(40, 2 * EPS),
            "val/robust/transfer_0.01": float((margins(Linear(0), x, labels, EPS * across) > 0).float().mean()),
            "val/robust/transfer_0.02": float((margins(Linear(0), x, labels, 2 * EPS * across) > 0).float().mean()),
            "val/robust/noise_0.01": found["val/robust/noise_0.01"],
            "val/robust/noise_0.02": found["val/robust/noise_0.02"],
        }
    )
    assert (tmp_path / "images/val/robust/curve/step-00000000.png").read_bytes() == callback.card_figures()[
        "robustness"
    ]


def test_test_takes_the_batch_before_the_module_changes_it() -> None:
    callback = evaluation(max_samples=20)
    run = trainer(callback)
    run.test(Plain(), loader(), verbose=False)
    assert logged(run)["test/robust/adaptive_0.01"] == pytest.approx(worst(20, EPS))
    assert "20 samples" in callback.results["test"]["title"]
    figures = callback.card_figures()
    trainer(callback).validate(Plain(), loader(), verbose=False)
    assert callback.results.keys() == {"test", "val"}
    assert callback.card_figures() == figures  # that of the test


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "val_check_interval": 1, "limit_val_batches": 2},
        {"precision": "bf16-mixed", "num_sanity_val_steps": 2},
        {"inference_mode": False, "gradient_clip_val": 0.1},
        {"compiled": True},
    ],
    ids=["accumulation", "bf16-mixed", "no-inference-mode", "compiled"],
)
def test_weights_are_those_without_it(options: dict[str, Any]) -> None:
    compiled = options.get("compiled")
    options = {name: value for name, value in options.items() if name != "compiled"}

    def fit(*callbacks: pl.Callback) -> tuple[pl.LightningModule, Tensor]:
        torch.manual_seed(0)
        module = Plain()
        if compiled:
            module.compile(backend="eager")
        hooks = [len(part._forward_hooks) for part in module.modules()]
        trainer(*callbacks, max_epochs=1, **options).fit(module, loader(shuffle=True), loader())
        assert [len(part._forward_hooks) for part in module.modules()] == hooks
        return module, torch.get_rng_state()

    callback = evaluation(attacks=("pgd-ce", "apgd-dlr"), surrogate="frozen", steps=2)
    (ours, state), (theirs, plain) = fit(callback), fit()
    assert callback.results["val"]["shares"]["clean"] > 0.5
    assert torch.equal(state, plain)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    assert [part.training for part in ours.modules()] == [part.training for part in theirs.modules()]


def test_every_n_epochs_and_the_rehearsal(tmp_path: Path) -> None:
    callback = evaluation(every_n_epochs=2, steps=1)
    trainer(callback, max_epochs=4, num_sanity_val_steps=1).fit(Plain(), loader(), loader())
    steps = sorted(path.stem for path in (tmp_path / "images/val/robust/curve").iterdir())
    assert steps == ["step-00000006", "step-00000012"]


class Embedding(pl.LightningModule):
    """Embeds images by two linear features; its class centres are made at each validation."""

    centres: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = Linear(0)

    def encode(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.body(x)
        return embedding

    def on_validation_start(self) -> None:
        self.centres = 2 * torch.eye(2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch.keys() == {"image", "label"}


@pytest.mark.parametrize("by", ["name", "value"])
def test_class_centres(by: str) -> None:
    """With two orthogonal centres the nearest is that of the larger feature, as for a classifier."""
    x, labels = samples()
    batches = [
        {"image": x[:25], "label": F.one_hot(labels[:25], 2)},
        {"image": x[25:], "label": F.one_hot(labels[25:], 2)},
    ]
    callback = evaluation(
        mean=None, std=None, attacks=("pgd-ce", "pgd-dlr", "pgd-cos"), steps=20, scale=10.0,
        forward=(lambda module, x: module.encode(x)) if by == "value" else "encode",
        class_centres=torch.eye(2) if by == "value" else "centres", surrogate=Linear(0),
        batch_to_input=lambda batch: batch["image"], batch_to_target=lambda batch: batch["label"],
    )  # fmt: skip
    run = trainer(callback)
    run.validate(Embedding(), DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    found = logged(run)
    assert found["val/robust/adaptive_0.01"] == pytest.approx(worst(40, EPS))
    assert found["val/robust/transfer_0.01"] == pytest.approx(worst(40, EPS))
    assert found["val/robust/clean"] == pytest.approx(worst(40, 0.0))


def test_through_the_locked_tower_of_an_image_text_model() -> None:
    images, captions = Linear(0), nn.Linear(3, 2)
    images.output_dim = captions.output_dim = 2  # type: ignore[assignment]
    x, labels = samples()
    batch = {"image": x, "text": torch.randn(len(x), 3), "label": labels, "id": torch.arange(len(x))}
    callback = evaluation(
        mean=None, std=None, max_samples=None, steps=20, forward="encode_image", class_centres=torch.eye(2), scale=10.0,
        batch_to_input=lambda batch: batch["image"], batch_to_target=lambda batch: batch["label"],
    )  # fmt: skip
    run = trainer(callback)
    run.validate(zoo.CLIP(captions, images, k=(1,)), DataLoader([batch], batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert logged(run)["val/robust/adaptive_0.01"] == pytest.approx(worst(40, EPS))


def test_surrogate_by_its_tower_name() -> None:
    from zoo.lightning_modules.classifier import Classifier

    stored = Classifier("zoo/resnet8", num_classes=2, student_options={"in_chans": 1})
    stored.save_pretrained("surrogate")
    callback = evaluation(surrogate="./surrogate", steps=2, check_samples=0, max_samples=8)
    run, module, state = trainer(callback), Plain(), torch.get_rng_state()
    callback.setup(run, module, "validate")
    assert torch.equal(state, torch.get_rng_state())
    run.validate(module, loader(), verbose=False)
    assert logged(run)["val/robust/transfer_0.01"] >= worst(8, EPS)
    assert not any(name.startswith("check_") for name in callback.results["val"]["shares"])


class Data(pl.LightningDataModule):
    """A data module that says how it normalises."""

    mean, std = [MEAN], torch.tensor([STD])

    def val_dataloader(self) -> Any:
        return [loader(), loader(20)]


class Many(Plain):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        return


def test_normalisation_of_the_data_module_and_the_first_loader_only() -> None:
    callback = evaluation(mean=None, std=None, max_samples=None)
    run = trainer(callback)
    run.validate(Many(), datamodule=Data(), verbose=False)
    assert logged(run)["val/robust/adaptive_0.02"] == pytest.approx(worst(40, 2 * EPS))
    assert "40 samples" in callback.results["val"]["title"]


def test_normalisation_of_a_tower() -> None:
    from zoo import towers
    from zoo.pixel_units import find_normalisation

    module, run = Plain(), trainer()
    module.first = towers.Tower(nn.Sequential(nn.Linear(1, 1)), name="torchvision/resnet18/IMAGENET1K_V1", frozen=True)
    module.second = towers.Tower(nn.Sequential(nn.Linear(1, 1)), name="torchvision/resnet18", frozen=True)
    found = find_normalisation(run, module)
    assert found is not None
    assert (found[0].mean, found[0].std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    module.third = towers.Tower(
        nn.Sequential(nn.Linear(1, 1)), name="timm/vit_base_patch16_224.augreg_in21k", frozen=True
    )
    module.third.network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # type: ignore[union-attr]
    assert find_normalisation(run, module) is None
    del module.first
    found = find_normalisation(run, module)
    assert found is not None
    assert found[0].mean == [0.5, 0.5, 0.5]
    assert find_normalisation(run, Plain()) is None


class Masked(Plain):
    """Hides its gradient behind steps without a slope."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.round(x * 64) / 64)


def test_findings_are_warned_of_once() -> None:
    callback = evaluation(surrogate="backbone_of_its_own")
    module = Masked()
    module.backbone_of_its_own = super(Masked, module).forward
    with pytest.warns(UserWarning, match="RobustnessEvaluation, val") as caught:
        trainer(callback, max_epochs=2).fit(module, loader(), loader())
    told = [str(warning.message) for warning in caught if "RobustnessEvaluation, val:" in str(warning.message)]
    assert sum("its gradients are masked" in message for message in told) == 1
    assert sum("turn them into anything" in message for message in told) == 1
    assert len(told) == len(callback._warned)


def test_resume_keeps_results_and_warnings(tmp_path: Path) -> None:
    callback = evaluation()
    run = trainer(callback, max_epochs=1)
    run.fit(Plain(), loader(), loader())
    callback._warned.add("noise")
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = evaluation()
    assert again.state_key == callback.state_key != evaluation(name="other").state_key
    trainer(again, max_epochs=2, limit_val_batches=0).fit(
        Plain(), loader(), loader(), ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True
    )
    assert again.state_dict() == callback.state_dict()
    assert again.card_figures() == callback.card_figures()
    # Another fit is another run.
    trainer(again, max_epochs=1, limit_val_batches=0).fit(Plain(), loader(), loader())
    assert again.card_figures() == {}


def test_two_side_by_side() -> None:
    callbacks = evaluation(), evaluation(name="round", norm="l2", eps=(0.1,))
    run = trainer(*callbacks)
    run.validate(Plain(), loader(), verbose=False)
    assert {"val/robust/adaptive_0.01", "val/round/adaptive_0.1"} <= run.callback_metrics.keys()
    assert list(callbacks[1].card_figures()) == ["robustness"]


def evaluate(rank: int, world: int) -> Any:
    """One process of two: 41 samples, of which 31 are attacked, and a second pass with too few for both."""
    warnings.simplefilter("ignore")
    os.environ.update(
        LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="1", WORLD_SIZE=str(world), NODE_RANK="0"
    )  # the process group stands already; the address is never used
    found = []
    for limit in (31, 1):
        data = TensorDataset((samples(40)[0] - MEAN) / STD, samples(40)[1])
        sampler: Any = DistributedSampler(data, world, rank, shuffle=False)
        callback = evaluation(max_samples=limit, surrogate="backbone")
        run = trainer(callback, devices=world, strategy="ddp", use_distributed_sampler=False)
        run.validate(Plain(), DataLoader(data, batch_size=16 - 8 * rank, sampler=sampler), verbose=False)
        found.append((logged(run), callback.results["val"]["title"]))
    return found


def test_two_processes_equal_one(two_processes: Callable[..., list[Any]]) -> None:
    first, second = two_processes(evaluate)
    assert first == second
    for (found, title), limit in zip(first, (31, 1), strict=True):
        callback = evaluation(max_samples=limit, surrogate="backbone")
        run = trainer(callback)
        run.validate(Plain(), loader(), verbose=False)
        assert f"{limit} samples" in title
        fixed = {name: value for name, value in logged(run).items() if "noise" not in name}
        assert {name: found[name] for name in fixed} == pytest.approx(fixed)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
    ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
    ({"check_samples": -1}, "check_samples must be at least 0, got -1"),
    ({"std": None}, "mean and std belong together"),
    ({"scale": 0.0}, "scale must be positive"),
    ({"name": "a/b"}, "name must be letters, digits and '_', got 'a/b'"),
    ({"attacks": ("fgsm",)}, "attacks must be one of"),
    ({"surrogate": "backbon"}, "Plain has no 'backbon' for surrogate. Did you mean backbone"),
    ({"surrogate": "zoo/resnet8"}, "must be a tower with weights, and 'zoo/resnet8' has random ones"),
    ({"forward": "encode"}, "Plain has no 'encode' for forward"),
    ({"mean": None, "std": None}, r"inputs must lie in valid_range 0.0 … 1.0, and as they are they run from -0.1"),
    ({"mean": [0.5, 0.5], "std": [1.0, 1.0]}, "mean and std have 2 channels"),
    ({"class_centres": torch.eye(3)}, r"must return embeddings \(B, 3\), got \(2, 2\)"),
    ({"class_centres": torch.ones(3)}, "class_centres must have two dimensions"),
    ({"forward": lambda module, x: [x]}, "must return one row a sample"),
    ({"batch_to_target": lambda batch: None}, "the targets of a batch must be a tensor, got NoneType"),
    ({"batch_to_target": lambda batch: batch[1] + 2}, "labels must be labels in 0 … 1"),
]


@pytest.mark.parametrize(("options", "match"), BAD)
def test_bad_arguments_show_before_training(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        trainer(evaluation(**options), max_steps=1, num_sanity_val_steps=1).fit(Plain(), loader(), loader())


def test_bad_batch() -> None:
    with pytest.raises(InputError, match=r"a batch must be a tuple \(x, y, …\), got dict"):
        trainer(evaluation()).validate(
            Embedding(), DataLoader([{"image": torch.zeros(1)}], batch_size=None), verbose=False
        )  # type: ignore[arg-type]
