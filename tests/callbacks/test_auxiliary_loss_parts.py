"""What an AuxiliaryLoss trains: in the optimizer and in the callback's state, and nowhere in the user's module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler

from tests.auxiliary_runs import Plain, SmallFeatures, StopAt, equal, fit, seeded, weights
from tests.training import digits, quick_trainer
from zoo import hub
from zoo.errors import InputError


class WithPart(Plain):
    """The same by hand, with the part in a group of the optimizer that holds everything."""

    def __init__(self, callback: SmallFeatures, dropout: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)  # the state in which `fit` starts
            self.part = callback.build(None, self)  # type: ignore[arg-type]
        assert self.part is not None
        self.part[1].p = 0.3 if dropout else 0.0

    def training_step(self, batch: Any) -> Any:
        net = self.model
        hidden = net.hidden(net.drop(net.act(net.first(net.flat(batch[0])))))
        loss = F.cross_entropy(net.head(hidden), batch[1])
        self.draw()
        return loss + 0.5 * self.part(hidden).square().mean()


class NoDropout(SmallFeatures):
    def build(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        part = super().build(trainer, pl_module)
        part[1].p = 0.0
        return part


@pytest.mark.parametrize(
    "mode", [{}, {"accumulate_grad_batches": 4, "max_steps": 5}, {"gradient_clip_val": 0.1}], ids=str
)
def test_identity_with_a_part_written_by_hand(mode: dict[str, Any]) -> None:
    callback = NoDropout(trained=True)
    ours, by_hand = seeded(), seeded(lambda: WithPart(SmallFeatures(trained=True), dropout=False))
    fit(ours, callback, **mode)
    fit(by_hand, **mode)
    part = {f"part.{name}": value for name, value in weights(callback.part).items()}
    assert equal({**weights(ours), **part}, weights(by_hand))


def test_random_numbers_of_the_user_are_not_shifted() -> None:
    """The dropout of the part, and its initialisation, draw from a stream of their own."""
    ours, without = seeded(), seeded()
    fit(ours, SmallFeatures(trained=True))
    fit(without)
    assert ours.seen == without.seen


def test_part_is_the_callbacks(tmp_path: Path) -> None:
    module, callback = seeded(), SmallFeatures(trained=True)
    seen: dict[str, Any] = {}

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            seen["state"] = list(pl_module.state_dict())
            seen["pushed"] = list(hub.snapshot(pl_module).tensors)
            seen["inside"] = [name for name, _ in pl_module.named_parameters()]
            if trainer.global_step == 1:
                seen["first"] = weights(callback.part)
                # Strict loading in the middle of a fit does not miss the part.
                assert pl_module.load_state_dict(pl_module.state_dict()).missing_keys == []

    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    torch.manual_seed(1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
        limit_val_batches=0, callbacks=[callback, Looks(), checkpoints],
    )  # fmt: skip
    trainer.fit(module, digits(train_samples=160, batch_size=16))
    own = list(Plain().state_dict())
    assert seen["state"] == own == list(module.state_dict())
    assert seen["pushed"] == own
    assert [name for name in seen["inside"] if name not in own] == [
        "auxiliary_small.part.0.weight",
        "auxiliary_small.part.0.bias",
    ]
    assert not torch.equal(seen["first"]["0.weight"], callback.part[0].weight)  # type: ignore[index, union-attr]
    checkpoint = torch.load(next(tmp_path.glob("*step=20.ckpt")), weights_only=True)
    assert list(checkpoint["state_dict"]) == own
    assert torch.equal(
        checkpoint["callbacks"][callback.state_key]["part"]["0.weight"],
        callback.part[0].weight,  # type: ignore[index, union-attr]
    )
    Plain().load_state_dict(checkpoint["state_dict"], strict=True)


@pytest.mark.parametrize("trained", [False, True])
def test_resume_equals_uninterrupted(tmp_path: Path, trained: bool) -> None:
    """Ten steps, a checkpoint, ten more in new objects from another seed: the same weights, part and momentum."""

    class NoDraws(Plain):  # what the user draws is the user's to resume
        def training_step(self, batch: Any) -> Any:
            self.model.drop.p = 0.0
            return super().training_step(batch)

    whole, callback = seeded(NoDraws), SmallFeatures(trained=trained)
    trainer = fit(whole, callback)
    half = seeded(NoDraws)
    fit(half, SmallFeatures(trained=trained), StopAt(10)).save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    resumed, again = NoDraws(), SmallFeatures(trained=trained)
    after = quick_trainer(max_epochs=2, callbacks=[again])
    after.fit(
        resumed, digits(train_samples=160, batch_size=16), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True
    )
    assert equal(weights(whole), weights(resumed))
    if trained:
        assert equal(weights(callback.part), weights(again.part))
    a, b = trainer.optimizers[0].state_dict(), after.optimizers[0].state_dict()
    assert len(a["state"]) == 6 + 2 * trained
    assert all(torch.equal(a["state"][i]["momentum_buffer"], b["state"][i]["momentum_buffer"]) for i in a["state"])


def schedule(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    made: Any = {
        "step": lambda: lr_scheduler.StepLR(optimizer, 3, 0.5),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 20),
        "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=21),
        "warm up": lambda: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 17)],
            [3],
        ),
        "plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    }[name]()
    extra = {"monitor": "train/small", "strict": False} if name == "plateau" else {}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step", **extra}}


@pytest.mark.parametrize("name", ["step", "cosine", "lambda", "one cycle", "warm up", "plateau"])
@pytest.mark.filterwarnings("ignore:.*epoch parameter in .scheduler.step.*")
def test_schedulers_keep_working(name: str) -> None:
    """The part follows the schedule of the group it joined; the keys of a learning rate monitor do not change."""
    rates: list[list[list[float]]] = []

    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            return schedule(name, torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9))

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            rates[-1].append([group["lr"] for group in trainer.optimizers[0].param_groups])

    for callbacks in ([SmallFeatures(trained=True)], [SmallFeatures()]):
        rates.append([])
        fit(seeded(Scheduled), *callbacks, Notes())
    if name != "plateau":
        assert rates[0] == rates[1]
        assert len({rate[0] for rate in rates[0]}) > 2


def test_users_optimizer_sees_the_users_parameters_only() -> None:
    class Groups(Plain):
        def configure_optimizers(self) -> Any:
            assert [name for name, _ in self.named_parameters()] == [name for name, _ in Plain().named_parameters()]
            slow, fast = list(self.model.first.named_parameters()), list(self.model.head.named_parameters())
            groups = [{"params": slow, "lr": 0.01, "weight_decay": 0.1}, {"params": fast, "lr": 0.2}]
            return torch.optim.AdamW(groups, weight_decay=0.3)

    callback = SmallFeatures(trained=True)
    trainer = fit(seeded(Groups), callback)
    slow, fast = trainer.optimizers[0].param_groups
    assert (len(slow["params"]), len(fast["params"])) == (2, 4)  # that of the highest learning rate
    assert fast["param_names"][2:] == ["auxiliary_small.part.0.weight", "auxiliary_small.part.0.bias"]
    assert trainer.optimizers[0].state[callback.part[0].weight]["step"] == 20  # type: ignore[index, union-attr]


def test_bad_checkpoints(tmp_path: Path) -> None:
    fit(seeded(), StopAt(5)).save_checkpoint(tmp_path / "without.ckpt")
    fit(seeded(), SmallFeatures(), SmallFeatures(["model.act"]), StopAt(5)).save_checkpoint(tmp_path / "none.ckpt")

    with pytest.raises(InputError, match=r"written without this SmallFeatures .*fit without ckpt_path"):
        fit(seeded(), SmallFeatures(["model.first"], trained=True), SmallFeatures(), SmallFeatures(["model.act"]),
            ckpt=str(tmp_path / "none.ckpt"))  # fmt: skip
    with pytest.raises(
        InputError, match=r"another trained part in the checkpoint \(none\) than in this run \(0.weight"
    ):
        fit(seeded(), SmallFeatures(trained=True), SmallFeatures(["model.act"]), ckpt=str(tmp_path / "none.ckpt"))
    with pytest.raises(InputError, match=r"written without this SmallFeatures"):
        fit(seeded(), SmallFeatures(trained=True), ckpt=str(tmp_path / "without.ckpt"))


def test_checkpoint_serves_other_stages(tmp_path: Path) -> None:
    callback = SmallFeatures(trained=True)
    module = seeded()
    fit(module, callback, max_steps=3).save_checkpoint(tmp_path / "a.ckpt")
    other = Plain()
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                         enable_checkpointing=False, callbacks=[SmallFeatures(trained=True)])  # fmt: skip
    trainer.validate(other, digits(), ckpt_path=str(tmp_path / "a.ckpt"), weights_only=True, verbose=False)
    assert equal(weights(other), weights(module))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback.*")
def test_bad_weight_averaging() -> None:
    with pytest.raises(InputError, match="WeightAveraging would mistake for the module's"):
        fit(seeded(), SmallFeatures(trained=True), pl.callbacks.WeightAveraging())


def test_bad_strategy() -> None:
    trainer = quick_trainer(max_steps=1, callbacks=[callback := SmallFeatures()])
    trainer.strategy.__class__ = type("SplitStrategy", (pl.strategies.Strategy,), {})
    with pytest.raises(InputError, match="cannot add its loss under SplitStrategy: use DDP or one device"):
        callback.setup(trainer, Plain(), "fit")
