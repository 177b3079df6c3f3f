"""FlowMatching: its loss, what it does to captions, what it says of its samples, and what it stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from zoo.lightning_modules.flow_matching import FlowMatching

import zoo
from tests.stored import config_of, tensors_of
from tests.training import quick_trainer
from zoo import towers
from zoo.errors import InputError

SMALL: dict[str, Any] = {
    "vocab_size": 30, "context_length": 4, "width": 16, "depth": 2, "heads": 2, "text_width": 8,
}  # fmt: skip


def build(**options: Any) -> FlowMatching:
    return FlowMatching(**{"backbone_options": SMALL, "sample_steps": 2, **options})


def judged(**options: Any) -> FlowMatching:
    return build(classifier="zoo/resnet8", classifier_options={"in_chans": 1}, **options)


def batch(count: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "image": torch.randn(count, 1, 8, 8, generator=generator),
        "text": torch.randint(1, 30, (count, 4), generator=generator),
        "label": torch.arange(count) % 10,
    }


def loader(count: int = 12, batch_size: int = 6) -> DataLoader[Any]:
    rows = batch(count)
    return DataLoader([{name: value[i] for name, value in rows.items()} for i in range(count)], batch_size=batch_size)  # type: ignore[arg-type]


def opened(model: FlowMatching) -> FlowMatching:
    """A model whose gates are open, so that captions count."""
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def validating(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **{"num_sanity_val_steps": 0, "max_epochs": 1, **options},
    )  # fmt: skip


# -- the loss ------------------------------------------------------------------------------------------------------


def test_loss_restated() -> None:
    model, rows = opened(build(caption_dropout=0.0, time_mean=0.4, time_std=0.7)), batch()
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    torch.manual_seed(5)
    loss = model.training_step(rows, 0)
    torch.manual_seed(5)
    share = torch.sigmoid(0.4 + 0.7 * torch.randn(6))
    noise = torch.randn(6, 1, 8, 8)
    mixed = rows["image"].lerp(noise, share.view(-1, 1, 1, 1))
    velocity = model.backbone(mixed, 1000 * share, rows["text"])
    torch.testing.assert_close(loss, F.mse_loss(velocity, noise - rows["image"]))


def test_training_lowers_the_loss() -> None:
    model = build(lr=0.01, lr_warmup_steps=0, caption_dropout=0.0)
    rows = batch(2)
    before = float(model._fixed_error(rows["image"], rows["text"], seed=0).detach())
    quick_trainer(max_epochs=1).fit(model, DataLoader([rows] * 40, batch_size=None))  # type: ignore[arg-type]
    after = float(model._fixed_error(rows["image"], rows["text"], seed=0).detach())
    assert after < 0.7 * before


def test_half_precision_trains() -> None:
    model = judged(eval_samples=4)
    validating(precision="bf16-mixed").fit(model, loader(), loader())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_some_captions_are_left_out() -> None:
    model, rows = build(caption_dropout=0.3), batch(400)
    told = model.backbone.condition(rows["text"])
    dropped, null = model._dropped(told), model.backbone.null_condition(400)
    gone = torch.stack([(dropped[name] == null[name]).flatten(1).all(1) for name in told])
    kept = torch.stack([(dropped[name] == told[name]).flatten(1).all(1) for name in told])
    assert bool((gone[0] == gone[1]).all())
    assert bool((gone ^ kept).all())
    assert 0.2 < float(gone[0].float().mean()) < 0.4


def test_some_captions_are_anothers() -> None:
    model = build(caption_noise=0.25)
    text = torch.arange(400)[:, None].expand(-1, 4)
    misled = model._misled(text)
    own = (misled == text).all(1)
    assert 0.65 < float(own.float().mean()) < 0.85
    assert bool((misled[:, :1] == misled).all())
    assert torch.equal(model._misled(text[:1]), text[:1])
    assert build(caption_noise=0.0)._misled(text) is text


def test_the_learning_rate_rises_and_falls() -> None:
    model = build(lr=0.1, lr_warmup_steps=3, decay=True)
    rates: list[float] = []

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    quick_trainer(max_epochs=5, callbacks=[Note()]).fit(model, loader(12, 6))
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.03
    with pytest.raises(InputError, match="decay needs a run of known length"):
        quick_trainer(max_epochs=-1).fit(build(decay=True), loader())


# -- evaluation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_validation_loss_is_always_the_same() -> None:
    model = opened(build())
    first, second = (validating().validate(model, loader(), verbose=False)[0] for _ in range(2))
    assert first == second
    errors = []
    for seed in (0, 1):
        rows = {name: value[6 * seed : 6 * seed + 6] for name, value in batch(12).items()}
        noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            mixed, time = rows["image"].lerp(noise, share), torch.full((6,), 1000 * share)
            velocity = model.backbone(mixed, time, rows["text"])
            errors.append((velocity - noise + rows["image"]).square().mean())
    assert first == {"val/loss": pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)}


def test_samples_are_judged_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = judged(eval_samples=15), loader(24, 12)
    trainer = validating()
    trainer.fit(model, data, data)
    found = dict(trainer.callback_metrics)
    assert {"train/loss", "val/loss", "val/alignment", "val/frechet"} <= found.keys()
    assert model.card_figures()["samples"][:4] == b"\x89PNG"
    assert {"test/loss", "test/alignment", "test/frechet"} == trainer.test(model, data, verbose=False)[0].keys()
    # The prompts are the first ones of the split, and the noise is that of seed 0.
    asked: list[Tensor] = []
    update = model.evaluation.update  # type: ignore[union-attr]
    monkeypatch.setattr(
        model.evaluation, "update", lambda images, labels: asked.append(images) or update(images, labels)
    )
    again = trainer.validate(model, data, verbose=False)[0]
    assert again["val/frechet"] == pytest.approx(float(found["val/frechet"]), rel=1e-5)
    torch.testing.assert_close(asked[0], model.sample(batch(24)["text"][:15], noise=fixed_noise(15)))


def fixed_noise(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_nothing_is_sampled_where_nobody_judges() -> None:
    for model in (build(), judged(eval_samples=0)):
        found = validating().validate(model, loader(), verbose=False)[0]
        assert found.keys() == {"val/loss"}
        assert model.card_figures() == {}


def test_the_sanity_check_samples_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = judged(eval_samples=4)
    calls: list[bool] = []
    original = model.draw_samples
    monkeypatch.setattr(
        model, "draw_samples", lambda *a, **k: calls.append(model.trainer.sanity_checking) or original(*a, **k)
    )
    validating(num_sanity_val_steps=1).fit(model, loader(), loader())
    assert calls == [False]


# -- samples and storage -------------------------------------------------------------------------------------------


def test_samples() -> None:
    model, text = opened(build()), batch()["text"]
    images = model(text)
    assert images.shape == (6, 1, 8, 8)
    assert torch.equal(images, model(text))
    torch.testing.assert_close(model.sample(text, noise=fixed_noise(6)), images)
    seeded = [model.sample(text, generator=torch.Generator().manual_seed(s), steps=1) for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert not torch.allclose(model.sample(text, noise=fixed_noise(6), guidance=3.0), images)
    torch.testing.assert_close(model.predict_step({"text": text}, 0), images)


def test_stored_without_its_judge(tmp_path: Path) -> None:
    model = opened(judged())
    model.save_pretrained(tmp_path)
    config = config_of(tmp_path)
    assert config["golden"]["input_shape"] == [1, 4]
    assert config["omitted"]["classifier"]["training_only"]
    assert all(name.startswith("backbone.") for name in tensors_of(tmp_path))
    loaded = zoo.from_pretrained(tmp_path)
    assert isinstance(loaded, FlowMatching)
    assert loaded.evaluation is None
    assert torch.equal(loaded(batch()["text"]), model(batch()["text"]))
    backbone = towers.create(str(tmp_path), frozen=True).network
    assert backbone.latent_shape == (1, 8, 8)
    again = FlowMatching(str(tmp_path), sample_steps=2)
    assert torch.equal(again(batch()["text"]), model(batch()["text"]))


def test_a_backbone_of_ones_own(tmp_path: Path) -> None:
    model = FlowMatching(build().backbone, sample_steps=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'backbone' was a ready module"):
        zoo.from_pretrained(tmp_path)
    assert isinstance(zoo.from_pretrained(tmp_path, backbone=build().backbone), FlowMatching)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_dropout": 1.0}, r"caption_dropout must be in \[0, 1\), got 1.0"),
        ({"caption_noise": -0.1}, r"caption_noise must be in \[0, 1\)"),
        ({"sample_steps": 0}, "sample_steps must be at least 1"),
        ({"eval_samples": -1}, "eval_samples must be at least 0"),
        ({"lr": 0.0}, "lr must be positive and finite"),
        ({"guidance": float("nan")}, "guidance must be finite and not negative"),
        ({"time_std": -1.0}, "time_std must be finite and not negative"),
        ({"backbone": "zoo/resnet8", "backbone_options": None}, "CifarResNet has no denoiser, process"),
        ({"backbone_options": {"num_classes": 3}}, "backbone_options may not hold num_classes"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**options)


def test_bad_batches_are_refused() -> None:
    model, rows = build(), batch()
    with pytest.raises(InputError, match='a dict with "image" and "text", got tuple'):
        model.training_step((rows["image"], rows["label"]), 0)
    with pytest.raises(InputError, match=r"got \['image', 'label'\]"):
        model.training_step({"image": rows["image"], "label": rows["label"]}, 0)
    unlabelled = DataLoader([{name: value for name, value in rows.items() if name != "label"}], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="which has no label"):
        validating().validate(judged(), unlabelled, verbose=False)
