"""zoo.losses.structure against the numbers of the released functions and a plain restatement of the formula."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoo.losses.random_walks
import zoo.losses.structure
from zoo.losses.random_walks import row_divergence
from zoo.losses.structure import structure_loss, structure_statistics

# Inputs and numbers: the golden file of the project's notes on arXiv 2506.16895 (shared/golden/structure.json), made
# there in float64; those of "released" were compared with the authors' functions to 1e-17.
X1 = [
    [0.461944099362173, 1.2607697551711663, 0.5982629187230164, -0.555002342497299, -0.5094897189888754],
    [1.046601678194595, 0.829717564319901, -0.5911263123537, -1.2771016150230794, -0.2454012441013298],
    [1.262848371608617, -0.0010937554500976832, -0.9348145122428221, -0.41256403785198487, 0.31350978033316107],
    [1.008979980743832, -0.7234574494820909, -0.6894763249059255, -0.3822410496764099, 1.237339460528313],
    [0.404394776626979, -0.9794046765786888, -0.8118702086777687, 0.8777792481417743, 0.7300114394289591],
    [-0.2665613723413816, -0.7463233423757605, -0.12584717791444713, 0.6743836331858213, 0.47715178627432264],
]
A1 = [
    [0.27534992902490274, 1.1750901154195796, 0.21709717481136503],
    [0.8197341996157655, 0.8226438441531306, -0.6900648640178801],
    [1.1390746977952675, 0.17475942704651837, -0.9583250966356108],
    [1.121816600065489, -0.4428324394849905, -0.7871350874787277],
    [0.7739886564820311, -0.7989616551940841, -0.8259427061073567],
    [0.21709717481136503, -0.8519570487752124, -0.2772698898712944],
]
X2 = [
    [0.6988211790767962, 1.1829538258897863, 1.082605007121467, 0.4586449696865752],
    [1.2189692435140982, 0.6931474809680763, -0.2586600473143135, -0.9909166671306273],
    [0.646775520706423, -0.5510691315763533, -0.9688648866071502, -0.6816677758957262],
    [-0.39246225047012606, -1.2278051754561636, -0.5286175811239813, -0.33238244186659016],
    [-0.7630569721517393, -0.6033844924553325, 0.06461701241660961, 1.09988619042321],
    [-0.06001985772633267, 0.6712807947114232, 0.8490354400324882, 0.6099855423835594],
]
A2 = [
    [0.42715759094489547, 1.1291323708876104, 0.5590172645173861],
    [1.0636764702507822, 0.6860737608013064, -0.5626919856268922],
    [0.9948467509324296, -0.27791723647528827, -1.009149487579714],
    [0.2727573923434231, -1.0120442755072077, -0.6262763436967836],
    [-0.5561287749004179, -0.9574340522423495, -0.07348788491837382],
    [-0.8645272245522848, -0.17311503205523687, 0.7223373246497538],
]
RELEASED = {1: 0.1603358149292148, 2: 0.14268024180586, 3: 0.1292317707489992, 5: 0.10904514344479765}  # at 0.05
TEXTBOOK = {1: 0.10853144830014394, 2: 0.09041274566325933, 3: 0.07730483118308494, 5: 0.059614899021995314}
RELEASED_WARM = {1: 0.009568299335841215, 2: 0.006596788161645003, 3: 0.005084746311345078, 5: 0.0035288167481016077}
TEXTBOOK_WARM = {1: 0.009296141705617985, 2: 0.006433036308821135, 3: 0.0049683383257090015, 5: 0.003454986591140314}
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-10}


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_case(rows: int = 7, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Frozen features and what a head with some noise makes of them."""
    frozen = torch.randn(rows, 6, dtype=dtype)
    aligned = frozen @ torch.randn(6, 4, dtype=dtype) + 0.3 * torch.randn(rows, 4, dtype=dtype)
    return frozen, aligned.requires_grad_()


