"""STRUCTURE's module: its objective, the warm-up, the heads, the layers it chooses, and what is stored."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from zoo.lightning_modules.structure import StructureAlignment

import zoo
from tests.losses.test_structure import A1, A2, X1, X2
from tests.metrics.structure_layers import IMAGE_LAYERS, TEXT_LAYERS
from tests.stored import config_of, seeded_distillation, tensors_of
from tests.training import quick_trainer
from zoo.alignment_heads import LinearHead, LowRankHead, build_head
from zoo.data import DigitsCaptionsDataModule, FeaturePairsDataModule
from zoo.errors import InputError

WIDTHS = {"image": 6, "text": 5}
SMALL_TEXT = {"width": 16, "layers": 2, "heads": 2}


def build(**options: Any) -> StructureAlignment:
    """Towers that are features already, so that a step can be written down."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "image": "zoo/features", "image_options": {"dim": WIDTHS["image"]}, "text": "zoo/features",
        "text_options": {"dim": WIDTHS["text"]}, "embed_dim": 4, "recall": (1,), "warmup_steps": 4, "schedule": "cosine",
        **options,
    }  # fmt: skip
    return StructureAlignment(given.pop("image"), given.pop("text"), **given)


def rows(samples: int = 32, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(samples, WIDTHS["image"], generator=g, dtype=dtype)
    text = image[:, : WIDTHS["text"]] + 0.1 * torch.randn(samples, WIDTHS["text"], generator=g, dtype=dtype)
    return {"image": image, "text": text, "id": torch.arange(samples)}


def pairs(samples: int = 32, batch_size: int = 16, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    table = rows(samples, dtype)
    return DataLoader([{k: v[i] for k, v in table.items()} for i in range(samples)], batch_size=batch_size)  # type: ignore[arg-type]


def at_step(model: StructureAlignment, step: int) -> dict[str, Any]:
    """Let a bare module believe that it trains; return what it logs."""
    logged: dict[str, Any] = {}
    trainer = type("T", (), {"training": True, "world_size": 1, "global_step": step, "log_every_n_steps": 10**9})()
    changed: Any = model
    changed._trainer = trainer
    changed.log_dict = lambda values, **_: logged.update(values)
    return logged


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


class Encoder(nn.Module):
    """A tower with weights of its own."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, 7)
        self.output_dim = 7

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


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


def test_two_processes_equal_one() -> None:
    one = build(lr=1e-2, schedule="constant", warmup_steps=2, head="mlp").double()
    two = copy.deepcopy(one)
    for model, processes in ((one, 1), (two, 2)):
        trainer = pl.Trainer(
            accelerator="cpu", devices=processes, strategy="ddp_spawn" if processes > 1 else "auto", precision="64-true",
            max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=True,
        )  # fmt: skip
        # All pairs in one batch: Lightning's sampler shuffles, and losses over all of them do not care.
        trainer.fit(model, pairs(32, 32 // processes, torch.float64))
    for (key, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=key)


def test_half_precision_autocast() -> None:
    model = build()
    trainer = quick_trainer(max_epochs=3, precision="bf16-mixed")
    trainer.fit(model, pairs())
    assert bool(torch.isfinite(trainer.callback_metrics["train/loss"]))
    assert model.image_head.weight.dtype == torch.float32


# -- layers --------------------------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """A block that gives recorded rows by the number of the sample."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.register_buffer("table", table.float())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.table[x[:, 0].long()])


class Layered(nn.Module):
    def __init__(self, tables: list[Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Recorded(table) for table in tables)
        self.output_dim = tables[-1].shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return [block(x) for block in self.blocks][-1]


def numbered() -> DataLoader[Any]:
    number = torch.arange(12.0).unsqueeze(1)
    return DataLoader([{"image": number[i], "text": number[i]} for i in range(12)], batch_size=6)  # type: ignore[arg-type]


def layered(**options: Any) -> StructureAlignment:
    return build(
        image=Layered(IMAGE_LAYERS), image_options=None, text=Layered(TEXT_LAYERS), text_options=None, **options
    )


def test_golden_layers_of_the_table(tmp_path: Path) -> None:
    """c8 of the project's notes: k = 5 for 12 samples, best pair (1, 0)."""
    model = layered()
    with pytest.raises(InputError, match="the image layer is not chosen yet: fit the model, or name image_layer"):
        model.encode_image(torch.zeros(2, 1))
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, numbered())
    assert model.layers == {"image": "blocks.1", "text": "blocks.0"}
    assert model.layer_scores is not None
    assert model.layer_scores.k == 5
    assert model.layer_scores.score == pytest.approx(0.9666666667)
    assert {
        "image_layer": "blocks.1",
        "text_layer": "blocks.0",
        "image_dim": 7,
        "text_dim": 5,
    }.items() <= model.hparams.items()
    expected = F.normalize(model.image_head(IMAGE_LAYERS[1][3:4].float()), dim=1)
    torch.testing.assert_close(model.encode_image(torch.tensor([[3.0]])), expected)

    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = layered()
    quick_trainer(max_epochs=2).fit(resumed, numbered(), ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)
    assert resumed.layers == model.layers
    other = layered(image_layer="blocks.2")
    with pytest.raises(InputError, match=r"image_layer is 'blocks.2', the checkpoint was trained with 'blocks.1'"):
        quick_trainer(max_epochs=2).fit(other, numbered(), ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)


def test_last_and_named_layers() -> None:
    model = layered(layers="last")
    quick_trainer(max_steps=1).fit(model, numbered())
    assert model.layers == {"image": "blocks.2", "text": "blocks.1"}
    model = layered(text_layer="blocks.1")
    quick_trainer(max_steps=1).fit(model, numbered())
    assert model.layers["text"] == "blocks.1"
    assert model.layer_scores is not None
    assert model.layer_scores.scores.shape == (3, 1)
    with pytest.raises(InputError, match=r"no module 'blocks.3'.*blocks"):
        quick_trainer(max_steps=1).fit(layered(image_layer="blocks.3"), numbered())


# -- data and storage ----------------------------------------------------------------------------------------------


def test_digits_round_trip_is_usable_at_once(tmp_path: Path) -> None:
    images = seeded_distillation().save_pretrained(tmp_path / "nd")
    torch.manual_seed(0)
    model = StructureAlignment(
        str(images), "zoo/text_transformer", text_options=SMALL_TEXT, embed_dim=8, cache=str(tmp_path / "cache")
    )
    data = DigitsCaptionsDataModule(train_samples=64, batch_size=32)
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, data)
    assert None not in model.layers.values()
    folder = model.save_pretrained(tmp_path / "stored")
    for file in images.iterdir():
        file.unlink()
    again = zoo.from_pretrained(folder)
    assert isinstance(again, StructureAlignment)
    assert again.layers == model.layers
    config = config_of(folder)
    assert config["omitted"] == {}
    assert "cache" not in config["args"]
    assert config["golden"]["input_shape"] == [1, 1, 8, 8]
    prompts, pictures = ["a photo of a 3", "the digit seven"], torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.encode_image(pictures), model.eval().encode_image(pictures))
        assert torch.equal(again.encode_text(prompts), model.encode_text(prompts))
        assert torch.equal(again.encode_text(data.tokenize(prompts)), model.encode_text(prompts))
        torch.testing.assert_close(again.encode_text(prompts).norm(dim=1), torch.ones(2))
    tester = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = tester.test(again, DigitsCaptionsDataModule(train_samples=64, batch_size=256), verbose=False)
    assert 0 <= found["test/zero_shot/seen"] <= 1


