"""CLIP and CWCL: what they optimise, what stays frozen, what is stored, and what validation says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import zoo
from tests.hub_fixtures import run_python
from tests.hub_server import HubServer
from tests.processes import fit_in_two_processes
from tests.stored import config_of, seeded_distillation
from tests.training import quick_trainer
from zoo.data import DigitsCaptionsDataModule, FeaturePairsDataModule
from zoo.errors import InputError
from zoo.two_towers import TwoTowerModule

BOTH = pytest.mark.parametrize("name", ["CLIP", "CWCL"])


class Linear(nn.Module):
    """An encoder of vectors."""

    def __init__(self, in_dim: int = 6, output_dim: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, output_dim)
        self.output_dim = output_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def build(name: str, **options: Any) -> TwoTowerModule:
    torch.manual_seed(0)
    given = {"trained": Linear(5, 4), "frozen": Linear(6, 4), "k": (1,), **options}
    model = getattr(zoo, name)(given.pop("trained"), given.pop("frozen"), **given)
    assert isinstance(model, TwoTowerModule)
    return model


def pairs(samples: int = 32, batch_size: int = 16, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(samples, 6, generator=g, dtype=dtype)
    text = image[:, :5] + 0.1 * torch.randn(samples, 5, generator=g, dtype=dtype)
    rows = [{"image": image[i], "text": text[i], "id": i} for i in range(samples)]
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]


def loss_by_hand(name: str, model: TwoTowerModule, batch: dict[str, Tensor]) -> Tensor:
    """The formulas of the two modules' docstrings, dense."""
    r = model.frozen(batch["image"]) if not model.locked else model.frozen.network(batch["image"])
    p, q = F.normalize(model.trained(batch["text"]), dim=1), F.normalize(model.frozen_projection(r), dim=1)
    scores = model.log_scale.exp() * p @ q.T
    own = torch.arange(len(p))
    if name == "CLIP":
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    unit = F.normalize(r.detach(), dim=1)
    weights = (1 + unit @ unit.T) / 2
    soft = -(weights / weights.sum(1, keepdim=True) * scores.log_softmax(1)).sum(1).mean()
    return soft + F.cross_entropy(scores.T, own)


@BOTH
@pytest.mark.parametrize("options", [{}, {"embed_dim": 3}, {"init_scale": 2.0, "chunk_size": 5}], ids=str)
def test_identity_training_step_is_the_formula(name: str, options: dict[str, Any]) -> None:
    model = build(name, **options)
    model._trainer = type("T", (), {"training": False, "world_size": 1})()  # type: ignore[assignment]
    model.log_dict = lambda *a, **k: None  # type: ignore[method-assign]
    batch = next(iter(pairs()))
    loss, expected = model.training_step(batch, 0), loss_by_hand(name, model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@BOTH
def test_the_frozen_tower_stays_and_the_trained_one_learns(name: str) -> None:
    model = build(name, lr=1e-2)
    frozen = copy.deepcopy(model.frozen.state_dict())
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, pairs())
    first = float(trainer.callback_metrics["train/loss"])
    trainer = quick_trainer(max_epochs=20)
    trainer.fit(model, pairs())
    assert float(trainer.callback_metrics["train/loss"]) < first
    assert all(torch.equal(value, frozen[key]) for key, value in model.frozen.state_dict().items())
    assert not model.frozen.network.training
    assert not any(parameter.requires_grad for parameter in model.frozen.parameters())


@BOTH
@pytest.mark.parametrize("embed_dim", [None, 3])
def test_gradients_reach_the_input_of_the_locked_tower(name: str, embed_dim: int | None) -> None:
    model = build(name, embed_dim=embed_dim).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model.encode("image", x), (x,))
    model.encode("image", x).sum().backward()
    assert all(parameter.grad is None for parameter in model.frozen.parameters())
    features, _ = model._frozen_pair(x)
    assert not features.requires_grad  # the geometry is a constant of the loss
    assert not model.encode("image", x.detach()).requires_grad or embed_dim is not None


def test_clip_trains_both_towers_when_none_is_locked() -> None:
    model = build("CLIP", locked=False)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    quick_trainer(max_epochs=1).fit(model, pairs())
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_weight_source_matters_where_a_head_stands_behind_the_frozen_tower() -> None:
    losses = []
    for source in ("frozen", "projected"):
        model = build("CWCL", embed_dim=3, weight_source=source)
        trainer = quick_trainer(max_steps=1)
        trainer.fit(model, pairs())
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_the_scale_is_bounded_and_can_be_fixed() -> None:
    model = build("CLIP", init_scale=100.0, lr=1.0)
    quick_trainer(max_epochs=3).fit(model, pairs())
    assert model.scale.item() <= 100.0 + 1e-3
    fixed = build("CLIP", init_scale=7.0, learn_scale=False)
    quick_trainer(max_epochs=1).fit(fixed, pairs())
    assert fixed.scale.item() == pytest.approx(7.0)


