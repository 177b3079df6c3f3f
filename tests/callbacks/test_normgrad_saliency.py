"""Figures at the right times, of the right images and classes, to the right places."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from zoo.callbacks.normgrad_saliency import NormGradSaliency

from tests.callbacks.saliency_runs import (
    Net,
    expected_figure,
    fit,
    loader,
    make,
    picture_files,
    rows,
    saliency_callback,
)
from zoo.errors import InputError

PNG = b"\x89PNG"


def first(count: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    images, labels = rows(seed).tensors
    return images[:count], labels[:count]


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_figure_is_of_the_first_images_and_the_final_weights(tmp_path: Path) -> None:
    module, callback = make(), saliency_callback(layers="second")
    trainer = fit(module, callback, folder=tmp_path)
    expected = expected_figure(module, "conv1x1 norm, epoch 1, step 12", first(), None)
    assert callback.card_figures() == {"saliency": expected}
    assert (tmp_path / "images" / "saliency" / "step-00000012.png").read_bytes() == expected
    assert trainer.global_step == 12


def rotated(logits: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    assert logits.shape == (5, 3)
    return (labels + 1) % 3


@pytest.mark.parametrize("classes", ["label", "least_likely", 2, rotated])
def test_classes(classes: Any, tmp_path: Path) -> None:
    module, callback = make(), saliency_callback(layers="second", classes=classes, method="selective", meta_lr=0.01)
    fit(module, callback, folder=tmp_path, max_epochs=1)
    images, labels = first()
    by_name = {"label": labels, "least_likely": module.eval()(images.clone()).argmin(1), 2: torch.full((5,), 2)}
    explained = by_name.get(classes, (labels + 1) % 3)
    caption = "selective after a step of 0.01, epoch 0, step 6"
    expected = expected_figure(module, caption, first(), explained, explained, method="selective", meta_lr=0.01)
    assert callback.card_figures()["saliency"] == expected


class Scored(Net):
    """A forward that returns no logits."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.net(x)}

    def training_step(self, batch: Any) -> Tensor:
        return self(batch["x"])["logits"].square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch["x"])


def test_score_and_batches_of_another_kind(tmp_path: Path) -> None:
    seen: list[Any] = []

    def score(output: Any, labels: Any) -> Tensor:
        seen.append(labels)
        return output["logits"].logsumexp(1)  # type: ignore[no-any-return]

    def dictionary(pairs: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in pairs]), "y": torch.stack([y for _, y in pairs])}

    data = torch.utils.data.DataLoader(rows(1), batch_size=4, collate_fn=dictionary)
    options: dict[str, Any] = {"score": score, "batch_to_input": lambda batch: batch["x"]}
    without, labelled = saliency_callback(**options), saliency_callback(**options, name="more")
    labelled._first.batch_to_target = lambda batch: batch["y"]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[without, labelled], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Scored(), data, data)
    assert seen[0] is None
    assert torch.equal(seen[1], first()[1])
    assert without.card_figures().keys() == {"saliency"}


def test_given_images_need_no_validation(tmp_path: Path) -> None:
    images, labels = first(3, seed=9)
    module, callback = (
        make(),
        saliency_callback(layers="second", images=images, labels=labels.tolist(), every_n_epochs=2),
    )
    fit(module, callback, folder=tmp_path, val=None, max_epochs=5)
    assert picture_files(tmp_path) == [12, 24, 30]
    expected = expected_figure(module, "conv1x1 norm, epoch 4, step 30", (images, labels), None)
    assert callback.card_figures() == {"saliency": expected}


def test_second_loader_does_not_count(tmp_path: Path) -> None:
    one, two = saliency_callback(layers="second"), saliency_callback(layers="second")
    fit(make(), one, folder=tmp_path, max_epochs=1, val=loader(count=4))  # fewer than the five images that are wanted
    fit(make(), two, folder=tmp_path, max_epochs=1, val=[loader(count=4), loader(7)])
    assert one.card_figures() == two.card_figures()


def test_class_names_and_colours_are_shown(tmp_path: Path) -> None:
    plain, named, coloured = (
        saliency_callback(**options) for options in ({}, {"class_names": ["cat", "dog"]}, {"mean": [0.5], "std": [2.0]})
    )
    for callback in (plain, named, coloured):
        fit(make(), callback, folder=tmp_path, max_epochs=1)
    assert len({callback.card_figures()["saliency"] for callback in (plain, named, coloured)}) == 3


# -- when --------------------------------------------------------------------------------------------------------------


def test_due_epochs_and_the_end(tmp_path: Path) -> None:
    fit(make(), saliency_callback(every_n_epochs=2), folder=tmp_path, max_epochs=5)
    assert picture_files(tmp_path) == [12, 24, 30]


def test_each_validation_of_a_due_epoch_and_the_sanity_check(tmp_path: Path) -> None:
    callback = saliency_callback()
    fit(make(), callback, folder=tmp_path, val_check_interval=0.5, max_epochs=1, num_sanity_val_steps=2)
    assert picture_files(tmp_path) == [3, 6]


def test_fast_dev_run_computes_and_writes_nothing(tmp_path: Path) -> None:
    callback = saliency_callback(max_images=2)
    fit(make(), callback, folder=tmp_path, fast_dev_run=True)
    assert callback.card_figures()["saliency"].startswith(PNG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validate_and_test(tmp_path: Path, inference_mode: bool) -> None:
    module, callback = make(), saliency_callback(layers="second", also_on_test=True)
    options: dict[str, Any] = {"inference_mode": inference_mode, "callbacks": [callback], "default_root_dir": tmp_path}
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **options)
    module.train()
    trainer.validate(module, loader(), verbose=False)
    assert callback.card_figures()["saliency"] == expected_figure(module, "conv1x1 norm, step 0", first(), None)
    trainer.test(module, loader(5), verbose=False)
    expected = expected_figure(module, "conv1x1 norm, step 0", first(seed=5), None)
    assert callback.card_figures()["saliency"] == expected
    callback.also_on_test = False
    trainer.test(module, loader(6), verbose=False)
    assert callback.card_figures()["saliency"] == expected


