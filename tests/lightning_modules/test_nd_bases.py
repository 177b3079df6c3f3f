"""NDDistillation with maps (ReviewKD++), with soft labels, and with a teacher that lies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.lightning_modules.nd import NDDistillation

import zoo
from tests.training import IN_CHANS, digits, quick_trainer, small_distillation, small_network
from zoo import towers
from zoo.errors import InputError


def review_kd(student: Any = "zoo/resnet8", teacher: Any = "zoo/resnet14", **options: Any) -> NDDistillation:
    torch.manual_seed(0)
    return small_distillation(base="review_kd", student=student, teacher=teacher, warmup_epochs=0, **options)


def hcl_by_hand(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Spec section 3: MSE, and MSEs after pooling to 4, 2 and 1 cells with weights 1/2, 1/4, 1/8, over their sum."""
    total = torch.zeros(())
    for s, t in zip(student, teacher, strict=True):
        level, weights, weight = F.mse_loss(s, t), 1.0, 1.0
        for cells in (4, 2, 1):
            if s.ndim == 4 and cells < s.shape[2]:
                weight /= 2
                pooled = F.mse_loss(F.adaptive_avg_pool2d(s, cells), F.adaptive_avg_pool2d(t, cells))
                level, weights = level + weight * pooled, weights + weight
        total = total + level / weights
    return total


def test_identity_review_kd_compares_stages_and_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model = review_kd(nd_weight=0, kd_weight=1.5)
    monkeypatch.setattr(model, "log_dict", lambda *a, **k: None)
    model.eval()  # batch norm without side effects, so that it can be run twice
    x, y = next(iter(digits(batch_size=8).train_dataloader()))
    loss = model.training_step((x, y), 0)

    maps: dict[str, Tensor] = {}
    student, teacher = model.student, model.teacher.network
    for stage in ("layer1", "layer2", "layer3"):
        student.get_submodule(stage).register_forward_hook(lambda _m, _a, out, s=stage: maps.__setitem__(f"s.{s}", out))
        # The teacher's maps in front of the last ReLU of a stage, the student's behind it.
        last = teacher.get_submodule(stage)[-1].relu2
        last.register_forward_pre_hook(lambda _m, args, s=stage: maps.__setitem__(f"t.{s}", args[0].clone()))
    for name, network in (("s", student), ("t", teacher)):
        network.fc.register_forward_pre_hook(lambda _m, args, n=name: maps.__setitem__(f"{n}.fc", args[0]))
    logits = student(x)
    teacher(x)
    keys = ("layer1", "layer2", "layer3", "fc")
    fused = model.fusion([maps[f"s.{key}"] for key in keys], [maps[f"t.{key}"].shape[2:] for key in keys])
    expected = F.cross_entropy(logits, y) + 1.5 * hcl_by_hand(fused, [maps[f"t.{key}"] for key in keys])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("zoo/resnet8", "zoo/resnet8x4"),
        ("zoo/resnet8", "vit"),
        ("vit", "timm/resnet10t"),
        ("torchvision/resnet18", "zoo/resnet8"),
    ],
)
def test_review_kd_for_cnn_and_vit_pairs(student: str, teacher: str) -> None:
    def options(name: str) -> dict[str, Any]:
        if name == "vit":
            return {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "in_chans": 3}
        return {} if name.startswith("torchvision") else {"in_chans": 3}

    def name(of: str) -> str:
        return "timm/vit_tiny_patch16_224" if of == "vit" else of

    model = NDDistillation(
        name(student), name(teacher), num_classes=10, base="review_kd", warmup_epochs=0,
        student_options=options(student), teacher_options=options(teacher),
    )  # fmt: skip
    trainer = quick_trainer(max_steps=2)
    trainer.fit(model, digits(train_samples=32, batch_size=16, image_size=16, channels=3))
    assert 0 < float(trainer.callback_metrics["train/review_kd"]) < 1e4
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_the_fusion_is_trained_and_not_stored(tmp_path: Path) -> None:
    model = review_kd()
    before = {name: value.clone() for name, value in model.fusion.state_dict().items()}
    quick_trainer(max_steps=2).fit(model, digits(train_samples=64, batch_size=32))
    weights = [name for name in before if name.endswith("weight")]
    assert all(not torch.equal(before[name], model.fusion.state_dict()[name]) for name in weights)
    folder = model.save_pretrained(tmp_path)
    again = zoo.from_pretrained(folder)
    assert again.fusion is None
    x = torch.randn(2, IN_CHANS, 8, 8)
    assert torch.equal(again(x), model.eval()(x))


def test_review_kd_layers_by_name() -> None:
    model = review_kd(student_layers=["layer2"], teacher_layers=["layer3.0.relu2:input"])
    assert model.student_stages.names == ("layer2",)
    quick_trainer(max_steps=1).fit(model, digits(train_samples=32, batch_size=32))
    with pytest.raises(InputError, match=r"no module 'layer22'.*layer2"):
        review_kd(student_layers=["layer22"])
    with pytest.raises(InputError, match="must be equally many, got 1 and 2"):
        review_kd(student_layers=["layer1"], teacher_layers=["layer1", "layer2"])


def test_review_kd_compiled_step_equals_eager() -> None:
    def losses(compiled: bool) -> list[float]:
        model = review_kd()
        if compiled:
            model.student.compile(backend="aot_eager")
        trainer = quick_trainer(max_steps=3)
        trainer.fit(model, digits(train_samples=96, batch_size=32))
        return [parameter.double().sum().item() for parameter in model.student.parameters()]

    assert losses(True) == pytest.approx(losses(False), rel=1e-4, abs=1e-4)


