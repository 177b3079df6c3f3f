"""The losses of CM3 over two processes: value and gradients of the global batch, and batches that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.processes import run_processes
from zoo.errors import InputError
from zoo.losses.cm3 import alignment_loss, calibrated_uniformity_loss, calibration_statistics, uniformity_loss

SIZES = (1, 5)  # rows a process; 5 leaves shares of different size
BOUNDS: dict[str, Any] = {"min_similarity": -0.1, "max_similarity": 0.6}


def batch(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(rows, 4, dtype=torch.float64), torch.randn(rows, 4, dtype=torch.float64)


def loss_and_gradient(total: int, rows: slice, *, gather: bool) -> tuple[Tensor, ...]:
    """A linear map is what is trained: its gradient is what DDP averages."""
    x, y = (side[rows] for side in batch(total))
    weight = torch.eye(4, dtype=torch.float64, requires_grad=True)

    options: dict[str, Any] = {"gather": gather, "chunk_size": 2}
    parts = (
        alignment_loss(x @ weight, y, gather=gather),
        uniformity_loss(x @ weight, **options),
        calibrated_uniformity_loss(x @ weight, (y + x) @ weight, **options, **BOUNDS),
    )
    gradients = [torch.autograd.grad(part, weight, retain_graph=True)[0] for part in parts]
    return *(part.detach() for part in parts), *gradients


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for share in SIZES:
        values = loss_and_gradient(share * world_size, slice(rank * share, (rank + 1) * share), gather=True)
        for gradient in values[3:]:
            dist.all_reduce(gradient)
            gradient.div_(world_size)
        results[f"share {share}"] = values
    own = batch(10)[1][rank * 5 : rank * 5 + 5]
    results["statistics"] = calibration_statistics(own, gather=True, chunk_size=2, **BOUNDS)
    results["local"] = uniformity_loss(own)
    for name, call in (("unequal", uniformity_loss), ("unequal pairs", lambda x, **o: alignment_loss(x, x, **o))):
        with pytest.raises(InputError) as raised:
            call(torch.ones(2 + rank, 3), gather=True)
        results[name] = str(raised.value)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(on_rank, world_size=2, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("share", SIZES)
def test_two_processes_equal_one(share: int, ranks: list[dict[str, Any]]) -> None:
    """Every rank has the global loss, and the mean over ranks of the gradients is the one of a single process."""
    expected = loss_and_gradient(2 * share, slice(None), gather=False)
    assert expected[3].abs().max() > 1e-3
    for result in ranks:
        torch.testing.assert_close(result[f"share {share}"], expected, rtol=0, atol=1e-10)


def test_two_processes_statistics(ranks: list[dict[str, Any]]) -> None:
    expected = calibration_statistics(batch(10)[1], **BOUNDS)
    assert 0 < expected["clipped_above"] < expected["clipped_share"] < 1
    for result in ranks:
        torch.testing.assert_close(result["statistics"], expected)


def test_two_processes_apart(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(ranks):
        torch.testing.assert_close(result["local"], uniformity_loss(batch(10)[1][rank * 5 : rank * 5 + 5]))


def test_bad_unequal_batches(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        for name in ("unequal", "unequal pairs"):
            assert "gather=True needs equally large batches in all processes, got [2, 3] by rank" in result[name]


def test_gather_without_process_group() -> None:
    alone, gathered = (loss_and_gradient(6, slice(None), gather=gather) for gather in (False, True))
    torch.testing.assert_close(gathered, alone, rtol=0, atol=0)
