"""zoo.losses.cwcl against numbers computed apart from this code and the dense formula with its matrix of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.losses.cwcl_cases import dense_directions, dense_weights, double, random_case
from zoo.losses.contrastive import clip_loss
from zoo.losses.cwcl import cwcl_loss, cwcl_statistics

# Inputs and numbers: the project's notes on arXiv 2309.14580, computed there in float64 and checked against central
# differences. TRAINED and FROZEN are those of test_contrastive.py.
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
BACKBONE = [
    [
        0.31922905711942134,
        0.8636133277102842,
        1.1829538258897863,
        1.1656957281600078,
        0.8178677845765497,
        0.2609763029058837,
    ],
    [
        1.1514347264398195,
        0.9915319312951208,
        0.4751772766644172,
        -0.09299416376283187,
        -0.49521939315254737,
        -0.6944083288407732,
    ],
    [
        0.9651008526493132,
        0.03896342532724856,
        -0.40348217754731475,
        -0.5741302046324044,
        -1.1504262332353068,
        -0.9511516742228989,
    ],
    [
        -0.03614546155423848,
        -0.9909166671306273,
        -0.7495440972014586,
        -1.1327476947692476,
        -0.21515260961911142,
        -0.12806416085422742,
    ],
    [
        -0.7581344771925038,
        -0.9785136321854274,
        -0.7011885182688435,
        0.2662634702789949,
        0.4028405000125217,
        0.9181090849551039,
    ],
]
CLASSES = [0, 1, 0, 2, 1]
SCALE = 1 / 0.07
KERNELS: dict[str, dict[str, Any]] = {
    "affine": {},
    "power": {"exponent": 2.0},
    "exp": {"kernel_temperature": 0.1},
    "topk": {"neighbours": 3},
}


def golden() -> tuple[Tensor, Tensor, Tensor]:
    return double(TRAINED).requires_grad_(), double(FROZEN), double(BACKBONE)


def test_golden() -> None:
    trained, frozen, backbone = golden()
    log_scale = double(SCALE).log().requires_grad_()
    loss = cwcl_loss(trained, frozen, scale=log_scale.exp(), weight_features=backbone)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(loss, double(5.907630242905521), **close)
    gradient, of_scale = torch.autograd.grad(loss, (trained, log_scale))
    row = double([-0.3490955706483762, 0.2278405620209882, 0.5462825845938318, -0.18556924708857386])
    torch.testing.assert_close(gradient[0], row, **close)
    torch.testing.assert_close(gradient.norm(), double(1.5356766386510343), **close)
    torch.testing.assert_close(of_scale, double(5.441559688382611), **close)
    half = cwcl_loss(trained, frozen, scale=SCALE, weight_features=backbone, direction_reduction="mean")
    torch.testing.assert_close(half, double(2.9538151214527604), **close)


def test_golden_weights_from_frozen() -> None:
    trained, frozen, _ = golden()
    torch.testing.assert_close(cwcl_loss(trained, frozen, scale=SCALE), double(6.500561182594764), rtol=0, atol=1e-10)


def test_golden_statistics() -> None:
    trained, frozen, backbone = golden()
    statistics = cwcl_statistics(trained, frozen, scale=SCALE, weight_features=backbone, chunk_size=2)
    expected = {
        "from_trained": 5.6515886282246885,
        "from_frozen": 0.25604161468083186,
        "entropy": 1.3551527358336308,
        "kl": 4.296435892391058,
        "effective_positives": 3.8842197565762597,
    }
    assert list(statistics) == list(expected)
    for name, value in statistics.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, double(expected[name]), rtol=0, atol=1e-10, msg=name)


def test_golden_duplicates() -> None:
    """The second and the fourth frozen sample are one: full partners one way, negatives the other way."""
    trained, frozen, backbone = golden()
    frozen[3], backbone[3] = frozen[1], backbone[1]
    loss = cwcl_loss(trained, frozen, scale=SCALE, weight_features=backbone)
    torch.testing.assert_close(loss, double(11.809169034181796), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "options", "expected"),
    [("power", {"exponent": 2.0}, 3.4627380088060233), ("exp", {"kernel_temperature": 0.1}, 0.17516209498931978)],
)
def test_golden_kernels(kernel: Any, options: dict[str, Any], expected: float) -> None:
    trained, frozen, backbone = golden()
    for chunk_size in (None, 2):
        loss = cwcl_loss(
            trained, frozen, scale=SCALE, weight_features=backbone, kernel=kernel, chunk_size=chunk_size, **options
        )
        torch.testing.assert_close(loss - 0.25604161468083186, double(expected), rtol=0, atol=1e-10)


def test_golden_both_directions() -> None:
    trained, frozen, backbone = golden()
    loss = cwcl_loss(trained, frozen, scale=SCALE, weight_features=backbone, weighted_direction="both")
    torch.testing.assert_close(loss, double(11.379676686341526), rtol=0, atol=1e-10)


def test_golden_reductions() -> None:
    """Weights of 0 and 1 by class give SupCon; weights on the pair alone give CLIP's InfoNCE, twice the mean."""
    trained, frozen, _ = golden()
    one_hot = F.one_hot(torch.tensor(CLASSES)).double()
    loss = cwcl_loss(trained, frozen, scale=SCALE, weight_features=one_hot, kernel="exp", kernel_temperature=1e-3)
    torch.testing.assert_close(loss - 0.25604161468083186, double(7.930029701468196), rtol=0, atol=1e-10)
    alone = cwcl_loss(trained, frozen, scale=SCALE, weight_features=torch.eye(5).double(), kernel="topk", neighbours=1)
    torch.testing.assert_close(alone, double(0.09736311293426425 + 0.25604161468083186), rtol=0, atol=1e-10)
    units = F.normalize(trained, dim=1), F.normalize(frozen, dim=1)
    torch.testing.assert_close(alone, 2 * clip_loss(*units, scale=SCALE))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("direction", ["trained", "both"])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_identity_dense_formula(kernel: Any, direction: Any, chunk_size: int | None) -> None:
    trained, frozen, backbone = random_case()
    scale = double(3.0).requires_grad_()
    ours = cwcl_loss(
        trained,
        frozen,
        scale=scale,
        weight_features=backbone,
        weighted_direction=direction,
        kernel=kernel,
        chunk_size=chunk_size,
        **KERNELS[kernel],
    )
    weights = dense_weights(backbone, kernel, KERNELS[kernel])
    weighted, hard, reverse = dense_directions(trained, frozen, weights, scale)
    expected = weighted + (reverse if direction == "both" else hard)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    inputs = trained, frozen, scale
    for found, wanted in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