def test_heads_alone_are_stored_beside_public_towers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo.towers, "has_public_weights", lambda name: name == "zoo/features")
    model = build(text=Encoder(5), text_options=None, image_layer="features", text_layer="features")
    assert set(model.frozen_towers) == {"image"}
    model.save_pretrained(tmp_path)
    assert {name.split(".")[0] for name in tensors_of(tmp_path)} == {"image_head", "text_head", "text"}
    assert set(config_of(tmp_path)["omitted"]) == {"image"}


def test_precomputed_features(tmp_path: Path) -> None:
    table = rows(40)
    for name in ("image", "text"):
        np.save(tmp_path / f"{name}.npy", table[name].numpy())
    files = {name: str(tmp_path / f"{name}.npy") for name in ("image", "text")}
    model = build()
    quick_trainer(max_epochs=1).fit(model, FeaturePairsDataModule(features=files, batch_size=16))
    again = zoo.from_pretrained(model.save_pretrained(tmp_path / "stored"))
    assert torch.equal(again.encode_text(table["text"]), model.eval().encode_text(table["text"]))
    with pytest.raises(InputError, match=r"the text tower reads no text.*give its tensors"):
        again.encode_text(["hello"])
    assert {name.split(".")[0] for name in tensors_of(tmp_path / "stored")} == {"image_head", "text_head"}


