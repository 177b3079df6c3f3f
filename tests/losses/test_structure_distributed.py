"""The structure loss over two processes: value and gradients of the global batch, and batches that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.processes import run_processes
from zoo.errors import InputError
from zoo.losses.structure import structure_loss, structure_statistics

ROWS, WIDTH = 8, 5
MARGIN = 0.007
CASES: dict[str, dict[str, Any]] = {
    "released": {},
    "js, 3 levels": {"divergence": "js", "levels": 3, "level_weights": "inverse"},
    "standard": {"centering": "standard"},
    "margin between levels": {"levels": 2, "margin": MARGIN, "centering": "before"},
    "compiled": {},
}


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(ROWS, WIDTH, dtype=torch.float64), torch.randn(ROWS, WIDTH, dtype=torch.float64)


def loss_and_gradient(name: str, rows: slice, *, gather: bool, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """A linear map is what is trained: its gradient is what DDP averages."""
    frozen, noise = (tensor[rows] for tensor in batch())
    weight = torch.eye(WIDTH, dtype=torch.float64, requires_grad=True)
    aligned = (frozen + 0.5 * noise) @ weight
    function = torch.compile(structure_loss, fullgraph=True, backend="aot_eager") if compiled else structure_loss
    loss = function(frozen, aligned, temperature=0.5, gather=gather, chunk_size=3, **CASES[name])
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.detach(), gradient


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    share = ROWS // world_size
    rows = slice(rank * share, (rank + 1) * share)
    results: dict[str, Any] = {}
    for name in CASES:
        loss, gradient = loss_and_gradient(name, rows, gather=True, compiled=name == "compiled")
        dist.all_reduce(gradient)
        results[name] = loss, gradient / world_size
    frozen, noise = (tensor[rows] for tensor in batch())
    results["statistics"] = structure_statistics(frozen, temperature=0.5, gather=True)
    results["local"] = structure_loss(frozen, noise, temperature=0.5)
    uneven = torch.ones(2 + rank, 3)
    with pytest.raises(InputError) as raised:
        structure_loss(uneven, uneven, gather=True)
    results["error"] = str(raised.value)
    broken = noise.clone()
    if rank == 0:
        broken[0, 0] = torch.nan
    results["nan"] = structure_loss(frozen, broken, gather=True, centering="none", margin=0.1)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run_processes(on_rank, world_size=2, folder=folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, ranks: list[dict[str, Any]]) -> None:
    """Every rank has the global loss, and the mean over ranks of the gradients is the one of a single process."""
    expected_loss, expected = loss_and_gradient(name, slice(0, ROWS), gather=False)
    assert expected_loss > 1e-3
    for result in ranks:
        loss, gradient = result[name]
        torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def test_two_processes_margin_is_global(ranks: list[dict[str, Any]]) -> None:
    """The case above has one level above its margin and one below it; which ones is a matter of all rows."""
    frozen, noise = batch()
    options: dict[str, Any] = {"temperature": 0.5, "centering": "before"}
    first = structure_loss(frozen, frozen + 0.5 * noise, **options)
    second = 2 * structure_loss(frozen, frozen + 0.5 * noise, levels=2, **options) - first
    assert second < MARGIN < first
    torch.testing.assert_close(ranks[0]["margin between levels"][0], (first - MARGIN) / 2)


def test_two_processes_statistics(ranks: list[dict[str, Any]]) -> None:
    expected = structure_statistics(batch()[0], temperature=0.5)
    for result in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(result["statistics"][name], value, rtol=0, atol=1e-10, msg=name)


def test_two_processes_apart(ranks: list[dict[str, Any]]) -> None:
    """Without gather, a rank has its own batch's loss."""
    frozen, noise = batch()
    for rank, result in enumerate(ranks):
        rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        torch.testing.assert_close(result["local"], structure_loss(frozen[rows], noise[rows], temperature=0.5))


def test_bad_unequal_batches(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert "gather=True needs equally large batches in all processes, got [2, 3] by rank" in result["error"]


def test_bad_features_stay_visible(ranks: list[dict[str, Any]]) -> None:
    """NaN on one rank is NaN on all."""
    assert all(result["nan"].isnan() for result in ranks)


def test_gather_without_process_group() -> None:
    alone, gathered = (loss_and_gradient("js, 3 levels", slice(0, ROWS), gather=gather) for gather in (False, True))
    torch.testing.assert_close(gathered, alone, rtol=0, atol=0)
