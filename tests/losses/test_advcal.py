"""The objectives of adversarial calibration against the project's notes on arXiv 2505.11895 and dense formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.advcal_cases import (
    ALPHA,
    CENTRES,
    EPS,
    HEAD_BIAS,
    HEAD_WEIGHT,
    INPUTS,
    LABELS,
    SCALE,
    START,
    STEPS,
    encode,
    head,
)
from zoo.attacks import attack_loss, pgd
from zoo.losses.advcal import (
    calibration_consistency,
    centre_cross_entropy,
    centre_divergence,
    clean_adversarial_info_nce,
    clean_adversarial_l2,
)
from zoo.losses.centres import pooled_similarities

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-10}

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": lambda attacked, clean: centre_cross_entropy(attacked, clean[:3], torch.arange(len(attacked)) % 3, scale=2.0),
    "l2": clean_adversarial_l2,
    "nce": lambda attacked, clean: clean_adversarial_info_nce(attacked, clean, temperature=0.5),
    "nce both": lambda attacked, clean: clean_adversarial_info_nce(attacked, clean, temperature=0.5, symmetric=True),
    "nce labels": lambda attacked, clean: clean_adversarial_info_nce(
        attacked, clean, temperature=0.5, symmetric=True, labels=torch.arange(len(attacked)) % 3, chunk_size=2
    ),
    "divergence": lambda attacked, clean: centre_divergence(attacked, clean, torch.eye(4, 6), scale=2.0),
    "consistency": lambda attacked, clean: calibration_consistency(
        attacked,
        clean,
        torch.eye(8, 6).view(4, 2, 6),
        clean_head=attacked.flip(0),
        scale=2.0,
        pool="lme",
        sharpness=3.0,
    ),
}


@pytest.fixture(scope="module")
def attacked() -> Tensor:
    """Embeddings of the inputs that PGD on the embeddings' distance makes of the toy."""
    found = pgd(attack_loss("l2", encode), INPUTS, encode(INPUTS), eps=EPS, step_size=ALPHA, steps=STEPS, start=START)
    return encode(found)


def sides(count: int = 7, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 6, dtype=dtype).requires_grad_(), torch.randn(count, 6, dtype=dtype)


@pytest.mark.parametrize(
    ("pool", "row", "loss"),
    [
        ("mean_centre", [0.9066106404046627, -0.3034764176688133, -0.31810427806857144], 7.565450431089247),
        ("mean_sim", [0.6908396986258778, -0.23468871654177342, -0.2303920422327888], 5.7189953767468324),
        ("max", [0.8563693936743558, 0.1907320720848615, 0.39495460440492236], 4.320310719023813),
        ("lse", [0.8563693936743558, 0.1907320720848615, 0.39495460440492236], 4.320310719026227),
        ("lme", [0.8556762464937959, 0.19003892490430155, 0.3942614572243624], 4.320310719026225),
    ],
)
def test_golden_pooling(pool: Any, row: list[float], loss: float) -> None:
    clean = encode(INPUTS)
    found = pooled_similarities(clean, CENTRES, pool=pool)[0]
    torch.testing.assert_close(found, torch.tensor(row, dtype=torch.float64), **CLOSE)
    value = centre_cross_entropy(clean, CENTRES, LABELS, scale=SCALE, pool=pool)
    torch.testing.assert_close(value.item(), loss, **CLOSE)