def test_the_cache_replaces_the_towers(tmp_path: Path) -> None:
    data = DigitsCaptionsDataModule(train_samples=60, batch_size=32, augment=True)
    seen: list[int] = []
    metrics = []
    for _ in range(2):
        torch.manual_seed(0)
        model = StructureAlignment(
            zoo.towers.create("zoo/resnet8", in_chans=1).network, "zoo/text_transformer", text_options=SMALL_TEXT,
            embed_dim=8, image_layer="layer2.0", image_dim=32, text_layer="features", text_dim=64, cache=str(tmp_path),
            warmup_steps=1,
        )  # fmt: skip
        model.image.register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
        data.setup()
        own: Any = data.splits
        trainer = quick_trainer(max_epochs=2)
        trainer.fit(model, data)
        assert data.splits is own
        metrics.append(float(trainer.callback_metrics["train/loss"]))
        # The first fit runs over the training and the validation images once, the second over none.
        assert sum(seen) == 60 + len(own.val)
    assert metrics[0] == metrics[1]
    facts = json.loads((tmp_path / "train" / "facts.json").read_text())
    assert facts["samples"] == 60
    stored = np.load(tmp_path / "train" / "image.npy")
    images = next(iter(data.train_eval_dataloader()))["image"]
    with torch.no_grad():
        expected = model.image.layers(images, ["layer2.0"])["layer2.0"].mean((2, 3))
    torch.testing.assert_close(torch.from_numpy(stored[:32]), expected, rtol=1e-5, atol=1e-6)

    torch.manual_seed(0)
    other = StructureAlignment(
        zoo.towers.create("zoo/resnet8", in_chans=1).network, "zoo/text_transformer", text_options=SMALL_TEXT,
        embed_dim=8, image_layer="layer1.0", text_layer="features", cache=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"made with other layers.*layer2.0.*layer1.0.*another folder, or delete it"):
        quick_trainer(max_epochs=1).fit(other, data)
    with pytest.raises(InputError, match="cache needs one of the zoo's data modules"):
        quick_trainer(max_epochs=1).fit(build(cache=str(tmp_path)), pairs())


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "lineer"}, "head must be one of linear, .*got 'lineer'.*linear"),
        ({"embed_dim": 0}, "embed_dim must be positive, got 0"),
        ({"base": "csa"}, "base must be one of clip, siglip, got 'csa'"),
        ({"structure_weight": -1.0}, "structure_weight must be finite and not negative, got -1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"structure_temperature": 0.0}, "structure_temperature must be positive or None, got 0.0"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"margin": -0.1}, "margin must be finite and not negative, got -0.1"),
        ({"divergence": "kl"}, "divergence must be one of released, js, got 'kl'"),
        ({"layers": "first"}, "layers must be one of select, last, got 'first'"),
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
