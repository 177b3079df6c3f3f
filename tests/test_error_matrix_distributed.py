"""SoftREPA over two processes: each has its own images and the captions of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.error_matrix_cases import MODES, SmallDenoiser, plain
from tests.processes import run_processes
from zoo.error_matrix import contrast
from zoo.losses import equal_captions, softrepa_gradient, softrepa_loss

IMAGES = 6
OPTIONS: dict[str, Any] = {"temperature": 0.1, "diagonal_weight": 0.5}


class Tokens(nn.Module):
    """What DDP wraps: tokens, and a loss that is differentiated inside of its forward pass."""

    def __init__(self, denoiser: SmallDenoiser) -> None:
        super().__init__()
        self.tokens = nn.ParameterList(denoiser.tokens)

    def forward(self, denoiser: SmallDenoiser, **options: Any) -> Tensor:
        denoiser.tokens = list(self.tokens)
        return contrast(denoiser, parameters=list(self.parameters()), columns=IMAGES, **OPTIONS, **options).loss


def whole() -> tuple[SmallDenoiser, Tensor]:
    denoiser = SmallDenoiser(IMAGES, IMAGES)
    denoiser.texts[4] = denoiser.texts[1]
    return denoiser, equal_captions(denoiser.texts)


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    share = IMAGES // world_size
    own = slice(rank * share, (rank + 1) * share)
    results: dict[str, Any] = {}
    for pairs in MODES:
        denoiser, mask = whole()
        denoiser.images, denoiser.target = denoiser.images[own], denoiser.target[own]
        module = DistributedDataParallel(Tokens(denoiser))
        loss = module(denoiser, rows=share, first_row=rank * share, mask=mask[own], pairs=pairs, micro_batch=4)
        loss.backward()
        results[pairs] = loss.detach(), [parameter.grad for parameter in module.parameters()]
    errors = torch.rand(IMAGES, IMAGES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    part = errors[own].clone().requires_grad_()
    loss = softrepa_loss(part, first_row=rank * share, **OPTIONS)
    (gradient,) = torch.autograd.grad(loss, part)
    parts = [torch.empty_like(gradient) for _ in range(world_size)]
    dist.all_gather(parts, gradient)
    results["loss"] = loss.detach(), torch.cat(parts) / world_size
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run_processes(on_rank, world_size=2, folder=folder)


@pytest.mark.parametrize("pairs", MODES)
def test_two_processes_equal_one(pairs: str, ranks: list[dict[str, Any]]) -> None:
    """The mean over ranks of the losses is the one of a single process, and so is the gradient that DDP leaves."""
    denoiser, mask = whole()
    expected, _, gradient = plain(denoiser, mask=mask, **OPTIONS)
    assert mask.any()
    losses = torch.stack([result[pairs][0] for result in ranks])
    torch.testing.assert_close(losses.mean(), expected, rtol=0, atol=1e-12)
    assert losses[0] != losses[1]
    for result in ranks:
        for one, wanted in zip(result[pairs][1], gradient, strict=True):
            torch.testing.assert_close(one, wanted, rtol=0, atol=1e-12)


def test_two_processes_equal_one_loss(ranks: list[dict[str, Any]]) -> None:
    """The plain loss of a rank's rows against all captions."""
    errors = torch.rand(IMAGES, IMAGES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = torch.stack([result["loss"][0] for result in ranks])
    torch.testing.assert_close(losses.mean(), softrepa_loss(errors, **OPTIONS), rtol=0, atol=1e-12)
    for result in ranks:
        torch.testing.assert_close(result["loss"][1], softrepa_gradient(errors, **OPTIONS), rtol=0, atol=1e-12)