def test_resume_draws_the_same(tmp_path: Path) -> None:
    whole, module = saliency_callback(layers="second"), make()
    fit(module, whole, folder=tmp_path, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = str(tmp_path / "one.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["callbacks"][whole.state_key]
    assert len(kept.pop("images")) == 64
    assert kept == {}
    assert picture_files(tmp_path) == [6]
    resumed, again = make(), saliency_callback(layers="second")
    fit(resumed, again, folder=tmp_path, ckpt=checkpoint)
    assert picture_files(tmp_path) == [6, 12]
    assert again.card_figures()["saliency"] == expected_figure(resumed, "conv1x1 norm, epoch 1, step 12", first(), None)
    with pytest.warns(UserWarning, match="draws other images than before the checkpoint"):
        fit(make(), saliency_callback(layers="second"), folder=tmp_path, ckpt=checkpoint, val=loader(4))


# -- where to ----------------------------------------------------------------------------------------------------------


class Pictures(CSVLogger):
    """A logger that takes pictures."""

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.taken = [*getattr(self, "taken", []), (key, images[0].size, step)]


def test_loggers_get_the_figure_and_the_ranges(tmp_path: Path) -> None:
    logger = Pictures(tmp_path, name="run", flush_logs_every_n_steps=1)
    one, two = saliency_callback(layers=["second", ""]), saliency_callback(layers="second", method="linear")
    fit(make(), one, two, folder=tmp_path / "root", logger=logger, max_epochs=1, log_every_n_steps=1)
    assert [(key, step) for key, _, step in logger.taken] == [("saliency", 6), ("saliency_2", 6)]
    with Path(logger.log_dir, "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    told = {name: float(line[name]) for line in lines for name in line if name.startswith("saliency") and line[name]}
    assert sorted(told) == sorted(
        f"{name}/{what}"
        for name in ("saliency/second", "saliency/input", "saliency_2/second")
        for what in ("min", "max")
    )
    assert told["saliency_2/second/min"] < 0 <= told["saliency/second/min"] < told["saliency/second/max"]
    assert not (tmp_path / "root").exists()
    assert one.card_figures()["saliency"] != two.card_figures()["saliency"]


def test_card_can_be_left_out(tmp_path: Path) -> None:
    callback = saliency_callback(in_card=False)
    fit(make(), callback, folder=tmp_path, max_epochs=1)
    assert callback.card_figures() == {}
    assert saliency_callback().card_figures() == {}


def test_pickle_and_state_keys() -> None:
    callback = saliency_callback()
    assert pickle.loads(pickle.dumps(callback)).state_key == callback.state_key
    others = [{"classes": "label"}, {"method": "selective"}, {"layers": "first"}, {"name": "a"}, {"meta_lr": 0.1}]
    keys = {callback.state_key, *(saliency_callback(**one).state_key for one in others)}
    assert len(keys) == 6


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
        ({"max_images": 0}, "max_images must be at least 1, got 0"),
        ({"classes": "all"}, "classes must be one of predicted, label, least_likely"),
        ({"classes": -1}, "classes must be one of .* got -1"),
        ({"classes": True}, "classes must be one of .* got True"),
        ({"method": "gradcamm"}, "method must be one of .* Did you mean gradcam"),
        ({"method": "gradcam", "extract": "bias"}, "method stands for extract and aggregate"),
        ({"score": lambda output, _: output[:, 0], "classes": 1}, "leave classes out, or score"),
        ({"layers": "second", "weights": [1.0]}, "weights must be one number a layer"),
        ({"weights": [1.0]}, "weights must be one number a layer, 2"),
        ({"labels": [1]}, "labels belong to images"),
        ({"images": torch.zeros(2, 6, 6)}, "images must be .* got shape"),
        ({"images": torch.zeros(2, 1, 6, 6), "labels": [1]}, "labels must be whole numbers"),
    ],
)  # fmt: skip
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        saliency_callback(**options)


def test_bad_runs_end_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no layer 'secnd'\. Did you mean"):
        fit(make(), saliency_callback(layers="secnd"), folder=tmp_path)
    with pytest.raises(InputError, match="this run has no validation: give images="):
        fit(make(), saliency_callback(), folder=tmp_path, val=None)
    trainer = SimpleNamespace(strategy=object(), callbacks=[])
    with pytest.raises(InputError, match="needs the whole network in one process, which object"):
        saliency_callback().setup(trainer, make(), "fit")  # type: ignore[arg-type]


def test_bad_labels(tmp_path: Path) -> None:
    callback = saliency_callback(classes="label")
    callback._first.batch_to_input = lambda batch: batch[0]
    with pytest.raises(InputError, match="classes='label' needs labels"):
        fit(make(), callback, folder=tmp_path)


def test_training_that_ends_before_validation_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="drew nothing"):
        fit(make(), saliency_callback(), folder=tmp_path, max_steps=3)


def test_layers_without_a_class_are_told(tmp_path: Path) -> None:
    class Pooled(Net):
        def forward(self, x: Tensor) -> Tensor:
            maps = self.net[:7](x)
            return torch.nn.functional.linear(maps.mean((2, 3)), self.net.head.weight[:, :6])  # type: ignore[union-attr, index]

    with pytest.warns(UserWarning, match="Take method='selective' or 'gradcam', or an earlier layer"):
        fit(Pooled(), NormGradSaliency("act2"), folder=tmp_path, max_epochs=1)
