"""Attacks in every mode and precision, in micro-batches, with restarts, and with input that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.attack_parts import ATTACKS, Network, images
from zoo.attacks import apgd, attack_loss, pgd
from zoo.errors import InputError


@pytest.fixture
def network() -> Network:
    return Network().eval()


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(
    attack=st.sampled_from(list(ATTACKS)),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(1e-4, 3),
    steps=st.integers(0, 7),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    micro_batch=st.sampled_from([None, 1, 2, 5]),
)
def test_properties(
    attack: str, norm: Any, eps: float, steps: int, seed: int, scale: float, micro_batch: int | None
) -> None:
    """In the ball, in the range, finite, the same in micro-batches, and independent of the other samples."""
    x = torch.rand(5, 2, 3, generator=seeded(seed), dtype=torch.float64)
    weight = torch.randn(2, 3, generator=seeded(seed + 1), dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return scale * torch.sin(5 * x * weight).sum((1, 2))

    options: dict[str, Any] = {"eps": eps, "steps": steps, "norm": norm}
    found = ATTACKS[attack](loss, x, generator=seeded(seed), micro_batch=micro_batch, **options)
    assert torch.equal(found, ATTACKS[attack](loss, x, generator=seeded(seed), **options))
    assert (found >= 0).all()
    assert (found <= 1).all()
    move = (found - x).flatten(1)
    length = move.abs().amax(1) if norm == "linf" else move.norm(dim=1)
    assert (length <= eps * (1 + 1e-12)).all()
    alone = ATTACKS[attack](loss, x[2:3], random_start=False, **options)
    assert torch.equal(ATTACKS[attack](loss, x, random_start=False, **options)[2:3], alone)


def test_property_apgd_keeps_the_best(network: Network) -> None:
    """Never below where it began, at any number of steps."""
    x, labels = images(16)
    loss = attack_loss("ce", network)
    before = loss(x, labels)
    for steps in (0, 1, 4, 20):
        found = apgd(loss, x, labels, eps=0.3, steps=steps, random_start=False)
        after = loss(found, labels)
        assert (after >= before).all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_restarts(attack: str, network: Network) -> None:
    """Each sample has the best of the runs that one generator gives one after another."""
    x, labels = images(12)
    loss = attack_loss("ce", lambda x: torch.sin(30 * network(x)))
    options: dict[str, Any] = {"eps": 0.2, "steps": 2}
    generator = seeded()
    runs = [ATTACKS[attack](loss, x, labels, generator=generator, **options) for _ in range(3)]
    values = torch.stack([loss(run, labels) for run in runs])
    together = ATTACKS[attack](loss, x, labels, generator=seeded(), restarts=3, micro_batch=5, **options)
    torch.testing.assert_close(loss(together, labels), values.amax(0))
    assert len(values.argmax(0).unique()) == 3
    for row, best in enumerate(values.argmax(0).tolist()):
        torch.testing.assert_close(together[row], runs[best][row])


def test_random_start() -> None:
    """No steps: noise in the ball, uniform in the box, of the right length in the ball, from the generator alone."""
    x = torch.full((4000, 3), 0.5)

    def unused(x: Tensor) -> Tensor:
        raise AssertionError

    before = torch.get_rng_state()
    box = pgd(unused, x, eps=0.1, step_size=0, steps=0, generator=seeded()) - x
    ball = pgd(unused, x, eps=0.1, step_size=0, steps=0, norm="l2", generator=seeded()) - x
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(box.square().mean(), torch.tensor(0.1**2 / 3), rtol=0.05, atol=0)
    inner = (ball.norm(dim=1) < 0.1 / 2 ** (1 / 3)).float().mean()
    torch.testing.assert_close(inner, torch.tensor(0.5), rtol=0, atol=0.03)
    torch.testing.assert_close(ball.mean(0), torch.zeros(3), rtol=0, atol=0.005)
    again = pgd(unused, x, eps=0.1, step_size=0, steps=0) - x
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(again, box)


def test_given_start() -> None:
    """It comes before chance, and is brought into the ball first."""
    x = torch.full((2, 3), 0.5)
    start = torch.tensor([[0.9, 0.52, 0.0]]).expand(2, 3)
    found = pgd(lambda x: 0 * x.sum(1), x, eps=0.1, step_size=0.1, steps=2, start=start)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.52, 0.4]]).expand(2, 3))


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("mode", MODES)
def test_modes(attack: str, mode: str, network: Network) -> None:
    """The same in every mode, in float32, and nothing of the network is touched; inputs of inference mode will do."""
    x, labels = images()
    loss = attack_loss("ce", network)
    expected = ATTACKS[attack](loss, x, labels, eps=0.1, generator=seeded())
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 3)
    network.first.train()  # the mode of one part, which neither eval() nor train() of the whole would give back
    network.seen.clear()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    flags = [module.training for module in network.modules()]
    with MODES[mode]():
        found = ATTACKS[attack](loss, x.clone(), labels.clone(), eps=0.1, generator=seeded())
        assert not found.is_inference()
        assert torch.is_inference_mode_enabled() == (mode == "inference")
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert set(network.seen) == {(torch.float32, False)}
    assert all((parameter.grad == 3).all() for parameter in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == flags


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision(dtype: torch.dtype, network: Network) -> None:
    """Half inputs are attacked in float32; a network in another precision gets what it needs."""
    x, labels = images()
    x = x.to(dtype)
    found = pgd(attack_loss("ce", network.double()), x, labels, eps=0.1, step_size=0.05, steps=3, random_start=False)
    assert found.dtype == dtype
    assert {seen for seen, _ in network.seen} == {torch.float64}
    wide = pgd(attack_loss("ce", network), x.double(), labels, eps=0.1, step_size=0.05, steps=3, random_start=False)
    torch.testing.assert_close(found.double(), wide, rtol=0, atol=0.01)
    assert (found - x).abs().max() > 0.09


def test_small_gradients_move() -> None:
    """1e-30 is 0 in half precision, and its sign too; the attack moves at full steps."""
    x = torch.full((1, 3), 0.5, dtype=torch.bfloat16)
    found = pgd(lambda x: 1e-30 * x.sum(1), x, eps=0.25, step_size=0.125, steps=2, random_start=False)
    assert (found == 0.75).all()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_degenerate(attack: str, norm: Any) -> None:
    """A gradient of 0 or NaN moves nothing, a NaN value does not win, an empty batch stays empty."""
    x = torch.full((3, 2), 0.25)
    weight = torch.tensor([[1.0], [0.0], [math.nan]])

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (x * weight).sum(1)

    found = ATTACKS[attack](loss, x, weight, eps=0.1, norm=norm, random_start=False)
    assert (found[0] > x[0]).all()
    assert torch.equal(found[1:], x[1:])
    restarted = ATTACKS[attack](loss, x, weight, eps=0.1, norm=norm, restarts=2)
    assert restarted.isfinite().all()
    empty = ATTACKS[attack](loss, x[:0], weight[:0], eps=0.1, norm=norm)
    assert empty.shape == (0, 2)


# Dynamo looks at .grad of what it gets and hides the warning, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_network(network: Network) -> None:
    x, _ = images()
    compiled: Any = torch.compile(nn.Sequential(network.conv, network.bn), backend="aot_eager")
    options: dict[str, Any] = {"eps": 0.1, "step_size": 0.05, "steps": 2, "random_start": False}
    plain = pgd(lambda x: network.bn(network.conv(x)).square().sum((1, 2, 3)), x, **options)
    with torch.no_grad():
        torch.testing.assert_close(pgd(lambda x: compiled(x).square().sum((1, 2, 3)), x, **options), plain)


def plain_dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Written for one sample, with lists."""
    values = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        high = sorted(row, reverse=True)
        values.append((max(v for i, v in enumerate(row) if i != label) - row[label]) / (high[0] - high[2]))
    return torch.tensor(values, dtype=torch.float64)


