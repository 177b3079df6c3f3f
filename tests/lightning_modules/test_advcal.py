"""Adversarial calibration: its objective, its attacks, what it logs, and what a resumed or distributed run gives."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from zoo.lightning_modules.advcal import AdversarialCalibration

from tests.advcal_cases import ALPHA, CENTRES, EPS, INPUTS, LABELS, SCALE, START, STEPS, encode, head
from tests.calibration_cases import Toy, quiet, toy, toy_data
from tests.processes import fit_in_two_processes
from zoo.attacks import attack_loss, pgd
from zoo.calibration_attacks import TrainingAttack, generator_of
from zoo.calibration_heads import build_calibration_head
from zoo.data.digits_modalities import DigitsModalitiesDataModule
from zoo.errors import InputError
from zoo.one_cycle import one_cycle

RANGES: Any = {"image": (-0.8125, 1.848), "profile": (0.0, 1.0)}


def digits_model(**options: Any) -> AdversarialCalibration:
    """Random encoders of both modalities of the digits, centres at random."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "encoder_options": {name: {"in_chans": 1} for name in RANGES}, "valid_range": RANGES, "steps": 2,
        "eval_steps": 2, "eval_samples": 8, "centres": torch.randn(10, 64).tolist(), **options,
    }  # fmt: skip
    return AdversarialCalibration({"image": "zoo/resnet8", "profile": "zoo/resnet8"}, **given)


def alone(model: AdversarialCalibration, **facts: Any) -> dict[str, Any]:
    """Let a bare module believe that it trains; return what it logs."""
    logged: dict[str, Any] = {}
    facts = {"training": True, "world_size": 1, "global_rank": 0, "current_epoch": 0, **facts}
    changed: Any = model
    changed._trainer = type("T", (), facts)()
    changed.log_dict = lambda values, **_: logged.update(values)
    return logged


# -- objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("ce", 6.5683975552), ("l2", 0.0400223159), ("nce", 0.3437989329), ({"l2": 2.0, "nce": 0.5}, None)],
)
def test_golden_objectives(objective: Any, expected: float | None) -> None:
    """c3 of the project's notes: the head (A1, b1), beta 0.1, on inputs attacked by L2 from the given start."""
    attacked = pgd(
        attack_loss("l2", encode), INPUTS, encode(INPUTS), eps=EPS, step_size=ALPHA, steps=STEPS, start=START
    )
    model = toy(given_head=True, objective=objective)
    terms = model.terms("image", encode(INPUTS), encode(attacked), LABELS)
    assert terms["identity"].item() == pytest.approx(0.0192696676, abs=1e-9)
    assert terms["divergence"].item() == pytest.approx(0.0182894843, abs=1e-9)
    if expected is None:
        expected = 2 * 0.0362664008 + 0.5 * 0.3400430177 + 0.1 * (0.0192696676 + 0.0182894843)
    assert model.objective.total(terms).item() == pytest.approx(expected, abs=2e-9)


def pgd_by_hand(loss: Any, x: Tensor, start: Tensor, eps: float, step: float, steps: int) -> Tensor:
    point = start
    for _ in range(steps):
        point = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point).sum(), point)
        point = x + (point + step * gradient.sign() - x).clamp(-eps, eps)
        point = point.clamp(0, 1)
    return point.detach()


@pytest.mark.parametrize("target", ["backbone", "full"])
@pytest.mark.parametrize("objective", ["ce", "l2"])
def test_identity_training_step_is_the_formula(target: Any, objective: Any) -> None:
    """One step against the notes with the attack as a loop; nothing of it reaches the head's gradient but the loss."""
    model = toy(given_head=True, objective=objective, target=target, eps=0.1, step_size=0.03, steps=4, seed=3)
    logged = alone(model)
    loss = model.training_step({"image": INPUTS, "label": LABELS}, 5)
    noise = torch.rand(INPUTS.shape, generator=generator_of(INPUTS.device, (3, 1, 0, 0, 0, 5)), dtype=INPUTS.dtype)
    start = (INPUTS + 0.1 * (2 * noise - 1)).clamp(0, 1)
    through = (lambda x: head(encode(x))) if target == "full" else encode
    centres = F.normalize(F.normalize(CENTRES, dim=2).mean(1), dim=1)

    def raised(x: Tensor) -> Tensor:
        if objective == "l2":
            return (through(x) - encode(INPUTS)).square().sum(1)
        return F.cross_entropy(SCALE * through(x) @ centres.T, LABELS, reduction="none")

    moved = head(encode(pgd_by_hand(raised, INPUTS, start, 0.1, 0.03, 4)))
    clean = encode(INPUTS)
    terms = {
        "l2": (moved - clean).square().sum(1).mean(),
        "ce": F.cross_entropy(SCALE * moved @ centres.T, LABELS),
    }
    wanted, found = ((SCALE * side @ centres.T).log_softmax(1) for side in (clean, moved))
    divergence = (wanted.exp() * (wanted - found)).sum(1).mean()
    expected = terms[objective] + 0.1 * (divergence + (head(clean) - clean).square().sum(1).mean())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert logged["train/loss"].item() == loss.item()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.heads.parameters())
    assert all(parameter.grad is None for parameter in model.encoders.parameters())


