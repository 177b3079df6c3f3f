"""NDDistillation: what it optimises, what it keeps frozen, what it stores, and that it resumes to the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.lightning_modules.nd import NDDistillation

import zoo
from tests.training import IN_CHANS, digits, quick_trainer, small_distillation, small_network
from zoo.errors import InputError
from zoo.projector import Projector


def nd_by_hand(s: Tensor, t: Tensor, means: Tensor, y: Tensor) -> Tensor:
    """1 - <s, e_y> / max(|s|, |t|), sample by sample, as spec section 1.1 writes it."""
    terms = []
    for i in range(len(s)):
        e = means[y[i]] / means[y[i]].norm()
        terms.append(1 - (s[i] @ e) / max(s[i].norm(), t[i].norm()))
    return torch.stack(terms).mean()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    return next(iter(digits(batch_size=16).train_dataloader()))


class FakeTrainer:
    world_size = 1
    current_epoch = 0
    global_step = 1
    log_every_n_steps = 50


def attached(model: NDDistillation, epoch: int, monkeypatch: pytest.MonkeyPatch) -> NDDistillation:
    """A model outside a Trainer, at a given epoch, with given class means and no logging."""
    monkeypatch.setattr(NDDistillation, "current_epoch", epoch, raising=False)
    monkeypatch.setattr(NDDistillation, "global_step", 1, raising=False)
    model._trainer = FakeTrainer()  # type: ignore[assignment]
    monkeypatch.setattr(model, "log", lambda *a, **k: None)
    monkeypatch.setattr(model, "log_dict", lambda *a, **k: None)
    if model.class_means is not None:
        model.class_means.copy_(torch.rand(model.class_means.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("epoch", [0, 5, 40])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 2.0), (0.5, 2.5, 0.7)])
def test_identity_training_step_is_the_objective(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, epoch: int, weights: tuple[float, float, float]
) -> None:
    ce_weight, kd_weight, nd_weight = weights
    model = small_distillation(ce_weight=ce_weight, kd_weight=kd_weight, nd_weight=nd_weight, warmup_epochs=20)
    model = attached(model, epoch, monkeypatch).eval()  # batch norm without side effects, so that it can be run twice
    x, y = batch
    loss = model.training_step(batch, 0)

    network, teacher = model.student, model.teacher.network
    features: dict[str, Tensor] = {}
    for name, net in (("s", network), ("t", teacher)):
        net.fc.register_forward_pre_hook(lambda _m, args, name=name: features.__setitem__(name, args[0]))
    logits, teacher_logits = network(x), teacher(x)
    kl = F.kl_div(
        (logits / 4).log_softmax(1), (teacher_logits / 4).log_softmax(1), log_target=True, reduction="batchmean"
    )
    expected = (
        ce_weight * F.cross_entropy(logits, y)
        + min(1, epoch / 20) * kd_weight * 16 * kl
        + nd_weight * nd_by_hand(features["s"], features["t"], model.class_means, y)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_identity_ramps(batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """In epoch 0 of a ramp over both terms, cross-entropy is all there is (epochs count from 0)."""
    model = attached(small_distillation(warmup_epochs=20, nd_warmup_epochs=5), 0, monkeypatch).eval()
    torch.testing.assert_close(model.training_step(batch, 0), F.cross_entropy(model.student(batch[0]), batch[1]))


@pytest.mark.parametrize("base", ["kd", "dkd", "dist"])
@pytest.mark.parametrize("width", ["zoo/resnet8", "zoo/resnet8x4"])
def test_bases_train_for_equal_and_different_widths(base: str, width: str) -> None:
    torch.manual_seed(0)
    model = small_distillation(base=base, teacher=width, warmup_epochs=0)
    trainer = quick_trainer(max_steps=6)
    trainer.fit(model, digits(train_samples=64, batch_size=32))
    assert (model.projector is not None) == (width == "zoo/resnet8x4")
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert {f"train/{base}", "train/nd", "train/ce", "nd/reward", "nd/longer_share"} <= trainer.callback_metrics.keys()


def test_only_student_and_projector_move() -> None:
    torch.manual_seed(0)
    model = small_distillation(teacher="zoo/resnet8x4", warmup_epochs=0)
    teacher_before = {k: v.clone() for k, v in model.teacher.network.state_dict().items()}
    before = {k: v.clone() for k, v in model.named_parameters()}
    quick_trainer(max_steps=3).fit(model, digits(train_samples=64, batch_size=32))
    for name, value in model.teacher.network.state_dict().items():
        assert torch.equal(value, teacher_before[name]), name
    assert not any(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert not any("teacher" in name for name in model.state_dict())
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_teacher_is_frozen_through_train_and_moves_with_the_module() -> None:
    model = small_distillation()
    model.train()
    assert model.student.training
    assert not any(module.training for module in model.teacher.network.modules())
    model.to(torch.float64)
    assert next(model.teacher.parameters()).dtype == torch.float64
    owned = {id(p) for p in model.parameters()}
    assert not owned & {id(p) for p in model.teacher.parameters()}


def test_control_builds_and_computes_nothing_of_nd(batch: tuple[Tensor, Tensor]) -> None:
    """With weight 0 the run differs from KD++ in the ND term alone: same start, no projector, no class means."""
    torch.manual_seed(3)
    control = small_distillation(nd_weight=0.0, teacher="zoo/resnet8x4")
    torch.manual_seed(3)
    method = small_distillation(nd_weight=1.0, teacher="zoo/resnet8x4")
    assert control.projector is None
    assert control.class_means is None
    for (name, a), (_, b) in zip(
        control.student.state_dict().items(), method.student.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_class_means_once_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_distillation(warmup_epochs=0)
    data = digits(train_samples=90, batch_size=32)
    quick_trainer(max_epochs=1).fit(model, data)
    with torch.no_grad():
        rows = [(model.teacher.features(x), y) for x, y in data.train_eval_dataloader()]
    features, labels = torch.cat([f for f, _ in rows]), torch.cat([y for _, y in rows])
    expected = torch.stack([features[labels == k].double().mean(0) for k in range(10)]).float()
    torch.testing.assert_close(model.class_means, expected, rtol=1e-6, atol=1e-6)
    assert model.class_counts.tolist() == labels.bincount(minlength=10).tolist()

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("class means were computed a second time")

    monkeypatch.setattr("zoo.lightning_modules.nd.compute_class_means", again)
    quick_trainer(max_epochs=1).fit(model, data)


def test_class_mean_views_are_those_of_the_first_epochs() -> None:
    """Two views: every image counts twice, under the augmentations of epochs 0 and 1; loaders without a module do too."""
    data = digits(train_samples=50, batch_size=50, augment=True)
    data.setup()
    model = small_distillation(class_mean_views=2)
    quick_trainer(max_epochs=1).fit(model, data.train_dataloader())
    rows = []
    for epoch in (0, 1):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        x, y = next(iter(loader))
        with torch.no_grad():
            rows.append((model.teacher.features(x), y))
    assert not torch.equal(rows[0][0].sort(0).values, rows[1][0].sort(0).values)
    features, labels = torch.cat([f for f, _ in rows]), torch.cat([y for _, y in rows])
    expected = torch.stack([features[labels == k].double().mean(0) for k in range(10)]).float()
    torch.testing.assert_close(model.class_means, expected, rtol=1e-5, atol=1e-6)
    assert int(model.class_counts.sum()) == 100


def test_class_mean_pass_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with class means given beforehand and computed in the run gives the same weights."""
    weights = []
    means = None
    for _ in range(2):
        torch.manual_seed(5)
        model = small_distillation(teacher="zoo/resnet8x4", warmup_epochs=0)  # a projector with dropout draws numbers
        if means is not None:
            model.class_means.copy_(means[0])
            model.class_counts.copy_(means[1])
        quick_trainer(max_steps=3).fit(model, digits(train_samples=64, batch_size=32))
        means = (model.class_means.clone(), model.class_counts.clone())
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_missing_class_warns_and_trains() -> None:
    x, y = next(iter(digits(batch_size=64).train_dataloader()))
    keep = y != 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[keep], y[keep]), batch_size=16)
    model = small_distillation()
    with pytest.warns(UserWarning, match=r"classes \[3\] have no training image"):
        quick_trainer(max_epochs=1).fit(model, loader)
    assert torch.equal(model.class_means[3], torch.zeros(64))


