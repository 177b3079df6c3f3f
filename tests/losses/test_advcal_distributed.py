"""The contrastive objective of adversarial calibration over two processes: value and gradient of the global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.processes import run_processes
from zoo.losses.advcal import clean_adversarial_info_nce

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-10}


def global_loss(rows: slice, *, symmetric: bool, labelled: bool, gather: bool) -> tuple[Tensor, Tensor]:
    """Value, and the gradient of a shared linear head."""
    torch.manual_seed(4)
    attacked, clean = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1])[rows] if labelled else None
    weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
    loss = clean_adversarial_info_nce(
        attacked[rows] @ weight,
        clean[rows],
        temperature=0.4,
        symmetric=symmetric,
        labels=labels,
        gather=gather,
        chunk_size=3,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


CASES = [(symmetric, labelled) for symmetric in (False, True) for labelled in (False, True)]


def on_rank(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    results = []
    for symmetric, labelled in CASES:
        rows = slice(rank * 4, rank * 4 + 4)
        loss, gradient = global_loss(rows, symmetric=symmetric, labelled=labelled, gather=True)
        dist.all_reduce(gradient)
        results.append((loss, gradient / world_size))
    return results


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Every rank has the loss of the global batch, and the mean of the gradients is the one of a single process."""
    for results in run_processes(on_rank, world_size=2, folder=tmp_path):
        for (symmetric, labelled), found in zip(CASES, results, strict=True):
            expected = global_loss(slice(0, 8), symmetric=symmetric, labelled=labelled, gather=False)
            torch.testing.assert_close(found, expected, **CLOSE)