def test_golden_sharpness() -> None:
    """c1; and c0, the embedding of the first input. Two centres each: lse is above lme by log(2) / 1000."""
    row = [0.473083117223079, 0.515306321924152, 0.3995646935760507, -0.3551974923721854, -0.4741672235018832]
    torch.testing.assert_close(encode(INPUTS)[0], torch.tensor(row, dtype=torch.float64), **CLOSE)
    lse, lme = (pooled_similarities(encode(INPUTS), CENTRES, pool=pool) for pool in ("lse", "lme"))
    torch.testing.assert_close(lse - lme, torch.full_like(lse, 0.0006931471805599054), **CLOSE)
    found = pooled_similarities(encode(INPUTS), CENTRES, pool="lse", sharpness=10.0)[0]
    expected = [0.8599538276744638, 0.1907522463707832, 0.3949549744948267]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_golden_objectives(attacked: Tensor) -> None:
    clean, output = encode(INPUTS), head(attacked)
    ce = centre_cross_entropy(output, CENTRES, LABELS, scale=SCALE)
    l2 = clean_adversarial_l2(output, clean)
    nce = clean_adversarial_info_nce(output, clean)
    consistency = calibration_consistency(output, clean, CENTRES, clean_head=head(clean), scale=SCALE)
    found = [
        ce, l2, nce, clean_adversarial_info_nce(output, clean, symmetric=True),
        clean_adversarial_l2(head(clean), clean), centre_divergence(output, clean, CENTRES, scale=SCALE),
        ce + 0.1 * consistency, l2 + 0.1 * consistency, nce + 0.1 * consistency,
    ]  # fmt: skip
    expected = [
        6.564641640038119, 0.03626640075524703, 0.3400430176686582, 0.3279544497045581,
        0.019269667603745017, 0.01828948426246024,
        6.56839755522474, 0.04002231594186755, 0.34379893285527874,
    ]  # fmt: skip
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected, dtype=torch.float64), **CLOSE)
    alone = calibration_consistency(output, clean, CENTRES, scale=SCALE)
    torch.testing.assert_close(alone, found[5])
    # c3: the sum over dimensions, which is 2 - 2 cos of unit vectors; the mean over them is another loss.
    torch.testing.assert_close((2 - 2 * F.cosine_similarity(output, clean)).mean(), l2)
    torch.testing.assert_close(F.mse_loss(output, clean).item(), 0.007253280151049406, **CLOSE)