def plain_loss(
    frozen: Tensor,
    aligned: Tensor,
    *,
    temperature: float = 0.5,
    levels: int = 1,
    level_weights: str = "none",
    divergence: str = "released",
    centering: str = "mean",
    margin: float = 0.0,
) -> Tensor:
    """The formula with its N x N matrices, a matrix power for each level, and the release's 1e-12."""
    steps = []
    for features in (frozen.detach(), aligned):
        z = features - features.mean(0) if centering == "before" else features
        z = F.normalize(z, dim=1)
        if centering in ("mean", "standard"):
            z = z - z.mean(0)
        if centering == "standard":
            z = z / z.std(0)
        steps.append(torch.softmax(z @ z.t() / temperature, dim=1))
    total = torch.zeros((), dtype=aligned.dtype)
    for level in range(1, levels + 1):
        x, a = (torch.linalg.matrix_power(step, level) for step in steps)
        m = (x + a) / 2
        if divergence == "js":
            terms = F.kl_div(m.log(), a, reduction="none") + F.kl_div(m.log(), x, reduction="none")
        else:
            terms = sum((m + 1e-12) * ((m + 1e-12).log() - (p + 1e-12).log()) for p in (a, x))
        value = terms.sum(1).mean() / 2
        total = total + (value - margin).clamp_min(0) / (level if level_weights == "inverse" else 1)
    return total / levels


OPTIONS: list[dict[str, Any]] = [
    {},
    {"divergence": "js"},
    {"levels": 3, "level_weights": "inverse"},
    {"levels": 2, "divergence": "js", "centering": "none"},
    {"centering": "standard"},
    {"centering": "before", "levels": 4},
    {"margin": 0.002},
    {"levels": 3, "margin": 0.004},
]


@pytest.mark.parametrize(
    ("divergence", "temperature", "expected"),
    [
        ("released", 0.05, RELEASED),
        ("js", 0.05, TEXTBOOK),
        ("released", 0.5, RELEASED_WARM),
        ("js", 0.5, TEXTBOOK_WARM),
    ],
)
def test_golden(divergence: Any, temperature: float, expected: dict[int, float]) -> None:
    for levels, value in expected.items():
        loss = structure_loss(
            double(X1),
            double(A1),
            temperature=temperature,
            levels=levels,
            level_weights="inverse",
            divergence=divergence,
        )
        torch.testing.assert_close(loss, double(value), **CLOSE)


def test_golden_options() -> None:
    def warm(**options: Any) -> Tensor:
        return structure_loss(double(X1), double(A1), temperature=0.5, **options)

    torch.testing.assert_close(warm(levels=3), double(0.0076669470476581625), **CLOSE)
    torch.testing.assert_close(warm(centering="none"), double(0.010210032324799152), **CLOSE)
    torch.testing.assert_close(warm(centering="standard"), double(0.1589752087198463), **CLOSE)
    torch.testing.assert_close(warm(centering="before"), double(0.006525427192178934), **CLOSE)


def test_golden_steps() -> None:
    """The restated first row of P has the golden numbers, and the statistics are those of the restated P."""
    diagonal = {0.05: 0.9999992434570183, 0.5: 0.7439181380997443}
    first_row = [0.7439181380997443, 0.1817224303369484, 0.036680930551190094, 0.01590406255772915]
    first_row += [0.009300931470442317, 0.012473506983945865]
    for temperature, stay in diagonal.items():
        z = F.normalize(double(X1), dim=1)
        z = z - z.mean(0)
        row = torch.softmax(z @ z[0] / temperature, 0)
        torch.testing.assert_close(row[0], double(stay), **CLOSE)
        masses = torch.stack([torch.softmax(z @ z[i] / temperature, 0)[i] for i in range(6)])
        found = structure_statistics(double(X1), temperature=temperature, chunk_size=4)
        torch.testing.assert_close(found["diagonal_mass"], masses.mean(), **CLOSE)
    z = F.normalize(double(X1), dim=1) - F.normalize(double(X1), dim=1).mean(0)
    step = torch.softmax(z @ z.t() / 0.5, 1)
    torch.testing.assert_close(step[0], double(first_row), **CLOSE)
    effective = (-(step * step.log()).sum(1)).exp().mean()
    found = structure_statistics(double(X1), temperature=0.5)
    torch.testing.assert_close(found["effective_neighbours"], effective, **CLOSE)
    assert list(found) == ["diagonal_mass", "effective_neighbours"]


