"""STRUCTURE's module: its objective, the warm-up, the heads, the layers it chooses, and what is stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.losses.test_structure import A1, A2, X1, X2
from tests.processes import fit_in_two_processes
from tests.structure_cases import Encoder, at_step, build, pairs, rows
from tests.training import quick_trainer
from zoo.alignment_heads import LinearHead, LowRankHead, build_head
from zoo.errors import InputError
from zoo.metrics import Continuity, Trustworthiness


def regulariser_by_hand(x: Tensor, a: Tensor, temperature: float) -> Tensor:
    """Section 1 of the notes, released, with matrices."""
    walks = []
    for rows_ in (x, a):
        z = F.normalize(rows_, dim=1)
        z = z - z.mean(0)
        walks.append((z @ z.T / temperature).softmax(1))
    px, pa = walks
    m = (px + pa) / 2 + 1e-12
    logs = 2 * m.log() - (pa + 1e-12).log() - (px + 1e-12).log()
    return (m * logs).sum(1).mean() / 2


def base_by_hand(base: str, a: Tensor, b: Tensor, temperature: float) -> Tensor:
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    own = torch.arange(len(a))
    if base == "clip":
        scores = cosines / temperature
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    scale = torch.tensor(10.0).log().to(a.dtype).exp()  # the logarithm is kept in float32
    return F.softplus(-(2 * torch.eye(len(a), dtype=a.dtype) - 1) * (scale * cosines - 10)).sum() / len(a)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (0, {}),
        (1, {}),
        (9, {"temperature": 0.2}),
        (9, {"base": "siglip", "structure_temperature": 0.5, "structure_weight": 3.0, "chunk_size": 5}),
        (9, {"structure_weight": 0.0}),
    ],
    ids=str,
)
def test_identity_training_step_is_the_formula(step: int, options: dict[str, Any]) -> None:
    model = build(image_layer="features", text_layer="features", **options).double()
    logged, batch = at_step(model, step), rows(16, torch.float64)
    loss = model.training_step(batch, 0)
    a, b = model.image_head(batch["image"]), model.text_head(batch["text"])
    tau = options.get("temperature", 0.05)
    structure = (
        regulariser_by_hand(batch["image"], a, options.get("structure_temperature", tau))
        + regulariser_by_hand(batch["text"], b, options.get("structure_temperature", tau))
    ) / 2
    weight = options.get("structure_weight", 10.0) * min(1, step / 4)
    base = base_by_hand(options.get("base", "clip"), a, b, tau)
    expected = base + weight * structure
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(logged["train/base_loss"], base, rtol=1e-9, atol=1e-10)
    assert ("train/structure_loss" in logged) == (weight > 0)
    heads = [*model.image_head.parameters(), *model.text_head.parameters()]
    for ours, theirs in zip(torch.autograd.grad(loss, heads), torch.autograd.grad(expected, heads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


class Given(nn.Module):
    """A head that returns the golden file's rows."""

    def __init__(self, in_dim: int, values: list[list[float]]) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.values


def test_golden_objective() -> None:
    """c4 of the project's notes on arXiv 2506.16895, made there in float64 from the authors' functions."""
    model = build(
        image_options={"dim": 5},
        text_options={"dim": 4},
        image_layer="features",
        text_layer="features",
        warmup_steps=1000,
    )
    model.image_head, model.text_head = Given(5, A1), Given(4, A2)
    batch = {"image": torch.tensor(X1, dtype=torch.float64), "text": torch.tensor(X2, dtype=torch.float64)}
    logged = at_step(model, 1000)
    assert model.training_step(batch, 0).item() == pytest.approx(6.484600107749676, abs=1e-10)
    assert logged["train/base_loss"].item() == pytest.approx(5.0215504659462935, abs=1e-10)
    assert [model.weight_at(step) for step in (0, 1, 500, 1000, 5000)] == pytest.approx([0.0, 0.01, 5.0, 10.0, 10.0])
    logged = at_step(model, 0)
    assert model.training_step(batch, 0).item() == pytest.approx(5.0215504659462935, abs=1e-10)