def test_only_attacked_inputs_train_without_the_identity() -> None:
    model = toy(clean_identity=False)
    assert model.terms("image", encode(INPUTS), encode(START), None).keys() == {"l2", "divergence"}
    assert toy(regulariser_weight=0.0).terms("image", encode(INPUTS), encode(START), None).keys() == {"l2"}


def test_modalities_count_alike_and_need_not_all_be_there() -> None:
    model = toy(modalities=("image", "audio"), given_head=True)
    alone(model)
    both = model.training_step({"image": (INPUTS, LABELS), "audio": (INPUTS[:3], LABELS[:3])}, 0)
    apart = [
        model.training_step({name: INPUTS[:n], "label": LABELS[:n]}, 0) for name, n in (("image", 6), ("audio", 3))
    ]
    assert both.item() == pytest.approx(sum(apart).item() / 2, abs=1e-9)


# -- heads and ranges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "residual_mlp"])
def test_heads_start_as_the_identity_and_learn(name: Any) -> None:
    torch.manual_seed(0)
    built, z = build_calibration_head(name, 12, 7).double(), F.normalize(torch.randn(5, 12).double(), dim=1)
    torch.testing.assert_close(built(z), z, rtol=0, atol=1e-15)
    assert sum(p.numel() for p in built.parameters()) == (12 * 12 + 12 if name == "linear" else 2 * 12 * 7)
    before = [p.detach().clone() for p in built.parameters()]
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        built(z)[:, 0].sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, built.parameters(), strict=True))
    torch.testing.assert_close(built(z).norm(dim=1), torch.ones(5).double())


