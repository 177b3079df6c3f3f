"""Accuracy under attack: against linear networks, whose worst case is known, and against the numbers of the spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.robust_networks import Linear, direction, margins, samples
from zoo.attack_plan import ATTACKS, AttackPlan, eps_label
from zoo.attacked_networks import InputSpace, callable_member, class_centres
from zoo.errors import InputError
from zoo.pixel_units import PixelUnits
from zoo.robustness import RobustnessTrial, robust_accuracy, undisturbed_networks
from zoo.robustness_checks import find_flaws, robustness_figure

EPS = 0.01


def verdicts(network: Any, x: Tensor, labels: Tensor, plan: AttackPlan, *, checks: int = 0, **networks: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with undisturbed_networks(x.device, network):
        return RobustnessTrial(network, plan, **networks).verdicts(x, labels, generator=generator, checks=checks)


@pytest.mark.parametrize("attack", [name for name in ATTACKS if not name.endswith(("l2", "cos"))])
def test_identity_worst_case_of_a_linear_network(attack: str) -> None:
    network, surrogate = Linear(0), Linear(5)
    x, labels = samples()
    found = verdicts(network, x, labels, AttackPlan((EPS, 2 * EPS), (attack,)), surrogate=surrogate)
    w, u = direction(network), direction(surrogate)
    assert torch.equal(found["clean"], margins(network, x, labels) > 0)
    for label, eps in (("0.01", EPS), ("0.02", 2 * EPS)):
        worst = margins(network, x, labels, eps * w.abs().sum()) > 0
        elsewhere = margins(network, x, labels, eps * (w * u.sign()).sum()) > 0
        assert torch.equal(found[f"adaptive_{label}"], worst)
        assert torch.equal(found[f"transfer_{label}"], elsewhere & found["clean"])
        assert 0 < worst.sum() < elsewhere.sum() <= found["clean"].sum() < len(x)
        assert found["clean"].sum() >= found[f"noise_{label}"].sum() > worst.sum()


def test_identity_worst_case_in_the_norm_l2() -> None:
    network = Linear(0)
    x, labels = samples()
    found = verdicts(network, x, labels, AttackPlan((0.1,), ("apgd-ce", "pgd-ce"), steps=40, norm="l2"))
    left = margins(network, x, labels, 0.1 * direction(network).norm())
    clear = left.abs() > 0.01  # the ball is round: an attack comes near its pole
    assert clear.sum() > len(x) // 2
    assert torch.equal(found["adaptive_0.1"][clear], left[clear] > 0)
    assert found["adaptive_0.1"].sum() < found["noise_0.1"].sum()


def test_radius_is_a_share_of_the_valid_range() -> None:
    network = Linear(0)
    x, labels = samples()
    plain = verdicts(network, x, labels, AttackPlan((EPS,)))
    wide = verdicts(lambda x: network((x + 1) / 2), 2 * x - 1, labels, AttackPlan((EPS,), valid_range=(-1.0, 1.0)))
    mean, std = torch.tensor(0.4).view(1, 1, 1), torch.tensor(0.3).view(1, 1, 1)
    bounds = ((0 - mean) / std, (1 - mean) / std)
    normal = verdicts(
        lambda x: network(x * std + mean), (x - mean) / std, labels, AttackPlan((EPS,), valid_range=bounds)
    )
    for name in ("clean", "adaptive_0.01"):
        assert torch.equal(plain[name], wide[name])
        assert torch.equal(plain[name], normal[name])
    assert 0 < plain["adaptive_0.01"].sum() < plain["clean"].sum()


# ../golden/advcal.json, to 6 places: X, W and CB as they are, the centre of each class by `mean_centre`.
X = [
    [0.64776, 0.999787, 0.619625, 0.064212, 0.14723, 0.747057, 0.984945, 0.512388],
    [0.920735, 0.872853, 0.27874, 0.008774, 0.458455, 0.969, 0.792459, 0.187465],
    [0.995832, 0.57056, 0.041917, 0.184367, 0.78922, 0.970365, 0.462424, 0.009532],
    [0.837732, 0.235082, 0.020538, 0.508407, 0.98396, 0.75051, 0.150063, 0.062274],
    [0.52079, 0.024199, 0.224657, 0.828493, 0.951086, 0.412837, 0.002282, 0.320885],
    [0.194071, 0.037093, 0.558275, 0.994084, 0.706059, 0.116157, 0.088586, 0.663737],
]
W = [
    [0.369555, 0.923586, 0.938058, 0.402019, -0.278866, -0.589319, -0.294393, 0.382716],
    [0.981466, 0.663774, -0.15901, -0.830192, -0.836553, -0.201601, 0.558261, 0.857528],
    [0.75099, -0.318471, -0.747852, -0.506271, -0.368015, 0.348623, 1.038306, 0.445194],
    [-0.070007, -0.986031, -0.431433, -0.305793, 0.822647, 0.556658, 0.626303, -0.504813],
    [-0.584333, -0.615023, -0.051243, 0.919821, 0.584009, 0.236183, -0.241679, -1.030264],
]
CB = [0.257687, 0.345284, -0.140313, -0.392981, 0.006726]
CENTRES = [
    [0.630241, 0.632234, 0.349763, -0.024409, -0.2831],
    [0.218851, -0.70174, -0.50903, -0.447826, 0.00227],
    [-0.168142, 0.178561, 0.389637, 0.762762, 0.454116],
]


@pytest.mark.parametrize("attacks", [("pgd-ce",), ("pgd-ce", "pgd-l2"), ("apgd-dlr",)])
def test_golden(attacks: tuple[str, ...]) -> None:
    """c6: at 24/255 half of the predictions stay, under CE alone and under the worst of CE and L2."""
    x, w, b, centres = (torch.tensor(value, dtype=torch.float64) for value in (X, W, CB, CENTRES))
    space = InputSpace()
    logits, embedding = space.classifier(lambda x: torch.tanh(x @ w.T + b), torch.float64, centres, 10.0)
    predicted = torch.tensor([0, 0, 0, 2, 1, 1])
    assert torch.equal(logits(x).argmax(1), predicted)
    plan = AttackPlan((24 / 255,), attacks)
    found = verdicts(logits, x, predicted, plan, embedding=embedding)
    assert found["adaptive_24_255"].tolist() == [True, True, False, False, False, True]


class Saturated(nn.Module):
    """A network so sure of half of the samples that the gradient of their cross-entropy is 0 in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Linear(0)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.where(x.flatten(1)[:, :1] > 0.5, 1e5, 1.0)
        logits: Tensor = scale * self.network(x)
        return logits


