"""SoftREPA: the loss of a step restated, all ways to its gradient, what is stored, and what the tokens do once attached."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

import zoo
from tests.softrepa_cases import backbone, batch, softrepa, step
from tests.training import quick_trainer
from zoo.errors import InputError
from zoo.prompted_samples import PromptedSamples


@pytest.fixture(scope="module")
def exact() -> Any:
    return softrepa().double()


def test_step_is_the_formula(exact: Any) -> None:
    given = batch()
    given["text"][2] = given["text"][0]  # equal captions are no negatives
    loss, _ = step(exact, given)
    torch.manual_seed(3)
    timestep = torch.randint(1000, (1,))
    noise = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    network = exact.backbone.network
    told = network.condition(given["text"])
    sigma = timestep / 1000
    rows = []
    with torch.no_grad(), exact.attach(network.denoiser):
        for i in range(4):
            noisy = (1 - sigma) * given["image"][i : i + 1] + sigma * noise
            scores = []
            for j in range(4):
                pair = {name: value[j : j + 1] for name, value in told.items()}
                velocity = network.denoiser(hidden_states=noisy, timestep=timestep.double(), **pair)[0]
                error = (velocity - (noise - given["image"][i])).square().mean()
                equal = i != j and {i, j} == {0, 2}
                scores.append(torch.tensor(-torch.inf).double() if equal else 4.0 * torch.exp(-error / 5.0))
            rows.append(torch.logsumexp(torch.stack(scores), 0) - scores[i])
    torch.testing.assert_close(loss, torch.stack(rows).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"pairs": "full"},
        {"pairs": "rows", "micro_batch": 2},
        {"pairs": "two_pass", "micro_batch": 3},
        {"micro_batch": 8},
    ],
)
def test_all_ways_to_the_gradient_are_equal(exact: Any, options: dict[str, Any]) -> None:
    loss, gradient = step(exact, batch())
    other_loss, other = step(softrepa(**options).double(), batch())
    torch.testing.assert_close(other_loss, loss, rtol=1e-9, atol=0)
    assert float(gradient[0].norm()) > 0
    for ours, theirs in zip(other, gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_only_the_bank_and_only_the_drawn_bucket_have_a_gradient(exact: Any) -> None:
    _, (base, offset) = step(exact, batch())
    assert all(parameter.grad is None for parameter in exact.backbone.network.parameters())
    assert int((offset.flatten(1).norm(dim=1) > 0).sum()) == 1
    assert bool((base != 0).all())
    assert [name for name, _ in exact.named_parameters()] == ["bank.base", "bank.offset"]


def test_encoded_batches_give_the_same(exact: Any) -> None:
    given = batch()
    loss, gradient = step(exact, given)
    network = exact.backbone.network
    with torch.no_grad():
        encoded = {"latents": given["image"], **network.condition(given["text"]), "caption_id": torch.arange(4)}
    other_loss, other = step(exact, encoded)
    assert torch.equal(loss, other_loss)
    assert all(map(torch.equal, gradient, other))


def test_labels_mask_more_than_captions(exact: Any) -> None:
    given = batch()  # labels 0, 1, 2, 0
    captions, _ = step(exact, given)
    labels, _ = step(softrepa(mask_equal="labels").double(), given)
    alone, _ = step(softrepa(mask_equal="labels").double(), {**given, "label": torch.zeros(4, dtype=torch.long)})
    assert labels < captions
    assert alone == 0


def test_denoising_control_is_the_mean_own_error(exact: Any) -> None:
    given = batch()
    control = softrepa(objective="denoising").double()
    loss, gradient = step(control, given)
    weighted, _ = step(softrepa(diagonal_weight=10.0).double(), given)
    contrastive, _ = step(exact, given)
    torch.testing.assert_close(weighted, contrastive + 10 * loss, rtol=1e-9, atol=0)
    assert float(gradient[0].norm()) > 0


def test_captions_as_text_are_equal_where_they_are(exact: Any) -> None:
    from zoo.captioned_batch import read_captioned

    network = backbone()
    network.condition = lambda text: {"encoder_hidden_states": torch.zeros(len(text), 5, 16)}  # type: ignore[method-assign]
    found = read_captioned({"image": torch.zeros(3, 1, 8, 8), "text": ["a", "b", "a"]}, network, mask_equal="captions")
    assert found.mask is not None
    assert found.mask.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    assert read_captioned(batch(), network, mask_equal="none").mask is None


# -- runs --------------------------------------------------------------------------------------------------------------


class Pairs(pl.LightningDataModule):
    """Captioned noise: 16 pairs to train on, 8 to evaluate."""

    class_names = ("zero", "one", "two")

    def _loader(self, rows: int, seed: int) -> Any:
        given = batch(rows, seed, torch.float32)
        samples = [{name: value[i] for name, value in given.items()} for i in range(rows)]
        return torch.utils.data.DataLoader(samples, batch_size=4)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        """Return the training pairs."""
        return self._loader(16, 5)

    def val_dataloader(self) -> Any:
        """Return the others."""
        return self._loader(8, 6)

    test_dataloader = val_dataloader


class Judge(nn.Module):
    """A classifier of three classes by brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 3)."""
        logits: Tensor = self.head(x.flatten(1))
        return logits


def evaluating(**options: Any) -> pl.Trainer:
    """A silent trainer that evaluates as well."""
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model after one epoch with a judge, and what it logged."""
    model = softrepa(classifier=Judge(), eval_samples=6, sample_steps=2, eval_timesteps=[100, 900], lr=0.05)
    trainer = evaluating(max_epochs=1)
    trainer.fit(model, Pairs())
    logged = set(trainer.logged_metrics)
    return model, trainer.validate(model, Pairs(), verbose=False)[0], logged