# -- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("linear", 768 * 512 + 512),
        ("low_rank", 768 * 512 + 64 * (768 + 512) + 1),
        ("low_rank_released", 768 * 512 + 64 * (768 + 512) + 1),
        ("mlp", 768 * 512 + 512 + 512 * 512 + 512),
    ],
)
def test_golden_parameters_of_heads(name: Any, count: int) -> None:
    assert sum(parameter.numel() for parameter in build_head(name, 768, 512).parameters()) == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_released_branch_is_dead(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = build_head("low_rank_released", 12, 8).to(dtype)
    assert isinstance(head, LowRankHead)
    x = torch.randn(5, 12).to(dtype)
    assert torch.equal(head(x), x @ head.projection.weight.T)
    head(x).float().square().sum().backward()
    for parameter in (head.down.weight, head.up.weight, head.gate):
        assert parameter.grad is not None
        assert not parameter.grad.any()
    weight = head.projection.weight.double()
    torch.testing.assert_close(weight @ weight.T, torch.eye(8, dtype=torch.float64), atol=0.05, rtol=0)


def test_the_live_branch_learns() -> None:
    torch.manual_seed(0)
    head = build_head("low_rank", 12, 8)
    assert isinstance(head, LowRankHead)
    assert head.gate.sigmoid().item() == pytest.approx(0.1)
    x = torch.randn(5, 12)
    head(x).square().sum().backward()
    assert head.up.weight.grad is not None
    assert head.up.weight.grad.any()
    with torch.no_grad():
        head.eval().up.weight.fill_(1.0)
    branch = F.gelu(x @ head.down.weight.T).sum(1, keepdim=True)
    torch.testing.assert_close(head(x), x @ head.projection.weight.T + 0.1 * branch)


# -- fit -----------------------------------------------------------------------------------------------------------


def test_the_frozen_towers_stay_and_the_heads_learn() -> None:
    model = build(image=Encoder(6), image_options=None, text=Encoder(5), text_options=None, lr=1e-2, head="mlp")
    towers = copy.deepcopy({**model.image.state_dict(prefix="image."), **model.text.state_dict(prefix="text.")})
    heads = {name: value.detach().clone() for name, value in model.named_parameters() if "head" in name}
    losses = []
    for _ in range(2):
        trainer = quick_trainer(max_epochs=8)
        trainer.fit(model, pairs())
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[1] < losses[0]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in towers.items())
    assert all(not torch.equal(state[name], value) for name, value in heads.items())
    assert not model.image.network.training
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "image_head",
        "text_head",
    }
    # Towers without blocks have one layer.
    assert model.layers == {"image": "features", "text": "features"}


class StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("layer", ["features", "0"])
def test_gradients_reach_the_input_through_the_chosen_layer(layer: str) -> None:
    blocks = nn.Sequential(nn.Sequential(nn.Linear(6, 7), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.Linear(7, 7)))
    blocks.output_dim = 7  # type: ignore[assignment]
    model = build(image=blocks, image_options=None, image_layer=layer, text_layer="features")
    x = rows(4)["image"].requires_grad_()
    target = torch.randn(4, 4)
    inside = blocks(x) if layer == "features" else blocks[0](x)
    expected = (F.normalize(model.image_head(inside), dim=1) * target).sum()
    for encode in (model.encode_image, model.network):
        found = (encode(x) * target).sum()
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (found, expected)]
        torch.testing.assert_close(*gradients)
        assert gradients[1].abs().max() > 0.01
    features = model.features_of({**rows(4), "label": torch.zeros(4)})
    assert not any(value.requires_grad for value in features.values())  # and none where the inputs ask for none


