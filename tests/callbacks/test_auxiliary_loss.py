"""AuxiliaryLoss: the step is that of a module with the loss written into it, and the module stays the user's."""

from __future__ import annotations

import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.auxiliary_runs import Held, Plain, SmallFeatures, equal, fit, seeded, weights
from zoo.errors import InputError

MODES = [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 4, "max_steps": 5}]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("answer", ["tensor", "dict"])
def test_identity_with_a_step_written_by_hand(mode: dict[str, Any], answer: str) -> None:
    ours, by_hand, without = seeded(lambda: Plain(answer)), seeded(Held), seeded(Plain)
    fit(ours, SmallFeatures(), **mode)
    fit(by_hand, **mode)
    fit(without, **mode)
    assert equal(weights(ours), weights(by_hand))
    assert ours.seen == by_hand.seen
    assert not equal(weights(ours), weights(without))


@pytest.mark.parametrize("how", ["trainer", "module", "network", "compiled before"])
def test_identity_when_compiled(how: str) -> None:
    ours, by_hand = seeded(lambda: Plain(draws=False)), seeded(lambda: Held(draws=False))
    torch.compiler.reset()
    if how == "trainer":
        fit(torch.compile(ours, backend="eager"), SmallFeatures())
    else:
        if how == "network":
            ours.model = torch.compile(ours.model, backend="eager")
        else:
            ours.compile(backend="eager")
        if how == "compiled before":
            with torch.random.fork_rng():
                F.cross_entropy(ours(torch.randn(16, 1, 8, 8)), torch.zeros(16, dtype=torch.int64)).backward()
            ours.zero_grad()
        fit(ours, SmallFeatures())
    fit(by_hand)
    state = {name.replace("_orig_mod.", ""): value for name, value in weights(ours).items()}
    assert equal(state, weights(by_hand))
    torch.compiler.reset()


def test_identity_of_the_ramp() -> None:
    """Over 8 steps of warm-up, the factor of step i is i / 8 and then 1."""

    class Ramped(Held):
        def training_step(self, batch: Any) -> Any:
            hidden = self.model.hidden(self.model.drop(self.model.act(self.model.first(self.model.flat(batch[0])))))
            loss = F.cross_entropy(self.model.head(hidden), batch[1])
            self.draw()
            return loss + 0.5 * min(1.0, self.global_step / 8) * hidden.square().mean()

    ours, by_hand = seeded(Plain), seeded(Ramped)
    callback = SmallFeatures(warmup_steps=8)
    fit(ours, callback)
    fit(by_hand)
    assert equal(weights(ours), weights(by_hand))
    assert [callback.weight_at(step, 0) for step in (0, 4, 8, 80)] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("trained", [False, True])
def test_identity_of_weight_zero(trained: bool) -> None:
    ours, without = seeded(Plain), seeded(Plain)
    callback = SmallFeatures(weight=0.0, trained=trained)
    fit(ours, callback)
    fit(without)
    assert equal(weights(ours), weights(without))
    assert ours.seen == without.seen
    assert (callback.part, callback.listened, callback.state_dict()) == (None, [], {})


def test_two_side_by_side() -> None:
    """Two losses add up, under names and state keys of their own, and leave the module in any order."""

    class Both(Held):
        def training_step(self, batch: Any) -> Any:
            net = self.model
            act = net.act(net.first(net.flat(batch[0])))
            hidden = net.hidden(net.drop(act))
            loss = F.cross_entropy(net.head(hidden), batch[1])
            self.draw()
            return loss + 0.5 * hidden.square().mean() + 2.0 * act.square().mean()

    ours, by_hand = seeded(Plain), seeded(Both)
    first, second = SmallFeatures(), SmallFeatures(["model.act"], 2.0)
    assert first.state_key != second.state_key
    trainer = fit(ours, first, second)
    fit(by_hand)
    assert equal(weights(ours), weights(by_hand))
    assert {"train/small", "train/small_2"} <= trainer.callback_metrics.keys()
    assert set(first.listened[0]) == {"model.hidden"}
    assert set(second.listened[0]) == {"model.act"}
    assert "training_step" not in vars(ours)


def test_dict_of_the_user_is_not_changed() -> None:
    kept: list[dict[str, Any]] = []

    class Keeps(Plain):
        def training_step(self, batch: Any) -> Any:
            kept.append({"loss": super().training_step(batch), "mine": 3})
            return kept[-1]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert outputs["mine"] == 3
            assert float(outputs["loss"].detach()) > float(kept[-1]["loss"].detach())

    module = seeded(Keeps)
    fit(module, SmallFeatures(), max_steps=3)
    assert len(kept) == 3


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.*")
def test_skipped_steps_stay_skipped() -> None:
    module, callback = seeded(lambda: Plain("none")), SmallFeatures()
    before = weights(module)
    fit(module, callback, max_epochs=1)
    assert equal(before, weights(module))
    assert callback.listened == []


def test_last_call_of_a_layer_counts() -> None:
    class Twice(Plain):
        def training_step(self, batch: Any) -> Any:
            self(batch[0] * 100)
            return super().training_step(batch)

    class Compares(SmallFeatures):
        def loss(self, features: dict[str, Tensor], batch: Any, pl_module: pl.LightningModule) -> Tensor:
            with torch.no_grad():
                expected = pl_module.model.flat(batch[0])
            assert torch.equal(features["model.flat"], expected)
            return features["model.flat"].mean()

    fit(seeded(Twice), Compares(["model.flat"]), max_steps=2)