def test_golden_objective() -> None:
    image, text = (structure_loss(double(x), double(a)) for x, a in ((X1, A1), (X2, A2)))
    torch.testing.assert_close(text, double(0.13227411343146178), **CLOSE)
    scores = F.normalize(double(A1), dim=1) @ F.normalize(double(A2), dim=1).t() / 0.05
    labels = torch.arange(6)
    clip = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2
    torch.testing.assert_close(clip, double(5.0215504659462935), **CLOSE)
    torch.testing.assert_close(clip + 10 * (image + text) / 2, double(6.484600107749676), **CLOSE)
    torch.testing.assert_close(clip + 10 * (image + text), double(7.947649749553059), **CLOSE)


def test_golden_gradient() -> None:
    aligned = double(A1).requires_grad_()
    (gradient,) = torch.autograd.grad(structure_loss(double(X1), aligned, temperature=0.5), aligned)
    torch.testing.assert_close(gradient.norm(), double(0.029186695851383636), **CLOSE)
    row = [-0.0008256686476164134, -3.966953135849677e-05, 0.001261937553724543]
    torch.testing.assert_close(gradient[0], double(row), **CLOSE)


def test_golden_far_apart() -> None:
    """What 1e-12 makes of a neighbour that the head has dropped, and of rows without a common neighbour."""
    half, first, second = double([[0.5, 0.5]]), double([[1.0, 0.0]]), double([[0.0, 1.0]])
    expected = {"released": (3.238116085165692, 13.122363377432071), "js": (0.21576155433833577, 0.6931471805589454)}
    for divergence, (dropped, disjoint) in expected.items():
        chosen: Any = divergence
        torch.testing.assert_close(row_divergence(first, half, chosen), double([dropped]), **CLOSE)
        torch.testing.assert_close(row_divergence(first, second, chosen), double([disjoint]), **CLOSE)
        # The same through the loss: equal frozen rows are two neighbours of mass 1/2, orthogonal aligned ones are one.
        equal, apart = double([[2.0, 0.0], [3.0, 0.0]]), double([[1.0, 0.0], [0.0, 1.0]])
        loss = structure_loss(equal, apart, temperature=0.01, divergence=chosen, centering="none")
        torch.testing.assert_close(loss, double(dropped), **CLOSE)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_identity_plain_formula(options: dict[str, Any], chunk_size: int) -> None:
    frozen, aligned = random_case()
    expected = plain_loss(frozen, aligned, **options)
    loss = structure_loss(frozen, aligned, temperature=0.5, chunk_size=chunk_size, **options)
    assert expected > 1e-3
    torch.testing.assert_close(loss, expected, **CLOSE)
    (ours,) = torch.autograd.grad(loss, aligned)
    (plain,) = torch.autograd.grad(expected, aligned)
    torch.testing.assert_close(ours, plain, **CLOSE)


def test_identity_margin() -> None:
    """Levels below the margin add neither value nor gradient; those above lose the margin alone."""
    frozen, aligned = random_case()
    one = structure_loss(frozen, aligned, temperature=0.5)
    two = 2 * structure_loss(frozen, aligned, temperature=0.5, levels=2) - one
    between = float((one + two).detach()) / 2
    assert two < between < one
    loss = structure_loss(frozen, aligned, temperature=0.5, levels=2, margin=between)
    torch.testing.assert_close(loss, (one - between) / 2)
    (gradient,) = torch.autograd.grad(loss, aligned, retain_graph=True)
    (expected,) = torch.autograd.grad(one / 2, aligned)
    torch.testing.assert_close(gradient, expected)
    nothing = structure_loss(frozen, aligned, temperature=0.5, margin=100.0)
    assert nothing == 0
    assert (torch.autograd.grad(nothing, aligned)[0] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict[str, Any]) -> None:
    frozen, aligned = random_case(5)

    def loss(features: Tensor) -> Tensor:
        return structure_loss(frozen, features, temperature=0.4, chunk_size=2, **options)

    assert torch.autograd.gradcheck(loss, aligned)
    once, again = (torch.autograd.grad(loss(aligned), aligned, create_graph=graph)[0] for graph in (False, True))
    torch.testing.assert_close(again, once, **CLOSE)
    if options.get("levels", 1) < 3:
        assert torch.autograd.gradgradcheck(loss, aligned)


