"""How many samples of a classifier stay right under attack, and whether such a number is too good to be true.

A sample is robust within a radius if the network is right on it and on what every attack of a list makes of it: the worst
case for each sample by itself. The share of such samples is an upper bound of the accuracy under the strongest attack there
is, and no proof. For each radius there are three numbers:

    adaptive    the attacks follow the gradient of the network that is judged
    transfer    the attacks follow the gradient of another network, the surrogate, and are judged on this one. The attacker
                knows less: a head behind a frozen encoder may look strong here and be no defence at all
    noise       each entry is moved by the whole radius, up or down at random: no attack, a yardstick

Radii are shares of the valid range [lo, hi] of the inputs, eps * (hi - lo): 4/255 is 4/255 of images in [0, 1], and 8/255
of coordinates in [-1, 1].

`zoo.robustness_checks` reads the verdicts of the checks, and draws the curve.

Sources: the project's notes on adversarial calibration (arXiv 2505.11895), section 5. Not at hand, cited from memory: PGD,
Madry et al., arXiv 1706.06083; APGD, DLR and the worst case over attacks, Croce and Hein, arXiv 2003.01690; the checks,
Athalye et al., arXiv 1802.00420, and Carlini et al., arXiv 1902.06705.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.attack_plan import CHECKS, AttackPlan
from zoo.attacks import Bound, Loss, Norm, apgd, attack_loss, pgd
from zoo.errors import InputError
from zoo.layer_taps import undisturbed
from zoo.losses.contracts import require_labels, working_dtype

__all__ = ["RobustnessTrial", "robust_accuracy", "undisturbed_networks"]

Network = Callable[[Tensor], Tensor]

_EMBEDDING_LOSSES = ("l2", "cos")


def robust_accuracy(
    network: Network,
    x: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[float] = (2 / 255, 4 / 255),
    attacks: Sequence[str] = ("pgd-ce",),
    steps: int = 10,
    restarts: int = 1,
    norm: Norm = "linf",
    valid_range: tuple[Bound, Bound] = (0.0, 1.0),
    embedding: Network | None = None,
    surrogate: Network | None = None,
    surrogate_embedding: Network | None = None,
    generator: torch.Generator | None = None,
    micro_batch: int | None = None,
) -> dict[str, float]:
    """Return the accuracy of a network without and with attacks, the worst case over the attacks for each sample.

    Networks that are modules, or methods of modules, run in eval mode, eagerly and without autocast, and are left as they
    were: modes, gradients and torch's random numbers. Under several processes the shares are those of this process.

    Args:
        network: inputs (B, …) -> logits (B, K), differentiable in its inputs: normalisation goes inside.
        x: inputs (B, …), at least one, in floating point, within the valid range.
        labels: classes (B,).
        eps: see `AttackPlan`.
        attacks: see `AttackPlan`.
        steps: see `AttackPlan`.
        restarts: see `AttackPlan`.
        norm: see `AttackPlan`.
        valid_range: see `AttackPlan`.
        embedding: see `RobustnessTrial`.
        surrogate: see `RobustnessTrial`.
        surrogate_embedding: see `RobustnessTrial`.
        generator: see `RobustnessTrial.verdicts`.
        micro_batch: see `AttackPlan`.

    Returns:
        Shares by condition: ``clean``, and for each radius, such as ``2_255``, ``noise_2_255``, ``adaptive_2_255`` and,
        with a surrogate, ``transfer_2_255``.

    Raises:
        InputError: what `AttackPlan` and `RobustnessTrial` refuse.

    Example:
        A network that compares two pixels; one pair is nearer than two radii, so an attack swaps them:

        >>> x = torch.tensor([[0.2, 0.8], [0.50, 0.51]])
        >>> robust_accuracy(lambda x: 9 * x, x, torch.tensor([1, 1]), eps=[0.1])["adaptive_0.1"]
        0.5
    """
    plan = AttackPlan(tuple(eps), tuple(attacks), steps, restarts, norm, valid_range, micro_batch)
    trial = RobustnessTrial(
        network, plan, embedding=embedding, surrogate=surrogate, surrogate_embedding=surrogate_embedding
    )
    with undisturbed_networks(x.device, network, embedding, surrogate, surrogate_embedding):
        verdicts = trial.verdicts(x, labels, generator=generator)
    return {name: value.float().mean().item() for name, value in verdicts.items()}


@contextmanager
def undisturbed_networks(device: torch.device, *networks: object) -> Iterator[None]:
    """Make attacks possible in whatever mode of gradients, inference and precision, and leave no trace of them.

    Inside, the modules among the networks are in eval mode and run eagerly, without autocast. Afterwards modes and random
    numbers are as they were; see `zoo.layer_taps.undisturbed`.

    Args:
        device: where the networks run.
        *networks: modules, methods of modules, other functions and None, of which the last two stay as they are.
    """
    found = (getattr(network, "__self__", network) for network in networks)
    with ExitStack() as stack:
        for module in (nn.Identity(), *found):
            if isinstance(module, nn.Module):
                stack.enter_context(undisturbed(module, device))
        yield


class _Attackable(NamedTuple):
    """A network as attacks see it."""

    logits: Network
    embedding: Network


class _Samples(NamedTuple):
    """Inputs (B, …) and their classes (B,)."""

    x: Tensor
    labels: Tensor

    def rows(self, chosen: slice | Tensor) -> _Samples:
        return _Samples(self.x[chosen], self.labels[chosen])


class RobustnessTrial:
    """The attacks of a plan on one network, batch by batch.

    Whether the networks are in eval mode is the caller's affair: `undisturbed_networks` sees to it. Parameters' ``.grad``
    stays as it is.

    Args:
        network: inputs (B, …) -> logits (B, K); adaptive attacks follow its gradients.
        plan: the attacks.
        embedding: inputs -> embeddings (B, D), which the attacks ``l2`` and ``cos`` move; the logits if omitted.
        surrogate: another network, inputs -> logits, whose gradients the transfer attacks follow; none if omitted.
        surrogate_embedding: its embeddings; its logits if omitted.

    Raises:
        InputError: an embedding of a surrogate without the surrogate.
    """

    def __init__(
        self,
        network: Network,
        plan: AttackPlan,
        *,
        embedding: Network | None = None,
        surrogate: Network | None = None,
        surrogate_embedding: Network | None = None,
    ) -> None:
        if surrogate is None and surrogate_embedding is not None:
            raise InputError("surrogate_embedding belongs to a surrogate: give surrogate= as well")
        self.plan = plan
        self._own = _Attackable(network, embedding or network)
        self._other = None if surrogate is None else _Attackable(surrogate, surrogate_embedding or surrogate)

    def verdicts(
        self, x: Tensor, labels: Tensor, *, generator: torch.Generator | None = None, checks: int = 0
    ) -> dict[str, Tensor]:
        """Return whether the network is right on each sample under each condition; `RobustAccuracy` counts that.

        A sample that is wrong without an attack is wrong under all, and is not attacked. So is one whose logits are not
        finite.

        Args:
            x: inputs (B, …), at least one, in floating point, within the valid range.
            labels: classes (B,).
            generator: draws random starts and noise, on the device of `x`; torch's own if omitted.
            checks: on how many samples, the first, the checks are made. They take about `steps` more passes for each
                attack, and as many again.

        Returns:
            Booleans (B,) by condition: ``clean``, and for each radius, such as ``2_255``, ``noise_2_255``,
            ``adaptive_2_255`` and, with a surrogate, ``transfer_2_255``. With checks, for so many samples: ``check_same``,
            whether an attack of radius 0 leaves input and prediction as they are; ``check_one_step`` and ``check_steps``,
            right after one step, and after all, of the first attack within the smallest radius; ``check_whole_range``,
            right under all attacks that may go anywhere in the valid range. ``check_loss``, of those that were attacked:
            whether the loss at the end of that first attack is at least that of the clean sample.

        Raises:
            InputError: no input, inputs outside of the valid range or not in floating point, labels out of range, a network
                that returns no logits, or one whose output has no gradient.
        """
        if not len(x) or not x.is_floating_point():
            raise InputError(f"x must be at least one input in floating point, got {tuple(x.shape)} of {x.dtype}")
        logits = torch.cat(list(self._outputs(self._own.logits, x)))
        require_labels("labels", labels.cpu(), rows=len(x), classes=logits.shape[1])
        samples, predictions = _Samples(x, labels), _predictions(logits)
        right = predictions == labels
        found = {"clean": right}
        for label, eps in self.plan.radii.items():
            found[f"adaptive_{label}"] = self._survivors(self._own, samples, right, eps, generator)
            if self._other is not None:
                found[f"transfer_{label}"] = self._survivors(self._other, samples, right, eps, generator)
            found[f"noise_{label}"] = right & self._right(self._noise(x, eps, generator), labels)
        if checks:
            found |= self._checks(samples.rows(slice(checks)), predictions[:checks], generator)
        return found

    # -- attacks ---------------------------------------------------------------------------------------------------

    def _survivors(
        self, target: _Attackable, samples: _Samples, right: Tensor, eps: float, generator: torch.Generator | None
    ) -> Tensor:
        """Return which samples no attack turns; each attack takes those that are left."""
        left = right.clone()
        for name in self.plan.attacks:
            rows = left.nonzero().squeeze(1)
            if not len(rows):
                break
            chosen = samples.rows(rows)
            left[rows] = self._right(self._attack(target, name, chosen, eps, generator), chosen.labels)
        return left

    def _attack(
        self,
        target: _Attackable,
        name: str,
        samples: _Samples,
        eps: float,
        generator: torch.Generator | None,
        *,
        one_step: bool = False,
    ) -> Tensor:
        plan, radius = self.plan, self._radius(samples.x, eps)
        loss, targets = self._loss(target, name, samples)
        options: dict[str, Any] = {
            "eps": radius, "steps": 1 if one_step else plan.steps, "norm": plan.norm, "valid_range": plan.valid_range,
            "restarts": plan.restarts, "generator": generator, "micro_batch": plan.micro_batch,
        }  # fmt: skip
        attacked: Tensor
        if name.startswith("pgd"):
            # Long enough to come from any point of the ball to any other.
            share = 1.0 if one_step else max(0.25, 2.5 / plan.steps)
            attacked = pgd(loss, samples.x, targets, step_size=share * radius, **options)
        else:
            attacked = apgd(loss, samples.x, targets, **options)
        return attacked

    def _loss(self, target: _Attackable, name: str, samples: _Samples) -> tuple[Loss, Tensor]:
        """Return the loss that an attack raises, of inputs and targets, and the targets."""
        kind, x = name.partition("-")[2], samples.x
        moved = kind in _EMBEDDING_LOSSES
        network = target.embedding if moved else target.logits
        # Attacks compute in float32 at least; the network gets what it was given.
        loss = attack_loss(kind, lambda points: network(points.to(x.dtype)))
        return loss, torch.cat(list(self._outputs(network, x))) if moved else samples.labels

    def _noise(self, x: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
        wide = x.to(working_dtype(x))
        move = torch.randn(x.shape, generator=generator, device=x.device, dtype=wide.dtype)
        if self.plan.norm == "linf":
            move = torch.where(move < 0, -1, 1)
        else:
            move = move / torch.linalg.vector_norm(move.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))
        low, high = (torch.as_tensor(bound, device=x.device) for bound in self.plan.valid_range)
        return (wide + self._radius(x, eps) * move).clamp(low, high).to(x.dtype)

    def _radius(self, x: Tensor, eps: float) -> Bound:
        low, high = self.plan.valid_range
        radius = eps * (high - low)
        return radius.to(x.device) if isinstance(radius, Tensor) else radius

    # -- judgement -------------------------------------------------------------------------------------------------

    def _right(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([_predictions(logits) for logits in self._outputs(self._own.logits, x)]) == labels

    @torch.no_grad()
    def _outputs(self, network: Network, x: Tensor) -> Iterator[Tensor]:
        for part in torch.split(x, self.plan.micro_batch or len(x)):
            output = network(part.clone())  # a network may change its input in place
            if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(part):
                told = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise InputError(f"a network must return one row a sample, shape ({len(part)}, K), got {told}")
            yield output

    def _checks(self, samples: _Samples, predictions: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        name, eps = self.plan.attacks[0], self.plan.eps[0]
        still = self._attack(self._own, name, samples, 0.0, generator)
        right = predictions == samples.labels
        found = {check: right.clone() for check in CHECKS}
        found["check_same"] = (still == samples.x).flatten(1).all(1) & self._right(still, predictions)
        rows = right.nonzero().squeeze(1)
        found["check_loss"] = right[rows]
        if not len(rows):
            return found
        chosen = samples.rows(rows)
        attacked = self._attack(self._own, name, chosen, eps, generator, one_step=True)
        found["check_one_step"][rows] = self._right(attacked, chosen.labels)
        attacked = self._attack(self._own, name, chosen, eps, generator)
        found["check_steps"][rows] = self._right(attacked, chosen.labels)
        found["check_loss"] = self._not_lower(name, chosen, attacked)
        # The longest way through a box, in units of its side.
        everywhere = 1.0 if self.plan.norm == "linf" else math.sqrt(samples.x[0].numel())
        found["check_whole_range"][rows] = self._survivors(self._own, chosen, right[rows], everywhere, generator)
        return found

    @torch.no_grad()
    def _not_lower(self, name: str, samples: _Samples, attacked: Tensor) -> Tensor:
        """Return for which samples the loss of an attack is not lower than without it."""
        loss, targets = self._loss(self._own, name, samples)
        size = self.plan.micro_batch or len(attacked)
        parts = zip(*(torch.split(one, size) for one in (samples.x, attacked, targets)), strict=True)
        return torch.cat([loss(after.clone(), rows) >= loss(before.clone(), rows) for before, after, rows in parts])


def _predictions(logits: Tensor) -> Tensor:
    """Return classes (B,), -1 where a logit is not finite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)