@pytest.mark.parametrize("teacher", ["zoo/resnet8", "zoo/resnet8x4"])
def test_resume_equals_uninterrupted(tmp_path: Path, teacher: str) -> None:
    """Two epochs, a checkpoint, two more in new objects: the same weights as four epochs, dropout and order included."""

    def build() -> NDDistillation:
        torch.manual_seed(7)
        return small_distillation(teacher=teacher, warmup_epochs=2)

    def fit(model: NDDistillation, epochs: int, ckpt: str | None = None) -> pl.Trainer:
        trainer = quick_trainer(max_epochs=epochs)
        trainer.fit(model, digits(train_samples=96, batch_size=32), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return trainer

    whole = build()
    fit(whole, 4)
    half = build()
    # The schedule of the default optimizer depends on max_epochs: stop in the middle of a run that was meant for four.
    trainer = quick_trainer(max_epochs=4, callbacks=[StopAfter(2)])
    trainer.fit(half, digits(train_samples=96, batch_size=32))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(12345)
    resumed = build()
    torch.rand(17)
    fit(resumed, 4, str(tmp_path / "half.ckpt"))
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


class StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def test_checkpoint_round_trip_by_lightning(tmp_path: Path) -> None:
    model = small_distillation(student="zoo/resnet8", teacher=None)
    trainer = quick_trainer(max_epochs=1)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = NDDistillation.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(loaded.student.fc.weight, model.student.fc.weight)


def test_bad_teacher_of_another_run(tmp_path: Path) -> None:
    model = small_distillation()
    trainer = quick_trainer(max_steps=1)
    trainer.fit(model, digits(train_samples=32))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = small_distillation()  # a bare architecture: other random weights
    with pytest.raises(InputError, match=r"the teacher \(zoo/resnet8\) is not the one.*random weights"):
        quick_trainer(max_steps=2).fit(other, digits(train_samples=32), ckpt_path=str(tmp_path / "a.ckpt"))


def test_bf16_teacher_with_fp32_student() -> None:
    teacher = small_network().to(torch.bfloat16)
    model = small_distillation(teacher=teacher, warmup_epochs=0)
    trainer = quick_trainer(max_steps=2)
    trainer.fit(model, digits(train_samples=64, batch_size=32))
    assert next(model.teacher.parameters()).dtype == torch.bfloat16
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_half_precision_autocast() -> None:
    model = small_distillation(teacher="zoo/resnet8x4", warmup_epochs=0)
    trainer = quick_trainer(max_steps=2, precision="bf16-mixed")
    trainer.fit(model, digits(train_samples=64, batch_size=32))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert model.class_means.dtype == torch.float32


def test_batch_of_one_with_a_projector() -> None:
    """65 images in batches of 32 leave a last batch of one; it is normalised with the running statistics."""
    model = small_distillation(teacher="zoo/resnet8x4", warmup_epochs=0)
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, digits(train_samples=65, batch_size=32))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])

    projector = Projector(4, 3, dropout=0.0)
    projector(torch.randn(8, 4))
    mean, var = projector.norm.running_mean.clone(), projector.norm.running_var.clone()
    x = torch.randn(1, 4)
    expected = projector.linear((x - mean) / (var + projector.norm.eps).sqrt())
    torch.testing.assert_close(projector(x), expected)
    assert torch.equal(projector.norm.running_mean, mean)