def test_the_warm_up_survives_resume(tmp_path: Path) -> None:
    options = {"warmup_steps": 12, "lr": 1e-2}
    whole = build(**options)
    quick_trainer(max_epochs=4).fit(whole, pairs())
    trainer = quick_trainer(max_epochs=4, callbacks=[StopAfter(2)])
    trainer.fit(build(**options), pairs())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = build(**options)
    trainer = quick_trainer(max_epochs=4)
    trainer.fit(resumed, pairs(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert float(trainer.callback_metrics["train/structure_weight"]) == pytest.approx(10 * 7 / 12)
    for (key, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_validation_watches_the_full_weight() -> None:
    model = build(warmup_steps=10**6)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        enable_checkpointing=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, pairs(), pairs(32, 32))
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert found["val/loss"] == pytest.approx(found["val/base_loss"] + 10 * found["val/structure_loss"], rel=1e-5)
    batch = rows()
    with torch.no_grad():
        aligned = {"image": model.image_head(batch["image"]), "text": model.text_head(batch["text"])}
        expected = sum(regulariser_by_hand(batch[m], aligned[m], 0.05) for m in aligned) / 2
    assert found["val/structure_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert 0 <= found["val/retrieval/image_to_text/r1"] <= 1
    assert -1 <= found["val/structure/text"] <= 1
    for modality in ("image", "text"):
        metric = Trustworthiness(10), Continuity(10)
        for one in metric:
            one.update(aligned[modality], batch[modality])
        names = (f"val/trustworthiness/{modality}", f"val/continuity/{modality}")
        for name, one in zip(names, metric, strict=True):
            assert found[name] == pytest.approx(float(one.compute()), abs=2e-3)
    assert found["structure/image/effective_neighbours"] >= 1


def test_rows_without_a_partner_join_the_regulariser() -> None:
    batch = rows(16, torch.float64)
    batch = {"image": batch["image"][:10], "text": batch["text"][:10], "text_only": batch["text"][10:]}
    for alone in (False, True):
        model = build(image_layer="features", text_layer="features", use_only_unimodal=alone).double()
        logged = at_step(model, 4)
        model.training_step(batch, 0)
        text = batch["text_only"] if alone else torch.cat([batch["text"], batch["text_only"]])
        image = batch["image"]
        expected = (
            regulariser_by_hand(image, model.image_head(image), 0.05)
            + regulariser_by_hand(text, model.text_head(text), 0.05)
        ) / 2
        torch.testing.assert_close(logged["train/structure_loss"], expected, rtol=1e-9, atol=1e-10)
        base = base_by_hand("clip", model.image_head(image), model.text_head(batch["text"]), 0.05)
        torch.testing.assert_close(logged["train/base_loss"], base, rtol=1e-9, atol=1e-10)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one = build(lr=1e-2, schedule="constant", warmup_steps=2, head="mlp").double()
    two = copy.deepcopy(one)
    options: dict[str, Any] = {
        "precision": "64-true", "max_epochs": 4, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    # All pairs in one batch: Lightning's sampler shuffles, and losses over all of them do not care.
    pl.Trainer(accelerator="cpu", devices=1, **options).fit(one, pairs(32, 32, torch.float64))
    fit_in_two_processes(two, pairs(32, 16, torch.float64), folder=tmp_path, **options)
    for (key, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=key)


def test_half_precision_autocast() -> None:
    model = build()
    trainer = quick_trainer(max_epochs=3, precision="bf16-mixed")
    trainer.fit(model, pairs())
    assert bool(torch.isfinite(trainer.callback_metrics["train/loss"]))
    assert model.image_head.weight.dtype == torch.float32


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "lineer"}, "head must be one of linear, .*got 'lineer'.*linear"),
        ({"embed_dim": 0}, "embed_dim must be positive, got 0"),
        ({"base": "cca"}, "base must be one of clip, siglip, csa, got 'cca'"),
        ({"base": "csa", "head": "mlp"}, "base='csa' gives linear maps: head must be 'linear', got 'mlp'"),
        ({"head": "canonical"}, "head must be one of linear, low_rank_released, low_rank, mlp, got 'canonical'"),
        ({"canonical_ridge": -1.0}, "canonical_ridge must be finite and not negative, got -1.0"),
        ({"canonical_power": -1.0}, "canonical_power must be finite and not negative, got -1.0"),
        ({"kept_neighbours": 0}, "k must be a whole number of at least 1, got 0"),
        ({"structure_weight": -1.0}, "structure_weight must be finite and not negative, got -1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"structure_temperature": 0.0}, "structure_temperature must be positive or None, got 0.0"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"margin": -0.1}, "margin must be finite and not negative, got -0.1"),
        ({"divergence": "kl"}, "divergence must be one of released, js, got 'kl'"),
        ({"layer_choice": "first"}, "layer_choice must be one of select, last, got 'first'"),
        ({"selection_samples": 1}, "selection_samples must be at least 2, got 1"),
        ({"image_options": {"dim": 6, "frozen": True}}, "image_options may not hold frozen"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**options)


def test_bad_batches() -> None:
    model = build(image_layer="features", text_layer="features")
    at_step(model, 1)
    with pytest.raises(InputError, match="a batch must be a dict with 'image' or 'image_features', got list"):
        model.training_step([torch.randn(4, 6), torch.randn(4, 5)], 0)
    with pytest.raises(InputError, match="with 'text' or 'text_features', got image, audio"):
        model.training_step({"image": torch.randn(4, 6), "audio": torch.randn(4, 5)}, 0)
    with pytest.raises(InputError, match=r"must be pairs, got 4 image and 3 text rows.*'image_only' or 'text_only'"):
        model.training_step({"image": torch.randn(4, 6), "text": torch.randn(3, 5)}, 0)
    with pytest.raises(InputError, match=r"image head takes features of width 6, got \(4, 7\)"):
        model.training_step({"image_features": torch.randn(4, 7), "text": torch.randn(4, 5)}, 0)


def test_bad_schedule_without_an_end() -> None:
    trainer = quick_trainer(max_epochs=-1)
    with pytest.raises(InputError, match="schedule='cosine' needs a run of known length"):
        trainer.fit(build(), pairs())


def test_the_linear_head_is_affine() -> None:
    head = build_head("linear", 3, 2)
    assert isinstance(head, LinearHead)
    assert torch.allclose(head(torch.zeros(1, 3)), head.bias)