def test_each_attack_takes_what_the_others_left() -> None:
    x, labels = samples()
    one, two, both, turned = (
        verdicts(Saturated(), x, labels, AttackPlan((EPS,), attacks, steps=20))["adaptive_0.01"]
        for attacks in (("pgd-ce",), ("pgd-repel",), ("pgd-ce", "pgd-repel"), ("pgd-repel", "pgd-ce"))
    )
    assert torch.equal(both, margins(Linear(0), x, labels, EPS * direction(Linear(0)).abs().sum()) > 0)
    assert one.sum() > both.sum()
    assert torch.equal(one & two, both)
    assert torch.equal(turned, both)  # the weaker one, which comes last, takes nothing back


def test_noise_moves_each_entry_by_the_radius_and_mends_nothing() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor) -> Tensor:
        seen.append(x.detach())
        logits: Tensor = Linear(0)(x)
        return logits

    x, labels = samples()
    # 0.3 is far enough to turn samples that are wrong.
    found = verdicts(network, x, labels, AttackPlan((0.3,), steps=1))
    torch.testing.assert_close((seen[-1] - x).abs(), torch.full_like(x, 0.3))
    assert bool((network(seen[-1]).argmax(1) == labels)[~found["clean"]].any())
    assert bool((found["noise_0.3"] <= found["clean"]).all())


def test_embedding_attacks_need_no_labels() -> None:
    network = Linear(0)
    x, labels = samples()
    plan = AttackPlan((2 * EPS,), ("pgd-l2", "pgd-cos"), steps=20)
    found = verdicts(network, x, labels, plan, embedding=lambda x: network(x).tanh())
    assert found["adaptive_0.02"].sum() < found["noise_0.02"].sum()


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.floats(1e-4, 0.1), st.floats(1.0, 3.0), st.integers(1, 8))
def test_properties(eps: float, factor: float, micro_batch: int) -> None:
    network = Linear(0)
    x, labels = samples(12)
    plan = AttackPlan((eps, eps * factor * 1.01), steps=10)
    found = verdicts(network, x, labels, plan)
    near, far = (found[f"adaptive_{label}"] for label in plan.radii)
    assert bool((far <= near).all())
    assert bool((near <= found["clean"]).all())
    small = verdicts(network, x, labels, AttackPlan(plan.eps, steps=10, micro_batch=micro_batch))
    assert all(torch.equal(value, small[name]) for name, value in found.items())


