"""The contrastive losses over two processes: value and gradients of the global batch, and batches that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.processes import run_processes
from zoo.errors import InputError
from zoo.losses.contrastive import clip_loss, info_nce, siglip_loss
from zoo.losses.cwcl import cwcl_loss, cwcl_statistics

ROWS, WIDTH = 8, 5
CASES = ["info_nce", "queue", "clip", "siglip", "cwcl", "cwcl both", "cwcl exp", "cwcl topk both", "compiled clip"]


def batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "x": torch.randn(ROWS, WIDTH, dtype=torch.float64),
        "y": torch.randn(ROWS, WIDTH, dtype=torch.float64),
        "r": torch.randn(ROWS, 3, dtype=torch.float64),
        "extra": torch.randn(ROWS, WIDTH, dtype=torch.float64),
    }


def loss_of(
    name: str, x: Tensor, y: Tensor, extra: Tensor, r: Tensor, log_scale: Tensor, bias: Tensor, gather: bool
) -> Tensor:
    options: dict[str, Any] = {"scale": log_scale.exp(), "gather": gather, "chunk_size": 3}
    if name == "info_nce":
        return info_nce(x, y, **options)
    if name == "queue":
        return info_nce(x, torch.cat((y, extra)), **options)
    if name == "clip":
        return clip_loss(x, y, **options)
    if name == "compiled clip":
        return torch.compile(clip_loss, fullgraph=True, backend="aot_eager")(x, y, **options)
    if name == "siglip":
        return siglip_loss(x, y, bias=bias, **options)
    _, *words = name.split()
    kernel: Any = words[0] if words and words[0] != "both" else "affine"
    direction: Any = "both" if "both" in words else "trained"
    return cwcl_loss(
        x,
        y,
        weight_features=r,
        kernel=kernel,
        neighbours=3,
        kernel_temperature=0.5,
        weighted_direction=direction,
        **options,
    )


def loss_and_gradients(name: str, rows: slice, *, gather: bool) -> tuple[Tensor, list[Tensor]]:
    """Two linear maps, a scale and a bias are what is trained: their gradients are what DDP averages."""
    data = {key: value[rows] for key, value in batch().items()}
    maps = [torch.eye(WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    log_scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    x, y, extra = data["x"] @ maps[0], data["y"] @ maps[1], data["extra"] @ maps[1]
    loss = loss_of(name, x, y, extra, data["r"], log_scale, bias, gather)
    found = torch.autograd.grad(loss, [*maps, log_scale, bias], allow_unused=True)
    return loss.detach(), [value if value is not None else torch.zeros(()) for value in found]


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    share = ROWS // world_size
    rows = slice(rank * share, (rank + 1) * share)
    results: dict[str, Any] = {}
    for name in CASES:
        loss, gradients = loss_and_gradients(name, rows, gather=True)
        for gradient in gradients:
            dist.all_reduce(gradient)
        results[name] = loss, [gradient / world_size for gradient in gradients]
    own = {key: value[rows] for key, value in batch().items()}
    results["statistics"] = cwcl_statistics(own["x"], own["y"], weight_features=own["r"], scale=2.0, gather=True)
    results["local"] = clip_loss(own["x"], own["y"], scale=2.0)
    results["errors"] = []
    uneven = torch.ones(2 + rank, 3)
    for loss_function in (info_nce, clip_loss, cwcl_loss):
        with pytest.raises(InputError) as raised:
            loss_function(uneven, uneven, scale=1.0, gather=True)
        results["errors"].append(str(raised.value))
    with pytest.raises(InputError) as raised:
        siglip_loss(uneven, uneven, scale=1.0, bias=0.0, gather=True)
    results["errors"].append(str(raised.value))
    broken = own["x"].clone()
    if rank == 0:
        broken[0, 0] = torch.nan
    results["nan"] = [
        clip_loss(broken, own["y"], scale=1.0, gather=True),
        info_nce(broken, own["y"], scale=1.0, gather=True),
    ]
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run_processes(on_rank, world_size=2, folder=folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, ranks: list[dict[str, Any]]) -> None:
    """Every rank has the global loss, and the mean over ranks of the gradients is the one of a single process."""
    expected_loss, expected = loss_and_gradients(name.removeprefix("compiled "), slice(0, ROWS), gather=False)
    close = {"rtol": 0, "atol": 1e-10}
    for result in ranks:
        loss, gradients = result[name]
        torch.testing.assert_close(loss, expected_loss, **close)
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, wanted, **close)


def test_two_processes_statistics(ranks: list[dict[str, Any]]) -> None:
    data = batch()
    expected = cwcl_statistics(data["x"], data["y"], weight_features=data["r"], scale=2.0)
    for result in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(result["statistics"][name], value, rtol=0, atol=1e-10, msg=name)


def test_two_processes_apart(ranks: list[dict[str, Any]]) -> None:
    """Without gather, a rank has its own batch's loss."""
    data = batch()
    for rank, result in enumerate(ranks):
        rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        torch.testing.assert_close(result["local"], clip_loss(data["x"][rows], data["y"][rows], scale=2.0))


def test_bad_unequal_batches(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert len(result["errors"]) == 4
        for message in result["errors"]:
            assert "gather=True needs equally large batches in all processes, got [2, 3] by rank" in message


def test_bad_features_stay_visible(ranks: list[dict[str, Any]]) -> None:
    """NaN on one rank is NaN on all."""
    assert all(loss.isnan() for result in ranks for loss in result["nan"])


@pytest.mark.parametrize("name", ["queue", "clip", "siglip", "cwcl exp"])
def test_gather_without_process_group(name: str) -> None:
    alone, gathered = (loss_and_gradients(name, slice(0, ROWS), gather=gather) for gather in (False, True))
    torch.testing.assert_close(gathered, alone, rtol=0, atol=0)
