"""NDRegularizer: the step of a module that adds the ND loss by hand, with a teacher that nobody else sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.callbacks.nd_regularizer import NDRegularizer

from tests.auxiliary_runs import Plain, StopAt, equal, fit, regularizer, seeded, teacher_network, weights
from tests.training import digits, quick_trainer, small_network
from zoo import hub
from zoo.losses import nd_loss
from zoo.projector import Projector


def class_means(teacher: nn.Module, rows: Any, classes: int = 10) -> Tensor:
    """Arithmetic means of the input of the classifier, spec section 1.6."""
    body = nn.Sequential(*list(teacher.children())[:-1]).eval()
    with torch.no_grad():
        features = torch.cat([body(x) for x, _ in rows])
    labels = torch.cat([y for _, y in rows])
    return torch.stack([features[labels == k].double().mean(0) for k in range(classes)]).float()


class ByHand(Plain):
    """ND written into the step: r = <s, e_y> / max(|s|, |t|), section 1.1 of the spec, in the zoo's own function."""

    def __init__(self, means: Tensor, ramp: int = 0, projector: Projector | None = None) -> None:
        super().__init__()
        self.means, self.ramp, self.projector = means, ramp, projector
        self.teacher = [teacher_network(means.shape[1]).eval()]  # in a list: no submodule

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        net, teacher = self.model, self.teacher[0]
        hidden = net.hidden(net.drop(net.act(net.first(net.flat(x)))))
        loss = F.cross_entropy(net.head(hidden), y)
        self.draw()
        with torch.no_grad():
            features = teacher[:-1](x.to(next(teacher.parameters()).dtype))
        student = hidden if self.projector is None else self.projector(hidden)
        ramp = min(1.0, self.current_epoch / self.ramp) if self.ramp else 1.0
        return loss + 1.5 * ramp * nd_loss(student, features, self.means, y)


@pytest.mark.parametrize(
    "mode", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 4}, {"warmup_epochs": 4}], ids=str
)
def test_identity_with_a_step_written_by_hand(mode: dict[str, Any]) -> None:
    ramp = {"warmup_epochs": mode.pop("warmup_epochs")} if "warmup_epochs" in mode else {}
    ours, callback = seeded(), regularizer(**ramp)
    fit(ours, callback, **mode)
    assert callback.part is None
    by_hand = seeded(lambda: ByHand(callback.class_means, ramp.get("warmup_epochs", 0)))
    fit(by_hand, **mode)
    without = seeded()
    fit(without, **mode)
    assert equal(weights(ours), weights(by_hand))
    assert not equal(weights(ours), weights(without))
    assert ours.seen == without.seen