def test_checks_of_a_sound_network() -> None:
    x, labels = samples()
    plan = AttackPlan((EPS, 2 * EPS), ("pgd-ce", "apgd-dlr"))
    found = verdicts(Linear(0), x, labels, plan, checks=30, surrogate=Linear(5))
    assert list(found).sort() == plan.conditions(surrogate=True, checks=True).sort()
    assert [len(found[name]) for name in ("check_same", "check_steps", "clean")] == [30, 30, 40]
    assert bool(found["check_same"].all())
    assert bool(found["check_loss"].all())
    assert len(found["check_loss"]) == found["clean"][:30].sum()
    assert not found["check_whole_range"].any()
    assert torch.equal(
        found["check_steps"],
        margins(Linear(0), *(v[:30] for v in (x, labels)), EPS * direction(Linear(0)).abs().sum()) > 0,
    )
    assert names_of(found, plan) == set()


def names_of(found: dict[str, Tensor], plan: AttackPlan) -> set[str]:
    shares = {name: float(value.float().mean()) for name, value in found.items()}
    return {flaw.name for flaw in find_flaws(shares, {name: len(v) for name, v in found.items()}, plan.radii)}


class Rounded(Linear):
    """A network behind steps without a slope: it hides its gradient, and changes nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.round(x * 255) / 255)


class Random(Linear):
    """A network that answers otherwise each time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.2 * torch.randn_like(x))


def test_masked_gradients_are_found() -> None:
    x, labels = samples()
    plan = AttackPlan((EPS,), steps=5)
    found = verdicts(Rounded(0), x, labels, plan, checks=40, surrogate=Linear(0))
    assert {"transfer", "whole_range"} <= names_of(found, plan)
    assert found["adaptive_0.01"].sum() > found["transfer_0.01"].sum()


def test_random_networks_are_found() -> None:
    x, labels = samples()
    plan = AttackPlan((EPS,), steps=2)
    assert "same" in names_of(verdicts(Random(0), x, labels, plan, checks=40), plan)


def test_nothing_right_is_nothing_to_attack() -> None:
    x, _ = samples()
    network = Linear(0)
    wrong = 1 - network(x).argmax(1)
    found = verdicts(network, x, wrong, AttackPlan((EPS,)), checks=5)
    assert not any(value.any() for name, value in found.items() if name != "check_same")
    assert len(found["check_loss"]) == 0
    infinite = verdicts(lambda x: network(x) + torch.inf, x, 1 - wrong, AttackPlan((EPS,)))
    assert not infinite["clean"].any()


FLAWS = [
    ({"adaptive_a": 0.5, "adaptive_b": 0.4, "noise_a": 0.9, "transfer_a": 0.5}, set()),
    ({"adaptive_a": 0.5, "adaptive_b": 0.51}, set()),  # one sample
    ({"adaptive_a": 0.5, "adaptive_b": 0.52}, {"eps"}),
    ({"adaptive_a": 0.5, "noise_a": 0.48}, {"noise"}),
    ({"adaptive_b": 0.5, "transfer_b": 0.4}, {"transfer"}),
    ({"check_one_step": 0.4, "check_steps": 0.5}, {"steps"}),
    ({"check_one_step": 0.5, "check_steps": 0.4}, set()),
    ({"check_whole_range": 0.05, "check_same": 0.99, "check_loss": 0.99}, set()),
    ({"check_whole_range": 0.06, "check_same": 0.98, "check_loss": 0.98}, {"whole_range", "same", "loss"}),
]


@pytest.mark.parametrize(("shares", "expected"), FLAWS)
def test_flaws(shares: dict[str, float], expected: set[str]) -> None:
    found = find_flaws(shares, dict.fromkeys(shares, 100), {"a": 0.1, "b": 0.2})
    assert {flaw.name for flaw in found} == expected
    # Of ten thousand, one hundred may be chance.
    small = {name: 0.5 + 0.005 * (name == "adaptive_b") for name in ("adaptive_a", "adaptive_b")}
    assert not find_flaws(small, dict.fromkeys(small, 10_000), {"a": 0.1, "b": 0.2})
    assert not find_flaws(shares, dict.fromkeys(shares, 0), {"a": 0.1, "b": 0.2})


