"""StructureRegularizer: the loss of `zoo.losses.structure_loss` in somebody else's training step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo.callbacks.structure_regularizer import StructureRegularizer

from tests.training import quick_trainer
from zoo.errors import InputError
from zoo.losses import structure_loss


class Two(pl.LightningModule):
    """A frozen encoder, a head, and any loss on its output."""

    def __init__(self, by_hand: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, 5).requires_grad_(False)
        self.head = nn.Linear(5, 3)
        self.by_hand = by_hand

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        frozen = self.encoder(batch)
        aligned = self.head(frozen)
        loss = aligned.square().mean()
        if self.by_hand is not None:
            ramp = min(1.0, self.global_step / 4)
            loss = loss + self.by_hand * ramp * structure_loss(frozen, aligned, temperature=0.5)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)


def data() -> DataLoader[Any]:
    return DataLoader(list(torch.randn(64, 6, generator=torch.Generator().manual_seed(1))), batch_size=16)  # type: ignore[arg-type]


def regularizer(weight: float = 10.0, **options: Any) -> StructureRegularizer:
    return StructureRegularizer("encoder", "head", weight, warmup_steps=4, temperature=0.5, **options)


def trained(module: Two, epochs: int = 2, **options: Any) -> list[Tensor]:
    quick_trainer(max_epochs=epochs, **options).fit(module, data())
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_identity_equal_to_a_step_written_by_hand(precision: Any) -> None:
    ours = trained(Two(), callbacks=[regularizer()], precision=precision)
    theirs = trained(Two(by_hand=10.0), precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    plain = trained(Two(), precision=precision)
    assert not torch.equal(ours[-1], plain[-1])


def test_weight_zero_is_the_run_without_it() -> None:
    assert all(
        torch.equal(a, b) for a, b in zip(trained(Two(), callbacks=[regularizer(0.0)]), trained(Two()), strict=True)
    )


def test_resume_goes_on_in_the_ramp(tmp_path: Any) -> None:
    def callback() -> StructureRegularizer:
        return StructureRegularizer("encoder", "head", warmup_steps=7, temperature=0.5)

    whole = trained(Two(), epochs=2, callbacks=[callback()])
    trainer = quick_trainer(max_epochs=1, callbacks=[callback()])
    trainer.fit(Two(), data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Two()
    quick_trainer(max_epochs=2, callbacks=[callback()]).fit(
        resumed, data(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed.parameters(), strict=True))


def test_what_is_logged() -> None:
    trainer = quick_trainer(max_steps=1, callbacks=[regularizer()])
    trainer.fit(Two(), data())
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["train/structure"] > 0
    assert 0 < found["structure/diagonal_mass"] < 1
    assert 1 <= found["structure/effective_neighbours"] <= 16


def test_maps_and_tokens_are_averaged() -> None:
    from zoo.callbacks.structure_regularizer import _vectors

    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(_vectors(x, "a"), x.mean((2, 3)))
    assert torch.equal(_vectors(x.flatten(2), "a"), x.flatten(2).mean(1))
    with pytest.raises(InputError, match=r"layer 'a' gives shape \(3,\)"):
        _vectors(torch.zeros(3), "a")


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="must be two layers, got 'a' twice"):
        StructureRegularizer("a", "a")
    with pytest.raises(InputError, match="weight must be finite and not negative"):
        StructureRegularizer("a", "b", -1.0)
    with pytest.raises(InputError, match=r"no layer 'encodr'.*encoder"):
        trained(Two(), callbacks=[StructureRegularizer("encodr", "head")])
    with pytest.raises(InputError, match="divergence must be one of released, js, got 'kl'"):
        regularizer(divergence="kl")