def test_identity_with_a_projector_written_by_hand() -> None:
    """Another width: the projector is trained by the user's optimizer, with its learning rate, momentum and decay."""
    ours, callback = seeded(), regularizer(width=20, projector_dropout=0.0)
    projector = Projector(12, 20, dropout=0.0)

    class Start(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            projector.load_state_dict(callback.part.state_dict())  # type: ignore[union-attr]

    trainer = fit(ours, callback, Start())
    assert not equal(weights(callback.part), weights(projector))  # type: ignore[arg-type]
    by_hand = seeded(lambda: ByHand(callback.class_means, projector=projector))
    fit(by_hand)
    state = weights(by_hand)
    assert equal(weights(callback.part), weights(projector))
    assert equal(weights(ours), {name: value for name, value in state.items() if not name.startswith("projector")})
    assert not any("auxiliary" in name or "projector" in name for name in ours.state_dict())
    assert {"train/nd", "nd/reward", "nd/cosine", "nd/norm_ratio", "nd/longer_share"} <= trainer.callback_metrics.keys()


def test_identity_when_compiled() -> None:
    """Compiled as a whole by torch.compile: the same run, projector included."""
    results = []
    for compiled in (False, True):
        module, callback = seeded(lambda: Plain(draws=False)), regularizer(width=20)
        torch.compiler.reset()
        fit(torch.compile(module, backend="aot_eager") if compiled else module, callback)
        results.append({**weights(module), **weights(callback.part)})
    torch.compiler.reset()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_identity_of_the_loss() -> None:
    """The logged value is 1 - <s, e_y> / max(|s|, |t|), sample by sample."""
    module, callback = seeded(), regularizer()
    module.model.drop.p = 0.0
    seen: list[Tensor] = []

    class Once(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            (x, y), means = batch, callback.class_means
            s, t = pl_module.model[:-1](x), teacher_network()[:-1].eval()(x)
            terms = [
                1 - s[i] @ (means[y[i]] / means[y[i]].norm()) / max(s[i].norm(), t[i].norm()) for i in range(len(x))
            ]
            seen.append(torch.stack(terms).mean().detach())

    trainer = fit(module, Once(), callback, max_epochs=-1, max_steps=1)
    torch.testing.assert_close(trainer.callback_metrics["train/nd"], seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("teacher", ["zoo/resnet8", teacher_network(20)])
def test_identity_of_weight_zero(teacher: Any) -> None:
    ours, without = seeded(), seeded()
    callback = NDRegularizer(teacher, "model.hidden", 0.0)
    trainer = fit(ours, callback)
    fit(without)
    assert equal(weights(ours), weights(without))
    assert ours.seen == without.seen
    assert (callback.part, callback.class_means, callback.state_dict()) == (None, None, {})
    assert "train/nd" not in trainer.callback_metrics


def test_class_means_are_exact_and_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits(train_samples=160, batch_size=16)
    module, callback = seeded(), regularizer()
    trainer = quick_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(module, data)
    torch.testing.assert_close(callback.class_means, class_means(teacher_network(), data.train_eval_dataloader()))
    assert int(callback.class_counts.sum()) == 160  # type: ignore[union-attr]
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("class means were computed a second time")

    monkeypatch.setattr("zoo.callbacks.nd_regularizer.compute_class_means", again)
    resumed = regularizer()
    fit(seeded(), resumed, ckpt=str(tmp_path / "a.ckpt"))
    assert torch.equal(resumed.class_means, callback.class_means)  # type: ignore[arg-type]


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    """Projector with dropout and batch norm, momentum, class means: one epoch and one more is two epochs."""

    class NoDraws(Plain):
        def training_step(self, batch: Any) -> Any:
            self.model.drop.p = 0.0
            return super().training_step(batch)

    whole, callback = seeded(NoDraws), regularizer(width=20)
    trainer = fit(whole, callback)
    fit(seeded(NoDraws), regularizer(width=20), StopAt(10)).save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = seeded(NoDraws, 5), regularizer(width=20)
    torch.rand(7)
    after = fit(resumed, again, ckpt=str(tmp_path / "half.ckpt"))
    assert equal(weights(whole), weights(resumed))
    assert equal(weights(callback.part), weights(again.part))  # type: ignore[arg-type]
    a, b = trainer.optimizers[0].state_dict()["state"], after.optimizers[0].state_dict()["state"]
    assert len(a) == 10
    assert all(torch.equal(a[i]["momentum_buffer"], b[i]["momentum_buffer"]) for i in a)


def test_teacher_is_nobodys(tmp_path: Path) -> None:
    """Not in the module, its optimizer, its checkpoint or what is pushed; frozen, in eval mode, unchanged."""
    teacher = teacher_network(20)
    before = weights(teacher)
    module, callback = seeded(), NDRegularizer(teacher, "model.hidden")
    inside: list[Any] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            own = {id(p) for p in pl_module.parameters()}
            inside.append([p for p in teacher.parameters() if id(p) in own or p.requires_grad or p.grad is not None])
            inside.append([one for one in teacher.modules() if one.training])
            assert list(hub.snapshot(pl_module).tensors) == list(Plain().state_dict())

    trainer = fit(module, callback, Looks(), max_epochs=1)
    assert inside
    assert not any(inside)
    assert equal(before, weights(teacher))
    assert not any(head._forward_pre_hooks for head in teacher.modules())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Plain().state_dict())
    shapes = {tuple(value.shape) for value in before.values()}
    kept = checkpoint["callbacks"][callback.state_key]
    assert not shapes & {tuple(value.shape) for value in kept["part"].values() if value.ndim == 2} - {(20, 12)}
    assert sum(group["params"].__len__() for group in checkpoint["optimizer_states"][0]["param_groups"]) == 10


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_teacher_follows_a_true_precision(precision: str, dtype: torch.dtype) -> None:
    """The network that runs has the module's type, and the user's own is not rounded."""
    teacher = teacher_network(20)
    module, callback = seeded(), NDRegularizer(teacher, "model.hidden")
    seen: list[torch.dtype] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert callback._tower is not None
            seen.append(next(callback._tower.parameters()).dtype)

    trainer = fit(module, callback, Looks(), precision=precision, max_epochs=1)
    assert set(seen) == {dtype}
    assert equal(weights(teacher), weights(teacher_network(20)))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert next(callback.part.parameters()).dtype == dtype  # type: ignore[union-attr]
    assert callback.class_means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)  # type: ignore[union-attr]
    assert torch.isfinite(trainer.callback_metrics["train/nd"])


class Convolutional(Plain):
    """The student as people have it: a network of the zoo inside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_network()


@pytest.mark.parametrize("layer", ["model.layer3", "model.layer2.0", "model.conv1", "model"])
def test_maps_are_averaged_and_widths_observed(layer: str) -> None:
    module = seeded(Convolutional)
    before = weights(module)
    widths = {"model.layer3": 64, "model.layer2.0": 32, "model.conv1": 16, "model": 10}
    callback = NDRegularizer("zoo/resnet8", layer, num_classes=10, teacher_options={"in_chans": 1})
    trainer = quick_trainer(max_steps=2, callbacks=[callback])
    observed: dict[str, Any] = {}

    class Looks(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            observed["equal"] = equal(before, weights(pl_module))

    trainer.callbacks.append(Looks())
    trainer.fit(module, digits(train_samples=64, batch_size=32))
    assert observed["equal"]  # observing a width moves no batch norm
    if widths[layer] == 64:
        assert callback.part is None
    else:
        assert callback.part.norm.num_features == widths[layer]  # type: ignore[union-attr]
    assert module.training


def test_teacher_layer() -> None:
    callback = regularizer(teacher_layer="first")
    fit(seeded(), callback, max_epochs=1)
    teacher = teacher_network()
    rows = list(digits(train_samples=160).train_eval_dataloader())
    features = torch.cat([teacher.first(teacher.flat(x)) for x, _ in rows]).detach()
    labels = torch.cat([y for _, y in rows])
    expected = torch.stack([features[labels == k].mean(0) for k in range(10)])
    torch.testing.assert_close(callback.class_means, expected, rtol=1e-5, atol=1e-6)


def test_two_teachers_side_by_side() -> None:
    first = NDRegularizer("zoo/resnet8", "model.hidden", num_classes=10, teacher_options={"in_chans": 1})
    second = regularizer()
    assert first.state_key != second.state_key
    trainer = fit(seeded(), first, second, max_epochs=1)
    assert {"train/nd", "train/nd_2", "nd/cosine", "nd_2/cosine"} <= trainer.callback_metrics.keys()


def test_sampler_of_the_user_does_not_move() -> None:
    """Observing a width and computing class means take nothing from the order of the training data."""
    orders: list[list[int]] = []

    class Order(torch.utils.data.RandomSampler):
        def __iter__(self) -> Any:
            drawn = list(super().__iter__())
            orders[-1].append(drawn[0])
            return iter(drawn)

    x, y = next(iter(digits(train_samples=64, batch_size=64).train_eval_dataloader()))
    data = torch.utils.data.TensorDataset(x, y)
    for callbacks in ([regularizer(width=20)], []):
        orders.append([])
        sampler = Order(data, generator=torch.Generator().manual_seed(3))
        module = seeded()
        trainer = quick_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16, sampler=sampler))
    assert orders[0] == orders[1]
    assert len(orders[0]) == 2