def test_loss_values() -> None:
    """Against formulas written apart; ce is the softplus of repel; dlr does not see scale and shift."""
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 5
    made = {name: attack_loss(name, lambda x: x)(logits, labels) for name in ("ce", "dlr", "repel")}
    torch.testing.assert_close(made["ce"], -logits.softmax(1).gather(1, labels[:, None])[:, 0].log())
    torch.testing.assert_close(made["ce"], F.softplus(made["repel"]))
    torch.testing.assert_close(made["dlr"], plain_dlr(logits, labels))
    torch.testing.assert_close(attack_loss("dlr", lambda x: 7 * x - 3)(logits, labels), made["dlr"])
    clean = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(attack_loss("l2", lambda x: x)(logits, clean), ((logits - clean) ** 2).sum(1))
    torch.testing.assert_close(attack_loss("cos", lambda x: x)(logits, clean), 1 - F.cosine_similarity(logits, clean))
    two, both = logits[:, :2], labels % 2
    margin = two.gather(1, 1 - both[:, None]) - two.gather(1, both[:, None])
    torch.testing.assert_close(attack_loss("dlr", lambda x: x)(two, both), margin[:, 0])
    torch.testing.assert_close(attack_loss("repel", lambda x: x)(two, both), margin[:, 0])


@pytest.mark.parametrize("name", ["ce", "dlr", "repel", "l2", "cos"])
def test_loss_gradients(name: str) -> None:
    rows = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(3, 4, dtype=torch.float64) if name in ("l2", "cos") else torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda x: attack_loss(name, lambda x: x)(x, targets), (rows,))