def test_cwcl_logs_what_there_is_to_learn() -> None:
    model = build("CWCL")
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, pairs())
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert found["cwcl/kl"] == pytest.approx(found["cwcl/from_trained"] - found["cwcl/entropy"], abs=1e-5)
    assert found["cwcl/kl"] >= 0
    assert 1 <= found["cwcl/effective_positives"] <= 16


class Perfect(nn.Module):
    """Two-dimensional inputs are their own embeddings."""

    output_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Words(Perfect):
    """Tokens (B, L): the second one is the number of the class."""

    context_length = 4
    vocab_size = 49408

    def forward(self, x: Tensor) -> Tensor:
        seen = (x == 49408 - 1).long().argmax(1)  # the end token of "a" stands at 2, of "a b" at 3
        return torch.stack([(seen == 2).float(), (seen == 3).float()], 1) + self.bias


class PromptedPairs(pl.LightningDataModule):
    def val_dataloader(self) -> DataLoader[Any]:
        images = torch.eye(2).repeat(4, 1)
        start, end = 49406, 49407
        texts = torch.tensor([[start, 320, end, 0], [start, 320, 321, end]]).repeat(4, 1)
        labels = torch.arange(2).repeat(4)
        rows = [{"image": images[i], "text": texts[i], "label": labels[i], "id": i} for i in range(8)]
        return DataLoader(rows, batch_size=3)  # type: ignore[arg-type]

    def zero_shot_prompts(self) -> dict[str, list[list[str]]]:
        return {"right": [["a"], ["a b"]], "wrong": [["a b"], ["a"]]}


@BOTH
def test_golden_validation_of_a_perfect_pair(name: str) -> None:
    model = build(name, trained=Words(), frozen=Perfect(), k=(1, 4))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(model, PromptedPairs(), verbose=False)
    assert found["val/zero_shot/right"] == 1.0
    assert found["val/zero_shot/wrong"] == 0.0
    # Four images share a caption, and ties count against the query.
    assert found["val/retrieval/image_to_text/r1"] == 0.0
    assert found["val/retrieval/image_to_text/r4"] == 1.0
    assert found["val/retrieval/text_to_image/median_rank"] == 4.0
    assert found["val/structure"] == pytest.approx(1.0)
    assert found["val/loss"] > 0