class MixupDigits(zoo.DigitsDataModule):
    """Digits whose training batches are mixed by timm, as in its recipes."""

    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is not None
        if not self.trainer.training or self.trainer.sanity_checking:
            return batch
        x, targets = self.mixup(batch[0], batch[1])
        return x, targets.to(x.dtype)


@pytest.mark.parametrize("base", ["kd", "dkd", "dist", "review_kd"])
def test_mixup_and_cutmix(base: str) -> None:
    torch.manual_seed(0)
    model = small_distillation(base=base, nd_weight=1.0, warmup_epochs=0)
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, MixupDigits(train_samples=64, batch_size=32))
    assert int(model.class_counts.sum()) == 64
    assert 0 < float(trainer.callback_metrics["train/nd"]) < 2
    assert float(trainer.callback_metrics["train/ce"]) > 0


@pytest.mark.parametrize("base", ["kd", "dkd", "dist", "review_kd"])
def test_identity_one_hot_soft_labels_are_labels(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_distillation(base=base, nd_weight=1.0, warmup_epochs=0).eval()
    monkeypatch.setattr(model, "log_dict", lambda *a, **k: None)
    monkeypatch.setattr(NDDistillation, "_log_statistics", lambda *a: None)
    monkeypatch.setattr(model, "_trainer", type("T", (), {"world_size": 1})())
    model.class_means.copy_(torch.rand(model.class_means.shape))
    x, y = next(iter(digits(batch_size=16).train_dataloader()))
    hard, soft = model.training_step((x, y), 0), model.training_step((x, F.one_hot(y, 10).float()), 0)
    torch.testing.assert_close(hard, soft)


# -- a teacher on the disk -----------------------------------------------------------------------------------------


def cached(path: Path | None, teacher: Any = None, **options: Any) -> NDDistillation:
    torch.manual_seed(0)
    return NDDistillation(
        "zoo/resnet8", teacher or small_network("zoo/resnet14"), 10, student_options={"in_chans": IN_CHANS},
        warmup_epochs=0, class_mean_views=1, teacher_cache=None if path is None else str(path), **options,
    )  # fmt: skip


def train(model: NDDistillation, epochs: int = 2, **options: Any) -> NDDistillation:
    trainer = quick_trainer(max_epochs=epochs)
    trainer.fit(model, digits(train_samples=96, batch_size=32, with_index=True), **options)
    return model


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def test_identity_a_cached_teacher_trains_the_same_weights(tmp_path: Path) -> None:
    live = train(cached(None))
    building = train(cached(tmp_path / "teacher.safetensors"))
    reading = train(cached(tmp_path / "teacher.safetensors"))
    assert "teacher" in live.frozen_towers
    assert not building.frozen_towers
    assert not reading.frozen_towers
    # A row is computed in another batch than the live teacher's, which may round in the last bit.
    for model in (building, reading):
        for ours, theirs in zip(weights_of(model), weights_of(live), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.class_means, live.class_means)


def test_a_named_teacher_is_not_built_when_its_cache_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = zoo.Classifier("zoo/resnet14", 10, student_options={"in_chans": IN_CHANS}).save_pretrained(tmp_path / "t")
    path = tmp_path / "teacher.safetensors"
    first = train(cached(path, str(teacher)))
    created: list[Any] = []
    real = towers.create
    monkeypatch.setattr(towers, "create", lambda name, **k: (created.append(name), real(name, **k))[1])
    model = cached(path, str(teacher))
    assert created == ["zoo/resnet8"]
    train(model)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(first), weights_of(model), strict=True))
    # What is stored knows the teacher as if it had been there, and nothing of this machine's paths.
    folder = model.save_pretrained(tmp_path / "stored")
    config = (folder / "config.json").read_text()
    assert "teacher.safetensors" not in config
    assert zoo.from_pretrained(folder, for_training=True).frozen_towers["teacher"].fingerprint in config


def test_a_cached_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    teacher = small_network("zoo/resnet14")
    whole = train(cached(path, teacher), epochs=4)
    half = cached(path, teacher)
    # The schedule of the default optimizer depends on max_epochs: stop in the middle of a run that was meant for four.
    trainer = quick_trainer(max_epochs=4, callbacks=[StopAfter(2)])
    trainer.fit(half, digits(train_samples=96, batch_size=32, with_index=True))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = train(cached(path, teacher), epochs=4, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(whole), weights_of(resumed), strict=True))
    other = cached(None, small_network("zoo/resnet20"))
    with pytest.raises(InputError, match=r"the teacher .* is not the one this model was trained with"):
        train(other, epochs=4, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)


class StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def test_bad_cached_runs(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    with pytest.raises(InputError, match=r"base='review_kd' compares maps: leave teacher_cache out"):
        review_kd(teacher_cache=str(path))
    with pytest.raises(InputError, match="with_index=true"):
        quick_trainer(max_epochs=1).fit(cached(tmp_path / "first"), digits(train_samples=96, batch_size=32))
    with pytest.raises(InputError, match="transform is random"):
        quick_trainer(max_epochs=1).fit(
            cached(tmp_path / "other.safetensors"),
            digits(train_samples=96, batch_size=32, augment=True, with_index=True),
        )
    teacher = small_network("zoo/resnet14")
    train(cached(path, teacher), epochs=1)
    with pytest.raises(InputError, match="96 samples, the training data have 64"):
        quick_trainer(max_epochs=1).fit(cached(path, teacher), digits(train_samples=64, batch_size=32, with_index=True))
    with pytest.raises(InputError, match="holds another teacher"):
        train(cached(path, small_network("zoo/resnet20")))