def test_a_run_logs_what_it_says(trained: Any) -> None:
    _, found, logged = trained
    kinds = {"loss", "positive_error", "margin", "rank1", "live_pairs"}
    assert {f"train/{kind}" for kind in kinds} <= logged
    expected = {f"val/{kind}" for kind in kinds} | {
        "val/positive_error/t100", "val/positive_error/t900", "val/offset_norm", "val/alignment", "val/frechet",
    }  # fmt: skip
    assert expected <= found.keys()
    assert found["val/positive_error"] == pytest.approx(
        (found["val/positive_error/t100"] + found["val/positive_error/t900"]) / 2
    )


def test_validation_is_the_same_each_time(trained: Any) -> None:
    model, found, _ = trained
    assert evaluating().validate(model, Pairs(), verbose=False)[0] == found


def test_tokens_are_off_the_backbone_after_a_run(trained: Any) -> None:
    model, _, _ = trained
    network = model.backbone.network
    given = batch(2, dtype=torch.float32)
    noise = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        plain = network(noise, torch.tensor(500.0), given["text"])
        assert torch.equal(plain, backbone()(noise, torch.tensor(500.0), given["text"]))
        with model.attach(network.denoiser):
            assert not torch.allclose(network(noise, torch.tensor(500.0), given["text"]), plain)
        assert torch.equal(network(noise, torch.tensor(500.0), given["text"]), plain)


def test_samples_are_of_the_tokens_and_repeat(trained: Any) -> None:
    model, _, _ = trained
    text = batch(2)["text"]
    images = model.sample(text, seed=1)
    assert images.shape == (2, 1, 8, 8)
    assert torch.equal(images, model.sample(text, seed=1))
    assert not torch.equal(images, model.sample(text, seed=2))
    assert not torch.equal(
        images, zoo.generation_evaluation.sample_prompts(model.backbone.network, text, steps=2, seed=1)
    )
    assert model.card_figures()["samples"][:4] == b"\x89PNG"


def test_stored_model_is_the_bank_alone_and_attaches_to_any_such_network(trained: Any, tmp_path: Path) -> None:
    model, _, _ = trained
    model.save_pretrained(tmp_path)
    loaded = zoo.SoftREPA.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == {"bank.base", "bank.offset"}
    assert torch.equal(loaded.bank.base, model.bank.base)
    assert loaded.places == ["transformer_blocks.0", "transformer_blocks.1"]
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in model.bank.parameters()) + 1000
    network, given = backbone(), batch(2, dtype=torch.float32)
    noise = torch.randn(2, 1, 8, 8)
    with torch.no_grad(), loaded.attach(network.denoiser), model.attach(model.backbone.network.denoiser):
        ours, theirs = (n(noise, torch.tensor(500.0), given["text"]) for n in (network, model.backbone.network))
    assert torch.equal(ours, theirs)
    with pytest.raises(InputError, match="for_training=True"):
        loaded.sample(given["text"])


