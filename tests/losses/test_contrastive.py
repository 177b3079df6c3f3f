"""InfoNCE, CLIP and SigLIP against the plain formulas, open_clip's losses and numbers computed apart from this code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError
from zoo.losses.contrastive import clip_loss, info_nce, siglip_loss

# Project notes on arXiv 2309.14580, computed there in float64 from these vectors at scale 1 / 0.07.
TRAINED = [
    [0.47103671903941413, 1.0848139392037563, -0.35431962853041843, -0.5972479751779132],
    [1.107555598345301, 0.253396769547523, -1.1539197267428511, -0.17047743697380957],
    [1.0387258790269482, -0.7720866140521057, -0.7476994854565479, 0.9889853889947574],
    [0.31663652043794177, -1.1872145950222601, 0.3118667299960983, 0.7704553796058106],
    [-0.5122496468058992, -0.6734257977584776, 0.7300342400915997, 0.6116781410774728],
]
FROZEN = [
    [0.6526931108757623, 1.1725721953927934, -0.17924567472774067, -0.6201798871530411],
    [1.1953138545343382, 0.3562093106562155, -1.191945158553596, -0.5603525043861639],
    [1.1725721953927934, -0.6828635279589326, -0.946693395549387, 0.787089638857016],
    [0.5982629187230164, -1.2325390800767548, 0.013560789519481198, 0.6687680251725732],
    [-0.17924567472774067, -0.946693395549387, 0.31350978033316185, 1.1539383918418546],
]
FORWARD, BACKWARD = 0.09736311293426425, 0.25604161468083186

LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": info_nce,
    "clip": clip_loss,
    "siglip": lambda x, y, **options: siglip_loss(x, y, bias=-3.0, **options),
}


def sides(count: int = 9, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 6, dtype=dtype).requires_grad_(), torch.randn(count, 6, dtype=dtype).requires_grad_()


def unit(values: Any) -> Tensor:
    return F.normalize(torch.tensor(values, dtype=torch.float64), dim=1)


def plain(name: str, x: Tensor, y: Tensor, scale: float) -> Tensor:
    scores = scale * x @ y.t()
    labels = torch.arange(len(x))
    if name == "info_nce":
        return F.cross_entropy(scores, labels)
    if name == "clip":
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2
    sign = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -F.logsigmoid(sign * (scores - 3.0)).sum() / len(x)


def test_golden() -> None:
    x, y = unit(TRAINED), unit(FROZEN)
    close = {"rtol": 0, "atol": 1e-10}
    expected = torch.tensor([FORWARD, BACKWARD, (FORWARD + BACKWARD) / 2], dtype=torch.float64)
    found = info_nce(x, y, scale=1 / 0.07), info_nce(y, x, scale=1 / 0.07), clip_loss(x, y, scale=1 / 0.07)
    torch.testing.assert_close(torch.stack(found), expected, **close)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_identity_plain_formula(name: str, chunk_size: int | None) -> None:
    pair = sides()
    ours, expected = LOSSES[name](*pair, scale=1.3, chunk_size=chunk_size), plain(name, *pair, 1.3)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for found, wanted in zip(torch.autograd.grad(ours, pair), torch.autograd.grad(expected, pair), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


def test_identity_open_clip() -> None:
    """The classes that open_clip trains with, given the same normalised features and the same scale."""
    x, y = (F.normalize(side, dim=1) for side in sides())
    scale, bias = torch.tensor(14.0).double(), torch.tensor(-10.0).double()
    torch.testing.assert_close(clip_loss(x, y, scale=scale), open_clip.loss.ClipLoss()(x, y, scale))
    expected = open_clip.loss.SigLipLoss()(x, y, scale, bias)
    torch.testing.assert_close(siglip_loss(x, y, scale=scale, bias=bias), expected)


def test_identity_directions() -> None:
    """CLIP is the mean of InfoNCE both ways, and does not know which side is which; InfoNCE does."""
    x, y = sides()
    both = (info_nce(x, y, scale=1.3) + info_nce(y, x, scale=1.3)) / 2
    torch.testing.assert_close(clip_loss(x, y, scale=1.3), both)
    torch.testing.assert_close(clip_loss(y, x, scale=1.3), both)
    assert (info_nce(x, y, scale=1.3) - info_nce(y, x, scale=1.3)).abs() > 1e-3


def test_identity_extra_negatives() -> None:
    x, y = sides()
    queue = torch.randn(20, 6, dtype=torch.float64)
    expected = F.cross_entropy(x @ torch.cat((y, queue)).t(), torch.arange(9))
    torch.testing.assert_close(info_nce(x, torch.cat((y, queue)), scale=1.0), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return LOSSES[name](x, y, scale=scale, chunk_size=3)

    assert torch.autograd.gradcheck(loss, (*sides(5), scale))
    assert torch.autograd.gradgradcheck(loss, (*sides(5), scale))


def test_stop_gradient_constant_keys() -> None:
    x, y = sides()
    info_nce(x, y.detach(), scale=1.0).backward()
    assert x.grad is not None
    assert y.grad is None


def test_gradient_penalty() -> None:
    """A loss on the gradient's length can itself be trained."""
    x, y = sides()
    (gradient,) = torch.autograd.grad(clip_loss(x, y, scale=2.0, chunk_size=4), x, create_graph=True)
    (ours,) = torch.autograd.grad(gradient.square().sum(), y)
    (gradient,) = torch.autograd.grad(plain("clip", x, y, 2.0), x, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), y)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 100.0, 1e4])