@pytest.mark.parametrize(
    ("name", "length", "row", "of_bias"),
    [
        (
            "ce",
            3.5043097032922015,
            [-0.8373086963949575, -0.14830570818026037, -0.3519672041277743, -0.820204358101865, -1.203831212275558],
            [-1.919420560050531, -1.7190297790368296, -1.4584482841851347, -1.212333164881768, -1.0043223227893252],
        ),
        (
            "l2",
            0.16095768615028125,
            [0.007482334309758977, 0.0634620283190915, 0.06944796922837117, 0.03837655398763177, -0.016070780907113568],
            [0.04380452474172507, 0.04799987366770499, 0.007747791364337665, 0.024187020150601854, 0.02159174273241171],
        ),
        (
            "nce",
            0.5305872689621858,
            [
                0.01178785364732438,
                0.05679315862099835,
                0.059823163685057544,
                0.06422135958126976,
                0.0006619734173292317,
            ],
            [
                0.07177751941266447,
                -0.009336841788475408,
                0.09252494242589483,
                0.17168544774157343,
                0.004854512513539411,
            ],
        ),
    ],
)
def test_golden_gradients(name: str, length: float, row: list[float], of_bias: list[float], attacked: Tensor) -> None:
    weight, bias = HEAD_WEIGHT.clone().requires_grad_(), HEAD_BIAS.clone().requires_grad_()
    output, clean = attacked @ weight.t() + bias, encode(INPUTS)
    loss = {
        "ce": lambda: centre_cross_entropy(output, CENTRES, LABELS, scale=SCALE),
        "l2": lambda: clean_adversarial_l2(output, clean),
        "nce": lambda: clean_adversarial_info_nce(output, clean),
    }[name]()
    found_weight, found_bias = torch.autograd.grad(loss, (weight, bias))
    torch.testing.assert_close(found_weight.norm().item(), length, **CLOSE)
    torch.testing.assert_close(found_weight[0], torch.tensor(row, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(found_bias, torch.tensor(of_bias, dtype=torch.float64), **CLOSE)


def test_golden_training(attacked: Tensor) -> None:
    """50 steps of gradient descent from the identity: the cached attack is undone, the clean side drifts."""
    weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    clean = encode(INPUTS)
    optimizer = torch.optim.SGD([weight, bias], lr=0.5)
    torch.testing.assert_close(clean_adversarial_l2(attacked, clean).item(), 0.007154349932355534, **CLOSE)
    for _ in range(50):
        optimizer.zero_grad()
        clean_adversarial_l2(attacked @ weight.t() + bias, clean).backward()
        optimizer.step()
    after = clean_adversarial_l2(head(attacked, weight, bias), clean)
    drift = clean_adversarial_l2(head(clean, weight, bias), clean)
    torch.testing.assert_close(after.item(), 0.0004397922882410862, **CLOSE)
    torch.testing.assert_close(drift.item(), 0.006483367435842217, **CLOSE)


def dense_nce(attacked: Tensor, clean: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Sample by sample: its own clean embedding among those of other labels."""
    scores = F.normalize(attacked, dim=1) @ F.normalize(clean, dim=1).t() / temperature
    values = []
    for i in range(len(scores)):
        candidates = [i] + [j for j in range(len(scores)) if labels[j] != labels[i]]
        values.append(-scores[i, candidates].log_softmax(0)[0])
    return torch.stack(values).mean()


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_identity_labels(chunk_size: int | None) -> None:
    attacked, clean = sides(9)
    labels = torch.tensor([5, 5, -2, 7, 7, 7, 0, 1, 5])
    found = clean_adversarial_info_nce(attacked, clean, temperature=0.3, labels=labels, chunk_size=chunk_size)
    expected = dense_nce(attacked, clean, labels, 0.3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, attacked), torch.autograd.grad(expected, attacked))
    both = clean_adversarial_info_nce(
        attacked, clean, temperature=0.3, labels=labels, symmetric=True, chunk_size=chunk_size
    )
    torch.testing.assert_close(
        both, (dense_nce(attacked, clean, labels, 0.3) + dense_nce(clean, attacked, labels, 0.3)) / 2
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_identity_own_labels(symmetric: bool) -> None:
    """Labels that all differ mask nothing."""
    pair = sides()
    plain = clean_adversarial_info_nce(*pair, symmetric=symmetric)
    torch.testing.assert_close(clean_adversarial_info_nce(*pair, symmetric=symmetric, labels=torch.randperm(7)), plain)


def test_identity_cosine() -> None:
    attacked, clean = sides()
    torch.testing.assert_close(
        clean_adversarial_l2(attacked, clean), (2 - 2 * F.cosine_similarity(attacked, clean)).mean()
    )
    one = torch.randn(3, 6)
    tiny = clean_adversarial_l2(one + 1e-6 * torch.eye(3, 6), one)
    assert 0 < tiny < 1e-11  # 2 - 2 cos would be a multiple of 6e-8


@pytest.mark.parametrize("pool", ["mean_centre", "mean_sim", "max", "lse", "lme"])
def test_identity_pooling(pool: Any) -> None:
    """Class by class in lists of unequal length, whatever fills the gaps; one centre is what no pooling is."""
    embeddings = torch.randn(4, 6, dtype=torch.float64)
    centres = torch.randn(3, 4, 6, dtype=torch.float64)
    counts = [4, 1, 2]
    mask = torch.arange(4) < torch.tensor(counts).unsqueeze(1)
    found = pooled_similarities(embeddings, centres, pool=pool, mask=mask, sharpness=4.0)
    for k, count in enumerate(counts):
        own = F.normalize(centres[k, :count], dim=1)
        cosines = F.normalize(embeddings, dim=1) @ own.t()
        expected = {
            "mean_centre": F.cosine_similarity(embeddings, own.mean(0, keepdim=True)),
            "mean_sim": cosines.mean(1),
            "max": cosines.max(1).values,
            "lse": (4 * cosines).exp().sum(1).log() / 4,
            "lme": (4 * cosines).exp().mean(1).log() / 4,
        }[pool]
        torch.testing.assert_close(found[:, k], expected)
    filled = torch.where(mask.unsqueeze(2), centres, 1e3)
    torch.testing.assert_close(pooled_similarities(embeddings, filled, pool=pool, mask=mask, sharpness=4.0), found)
    single = pooled_similarities(embeddings, centres[:, :1], pool=pool)
    torch.testing.assert_close(single, pooled_similarities(embeddings, centres[:, 0]))


def test_identity_lse_bias() -> None:
    """lse favours a class by the number of its centres, lme does not (golden: log(2) / 1000)."""
    clean = encode(INPUTS)
    difference = pooled_similarities(clean, CENTRES, pool="lse") - pooled_similarities(clean, CENTRES, pool="lme")
    torch.testing.assert_close(difference, torch.full_like(difference, 0.0006931471805599054), **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    attacked, clean = sides(5)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, clean), (attacked,))


@pytest.mark.parametrize("name", LOSSES)
def test_stop_gradient_clean(name: str) -> None:
    attacked, clean = sides()
    clean.requires_grad_()
    (found,) = torch.autograd.grad(LOSSES[name](attacked, clean), clean, allow_unused=True)
    assert (found is None) == (name != "ce")  # the centres of ce may be trained


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from([name for name in LOSSES if name != "ce"]),
    seed=st.integers(0, 10**6),
    length=st.sampled_from([1e-4, 1.0, 1e4]),  # the other side is divided by it, and counts as 0 below 1e-6
    count=st.integers(1, 8),
)
def test_properties(name: str, seed: int, length: float, count: int) -> None:
    """Finite, not negative, blind to lengths and to the order of the batch; 0 where nothing was attacked."""
    torch.manual_seed(seed)
    attacked, clean = (side.detach() for side in sides(count))
    loss = LOSSES[name]
    value = loss(attacked, clean)
    assert value.isfinite()
    assert value > -1e-12
    if name not in ("nce labels", "consistency"):
        torch.testing.assert_close(loss(length * attacked, clean / length), value)
        order = torch.randperm(count)
        torch.testing.assert_close(loss(attacked[order], clean[order]), value)
    if name in ("l2", "divergence"):
        torch.testing.assert_close(loss(length * clean, clean), torch.zeros_like(value))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    attacked, clean = (side.detach().to(dtype) for side in sides())
    attacked.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[name](attacked, clean)
        loss.backward()
    assert loss.dtype == torch.float32
    assert attacked.grad is not None
    assert attacked.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), LOSSES[name](attacked.double(), clean.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_degenerate(name: str) -> None:
    """Zero vectors, extreme lengths, one sample, none, NaN."""
    attacked, clean = sides(5)
    with torch.no_grad():
        attacked[1], clean[2], attacked[3], clean[3] = 0, 0, 0, 0
    loss = LOSSES[name](attacked, clean)
    (gradient,) = torch.autograd.grad(loss, attacked)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[3] == 0).all() or name == "consistency"
    one, other = sides(1)
    if name.startswith("nce"):
        assert LOSSES[name](one, other) == 0
    elif name != "ce":
        assert LOSSES[name](one, other).isfinite()
    empty, nothing = sides(0)
    if name != "ce":
        loss = LOSSES[name](empty, nothing)
        assert loss == 0
        assert torch.autograd.grad(loss, empty)[0].shape == (0, 6)
    attacked, clean = sides(5)
    with torch.no_grad():
        attacked[1, 2] = math.nan
    assert LOSSES[name](attacked, clean).isnan()


@pytest.mark.parametrize("name", ["nce labels", "consistency"])
def test_compile_fullgraph(name: str) -> None:
    attacked, clean = sides(dtype=torch.float32)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    ours, eager = compiled(attacked, clean), LOSSES[name](attacked, clean)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(torch.autograd.grad(ours, attacked), torch.autograd.grad(eager, attacked))
