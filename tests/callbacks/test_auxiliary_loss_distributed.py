"""Two processes: the step is that of a module with the loss written into it, and the projector's gradient is reduced."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.callbacks.nd_regularizer import NDRegularizer

from tests.auxiliary_runs import Held, Plain, SmallFeatures, equal, mlp, seeded, teacher_network, weights
from tests.training import digits


def run(module: pl.LightningModule, *callbacks: pl.Callback, world: int, double: bool = False) -> pl.Trainer:
    torch.manual_seed(11)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, precision="64-true" if double else "32-true", callbacks=list(callbacks),
    )  # fmt: skip
    # 75 images: an odd number, which a padding sampler would make even in the class means.
    trainer.fit(module, digits(train_samples=75, batch_size=32 // world, drop_last=True))
    return trainer


def undropped(make: Callable[[], Any]) -> Any:
    module = seeded(make)
    module.model.drop.p = 0.0  # the masks of two processes are not halves of one
    return module


class NoNorm(NDRegularizer):
    """Batch norm has statistics of its own in each process: two would rightly differ from one."""

    def build(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module | None:
        part = super().build(trainer, pl_module)
        assert part is not None
        torch.manual_seed(5 + trainer.global_rank)  # DDP gives all processes that of the first
        part.norm, part.linear = nn.Identity(), nn.Linear(12, 20)
        return part


def regularizer() -> NDRegularizer:
    return NoNorm(teacher_network(20), "model.hidden", 1.5, projector_dropout=0.0)


def train(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Run all that has to be compared in one pair of processes."""
    warnings.simplefilter("ignore")
    os.environ.update(
        LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="1", WORLD_SIZE=str(world), NODE_RANK="0"
    )  # the process group stands already; the address is never used
    ours, by_hand = undropped(Plain), undropped(Held)
    run(ours, SmallFeatures(), world=world)
    run(by_hand, world=world)
    module, callback = undropped(Plain), regularizer()
    trainer = run(module, callback, world=world, double=True)
    trainer.save_checkpoint(Path(folder, "two.ckpt"))
    different = NDRegularizer(mlp(20), "model.hidden")
    nn.init.constant_(different.teacher.head.bias, float(rank))  # type: ignore[union-attr, arg-type]
    try:
        run(undropped(Plain), different, world=world)
        error = ""
    except ValueError as refused:
        error = str(refused)
    return {
        "ours": weights(ours),
        "by_hand": weights(by_hand),
        "nd": weights(module),
        "part": weights(callback.part),  # type: ignore[arg-type]
        "means": callback.class_means,
        "counts": callback.class_counts,
        "error": error,
    }


def class_means(rows: Any) -> Tensor:
    body = teacher_network(20)[:-1].eval().double()
    features = torch.cat([body(x.double()) for x, _ in rows]).detach()
    labels = torch.cat([y for _, y in rows])
    return torch.stack([features[labels == k].mean(0) for k in range(10)])


@pytest.mark.filterwarnings("ignore")
def test_two_processes_equal_one(two_processes: Callable[..., list[Any]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    first, second = two_processes(train, str(tmp_path / "run"))
    for name in ("ours", "nd", "part"):
        assert equal(first[name], second[name]), name
    assert equal(first["ours"], first["by_hand"])
    for result in (first, second):
        assert "the processes have different teachers" in result["error"]

    module, callback = undropped(Plain), regularizer()
    run(module, callback, world=1, double=True)
    for one, two in ((weights(module), first["nd"]), (weights(callback.part), first["part"])):  # type: ignore[arg-type]
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=1e-9, atol=1e-11, msg=name)
    rows = list(digits(train_samples=75).train_eval_dataloader())
    assert int(first["counts"].sum()) == 75
    torch.testing.assert_close(first["means"], class_means(rows), rtol=1e-6, atol=1e-7)
    checkpoint = torch.load(tmp_path / "run" / "two.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Plain().state_dict())
    assert F.mse_loss(checkpoint["callbacks"][callback.state_key]["class_means"], first["means"]) == 0
