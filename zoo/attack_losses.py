"""What an attack raises: losses of single samples, over the logits or the embeddings of a network.

With z the logits, y the label, z_(1) >= z_(2) >= … the sorted logits, e the embedding and e_0 that of the clean input:

    ce      -log softmax(z)_y
    dlr     -(z_y - max_{i != y} z_i) / (z_(1) - z_(3))       of fewer than three classes: max_{i != y} z_i - z_y
    repel   log sum_{i != y} exp(z_i) - z_y
    l2      || e - e_0 ||^2
    cos     1 - cos(e, e_0)

`ce` is the softplus of `repel`: both order inputs alike, but where the network is sure the gradient of `ce` underflows and
the attack stands still, while that of `repel` and `dlr` does not. `dlr` (Croce, Hein, arXiv 2003.01690) does not change if
logits are scaled or shifted. Of two classes z_(3) does not exist, and a quotient by z_(1) - z_(2) would be ±1 with gradient
0: there it is the plain margin. `repel` is our stand-in for an attack that drives the representation away from its own
centre (CALMARS, arXiv 2505.11895v2, of which we read the abstract only).

`l2` and `cos` need no labels. Both have the gradient 0 at the clean input itself: an attack needs a start elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError, nearest
from zoo.losses.contracts import require_labels, require_matrix, require_same_layout, unit_rows, working_dtype

__all__ = ["ATTACK_LOSSES", "attack_loss"]

# As in the release of the authors of DLR: keeps the quotient finite where the three highest logits are equal.
_TIE = 1e-12


def attack_loss(name: str, network: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Make the loss of an attack from a network.

    Args:
        name: `"ce"`, `"dlr"` or `"repel"` for a network that returns logits (B, K), with labels (B,) as targets; `"l2"` or
            `"cos"` for one that returns embeddings (B, d), with those of the clean inputs as targets, which are constants.
            `"l2"` takes the embeddings as they are; have the network return unit vectors where directions count.
        network: any callable. A module whose parameters are in another precision than the attack's gets its input in its
            own; its output is taken to float32 (float64 stays) either way.

    Returns:
        A function of inputs (B, …) and targets that returns one value a sample (B,), to be raised.

    Raises:
        InputError: an unknown name. The returned function raises it for outputs and targets that do not fit each other,
            and where a single class leaves `"dlr"` and `"repel"` nothing to be taken for.

    Example:
        >>> loss = attack_loss("repel", lambda x: x)
        >>> loss(torch.tensor([[3.0, 1.0], [0.0, 5.0]]), torch.tensor([0, 0]))
        tensor([-2.,  5.])
    """
    if name not in ATTACK_LOSSES:
        raise InputError(
            f"the loss of an attack must be one of {', '.join(ATTACK_LOSSES)}, got {name!r}.{nearest(name, ATTACK_LOSSES)}"
        )
    chosen = ATTACK_LOSSES[name]
    dtype = _own_precision(network)

    def loss(x: Tensor, targets: Tensor) -> Tensor:
        output = network(x if dtype is None else x.to(dtype))
        if not isinstance(output, Tensor):
            raise InputError(
                f"the network must return a tensor, got {type(output).__name__}; wrap it in a function that does"
            )
        require_matrix("the network's output", output)
        return chosen(output.to(working_dtype(output)), targets)

    return loss


def _own_precision(network: object) -> torch.dtype | None:
    if not isinstance(network, nn.Module):
        return None
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), None)


def _ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, _labels(logits, labels), reduction="none")


def _dlr(logits: Tensor, labels: Tensor) -> Tensor:
    own, others = _own_and_others(logits, labels)
    margin = others.amax(1) - own
    if logits.shape[1] < 3:
        return margin
    highest = logits.topk(3, dim=1).values
    return margin / (highest[:, 0] - highest[:, 2] + _TIE)


def _repel(logits: Tensor, labels: Tensor) -> Tensor:
    own, others = _own_and_others(logits, labels)
    return others.logsumexp(1) - own


def _l2(embeddings: Tensor, clean: Tensor) -> Tensor:
    return (embeddings - _clean(embeddings, clean)).square().sum(1)


def _cos(embeddings: Tensor, clean: Tensor) -> Tensor:
    return 1 - (unit_rows(embeddings) * unit_rows(_clean(embeddings, clean))).sum(1)


ATTACK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": _ce,
    "dlr": _dlr,
    "repel": _repel,
    "l2": _l2,
    "cos": _cos,
}


def _labels(logits: Tensor, labels: Tensor) -> Tensor:
    require_labels("targets", labels, rows=len(logits), classes=logits.shape[1])
    return labels.long()


def _own_and_others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logit of the label (B,), and all logits with -inf in its place."""
    index = _labels(logits, labels).unsqueeze(1)
    if logits.shape[1] < 2:
        raise InputError("dlr and repel need at least two classes, got logits of one; use l2 or cos on its embeddings")
    return logits.gather(1, index).squeeze(1), logits.scatter(1, index, -torch.inf)


def _clean(embeddings: Tensor, clean: Tensor) -> Tensor:
    require_matrix("targets", clean)
    require_same_layout("targets", clean, "the network's output", embeddings)
    return clean.detach().to(embeddings.dtype)