class SameCaption(PromptedPairs):
    """Every image has the caption of class 0: the classes are to be found in the images, not in their captions."""

    def val_dataloader(self) -> DataLoader[Any]:
        rows = list(super().val_dataloader().dataset)
        return DataLoader([{**row, "text": rows[0]["text"]} for row in rows], batch_size=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("flipped", [False, True])
def test_zero_shot_classifies_what_is_not_text(flipped: bool) -> None:
    towers = {"trained": Words(), "frozen": Perfect()}
    if flipped:
        towers = {"trained": Perfect(), "frozen": Words(), "trained_modality": "image", "frozen_modality": "text"}
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(build("CLIP", **towers), SameCaption(), verbose=False)
    assert found["val/zero_shot/right"] == 1.0


@BOTH
def test_resume_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    whole = build(name)
    quick_trainer(max_epochs=4).fit(whole, pairs())
    half = build(name)
    trainer = quick_trainer(max_epochs=4, callbacks=[StopAfter(2)])
    trainer.fit(half, pairs())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = build(name)
    quick_trainer(max_epochs=4).fit(resumed, pairs(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    for (key, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


class StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


SMALL_TEXT = {"width": 16, "depth": 1, "heads": 2}


@BOTH
def test_digits_round_trip_is_usable_at_once(name: str, tmp_path: Path) -> None:
    images = seeded_distillation().save_pretrained(tmp_path / "nd")
    model = build(name, trained="zoo/text_transformer", frozen=str(images), trained_options=SMALL_TEXT)
    data = DigitsCaptionsDataModule(train_samples=64, batch_size=32)
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, data)
    folder = model.save_pretrained(tmp_path / "stored")
    for file in images.iterdir():
        file.unlink()
    again = zoo.from_pretrained(folder)
    assert isinstance(again, TwoTowerModule)
    assert config_of(folder)["omitted"] == {}
    assert config_of(folder)["golden"]["input_shape"] == [1, 16]
    pictures = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.encode_image(pictures), model.eval().encode_image(pictures))
        prompts = ["a photo of a 3", "the digit seven"]
        assert torch.equal(again.encode_text(prompts), model.encode_text(prompts))
        assert torch.equal(again.encode_text(data.tokenize(prompts)), model.encode_text(prompts))
        torch.testing.assert_close(again.encode_text(prompts).norm(dim=1), torch.ones(2))
    assert 'model.encode_text(["a text", "another"])' in (folder / "README.md").read_text()
    # As a tower of another model it gives its embeddings: the network of the trained side.
    tower = zoo.towers.create(str(folder), embedding=True)
    assert tower.tokenizer(prompts).shape == (2, 16)
    torch.testing.assert_close(F.normalize(tower.features(data.tokenize(prompts)), dim=1), again.encode_text(prompts))


def test_a_frozen_tower_of_the_hub_is_not_stored(hub: HubServer, tmp_path: Path) -> None:
    images = seeded_distillation().save_pretrained(tmp_path / "nd")
    code = f"""
import torch, zoo
zoo.hub.push({str(images)!r}, "me/nd-images")
model = zoo.CWCL("zoo/text_transformer", "hf://me/nd-images", trained_options={SMALL_TEXT!r})
model.example_shape = (16,)
assert "frozen" in model.frozen_towers and not any(name.startswith("frozen") for name in model.state_dict())
model.push_to_hub("me/cwcl")
again = zoo.from_pretrained("me/cwcl")
x = torch.randn(2, 1, 8, 8)
assert torch.equal(again.encode_image(x), model.eval().encode_image(x))
"""
    run_python(code, server=hub, home=tmp_path / "home")
    stored = hub.files("me/cwcl")
    assert b'"name": "hf://me/nd-images"' in stored["config.json"]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one = build("CWCL").double()
    two = copy.deepcopy(one)
    options: dict[str, Any] = {
        "precision": "64-true", "max_epochs": 3, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    # All pairs in one batch: Lightning's sampler shuffles, and a loss over all of them does not care.
    pl.Trainer(accelerator="cpu", devices=1, **options).fit(one, pairs(32, 32, torch.float64))
    fit_in_two_processes(two, pairs(32, 16, torch.float64), folder=tmp_path, **options)
    for (key, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=key)


@BOTH
def test_half_precision_autocast(name: str) -> None:
    model = build(name)
    trainer = quick_trainer(max_epochs=1, precision="bf16-mixed")
    trainer.fit(model, pairs())
    assert bool(torch.isfinite(trainer.callback_metrics["train/loss"]))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_compiled_towers_equal_eager() -> None:
    weights = []
    for compiled in (False, True):
        model = build("CWCL")
        if compiled:
            model.trained.compile(backend="aot_eager")
        quick_trainer(max_epochs=1).fit(model, pairs())
        weights.append(model.trained.network.linear.weight.detach().clone())
    torch.testing.assert_close(*weights)


def test_features_of_any_two_modalities(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, width in (("audio", 12), ("text", 8)):
        np.save(tmp_path / f"{name}.npy", generator.standard_normal((40, width), dtype=np.float32))
    data = FeaturePairsDataModule(
        features={name: str(tmp_path / f"{name}.npy") for name in ("audio", "text")}, batch_size=16
    )
    model = build(
        "CWCL", trained="zoo/features", trained_options={"dim": 12}, frozen="zoo/features", frozen_options={"dim": 8},
        trained_modality="audio", frozen_modality="text",
    )  # fmt: skip
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, data)
    again = zoo.from_pretrained(model.save_pretrained(tmp_path / "stored"))
    x = torch.randn(3, 12)
    assert torch.equal(again.encode("audio", x), model.eval().encode("audio", x))
    with pytest.raises(InputError, match=r"the text tower reads no text.*give its tensors"):
        again.encode("text", ["hello"])


def test_speech_against_text_features() -> None:
    rows = [{"speech": 0.1 * torch.randn(2000), "text": torch.randn(8)} for _ in range(4)]
    model = build(
        "CWCL", trained="zoo/log_mel", trained_options={"width": 16, "depth": 1, "heads": 2, "mels": 20, "output_dim": 8},
        frozen="zoo/features", frozen_options={"dim": 8}, trained_modality="speech", frozen_modality="text",
    )  # fmt: skip
    before = model.trained.network.conv1.weight.detach().clone()
    quick_trainer(max_epochs=1).fit(model, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    assert not torch.equal(model.trained.network.conv1.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained_modality": "image"}, "must be two keys of a batch, got 'image' twice"),
        ({"init_scale": 0.0}, "init_scale must be positive and at most max_scale, got 0.0"),
        ({"init_scale": 200.0}, "at most max_scale, got 200.0 and 100.0"),
        ({"embed_dim": 0}, "embed_dim must be positive or None, got 0"),
        ({"lr_warmup_share": 1.0}, r"lr_warmup_share must be a share of the steps in \[0, 1\), got 1.0"),
        ({"kernel": "gauss"}, "kernel must be one of affine, power, exp, topk, got 'gauss'"),
        ({"weight_source": "both"}, "weight_source must be one of frozen, projected"),
        ({"trained": "open_clip/ViT-B-33"}, "no architecture 'ViT-B-33'"),
        ({"frozen": "open_clip/ViT-B-32", "frozen_modality": "speech"}, "has an image and a text side"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("CWCL", **options)


def test_bad_batches() -> None:
    model = build("CWCL")
    rows: list[Any] = [(torch.randn(5), torch.randn(6)) for _ in range(4)]
    with pytest.raises(InputError, match="a batch must be a dict with 'text' and 'image', got list"):
        quick_trainer(max_epochs=1).fit(model, DataLoader(rows, batch_size=2))
    rows = [{"audio": torch.randn(5), "image": torch.randn(6)} for _ in range(4)]
    with pytest.raises(InputError, match="got audio, image: set trained_modality"):
        quick_trainer(max_epochs=1).fit(model, DataLoader(rows, batch_size=2))
    with pytest.raises(InputError, match=r"modality must be one of text, image, got 'txt'.*text"):
        model.encode("txt", torch.randn(2, 5))