def test_loss_where_ce_is_sure() -> None:
    """At a margin of 200 the gradient of ce is gone in float32; those of dlr and repel are not."""
    logits = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    zero = torch.tensor([0])
    size = {
        name: torch.autograd.grad(attack_loss(name, lambda x: x)(logits, zero).sum(), logits)[0].abs().max()
        for name in ("ce", "dlr", "repel")
    }
    assert size["ce"] == 0
    assert size["dlr"] > 1e-4
    assert size["repel"] == 1


def test_loss_ties_and_zeros() -> None:
    even = torch.zeros(2, 4, requires_grad=True)
    for name in ("ce", "dlr", "repel"):
        values = attack_loss(name, lambda x: x)(even, torch.tensor([0, 3]))
        assert values.isfinite().all()
        assert torch.autograd.grad(values.sum(), even)[0].isfinite().all()
    values = attack_loss("cos", lambda x: x)(even, torch.zeros(2, 4))
    assert (values == 1).all()
    half = attack_loss("ce", lambda x: x)(even.bfloat16(), torch.tensor([0, 3]))
    assert half.dtype == torch.float32


BAD: list[tuple[dict[str, Any], str]] = [
    ({"eps": -0.1}, r"eps must be finite and not negative, got -0.1"),
    ({"eps": math.nan}, r"eps must be finite"),
    ({"step_size": math.inf}, r"step_size must be finite and not negative, got inf"),
    (
        {"eps": torch.ones(3)},
        r"eps must be a number or a tensor that broadcasts to x, \(5, 2, 4, 4\), got shape \(3,\)",
    ),
    ({"steps": -1}, r"steps must be at least 0, got -1"),
    ({"norm": "l3"}, r"norm must be one of linf, l2, got 'l3'"),
    ({"restarts": 0}, r"restarts must be at least 1"),
    ({"restarts": 2, "random_start": False}, r"and 1 with random_start=False, since all would be alike, got 2"),
    ({"micro_batch": 0}, r"micro_batch must be at least 1, or None for the whole batch, got 0"),
    ({"valid_range": (1.0, 0.0)}, r"valid_range must be a lower and a higher bound"),
    ({"valid_range": (0.3, 1.0)}, r"x must lie in valid_range, 0.3 … 1, got values from .* before normalisation"),
    ({"start": torch.zeros(5, 2)}, r"start must have the shape of x, got \(5, 2\) and \(5, 2, 4, 4\)"),
    ({"x": torch.zeros(5)}, r"x must be \(B, …\) in floating point, got shape \(5,\)"),
    ({"x": torch.zeros(5, 2, dtype=torch.uint8)}, r"x must be \(B, …\) in floating point, .* scale integers"),
    ({"targets": torch.zeros(4)}, r"targets must have one row a sample, 5, got shape \(4,\)"),
    (
        {"loss": lambda x, y: x.sum()},
        r"loss must return one value a sample, shape \(5,\), got \(\); use reduction='none'",
    ),
    ({"loss": lambda x, y: 1.0}, r"loss must return one value a sample, shape \(5,\), got float"),
    ({"loss": lambda x, y: x.detach().sum((1, 2, 3))}, r"loss must depend on x by operations that have a gradient"),
    ({"loss": lambda x, y: torch.zeros(5, requires_grad=True)}, r"loss must depend on x"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    x, labels = images()
    given: dict[str, Any] = {"x": x, "targets": labels, "loss": lambda x, y: x.sum((1, 2, 3)), "eps": 0.1}
    given |= {"step_size": 0.1, "steps": 1} | change
    with pytest.raises(InputError, match=message):
        pgd(given.pop("loss"), given.pop("x"), given.pop("targets"), **given)


def test_bad_rho() -> None:
    with pytest.raises(InputError, match=r"rho must be in 0 … 1, got 2"):
        apgd(lambda x: x.sum(1), torch.zeros(1, 2), eps=0.1, steps=1, rho=2)


def bad_losses() -> Iterator[tuple[str, Any, Any, str]]:
    labels = torch.tensor([0, 1])
    yield "dlrr", None, labels, r"must be one of ce, dlr, repel, l2, cos, got 'dlrr'. Did you mean dlr"
    yield "ce", lambda x: [x], labels, r"the network must return a tensor, got list"
    yield "ce", lambda x: x[0], labels, r"the network's output must have two dimensions"
    yield "ce", lambda x: x, torch.tensor([0, 3]), r"targets must be labels in 0 … 2 \(3 classes\), found 3"
    yield "repel", lambda x: x[:, :1], torch.tensor([0, 0]), r"dlr and repel need at least two classes"
    yield "l2", lambda x: x, labels, r"targets must have two dimensions"
    yield "cos", lambda x: x, torch.zeros(2, 4), r"targets must have the shape of the network's output"


@pytest.mark.parametrize(("name", "network", "targets", "message"), list(bad_losses()))
def test_bad_losses(name: str, network: Any, targets: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack_loss(name, network)(torch.zeros(2, 3), targets)