def test_stop_gradient_frozen() -> None:
    frozen, aligned = random_case()
    frozen.requires_grad_()
    structure_loss(frozen, aligned, levels=2).backward()
    assert frozen.grad is None
    assert aligned.grad is not None
    assert not structure_loss(frozen, aligned.detach()).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(structure_loss(frozen, aligned), structure_loss(frozen, aligned).detach())


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(2, 12),
    chunk_size=st.integers(1, 13),
    temperature=st.sampled_from([1e-3, 0.05, 1.0, 100.0]),
    levels=st.integers(1, 3),
    divergence=st.sampled_from(["released", "js"]),
    seed=st.integers(0, 2**16),
)
def test_properties(rows: int, chunk_size: int, temperature: float, levels: int, divergence: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    frozen, aligned = torch.randn(2, rows, 5, generator=generator)
    aligned.requires_grad_()
    options: dict[str, Any] = {"temperature": temperature, "levels": levels, "divergence": divergence}
    loss = structure_loss(frozen, aligned, chunk_size=chunk_size, **options)
    assert 0 <= loss <= (math.log(2) + 1e-6 if divergence == "js" else 14)
    (gradient,) = torch.autograd.grad(loss, aligned)
    assert gradient.isfinite().all()
    # Against double precision: scores are as large as 1 / temperature, and "js" rounds in units of 1e-7.
    exact = structure_loss(frozen.double(), aligned.detach().double(), **options)
    close = {"rtol": 1e-4 + 1e-5 / temperature, "atol": 2e-7 + 2e-6 / temperature}
    torch.testing.assert_close(loss.detach(), exact.float(), **close)
    # In double precision, where rounding is no matter: a rotation, factors on rows, and the order of the samples.
    frozen, moved = frozen.double(), aligned.detach().double()
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator).double()).Q
    factors = torch.rand(2, rows, 1, generator=generator).double() * 50 + 1e-3
    order = torch.randperm(rows, generator=generator)
    same = structure_loss((frozen * factors[0])[order], (moved @ turn * factors[1])[order], **options)
    torch.testing.assert_close(same, exact, rtol=1e-8, atol=1e-10)
    # Nothing has moved: 0, and its gradient is 0.
    still = (frozen @ turn * factors[0]).requires_grad_()
    nothing = structure_loss(frozen, still, **options)
    assert 0 <= nothing < 1e-10
    assert torch.autograd.grad(nothing, still)[0].abs().max() < 1e-6
    assert 0 <= structure_loss(frozen, frozen, **options) < 1e-13


def test_properties_shift_counts() -> None:
    """Tempting and false: the mean is taken off the unit vectors, so that a shift of the raw features does count."""
    frozen, aligned = random_case()
    plain = structure_loss(frozen, aligned, temperature=0.5)
    shifted = structure_loss(frozen, aligned + 5, temperature=0.5)
    assert (plain - shifted).abs() > 1e-2
    before = [structure_loss(frozen, a, temperature=0.5, centering="before") for a in (aligned, aligned + 5)]
    torch.testing.assert_close(before[0], before[1])


def test_properties_second_order() -> None:
    """Where the walks nearly agree, both divergences are the same quadratic form."""
    frozen = random_case(16)[0]
    near = frozen + 1e-4 * torch.randn_like(frozen)
    released, js = (structure_loss(frozen, near, temperature=0.5, divergence=name) for name in ("released", "js"))
    torch.testing.assert_close(released, js, rtol=1e-3, atol=0)
    # In single precision, the released value keeps its leading digits.
    single = structure_loss(frozen.float(), near.float(), temperature=0.5)
    torch.testing.assert_close(single.double(), released, rtol=0.05, atol=0)


@pytest.mark.parametrize("module", [zoo.losses.structure, zoo.losses.random_walks])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0