def test_stored_model_trains_on_with_its_backbone_and_no_other(trained: Any, tmp_path: Path) -> None:
    model, _, _ = trained
    model.save_pretrained(tmp_path)
    again = zoo.SoftREPA.from_pretrained(
        tmp_path, for_training=True, backbone=backbone(), classifier=model.classifier.network
    )
    quick_trainer(max_steps=1).fit(again, Pairs())
    with pytest.raises(InputError, match="backbone"):
        zoo.SoftREPA.from_pretrained(
            tmp_path, for_training=True, backbone=backbone(seed=7), classifier=model.classifier.network
        )


def test_a_gradient_scaler_reaches_the_inner_gradient(exact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = softrepa().double()
    seen: list[float] = []
    from zoo.lightning_modules import softrepa as module

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(options["backward_scale"])
        return contrast(*args, **options)

    contrast = module.contrast
    monkeypatch.setattr(module, "contrast", watched)
    scaler = type("Scaler", (), {"get_scale": lambda self: 1024.0})()
    monkeypatch.setattr(
        type(model),
        "_trainer",
        type("T", (), {"precision_plugin": type("P", (), {"scaler": scaler})()})(),
        raising=False,
    )
    monkeypatch.setattr(model, "_trainer", type(model)._trainer)
    _, gradient = step(model, batch())
    assert seen == [1024.0]
    _, expected = step(exact, batch())
    for ours, theirs in zip(gradient, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_runs(precision: Any) -> None:
    model = softrepa()
    before = copy.deepcopy(model.bank)
    evaluating(precision=precision, max_steps=2, limit_val_batches=1).fit(model, Pairs())
    assert all(bool(p.isfinite().all()) for p in model.bank.parameters())
    assert not torch.equal(model.bank.base, before.base)
    if precision == "bf16-mixed":
        assert model.bank.base.dtype == torch.float32


def test_batch_of_one_has_no_negatives(exact: Any) -> None:
    loss, gradient = step(exact, batch(1))
    assert loss == 0
    assert all(bool((g == 0).all()) for g in gradient)


def _gathered(rank: int, world: int) -> tuple[Tensor, list[Tensor]]:
    """One step of a rank with half of a batch, against the captions of all."""

    class Strategy:
        @staticmethod
        def broadcast(value: Any) -> Any:
            given = [value]
            torch.distributed.broadcast_object_list(given, src=0)
            return given[0]

    model = softrepa(gather_negatives=True, mask_equal="labels").double()
    trainer = type("T", (), {"strategy": Strategy(), "precision_plugin": None})()
    model._trainer = trainer
    type(model).trainer = property(lambda self: trainer)  # type: ignore[method-assign, assignment]
    half = {name: value.chunk(world)[rank] for name, value in batch(4).items()}
    # The first process's time and noise count.
    return step(model, half, seed=3 + rank)


def test_two_processes_equal_one(two_processes: Callable[..., Any]) -> None:
    loss, gradient = step(softrepa(mask_equal="labels").double(), batch(4))
    parts = two_processes(_gathered)
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, loss, rtol=1e-9, atol=0)
    for index, expected in enumerate(gradient):
        mean = sum(part[1][index] for part in parts) / 2
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-15)


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "softrep"}, "objective must be one of.*softrepa"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"eval_timesteps": []}, "eval_timesteps"),
        ({"eval_timesteps": [1000]}, "0 … 999"),
        ({"width": 8}, "width is 8, but 16"),
        ({"depth": 5}, "depth is 5, but 2"),
        ({"blocks": [7]}, "0 … 2"),
        ({"backbone": nn.Linear(2, 2)}, "Linear has no denoiser"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        softrepa(**options)


def test_no_backbone() -> None:
    with pytest.raises(InputError, match="backbone must be given"):
        zoo.SoftREPA()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([1], {}, "a batch must be a dict"),
        ({"image": torch.zeros(2, 1, 8, 8)}, {}, '"text"'),
        ({"image": torch.zeros(2, 1, 8, 8), "text": torch.ones(2, 5).long()}, {"mask_equal": "labels"}, '"label"'),
    ],
)
def test_bad_batches(given: Any, options: dict[str, Any], message: str) -> None:
    model = softrepa(**options)
    with pytest.raises(InputError, match=message):
        model.training_step(given, 0)


def test_a_judge_needs_labels() -> None:
    tower = zoo.towers.create(Judge(), frozen=True)
    with pytest.raises(InputError, match="label"):
        PromptedSamples(tower, 2).take({"image": torch.zeros(2, 1, 8, 8), "text": torch.ones(2, 5).long()})
    assert PromptedSamples(tower, 2).judge(lambda text: text) == {}
    assert PromptedSamples(tower, 2).figure() is None