def test_golden_ranges() -> None:
    """c7 of the notes: 4/255 of images that are normalised per channel, of coordinates in [-1, 1], and of a cloud's own."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    low, high = ([(edge - m) / s for m, s in zip(mean, std, strict=True)] for edge in (0.0, 1.0))
    assert low == pytest.approx([-1.79226253374815, -1.7520971281645974, -1.4802197687835659], abs=1e-12)
    assert high == pytest.approx([1.930336254158794, 2.0748838377332515, 2.1458969890575763], abs=1e-12)
    attack = TrainingAttack("l2", 4 / 255, 1 / 255, 1, (low, high))
    found = attack.bounds(torch.zeros(2, 3, 4, 4).double())
    assert found[0].shape == (3, 1, 1)
    radii = (attack.eps * (found[1] - found[0])).flatten().tolist()
    assert radii == pytest.approx([0.058393706476971674, 0.06003107397486822, 0.056880262868096346], abs=1e-12)
    coordinates = TrainingAttack("l2", 4 / 255, 1 / 255, 1, (-1.0, 1.0)).bounds(torch.zeros(2, 7, 3).double())
    assert float(4 / 255 * (coordinates[1] - coordinates[0])) == pytest.approx(0.03137254901960784, abs=1e-12)
    cloud = torch.tensor([[0.5497023555512104, 1.3485280113602036, -1.302910058843106]], dtype=torch.float64)
    own = replace(attack, valid_range=(cloud.min().item(), cloud.max().item()))
    low_end, high_end = own.bounds(cloud)
    assert float(4 / 255 * (high_end - low_end)) == pytest.approx(0.04159118541495387, abs=1e-12)
    # A range that is not the cloud's would change the clean input by up to 1.30: it is refused.
    assert float((cloud.clamp(0, 1) - cloud).abs().max()) == pytest.approx(1.302910058843106, abs=1e-12)
    options: dict[str, Any] = {
        "embed": lambda x: x, "classify": lambda x: x, "clean": cloud, "generator": torch.Generator(),
    }  # fmt: skip
    with pytest.raises(InputError, match="x must lie in valid_range"):
        replace(own, valid_range=(0.0, 1.0)).run(cloud, None, **options)
    assert torch.equal(replace(own, eps=0.0).run(cloud, None, **options), cloud)


def test_one_cycle_is_torch_s() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=40, pct_start=0.1, cycle_momentum=False)
    found = []
    for _ in range(39):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # torch counts steps from 1 within a phase.
    ours = [one_cycle(step, total=39, rise=3 / 39) for step in range(39)]
    assert found == pytest.approx(ours, abs=1e-6)
    assert all(0 < one_cycle(step, total=total) <= 1 for total in (1, 2, 9, 10, 11) for step in range(total))


# -- fit -----------------------------------------------------------------------------------------------------------


def test_cached_attacks_train_the_heads_and_nothing_else() -> None:
    data = DigitsModalitiesDataModule(train_samples=100, batch_size=32)
    data.setup()
    own = data.splits
    model = digits_model(eps=0.2, step_size=0.1, lr=1e-2)
    frozen = copy.deepcopy(model.encoders.state_dict())
    seen: list[int] = []
    handle = model.encoders["image"].network.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    trainer = quiet(max_epochs=12, limit_val_batches=0)
    trainer.fit(model, data)
    handle.remove()
    # Each sample once clean, twice in the attack and once attacked.
    assert sum(seen) == 4 * 100
    assert data.splits is own
    assert all(torch.equal(value, model.encoders.state_dict()[key]) for key, value in frozen.items())
    first, last = trainer.callback_metrics["train/displacement"], trainer.callback_metrics["train/l2"]
    assert last < 0.9 * first
    assert model.example_shape == (1, 8, 8)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"heads"}


class StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("target", ["backbone", "full"])
def test_random_starts_survive_resume(target: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": target, "lr": 1e-2, "eps": 0.1, "step_size": 0.02, "steps": 1}
    whole = toy(**options)
    quiet(max_epochs=4, limit_val_batches=0).fit(whole, toy_data())
    trainer = quiet(max_epochs=4, callbacks=[StopAfter(2)], limit_val_batches=0)
    trainer.fit(toy(**options), toy_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = toy(**options)
    torch.manual_seed(99)
    path = str(tmp_path / "half.ckpt")
    quiet(max_epochs=4, limit_val_batches=0).fit(resumed, toy_data(), ckpt_path=path, weights_only=True)
    for (key, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one = digits_model(objective="nce", lr=1e-2).double()
    two = copy.deepcopy(one)
    options: dict[str, Any] = {
        "precision": "64-true", "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
    }  # fmt: skip
    whole, half = (DigitsModalitiesDataModule(train_samples=80, batch_size=size) for size in (80, 40))
    pl.Trainer(accelerator="cpu", devices=1, **options).fit(one, whole)
    fit_in_two_processes(two, half, folder=tmp_path, **options)
    for (key, a), (_, b) in zip(one.heads.state_dict().items(), two.heads.state_dict().items(), strict=True):
        assert not torch.equal(a, digits_model().heads.state_dict()[key].double())
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=key)


def test_half_precision_autocast() -> None:
    model = digits_model(target="full")
    trainer = quiet(max_steps=2, precision="bf16-mixed", limit_val_batches=1)
    trainer.fit(model, DigitsModalitiesDataModule(train_samples=32, batch_size=16))
    assert bool(torch.isfinite(trainer.callback_metrics["train/loss"]))
    assert next(model.heads.parameters()).dtype == torch.float32


# -- evaluation ----------------------------------------------------------------------------------------------------


def test_an_untrained_head_changes_nothing() -> None:
    """Both kinds of attack are one then; validation runs in inference mode and leaves the module as it is."""
    model = toy(eps=0.3, eval_steps=8)
    (found,) = quiet().validate(model, toy_data(6), verbose=False)
    assert found["val/clean"] == found["val/clean_without_head"] == pytest.approx(1 / 3)
    assert found["val/drift"] == pytest.approx(0.0, abs=1e-12)
    assert found["val/adversarial/full"] == found["val/adversarial/backbone"] <= found["val/adversarial/noise"]
    assert found["val/adversarial/full"] <= found["val/clean"]
    assert found["val/trainable_share"] == pytest.approx(30 / (30 + 45), abs=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    # The notes' predictions on clean inputs (c6) are 0, 0, 0, 2, 1, 1, of which two are the labels here.
    assert model.logits("image", INPUTS).argmax(1).tolist() == [0, 0, 0, 2, 1, 1]


def test_full_attacks_go_through_the_head() -> None:
    """Behind a head that turns embeddings round, what drives the encoder from a class drives the whole towards it."""
    model = toy(eps=0.5, eval_steps=8, eval_attacks=["pgd-ce", "apgd-dlr"])
    with torch.no_grad():
        next(model.heads.parameters()).neg_()
    batch = {"image": INPUTS, "label": model.logits("image", INPUTS).argmax(1)}
    alone(model, training=False)
    model.validation_step(batch, 0)
    found = model.evaluation.finish()
    assert found["clean"] == found["adversarial/backbone"] == 1
    assert found["drift"] == pytest.approx(4.0)

    def raised(x: Tensor) -> Tensor:
        return F.cross_entropy(model.logits("image", x), batch["label"], reduction="none")

    by_hand = pgd_by_hand(raised, INPUTS, INPUTS, 0.5, 0.125, 8)
    right = (model.logits("image", by_hand).argmax(1) == batch["label"]).double().mean()
    assert found["adversarial/full"] <= right + 1e-6 < 1


def test_as_many_samples_are_attacked_as_asked_for() -> None:
    model = toy(eval_samples=4)
    alone(model, training=False)
    for step in range(2):
        model.validation_step({"image": INPUTS[:3], "label": LABELS[:3]}, step)
    accuracy: Any = model.evaluation.accuracies["image"]
    assert accuracy.samples == {
        "clean": 6, "clean_without_head": 6, "adversarial/full": 4, "adversarial/backbone": 4, "adversarial/noise": 4,
    }  # fmt: skip


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "kl"}, "objective must be one of ce, l2, nce, got 'kl'"),
        ({"objective": {}}, "objective must name at least one of ce, l2, nce"),
        ({"objective": {"ce": 0.0}}, r"objective\['ce'\] must be"),
        ({"regulariser_weight": -1.0}, "regulariser_weight must"),
        ({"temperature": 0.0}, "temperature must"),
        ({"target": "both"}, "target must be one of backbone, full"),
        ({"attack": "fgsm"}, "attack must be one of auto, ce"),
        ({"pool": "median"}, "pool must be one of"),
        ({"head": "lora"}, "head must be one of linear, residual_mlp"),
        ({"head": "residual_mlp", "head_width": 0}, "head_width must be positive, got 0"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0 for image"),
        ({"eps": {"audio": 0.1}}, "eps names 'audio', which is no encoder"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"eval_samples": 0}, "eval_samples must be at least 1, got 0"),
        ({"eval_attacks": ["cw"]}, "attacks must be one of"),
        ({"valid_range": {"imag": (0.0, 1.0)}}, "valid_range names 'imag', which is no encoder.*image"),
        ({"centres": [[1.0, 0.0]]}, "centres must be as wide as the embeddings, 5, got 2"),
        ({"max_trainable_share": 0.01}, "the heads are 40.00% of all parameters, and max_trainable_share is 0.01"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        toy(**options)


def test_bad_encoders() -> None:
    with pytest.raises(InputError, match="encoders must name at least one modality"):
        AdversarialCalibration({})
    with pytest.raises(InputError, match=r"encoders must share one space.*'image': 5, 'audio': 64"):
        AdversarialCalibration({"image": Toy(), "audio": "zoo/resnet8"})


def test_bad_batches() -> None:
    model = toy(objective="ce")
    alone(model)
    with pytest.raises(InputError, match="a batch must be a dict with one of image and 'label', got video"):
        model.training_step({"video": INPUTS}, 0)
    with pytest.raises(InputError, match="attack='ce' needs labels"):
        model.training_step({"image": INPUTS}, 0)
    with pytest.raises(InputError, match="x must lie in valid_range"):
        model.training_step({"image": INPUTS - 0.5, "label": LABELS}, 0)
    model = toy(objective="ce", attack="l2")
    alone(model)
    with pytest.raises(InputError, match="objective 'ce' needs labels"):
        model.training_step({"image": INPUTS}, 0)
    with pytest.raises(InputError, match="evaluation needs labels"):
        model.validation_step({"image": INPUTS}, 0)


def test_bad_runs() -> None:
    with pytest.raises(InputError, match=r"one of the zoo's data modules.*got NoneType.*cache_attacks=False"):
        quiet(max_epochs=1).fit(toy(cache_attacks=True), toy_data())
    with pytest.raises(InputError, match="one cycle needs a run of known length"):
        quiet(max_epochs=-1).fit(toy(), toy_data())
    with pytest.raises(InputError, match="there are no class centres yet"):
        AdversarialCalibration({"image": Toy()}).logits("image", INPUTS.float())
    with pytest.raises(InputError, match="the classes need centres: give text"):
        quiet().validate(AdversarialCalibration({"image": Toy()}), DataLoader([1]), verbose=False)  # type: ignore[arg-type]