def test_identity_entropy(kernel: Any) -> None:
    trained, frozen, backbone = random_case()
    statistics = cwcl_statistics(
        trained, frozen, scale=3.0, weight_features=backbone, kernel=kernel, chunk_size=4, **KERNELS[kernel]
    )
    weights = dense_weights(backbone, kernel, KERNELS[kernel])
    entropy = -torch.xlogy(weights, weights).sum(1)
    torch.testing.assert_close(statistics["entropy"], entropy.mean())
    torch.testing.assert_close(statistics["effective_positives"], entropy.exp().mean())
    assert statistics["kl"] > 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("direction", ["trained", "both"])
def test_gradcheck(kernel: Any, direction: Any) -> None:
    trained, frozen, backbone = random_case(4)
    scale = double(1.4).requires_grad_()

    def loss(trained: Tensor, frozen: Tensor, scale: Tensor) -> Tensor:
        return cwcl_loss(
            trained,
            frozen,
            scale=scale,
            weight_features=backbone,
            kernel=kernel,
            weighted_direction=direction,
            chunk_size=2,
            **KERNELS[kernel],
        )

    assert torch.autograd.gradcheck(loss, (trained, frozen, scale))
    if direction == "both":
        assert torch.autograd.gradgradcheck(loss, (trained, frozen, scale))


def test_stop_gradient_weight_features() -> None:
    """The weights are constants, also where they come from a frozen side that has a trainable projection."""
    trained, frozen, backbone = random_case()
    backbone.requires_grad_()
    cwcl_loss(trained, frozen, scale=2.0, weight_features=backbone).backward()
    assert backbone.grad is None
    (ours,) = torch.autograd.grad(cwcl_loss(trained, frozen, scale=2.0), frozen)
    constant = cwcl_loss(trained, frozen, scale=2.0, weight_features=frozen.detach())
    torch.testing.assert_close(ours, torch.autograd.grad(constant, frozen)[0])
    frozen_alone = cwcl_loss(trained, frozen.detach(), scale=2.0)
    assert torch.autograd.grad(frozen_alone, trained)[0].isfinite().all()


@settings(deadline=None, max_examples=20)
@given(exponent=st.floats(-5, 15), kernel=st.sampled_from(sorted(KERNELS)), seed=st.integers(0, 2**16))
def test_properties(exponent: float, kernel: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trained, frozen, backbone = (torch.randn(9, 6, generator=generator) for _ in range(3))
    options: dict[str, Any] = {"scale": 5.0, "kernel": kernel, "chunk_size": 4}
    loss = cwcl_loss(trained, frozen, weight_features=backbone, **options)
    close = {"rtol": 1e-4, "atol": 1e-4}
    # Lengths do not count.
    scaled = (trained * 10**exponent).requires_grad_()
    longer = cwcl_loss(scaled, frozen * 10**exponent, weight_features=backbone * 10**exponent, **options)
    torch.testing.assert_close(longer, loss, **close)
    assert torch.autograd.grad(longer, scaled)[0].isfinite().all()
    # Nor do a rotation of both sides, one of the weight features, or the order of the batch.
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    turned = cwcl_loss(trained @ turn, frozen @ turn, weight_features=backbone @ turn.t(), **options)
    torch.testing.assert_close(turned, loss, **close)
    order = torch.randperm(9, generator=generator)
    mixed = cwcl_loss(trained[order], frozen[order], weight_features=backbone[order], **options)
    torch.testing.assert_close(mixed, loss, **close)


def test_properties_sides_differ() -> None:
    """Tempting and false: that the two sides could be exchanged, as in CLIP."""
    trained, frozen, backbone = golden()
    losses = [
        cwcl_loss(*sides, scale=SCALE, weight_features=backbone) for sides in ((trained, frozen), (frozen, trained))
    ]
    assert (losses[0] - losses[1]).abs() > 0.05
