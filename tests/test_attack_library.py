"""The library's attacks: what is asked of arguments, and where it is installed, its agreement with ours."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zoo.attacks import apgd, attack_loss, library_attack
from zoo.errors import InputError


def classifier() -> tuple[nn.Module, Tensor, Tensor]:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    x = torch.rand(24, 1, 8, 8)
    return network, x, network.eval()(x).argmax(1)


def test_bad_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "art", None)
    with pytest.raises(InputError, match=r"pip install 'lightning-zoo\[attacks\]', or use zoo.attacks.apgd"):
        library_attack(*classifier(), eps=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ["sqare"]}, r"attacks must be of apgd-ce, apgd-dlr, square, got 'sqare'. Did you mean square"),
        ({"norm": "l1"}, r"norm must be one of linf, l2, got 'l1'"),
        ({"eps": -1.0}, r"eps must be finite and not negative, got -1.0"),
        ({"x": torch.zeros(24, 64)}, r"x must be \(B, C, H, W\) in floating point, got shape \(24, 64\)"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    network, x, labels = classifier()
    given: dict[str, Any] = {"eps": 0.1, "x": x} | options
    with pytest.raises(InputError, match=message):
        library_attack(network, given.pop("x"), labels, **given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.15)])
def test_agrees(norm: Any, eps: float) -> None:
    """As many samples stand against the library's Auto-PGD as against ours, within one; the network is left alone."""
    pytest.importorskip("art.estimators.classification")
    network, x, labels = classifier()
    network.train()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    with torch.inference_mode():
        found = {
            name: library_attack(network, x, labels, eps=eps, attacks=[name], norm=norm, steps=20, queries=50)
            for name in ("apgd-ce", "apgd-dlr", "square")
        }
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state[1]).all()  # noqa: NPY002
    assert network.training
    assert all((parameter.grad == 1).all() for parameter in network.parameters() if parameter.grad is not None)
    network.eval()
    for name, points in found.items():
        move = (points - x).flatten(1)
        assert (move.abs().amax(1) if norm == "linf" else move.norm(dim=1)).max() <= eps * (1 + 1e-4)
        if name != "square":
            ours = apgd(attack_loss(name.removeprefix("apgd-"), network), x, labels, eps=eps, steps=20, norm=norm)
            stand = [int((network(attacked).argmax(1) == labels).sum()) for attacked in (points, ours)]
            assert abs(stand[0] - stand[1]) <= 1
            assert stand[1] < 24
    clean = library_attack(network, x, labels, eps=0.0, attacks=["square"])
    assert torch.equal(clean, x)
