"""What the verdicts of a robustness trial give away: signs that its accuracies are too good, and the curve over radii."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Finding", "find_flaws", "robustness_figure"]

# Attacks begin at random: a difference counts from the second sample on, and above this share of them.
_TOLERANCE = 0.01
# An attack that may do anything leaves nothing; so much is forgiven to one of few steps.
_LEFT = 0.05
_COLOURS = {"adaptive": "#d55e00", "transfer": "#0072b2", "noise": "#999999"}  # Okabe and Ito
_MARKERS = {"adaptive": "o", "transfer": "s", "noise": "^"}
_INK = "#222222"
_DPI = 120


class Finding(NamedTuple):
    """Something that a sound evaluation does not show.

    Attributes:
        name: ``"same"``, ``"loss"``, ``"noise"``, ``"transfer"``, ``"eps"``, ``"steps"`` or ``"whole_range"``.
        message: what was seen, what it means, and what to do, in a sentence or two.
    """

    name: str
    message: str


class _Counts:
    """The verdicts as numbers of samples."""

    def __init__(self, shares: Mapping[str, float], samples: Mapping[str, int]) -> None:
        self.shares = shares
        self.samples = {name: count for name, count in samples.items() if count}

    def has(self, *names: str) -> bool:
        return all(name in self.samples for name in names)

    def exceeds(self, name: str, other: float, tolerance: float = _TOLERANCE) -> bool:
        """Whether a share is greater than another by more than chance, or one sample, can make it."""
        count = self.samples[name]
        return round((self.shares[name] - other) * count) > max(1, tolerance * count)

    def told(self, name: str) -> str:
        return f"{self.shares[name]:.1%}"


def find_flaws(shares: Mapping[str, float], samples: Mapping[str, int], radii: Mapping[str, float]) -> list[Finding]:
    """Return what shows that attacks were weaker than they look, or the network other than they took it for.

    A difference counts if it is more than one sample and more than 1 % of them.

    Args:
        shares: by condition, as `zoo.metrics.RobustAccuracy` returns them; those that are missing are not judged.
        samples: how many samples are behind each.
        radii: by their names, ascending, as in `zoo.attack_plan.AttackPlan.radii`.

    Returns:
        The findings; none is no proof.

    Example:
        >>> found = find_flaws({"noise_0.1": 0.5, "adaptive_0.1": 0.9}, {"noise_0.1": 50, "adaptive_0.1": 50}, {"0.1": 0.1})
        >>> [finding.name for finding in found]
        ['noise']
    """
    counts = _Counts(shares, samples)
    return [*_between_radii(counts, list(radii)), *_at_each_radius(counts, list(radii)), *_of_checks(counts)]


def _between_radii(counts: _Counts, labels: list[str]) -> list[Finding]:
    for first, second in pairwise(labels):
        near, far = f"adaptive_{first}", f"adaptive_{second}"
        if counts.has(near, far) and counts.exceeds(far, counts.shares[near]):
            return [
                Finding(
                    "eps",
                    f"more samples stay right within {second} ({counts.told(far)}) than within the smaller {first} "
                    f"({counts.told(near)}): the attack does not find what is there. Give it more steps or restarts",
                )
            ]
    return []


def _at_each_radius(counts: _Counts, labels: list[str]) -> list[Finding]:
    found: dict[str, Finding] = {}
    for label in labels:
        adaptive, noise, transfer = (f"{kind}_{label}" for kind in ("adaptive", "noise", "transfer"))
        if counts.has(adaptive, noise) and counts.exceeds(adaptive, counts.shares[noise]):
            found.setdefault(
                "noise",
                Finding(
                    "noise",
                    f"random noise of {label} leaves fewer samples right ({counts.told(noise)}) than the attack "
                    f"({counts.told(adaptive)}): its gradients lead nowhere",
                ),
            )
        if counts.has(adaptive, transfer) and counts.exceeds(adaptive, counts.shares[transfer]):
            found.setdefault(
                "transfer",
                Finding(
                    "transfer",
                    f"within {label}, attacks made for the surrogate leave fewer samples right ({counts.told(transfer)}) "
                    f"than those that see the network itself ({counts.told(adaptive)}): its gradients are masked. The "
                    "accuracy under the adaptive attack is too high; add other losses (dlr, repel, l2)",
                ),
            )
    return list(found.values())


def _of_checks(counts: _Counts) -> list[Finding]:
    found = []
    if counts.has("check_same") and _misses(counts, "check_same"):
        found.append(
            Finding(
                "same",
                f"the network gives the same answer twice for {counts.told('check_same')} of the samples only: something in "
                "it is random (dropout, noise, augmentation), and an attack has to average over that",
            )
        )
    if counts.has("check_loss") and _misses(counts, "check_loss"):
        found.append(
            Finding(
                "loss",
                f"the attack raised its loss for {counts.told('check_loss')} of the samples only: its steps are too long, "
                "or the gradient is not that of the loss",
            )
        )
    one, many = "check_one_step", "check_steps"
    if counts.has(one, many) and counts.exceeds(many, counts.shares[one]):
        found.append(
            Finding(
                "steps",
                f"one step leaves fewer samples right ({counts.told(one)}) than many ({counts.told(many)}): gradients are "
                "masked near the samples, as after training on attacks of one step",
            )
        )
    whole = "check_whole_range"
    if counts.has(whole) and counts.exceeds(whole, 0.0, _LEFT):
        found.append(
            Finding(
                "whole_range",
                f"{counts.told(whole)} of the samples stay right under an attack that may turn them into anything: the "
                "gradient does not get through (saturated logits, a step without gradient), or the steps are too few",
            )
        )
    return found


def _misses(counts: _Counts, name: str) -> bool:
    count = counts.samples[name]
    return round((1 - counts.shares[name]) * count) > max(1, _TOLERANCE * count)


def robustness_figure(shares: Mapping[str, float], radii: Mapping[str, float], *, title: str) -> bytes:
    """Draw accuracy over the radius, one line for each kind of attack; the same bytes for the same values.

    Args:
        shares: by condition, ``clean`` among them; kinds of attacks without a value are left out.
        radii: by their names, as in `zoo.attack_plan.AttackPlan.radii`.
        title: what stands above, ASCII.

    Returns:
        A PNG file.

    Example:
        >>> robustness_figure({"clean": 0.9, "adaptive_0.1": 0.2}, {"0.1": 0.1}, title="val")[1:4]
        b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.5))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.11, 0.14, 0.86, 0.76))
    levels = all("_255" in label for label in radii)
    for kind, colour in _COLOURS.items():
        known = {eps: shares[f"{kind}_{label}"] for label, eps in radii.items() if f"{kind}_{label}" in shares}
        if known:
            places = [0.0, *(eps * (255 if levels else 1) for eps in known)]
            axes.plot(
                places,
                [shares["clean"], *known.values()],
                color=colour,
                marker=_MARKERS[kind],
                markersize=4,
                label=kind,
            )
    axes.set_ylim(-0.02, 1.02)
    axes.set_facecolor("white")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Every colour is given: the user's own style may be white on black.
    axes.spines[["bottom", "left"]].set_color(_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.set_xlabel(
        "radius in 1/255 of the range" if levels else "radius as a share of the range", fontsize=9, color=_INK
    )
    axes.set_ylabel("accuracy", fontsize=9, color=_INK)
    axes.set_title(title, fontsize=10, color=_INK, parse_math=False)
    axes.legend(fontsize=8, frameon=False, labelcolor=_INK)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()
