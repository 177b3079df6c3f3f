"""AdversarialCalibration: its class centres, what it stores, and what is refused at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo.lightning_modules.advcal import AdversarialCalibration

import zoo
from tests.advcal_cases import INPUTS
from tests.calibration_cases import Toy, quiet, toy, toy_data
from tests.stored import config_of, seeded_distillation, tensors_of
from zoo.class_centres import Centres, centre_digests
from zoo.data.digits_modalities import DigitsModalitiesDataModule
from zoo.errors import InputError

SMALL_TEXT = {"width": 16, "depth": 1, "heads": 2, "output_dim": 64}
RANGES: Any = {"image": (-0.8125, 1.848), "profile": (0.0, 1.0)}


def digits_model(**options: Any) -> AdversarialCalibration:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "encoders": {"image": "zoo/resnet8", "profile": "zoo/resnet8"},
        "encoder_options": {name: {"in_chans": 1} for name in RANGES}, "text": "zoo/text_transformer",
        "text_options": SMALL_TEXT, "valid_range": RANGES, "eval_samples": 4, "eval_steps": 1, "steps": 1, "eps": 0.1,
        **options,
    }  # fmt: skip
    return AdversarialCalibration(given.pop("encoders"), **given)


def data() -> DigitsModalitiesDataModule:
    return DigitsModalitiesDataModule(train_samples=32, batch_size=16)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdversarialCalibration, Path]:
    """A model after a fit with a stored encoder, the folder of which is gone, and where it is stored itself."""
    folder = tmp_path_factory.mktemp("advcal")
    images = seeded_distillation().save_pretrained(folder / "nd")
    model = digits_model(
        encoders={"image": str(images), "profile": "zoo/resnet8"}, encoder_options={"profile": {"in_chans": 1}}, lr=1e-2,
        templates={"image": ["a photo of a {}", "the digit {}"]},
    )  # fmt: skip
    trainer = quiet(max_epochs=1)
    trainer.fit(model, data())
    trainer.save_checkpoint(folder / "one.ckpt")
    model.save_pretrained(folder / "stored")
    for file in images.iterdir():
        file.unlink()
    return model.eval(), folder


def test_digits_round_trip_needs_neither_text_nor_folders(fitted: tuple[AdversarialCalibration, Path]) -> None:
    model, folder = fitted
    again = zoo.from_pretrained(folder / "stored")
    assert isinstance(again, AdversarialCalibration)
    images, profiles = torch.randn(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    assert torch.equal(again(images), model(images))
    assert torch.equal(again.logits("profile", profiles), model.logits("profile", profiles))
    assert "text" not in again.frozen_towers
    config = config_of(folder / "stored")
    assert set(config["omitted"]) == {"text"}
    assert config["omitted"]["text"]["training_only"]
    assert {name.split(".")[0] for name in tensors_of(folder / "stored")} == {
        "heads", "encoders", "centres", "centre_mask",
    }  # fmt: skip
    stored = tensors_of(folder / "stored")
    assert stored["centres"].shape == (2, 10, 2, 64)
    assert stored["centre_mask"].sum((1, 2)).tolist() == [20, 10]  # the profile has the one template of its own
    found = centre_digests(Centres(stored["centres"], stored["centre_mask"]), ["image", "profile"])
    assert config["args"]["centre_sha256"] == found
    (metrics,) = quiet().validate(again, data(), verbose=False)
    assert {"val/adversarial/full", "val/adversarial/backbone", "val/profile/adversarial/full"} <= metrics.keys()


def test_a_stored_model_is_a_tower_name(fitted: tuple[AdversarialCalibration, Path]) -> None:
    model, folder = fitted
    tower = zoo.towers.create(str(folder / "stored"), frozen=True, embedding=True)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(tower.features(x), model(x))
    assert tower.dim == 64


def test_checkpoints_bring_the_centres(fitted: tuple[AdversarialCalibration, Path]) -> None:
    model, folder = fitted
    again = AdversarialCalibration.load_from_checkpoint(folder / "one.ckpt", weights_only=True).eval()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_other_classes_are_refused(fitted: tuple[AdversarialCalibration, Path]) -> None:
    model, folder = fitted
    options: dict[str, Any] = {
        "encoders": {"image": model.encoder("image").network, "profile": "zoo/resnet8"},
        "encoder_options": {"profile": {"in_chans": 1}},
    }
    renamed = digits_model(**options, class_names=[str(n) for n in range(1, 11)], centre_sha256=model.centre_sha256)
    with pytest.raises(
        InputError, match=r"the class centres are not those that this model was trained with: image \w{8}…"
    ):
        quiet(max_epochs=1).fit(renamed, data())
    renamed = digits_model(**options, class_names=[str(n) for n in range(1, 11)])
    with pytest.raises(
        InputError, match=r"the class centres are not those of the checkpoint|is not the one this model"
    ):
        quiet(max_epochs=2).fit(renamed, data(), ckpt_path=str(folder / "one.ckpt"), weights_only=True)


def test_tampered_centres_are_refused(fitted: tuple[AdversarialCalibration, Path]) -> None:
    again = zoo.from_pretrained(fitted[1] / "stored")
    assert isinstance(again.centres, torch.Tensor)
    again.centres.neg_()
    with pytest.raises(InputError, match=r"the class centres are not those that this model was trained with"):
        quiet().validate(again, data(), verbose=False)


def test_prompts_become_centres() -> None:
    model = digits_model(class_names=["cat", "dog"], templates={"image": ["a {}", "the {}"]})
    tokenizer: Any = model.text.tokenizer
    quiet(limit_val_batches=0).validate(model, data(), verbose=False)
    texts = ["a cat", "the cat", "a dog", "the dog", "a profile of a cat", "a profile of a dog"]
    with torch.no_grad():
        expected = F.normalize(model.text.features(tokenizer(texts)), dim=1)
    assert model.centres is not None
    assert model.centre_mask is not None
    torch.testing.assert_close(model.centres[0], expected[:4].view(2, 2, 64))
    torch.testing.assert_close(model.centres[1, :, 0], expected[4:])
    assert model.centre_mask.tolist() == [[[True, True]] * 2, [[True, False]] * 2]


def test_modules_are_asked_for_again(tmp_path: Path) -> None:
    model = toy(given_head=True).float()
    quiet(max_epochs=1, limit_val_batches=0).fit(model.double(), toy_data())
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'encoders' was a ready module.*pass encoders="):
        zoo.from_pretrained(tmp_path)
    blank = Toy()
    nn.init.zeros_(blank.linear.weight)
    again = zoo.from_pretrained(tmp_path, encoders={"image": blank})
    assert torch.equal(again(INPUTS), model.eval()(INPUTS))


def test_public_encoders_are_not_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo.towers, "has_public_weights", lambda name: name == "zoo/resnet8")
    model = digits_model(text=None, text_options=None, centres=torch.eye(10, 64).tolist())
    assert set(model.frozen_towers) == {"image_encoder", "profile_encoder"}
    model.save_pretrained(tmp_path)
    assert {name.split(".")[0] for name in tensors_of(tmp_path)} == {"heads", "centres", "centre_mask"}
    assert set(config_of(tmp_path)["omitted"]) == {"image_encoder", "profile_encoder"}
    assert "centres" not in config_of(tmp_path)["args"]