def test_leaves_no_trace() -> None:
    network = nn.Sequential(Linear(0), nn.Dropout(0.5)).train()
    network[0].eval()
    x, labels = samples()
    network(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]  # type: ignore[union-attr]
    surrogate = Linear(5)
    state = torch.get_rng_state()
    with torch.inference_mode():
        inner = robust_accuracy(network, x.clone(), labels.clone(), eps=[EPS], surrogate=surrogate.forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outer = robust_accuracy(network, x, labels, eps=[EPS], surrogate=surrogate)
    assert torch.equal(state, torch.get_rng_state())
    assert inner == outer
    assert inner.keys() == {"clean", "adaptive_0.01", "transfer_0.01", "noise_0.01"}
    assert (
        inner["adaptive_0.01"]
        == (margins(Linear(0), x, labels, EPS * direction(Linear(0)).abs().sum()) > 0).float().mean()
    )
    assert [module.training for module in network] == [False, True]
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, network.parameters(), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    x, labels = samples()
    found = robust_accuracy(Linear(0).to(dtype), x.to(dtype), labels, eps=[EPS], attacks=["pgd-ce", "pgd-l2"])
    left = margins(Linear(0), x, labels, EPS * direction(Linear(0)).abs().sum())
    assert found["adaptive_0.01"] == pytest.approx(float((left > 0).float().mean()), abs=0.051)


def test_figure_is_the_same_for_the_same_values() -> None:
    shares = {"clean": 0.9, "adaptive_2_255": 0.4, "noise_2_255": 0.8}
    first, again = (robustness_figure(shares, {"2_255": 2 / 255}, title="val") for _ in range(2))
    assert first == again
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first != robustness_figure({**shares, "clean": 0.8}, {"2_255": 2 / 255}, title="val")


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 10.0), st.integers(1, 254))
def test_labels_of_radii(eps: float, level: int) -> None:
    assert eps_label(level / 255) == f"{level}_255"
    assert float(eps_label(eps).replace("_255", "e0")) == pytest.approx(
        eps if "_" not in eps_label(eps) else eps * 255, rel=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.1, 2)), min_size=1, max_size=3))
def test_pixel_units_come_back(channels: list[tuple[float, float]]) -> None:
    mean, std = ([channel[index] for channel in channels] for index in (0, 1))
    units = PixelUnits(mean, std)
    x = torch.randn(2, len(channels), 3, 2, dtype=torch.float64)
    torch.testing.assert_close(units.normalised(units.pixels(x)), x)
    for index, (m, s) in enumerate(channels):
        torch.testing.assert_close(units.pixels(x)[:, index], x[:, index] * s + m)
    assert units.pixels(x.half()).dtype == torch.float32


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: AttackPlan(eps=()), "eps must be different positive numbers"),
    (lambda: AttackPlan(eps=(0.0,)), "eps must be different positive"),
    (lambda: AttackPlan(eps=(0.2, 0.1)), "eps must ascend"),
    (lambda: AttackPlan(eps=(0.1, 0.1)), "eps must be different"),
    (lambda: AttackPlan(attacks=("pgd-cee",)), "attacks must be one of .*'pgd-cee'. Did you mean pgd-ce"),
    (lambda: AttackPlan(attacks=()), "attacks must be different names, at least one"),
    (lambda: AttackPlan(norm="l3"), "norm must be one of linf, l2"),  # type: ignore[arg-type]
    (lambda: AttackPlan(steps=0), "steps must be at least 1, got 0"),
    (lambda: AttackPlan(valid_range=(1.0, 0.0)), "valid_range must be the lowest and the highest"),
    (lambda: RobustnessTrial(Linear(), AttackPlan(), surrogate_embedding=Linear()), "surrogate_embedding belongs"),
    (lambda: robust_accuracy(Linear(), torch.zeros(0, 1, 4, 4), torch.zeros(0).long()), "x must be at least one input"),
    (lambda: robust_accuracy(Linear(), *samples(4)[:1], torch.tensor([0, 1, 2, 0])), "labels must be labels in 0 … 1"),
    (lambda: robust_accuracy(lambda x: x, *samples(4)), r"must return one row a sample, shape \(4, K\)"),
    (lambda: robust_accuracy(Linear(), 3 * samples(4)[0], samples(4)[1]), "x must lie in valid_range"),
    (lambda: robust_accuracy(lambda x: Linear()(x).detach(), *samples(4)), "must depend on x by operations"),
    (lambda: PixelUnits([0.5], [0.0]), "std positive"),
    (lambda: PixelUnits([0.5, 0.5], [1.0, 1.0]).pixels(torch.zeros(2, 3, 4)), "have 2 channels"),
    (lambda: InputSpace().enter(torch.tensor([2.0])), "run from 2 to 2: give the mean="),
    (lambda: InputSpace().enter(torch.tensor([torch.nan])), "run from nan"),
    (lambda: InputSpace(PixelUnits([0.5], [1.0])).enter(torch.ones(1, 1)), r"without mean \[0.5\]"),
    (lambda: class_centres(Linear(), "training", torch.float32), "class_centres must be a tensor"),
    (
        lambda: callable_member(Linear(), "linear.weigth", "forward"),
        "no 'linear.weigth' for forward. Did you mean weight",
    ),
    (lambda: callable_member(Linear(), "linear.in_features", "forward"), "must name a method or a module"),
]


@pytest.mark.parametrize(("call", "match"), BAD)
def test_bad_arguments(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        call()