def test_extreme_scale(name: str, scale: float) -> None:
    x, y = (F.normalize(side.detach(), dim=1).requires_grad_() for side in sides(dtype=torch.float32))
    loss = LOSSES[name](x, y, scale=scale)
    torch.testing.assert_close(loss.double(), plain(name, x.double(), y.double(), scale), rtol=1e-5, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (x, y)))
    if scale == 0 and name != "siglip":
        torch.testing.assert_close(loss, torch.tensor(math.log(9)))


def test_extreme_solved() -> None:
    """Far below float32's last place of 1, loss and gradient still say how far the batch is from solved."""
    x = torch.eye(4).requires_grad_()
    loss = clip_loss(x, torch.eye(4), scale=40.0)
    torch.testing.assert_close(loss, torch.tensor(3 * math.exp(-40)), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient.diagonal(), torch.full((4,), -30 * math.exp(-40)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_compare(name: str) -> None:
    """A batch of one costs InfoNCE nothing; an empty one is 0 with a graph, so that DDP finds its gradients."""
    x, y = sides(1)
    if name != "siglip":
        loss = LOSSES[name](x, y, scale=5.0)
        assert loss == 0
        assert (torch.autograd.grad(loss, x)[0] == 0).all()
    empty, other = sides(0)
    loss = LOSSES[name](empty, other, scale=5.0)
    assert loss == 0
    loss.backward()
    assert empty.grad is not None


@pytest.mark.parametrize("name", LOSSES)
def test_zero_vectors_and_duplicates(name: str) -> None:
    x, y = sides()
    with torch.no_grad():
        x[2], y[3], x[5], y[5] = 0, 0, x[4], y[4]
    loss = LOSSES[name](x, y, scale=3.0, chunk_size=4)
    torch.testing.assert_close(loss, plain(name, x, y, 3.0))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize("name", LOSSES)
def test_bad_features_stay_visible(name: str) -> None:
    x, y = (side.detach() for side in sides())
    x[4, 2] = math.nan
    assert LOSSES[name](x, y, scale=1.0).isnan()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    x, y = (side.detach().to(dtype).requires_grad_() for side in sides())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[name](x, y, scale=2.0)
        loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain(name, x.double(), y.double(), 2.0), rtol=1e-5, atol=1e-6)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert LOSSES[name](x.double(), y, scale=2.0).dtype == torch.float64


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_compile_fullgraph(name: str) -> None:
    x, y = sides(dtype=torch.float32)
    scale = torch.tensor(2.0, requires_grad=True)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    ours, eager = compiled(x, y, scale=scale), LOSSES[name](x, y, scale=scale)
    torch.testing.assert_close(ours, eager)
    for found, wanted in zip(
        torch.autograd.grad(ours, (x, y, scale)), torch.autograd.grad(eager, (x, y, scale)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(4), r"y must have two dimensions"),
        (torch.zeros(4, 5), r"y must have the shape of x, got \(4, 5\) and \(4, 3\)"),
        (torch.zeros(5, 3), r"y must have the shape of x, got \(5, 3\) and \(4, 3\)"),
        (torch.zeros(4, 3, device="meta"), r"y must be on the device of x, got meta and cpu"),
    ],
)
def test_bad_sides(y: Tensor, message: str) -> None:
    for name in ("clip", "siglip"):
        with pytest.raises(InputError, match=message):
            LOSSES[name](torch.zeros(4, 3), y, scale=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_options(name: str) -> None:
    x, y = sides()
    with pytest.raises(InputError, match=r"scale must be finite and not negative, got -2.0"):
        LOSSES[name](x, y, scale=-2.0)
    with pytest.raises(InputError, match=r"chunk_size must be at least 1"):
        LOSSES[name](x, y, scale=2.0, chunk_size=-1)