def test_listens_in_the_training_step_only() -> None:
    """Validation (under inference_mode) and the user's other passes are not seen, and nothing is kept between steps."""
    module, callback = seeded(Plain), SmallFeatures()

    class Watches(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            pl_module(torch.randn(2, 1, 8, 8))
            assert callback.tap.take() == {}

        def on_validation_batch_end(self, *args: Any) -> None:
            assert callback.tap.take() == {}
            self.validated = True

    watches = Watches()
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=4, val_check_interval=2, callbacks=[callback, watches],
    )  # fmt: skip
    from tests.training import digits

    trainer.fit(module, digits(train_samples=64, batch_size=16))
    assert watches.validated
    assert callback.listened == [["model.hidden"]] * 4


def state_of(module: pl.LightningModule) -> dict[str, Any]:
    return {
        "methods": {
            name: vars(module).get(name) for name in ("training_step", "configure_model", "configure_optimizers")
        },
        "hooks": [
            len(hooks)
            for one in module.modules()
            for hooks in (one._forward_hooks, one._state_dict_hooks, one._load_state_dict_post_hooks)
        ],
        "modules": [name for name, _ in module.named_modules()],
        "keys": list(module.state_dict()),
        "parameters": [name for name, _ in module.named_parameters()],
    }


class Trouble(pl.Callback):
    """An exception somewhere in a run."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _raise(self, where: str) -> None:
        if where == self.where:
            raise RuntimeError(where)

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self._raise("setup")

    def on_fit_start(self, *args: Any) -> None:
        self._raise("fit start")

    def on_train_batch_end(self, *args: Any) -> None:
        self._raise("step")


@pytest.mark.parametrize("where", ["nowhere", "setup", "fit start", "step", "user's step"])
@pytest.mark.parametrize("patched", [False, True])
def test_module_is_restored(where: str, patched: bool) -> None:
    class Breaks(Plain):
        def training_step(self, batch: Any) -> Any:
            if where == "user's step":
                raise RuntimeError(where)
            return super().training_step(batch)

    module = seeded(Breaks)
    if patched:  # a step that the user has replaced on the instance comes back
        original = module.training_step
        module.training_step = lambda batch: original(batch)  # noqa: PLW0108 - another object
    before = state_of(module)
    first, second = SmallFeatures(trained=True), SmallFeatures(["model.act"])
    if where == "nowhere":
        fit(module, first, second, max_steps=2)
    else:
        with pytest.raises(RuntimeError, match=where):
            fit(module, first, Trouble(where), second, max_steps=2)
    assert state_of(module) == before
    if where != "user's step":
        fit(module, first, second, max_steps=2)
        assert state_of(module) == before


def test_step_of_one_argument_below_two_callbacks_and_a_decorator() -> None:
    """Lightning looks at the signature to know what to pass; wrapped twice, it still sees the user's."""

    class WithIndex(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            assert batch_idx >= 0
            return super().training_step(batch)

    for make in (Plain, WithIndex):
        fit(seeded(make), SmallFeatures(), SmallFeatures(["model.act"]), max_steps=2)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["model.hiden"], r"Plain has no layer 'model.hiden' for SmallFeatures. Did you mean model.hidden"),
        (["unused"], r"layer 'unused' was not called in the training_step of Extra"),
        (["pair"], r"layer 'pair' returned tuple, expected a tensor of a batch"),
    ],
)
def test_bad_layers(layers: list[str], message: str) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Extra(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.pair = Pair()

        def training_step(self, batch: Any) -> Any:
            self.pair(batch[0])
            return super().training_step(batch)

    with pytest.raises(InputError, match=message):
        fit(seeded(Plain if "hiden" in layers[0] else Extra), SmallFeatures(layers))


def test_bad_results_of_the_step() -> None:
    for answer, what in ((3, "got int"), ({"mine": 3}, "got dict with loss=None")):
        with pytest.raises(InputError, match=rf"returns a tensor, a dict with a tensor under 'loss', or None, {what}"):
            fit(seeded(lambda answer=answer: Plain(answer)), SmallFeatures())


def test_bad_loss() -> None:
    class Vector(SmallFeatures):
        def loss(self, features: dict[str, Tensor], batch: Any, pl_module: pl.LightningModule) -> Tensor:
            return features["model.hidden"]

    with pytest.raises(InputError, match=r"Vector.loss must return a scalar tensor"):
        fit(seeded(Plain), Vector())


def test_bad_manual_optimisation() -> None:
    module = seeded(Plain)
    module.automatic_optimization = False
    with pytest.raises(InputError, match=r"under manual optimisation nobody uses that: use automatic optimisation"):
        fit(module, SmallFeatures())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor.*")
def test_bad_dataloader_iter() -> None:
    class Iterates(Plain):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            raise AssertionError

    with pytest.raises(InputError, match=r"must take \(batch, batch_idx\), not dataloader_iter"):
        fit(seeded(Iterates), SmallFeatures())


def test_bad_arguments() -> None:
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=rf"weight must be finite and not negative, got {weight}"):
            SmallFeatures(weight=weight)
    with pytest.raises(InputError, match=r"warmup_steps must not be negative, got -1"):
        SmallFeatures(warmup_steps=-1)


def test_pickle_after_a_fit() -> None:
    """As ddp_spawn sends it to the processes."""
    callback = SmallFeatures(trained=True)
    fit(seeded(Plain), callback, max_steps=2)
    copied = pickle.loads(pickle.dumps(callback))
    assert torch.equal(copied.part[0].weight, callback.part[0].weight)
    fit(seeded(Plain), copied, max_steps=2)
