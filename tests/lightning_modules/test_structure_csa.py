"""StructureAlignment with canonical correlation as its base objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from zoo.lightning_modules.structure import StructureAlignment

import zoo
from tests.lightning_modules.test_structure import StopAfter, regulariser_by_hand
from tests.processes import run_processes
from tests.structure_cases import WIDTHS, at_step, build, pairs, rows
from tests.training import quick_trainer
from zoo.canonical_correlation import CanonicalHead, canonical_correlation
from zoo.data import FeaturePairsDataModule
from zoo.errors import InputError


def csa(**options: Any) -> StructureAlignment:
    given = {"base": "csa", "canonical_ridge": 0.1, "image_layer": "features", "text_layer": "features", **options}
    return build(**given)


def closed_form(power: float = 1.0, ridge: float = 0.1) -> tuple[Tensor, Tensor]:
    """Embeddings of all pairs by the function that is tested against other software."""
    batch = rows()
    found = canonical_correlation(batch["image"], batch["text"], dim=4, ridge=ridge)
    sides = zip((batch["image"], batch["text"]), found.means, found.maps, strict=True)
    first, second = ((side.double() - m) @ w * found.correlations ** (power / 2) for side, m, w in sides)
    return first, second


@pytest.mark.parametrize("power", [1.0, 0.0])
def test_identity_heads_begin_in_closed_form(power: float) -> None:
    """With a learning rate of 0 they stay there; one process of shuffled batches sees all pairs."""
    model = csa(lr=0.0, canonical_power=power)
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, DataLoader(pairs().dataset, batch_size=7, shuffle=True))
    for expected, modality in zip(closed_form(power), ("image", "text"), strict=True):
        ours = model.aligned(modality, rows()[modality])
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4)
    assert isinstance(model.image_head, CanonicalHead)
    assert model._moments is None


def test_identity_training_step_is_the_formula() -> None:
    model = csa(structure_temperature=0.2).double()
    with torch.no_grad():
        model.image_head.mean.copy_(torch.linspace(-1, 1, WIDTHS["image"]))
    logged, batch = at_step(model, 9), rows(16, torch.float64)
    loss = model.training_step(batch, 0)
    centred = [batch["image"] - torch.linspace(-1, 1, WIDTHS["image"]).double(), batch["text"]]
    a, b = (x @ head.weight.T for x, head in zip(centred, (model.image_head, model.text_head), strict=True))
    base = -0.01 * F.cosine_similarity(a, b).sum() / 4
    structure = (regulariser_by_hand(centred[0], a, 0.2) + regulariser_by_hand(centred[1], b, 0.2)) / 2
    torch.testing.assert_close(loss, base + 10 * structure, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logged["train/base_loss"], base, rtol=1e-6, atol=1e-8)


def test_refinement_stores_white_heads_and_resumes(tmp_path: Path) -> None:
    """The heads move, their directions keep variance 1, they load, and a run in two parts is one run."""
    options: dict[str, Any] = {"lr": 1e-2, "canonical_ridge": 0.0, "canonical_power": 0.0, "structure_temperature": 0.5}
    model = csa(**options)
    trainer = quick_trainer(max_epochs=4)
    trainer.fit(model, pairs())
    batch, start = rows(), closed_form(0.0, 0.0)
    for modality, before in zip(("image", "text"), start, strict=True):
        z = model.aligned(modality, batch[modality]).double()
        torch.testing.assert_close(z.T @ z / len(z), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-4)
        assert (z - before).abs().max() > 1e-3

    stop = quick_trainer(max_epochs=4, callbacks=[StopAfter(2)])
    stop.fit(csa(**options), pairs())
    stop.save_checkpoint(tmp_path / "half.ckpt")
    resumed = csa(**options)
    quick_trainer(max_epochs=4).fit(resumed, pairs(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    for (key, one), (_, other) in zip(model.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), key


def test_stored_model_and_data_module(tmp_path: Path) -> None:
    table = rows(40)
    for name in ("image", "text"):
        np.save(tmp_path / f"{name}.npy", table[name].numpy())
    files = {name: str(tmp_path / f"{name}.npy") for name in ("image", "text")}
    model = build(base="csa")
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(model, FeaturePairsDataModule(features=files, batch_size=16))
    again = zoo.from_pretrained(model.save_pretrained(tmp_path / "stored"))
    assert isinstance(again, StructureAlignment)
    assert torch.equal(again.encode_text(table["text"]), model.eval().encode_text(table["text"]))
    assert torch.equal(again.encode_image(table["image"]), model.encode_image(table["image"]))
    # The five text columns are noisy copies of image columns: pairs find each other.
    hits = (again.encode_image(table["image"]) @ again.encode_text(table["text"]).T).argmax(1) == torch.arange(40)
    assert hits.float().mean() > 0.8


def _base_loss(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    model = csa().double()
    at_step(model, 1)
    trainer: Any = model._trainer
    trainer.world_size = world_size
    size = 16 // world_size
    part = {name: value[rank * size : (rank + 1) * size] for name, value in rows(16, torch.float64).items()}
    _, _, loss = model._base(part)
    gradient = torch.autograd.grad(loss, model.image_head.weight)[0]
    if world_size > 1:
        torch.distributed.all_reduce(gradient)
    return loss.detach(), gradient / world_size


def test_two_processes_equal_one(tmp_path: Path) -> None:
    expected, gradient = _base_loss(0, 1)
    for loss, found in run_processes(_base_loss, world_size=2, folder=tmp_path):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, gradient)


class _Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(rows().values())


def test_bad_data_without_a_length() -> None:
    model = csa(schedule="constant")
    with pytest.raises(InputError, match="all training pairs are read first: give data that have a length"):
        quick_trainer(max_steps=1).fit(model, DataLoader(_Endless()))
    with pytest.raises(InputError, match="canonical correlation needs at least 2 pairs, got 1"):
        quick_trainer(max_steps=1).fit(csa(), pairs(1, 1))
