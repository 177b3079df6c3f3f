"""The strongest check of an image classifier: attacks of a kept library, one of them without gradients.

Adapts the Adversarial Robustness Toolbox (Trusted-AI, MIT licence) from the extra `attacks`. Its Auto-PGD is written
independently of `zoo.attacks.apgd`, and its Square Attack (Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a
query-efficient black-box adversarial attack via random search", arXiv 1912.00049) asks for outputs only: a classifier that
stands against gradients and falls to it hides its gradients.

The library computes in NumPy and float32, and copies every batch between host and device. It takes classifiers of [lo, hi]
inputs only; for embeddings, other modalities and speed there is `zoo.attacks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from zoo.attack_problem import Norm
from zoo.errors import InputError, nearest, require_choice
from zoo.layer_taps import undisturbed
from zoo.losses.contracts import require_labels, require_number

__all__ = ["LIBRARY_ATTACKS", "library_attack"]

LIBRARY_ATTACKS = ("apgd-ce", "apgd-dlr", "square")


def library_attack(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    attacks: Sequence[str] = LIBRARY_ATTACKS,
    norm: Norm = "linf",
    valid_range: tuple[float, float] = (0.0, 1.0),
    steps: int = 100,
    queries: int = 5000,
    restarts: int = 1,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Attack the samples that are classified correctly, one attack after another, until each is wrong or none is left.

    A module is run in eval mode, and its mode, its parameters' ``.grad`` and all random numbers are as before afterwards;
    any other callable that runs modules has to see to that itself.

    Args:
        network: takes float32 inputs (B, …) and returns logits (B, K), K >= 2, K >= 3 for `"apgd-dlr"`.
        x: clean inputs (B, C, H, W) in floating point, inside `valid_range`.
        labels: (B,) integers in 0 … K - 1.
        eps: radius of the ball, at least 0, in the units of `x`.
        attacks: in this order, of `"apgd-ce"`, `"apgd-dlr"`, `"square"`.
        norm: `"linf"` or `"l2"`.
        valid_range: lowest and highest value of an input.
        steps: of each run of Auto-PGD, at least 1.
        queries: of each run of the Square Attack, at least 1.
        restarts: runs of each attack, at least 1.
        batch_size: samples that pass through the network at a time.
        seed: of the library's random numbers, which are NumPy's.

    Returns:
        Inputs (B, C, H, W) in the dtype and on the device of `x`; those that were wrong from the start are the clean ones.

    Raises:
        InputError: the library is not installed, an unknown attack, or arguments that do not fit each other.
    """
    for name in attacks:
        if name not in LIBRARY_ATTACKS:
            raise InputError(
                f"attacks must be of {', '.join(LIBRARY_ATTACKS)}, got {name!r}.{nearest(name, LIBRARY_ATTACKS)}"
            )
    require_choice("norm", norm, ("linf", "l2"))
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"x must be (B, C, H, W) in floating point, got shape {tuple(x.shape)} of {x.dtype}")
    require_number("eps", eps, positive=False)
    _require_library()
    model = network if isinstance(network, nn.Module) else nn.Module()
    with undisturbed(model, x.device), _seeded(seed):
        clean = x.detach().clone().float()
        classes = labels.detach().clone()
        wrapped = _Constant(network, batch_size)
        logits = wrapped.in_batches(clean)
        require_labels("labels", classes, rows=len(x), classes=logits.shape[1])
        standing = logits.argmax(1) == classes
        found = clean.clone()
        estimator = _estimator(wrapped, clean, logits.shape[1], valid_range)
        options = {"steps": steps, "queries": queries, "restarts": restarts, "batch_size": batch_size}
        for name in attacks:
            if eps == 0 or not bool(standing.any()):
                break
            targets = F.one_hot(classes[standing].long(), logits.shape[1]).float()
            made = _make(name, estimator, eps=eps, norm=norm, **options)
            points = torch.from_numpy(made.generate(clean[standing].cpu().numpy(), targets.cpu().numpy())).to(clean)
            # The library divides by the length of a change, which may be 0.
            found[standing] = torch.where(points.isfinite(), points, clean[standing])
            standing = standing & (wrapped.in_batches(found).argmax(1) == classes)
        return torch.where(found == clean, x.detach(), found.to(x.dtype)).clone()


class _Constant(nn.Module):
    """A network whose parameters are constants, so that the library's backward passes leave them alone."""

    def __init__(self, network: Callable[[Tensor], Tensor], batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.hidden = (network,)  # not registered: the library sets modes and gradients of what it finds

    def forward(self, x: Tensor) -> Tensor:
        (network,) = self.hidden
        if not isinstance(network, nn.Module):
            return network(x)
        constants = {name: parameter.detach() for name, parameter in network.named_parameters()}
        output: Tensor = functional_call(network, constants, (x,))
        return output

    @torch.no_grad()
    def in_batches(self, x: Tensor) -> Tensor:
        return torch.cat([self(part) for part in torch.split(x, self.batch_size)])


def _require_library() -> None:
    try:
        # Not `art` alone: a package of that name draws letters.
        import art.attacks.evasion
        import art.estimators.classification  # noqa: F401
    except ImportError as error:
        raise InputError(
            "attacks of the library need the Adversarial Robustness Toolbox; install it with pip install "
            f"'lightning-zoo[attacks]', or use zoo.attacks.apgd ({error})"
        ) from error


def _estimator(wrapped: nn.Module, x: Tensor, classes: int, valid_range: tuple[float, float]) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        wrapped,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classes,
        clip_values=valid_range,
        device_type="gpu" if x.device.type == "cuda" else "cpu",
    )


def _make(
    name: str,
    estimator: Any,
    *,
    eps: float,
    norm: Norm,
    steps: int,
    queries: int,
    restarts: int,
    batch_size: int,
) -> Any:
    from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack

    order = np.inf if norm == "linf" else 2
    common = {"norm": order, "eps": eps, "batch_size": batch_size, "verbose": False}
    if name == "square":
        return SquareAttack(estimator, max_iter=queries, nb_restarts=restarts, **common)
    loss = "cross_entropy" if name == "apgd-ce" else "difference_logits_ratio"
    return AutoProjectedGradientDescent(
        estimator, eps_step=2 * eps, max_iter=steps, nb_random_init=restarts, loss_type=loss, **common
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """NumPy's global random numbers, which the library draws from, seeded inside and as before afterwards."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
