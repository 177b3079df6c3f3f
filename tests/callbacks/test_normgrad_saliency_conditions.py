"""Training is what it would be without the callback, to the bit, however the network is run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.saliency_runs import Net, equal, fit, make, picture_files, saliency_callback

CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # what the module, the run and the callback are given
    "plain": ({}, {"num_sanity_val_steps": 2}, {}),
    "meta": ({}, {}, {"meta_lr": 0.05, "classes": "least_likely"}),
    "accumulation": ({}, {"accumulate_grad_batches": 4, "val_check_interval": 2}, {}),
    "frozen": ({"frozen": True}, {}, {"meta_lr": 0.05}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}, {}),
    "bf16-true": ({}, {"precision": "bf16-true"}, {}),
    "64-true": ({}, {"precision": "64-true"}, {}),
    "compiled": ({"compiled": "eager"}, {"max_epochs": 1}, {}),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported")
@pytest.mark.parametrize("name", CONDITIONS)
def test_weights_are_those_of_a_run_without(name: str, tmp_path: Path) -> None:
    of_module, of_run, of_callback = CONDITIONS[name]
    plain, drawn = make(**of_module), make(**of_module)
    fit(plain, folder=tmp_path, **of_run)
    random = torch.get_rng_state()
    callback = saliency_callback(**of_callback)
    trainer = fit(drawn, callback, folder=tmp_path, **of_run)
    assert torch.equal(torch.get_rng_state(), random)
    assert plain.seen == drawn.seen
    assert equal(plain, drawn)
    assert picture_files(tmp_path)[-1] == trainer.global_step
    assert len(callback.card_figures()["saliency"]) > 1000
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in drawn.modules())


def test_modes_and_gradients_between_steps(tmp_path: Path) -> None:
    module = make()
    module.net.norm.eval()
    seen: list[tuple[list[bool], bool, bool]] = []

    class Watch(Net):
        def on_validation_epoch_end(self) -> None:
            modes = [one.training for one in self.modules()]
            gradients = all(p.grad is None for p in self.parameters())
            seen.append((modes, gradients, torch.is_grad_enabled()))

    torch.manual_seed(3)
    watched, alone = Watch(), Watch()
    fit(watched, saliency_callback(), folder=tmp_path, max_epochs=1)
    fit(alone, folder=tmp_path, max_epochs=1)
    assert seen[0] == seen[1]


def train(rank: int, world: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    os.environ.update(
        LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="1", WORLD_SIZE=str(world), NODE_RANK="0"
    )  # the process group stands already; the address is never used
    plain, drawn, callback = make(), make(), saliency_callback()
    run: dict[str, Any] = {"devices": world, "strategy": "ddp", "val_check_interval": 2, "accumulate_grad_batches": 2}
    fit(plain, folder=Path(folder, str(rank)), **run)
    fit(drawn, callback, folder=Path(folder, str(rank)), **run)
    return {"plain": plain.state_dict(), "drawn": drawn.state_dict(), "figures": list(callback.card_figures())}


def test_two_processes(two_processes: Callable[..., list[Any]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    first, second = two_processes(train, str(tmp_path / "run"))
    for name, value in first["drawn"].items():
        assert torch.equal(value, first["plain"][name]), name
        if "running" not in name:  # batch norm's statistics are each process's own
            assert torch.equal(value, second["drawn"][name]), name
    assert first["figures"] == ["saliency"]
    assert second["figures"] == []
    assert picture_files(tmp_path / "run" / "0") == [1, 3, 4]
    assert not (tmp_path / "run" / "1" / "images").exists()
