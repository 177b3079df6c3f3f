"""StructureAlignment: the layers it chooses, what it stores, and features that lie on the disk."""

from __future__ import annotations

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
from tests.metrics.structure_layers import IMAGE_LAYERS, TEXT_LAYERS
from tests.stored import config_of, seeded_distillation, tensors_of
from tests.structure_cases import SMALL_TEXT, Encoder, build, pairs, rows
from tests.training import quick_trainer
from zoo.data import DigitsCaptionsDataModule, FeaturePairsDataModule
from zoo.errors import InputError

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
    model.layer_scores.draw(tmp_path / "layers.png")
    assert model.card_figures() == {"layers": (tmp_path / "layers.png").read_bytes()}
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
    model = layered(layer_choice="last")
    quick_trainer(max_steps=1).fit(model, numbered())
    assert model.layers == {"image": "blocks.2", "text": "blocks.1"}
    assert model.card_figures() == {}
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
        str(images), "zoo/text_transformer", text_options=SMALL_TEXT, embed_dim=8, layer_cache=str(tmp_path / "cache")
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
    assert "layer_cache" not in config["args"]
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
            embed_dim=8, image_layer="layer2.0", image_dim=32, text_layer="features", text_dim=64, layer_cache=str(tmp_path),
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
        embed_dim=8, image_layer="layer1.0", text_layer="features", layer_cache=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"made with other layers.*layer2.0.*layer1.0.*another folder, or delete it"):
        quick_trainer(max_epochs=1).fit(other, data)
    with pytest.raises(InputError, match="layer_cache needs one of the zoo's data modules"):
        quick_trainer(max_epochs=1).fit(build(layer_cache=str(tmp_path)), pairs())