def test_nan_features_are_not_hidden(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = attached(small_distillation(), 5, monkeypatch)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.student.layer3[0].conv1.weight[0] = float("nan")
    assert torch.isnan(model.training_step(batch, 0))
    with pytest.raises(InputError, match=r"student.layer3.0.conv1.weight holds non-finite values"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before

    with torch.no_grad():
        model.teacher.network.conv1.weight.fill_(float("nan"))
    model.student = small_network()
    fresh = NDDistillation(small_network(), model.teacher.network, 10)
    with pytest.raises(InputError, match="finite"):
        quick_trainer(max_steps=1).fit(fresh, digits(train_samples=32))


def test_hooks_live_in_fit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_distillation()
    quick_trainer(max_steps=1).fit(model, digits(train_samples=32))
    assert not model.student.fc._forward_pre_hooks
    assert not model.teacher.network.fc._forward_pre_hooks


def test_compiled_step_equals_eager() -> None:
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = small_distillation(warmup_epochs=0)
        if compiled:
            model.student.compile(backend="aot_eager")
        quick_trainer(max_steps=3).fit(model, digits(train_samples=64, batch_size=32))
        weights.append(model.student.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_ready_modules() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    model = NDDistillation(student, teacher, warmup_epochs=0)
    assert model.num_classes == 10
    assert model.student is student
    assert model.projector is not None
    quick_trainer(max_steps=2).fit(model, digits(train_samples=64, batch_size=32))


def test_timm_names_as_in_the_readme() -> None:
    model = zoo.NDDistillation(student="timm/resnet10t", teacher="timm/resnet14t", num_classes=10)
    assert model.student.get_classifier().out_features == 10
    assert model.teacher.num_classes == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": small_network(num_classes=7)}, "teacher has 7 classes and the student 10"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"nd_weight": -1.0}, "nd_weight must not be negative, got -1.0"),
        ({"warmup_epochs": -1}, "warmup_epochs must not be negative"),
        ({"class_mean_views": 0}, "class_mean_views must be at least 1 or None, got 0"),
        ({"base": "fitnet"}, "base must be one of kd, dkd, dist, review_kd, got 'fitnet'"),
        ({"nd_reduction": "sum"}, "nd_reduction must be one of mean, class"),
        ({"student": "zoo/resnet9"}, r"no architecture 'resnet9'. Did you mean resnet8"),
        ({"student": small_network(), "student_options": {"head": "fc"}}, "student_options may not hold head"),
        ({"student_head": "fcc"}, r"no module 'fcc'. Did you mean fc"),
        ({"student": small_network(num_classes=2), "num_classes": 2, "base": "dkd"}, "needs 3 or more, got 2"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_distillation(**options)


def test_bad_fit_without_teacher() -> None:
    with pytest.raises(InputError, match=r"training needs a teacher.*for_training=True"):
        quick_trainer(max_steps=1).fit(small_distillation(teacher=None), digits(train_samples=32))


def test_bad_labels() -> None:
    x = torch.randn(8, IN_CHANS, 8, 8)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(8) + 5), batch_size=8)
    with pytest.raises(InputError, match="12"):
        quick_trainer(max_steps=1).fit(small_distillation(), data)
    with pytest.raises(InputError, match=r"labels must be in 0 … 9 \(num_classes=10\), got 5 … 12"):
        quick_trainer(max_steps=1).fit(small_distillation(nd_weight=0.0), data)
